"""Checks of the arguments of expert parallelism, for `ExpertParallel` and `VirtualRanks`."""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels._backend import UnsupportedError
from k2kernels.ops._check import FLOATS, INDICES, Arguments
from k2kernels.ops.quant import QUANTIZABLE
from k2kernels.parallel.exchange import DispatchOptions, ExchangeHandle, Sizes
from k2kernels.parallel.ranks import Ranks


def check_sizes(args: Arguments, sizes: Sizes, world_size: int) -> None:
    """Checks the sizes that `ExpertParallel` and `VirtualRanks` are created with."""
    for name in ("num_experts", "hidden", "top_k"):
        args.integer(name, getattr(sizes, name), 1)
    experts = sizes.num_experts
    args.require(sizes.top_k <= experts, "top_k", f"at most num_experts={experts}", sizes.top_k)
    args.integer("max_tokens", sizes.max_tokens, 0)
    args.choice("row_dtype", sizes.row_dtype, FLOATS)
    args.require(experts >= world_size, "num_experts", f"at least the {world_size} ranks", experts)


def check_dispatch(ranks: Ranks, x: list, indices: list, weights: list, options: DispatchOptions) -> None:
    """Raises TypeError, ValueError or UnsupportedError for arguments of `dispatch`, before any rank sends."""
    check_options("ExpertParallel.dispatch", options)
    check_lists(ranks, "dispatch", x=x, indices=indices, weights=weights)
    max_tokens = ranks.sizes.max_tokens
    for one_x, one_indices, one_weights in zip(x, indices, weights):
        if one_x is None:
            continue
        args = Arguments("ExpertParallel.dispatch")
        args.tensor("x", one_x, ("T", ranks.sizes.hidden), QUANTIZABLE if options.quantize else FLOATS)
        args.tensor("indices", one_indices, ("T", ranks.sizes.top_k), INDICES)
        args.tensor("weights", one_weights, ("T", ranks.sizes.top_k), FLOATS)
        args.require(len(one_x) <= max_tokens, "x", lambda: f"at most max_tokens={max_tokens} rows", len(one_x))
        if not options.quantize:
            check_rows(ranks, "dispatch", "x", one_x.dtype)


def check_options(op: str, options: DispatchOptions) -> None:
    args = Arguments(op)
    args.boolean("quantize", options.quantize)
    args.boolean("power_of_two", options.power_of_two)
    args.integer("alignment", options.alignment, 1)
    args.choice("scale_layout", options.scale_layout, ("row", "column"))
    if (capacity := options.capacity) is not None:
        args.integer("capacity", capacity, 0)
        what = f"a multiple of alignment={options.alignment}"
        args.require(capacity % options.alignment == 0, "capacity", what, capacity)


def check_lists(ranks: Ranks, where: str, **lists: list) -> None:
    """Raises ValueError unless each list has one entry for each rank; that of a masked rank may be None."""
    for name, values in lists.items():
        args, members = Arguments(f"ExpertParallel.{where}"), len(ranks.members)
        if not isinstance(values, (list, tuple)) or len(values) != members:
            got = len(values) if isinstance(values, (list, tuple)) else type(values).__name__
            args.require(False, name, f"a list of {members}, one for each rank", got)
        for member, value in zip(ranks.members, values):
            args.require(value is not None or member.rank in ranks.masked, name, f"one for rank {member.rank}", "None")


def check_combine(
    ranks: Ranks, ys: list, handles: list, shared: list, residual: list, out_dtype: torch.dtype | None
) -> None:
    """The same for `combine`. Its backward sends rows of out_dtype."""
    check_lists(ranks, "combine", y=ys, handles=handles)
    tensors = []
    for y, handle, *added in zip(ys, handles, shared, residual, strict=True):
        if y is None:
            continue
        check_rows_of(y, handle, *added, ranks.sizes.hidden, ranks.sizes.top_k)
        tensors += [y, handle.weights]
        check_rows(ranks, "combine", "y", y.dtype)
    if out_dtype is not None:
        Arguments("ExpertParallel.combine").choice("out_dtype", out_dtype, FLOATS)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        check_rows(ranks, "combine", "out_dtype", tensors[0].dtype if out_dtype is None else out_dtype)


def check_rows_of(
    y: Tensor, handle: ExchangeHandle, shared: Tensor | None, residual: Tensor | None, hidden: int, top_k: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, shared and residual, checked against the handle."""
    args = Arguments("ExpertParallel.combine")
    if not isinstance(handle, ExchangeHandle):
        raise TypeError(
            f"ExpertParallel.combine: handle must be the handle of this object's dispatch, got "
            f"{type(handle).__module__}.{type(handle).__name__}"
        )
    args.tensor("handle.token_of_slot", handle.token_of_slot, ("S",), torch.int32)
    args.tensor("handle.weights", handle.weights, ("T", top_k), FLOATS)
    y = args.tensor("y", y, ("S", hidden), FLOATS)
    shared, residual = (
        args.optional(name, terms, ("T", hidden), FLOATS)
        for name, terms in (("shared", shared), ("residual", residual))
    )
    return y, shared, residual


def check_rows(ranks: Ranks, where: str, name: str, dtype: torch.dtype) -> None:
    """Raises UnsupportedError for rows that are too wide for the buffers."""
    widest = ranks.sizes.row_dtype
    if dtype == torch.float64 or dtype.itemsize > widest.itemsize:
        raise UnsupportedError(
            f"ExpertParallel.{where}: {name} is {dtype}, and the buffers are for rows of {widest}; set row_dtype="
        )
