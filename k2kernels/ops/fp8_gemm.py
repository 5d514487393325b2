"""GEMMs of e4m3 operands with block scales: the public functions."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k2kernels.ops._check import Arguments, check_blocks, check_counts, check_groups
from k2kernels.ops._constants import constants
from k2kernels.ops._launch import TYPES, Chip, address, chip, launch_numbers as launch
from k2kernels.ops._register import register
from k2kernels.ops.quant import QUANTIZABLE, empty_scales, swiglu_quantize
from k2kernels.reference import fp8_gemm as reference

RESULTS = (torch.bfloat16, torch.float16, torch.float32)
E4M3 = torch.float8_e4m3fn


def fp8_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: Tensor | None = None,
    accumulate: Tensor | None = None,
    b_row_offset: int = 0,
    batch_invariant: bool = False,
    row_weights: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """D = (w ·) A · Bᵀ (+ bias) (+ C) of block-scaled e4m3 matrices.

    Per 128 of K, the exact products are summed in float32, multiplied by (a_scale * b_scale) and added to the float32
    result in the order of K; then each row is multiplied by its weight; then bias, then C; then one rounding to
    out_dtype.

    Args:
        a: [M, K] float8_e4m3fn.
        a_scales: [M, ceil(K/128)] float32, of `quantize_1x128`; row or column layout (any strides).
        b: [N, K] float8_e4m3fn: the weight, as a linear layer stores it. A shard along K of a weight with 128x128
            scales begins at a multiple of 128 of K: the blocks of a and of b begin at column 0, and shapes do not tell
            when they do not. A view that begins elsewhere is refused.
        b_scales: float32, [ceil((b_row_offset + N)/128), ceil(K/128)] of `quantize_128x128`, or [N, ceil(K/128)] of
            `quantize_1x128`.
        out_dtype: bfloat16, float16 or float32.
        bias: [N], bfloat16, float16 or float32.
        accumulate: C [M, N], bfloat16, float16 or float32.
        b_row_offset: how many rows of the first 128x128 block lie before row 0 of b: for a shard of a weight that
            starts inside a block, 0 .. 127. A view of codes and scales that starts elsewhere is refused.
        batch_invariant: whether the bits of a row must not depend on how many rows there are. Few rows are otherwise
            served by summing parts of K apart, in a fixed order: the same from call to call, but not the order above.
        row_weights: [M] float32, a factor for each row of A · Bᵀ, not of bias and C.
        out: [M, N] in out_dtype: written in place and returned. It may be `accumulate`, and share memory with any
            other operand.

    Returns:
        D [M, N]. M, N and K are free: none need be a multiple of 128, and any may be 0. Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes and shapes; for a b that is visibly cut inside a block of K, or of rows other
            than b_row_offset says; and, with `out`, for a tensor that requires a gradient.

    Source: DeepSeek-V3 (2024), section 3.3.2; DeepGEMM, fp8_gemm_nt.
    """
    args = Arguments("fp8_gemm")
    a = args.tensor("a", a, ("M", "K"), E4M3)
    b = args.tensor("b", b, ("N", "K"), E4M3)
    blocks = -(-args.sizes["K"] // 128)
    a_scales = args.tensor("a_scales", a_scales, ("M", blocks), torch.float32)
    b_scales = _b_scales(args, b, b_scales, b_row_offset)
    bias = args.optional("bias", bias, ("N",), RESULTS)
    accumulate = args.optional("accumulate", accumulate, ("M", "N"), RESULTS)
    args.choice("out_dtype", out_dtype, RESULTS)
    args.boolean("batch_invariant", batch_invariant)
    row_weights = args.optional("row_weights", row_weights, ("M",), torch.float32)
    options = b_row_offset, batch_invariant, row_weights
    if out is None:
        return _fp8_gemm(a, a_scales, b, b_scales, bias, accumulate, out_dtype, *options)
    inputs = dict(a_scales=a_scales, b_scales=b_scales, bias=bias, accumulate=accumulate, row_weights=row_weights)
    out = _out(args, out, ("M", "N"), out_dtype, **inputs)
    _fp8_gemm_out(a, a_scales, b, b_scales, bias, accumulate, out, *options)
    return out


def grouped_fp8_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    *,
    offsets: Tensor | None = None,
    counts: Tensor | None = None,
    masked_m: Tensor | None = None,
    expected_m: int | None = None,
    b_row_offset: int = 0,
    batch_invariant: bool = False,
    row_weights: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """`fp8_gemm` of each group's rows of A with the group's own B, in one of two layouts.

    Contiguous (`offsets`): the groups follow each other in one matrix A [cap, K]; the rows of group g are
    offsets[g] .. offsets[g] + counts[g]. Masked (`masked_m`): each group has a matrix of its own, A [G, maxM, K], of
    which the first masked_m[g] rows count.

    All other rows are padding: neither read nor written. In a fresh result they hold nothing to rely on (zeros from the
    reference); in `out` they keep what was there.

    Args:
        a: [cap, K], or [G, maxM, K] when masked; float8_e4m3fn.
        a_scales: [cap, ceil(K/128)], or [G, maxM, ceil(K/128)]; float32, row or column layout.
        b: [G, N, K] float8_e4m3fn; cut along K and N as for `fp8_gemm`.
        b_scales: [G, ceil((b_row_offset + N)/128), ceil(K/128)] of `quantize_128x128`, or [G, N, ceil(K/128)]; float32.
        offsets: [G+1] int32, rising within 0 .. cap; any alignment.
        counts: [G] int32, the real rows of each group; None: they fill the space up to the next group.
        masked_m: [G] int32, within 0 .. maxM. Instead of offsets.
        expected_m: about how many rows a group has: a hint for the choice of a kernel, without effect on the result.
        b_row_offset: how many rows of each matrix's first 128x128 block lie before row 0 of b, 0 .. 127.
        batch_invariant: as for `fp8_gemm`.
        row_weights: [cap] or [G, maxM] float32, a factor for each row of D, such as a routing weight.
        out_dtype: bfloat16, float16 or float32.
        out: [cap, N] or [G, maxM, N] in out_dtype: written in place and returned. As for `fp8_gemm`.

    Returns:
        D [cap, N] or [G, maxM, N]. Groups may be empty. Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes, shapes, both layouts or none, a b that is visibly cut inside a block, an
            `out` that requires a gradient, and, on a CPU, for offsets, counts or masked_m out of range.

    Source: DeepGEMM, m_grouped_fp8_gemm_nt_contiguous and _masked.
    """
    args = Arguments("grouped_fp8_gemm")
    rows = _layout(args, offsets, counts, masked_m)
    a = args.tensor("a", a, (*rows, "K"), E4M3)
    b = args.tensor("b", b, ("G", "N", "K"), E4M3)
    a_scales = args.tensor("a_scales", a_scales, (*rows, -(-args.sizes["K"] // 128)), torch.float32)
    b_scales = _b_scales(args, b, b_scales, b_row_offset)
    offsets, counts = _groups(args, offsets, counts, masked_m, expected_m)
    args.choice("out_dtype", out_dtype, RESULTS)
    args.boolean("batch_invariant", batch_invariant)
    row_weights = args.optional("row_weights", row_weights, rows, torch.float32)
    options = b_row_offset, batch_invariant, row_weights
    if out is None:
        return _grouped_fp8_gemm(a, a_scales, b, b_scales, offsets, counts, expected_m, out_dtype, *options)
    out = _out(args, out, (*rows, "N"), out_dtype, a_scales=a_scales, b_scales=b_scales, row_weights=row_weights)
    _grouped_fp8_gemm_out(a, a_scales, b, b_scales, offsets, counts, expected_m, out, *options)
    return out


def fp8_gemm_swiglu(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    *,
    weights: Tensor | None = None,
    power_of_two: bool = False,
    scale_layout: str = "row",
) -> tuple[Tensor, Tensor]:
    """`swiglu_quantize` of `fp8_gemm`: the first product of an expert or MLP, ready for the second.

    The product stays in float32; nothing is rounded before the quantisation. On sm_90a one kernel does both, and the
    product is never stored, where I is a multiple of 128 and b_scales are 128x128; for few rows and elsewhere a GEMM
    leaves the product [M, 2I] in float32 to the kernel of `swiglu_quantize`. `fp8_gemm_plan(..., swiglu=True)` tells.

    Args:
        a, a_scales, b_scales: as for `fp8_gemm`.
        b: [2I, K] float8_e4m3fn: the rows of gate, then those of up; cut along K at multiples of 128, see `fp8_gemm`.
        weights: [M] float32, one factor per row, applied before the quantisation as `swiglu_quantize` does.
        power_of_two, scale_layout: as `quantize_1x128` takes them.

    Returns:
        data float8_e4m3fn [M, I] and scales float32 [M, ceil(I/128)]. Not differentiable. As kernels may sum the inner
        products in another order than the reference, a scale may differ from the reference's by rounding errors and a
        code by one step.

    Raises:
        TypeError, ValueError: for dtypes, shapes and options.

    Source: DeepSeek-V3 (2024), section 3.3; DeepGEMM's fused expert kernel.
    """
    args = Arguments("fp8_gemm_swiglu")
    a = args.tensor("a", a, ("M", "K"), E4M3)
    b = args.tensor("b", b, ("2I", "K"), E4M3)
    a_scales = args.tensor("a_scales", a_scales, ("M", -(-args.sizes["K"] // 128)), torch.float32)
    b_scales = _b_scales(args, b, b_scales, None)
    options = _swiglu_options(args, b, weights, ("M",), power_of_two, scale_layout)
    return _fp8_gemm_swiglu(a, a_scales, b, b_scales, *options)


def grouped_fp8_gemm_swiglu(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    *,
    offsets: Tensor | None = None,
    counts: Tensor | None = None,
    masked_m: Tensor | None = None,
    expected_m: int | None = None,
    weights: Tensor | None = None,
    power_of_two: bool = False,
    scale_layout: str = "row",
) -> tuple[Tensor, Tensor]:
    """`fp8_gemm_swiglu` of each group's rows with the group's own B, in the layouts of `grouped_fp8_gemm`.

    All rows of no group are padding: neither read nor written; what they hold is nothing to rely on.

    Args:
        a, a_scales, b_scales, offsets, counts, masked_m, expected_m: as for `grouped_fp8_gemm`.
        b: [G, 2I, K] float8_e4m3fn: of each group the rows of gate, then those of up.
        weights: [cap] or [G, maxM] float32, one factor per row, such as a routing weight.
        power_of_two, scale_layout: as `quantize_1x128` takes them.

    Returns:
        data float8_e4m3fn [cap, I] or [G, maxM, I] and scales float32 [..., ceil(I/128)]. Not differentiable.

    Raises:
        TypeError, ValueError: as `grouped_fp8_gemm` and `fp8_gemm_swiglu`.

    Source: DeepSeek-V3 (2024), section 3.3; DeepGEMM's fused expert kernel.
    """
    args = Arguments("grouped_fp8_gemm_swiglu")
    rows = _layout(args, offsets, counts, masked_m)
    a = args.tensor("a", a, (*rows, "K"), E4M3)
    b = args.tensor("b", b, ("G", "2I", "K"), E4M3)
    a_scales = args.tensor("a_scales", a_scales, (*rows, -(-args.sizes["K"] // 128)), torch.float32)
    b_scales = _b_scales(args, b, b_scales, None)
    offsets, counts = _groups(args, offsets, counts, masked_m, expected_m)
    options = _swiglu_options(args, b, weights, rows, power_of_two, scale_layout)
    return _grouped_fp8_gemm_swiglu(a, a_scales, b, b_scales, offsets, counts, expected_m, *options)


def grouped_fp8_wgrad(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    *,
    offsets: Tensor,
    counts: Tensor,
    out_dtype: torch.dtype = torch.float32,
    accumulate: Tensor | None = None,
) -> Tensor:
    """The weight gradients of a grouped GEMM: D[g] = A[:, tokens of g] · B[:, tokens of g]ᵀ (+ C[g]).

    For y = x · wᵀ with w [N, K], A is the gradient of y and B is x, both transposed, so that the reduced axis, the
    tokens, is the contiguous one: `quantize_1x128(dy, transpose=True)` and `quantize_1x128(x, transpose=True)`.
    The tokens of group g are offsets[g] .. offsets[g] + counts[g]; a group starts at a multiple of 128, so that no
    block of 128 tokens, which shares a scale, belongs to two groups. The other tokens are padding and are not used.
    The arithmetic is that of `fp8_gemm`, with tokens in the place of K.

    Args:
        a: [N, T] float8_e4m3fn, T tokens of all groups, padding included.
        a_scales: [N, ceil(T/128)] float32, row or column layout.
        b: [K, T] float8_e4m3fn.
        b_scales: [K, ceil(T/128)] float32, row or column layout.
        offsets: [G+1] int32, rising within 0 .. T, multiples of 128 where a group has tokens.
        counts: [G] int32, the real tokens of each group.
        out_dtype: float32, bfloat16 or float16.
        accumulate: C [G, N, K], bfloat16, float16 or float32.

    Returns:
        D [G, N, K]; an empty group gives zeros (or C). Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and, on a CPU, for offsets or counts out of range, or for a group
            with tokens that starts between two multiples of 128.

    Source: DeepGEMM, k_grouped_fp8_gemm_nt_contiguous; here all groups share one matrix.
    """
    args = Arguments("grouped_fp8_wgrad")
    a = args.tensor("a", a, ("N", "T"), E4M3, remedy="the token axis is the last: quantize_1x128(..., transpose=True)")
    b = args.tensor("b", b, ("K", "T"), E4M3, remedy="the token axis is the last: quantize_1x128(..., transpose=True)")
    blocks = -(-args.sizes["T"] // 128)
    a_scales = args.tensor("a_scales", a_scales, ("N", blocks), torch.float32)
    b_scales = args.tensor("b_scales", b_scales, ("K", blocks), torch.float32)
    counts = args.tensor("counts", counts, ("G",), torch.int32)
    offsets = args.tensor("offsets", offsets, (args.sizes["G"] + 1,), torch.int32)
    accumulate = args.optional("accumulate", accumulate, ("G", "N", "K"), RESULTS)
    args.choice("out_dtype", out_dtype, RESULTS)
    return _grouped_fp8_wgrad(a, a_scales, b, b_scales, offsets, counts, out_dtype, accumulate)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    power_of_two: bool = True,
    main_grad: Tensor | None = None,
) -> Tensor:
    """y = x · Wᵀ (+ bias) with FP8 products and gradients, of operands and a master weight in high precision.

    With Q the quantisation to e4m3 of the operand as it is (1x128 along the reduced axis for x and dy, 128x128 for W):

    - y  = Q(x) · Q(W)ᵀ + bias
    - dx = Q(dy) · Q(W): of the forward pass's codes, transposed with their scales; nothing is quantised twice
    - dW = Q(dyᵀ) · Q(xᵀ)ᵀ, summed over the tokens in float32 and rounded once to the weight's dtype
    - db = sum of dy over the tokens, in float32

    Gradients pass the quantisation as if it rounded nothing ("straight through").

    What waits for the backward pass is Q(xᵀ), a byte for each element of x and half of what x in bfloat16 would take,
    and the weight itself, which lives anyway and is quantised again: its codes would be an FP8 copy of the whole model
    from each forward pass to its backward.

    Args:
        x: [..., K]; bfloat16, float16 or float32.
        weight: [N, K] bfloat16, float16 or float32; need not be x's dtype. A shard may be cut anywhere, along N and K:
            blocks begin at its first element, as those of x's columns do.
        bias: [N], bfloat16, float16 or float32.
        power_of_two: scales are powers of two, of all operands.
        main_grad: [N, K] float32: dW is added to it in place, and `weight.grad` stays as it is: micro-batches add up
            in float32 whatever the weight's dtype. Not with torch.compile.

    Returns:
        [..., N] in x's dtype. Differentiable once. N, K and the number of tokens are free.

    Raises:
        TypeError, ValueError: for dtypes and shapes. A backward pass with create_graph raises RuntimeError.

    Source: DeepSeek-V3 (2024), sections 3.3.1 and 3.3.2.
    """
    args = Arguments("fp8_linear")
    x = args.tensor("x", x, ("...", "K"), QUANTIZABLE)
    weight = args.tensor("weight", weight, ("N", "K"), QUANTIZABLE, remedy=_MASTERS)
    bias = args.optional("bias", bias, ("N",), RESULTS)
    args.boolean("power_of_two", power_of_two)
    main_grad = _main_grad(args, main_grad, ("N", "K"))
    rows = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out = _linear(rows, weight, bias, None, None, True, power_of_two, main_grad)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], weight.shape[0])


def grouped_fp8_linear(
    x: Tensor,
    weight: Tensor,
    *,
    offsets: Tensor,
    counts: Tensor | None = None,
    alignment: int = 1,
    power_of_two: bool = True,
    main_grad: Tensor | None = None,
) -> Tensor:
    """`fp8_linear` of each group's rows of x with the group's own weight: the experts of a layer, in training.

    The rows of group g are offsets[g] .. offsets[g] + counts[g]. The other rows are padding and are not read, neither
    of x nor of the gradient of y; those of y hold nothing to rely on, and the gradient of x has zeros there.

    dW reduces blocks of 128 rows that share a scale, so that a block must not belong to two groups: where groups do not
    start at multiples of 128, rows are first copied to where they do. That needs no number of the device on the host,
    only room for 127 rows more for each group.

    Args:
        x: [cap, K]; bfloat16, float16 or float32.
        weight: [G, N, K] bfloat16, float16 or float32.
        offsets: [G+1] int32, rising within 0 .. cap.
        counts: [G] int32, the real rows of each group; None: they fill the space up to the next group.
        alignment: the caller's word that every group with rows starts at a multiple of it, as `moe_dispatch` places
            them; a multiple of 128 saves the copies.
        power_of_two, main_grad [G, N, K]: as `fp8_linear` takes them.

    Returns:
        [cap, N] in x's dtype. Differentiable once, in x and weight; an empty group's weight has a gradient of zeros.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and, on a CPU, for offsets and counts out of range, or, in the
            backward pass, for groups that are not aligned as promised. With create_graph it raises RuntimeError.

    Source: DeepSeek-V3 (2024), section 3.3.
    """
    args = Arguments("grouped_fp8_linear")
    x = args.tensor("x", x, ("cap", "K"), QUANTIZABLE)
    weight = args.tensor("weight", weight, ("G", "N", "K"), QUANTIZABLE, remedy=_MASTERS)
    offsets = args.tensor("offsets", offsets, (weight.shape[0] + 1,), torch.int32)
    counts = args.optional("counts", counts, ("G",), torch.int32)
    args.integer("alignment", alignment, 1)
    args.boolean("power_of_two", power_of_two)
    main_grad = _main_grad(args, main_grad, ("G", "N", "K"))
    counts = offsets.diff() if counts is None else counts
    return _linear(x, weight, None, offsets, counts, alignment % 128 == 0, power_of_two, main_grad)


_MASTERS = "weights are quantised here; for codes with scales there is fp8_gemm"


def _main_grad(args: Arguments, main_grad: Tensor | None, shape: tuple) -> Tensor | None:
    main_grad = args.optional("main_grad", main_grad, shape, torch.float32)
    if main_grad is not None:
        args.no_gradient(main_grad=main_grad)
        args.writable("main_grad", main_grad)
    return main_grad


_ops = torch.ops.k2kernels  # without the checks, which read what torch.compile forbids a backward pass to read


def _linear(*args: Any) -> Tensor:
    return _Fp8Linear.apply(*args, torch.is_grad_enabled())


class _Fp8Linear(torch.autograd.Function):
    """`fp8_linear` (offsets None) and `grouped_fp8_linear` of x [T, K]."""

    @staticmethod
    def forward(ctx, x, weight, bias, offsets, counts, aligned, power_of_two, main_grad, graph) -> Tensor:
        ctx.op = "fp8_linear" if offsets is None else "grouped_fp8_linear"
        ctx.aligned, ctx.power_of_two, ctx.main_grad = aligned, power_of_two, main_grad
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        need_x, need_weight = (graph and needed for needed in ctx.needs_input_grad[:2])
        codes, scales = _quantize_rows(x, offsets, counts, power_of_two)
        operands = codes, scales, *_ops.quantize_128x128(weight, power_of_two)
        if offsets is None:
            out = _ops.fp8_gemm(*operands, bias, None, x.dtype)
        else:
            out = _ops.grouped_fp8_gemm(*operands, offsets, counts, None, x.dtype)
        transposed = _quantize_tokens(x, offsets, counts, aligned, power_of_two) if need_weight else (None, None)
        ctx.save_for_backward(weight if need_x else None, *transposed, offsets, counts)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{ctx.op}: has a first derivative only, and create_graph=True asks for the graph of a second; use "
                "torch.nn.functional.linear where that is needed"
            )
        weight, x_codes, x_scales, offsets, counts = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            codes, scales = _quantize_rows(grad, offsets, counts, ctx.power_of_two)
            w, w_scales = _ops.quantize_128x128(weight, ctx.power_of_two)
            operands = codes, scales, w.mT, w_scales.mT
            if offsets is None:
                d_x = _ops.fp8_gemm(*operands, None, None, x_dtype)
            else:  # padding takes no part in y, so its gradient is zero
                d_x = grad.new_zeros((grad.shape[0], weight.shape[2]), dtype=x_dtype)
                _ops.grouped_fp8_gemm_out(*operands, offsets, counts, None, d_x)
        if ctx.needs_input_grad[1]:
            codes, scales = _quantize_tokens(grad, offsets, counts, ctx.aligned, ctx.power_of_two)
            operands, added = (codes, scales, x_codes, x_scales), ctx.main_grad
            if offsets is not None:
                starts = offsets if ctx.aligned else _aligned_starts(counts)
                out_dtype = weight_dtype if added is None else torch.float32
                d_weight = _ops.grouped_fp8_wgrad(*operands, starts, counts, out_dtype, added)
                if added is not None:
                    added.copy_(d_weight)
            elif added is None:  # one group, of all tokens: nothing has to say where it lies
                d_weight = _ops.fp8_gemm(*operands, None, None, weight_dtype)
            else:
                _ops.fp8_gemm_out(*operands, None, added, added)
            d_weight = d_weight if added is None else None
        if ctx.needs_input_grad[2]:
            d_bias = grad.sum(0, dtype=torch.float32).to(bias_dtype)
        return d_x, d_weight, d_bias, *[None] * 6


def _quantize_rows(
    x: Tensor, offsets: Tensor | None, counts: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Q(x), but for padding."""
    return _ops.quantize_1x128(x, power_of_two, "column", False, offsets, counts)


def _quantize_tokens(
    x: Tensor, offsets: Tensor | None, counts: Tensor | None, aligned: bool, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Q(xᵀ), but for padding; groups that are not aligned are first moved to `_aligned_starts`."""
    if not aligned:
        starts = _aligned_starts(counts)
        x, offsets = x[_rows_from(starts, offsets, x.shape[0])], starts
    return _ops.quantize_1x128(x, power_of_two, "column", True, offsets, counts)


def _aligned_starts(counts: Tensor) -> Tensor:
    """Offsets int32 [G+1] of groups that follow each other, each at a multiple of 128."""
    ends = ((counts + 127) // 128 * 128).cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), ends])


def _rows_from(starts: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Which of `rows` goes to each row of a buffer with groups at `starts`; any for padding.

    As long as groups of any sizes may need.
    """
    groups = offsets.shape[0] - 1
    place = torch.arange((rows + 127 * groups) // 128 * 128 if rows else 0, dtype=torch.int32, device=offsets.device)
    group = torch.searchsorted(starts[1:], place, right=True).clamp(max=groups - 1)
    return (place - starts[group] + offsets[group]).clamp(0, max(rows - 1, 0))


class GemmPlan(NamedTuple):
    """What serves a GEMM.

    Attributes:
        kernel: its name.
        share: which factor the two blocks of a cluster share, "a" or "b", if any.
        split: parts into which K is cut, each for a block of a cluster; of the small kernels.
    """

    kernel: str
    share: str | None = None
    split: int = 1


def fp8_gemm_kernels() -> tuple[str, ...]:
    """The names of the kernels that serve the GEMMs of this file; the numbers are the rows and columns of a tile."""
    return tuple(_families())


@functools.cache
def _families() -> dict[str, str]:
    """Kernel -> k2k::GemmFamily, by name, in the order of the kernels' numbers."""
    return dict(_extension().fp8_gemm_kernels())


def fp8_gemm_plan(
    m: int,
    n: int,
    k: int,
    *,
    groups: int = 1,
    fine: bool = False,
    batch_invariant: bool = False,
    swiglu: bool = False,
    device: torch.device | str = "cuda",
) -> GemmPlan:
    """What serves a GEMM of these sizes, unless `fp8_gemm_kernel` forces something else.

    Args:
        m: rows of A; of a group, about, where there are several: what `expected_m` says, or cap / G, or maxM.
        n, k: the other sizes.
        groups: matrices of B.
        fine: scales of B are 1x128, or b_row_offset is not 0.
        batch_invariant: as for `fp8_gemm`.
        swiglu: it is `fp8_gemm_swiglu`, with n = 2I, that is to be served: by sm90_swiglu_128x256, or by another kernel
            and that of `swiglu_quantize`.
        device: a CUDA device; within `emulated()`, that chip is asked about instead.
    """
    options = dict(groups=groups, fine=fine, batch_invariant=batch_invariant, swiglu=swiglu, device=device)
    return fp8_gemm_costs(m, n, k, **options)[0][0]


def fp8_gemm_costs(
    m: int,
    n: int,
    k: int,
    *,
    groups: int = 1,
    fine: bool = False,
    batch_invariant: bool = False,
    swiglu: bool = False,
    device: torch.device | str = "cuda",
) -> list[tuple[GemmPlan, float]]:
    """All plans that can serve a GEMM, the one that does first, and the clocks they are guessed to take.

    Arguments as for `fp8_gemm_plan`.
    """
    sizes = groups, m, n, k
    return plans_on(chip(torch.device(device)), *sizes, fine=fine, batch_invariant=batch_invariant, swiglu=swiglu)


def plans_on(
    chip: Chip,
    groups: int,
    m: int,
    n: int,
    k: int,
    *,
    fine: bool = False,
    batch_invariant: bool = False,
    swiglu: bool = False,
) -> list[tuple[GemmPlan, float]]:
    """`fp8_gemm_costs` on a chip that need not be here."""
    sizes = groups, m, n, k, fine, batch_invariant, swiglu
    best = _extension().fp8_gemm_plan(sizes, chip)
    costs = sorted(_extension().fp8_gemm_costs(sizes, chip), key=lambda cost: (cost[0] != best, cost[1]))
    names = fp8_gemm_kernels()
    shares = {number: share for share, number in _shares().items()}
    return [(GemmPlan(names[kernel], shares[share], split), clocks) for (kernel, share, split), clocks in costs]


@contextlib.contextmanager
def fp8_gemm_kernel(kernel: str, share: str | None = None, split: int = 1) -> Iterator[None]:
    """Serves the GEMMs in a `with` block by this `GemmPlan`, whatever their sizes.

    sm90_128x128_fine serves scales for each column instead of the other large kernels of sm90, and groups along K
    instead of the small ones. sm90_swiglu_128x256 is for `fp8_gemm_swiglu` alone; another kernel leaves it the product.

    The environment variable K2KERNELS_FP8_GEMM does the same to a whole process, but for such blocks:
    "sm90_128x192,share=a", "sm90_small_8x64,split=4". It is read when the first GEMM starts (`pinned_plan`).

    Raises:
        ValueError: for a name that is none of `fp8_gemm_kernels()`, a `share` that is not "a", "b" or None, a `split`
            that is not 1, 2, 4 or 8, or what the kernel does not do. A GEMM raises RuntimeError where the GPU does not
            run the kernel, or what is asked is none of its business.
    """
    token = _forced.set(_numbers("fp8_gemm_kernel", kernel, share, split))
    try:
        yield
    finally:
        _forced.reset(token)


PIN = "K2KERNELS_FP8_GEMM"


@functools.cache
def pinned_plan() -> GemmPlan | None:
    """The plan that the environment variable K2KERNELS_FP8_GEMM names; None where it is not set or empty.

    Raises:
        ValueError: it is not KERNEL[,share=a|b][,split=N], or names what `fp8_gemm_kernel` refuses.
    """
    text = os.environ.get(PIN, "")
    kernel, *rest = text.split(",")
    options: dict[str, str] = {}
    for part in rest:
        name, equals, value = part.partition("=")
        if (
            name not in ("share", "split")
            or not equals
            or name in options
            or (name == "split" and not value.isdecimal())
        ):
            raise ValueError(
                f"{PIN}: must be KERNEL[,share=a|b][,split=1|2|4|8], such as sm90_128x192,share=a, got {text!r}; unset "
                "it to let sizes choose"
            )
        options[name] = value
    if not text:
        return None
    plan = GemmPlan(kernel, options.get("share"), int(options.get("split", 1)))
    _numbers(PIN, *plan)
    return plan


@functools.cache
def _pinned() -> tuple[int, int, int] | None:
    plan = pinned_plan()
    return None if plan is None else _numbers(PIN, *plan)


def _asked() -> tuple[int, int, int] | None:
    """The plan that a `with` block or else the environment asks for."""
    return _forced.get() or _pinned()


def _numbers(caller: str, kernel: str, share: str | None, split: int) -> tuple[int, int, int]:
    """A plan as the extension takes it, if there is such a one."""
    args = Arguments(caller)
    args.choice("kernel", kernel, fp8_gemm_kernels())
    family = _families()[kernel]
    args.choice("share", share, tuple(_shares()) if family in ("sm90", "sm90_swiglu") else (None,))
    splits = [1 << i for i in range(constants.GEMM_MOST_SPLIT.bit_length())]
    args.choice("split", split, tuple(splits) if family == "sm90_small" else (1,))
    return fp8_gemm_kernels().index(kernel), _shares()[share], split


def _shares() -> dict[str | None, int]:
    """k2k::Share."""
    return {None: constants.GEMM_SHARE_NONE, "a": constants.GEMM_SHARE_A, "b": constants.GEMM_SHARE_B}


_forced: contextvars.ContextVar[tuple[int, int, int] | None] = contextvars.ContextVar(
    "k2kernels_fp8_gemm_kernel", default=None
)


@functools.cache
def _extension() -> ModuleType:
    """Either module: both hold the same plans."""
    try:
        from k2kernels import _emu as module
    except ImportError:
        from k2kernels import _C as module
    return module


def _b_scales(args: Arguments, b: Tensor, b_scales: Tensor, b_row_offset: int | None) -> Tensor:
    """Checks b_scales [..., N or ceil((b_row_offset + N)/128), ceil(K/128)] against b [..., N, K]."""
    row_offsets = b_row_offset is not None
    b_row_offset = args.integer("b_row_offset", b_row_offset, 0, 127) if row_offsets else 0
    b_scales = args.tensor("b_scales", b_scales, None, torch.float32)
    *leading, n, k = b.shape
    fine = b_scales.ndim == b.ndim and b_scales.shape[-2] == n
    b_scales = args.tensor(
        "b_scales",
        b_scales,
        (*leading, n if fine else -(-(b_row_offset + n) // 128), -(-k // 128)),
        torch.float32,
        remedy="one scale per 128x128 of b, or a row of scales per row of b",
    )
    if not fine:
        rows_remedy = "say so by b_row_offset" if row_offsets else "cut it at multiples of 128 rows"
        check_blocks(args, "b", b, b_scales, b_row_offset, columns_remedy=_ZEROS_IN_FRONT, rows_remedy=rows_remedy)
    return b_scales


_ZEROS_IN_FRONT = " and give a as many more columns of zeros in front before it is quantised"


def _layout(args: Arguments, offsets: Tensor | None, counts: Tensor | None, masked_m: Tensor | None) -> tuple[str, ...]:
    """The sizes that stand for rows: of a grouped call, contiguous or masked."""
    args.require(
        (offsets is None) != (masked_m is None),
        "the layout",
        "given by offsets (contiguous) or by masked_m (masked)",
        "neither" if offsets is None else "both",
    )
    args.require(
        masked_m is None or counts is None, "counts", "None with masked_m", "both", "masked_m holds the counts"
    )
    return ("G", "maxM") if offsets is None else ("cap",)


def _groups(
    args: Arguments,
    offsets: Tensor | None,
    counts: Tensor | None,
    masked_m: Tensor | None,
    expected_m: int | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Checks what says where groups lie; masked_m becomes the counts."""
    offsets = args.optional("offsets", offsets, (args.sizes["G"] + 1,), torch.int32)
    if offsets is None:
        counts = args.tensor("masked_m", masked_m, ("G",), torch.int32)
    else:
        counts = args.optional("counts", counts, ("G",), torch.int32)
    if expected_m is not None:
        args.integer("expected_m", expected_m, 0)
    return offsets, counts


def _swiglu_options(
    args: Arguments, b: Tensor, weights: Tensor | None, rows: tuple[str, ...], power_of_two: bool, scale_layout: str
) -> tuple[Tensor | None, bool, str]:
    args.require(b.shape[-2] % 2 == 0, "b", "even in its rows, gate and up", b.shape)
    weights = args.optional("weights", weights, rows, torch.float32)
    args.boolean("power_of_two", power_of_two)
    args.choice("scale_layout", scale_layout, ("row", "column"))
    return weights, power_of_two, scale_layout


def _out(args: Arguments, out: Tensor, shape: tuple, out_dtype: torch.dtype, **inputs: Tensor | None) -> Tensor:
    """Checks `out`; the `inputs` are those that might want a gradient, which an op that writes in place cannot give."""
    out = args.tensor("out", out, shape, out_dtype, remedy="out_dtype= must name the dtype of out")
    args.no_gradient(out=out, **{name: value for name, value in inputs.items() if value is not None})
    args.writable("out", out)
    return out


# ---- the kernels: one function of the extension serves all ops; csrc/fp8_gemm/params.h says what it is told


def _axis(offsets: Tensor | None) -> int:
    return constants.GROUPS_OF_MATRICES if offsets is None else constants.GROUPS_OF_ROWS


def _launch_gemm(
    op: str,
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    out: Tensor,
    groups: tuple[Tensor | None, Tensor | None, int, int],
    *,
    bias: Tensor | None = None,
    accumulate: Tensor | None = None,
    b_row_offset: int = 0,
    batch_invariant: bool = False,
    row_weights: Tensor | None = None,
    expected_m: int | None = None,
    plan: tuple[int, int, int] | None = None,
    scales: Tensor | None = None,
    power_of_two: bool = False,
) -> None:
    """Fills `out`; `groups`: offsets, counts, their number, and which axis they cut.

    With `scales`, those and the codes of the result's SwiGLU.
    """
    offsets, counts, number, axis = groups
    tensors = (offsets, counts, bias, row_weights)
    offsets, counts, bias, row_weights = (None if x is None else x.contiguous() for x in tensors)
    target = _with_rows(out)
    accumulate = None if accumulate is None else _with_rows(accumulate)
    fine = b_scales.shape[-2] == b.shape[-2]
    a, b = _aligned(a), _aligned(b)
    launch(
        op,
        "fp8_gemm",
        a.device,
        (*_matrix(a, a_scales), 1, 0),
        (*_matrix(b, b_scales), 1 if fine else 128, 0 if fine else b_row_offset),
        a.shape[-1],
        (target.data_ptr(), TYPES[target.dtype], _strides(target)),
        (0, (0, 0, 0), False) if scales is None else (scales.data_ptr(), _scale_strides(scales), power_of_two),
        (0, 0) if row_weights is None else (row_weights.data_ptr(), _matrix_stride(row_weights, a)),
        (0, 0, (0, 0)) if bias is None else (bias.data_ptr(), TYPES[bias.dtype], (0, 0)),
        (0, 0, (0, 0))
        if accumulate is None
        else (accumulate.data_ptr(), TYPES[accumulate.dtype], _strides(accumulate)),
        (address(offsets), address(counts), number, axis),
        expected_m,
        batch_invariant,
        plan or _asked(),
        chip(a.device),
    )
    if target is not out:
        out.copy_(target)


def _with_rows(x: Tensor) -> Tensor:
    """x, or a copy, of which neighbouring columns lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _aligned(codes: Tensor) -> Tensor:
    """Codes [..., rows, K], or a copy, whose rows begin at multiples of 16 bytes, as the kernels copy them.

    Rows are not one and the same (stride 0): a tensor map takes no stride of 0.
    """
    strides = [stride for size, stride in zip(codes.shape[:-1], codes.stride()) if size > 1]
    repeated = codes.shape[-2] > 1 and codes.stride(-2) == 0
    if codes.stride(-1) == 1 and not repeated and not any(x % 16 for x in (codes.data_ptr(), *strides)):
        return codes
    *leading, k = codes.shape
    copy = codes.new_empty((*leading, -(-k // 16) * 16))[..., :k]
    copy.view(torch.uint8).copy_(codes.view(torch.uint8))
    return copy


def _strides(x: Tensor) -> tuple[int, int]:
    """Of matrices and of rows."""
    return (x.stride(0) if x.ndim == 3 else 0, x.stride(-2))


def _matrix_stride(of_rows: Tensor, a: Tensor) -> int:
    """Of a contiguous tensor that holds a number for each row of a."""
    return a.shape[-2] if a.ndim == 3 else 0


def _matrix(codes: Tensor, scales: Tensor) -> tuple:
    """k2k::Fp8Matrix, but for the rows of a block."""
    matrices, row = _strides(codes)
    if codes.shape[-2] <= 1:  # any stride is right, but not any one is a multiple of 16
        row = -(-codes.shape[-1] // 16) * 16
    return (
        codes.data_ptr(),
        scales.data_ptr(),
        (codes.shape[0] if matrices != 0 else 1, codes.shape[-2]),  # one and the same for all groups: one
        (matrices, row),
        _scale_strides(scales),
    )


def _scale_strides(scales: Tensor) -> tuple[int, int, int]:
    """Of matrices, rows and columns."""
    return (scales.stride(0) if scales.ndim == 3 else 0, *scales.stride()[-2:])


def _apart(body: Callable, place: int) -> Callable:
    """`body`, whose argument `place` is `out`, writing a copy first where `out` shares memory with what is read.

    A kernel writes some results before it has read all operands. `accumulate` alone may be `out` itself, or begin and
    step as it does: an element is then read by the thread that writes it.
    """

    def run(*args: Any) -> None:
        out, accumulate = args[place], args[place - 1]
        begin, end = _extent(out)
        for x in args:
            if not isinstance(x, Tensor) or x is out or not (x.data_ptr() < end and begin < _extent(x)[1]):
                continue
            if x is accumulate and (x.data_ptr(), x.dtype, x.stride()) == (begin, out.dtype, out.stride()):
                continue
            copy = out.clone()
            body(*args[:place], copy, *args[place + 1 :])
            out.copy_(copy)
            return
        body(*args)

    return run


def _extent(x: Tensor) -> tuple[int, int]:
    """The addresses where its elements begin and end."""
    begin = x.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return begin, begin + (last + 1) * x.itemsize if x.numel() else begin


def _fp8_gemm_fake(
    a, a_scales, b, b_scales, bias, accumulate, out_dtype, b_row_offset=0, batch_invariant=False, row_weights=None
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _fp8_gemm_out_kernel(
    a, a_scales, b, b_scales, bias, accumulate, out, b_row_offset=0, batch_invariant=False, row_weights=None
) -> None:
    groups = None, None, 1, constants.GROUPS_OF_MATRICES
    options = dict(b_row_offset=b_row_offset, batch_invariant=batch_invariant, row_weights=row_weights)
    _launch_gemm("fp8_gemm", a, a_scales, b, b_scales, out, groups, bias=bias, accumulate=accumulate, **options)


def _fp8_gemm_kernel(
    a, a_scales, b, b_scales, bias, accumulate, out_dtype, b_row_offset=0, batch_invariant=False, row_weights=None
) -> Tensor:
    out = _fp8_gemm_fake(a, a_scales, b, b_scales, bias, accumulate, out_dtype)
    _fp8_gemm_out_kernel(a, a_scales, b, b_scales, bias, accumulate, out, b_row_offset, batch_invariant, row_weights)
    return out


_fp8_gemm = register(
    "fp8_gemm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? bias, Tensor? accumulate,"
    " ScalarType out_dtype, int b_row_offset=0, bool batch_invariant=False,"
    " Tensor? row_weights=None) -> Tensor",
    reference=reference.fp8_gemm,
    fake=_fp8_gemm_fake,
    kernel=_fp8_gemm_kernel,
)
_fp8_gemm_out = register(
    "fp8_gemm_out(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? bias, Tensor? accumulate,"
    " Tensor(a!) out, int b_row_offset=0, bool batch_invariant=False,"
    " Tensor? row_weights=None) -> ()",
    reference=reference.fp8_gemm_out,
    fake=lambda *args: None,
    kernel=_apart(_fp8_gemm_out_kernel, 6),
    mutates=True,
)


def _validate_rows(
    a: Tensor, a_scales, b, b_scales, offsets: Tensor | None, counts: Tensor | None, *_, op: str = "grouped_fp8_gemm"
) -> None:
    if offsets is None:
        check_counts(op, "masked_m", counts, a.shape[1])
    else:
        check_groups(op, offsets, counts, a.shape[0])


def _grouped_fp8_gemm_fake(
    a,
    a_scales,
    b,
    b_scales,
    offsets,
    counts,
    expected_m,
    out_dtype,
    b_row_offset=0,
    batch_invariant=False,
    row_weights=None,
) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[1]), dtype=out_dtype)


def _grouped_fp8_gemm_out_kernel(
    a, a_scales, b, b_scales, offsets, counts, expected_m, out, b_row_offset=0, batch_invariant=False, row_weights=None
) -> None:
    groups = offsets, counts, b.shape[0], _axis(offsets)
    options = dict(b_row_offset=b_row_offset, batch_invariant=batch_invariant, row_weights=row_weights)
    _launch_gemm("grouped_fp8_gemm", a, a_scales, b, b_scales, out, groups, expected_m=expected_m, **options)


def _grouped_fp8_gemm_kernel(
    a,
    a_scales,
    b,
    b_scales,
    offsets,
    counts,
    expected_m,
    out_dtype,
    b_row_offset=0,
    batch_invariant=False,
    row_weights=None,
) -> Tensor:
    args = a, a_scales, b, b_scales, offsets, counts, expected_m
    out = _grouped_fp8_gemm_fake(*args, out_dtype)
    _grouped_fp8_gemm_out_kernel(*args, out, b_row_offset, batch_invariant, row_weights)
    return out


_grouped_fp8_gemm = register(
    "grouped_fp8_gemm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? offsets, Tensor? counts,"
    " int? expected_m, ScalarType out_dtype, int b_row_offset=0, bool batch_invariant=False,"
    " Tensor? row_weights=None) -> Tensor",
    reference=reference.grouped_fp8_gemm,
    fake=_grouped_fp8_gemm_fake,
    kernel=_grouped_fp8_gemm_kernel,
    validate=_validate_rows,
)
_grouped_fp8_gemm_out = register(
    "grouped_fp8_gemm_out(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? offsets, Tensor? counts,"
    " int? expected_m, Tensor(a!) out, int b_row_offset=0, bool batch_invariant=False,"
    " Tensor? row_weights=None) -> ()",
    reference=_apart(reference.grouped_fp8_gemm_out, 7),
    fake=lambda *args: None,
    kernel=_apart(_grouped_fp8_gemm_out_kernel, 7),
    validate=_validate_rows,
    mutates=True,
)


def _fp8_gemm_swiglu_fake(a, a_scales, b, b_scales, weights, power_of_two, scale_layout) -> tuple[Tensor, Tensor]:
    shape = (*a.shape[:-1], b.shape[-2] // 2)
    scales = empty_scales(a, (*shape[:-1], -(-shape[-1] // 128)), scale_layout)
    return a.new_empty(shape), scales


def _grouped_fp8_gemm_swiglu_fake(a, a_scales, b, b_scales, offsets, counts, expected_m, *options):
    return _fp8_gemm_swiglu_fake(a, a_scales, b, b_scales, *options)


def _launch_gemm_swiglu(
    op: str, groups: tuple, expected_m: int | None, a, a_scales, b, b_scales, weights, power_of_two, scale_layout
) -> tuple[Tensor, Tensor]:
    """By one kernel that does it all, or by a GEMM and `swiglu_quantize`."""
    offsets, counts, number, _ = groups
    filled = number if offsets is None else min(number, a.shape[0])  # not more groups have rows than there are rows
    rows = a.shape[-2] if offsets is None else -(-a.shape[0] // max(filled, 1))
    fine = b_scales.shape[-2] == b.shape[-2]
    sizes = filled, rows if expected_m is None else expected_m, b.shape[-2], a.shape[-1], fine, False, True
    plan = _asked() or _extension().fp8_gemm_plan(sizes, chip(a.device))
    if _families()[fp8_gemm_kernels()[plan[0]]] == "sm90_swiglu":
        data, scales = _fp8_gemm_swiglu_fake(a, a_scales, b, b_scales, weights, power_of_two, scale_layout)
        quantised = dict(row_weights=weights, scales=scales, power_of_two=power_of_two)
        _launch_gemm(op, a, a_scales, b, b_scales, data, groups, plan=plan, **quantised)
        return data, scales
    product = a.new_empty((*a.shape[:-1], b.shape[-2]), dtype=torch.float32)
    _launch_gemm(op, a, a_scales, b, b_scales, product, groups, plan=plan)
    options = dict(weights=weights, power_of_two=power_of_two, scale_layout=scale_layout)
    return swiglu_quantize(product, offsets=offsets, counts=counts, **options)


def _fp8_gemm_swiglu_kernel(*args) -> tuple[Tensor, Tensor]:
    return _launch_gemm_swiglu("fp8_gemm_swiglu", (None, None, 1, constants.GROUPS_OF_MATRICES), None, *args)


def _grouped_fp8_gemm_swiglu_kernel(
    a, a_scales, b, b_scales, offsets, counts, expected_m, *options
) -> tuple[Tensor, Tensor]:
    groups = offsets, counts, b.shape[0], _axis(offsets)
    return _launch_gemm_swiglu("grouped_fp8_gemm_swiglu", groups, expected_m, a, a_scales, b, b_scales, *options)


_fp8_gemm_swiglu = register(
    "fp8_gemm_swiglu(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? weights, bool power_of_two,"
    " str scale_layout) -> (Tensor, Tensor)",
    reference=reference.fp8_gemm_swiglu,
    fake=_fp8_gemm_swiglu_fake,
    kernel=_fp8_gemm_swiglu_kernel,
)
_grouped_fp8_gemm_swiglu = register(
    "grouped_fp8_gemm_swiglu(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? offsets, Tensor? counts,"
    " int? expected_m, Tensor? weights, bool power_of_two, str scale_layout) -> (Tensor, Tensor)",
    reference=reference.grouped_fp8_gemm_swiglu,
    fake=_grouped_fp8_gemm_swiglu_fake,
    kernel=_grouped_fp8_gemm_swiglu_kernel,
    validate=functools.partial(_validate_rows, op="grouped_fp8_gemm_swiglu"),
)


def _validate_tokens(a: Tensor, a_scales, b, b_scales, offsets: Tensor, counts: Tensor, *_) -> None:
    check_groups("grouped_fp8_wgrad", offsets, counts, a.shape[1], alignment=128)


def _grouped_fp8_wgrad_fake(a, a_scales, b, b_scales, offsets, counts, out_dtype, accumulate) -> Tensor:
    return a.new_empty((counts.shape[0], a.shape[0], b.shape[0]), dtype=out_dtype)


def _grouped_fp8_wgrad_kernel(a, a_scales, b, b_scales, offsets, counts, out_dtype, accumulate) -> Tensor:
    out = _grouped_fp8_wgrad_fake(a, a_scales, b, b_scales, offsets, counts, out_dtype, accumulate)
    groups = offsets, counts, counts.shape[0], constants.GROUPS_OF_K
    _launch_gemm("grouped_fp8_wgrad", a, a_scales, b, b_scales, out, groups, accumulate=accumulate)
    return out


_grouped_fp8_wgrad = register(
    "grouped_fp8_wgrad(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor offsets, Tensor counts,"
    " ScalarType out_dtype, Tensor? accumulate) -> Tensor",
    reference=reference.grouped_fp8_wgrad,
    fake=_grouped_fp8_wgrad_fake,
    kernel=_grouped_fp8_wgrad_kernel,
    validate=_validate_tokens,
)
