"""The grouped matrix product of unquantised experts, with its gradients: the public function.

`multiply` is the same without checks, for compositions that have made them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments, check_groups
from k2kernels.ops._launch import chip, launch, rows_on_16_bytes
from k2kernels.ops._register import declare
from k2kernels.reference import grouped_gemm as reference


def grouped_gemm(a: Tensor, b: Tensor, *, offsets: Tensor, counts: Tensor, expected: int | None = None) -> Tensor:
    """d[r] = a[r] b[g]^T for each row r of group g: offsets[g] <= r < offsets[g] + counts[g].

    Args:
        a: [S, K]; float32, bfloat16, float16 or float64. Rows that belong to no group are not read.
        b: [G, N, K] in a's dtype.
        offsets: int32 [G+1], rising, at most S: the first row of each group, any row.
        counts: int32 [G]: rows of each group.
        expected: an estimate of the rows in use, S by default. A kernel chooses its tile by it; it changes no bit.

    Returns:
        [S, N] in a's dtype; summed in float32 and rounded once by a kernel. Rows of no group are unspecified (zeros by
        the reference). Differentiable in a and b.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and, on a CPU, for groups out of range.

    Source: Gale et al., "MegaBlocks" (2022); the grouped layout is DeepGEMM's.
    """
    args = Arguments("grouped_gemm")
    a = args.tensor("a", a, ("S", "K"), FLOATS)
    b = args.tensor("b", b, ("G", "N", "K"), a.dtype)
    offsets = args.tensor("offsets", offsets, (b.shape[0] + 1,), torch.int32)
    counts = args.tensor("counts", counts, ("G",), torch.int32)
    return _grouped_gemm(a, b, offsets, counts, expected)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.expected = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    a, b, *groups = ctx.saved_tensors
    d_a = _grouped_gemm_dgrad(grad, b, *groups, ctx.expected) if ctx.needs_input_grad[0] else None
    d_b = _grouped_gemm_wgrad(grad, a, *groups) if ctx.needs_input_grad[1] else None
    return d_a, d_b, None, None, None


def _launching(function: str) -> Callable:
    def launch_into(d: Tensor, a: Tensor, b: Tensor, offsets: Tensor, counts: Tensor, expected: int | None = None):
        operands = rows_on_16_bytes(a), rows_on_16_bytes(b), offsets.contiguous(), counts.contiguous()
        launch(function, chip(a.device), *operands, a.shape[0] if expected is None else expected, d)

    return launch_into


def _unserved(a: Tensor, b: Tensor) -> str | None:
    if a.dtype not in (torch.bfloat16, torch.float16):
        return f"a must be bfloat16 or float16 for the kernels, got {a.dtype}"
    return None if b.dtype == a.dtype else f"b must be {a.dtype} like a, got {b.dtype}"


_grouped_gemm = declare(
    reference.grouped_gemm,
    outputs=lambda a, b: a.new_empty((a.shape[0], b.shape[1])),
    launch=_launching("grouped_gemm"),
    unserved=_unserved,
    validate=lambda a, offsets, counts: check_groups("grouped_gemm", offsets, counts, a.shape[0]),
    setup_context=_setup,
    backward=_gradients,
)
_grouped_gemm_dgrad = declare(
    reference.grouped_gemm_dgrad,
    outputs=lambda a, b: a.new_empty((a.shape[0], b.shape[2])),
    launch=_launching("grouped_gemm_dgrad"),
    unserved=_unserved,
)
_grouped_gemm_wgrad = declare(
    reference.grouped_gemm_wgrad,
    outputs=lambda a, b, counts: a.new_empty((counts.shape[0], a.shape[1], b.shape[1])),
    launch=_launching("grouped_gemm_wgrad"),
    unserved=_unserved,
)

multiply = _grouped_gemm  # without checks: a, b, offsets, counts, expected
