"""Block quantisation to e4m3, of RMSNorm's and SwiGLU's results too, and SwiGLU: the public functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments, check_blocks, check_counts, check_groups
from k2kernels.ops._constants import constants
from k2kernels.ops._launch import TYPES, address, launch, matrices
from k2kernels.ops._register import register
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
    - NaN and infinities become the NaN code 0x7F and do not touch the scale of the others.

    Args:
        x: [..., M, K]; bfloat16, float16 or float32; any strides.
        power_of_two: round each scale up to a power of two (the UE8M0 rule) *before* dividing by it. A scale that is
            a power of two already stays.
        scale_layout: how the scales [..., M, ceil(K/128)] lie in memory. "row": contiguous. "column": the rows of a
            column are contiguous, strides (1, M rounded up to 4), as the GEMM kernels load them.
        transpose: quantise the transpose instead: data [..., K, M], one scale per 128 of *M*; equal bit for bit to
            `quantize_1x128(x.mT)`.
        offsets, counts: where the rows are grouped, as `grouped_fp8_gemm` takes them: [G+1] and [G] int32 for x
            [cap, K], or counts alone for x [G, maxM, K]. The padding rows are not read: with `transpose` they count as
            zeros and have zero codes, else their codes and scales hold nothing to rely on.

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
        block: (1, 128) or (128, 128). It is never guessed from the sizes, which do not tell it: 192 rows with 2 rows
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
            [cap, 2I], or counts alone for gate_up [G, maxM, 2I]. Padding rows are not read; their codes and scales hold
            nothing to rely on (the reference makes them rows of zeros).

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


def _quantize_1x128_fake(
    x: Tensor, power_of_two: bool, scale_layout: str, transpose: bool, offsets: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    *leading, rows, columns = x.mT.shape if transpose else x.shape
    scales = empty_scales(x, (*leading, rows, -(-columns // 128)), scale_layout)
    return x.new_empty(*leading, rows, columns, dtype=torch.float8_e4m3fn), scales


def _launch_quantizer(
    op: str,
    function: str,
    x: Tensor,
    columns: int,
    results: tuple[Tensor, Tensor],
    power_of_two: bool,
    weights: Tensor | None = None,
    offsets: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fills `results` from x [..., M, columns] ([..., M, 2 * columns] for SwiGLU)."""
    data, scales = results
    x, (batches, rows, _), strides = matrices(x)
    weights, offsets, counts = [t if t is None else t.contiguous() for t in (weights, offsets, counts)]
    groups = 0 if offsets is None else offsets.shape[0] - 1
    launch(
        op,
        function,
        x.device,
        x.data_ptr(),
        TYPES[x.dtype],
        data.data_ptr(),
        scales.data_ptr(),
        address(weights),
        (batches, rows, columns),
        strides,
        (scales.stride(-3) if scales.ndim > 2 else 0, *scales.stride()[-2:]),
        address(offsets),
        address(counts),
        groups,
        power_of_two,
    )
    return results


def _quantize_1x128_kernel(
    x: Tensor, power_of_two: bool, scale_layout: str, transpose: bool, offsets: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    results = _quantize_1x128_fake(x, power_of_two, scale_layout, transpose, offsets, counts)
    function = "quantize_1x128_transposed" if transpose else "quantize_1x128"
    return _launch_quantizer("quantize_1x128", function, x, x.shape[-1], results, power_of_two, None, offsets, counts)


_quantize_1x128 = register(
    "quantize_1x128(Tensor x, bool power_of_two, str scale_layout, bool transpose, Tensor? offsets, Tensor? counts)"
    " -> (Tensor, Tensor)",
    reference=reference.quantize_1x128,
    fake=_quantize_1x128_fake,
    kernel=_quantize_1x128_kernel,
    validate=lambda x, power_of_two, scale_layout, transpose, offsets, counts: _validate_groups(
        "quantize_1x128", x, offsets, counts
    ),
)


def _quantize_128x128_fake(w: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    *leading, rows, columns = w.shape
    scales = empty_scales(w, (*leading, -(-rows // 128), -(-columns // 128)), "row")
    return w.new_empty(*w.shape, dtype=torch.float8_e4m3fn), scales


def _quantize_128x128_kernel(w: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    results = _quantize_128x128_fake(w, power_of_two)
    return _launch_quantizer("quantize_128x128", "quantize_128x128", w, w.shape[-1], results, power_of_two)


_quantize_128x128 = register(
    "quantize_128x128(Tensor w, bool power_of_two) -> (Tensor, Tensor)",
    reference=reference.quantize_128x128,
    fake=_quantize_128x128_fake,
    kernel=_quantize_128x128_kernel,
)


def _rms_norm_quantize_fake(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool, scale_layout: str
) -> tuple[Tensor, Tensor]:
    scales = empty_scales(x, (*x.shape[:-1], -(-x.shape[-1] // 128)), scale_layout)
    return x.new_empty(*x.shape, dtype=torch.float8_e4m3fn), scales


def _rms_norm_quantize_kernel(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool, scale_layout: str
) -> tuple[Tensor, Tensor]:
    results = _rms_norm_quantize_fake(x, weight, eps, power_of_two, scale_layout)
    data, scales = results
    x, sizes, strides = matrices(x)
    weight = weight.contiguous()
    launch(
        "rms_norm_quantize",
        "rms_norm_quantize",
        x.device,
        x.data_ptr(),
        weight.data_ptr(),
        TYPES[x.dtype],
        data.data_ptr(),
        scales.data_ptr(),
        sizes,
        strides,
        (scales.stride(-3) if scales.ndim > 2 else 0, *scales.stride()[-2:]),
        eps,
        power_of_two,
    )
    return results


def _rms_norm_quantize_unserved(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool, scale_layout: str
) -> str | None:
    if x.shape[-1] <= (most := constants.QUANT_NORM_MOST_COLUMNS):
        return None
    return f"the kernel takes rows of at most {most} columns, got {x.shape[-1]}"


_rms_norm_quantize = register(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps, bool power_of_two, str scale_layout) -> (Tensor, Tensor)",
    reference=reference.rms_norm_quantize,
    fake=_rms_norm_quantize_fake,
    kernel=_rms_norm_quantize_kernel,
    unserved=_rms_norm_quantize_unserved,
)


def _dequantize_fake(data: Tensor, scales: Tensor, block_rows: int, block_columns: int, dtype: torch.dtype) -> Tensor:
    return data.new_empty(*data.shape, dtype=dtype)


def _dequantize_kernel(data: Tensor, scales: Tensor, block_rows: int, block_columns: int, dtype: torch.dtype) -> Tensor:
    values = _dequantize_fake(data, scales, block_rows, block_columns, dtype)
    data, sizes, strides = matrices(data)
    scales = scales.reshape(sizes[0], *scales.shape[-2:])
    launch(
        "dequantize",
        "dequantize",
        data.device,
        data.data_ptr(),
        scales.data_ptr(),
        values.data_ptr(),
        TYPES[dtype],
        sizes,
        strides,
        scales.stride(),
        block_rows,
    )
    return values


_dequantize = register(
    "dequantize(Tensor data, Tensor scales, int block_rows, int block_columns, ScalarType dtype) -> Tensor",
    reference=reference.dequantize,
    fake=_dequantize_fake,
    kernel=_dequantize_kernel,
    unserved=lambda data, scales, block_rows, block_columns, dtype: _float64(dtype),
)


def _float64(dtype: torch.dtype) -> str | None:
    return "no kernel computes in float64" if dtype == torch.float64 else None


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as one matrix."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _swiglu_fake(gate_up: Tensor) -> Tensor:
    *leading, columns = gate_up.shape
    return gate_up.new_empty(*leading, columns // 2)


def _swiglu_kernel(gate_up: Tensor) -> Tensor:
    hidden = _swiglu_fake(gate_up)
    gate_up, (_, rows, columns), (_, row_stride) = matrices(_rows(gate_up))
    launch(
        "swiglu",
        "swiglu",
        gate_up.device,
        gate_up.data_ptr(),
        hidden.data_ptr(),
        TYPES[gate_up.dtype],
        rows,
        columns // 2,
        row_stride,
    )
    return hidden


def _swiglu_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _swiglu_grad(ctx: Any, grad: Tensor) -> Tensor:
    return _swiglu_backward(grad, *ctx.saved_tensors)


_swiglu = register(
    "swiglu(Tensor gate_up) -> Tensor",
    reference=reference.swiglu,
    fake=_swiglu_fake,
    kernel=_swiglu_kernel,
    unserved=lambda gate_up: _float64(gate_up.dtype),
    setup_context=_swiglu_setup,
    backward=_swiglu_grad,
)


def _swiglu_backward_fake(grad: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape)


def _swiglu_backward_kernel(grad: Tensor, gate_up: Tensor) -> Tensor:
    d_gate_up = _swiglu_backward_fake(grad, gate_up)
    grad, (_, rows, columns), (_, grad_row_stride) = matrices(_rows(grad))
    gate_up, _, (_, gate_up_row_stride) = matrices(_rows(gate_up))
    launch(
        "swiglu_backward",
        "swiglu_backward",
        gate_up.device,
        grad.data_ptr(),
        gate_up.data_ptr(),
        d_gate_up.data_ptr(),
        TYPES[gate_up.dtype],
        rows,
        columns,
        grad_row_stride,
        gate_up_row_stride,
    )
    return d_gate_up


_swiglu_backward = register(
    "swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor",
    reference=reference.swiglu_backward,
    fake=_swiglu_backward_fake,
    kernel=_swiglu_backward_kernel,
    unserved=lambda grad, gate_up: _float64(gate_up.dtype),
)


def _swiglu_quantize_fake(gate_up, weights, power_of_two, scale_layout, offsets, counts) -> tuple[Tensor, Tensor]:
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    scales = empty_scales(gate_up, (*shape[:-1], -(-shape[-1] // 128)), scale_layout)
    return gate_up.new_empty(*shape, dtype=torch.float8_e4m3fn), scales


def _swiglu_quantize_kernel(gate_up, weights, power_of_two, scale_layout, offsets, counts) -> tuple[Tensor, Tensor]:
    results = _swiglu_quantize_fake(gate_up, weights, power_of_two, scale_layout, offsets, counts)
    columns = gate_up.shape[-1] // 2
    return _launch_quantizer(
        "swiglu_quantize", "swiglu_quantize", gate_up, columns, results, power_of_two, weights, offsets, counts
    )


_swiglu_quantize = register(
    "swiglu_quantize(Tensor gate_up, Tensor? weights, bool power_of_two, str scale_layout, Tensor? offsets,"
    " Tensor? counts) -> (Tensor, Tensor)",
    reference=reference.swiglu_quantize,
    fake=_swiglu_quantize_fake,
    kernel=_swiglu_quantize_kernel,
    validate=lambda gate_up, weights, power_of_two, scale_layout, offsets, counts: _validate_groups(
        "swiglu_quantize", gate_up, offsets, counts
    ),
)
