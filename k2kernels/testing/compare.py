"""Comparison against an exact result, with a budget derived from PyTorch's own error in that precision.

One global similarity number hides local damage (a 128x128 tile of noise in a 4096x7168 result passes
`cos_diff < 1e-3`), so `check_close` checks every element, `worst_tile` every tile, and both report the position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from k2kernels.reference.quant import quantize_1x128


def cos_diff(got: Tensor, want: Tensor) -> float:
    """1 - 2<x,y> / (|x|^2 + |y|^2) in float64: 0 when equal; it is sensitive to scale, unlike the cosine."""
    x, y = got.double().flatten(), want.double().flatten()
    denominator = (x * x + y * y).sum()
    return 0.0 if denominator == 0 else float(1 - 2 * (x * y).sum() / denominator)


def worst_tile(got: Tensor, want: Tensor, size: int = 128) -> tuple[float, tuple[int, int]]:
    """The largest cos_diff of any `size` x `size` tile of two matrices, and the tile's (row, column)."""
    worst, where = 0.0, (0, 0)
    for row in range(0, got.shape[0], size):
        for column in range(0, got.shape[1], size):
            tile = (slice(row, row + size), slice(column, column + size))
            if (difference := cos_diff(got[tile], want[tile])) > worst:
                worst, where = difference, (row, column)
    return worst, where


def check_close(
    got: Tensor,
    want: Tensor,
    *,
    budget: Tensor | float | None = None,
    same_precision: Tensor | None = None,
    max_cos_diff: float | None = None,
    name: str = "result",
) -> None:
    """Asserts that `got` is close to the exact `want` (usually float64) in every element.

    Args:
        budget: allowed absolute error, a number or a tensor. Given None, it is twice the largest error that
            `same_precision`, the plain PyTorch result in `got`'s dtype, makes, plus the rounding of one result.
        max_cos_diff: bound of `cos_diff`, if any.

    NaN and infinities must be at the same positions, with the same sign.
    """
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, want {list(want.shape)}"
    if got.numel() == 0:
        return
    x, y = got.detach().double(), want.detach().double()
    assert torch.equal(x.isnan(), y.isnan()), f"{name}: NaN at other places than wanted"
    infinite = y.isinf()
    assert torch.equal(x.isinf(), infinite) and torch.equal(x[infinite], y[infinite]), (
        f"{name}: infinities at other places than wanted"
    )
    finite = y.isfinite()
    error = torch.where(finite, (x - y).abs(), torch.zeros_like(x))
    if budget is None:
        rounding = torch.finfo(got.dtype).eps * y.abs()
        if same_precision is not None:
            other = (same_precision.detach().double() - y).abs()
            rounding = rounding + 2 * other[finite].max()
        budget = torch.where(finite, rounding, torch.zeros_like(rounding)) + torch.finfo(got.dtype).tiny
    excess = error - budget
    worst = int(excess.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), x.shape))
    limit = float(budget.flatten()[worst]) if isinstance(budget, Tensor) and budget.numel() > 1 else float(budget)
    assert excess.flatten()[worst] <= 0, (
        f"{name}: worst element {index}: got {float(x[index])!r}, want {float(y[index])!r}, "
        f"error {float(error[index]):.3g} > {limit:.3g}; {int((excess > 0).sum())} of {x.numel()} over budget"
    )
    if max_cos_diff is not None:
        difference = cos_diff(x[finite], y[finite])
        assert difference <= max_cos_diff, f"{name}: cos_diff {difference:.3g} > {max_cos_diff:.3g}"


def check_rms_norm_quantize(
    data: Tensor, scales: Tensor, x: Tensor, weight: Tensor, *, eps: float, power_of_two: bool = False
) -> None:
    """Asserts that every row is, bit for bit, the quantised norm for one float32 close to 1 / sqrt(mean(x**2) + eps).

    The order of summation may change that number only. With u = 2**-24, the largest relative error of one
    rounding: a chain of n additions of squares errs by n u at most, the mean and eps by 2 u; the root halves that, root
    and division add 2 u. A kernel's chains have 40 additions, those of PyTorch's cascade, whose squares are rounded as
    well, some 46: 26.5 u. Neighbouring floats are at least u apart, and the exact number is half of that from one.
    """
    nearest = (1 / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()).float()
    found = torch.zeros(x.shape[:-1], dtype=torch.bool)
    for step in sorted(range(-27, 28), key=abs):
        inverse = (nearest.view(torch.int32) + step).view(torch.float32)
        want, want_scales = quantize_1x128((x.float() * inverse * weight.float()).to(x.dtype), power_of_two)
        same = (data.view(torch.uint8) == want.view(torch.uint8)).all(-1)
        found |= same & (scales == want_scales).all(-1)
        if found.all():
            return
    raise AssertionError(
        f"rows {(~found).nonzero().tolist()[:8]} are the norm's codes for no inverse near the exact one"
    )


def check_op(op: Any, args: tuple, *, differentiable: bool = False, compiled: Callable | None = None) -> None:
    """Checks a registered op by torch.library.opcheck, and a full-graph compile against eager.

    Args:
        op: what `k2kernels.ops._register.declare` returned.
        args: its positional arguments. With `differentiable`, those that require a gradient are used for the overload
            with a backward too.
        compiled: a call of the public function without arguments, compiled with fullgraph=True and compared.
    """
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    if any(isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn for a in args):
        # PyTorch's schema test compares with allclose, which float8 lacks.
        _check_schema(op.plain, detached)
        tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(op.plain, detached, test_utils=tests)
    else:
        torch.library.opcheck(op.plain, detached)
    if differentiable:
        torch.library.opcheck(op.autograd, args)
    if compiled is not None:
        torch._dynamo.reset()
        want = _flat(compiled())
        got = _flat(torch.compile(compiled, fullgraph=True, backend="aot_eager")())
        assert len(got) == len(want)
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


def _check_schema(overload: Any, args: tuple) -> None:
    """Asserts that a call changes no tensor but those the schema marks, and returns none of its arguments' memory."""
    tensors = [(d, a) for d, a in zip(overload._schema.arguments, args) if isinstance(a, Tensor)]
    before = [a.clone() for _, a in tensors]
    results = _storages(overload(*args))
    for (declared, a), old in zip(tensors, before):
        if declared.alias_info is None or not declared.alias_info.is_write:
            same = a.contiguous().view(torch.uint8).equal(old.contiguous().view(torch.uint8))
            assert same, f"{overload}: changes {declared.name}, which its schema does not mark"
        assert a.untyped_storage().data_ptr() not in results, f"{overload}: a result shares memory with {declared.name}"


def _storages(result: Any) -> set[int]:
    if isinstance(result, Tensor):
        return {result.untyped_storage().data_ptr()}
    return {s for r in result for s in _storages(r)} if isinstance(result, (list, tuple)) else set()


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach().clone()]
    if isinstance(result, (list, tuple)):
        return [t for r in result for t in _flat(r)]
    return []
