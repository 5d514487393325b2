"""Training for 4-bit weights: products whose forward is the served one, with straight-through gradients.

Source: weight-only quantisation-aware training as Kimi-K2-Thinking describes it (2025); here the forward pass *is* the
op that serves the exported weights, so that the two agree to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k2kernels.ops._check import Arguments
from k2kernels.ops.quant import QUANTIZABLE
from k2kernels.ops.w4_gemm import W4, dequantize_w4, quantize_int4_group32, quantize_mxfp4
from k2kernels.ops.w4_gemm.gradient import grouped_w4_gemm_dgrad, pack_masters
from k2kernels.ops.w4_gemm.packed import check_w4
from k2kernels.ops.w4_gemm.product import multiply

TRAINED = ("int4", "mxfp4")  # kinds that weights are quantised to in training


def fake_quantize_int4(w: Tensor, *, q_min: int = -7) -> Tensor:
    """`dequantize_w4(*quantize_int4_group32(w))`: bfloat16 [..., N, K]; the gradient passes through to w.

    Raises:
        TypeError, ValueError: as `quantize_int4_group32`.
    """
    return _StraightThrough.apply(w, dequantize_w4(*quantize_int4_group32(w, q_min=q_min)))


def fake_quantize_mxfp4(w: Tensor, *, scale_rule: str = "even") -> Tensor:
    """`dequantize_w4(*quantize_mxfp4(w))`: bfloat16 [..., N, K]; the gradient passes through to w.

    Raises:
        TypeError, ValueError: as `quantize_mxfp4`.
    """
    return _StraightThrough.apply(w, dequantize_w4(*quantize_mxfp4(w, scale_rule=scale_rule)))


def grouped_w4_linear(
    x: Tensor,
    w: Tensor,
    *,
    offsets: Tensor,
    counts: Tensor,
    kind: str = "int4",
    expected: int | None = None,
    packed: W4 | None = None,
) -> Tensor:
    """`grouped_w4_gemm` with weights in high precision that are quantised and packed on the fly; differentiable.

    The bits of the forward pass are those of `grouped_w4_gemm` with the exported weights. The gradient of x is that of
    the product with the quantised weights; that of w is the product's too, as if they had not been rounded.

    Args:
        x: [S, K] bfloat16, the slots of all experts.
        w: [G, N, K] bfloat16, float16 or float32, the master weights; K a multiple of 32.
        offsets, counts, expected: as for `grouped_w4_gemm`.
        kind: "int4" (`quantize_int4_group32`, q from -7 to 7) or "mxfp4" (`quantize_mxfp4`).
        packed: what `pack_w4` makes of w quantised to `kind`, where an earlier call has left it: several micro-batches
            between two changes of w need one packing. That it is of these w is not checked.

    Returns:
        [S, N] bfloat16; rows of no group are unspecified. Beside x, the packed weights are kept for the backward pass,
        which dequantises a few experts at a time. Differentiable once, in x and w.

    Raises:
        TypeError, ValueError: for dtypes and shapes; on a CPU, for NaN or infinity in w, MXFP4 scales of more than 2
            and groups out of range. On a GPU, where the host does not wait, such weights multiply as NaN or infinity.
    """
    args = Arguments("grouped_w4_linear")
    x = args.tensor("x", x, ("S", "K"), torch.bfloat16)
    w = args.tensor("w", w, ("G", "N", "K"), QUANTIZABLE)
    args.require(w.shape[-1] % 32 == 0, "w", "of a K that is a multiple of 32", w.shape)
    offsets = args.tensor("offsets", offsets, (w.shape[0] + 1,), torch.int32)
    counts = args.tensor("counts", counts, ("G",), torch.int32)
    args.choice("kind", kind, TRAINED)
    if packed is None:
        packed = pack_masters(w, kind)
    else:
        packed = check_w4(args, "packed", packed)
        same = packed[1:] == (kind, tuple(w.shape), False)
        args.require(same, "packed", f"of kind {kind}, shape {list(w.shape)}, not gated", lambda: packed[1:])
    if expected is not None:
        args.integer("expected", expected, 0)
    return _GroupedLinear.apply(x, w, packed.data, offsets, counts, kind, expected)


class _StraightThrough(torch.autograd.Function):
    """`quantized`, whose gradient is that of w."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, quantized: Tensor) -> Tensor:
        ctx.dtype = w.dtype
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        data: Tensor,
        offsets: Tensor,
        counts: Tensor,
        kind: str,
        expected: int | None,
    ) -> Tensor:
        ctx.save_for_backward(x, data, offsets, counts)
        ctx.kind, ctx.shape, ctx.dtype, ctx.expected = kind, tuple(w.shape), w.dtype, expected
        return multiply(x, W4(data, kind, ctx.shape, False), offsets, counts, False, expected)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, data, *groups = ctx.saved_tensors
        d_x = d_w = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            d_x = grouped_w4_gemm_dgrad(grad, None, data, *groups, ctx.kind, *ctx.shape[1:], ctx.expected)
        if ctx.needs_input_grad[1]:
            d_w = torch.ops.k2kernels.grouped_gemm_wgrad(grad, x, *groups).to(ctx.dtype)
        return d_x, d_w, None, None, None, None, None
