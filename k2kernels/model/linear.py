"""Small modules of the model: linear layers, with FP8 products or FP8 weights, and buffers that stay float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from k2kernels.functional.fp8_linear import fp8_linear
from k2kernels.ops.fp8_gemm import fp8_gemm, fp8_gemm_swiglu
from k2kernels.ops.quant import dequantize, quantize_1x128

BLOCK = 128  # rows and columns that share one scale


class Float32Buffers(nn.Module):
    """A module whose buffers keep their dtype when the model is cast (`.to(torch.bfloat16)`).

    `reset_buffers` sets the initial values of non-persistent buffers; it is called when the module leaves the meta
    device, where tensors have no values.
    """

    def reset_buffers(self) -> None:
        raise NotImplementedError

    def _apply(self, fn: Callable, recurse: bool = True) -> Float32Buffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        if any(buffer.is_meta and not self._buffers[name].is_meta for name, buffer in before.items()):
            self.reset_buffers()
        return self


class Linear(nn.Linear):
    """A linear layer without bias; where `fp8` is set, by `K2Model.use_fp8`, its products are FP8, gradients included.

    The weight keeps its dtype: it is the master weight that the optimizer updates and checkpoints hold.
    """

    fp8 = False

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight) if self.fp8 else super().forward(x)


class Fp8Linear(nn.Module):
    """A linear layer with an e4m3 weight and one float32 scale per 128x128 block, for inference.

    The input is quantised on the fly, one scale per row and 128 columns: the checkpoints' `activation_scheme: dynamic`;
    a power of two with `power_of_two` (`scale_fmt: ue8m0`).
    `weight_scale_inv` is the factor that dequantises (the name is the checkpoints').
    """

    def __init__(self, in_features: int, out_features: int, power_of_two: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.power_of_two = in_features, out_features, power_of_two
        codes = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-out_features // BLOCK), -(-in_features // BLOCK), dtype=torch.float32)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scales, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(*self._quantized(x), x)

    def swiglu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of silu(gate) * up for another layer's `product`; the first half of `forward` is gate."""
        scaling = dict(power_of_two=self.power_of_two, scale_layout="column")
        return fp8_gemm_swiglu(*self._quantized(x), self.weight, self.weight_scale_inv, **scaling)

    def product(self, data: Tensor, scales: Tensor, like: Tensor) -> Tensor:
        """`forward` of codes and scales; the result has `like`'s leading axes and dtype."""
        out = fp8_gemm(data, scales, self.weight, self.weight_scale_inv, out_dtype=like.dtype)
        return out.view(*like.shape[:-1], self.out_features)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`."""
        return dequantize(self.weight, self.weight_scale_inv, block=(BLOCK, BLOCK), dtype=dtype)

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_1x128(x.flatten(0, -2), power_of_two=self.power_of_two, scale_layout="column")
