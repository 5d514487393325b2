"""Block quantisation to e4m3, of RMSNorm's and SwiGLU's results too, and SwiGLU: the definitions.

A block of x becomes codes and one float32 scale, x ~ code * scale, by these rules, which a kernel meets bit for bit:

    amax  = largest |x| of the block's finite elements, in float32
    scale = max(amax / 448, 2**-126), rounded up to a power of two (power_of_two) before the division
    code  = e4m3(x / scale): a true float32 division, then rounded to nearest, ties to even

The floor 2**-126 is the smallest normal float32, a power of two: a block of zeros gets a finite scale and zero codes,
no scale is a denormal (a GPU may flush those to zero), and blocks with amax >= 448 * 2**-126 are not affected. Nothing
saturates: no quotient rounds beyond 448. NaN and infinities become the NaN code 0x7F and do not affect the scale of
their block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from k2kernels.reference._numeric import wide, wide_dtype

E4M3_MAX = 448.0
SMALLEST_NORMAL = 2.0**-126


def quantize_1x128(
    x: Tensor,
    power_of_two: bool = False,
    scale_layout: str = "row",
    transpose: bool = False,
    offsets: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One scale per 128 elements of a row of x [..., M, K], or of x^T [..., K, M]; padding rows count as zeros."""
    x = _without_padding(x, offsets, counts)
    data, scales = _quantize(x.mT if transpose else x, (1, 128), power_of_two)
    return data, store_scales(scales, scale_layout)


def quantize_128x128(w: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """One scale per 128x128 block of w [..., N, K]; blocks at the edges are smaller."""
    return _quantize(w, (128, 128), power_of_two)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool, scale_layout: str
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128` of the model's norm: x / sqrt(mean(x**2) + eps) * weight in float32, rounded to x's dtype."""
    return quantize_1x128(F.rms_norm(x, weight.shape, weight, eps), power_of_two, scale_layout)


def dequantize(data: Tensor, scales: Tensor, block_rows: int, block_columns: int, dtype: torch.dtype) -> Tensor:
    """code * scale in float32 (exact in float64 for float64), rounded once to dtype."""
    precision = wide_dtype(dtype)
    codes = _blocks(from_e4m3(data).to(precision), (block_rows, block_columns))
    return _unblock(codes * scales.to(precision)[..., :, None, :, None], data.shape).to(dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2I], gate first; computed in float32 (float64 stays), one rounding."""
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of `swiglu`: [..., I] and [..., 2I] give [..., 2I]."""
    gate, up = wide(gate_up).chunk(2, dim=-1)
    grad = grad.to(gate.dtype)
    d_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([d_gate, grad * F.silu(gate)], dim=-1).to(gate_up.dtype)


def swiglu_quantize(
    gate_up: Tensor,
    weights: Tensor | None,
    power_of_two: bool,
    scale_layout: str,
    offsets: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128` of silu(gate) * up (* weights), which stays in float32 in between."""
    hidden = swiglu(gate_up.float())
    if weights is not None:
        hidden = hidden * weights.unsqueeze(-1)
    return quantize_1x128(hidden, power_of_two, scale_layout, False, offsets, counts)


def store_scales(scales: Tensor, scale_layout: str) -> Tensor:
    """The same scales [..., M, blocks]; for "column" with the rows contiguous, strides (1, M rounded up to 4)."""
    if scale_layout == "row":
        return scales
    rows = scales.shape[-2]
    stored = scales.new_zeros((*scales.shape[:-2], scales.shape[-1], -(-rows // 4) * 4))
    stored[..., :rows] = scales.mT
    return stored[..., :rows].mT


def from_e4m3(codes: Tensor) -> Tensor:
    """`codes.float()` by integer operations, several times faster than PyTorch's conversion on a CPU.

    Sign, exponent and mantissa put into a float16 read as the value times 2**-8, denormals included. The NaN code alone
    reads as a number: it gets the exponent of NaN.
    """
    bits = codes.view(torch.int8).to(torch.int16)  # repeats the sign to the left, so that it survives the shift
    is_nan = ((bits & 0x7F) + 1) & 0x80  # 0x80 or 0
    float16 = (bits << 7) & ~0x4000 | is_nan * (0x7C00 // 0x80)
    return float16.view(torch.float16).float().mul_(256)


def _without_padding(x: Tensor, offsets: Tensor | None, counts: Tensor | None) -> Tensor:
    """x with zeros in the rows of no group; groups are rows of [cap, K] by offsets, or the matrices of [G, maxM, K]."""
    rows = x.shape[-2]
    if offsets is not None:
        counts = offsets.diff() if counts is None else counts
        change = counts.new_zeros(rows + 1)  # +1 where a group starts, -1 where it ends
        change.index_add_(0, offsets[:-1], torch.ones_like(counts))
        change.index_add_(0, offsets[:-1] + counts, -torch.ones_like(counts))
        real = change.cumsum(0)[:rows] > 0
    elif counts is not None:
        real = torch.arange(rows, device=x.device) < counts[:, None]
    else:
        return x
    return torch.where(real[..., None], x, 0)


def _quantize(x: Tensor, block: tuple[int, int], power_of_two: bool) -> tuple[Tensor, Tensor]:
    blocks = _blocks(x.float(), block)  # [..., rows of blocks, block rows, columns of blocks, block columns]
    amax = blocks.abs().nan_to_num_(0.0, posinf=0.0).amax(dim=(-3, -1), keepdim=True)
    # Divided by a tensor: by a Python number, PyTorch multiplies with the rounded reciprocal on a GPU.
    scales = (amax / torch.full_like(amax, E4M3_MAX)).clamp(min=SMALLEST_NORMAL)
    if power_of_two:
        # Adding all ones to the mantissa carries into the exponent unless the mantissa was zero.
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    # PyTorch makes 448 of infinities, and 0xFF of a NaN with a sign.
    codes = (blocks / scales).nan_to_num_(math.nan, posinf=math.nan, neginf=math.nan).to(torch.float8_e4m3fn)
    return _unblock(codes, x.shape), scales.squeeze((-3, -1)).contiguous()


def _blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[..., N, K] as [..., ceil(N/rows), rows, ceil(K/columns), columns], padded with zeros."""
    rows, columns = block
    *leading, height, width = x.shape
    row_blocks, column_blocks = -(-height // rows), -(-width // columns)
    if (height, width) != (row_blocks * rows, column_blocks * columns):
        padded = x.new_zeros(*leading, row_blocks * rows, column_blocks * columns)
        padded[..., :height, :width] = x
        x = padded
    return x.reshape(*leading, row_blocks, rows, column_blocks, columns)


def _unblock(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Back from `_blocks` to the matrices of `shape`, without the padding."""
    *leading, row_blocks, rows, column_blocks, columns = blocks.shape
    padded = blocks.reshape(*leading, row_blocks * rows, column_blocks * columns)
    return padded[..., : shape[-2], : shape[-1]].contiguous()
