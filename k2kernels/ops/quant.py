"""Block quantisation to e4m3, of RMSNorm's and SwiGLU's results too, and SwiGLU: the public functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments, check_blocks, check_counts, check_groups
from k2kernels.ops._constants import constants
from k2kernels.ops._launch import launch, matrices
from k2kernels.ops._register import declare
from k2kernels.reference import quant as reference

QUANTIZABLE = (torch.bfloat16, torch.float16, torch.float32)


def quantize_1x128(
    x: Tensor,
    *,
    power_of_two: bool = False,
    scale_layout: str = "row",
    transpose: bool = False,
    offsets: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantises a matrix of activations to e4m3, with one scale per row and 128 columns.

    A group of 128 neighbours in a row (the last may be shorter) becomes codes and a float32 scale, x ~ code * scale:

    - amax is the largest magnitude of the group's finite elements; scale = max(amax / 448, 2**-126), so that a group
      of zeros has zero codes and a finite scale, and no scale is a denormal.
    - code = x / scale by a true float32 division, rounded to nearest with ties to even; no magnitude exceeds 448.
    - NaN and infinities become the NaN code 0x7F and do not affect the scale.

    Args:
        x: [..., M, K]; bfloat16, float16 or float32; any strides.
        power_of_two: round each scale up to a power of two (the UE8M0 rule) *before* dividing by it. A scale that is
            a power of two already stays.
        scale_layout: memory layout of the scales [..., M, ceil(K/128)]. "row": contiguous. "column": the rows of a
            column are contiguous, strides (1, M rounded up to 4), as the GEMM kernels load them.
        transpose: quantise the transpose instead: data [..., K, M], one scale per 128 of *M*; equal bit for bit to
            `quantize_1x128(x.mT)`.
        offsets, counts: where the rows are grouped, as `grouped_fp8_gemm` takes them: [G+1] and [G] int32 for x
            [cap, K], or counts alone for x [G, maxM, K]. The padding rows are not read: with `transpose` they count as
            zeros and have zero codes, else their codes and scales are unspecified.

    Returns:
        data float8_e4m3fn like x (or its transpose), contiguous; scales float32. Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes, shapes and options, and, on a CPU, for offsets or counts out of range.

    Source: DeepSeek-V3 (2024), section 3.3.2.
    """
    args = Arguments("quantize_1x128")
    x = args.tensor("x", x, ("...", "M", "K"), QUANTIZABLE)
    args.boolean("power_of_two", power_of_two)
    args.choice("scale_layout", scale_layout, ("row", "column"))
    args.boolean("transpose", transpose)
    offsets, counts = _groups(args, x, "x", offsets, counts)
    return _quantize_1x128(x, power_of_two, scale_layout, transpose, offsets, counts)


def quantize_128x128(w: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantises weights to e4m3, with one scale per 128x128 block; the rules are those of `quantize_1x128`.

    Args:
        w: [..., N, K], stacked experts [E, N, K] included; bfloat16, float16 or float32. Blocks at the lower and right
            edge are smaller and take their amax over the elements that exist.
        power_of_two: round each scale up to a power of two before dividing by it.

    Returns:
        data float8_e4m3fn [..., N, K]; scales float32 [..., ceil(N/128), ceil(K/128)], both contiguous: what a
        DeepSeek-V3 checkpoint stores as `weight` and `weight_scale_inv`. Not differentiable.

    Raises:
        TypeError, ValueError: for dtype and shape.

    Source: DeepSeek-V3, README_WEIGHTS.md.
    """
    args = Arguments("quantize_128x128")
    w = args.tensor("w", w, ("...", "N", "K"), QUANTIZABLE)
    args.boolean("power_of_two", power_of_two)
    return _quantize_128x128(w, power_of_two)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, power_of_two: bool = False, scale_layout: str = "row"
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128` of RMSNorm's result, which is never written: x is read once, codes and scales are.

    y = x / sqrt(mean(x**2) + eps) * weight over each row, in float32 and rounded once to x's dtype, as
    `torch.nn.functional.rms_norm` gives it; then the rules of `quantize_1x128`. A row's result does not depend on the
    other rows.

    Args:
        x: [..., M, K]; bfloat16, float16 or float32; any strides.
        weight: [K] in x's dtype.
        eps: added to the mean of squares, at least 0.
        power_of_two, scale_layout: as `quantize_1x128` takes them.

    Returns:
        data float8_e4m3fn [..., M, K], contiguous, and scales float32 [..., M, ceil(K/128)]. Not differentiable. A
        kernel adds the squares in another order than the reference, so 1 / sqrt(...) may differ in its last bits; with
        that number given, every bit is determined. Rows of more than 8192 columns are served by the reference.

    Raises:
        TypeError, ValueError: for dtypes, shapes and options.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); the fused operator of TensorRT-LLM and
    vLLM.
    """
    args = Arguments("rms_norm_quantize")
    x = args.tensor("x", x, ("...", "M", "K"), QUANTIZABLE)
    args.require(x.shape[-1] > 0, "x", "at least one column wide", lambda: list(x.shape))
    weight = args.tensor("weight", weight, ("K",), x.dtype, remedy="one factor per column, in x's dtype")
    eps = args.number("eps", eps)
    args.require(eps >= 0, "eps", "at least 0", eps)
    args.boolean("power_of_two", power_of_two)
    args.choice("scale_layout", scale_layout, ("row", "column"))
    return _rms_norm_quantize(x, weight, eps, power_of_two, scale_layout)


def dequantize(
    data: Tensor, scales: Tensor, *, block: tuple[int, int] = (1, 128), dtype: torch.dtype = torch.float32
) -> Tensor:
    """Codes times scales.

    Args:
        data: [..., N, K] float8_e4m3fn. A part of a larger matrix begins at multiples of `block` there; a view of one
            with 128x128 blocks that does not is refused, a copy is not recognised.
        scales: [..., ceil(N/block[0]), ceil(K/block[1])] float32, any strides.
        block: (1, 128) or (128, 128). It is not inferred from the sizes, which are ambiguous: 192 rows with 2 rows
            of scales are blocks of 128 and 64 rows, not of 96.
        dtype: of the result: float32, bfloat16, float16, or float64, in which the product is exact.

    Returns:
        [..., N, K] in dtype, from a product in float32 (float64 for float64). Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes, shapes that do not fit the block, views that begin inside one, and options.

    Source: DeepSeek-V3 (`inference/kernel.py`, weight_dequant).
    """
    args = Arguments("dequantize")
    data = args.tensor("data", data, ("...", "N", "K"), torch.float8_e4m3fn)
    block = args.choice("block", tuple(block) if isinstance(block, list) else block, ((1, 128), (128, 128)))
    args.choice("dtype", dtype, FLOATS)
    rows, columns = block
    shape = (*data.shape[:-2], -(-data.shape[-2] // rows), -(-data.shape[-1] // columns))
    scales = args.tensor("scales", scales, shape, torch.float32, remedy=f"one per {rows}x{columns} of data")
    if rows == 128:
        check_blocks(args, "data", data, scales, rows_remedy="dequantize from the block's first row on")
    return _dequantize(data, scales, rows, columns, dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU: silu(gate) * up.

    Args:
        gate_up: [..., 2I], gate in the first half of the last axis; float32, bfloat16, float16 or float64.

    Returns:
        [..., I] in gate_up's dtype, computed in float32 (float64 for float64) and rounded once. Differentiable.

    Raises:
        TypeError, ValueError: for the dtype, or a last axis that is odd.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    args = Arguments("swiglu")
    gate_up = args.tensor("gate_up", gate_up, ("...", "2I"), FLOATS)
    args.require(gate_up.shape[-1] % 2 == 0, "gate_up", "even in its last axis", gate_up.shape)
    return _swiglu(gate_up)


def swiglu_quantize(
    gate_up: Tensor,
    *,
    weights: Tensor | None = None,
    power_of_two: bool = False,
    scale_layout: str = "row",
    counts: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128(silu(gate) * up * weight)` in one pass; nothing is rounded before the quantisation.

    Args:
        gate_up: [..., M, 2I], gate in the first half of the last axis; bfloat16, float16 or float32.
        weights: [..., M] float32, one factor per row (a routing weight), applied in float32.
        power_of_two, scale_layout: as `quantize_1x128` takes them.
        counts, offsets: where the rows are grouped, as `grouped_fp8_gemm` takes them: [G] and [G+1] int32 for gate_up
            [cap, 2I], or counts alone for gate_up [G, maxM, 2I]. Padding rows are not read; their codes and scales are
            unspecified (those of rows of zeros by the reference).

    Returns:
        data float8_e4m3fn [..., M, I] and scales float32 [..., M, ceil(I/128)]. Not differentiable. A kernel's exp may
        differ from the reference's in the last bit, hence a code by one step.

    Raises:
        TypeError, ValueError: for dtypes, shapes and options, and, on a CPU, for offsets or counts out of range.

    Source: DeepSeek-V3 (2024), section 3.3; the fused operator of DeepGEMM and SGLang.
    """
    args = Arguments("swiglu_quantize")
    gate_up = args.tensor("gate_up", gate_up, ("...", "M", "2I"), QUANTIZABLE)
    args.require(gate_up.shape[-1] % 2 == 0, "gate_up", "even in its last axis", gate_up.shape)
    weights = args.optional("weights", weights, tuple(gate_up.shape[:-1]), torch.float32)
    args.boolean("power_of_two", power_of_two)
    args.choice("scale_layout", scale_layout, ("row", "column"))
    offsets, counts = _groups(args, gate_up, "gate_up", offsets, counts)
    return _swiglu_quantize(gate_up, weights, power_of_two, scale_layout, offsets, counts)


def _groups(
    args: Arguments, x: Tensor, name: str, offsets: Tensor | None, counts: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Checks offsets and counts against the rows of x [cap, ...], or counts alone against x [G, maxM, ...]."""
    if offsets is not None:
        args.require(x.ndim == 2, name, "a matrix where offsets are given", x.shape)
        offsets = args.tensor("offsets", offsets, ("G+1",), torch.int32)
        args.require(offsets.shape[0] > 0, "offsets", "[G+1]: at least one number", offsets.shape)
        counts = args.optional("counts", counts, (offsets.shape[0] - 1,), torch.int32)
    elif counts is not None:
        args.require(x.ndim == 3, name, "[G, maxM, ...] where counts come without offsets", x.shape)
        counts = args.tensor("counts", counts, (x.shape[0],), torch.int32)
    return offsets, counts


def _validate_groups(op: str, x: Tensor, offsets: Tensor | None, counts: Tensor | None) -> None:
    if offsets is not None:
        check_groups(op, offsets, counts, x.shape[0])
    elif counts is not None:
        check_counts(op, "counts", counts, x.shape[1])


def empty_scales(x: Tensor, shape: tuple[int, ...], scale_layout: str) -> Tensor:
    """Scales [..., M, blocks], "column" meaning strides (1, M rounded up to 4)."""
    if scale_layout == "row":
        return x.new_empty(*shape, dtype=torch.float32)
    *leading, rows, blocks = shape
    return x.new_empty(*leading, blocks, -(-rows // 4) * 4, dtype=torch.float32)[..., :rows].mT


def empty_codes(x: Tensor, shape: tuple[int, ...], scale_layout: str) -> tuple[Tensor, Tensor]:
    """Codes of `shape` and a scale for each row and 128 columns, without data."""
    scales = empty_scales(x, (*shape[:-1], -(-shape[-1] // 128)), scale_layout)
    return x.new_empty(shape, dtype=torch.float8_e4m3fn), scales


def _given(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


def _quantize_1x128_outputs(x: Tensor, scale_layout: str, transpose: bool) -> tuple[Tensor, Tensor]:
    return empty_codes(x, tuple(x.mT.shape if transpose else x.shape), scale_layout)


def _launch_quantize_1x128(
    data: Tensor,
    scales: Tensor,
    x: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    power_of_two: bool,
    transpose: bool,
) -> None:
    launch("quantize_1x128", matrices(x), *_given(offsets, counts), power_of_two, transpose, data, scales)


_quantize_1x128 = declare(
    reference.quantize_1x128,
    outputs=_quantize_1x128_outputs,
    launch=_launch_quantize_1x128,
    validate=lambda x, offsets, counts: _validate_groups("quantize_1x128", x, offsets, counts),
)


def _quantize_128x128_outputs(w: Tensor) -> tuple[Tensor, Tensor]:
    *leading, rows, columns = w.shape
    scales = empty_scales(w, (*leading, -(-rows // 128), -(-columns // 128)), "row")
    return w.new_empty(*w.shape, dtype=torch.float8_e4m3fn), scales


_quantize_128x128 = declare(
    reference.quantize_128x128,
    outputs=_quantize_128x128_outputs,
    launch=lambda data, scales, w, power_of_two: launch("quantize_128x128", matrices(w), power_of_two, data, scales),
)


def _launch_rms_norm_quantize(
    data: Tensor, scales: Tensor, x: Tensor, weight: Tensor, eps: float, power_of_two: bool
) -> None:
    launch("rms_norm_quantize", matrices(x), weight.contiguous(), eps, power_of_two, data, scales)


def _rms_norm_quantize_unserved(x: Tensor) -> str | None:
    if x.shape[-1] <= (most := constants.QUANT_NORM_MOST_COLUMNS):
        return None
    return f"the kernel takes rows of at most {most} columns, got {x.shape[-1]}"


_rms_norm_quantize = declare(
    reference.rms_norm_quantize,
    outputs=lambda x, scale_layout: empty_codes(x, tuple(x.shape), scale_layout),
    launch=_launch_rms_norm_quantize,
    unserved=_rms_norm_quantize_unserved,
)


def _launch_dequantize(values: Tensor, data: Tensor, scales: Tensor, block_rows: int) -> None:
    if data.ndim > 3:
        scales = scales.reshape(-1, *scales.shape[-2:])
    launch("dequantize", matrices(data), scales, block_rows, values)


def _float64(dtype: torch.dtype) -> str | None:
    return "no kernel computes in float64" if dtype == torch.float64 else None


_dequantize = declare(
    reference.dequantize,
    outputs=lambda data, dtype: data.new_empty(*data.shape, dtype=dtype),
    launch=_launch_dequantize,
    unserved=_float64,
)


def _as_rows(x: Tensor) -> Tensor:
    """x [..., K] as one matrix with stride 1 along columns."""
    x = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _swiglu_outputs(gate_up: Tensor) -> Tensor:
    *leading, columns = gate_up.shape
    return gate_up.new_empty(*leading, columns // 2)


def _swiglu_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _swiglu_grad(ctx: Any, grad: Tensor) -> Tensor:
    return _swiglu_backward(grad, *ctx.saved_tensors)


_swiglu = declare(
    reference.swiglu,
    outputs=_swiglu_outputs,
    launch=lambda hidden, gate_up: launch("swiglu", _as_rows(gate_up), hidden),
    unserved=lambda gate_up: _float64(gate_up.dtype),
    setup_context=_swiglu_setup,
    backward=_swiglu_grad,
)
_swiglu_backward = declare(
    reference.swiglu_backward,
    outputs=lambda gate_up: gate_up.new_empty(*gate_up.shape),
    launch=lambda d_gate_up, grad, gate_up: launch("swiglu_backward", _as_rows(grad), _as_rows(gate_up), d_gate_up),
    unserved=lambda gate_up: _float64(gate_up.dtype),
)


def _swiglu_codes(gate_up: Tensor, scale_layout: str) -> tuple[Tensor, Tensor]:
    return empty_codes(gate_up, (*gate_up.shape[:-1], gate_up.shape[-1] // 2), scale_layout)


def launch_swiglu_quantize(
    data: Tensor,
    scales: Tensor,
    gate_up: Tensor,
    weights: Tensor | None,
    offsets: Tensor | None,
    counts: Tensor | None,
    power_of_two: bool,
) -> None:
    """The kernel of `swiglu_quantize`, into `data` and `scales`."""
    groups = _given(weights, offsets, counts)
    launch("swiglu_quantize", matrices(gate_up), *groups, power_of_two, data, scales)


_swiglu_quantize = declare(
    reference.swiglu_quantize,
    outputs=_swiglu_codes,
    launch=launch_swiglu_quantize,
    validate=lambda gate_up, offsets, counts: _validate_groups("swiglu_quantize", gate_up, offsets, counts),
)
