"""GEMMs of e4m3 operands with block scales: the definitions.

    D[m,n] = sum over blocks of (sum over the block's k of A[m,k] * B[n,k]) * (a_scale[m,block] * b_scale[n,block])

A block is 128 of K (the last may be shorter). The inner sum is of exact products, in float32, in any order; it is
multiplied by the product of the two scales and added to the float32 result, block after block ("promotion"). Then, in
float32, a row is multiplied by its weight and bias and C are added, and the one rounding to the result's dtype follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.reference.quant import from_e4m3, swiglu_quantize


def fp8_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    bias: Tensor | None,
    accumulate: Tensor | None,
    out_dtype: torch.dtype,
    b_row_offset: int = 0,
    batch_invariant: bool = False,
    row_weights: Tensor | None = None,
) -> Tensor:
    """A [M, K] times the transpose of B [N, K]; b_scales [blocks of rows, k-blocks] or [N, k-blocks]."""
    result = _promoted(a, a_scales, b, b_scales, b_row_offset)
    if row_weights is not None:
        result *= row_weights[:, None]
    if bias is not None:
        result += bias.float()
    if accumulate is not None:
        result += accumulate.float()
    return result.to(out_dtype)


def grouped_fp8_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    expected_m: int | None,
    out_dtype: torch.dtype,
    b_row_offset: int = 0,
    batch_invariant: bool = False,
    row_weights: Tensor | None = None,
) -> Tensor:
    """`fp8_gemm` of each group's rows with the group's B; the rows of no group come out as zeros."""
    out = a.new_zeros((*a.shape[:-1], b.shape[1]), dtype=out_dtype)
    options = out_dtype, b_row_offset, batch_invariant, row_weights
    grouped_fp8_gemm_out(out, a, a_scales, b, b_scales, offsets, counts, expected_m, *options)
    return out


def grouped_fp8_gemm_out(
    out: Tensor,
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    expected_m: int | None,
    out_dtype: torch.dtype,
    b_row_offset: int = 0,
    batch_invariant: bool = False,
    row_weights: Tensor | None = None,
) -> None:
    """`grouped_fp8_gemm` into `out`, whose rows of no group stay as they are."""
    for group, (start, count) in enumerate(_extents(offsets, counts)):
        rows = slice(start, start + count) if offsets is not None else (group, slice(count))
        if count:
            result = _promoted(a[rows], a_scales[rows], b[group], b_scales[group], b_row_offset)
            if row_weights is not None:
                result *= row_weights[rows][:, None]
            out[rows] = result.to(out.dtype)


def fp8_gemm_swiglu(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    weights: Tensor | None,
    power_of_two: bool,
    scale_layout: str,
) -> tuple[Tensor, Tensor]:
    """`swiglu_quantize` of the product in float32; B [2I, K] has the rows of gate, then those of up."""
    product = _promoted(a, a_scales, b, b_scales)
    return swiglu_quantize(product, weights, power_of_two, scale_layout, None, None)


def grouped_fp8_gemm_swiglu(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    expected_m: int | None,
    weights: Tensor | None,
    power_of_two: bool,
    scale_layout: str,
) -> tuple[Tensor, Tensor]:
    """`fp8_gemm_swiglu` of each group's rows with the group's B; the rows of no group come out as zeros."""
    product = grouped_fp8_gemm(a, a_scales, b, b_scales, offsets, counts, expected_m, torch.float32)
    return swiglu_quantize(product, weights, power_of_two, scale_layout, offsets, counts)


def grouped_fp8_wgrad(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor,
    counts: Tensor,
    out_dtype: torch.dtype,
    accumulate: Tensor | None,
) -> Tensor:
    """D[g] = A[:, tokens of g] times the transpose of B[:, tokens of g], plus C[g]."""
    result = a.new_zeros((counts.shape[0], a.shape[0], b.shape[0]), dtype=torch.float32)
    for group, (start, count) in enumerate(_extents(offsets, counts)):
        tokens = slice(start, start + count)
        blocks = slice(start // 128, -(-(start + count) // 128))
        result[group] = _promoted(a[:, tokens], a_scales[:, blocks], b[:, tokens], b_scales[:, blocks])
    if accumulate is not None:
        result += accumulate.float()
    return result.to(out_dtype)


def _promoted(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, b_row_offset: int = 0) -> Tensor:
    """The formula above, without bias and C, in float32; b begins b_row_offset rows into its first block."""
    if b_scales.shape[0] != b.shape[0]:  # one row of scales per 128 rows of B
        b_scales = b_scales.repeat_interleave(128, dim=0)[b_row_offset:][: b.shape[0]]
    result = a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.float32)
    for block in range(a_scales.shape[1]):
        k = slice(128 * block, 128 * (block + 1))
        partial = from_e4m3(a[:, k]) @ from_e4m3(b[:, k]).mT
        result.addcmul_(partial, torch.outer(a_scales[:, block], b_scales[:, block]))
    return result


def _extents(offsets: Tensor | None, counts: Tensor | None) -> list[tuple[int, int]]:
    """(start, count) of every group, on the host; without offsets the groups are matrices of their own: start 0."""
    if offsets is None:
        return [(0, count) for count in counts.tolist()]
    counts = offsets.diff() if counts is None else counts
    return list(zip(offsets.tolist(), counts.tolist()))
