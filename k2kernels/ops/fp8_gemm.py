"""GEMMs of e4m3 operands with block scales: the public functions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from k2kernels.ops._check import Arguments, check_blocks, check_counts, check_groups
from k2kernels.ops._fp8_plan import (  # noqa: F401 (public here)
    GemmPlan,
    families,
    forced_plan,
    fp8_gemm_costs,
    fp8_gemm_kernel,
    fp8_gemm_kernels,
    fp8_gemm_plan,
    pinned_plan,
    plans_on,
)
from k2kernels.ops._launch import chip, launch, module, rows_on_16_bytes
from k2kernels.ops._register import declare
from k2kernels.ops.quant import empty_codes, launch_swiglu_quantize
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
            scales begins at a multiple of 128 of K, because the blocks of a and of b begin at column 0. A view that
            begins elsewhere is refused; a copy of such a shard is not recognised.
        b_scales: float32, [ceil((b_row_offset + N)/128), ceil(K/128)] of `quantize_128x128`, or [N, ceil(K/128)] of
            `quantize_1x128`.
        out_dtype: bfloat16, float16 or float32.
        bias: [N], bfloat16, float16 or float32.
        accumulate: C [M, N], bfloat16, float16 or float32.
        b_row_offset: how many rows of the first 128x128 block precede row 0 of b: for a shard of a weight that
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
    a, a_scales, b, b_scales = _operands(args, ("M",), ("N",), a, a_scales, b, b_scales, b_row_offset)
    bias = args.optional("bias", bias, ("N",), RESULTS)
    accumulate = args.optional("accumulate", accumulate, ("M", "N"), RESULTS)
    args.choice("out_dtype", out_dtype, RESULTS)
    args.boolean("batch_invariant", batch_invariant)
    row_weights = args.optional("row_weights", row_weights, ("M",), torch.float32)
    inputs = a, a_scales, b, b_scales, bias, accumulate, out_dtype, b_row_offset, batch_invariant, row_weights
    if out is None:
        return _fp8_gemm(*inputs)
    floats = dict(a_scales=a_scales, b_scales=b_scales, bias=bias, accumulate=accumulate, row_weights=row_weights)
    out = _out(args, out, ("M", "N"), out_dtype, **floats)
    _fp8_gemm.out(*inputs, out)
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

    All other rows are padding: neither read nor written. In a new result they are unspecified (zeros by the reference);
    in `out` they keep their values.

    Args:
        a: [cap, K], or [G, maxM, K] when masked; float8_e4m3fn.
        a_scales: [cap, ceil(K/128)], or [G, maxM, ceil(K/128)]; float32, row or column layout.
        b: [G, N, K] float8_e4m3fn; cut along K and N as for `fp8_gemm`.
        b_scales: [G, ceil((b_row_offset + N)/128), ceil(K/128)] of `quantize_128x128`, or [G, N, ceil(K/128)]; float32.
        offsets: [G+1] int32, rising within 0 .. cap; any alignment.
        counts: [G] int32, the real rows of each group; None: they fill the space up to the next group.
        masked_m: [G] int32, within 0 .. maxM. Instead of offsets.
        expected_m: approximate rows of a group: a hint for the choice of a kernel, without effect on the result.
        b_row_offset: how many rows of each matrix's first 128x128 block precede row 0 of b, 0 .. 127.
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
    operands = _operands(args, rows, ("G", "N"), a, a_scales, b, b_scales, b_row_offset)
    offsets, counts = _groups(args, offsets, counts, masked_m, expected_m)
    args.choice("out_dtype", out_dtype, RESULTS)
    args.boolean("batch_invariant", batch_invariant)
    row_weights = args.optional("row_weights", row_weights, rows, torch.float32)
    inputs = *operands, offsets, counts, expected_m, out_dtype, b_row_offset, batch_invariant, row_weights
    if out is None:
        return _grouped_fp8_gemm(*inputs)
    out = _out(args, out, (*rows, "N"), out_dtype, a_scales=operands[1], b_scales=operands[3], row_weights=row_weights)
    _grouped_fp8_gemm.out(*inputs, out)
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
    leaves the product [M, 2I] in float32 to the kernel of `swiglu_quantize`. See `fp8_gemm_plan(..., swiglu=True)`.

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
    operands = _operands(args, ("M",), ("2I",), a, a_scales, b, b_scales)
    options = _swiglu_options(args, operands[2], weights, ("M",), power_of_two, scale_layout)
    return _fp8_gemm_swiglu(*operands, *options)


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

    Rows that belong to no group are padding: not read, and unspecified in the result.

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
    operands = _operands(args, rows, ("G", "2I"), a, a_scales, b, b_scales)
    offsets, counts = _groups(args, offsets, counts, masked_m, expected_m)
    options = _swiglu_options(args, operands[2], weights, rows, power_of_two, scale_layout)
    return _grouped_fp8_gemm_swiglu(*operands, offsets, counts, expected_m, *options)


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


def _operands(
    args: Arguments,
    rows: tuple[str, ...],
    columns: tuple[str, ...],
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    b_row_offset: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checks A [*rows, K] and B [*columns, K], and their scales; None: the op has no argument b_row_offset."""
    a = args.tensor("a", a, (*rows, "K"), E4M3)
    b = args.tensor("b", b, (*columns, "K"), E4M3)
    blocks = -(-args.sizes["K"] // 128)
    a_scales = args.tensor("a_scales", a_scales, (*rows, blocks), torch.float32)
    row_offset = 0 if b_row_offset is None else args.integer("b_row_offset", b_row_offset, 0, 127)
    b_scales = args.tensor("b_scales", b_scales, None, torch.float32)
    *leading, n, _ = b.shape
    fine = b_scales.ndim == b.ndim and b_scales.shape[-2] == n
    shape = (*leading, n if fine else -(-(row_offset + n) // 128), blocks)
    remedy = "one scale per 128x128 of b, or a row of scales per row of b"
    b_scales = args.tensor("b_scales", b_scales, shape, torch.float32, remedy=remedy)
    if not fine:
        rows_remedy = "cut it at multiples of 128 rows" if b_row_offset is None else "pass b_row_offset"
        zeros = " and give a as many more columns of zeros in front before it is quantised"
        check_blocks(args, "b", b, b_scales, row_offset, columns_remedy=zeros, rows_remedy=rows_remedy)
    return a, a_scales, b, b_scales


def _layout(args: Arguments, offsets: Tensor | None, counts: Tensor | None, masked_m: Tensor | None) -> tuple[str, ...]:
    """The sizes of the rows of a grouped call, contiguous or masked."""
    args.require(
        (offsets is None) != (masked_m is None),
        "the layout",
        "given by offsets (contiguous) or by masked_m (masked)",
        "neither" if offsets is None else "both",
    )
    alone = masked_m is None or counts is None
    args.require(alone, "counts", "None with masked_m", "both", "masked_m holds the counts")
    return ("G", "maxM") if offsets is None else ("cap",)


def _groups(
    args: Arguments, offsets: Tensor | None, counts: Tensor | None, masked_m: Tensor | None, expected_m: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Checks the places of the groups; masked_m becomes the counts."""
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
    """Checks `out`; no `inputs` may require a gradient, because an op that writes in place has no backward."""
    out = args.tensor("out", out, shape, out_dtype, remedy="out_dtype= must name the dtype of out")
    args.no_gradient(out=out, **{name: value for name, value in inputs.items() if value is not None})
    args.writable("out", out)
    return out


def _with_rows(x: Tensor) -> Tensor:
    """x, or a copy, with adjacent columns."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _launch(
    out: Tensor,
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor | None = None,
    counts: Tensor | None = None,
    expected_m: int | None = None,
    bias: Tensor | None = None,
    accumulate: Tensor | None = None,
    row_weights: Tensor | None = None,
    b_row_offset: int = 0,
    batch_invariant: bool = False,
    *,
    op: str,
    scales: Tensor | None = None,
    power_of_two: bool = False,
    plan: GemmPlan | None = None,
) -> None:
    """The kernels of all ops of this file. With `scales`, `out` and these are codes and scales of the SwiGLU."""
    tensors = offsets, counts, bias, row_weights
    offsets, counts, bias, row_weights = (None if x is None else x.contiguous() for x in tensors)
    accumulate = None if accumulate is None else _with_rows(accumulate)
    target = _with_rows(out)
    a, b = rows_on_16_bytes(a, distinct=True), rows_on_16_bytes(b, distinct=True)
    launch(
        "fp8_gemm", a, a_scales, b, b_scales, offsets, counts, expected_m, bias, accumulate,
        row_weights, b_row_offset, batch_invariant, target, scales, power_of_two, plan or forced_plan(), chip(a.device),
        op=op,
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


def _launch_swiglu(
    data: Tensor,
    scales: Tensor,
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor | None = None,
    counts: Tensor | None = None,
    expected_m: int | None = None,
    weights: Tensor | None = None,
    power_of_two: bool = False,
    *,
    op: str,
) -> None:
    """By one kernel, or by a GEMM and the kernel of `swiglu_quantize`."""
    operands = a, a_scales, b, b_scales, offsets, counts, expected_m
    plan = forced_plan() or module(a.device).fp8_gemm_swiglu_plan(*operands, chip(a.device))
    if families()[plan.kernel] == "sm90_swiglu":
        options = dict(scales=scales, power_of_two=power_of_two, plan=plan)
        _launch(data, *operands, row_weights=weights, op=op, **options)
    else:
        product = _outputs(a, b, torch.float32)
        _launch(product, *operands, op=op, plan=plan)
        launch_swiglu_quantize(data, scales, product, weights, offsets, counts, power_of_two)


def _outputs(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-2]), dtype=out_dtype) if out is None else out


def _swiglu_outputs(a: Tensor, b: Tensor, scale_layout: str) -> tuple[Tensor, Tensor]:
    return empty_codes(a, (*a.shape[:-1], b.shape[-2] // 2), scale_layout)


def _validate_rows(op: str, a: Tensor, offsets: Tensor | None, counts: Tensor | None) -> None:
    if offsets is None:
        check_counts(op, "masked_m", counts, a.shape[1])
    else:
        check_groups(op, offsets, counts, a.shape[0])


def _validate_tokens(a: Tensor, offsets: Tensor, counts: Tensor) -> None:
    check_groups("grouped_fp8_wgrad", offsets, counts, a.shape[1], alignment=128)


_fp8_gemm = declare(reference.fp8_gemm, outputs=_outputs, launch=partial(_launch, op="fp8_gemm"), out=("accumulate",))
_grouped_fp8_gemm = declare(
    reference.grouped_fp8_gemm,
    outputs=_outputs,
    launch=partial(_launch, op="grouped_fp8_gemm"),
    validate=partial(_validate_rows, "grouped_fp8_gemm"),
    out=(),
    out_reference=reference.grouped_fp8_gemm_out,
)
_fp8_gemm_swiglu = declare(
    reference.fp8_gemm_swiglu, outputs=_swiglu_outputs, launch=partial(_launch_swiglu, op="fp8_gemm_swiglu")
)
_grouped_fp8_gemm_swiglu = declare(
    reference.grouped_fp8_gemm_swiglu,
    outputs=_swiglu_outputs,
    launch=partial(_launch_swiglu, op="grouped_fp8_gemm_swiglu"),
    validate=partial(_validate_rows, "grouped_fp8_gemm_swiglu"),
)
_grouped_fp8_wgrad = declare(
    reference.grouped_fp8_wgrad,
    outputs=lambda a, b, counts, out_dtype: a.new_empty((len(counts), len(a), len(b)), dtype=out_dtype),
    launch=partial(_launch, op="grouped_fp8_wgrad"),
    validate=_validate_tokens,
)
