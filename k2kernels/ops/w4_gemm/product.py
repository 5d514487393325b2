"""Products with packed 4-bit weights: the public functions.

`multiply` is the grouped one without checks, for compositions that have made them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k2kernels.ops._check import Arguments, check_groups
from k2kernels.ops._launch import chip, launch, rows_on_16_bytes
from k2kernels.ops._register import declare
from k2kernels.ops.w4_gemm.gradient import grouped_w4_gemm_dgrad
from k2kernels.ops.w4_gemm.packed import W4, check_w4
from k2kernels.reference import w4_gemm as reference


def grouped_w4_gemm(
    a: Tensor,
    w4: W4,
    *,
    offsets: Tensor,
    counts: Tensor,
    swiglu: bool = False,
    batch_invariant: bool = False,
    expected: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`grouped_gemm` with 4-bit weights: d[r] = a[r] w4[g]^T for each row r of group g.

    The weights are `dequantize_w4` of the packed ones, bfloat16. Sums are in float32, in steps of 16 along K in their
    order: the result has the bits of `grouped_gemm` with those weights, unless K is cut into parts.

    Args:
        a: [S, K] bfloat16. Rows that belong to no group are not read.
        w4: of shape (G, N, K), as `pack_w4` makes it; packed with `gated=True` for `swiglu`, and only then.
        offsets: int32 [G+1], rising, at most S: the first row of each group, any row.
        counts: int32 [G]: rows of each group.
        swiglu: the result is `swiglu` of the product, which is rounded to bfloat16 before: the bits are those of the
            two ops.
        batch_invariant: on sm_90a a kernel may cut K into 2 or 4 parts, which are added in their order: where few
            groups of short N have a long K (csrc/w4_gemm/README.md), a number fixed by G, N and K. With True it never
            does. In both cases a row's bits do not depend on the other rows, and are the same in every call.
        expected: an estimate of the rows in use, S by default. A kernel chooses its tile by it; it changes no bit.
        out: [S, N], or [S, N/2] with `swiglu`, bfloat16, to write into; rows of no group stay as they are.

    Returns:
        [S, N], or [S, N/2] with `swiglu`, bfloat16. Rows of no group are unspecified (zeros by the reference).
        Differentiable in a: the backward pass multiplies by the dequantised weights of some experts at a time, and with
        `swiglu` computes the product again. Weights have no gradient.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and, on a CPU, for groups out of range.
    """
    args = Arguments("grouped_w4_gemm")
    a, w4 = _operands(args, a, w4, 3, swiglu)
    groups = w4.shape[0]
    offsets = args.tensor("offsets", offsets, (groups + 1,), torch.int32)
    counts = args.tensor("counts", counts, (groups,), torch.int32)
    args.boolean("batch_invariant", batch_invariant)
    if expected is not None:
        args.integer("expected", expected, 0)
    return _multiply(args, a, w4, offsets, counts, swiglu, batch_invariant, expected, out)


def w4_gemm(
    a: Tensor, w4: W4, *, swiglu: bool = False, batch_invariant: bool = False, out: Tensor | None = None
) -> Tensor:
    """d = a w4^T with 4-bit weights: `grouped_w4_gemm` of one group of all rows.

    Args:
        a: [M, K] bfloat16.
        w4: of shape (N, K), as `pack_w4` makes it of one matrix.
        swiglu, batch_invariant, out: as `grouped_w4_gemm` takes them; `out` has M rows.

    Returns:
        [M, N], or [M, N/2] with `swiglu`, bfloat16; differentiable in a.

    Raises:
        TypeError, ValueError: for dtypes and shapes.
    """
    args = Arguments("w4_gemm")
    a, w4 = _operands(args, a, w4, 2, swiglu)
    args.boolean("batch_invariant", batch_invariant)
    counts = a.new_full((1,), a.shape[0], dtype=torch.int32)
    offsets = torch.cat([counts.new_zeros(1), counts])
    one = W4(w4.data[None], w4.kind, (1, *w4.shape), w4.gated)
    return _multiply(args, a, one, offsets, counts, swiglu, batch_invariant, None, out)


def _operands(args: Arguments, a: Tensor, w: W4, axes: int, swiglu: bool) -> tuple[Tensor, W4]:
    args.boolean("swiglu", swiglu)
    a = args.tensor("a", a, ("S" if axes == 3 else "M", "K"), torch.bfloat16)
    w = check_w4(args, "w4", w)
    wanted = "(G, N, K)" if axes == 3 else "(N, K)"
    args.require(len(w.shape) == axes, "the shape of w4", wanted, lambda: list(w.shape))
    args.require(w.shape[-1] == a.shape[1], "the K of w4", lambda: f"{a.shape[1]} like that of a", w.shape[-1])
    remedy = f"pack it with pack_w4(..., gated={swiglu})"
    args.require(w.gated == swiglu, "w4", f"packed with gated={swiglu} for swiglu={swiglu}", f"gated={w.gated}", remedy)
    return a, w


def _multiply(
    args: Arguments,
    a: Tensor,
    w: W4,
    offsets: Tensor,
    counts: Tensor,
    swiglu: bool,
    batch_invariant: bool,
    expected: int | None,
    out: Tensor | None,
) -> Tensor:
    _, n, k = w.shape
    inputs = a, w.data, offsets, counts, w.kind, n, k, swiglu, batch_invariant, expected
    if out is None:
        return _grouped_w4_gemm(*inputs)
    out = args.tensor("out", out, (a.shape[0], n // 2 if swiglu else n), torch.bfloat16)
    args.writable("out", out)
    args.no_gradient(a=a, out=out)
    _grouped_w4_gemm.out(*inputs, out)
    return out


def multiply(
    a: Tensor, w: W4, offsets: Tensor, counts: Tensor, swiglu: bool = False, expected: int | None = None
) -> Tensor:
    """`grouped_w4_gemm` without checks, batch_invariant: the bits do not depend on how many experts a rank has."""
    return _grouped_w4_gemm(a, w.data, offsets, counts, w.kind, *w.shape[1:], swiglu, True, expected)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    a, *operands, ctx.kind, ctx.n, ctx.k, swiglu, _, ctx.expected = inputs
    ctx.save_for_backward(a if swiglu else None, *operands)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    sizes = ctx.kind, ctx.n, ctx.k, ctx.expected
    return grouped_w4_gemm_dgrad(grad.contiguous(), *ctx.saved_tensors, *sizes), *[None] * 9


def _outputs(a: Tensor, n: int, swiglu: bool, *, out: Tensor | None = None) -> Tensor:
    return a.new_empty((a.shape[0], n // 2 if swiglu else n)) if out is None else out


def _launch(
    d: Tensor,
    a: Tensor,
    data: Tensor,
    offsets: Tensor,
    counts: Tensor,
    kind: str,
    swiglu: bool,
    batch_invariant: bool,
    expected: int | None,
) -> None:
    operands = rows_on_16_bytes(a, distinct=True), rows_on_16_bytes(data.contiguous())
    groups, rows = (offsets.contiguous(), counts.contiguous()), a.shape[0] if expected is None else expected
    into = d if d.stride(-1) == 1 else d.contiguous()  # rows of no group keep what they hold
    launch("grouped_w4_gemm", chip(a.device), *operands, *groups, kind, swiglu, batch_invariant, rows, into)
    if into is not d:
        d.copy_(into)


_grouped_w4_gemm = declare(
    reference.grouped_w4_gemm,
    outputs=_outputs,
    launch=_launch,
    validate=lambda a, offsets, counts: check_groups("grouped_w4_gemm", offsets, counts, a.shape[0]),
    setup_context=_setup,
    backward=_gradient,
    out=(),
    out_reference=reference.grouped_w4_gemm_out,
)
