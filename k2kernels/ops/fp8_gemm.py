"""GEMMs of e4m3 operands with block scales: the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.ops._check import Arguments, check_counts, check_groups
from k2kernels.ops._register import register
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
    out: Tensor | None = None,
) -> Tensor:
    """D = A · Bᵀ (+ bias) (+ C) of block-scaled e4m3 matrices.

    Per 128 of K, the exact products are summed in float32, multiplied by (a_scale * b_scale) and added to the float32
    result in the order of K; then bias, then C; then one rounding to out_dtype.

    Args:
        a: [M, K] float8_e4m3fn.
        a_scales: [M, ceil(K/128)] float32, of `quantize_1x128`; row or column layout (any strides).
        b: [N, K] float8_e4m3fn: the weight, as a linear layer stores it.
        b_scales: float32, [ceil(N/128), ceil(K/128)] of `quantize_128x128`, or [N, ceil(K/128)] of `quantize_1x128`.
        out_dtype: bfloat16, float16 or float32.
        bias: [N], bfloat16, float16 or float32.
        accumulate: C [M, N], bfloat16, float16 or float32.
        out: [M, N] in out_dtype: written in place and returned. It may be `accumulate`.

    Returns:
        D [M, N]. M, N and K are free: none need be a multiple of 128, and any may be 0. Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and, with `out`, for a tensor that requires a gradient.

    Source: DeepSeek-V3 (2024), section 3.3.2; DeepGEMM, fp8_gemm_nt.
    """
    args = Arguments("fp8_gemm")
    a = args.tensor("a", a, ("M", "K"), E4M3)
    b = args.tensor("b", b, ("N", "K"), E4M3)
    blocks = -(-args.sizes["K"] // 128)
    a_scales = args.tensor("a_scales", a_scales, ("M", blocks), torch.float32)
    b_scales = _b_scales(args, b, b_scales)
    bias = args.optional("bias", bias, ("N",), RESULTS)
    accumulate = args.optional("accumulate", accumulate, ("M", "N"), RESULTS)
    args.choice("out_dtype", out_dtype, RESULTS)
    if out is None:
        return _fp8_gemm(a, a_scales, b, b_scales, bias, accumulate, out_dtype)
    inputs = dict(a_scales=a_scales, b_scales=b_scales, bias=bias, accumulate=accumulate)
    out = _out(args, out, ("M", "N"), out_dtype, **inputs)
    _fp8_gemm_out(a, a_scales, b, b_scales, bias, accumulate, out)
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
        b: [G, N, K] float8_e4m3fn.
        b_scales: [G, ceil(N/128), ceil(K/128)] of `quantize_128x128`, or [G, N, ceil(K/128)]; float32.
        offsets: [G+1] int32, rising within 0 .. cap; any alignment.
        counts: [G] int32, the real rows of each group; None: they fill the space up to the next group.
        masked_m: [G] int32, within 0 .. maxM. Instead of offsets.
        expected_m: about how many rows a group has: a hint for the choice of a kernel, without effect on the result.
        out_dtype: bfloat16, float16 or float32.
        out: [cap, N] or [G, maxM, N] in out_dtype: written in place and returned.

    Returns:
        D [cap, N] or [G, maxM, N]. Groups may be empty. Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes, shapes, both layouts or none, an `out` that requires a gradient, and, on a
            CPU, for offsets, counts or masked_m out of range.

    Source: DeepGEMM, m_grouped_fp8_gemm_nt_contiguous and _masked.
    """
    args = Arguments("grouped_fp8_gemm")
    args.require(
        (offsets is None) != (masked_m is None),
        "the layout",
        "given by offsets (contiguous) or by masked_m (masked)",
        "neither" if offsets is None else "both",
    )
    args.require(
        masked_m is None or counts is None, "counts", "None with masked_m", "both", "masked_m holds the counts"
    )
    rows = ("G", "maxM") if offsets is None else ("cap",)
    a = args.tensor("a", a, (*rows, "K"), E4M3)
    b = args.tensor("b", b, ("G", "N", "K"), E4M3)
    a_scales = args.tensor("a_scales", a_scales, (*rows, -(-args.sizes["K"] // 128)), torch.float32)
    b_scales = _b_scales(args, b, b_scales)
    offsets = args.optional("offsets", offsets, (args.sizes["G"] + 1,), torch.int32)
    if offsets is None:
        counts = args.tensor("masked_m", masked_m, ("G",), torch.int32)
    else:
        counts = args.optional("counts", counts, ("G",), torch.int32)
    if expected_m is not None:
        args.integer("expected_m", expected_m, 0)
    args.choice("out_dtype", out_dtype, RESULTS)
    if out is None:
        return _grouped_fp8_gemm(a, a_scales, b, b_scales, offsets, counts, expected_m, out_dtype)
    out = _out(args, out, (*rows, "N"), out_dtype, a_scales=a_scales, b_scales=b_scales)
    _grouped_fp8_gemm_out(a, a_scales, b, b_scales, offsets, counts, expected_m, out)
    return out


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


def _b_scales(args: Arguments, b: Tensor, b_scales: Tensor) -> Tensor:
    """Checks b_scales [..., N or ceil(N/128), ceil(K/128)] against b [..., N, K]."""
    b_scales = args.tensor("b_scales", b_scales, None, torch.float32)
    *leading, n, k = b.shape
    fine = b_scales.ndim == b.ndim and b_scales.shape[-2] == n
    return args.tensor(
        "b_scales",
        b_scales,
        (*leading, n if fine else -(-n // 128), -(-k // 128)),
        torch.float32,
        remedy="one scale per 128x128 of b, or a row of scales per row of b",
    )


def _out(args: Arguments, out: Tensor, shape: tuple, out_dtype: torch.dtype, **inputs: Tensor | None) -> Tensor:
    """Checks `out`; the `inputs` are those that might want a gradient, which an op that writes in place cannot give."""
    out = args.tensor("out", out, shape, out_dtype, remedy="out_dtype= must name the dtype of out")
    args.no_gradient(out=out, **{name: value for name, value in inputs.items() if value is not None})
    args.writable("out", out)
    return out


_fp8_gemm = register(
    "fp8_gemm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? bias, Tensor? accumulate,"
    " ScalarType out_dtype) -> Tensor",
    reference=reference.fp8_gemm,
    fake=lambda a, a_scales, b, b_scales, bias, accumulate, out_dtype: a.new_empty(
        (a.shape[0], b.shape[0]), dtype=out_dtype
    ),
)
_fp8_gemm_out = register(
    "fp8_gemm_out(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? bias, Tensor? accumulate,"
    " Tensor(a!) out) -> ()",
    reference=reference.fp8_gemm_out,
    fake=lambda *args: None,
    mutates=True,
)


def _validate_rows(a: Tensor, a_scales, b, b_scales, offsets: Tensor | None, counts: Tensor | None, *_) -> None:
    if offsets is None:
        check_counts("grouped_fp8_gemm", "masked_m", counts, a.shape[1])
    else:
        check_groups("grouped_fp8_gemm", offsets, counts, a.shape[0])


def _grouped_fp8_gemm_fake(a, a_scales, b, b_scales, offsets, counts, expected_m, out_dtype) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[1]), dtype=out_dtype)


_grouped_fp8_gemm = register(
    "grouped_fp8_gemm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? offsets, Tensor? counts,"
    " int? expected_m, ScalarType out_dtype) -> Tensor",
    reference=reference.grouped_fp8_gemm,
    fake=_grouped_fp8_gemm_fake,
    validate=_validate_rows,
)
_grouped_fp8_gemm_out = register(
    "grouped_fp8_gemm_out(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? offsets, Tensor? counts,"
    " int? expected_m, Tensor(a!) out) -> ()",
    reference=reference.grouped_fp8_gemm_out,
    fake=lambda *args: None,
    validate=_validate_rows,
    mutates=True,
)


def _validate_tokens(a: Tensor, a_scales, b, b_scales, offsets: Tensor, counts: Tensor, *_) -> None:
    check_groups("grouped_fp8_wgrad", offsets, counts, a.shape[1], alignment=128)


def _grouped_fp8_wgrad_fake(a, a_scales, b, b_scales, offsets, counts, out_dtype, accumulate) -> Tensor:
    return a.new_empty((counts.shape[0], a.shape[0], b.shape[0]), dtype=out_dtype)


_grouped_fp8_wgrad = register(
    "grouped_fp8_wgrad(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor offsets, Tensor counts,"
    " ScalarType out_dtype, Tensor? accumulate) -> Tensor",
    reference=reference.grouped_fp8_wgrad,
    fake=_grouped_fp8_wgrad_fake,
    validate=_validate_tokens,
)
