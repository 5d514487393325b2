"""Linear layers with FP8 products and gradients, on operands and weights in high precision."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from k2kernels.ops._check import Arguments
from k2kernels.ops.fp8_gemm import RESULTS
from k2kernels.ops.quant import QUANTIZABLE

_MASTERS = "weights are quantised here; for codes with scales there is fp8_gemm"
_OPTIONS = 0, False, None  # b_row_offset, batch_invariant, row_weights
_ops = torch.ops.k2kernels  # without the checks, which read what torch.compile forbids a backward pass to read


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

    The backward pass keeps Q(xᵀ), a byte for each element of x and half of what x in bfloat16 would take, and the
    weight itself, which exists anyway and is quantised again: its codes would be an FP8 copy of the whole model from
    each forward pass to its backward.

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
    of x nor of the gradient of y; those of y are unspecified, and the gradient of x has zeros there.

    dW reduces blocks of 128 rows that share a scale, so that a block must not belong to two groups: where groups do not
    start at multiples of 128, rows are first copied to where they do. That needs no number of the device on the host,
    only room for 127 rows more for each group.

    Args:
        x: [cap, K]; bfloat16, float16 or float32.
        weight: [G, N, K] bfloat16, float16 or float32.
        offsets: [G+1] int32, rising within 0 .. cap.
        counts: [G] int32, the real rows of each group; None: they fill the space up to the next group.
        alignment: every group with rows starts at a multiple of it, as `moe_dispatch` places them; a multiple of 128
            saves the copies.
        power_of_two, main_grad [G, N, K]: as `fp8_linear` takes them.

    Returns:
        [cap, N] in x's dtype. Differentiable once, in x and weight; an empty group's weight has a gradient of zeros.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and, on a CPU, for offsets and counts out of range, or, in the
            backward pass, for groups that do not start at multiples of `alignment`. With create_graph it raises
            RuntimeError.

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


def _main_grad(args: Arguments, main_grad: Tensor | None, shape: tuple) -> Tensor | None:
    main_grad = args.optional("main_grad", main_grad, shape, torch.float32)
    if main_grad is not None:
        args.no_gradient(main_grad=main_grad)
        args.writable("main_grad", main_grad)
    return main_grad


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
            out = _ops.fp8_gemm(*operands, bias, None, x.dtype, *_OPTIONS)
        else:
            out = _ops.grouped_fp8_gemm(*operands, offsets, counts, None, x.dtype, *_OPTIONS)
        transposed = _quantize_tokens(x, offsets, counts, aligned, power_of_two) if need_weight else (None, None)
        ctx.save_for_backward(weight if need_x else None, *transposed, offsets, counts)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{ctx.op}: has a first derivative only, and create_graph=True would need a second; use "
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
                d_x = _ops.fp8_gemm(*operands, None, None, x_dtype, *_OPTIONS)
            else:  # padding takes no part in y, so its gradient is zero
                d_x = grad.new_zeros((grad.shape[0], weight.shape[2]), dtype=x_dtype)
                _ops.grouped_fp8_gemm_out(*operands, offsets, counts, None, x_dtype, *_OPTIONS, d_x)
        if ctx.needs_input_grad[1]:
            codes, scales = _quantize_tokens(grad, offsets, counts, ctx.aligned, ctx.power_of_two)
            operands, added = (codes, scales, x_codes, x_scales), ctx.main_grad
            if offsets is not None:
                starts = offsets if ctx.aligned else _aligned_starts(counts)
                out_dtype = weight_dtype if added is None else torch.float32
                d_weight = _ops.grouped_fp8_wgrad(*operands, starts, counts, out_dtype, added)
                if added is not None:
                    added.copy_(d_weight)
            elif added is None:  # one group, of all tokens
                d_weight = _ops.fp8_gemm(*operands, None, None, weight_dtype, *_OPTIONS)
            else:
                _ops.fp8_gemm_out(*operands, None, added, torch.float32, *_OPTIONS, added)
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
