"""The grouped matrix product of unquantised experts and its gradients: the definitions.

S rows (slots) in G groups: group g has counts[g] rows from offsets[g] on. Rows behind them are padding. `expected` is
an estimate of the rows in use: a kernel chooses its tile by it, and it changes no bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, counts: Tensor, expected: int | None) -> Tensor:
    """[S, N]: the rows of group g, from offsets[g] on, times b[g] [N, K] transposed; zeros in pad rows."""
    return _grouped_mm(a, b.transpose(1, 2), offsets, counts)


def grouped_gemm_dgrad(a: Tensor, b: Tensor, offsets: Tensor, counts: Tensor, expected: int | None) -> Tensor:
    """Gradient of `grouped_gemm` with respect to its a: the gradient a [S, N] and b [G, N, K] give [S, K]."""
    return _grouped_mm(a, b, offsets, counts)


def grouped_gemm_wgrad(a: Tensor, b: Tensor, offsets: Tensor, counts: Tensor) -> Tensor:
    """Gradient of `grouped_gemm` with respect to its b: the gradient a [S, N] and its a, b [S, K], give [G, N, K]."""
    groups = _groups(offsets, counts)
    d = a.new_empty((len(groups), a.shape[1], b.shape[1]))
    for g, (start, end, _) in enumerate(groups):
        torch.mm(a[start:end].t(), b[start:end], out=d[g])  # zeros for an empty group
    return d


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, counts: Tensor) -> Tensor:
    out = a.new_empty((a.shape[0], b.shape[2]))
    groups = _groups(offsets, counts)
    out[groups[-1][2] :].zero_()
    for g, (start, end, next_start) in enumerate(groups):
        if end > start:
            torch.mm(a[start:end], b[g], out=out[start:end])
        if next_start > end:
            out[end:next_start].zero_()
    return out


def _groups(offsets: Tensor, counts: Tensor) -> list[tuple[int, int, int]]:
    """First row, row after the last, and first row of the next group, of each group."""
    starts, sizes = offsets.tolist(), counts.tolist()
    return [(start, start + size, after) for start, size, after in zip(starts, sizes, starts[1:])]
