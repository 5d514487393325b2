"""Rows of tokens to the slots of their experts, and back: the public functions.

`dispatch_rows`, `permute_rows`, `combine_rows` and `combine_rows_backward` are the ops without checks, for exchanges
between ranks: the rows may be `ArrivedRows`, which a kernel reads where they arrived.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, INDICES, Arguments
from k2kernels.ops._constants import constants
from k2kernels.ops._launch import launch, matrices
from k2kernels.ops._register import Op, declare
from k2kernels.ops.exchange import ArrivedRows
from k2kernels.ops.moe._limits import check_indices, float32, unserved
from k2kernels.ops.quant import QUANTIZABLE, empty_scales
from k2kernels.reference import moe as reference


class DispatchHandle(NamedTuple):
    """Where dispatch put the rows, for `moe_combine`. Tensors only, so that it passes through torch.compile."""

    slot_of: Tensor  # int32 [T, K]: the slot of each (token, k), -1 where it has none
    token_of_slot: Tensor  # int32 [S]: the token in each slot, -1 in pad slots
    offsets: Tensor  # int32 [E+1]
    counts: Tensor  # int32 [E]
    weights: Tensor  # [T, K]
    overflow: Tensor  # int64 []: pairs dropped for lack of capacity


class Dispatched(NamedTuple):
    """What `moe_dispatch` returns."""

    data: Tensor  # [S, H], expert-major
    scales: Tensor | None  # float32, when quantised
    offsets: Tensor  # int32 [E+1]: first slot of each expert, a multiple of the alignment; last: all slots in use
    counts: Tensor  # int32 [E]: rows of each expert; slots offsets[e] + counts[e] ... offsets[e+1] are padding
    handle: DispatchHandle


def moe_dispatch(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    num_experts: int,
    alignment: int = 1,
    quantize: bool = False,
    power_of_two: bool = False,
    scale_layout: str = "row",
    capacity: int | None = None,
) -> Dispatched:
    """Copies each token's row to a slot of each of its experts.

    Slots are ordered by expert, then token, then k (a stable counting sort: they depend on `indices` alone), and each
    expert's slots begin at a multiple of `alignment`. Shapes of results depend on shapes only, so the host does not
    wait for the device.

    Args:
        x: [T, H], float32, bfloat16, float16 or float64 (no float64 with `quantize`).
        indices: int32 or int64 [T, K]; -1 drops that pair. The same expert twice in a row is allowed.
        weights: [T, K], floating point; kept in the handle for `moe_combine`.
        num_experts: E.
        alignment: rows; 128 suits tiles of 128, 1 wastes nothing.
        quantize: the rows become e4m3 codes with scales, as `quantize_1x128(x)` makes them.
        power_of_two, scale_layout: as in `quantize_1x128`.
        capacity: S, a multiple of the alignment. Pairs whose slot would be S or above are dropped, and their number is
            `handle.overflow`. None takes T K + min(E, T K) (alignment - 1), rounded up, which always suffices.

    Returns:
        Dispatched(data [S, H], scales, offsets int32 [E+1], counts int32 [E], handle). Rows of `data` beyond
        offsets[e] + counts[e] are padding, with unspecified content, like their scales. scales is None, or float32
        [S, ceil(H/128)]. Differentiable in x unless quantised; the weights get their gradient from `moe_combine`.

    Raises:
        TypeError, ValueError: for dtypes, shapes and options, for a capacity of 2**31 slots or more, and, on a CPU, for
            an index below -1 or from E on (a kernel drops such a pair).

    Source: DeepGEMM (the grouped layout); HybridEP (a capacity known beforehand, overflow counted).
    """
    args = Arguments("moe_dispatch")
    args.boolean("quantize", quantize)
    x = args.tensor("x", x, ("T", "H"), QUANTIZABLE if quantize else FLOATS)
    indices = args.tensor("indices", indices, ("T", "K"), INDICES)
    weights = args.tensor("weights", weights, ("T", "K"), FLOATS)
    args.integer("num_experts", num_experts, 1)
    args.integer("alignment", alignment, 1)
    args.boolean("power_of_two", power_of_two)
    args.choice("scale_layout", scale_layout, ("row", "column"))
    if capacity is not None:
        args.integer("capacity", capacity, 0)
    else:
        capacity = sufficient_capacity(num_experts, indices.shape[0] * indices.shape[1], alignment)
    args.require(capacity % alignment == 0, "capacity", lambda: f"a multiple of alignment={alignment}", capacity)
    args.require(capacity < 2**31, "capacity", "below 2**31 slots", capacity, "dispatch fewer tokens at a time")
    place = num_experts, alignment, capacity
    if quantize:
        data, scales, *plan = _moe_dispatch_quantize(x, indices, *place, power_of_two, scale_layout)
    else:
        scales, (data, *plan) = None, _moe_dispatch(x, indices, *place)
    slot_of, token_of_slot, offsets, counts, overflow = plan
    handle = DispatchHandle(slot_of, token_of_slot, offsets, counts, weights, overflow)
    return Dispatched(data, scales, offsets, counts, handle)


def sufficient_capacity(num_experts: int, pairs: int, alignment: int) -> int:
    """Slots that always suffice for `pairs` pairs, however they are routed."""
    most = pairs + min(num_experts, pairs) * (alignment - 1)
    return (most + alignment - 1) // alignment * alignment


def moe_combine(
    y: Tensor,
    handle: DispatchHandle,
    *,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Adds up each token's expert rows: sum over k of weights[t, k] * y[slot_of[t, k]] + shared[t] + residual[t].

    The sum is made in float32 (float64 for float64), in the order of k, then shared, then residual, and rounded once:
    it is deterministic, and a token's bits do not depend on the other tokens.

    Args:
        y: [S, H], in the slots of `moe_dispatch`; pad rows are not read.
        handle: `Dispatched.handle`.
        shared, residual: [T, H], floating point.
        out_dtype: y's by default.

    Returns:
        [T, H]; a token without slots gets shared + residual only. Differentiable in y, the weights, shared, residual.

    Raises:
        TypeError, ValueError: for dtypes and shapes, for a handle that is not `moe_dispatch`'s, and, on a CPU, for
            slots and tokens in it that do not exist.
    """
    args = Arguments("moe_combine")
    if not isinstance(handle, DispatchHandle):
        raise TypeError(f"moe_combine: handle must be the handle of moe_dispatch, got {type(handle).__name__}")
    slot_of = args.tensor("handle.slot_of", handle.slot_of, ("T", "K"), torch.int32)
    token_of_slot = args.tensor("handle.token_of_slot", handle.token_of_slot, ("S",), torch.int32)
    weights = args.tensor("handle.weights", handle.weights, ("T", "K"), FLOATS)
    y = args.tensor("y", y, ("S", "H"), FLOATS)
    shared = args.optional("shared", shared, ("T", "H"), FLOATS)
    residual = args.optional("residual", residual, ("T", "H"), FLOATS)
    out_dtype = args.choice("out_dtype", y.dtype if out_dtype is None else out_dtype, FLOATS)
    return _moe_combine(y, slot_of, token_of_slot, weights, shared, residual, out_dtype)


def _with_arrived(op: Op, rows: Tensor | ArrivedRows, *args: Any) -> Any:
    """Calls the op. A kernel reads arrived rows in their buffer, past the dispatcher, whose checks might read data that
    has not arrived; the reference gets a copy of them."""
    if isinstance(rows, Tensor):
        return op(rows, *args)
    matrix = rows.halves[0]
    if op.serves(matrix, *args):
        return op.kernel(matrix, *args, arrived=rows)
    return op(rows.copy(), *args)


def _where(x: Tensor, arrived: ArrivedRows | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows of x, the half that they are in, and how many came from each rank, as the kernels take them."""
    return (matrices(x), None, None) if arrived is None else arrived


# ---- moe_dispatch, moe_dispatch_quantize


def _plan(indices: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, ...]:
    """Empty slot_of, token_of_slot, offsets, counts, overflow."""
    empty, int32 = indices.new_empty, torch.int32
    return (
        empty(*indices.shape, dtype=int32),
        empty(capacity, dtype=int32),
        empty(num_experts + 1, dtype=int32),
        empty(num_experts, dtype=int32),
        empty((), dtype=torch.int64),
    )


def _dispatch_outputs(x: Tensor, indices: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, ...]:
    return x.new_empty(capacity, x.shape[1]), *_plan(indices, num_experts, capacity)


def _dispatch_quantize_outputs(
    x: Tensor, indices: Tensor, num_experts: int, capacity: int, scale_layout: str
) -> tuple[Tensor, ...]:
    hidden = x.shape[1]
    scales = empty_scales(x, (capacity, -(-hidden // 128)), scale_layout)
    codes = x.new_empty(capacity, hidden, dtype=torch.float8_e4m3fn)
    return codes, scales, *_plan(indices, num_experts, capacity)


def _launch_dispatch(
    data: Tensor,
    slot_of: Tensor,
    token_of_slot: Tensor,
    offsets: Tensor,
    counts: Tensor,
    overflow: Tensor,
    x: Tensor,
    indices: Tensor,
    alignment: int,
    scales: Tensor | None = None,
    power_of_two: bool = False,
    *,
    arrived: ArrivedRows | None = None,
) -> None:
    ranks = before_tile = None
    if (pairs := indices.numel()) > (tile := constants.MOE_PLAN_TILE):
        ranks = indices.new_empty(pairs, dtype=torch.int16)
        before_tile = indices.new_empty((-(-pairs // tile), counts.shape[0]), dtype=torch.int32)
    launch(
        "moe_dispatch", *_where(x, arrived), indices.contiguous(), alignment, power_of_two, data, scales, slot_of,
        token_of_slot, offsets, counts, overflow, ranks, before_tile,
        op="moe_dispatch" if scales is None else "moe_dispatch_quantize",
    )  # fmt: skip


def _launch_dispatch_quantize(
    data: Tensor,
    scales: Tensor,
    slot_of: Tensor,
    token_of_slot: Tensor,
    offsets: Tensor,
    counts: Tensor,
    overflow: Tensor,
    x: Tensor,
    indices: Tensor,
    alignment: int,
    power_of_two: bool,
) -> None:
    plan = slot_of, token_of_slot, offsets, counts, overflow
    _launch_dispatch(data, *plan, x, indices, alignment, scales, power_of_two)


def _dispatch_unserved(x: Tensor, indices: Tensor, num_experts: int, alignment: int) -> str | None:
    return unserved(
        {"x": x.dtype},
        {
            "num_experts": (num_experts, constants.MOE_MOST_EXPERTS),
            "K of indices": (indices.shape[1], constants.MOE_MOST_TOP_K),
            "T K of indices": (indices.numel(), 2**31 - 1),
            "alignment": (alignment, 2**31 - 1),
        },
    )


def _save_plan(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[1:3])  # slot_of, token_of_slot


def _dispatch_gradients(ctx: Any, grad: Tensor, *_: None) -> tuple:
    return _moe_combine(grad, *ctx.saved_tensors, None, None, None, grad.dtype), *[None] * 4


_moe_dispatch = declare(
    reference.moe_dispatch,
    outputs=_dispatch_outputs,
    launch=_launch_dispatch,
    unserved=_dispatch_unserved,
    validate=lambda indices, num_experts: check_indices("moe_dispatch", indices, num_experts),
    setup_context=_save_plan,
    backward=_dispatch_gradients,
)
_moe_dispatch_quantize = declare(
    reference.moe_dispatch_quantize,
    outputs=_dispatch_quantize_outputs,
    launch=_launch_dispatch_quantize,
    unserved=_dispatch_unserved,
    validate=lambda indices, num_experts: check_indices("moe_dispatch", indices, num_experts),
)


# ---- moe_permute: the gradient of a combine without weights


def _launch_permute(
    data: Tensor, x: Tensor, slot_of: Tensor, token_of_slot: Tensor, *, arrived: ArrivedRows | None = None
) -> None:
    plan = slot_of.contiguous(), token_of_slot.contiguous()
    launch("moe_combine_backward", *_where(x, arrived), None, *plan, None, data, None, op="moe_permute")


def _permute_gradients(ctx: Any, grad: Tensor) -> tuple:
    return _moe_combine(grad, *ctx.saved_tensors, None, None, None, grad.dtype), None, None


_moe_permute = declare(
    reference.moe_permute,
    outputs=lambda x, token_of_slot: x.new_empty((token_of_slot.shape[0], x.shape[1])),
    launch=_launch_permute,
    unserved=lambda x, slot_of: unserved(
        {"x": x.dtype}, {"K of slot_of": (slot_of.shape[1], constants.MOE_MOST_TOP_K)}
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
    backward=_permute_gradients,
)


# ---- moe_combine


def _combine_validate(y: Tensor, slot_of: Tensor, token_of_slot: Tensor) -> None:
    for name, places, count in (("slot_of", slot_of, y.shape[0]), ("token_of_slot", token_of_slot, slot_of.shape[0])):
        low, high = (int(i) for i in places.aminmax()) if places.numel() else (-1, -1)
        if low < -1 or high >= count:
            raise ValueError(
                f"moe_combine: handle.{name} must be from -1 (none) to {count - 1}, got {low if low < -1 else high}; "
                "pass the handle of moe_dispatch as it is"
            )


def _launch_combine(
    out: Tensor,
    y: Tensor,
    slot_of: Tensor,
    weights: Tensor | None,
    shared: Tensor | None,
    residual: Tensor | None,
    *,
    arrived: ArrivedRows | None = None,
) -> None:
    y, half, _ = _where(y, arrived)
    shared = shared if shared is None else matrices(shared)
    residual = residual if residual is None else matrices(residual)
    launch("moe_combine", y, half, slot_of.contiguous(), float32(weights), shared, residual, out)


def _combine_unserved(
    y: Tensor, slot_of: Tensor, shared: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype
) -> str | None:
    dtypes = {"y": y.dtype, "out_dtype": out_dtype}
    if shared is not None:
        dtypes["shared"] = shared.dtype
    if residual is not None:
        dtypes["residual"] = residual.dtype
    return unserved(dtypes, {"K of slot_of": (slot_of.shape[1], constants.MOE_MOST_TOP_K)})


def _combine_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, slot_of, token_of_slot, weights, shared, residual, _ = inputs
    ctx.save_for_backward(y if weights is not None else None, slot_of, token_of_slot, weights)
    ctx.dtypes = [None if t is None else t.dtype for t in (y, shared, residual)]


def _combine_gradients(ctx: Any, grad: Tensor) -> tuple:
    y, slot_of, token_of_slot, weights = ctx.saved_tensors
    y_dtype, shared_dtype, residual_dtype = ctx.dtypes
    d_weights = None
    if weights is None:
        d_y = _moe_permute(grad.to(y_dtype), slot_of, token_of_slot)
    else:
        d_y, d_weights = _moe_combine_backward(grad, y, slot_of, token_of_slot, weights)
    d_shared = grad.to(shared_dtype) if ctx.needs_input_grad[4] else None
    d_residual = grad.to(residual_dtype) if ctx.needs_input_grad[5] else None
    return d_y, None, None, d_weights, d_shared, d_residual, None


def _launch_combine_backward(
    d_y: Tensor,
    d_weights: Tensor,
    grad: Tensor,
    y: Tensor,
    slot_of: Tensor,
    token_of_slot: Tensor,
    weights: Tensor,
    *,
    arrived: ArrivedRows | None = None,
) -> None:
    in_float32 = d_weights
    if d_weights.dtype != torch.float32:
        in_float32 = d_weights.new_empty(d_weights.shape, dtype=torch.float32)
    operands = matrices(y), slot_of.contiguous(), token_of_slot.contiguous(), float32(weights)
    launch("moe_combine_backward", *_where(grad, arrived), *operands, d_y, in_float32)
    if in_float32 is not d_weights:
        d_weights.copy_(in_float32)


_moe_combine = declare(
    reference.moe_combine,
    outputs=lambda y, slot_of, out_dtype: y.new_empty(slot_of.shape[0], y.shape[1], dtype=out_dtype),
    launch=_launch_combine,
    unserved=_combine_unserved,
    validate=_combine_validate,
    setup_context=_combine_setup,
    backward=_combine_gradients,
)
_moe_combine_backward = declare(
    reference.moe_combine_backward,
    outputs=lambda y, weights: (y.new_empty(y.shape), weights.new_empty(weights.shape)),
    launch=_launch_combine_backward,
    unserved=lambda grad, y, slot_of: unserved(
        {"grad": grad.dtype, "y": y.dtype}, {"K of slot_of": (slot_of.shape[1], constants.MOE_MOST_TOP_K)}
    ),
)

# Without checks: rows, which may be `ArrivedRows`, and the further arguments of the reference.
dispatch_rows = functools.partial(_with_arrived, _moe_dispatch)
permute_rows = functools.partial(_with_arrived, _moe_permute)
combine_rows = functools.partial(_with_arrived, _moe_combine)
combine_rows_backward = functools.partial(_with_arrived, _moe_combine_backward)
