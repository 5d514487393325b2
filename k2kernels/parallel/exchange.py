"""Dispatch and combine over ranks by any transport, with the bits of dispatch and combine on one rank.

T tokens of this rank, K experts per token, R rows that arrive here, S slots of the local experts. A pair is (token, k).

- scatter: each token's row is sent once to every rank that has one of its experts. Rows arrive ordered by source rank,
  then token; the local dispatch orders them by expert, source rank, token and k, as one rank with all tokens would.
- gather: the row of every pair is returned, and the token's rank adds them up: one float32 sum, in the order of k, one
  rounding. Partial sums on the expert's rank would send less and round twice.

The gradient of dispatch is a gather, that of combine a scatter. Weights are not sent in the forward pass; combine's
backward sends them with the rows of the gradient, as the products are computed on the expert's rank, and the gradient
of the weights, K numbers per token, is returned.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2kernels.ops._check import FLOATS
from k2kernels.ops.moe import Dispatched
from k2kernels.ops.moe.dispatch import (
    combine_rows,
    combine_rows_backward,
    dispatch_rows,
    permute_rows,
    sufficient_capacity,
)
from k2kernels.ops.quant import quantize_1x128
from k2kernels.parallel.uncompiled import uncompiled
from k2kernels.reference.quant import store_scales


class ExchangeHandle(NamedTuple):
    """Where dispatch put the rows, for combine: the counterpart of `k2kernels.ops.moe.DispatchHandle` over ranks.

    All but `weights` and `route` describe the rows that arrived here.
    """

    slot_of: Tensor  # int32 [R, K]: the slot of each arrived pair; -1: of another rank, or dropped
    token_of_slot: Tensor  # int32 [S]: the arrived row in each slot, -1 in pad slots
    offsets: Tensor  # int32 [experts here + 1]
    counts: Tensor  # int32 [experts here]
    weights: Tensor  # [T, K]: this rank's tokens
    overflow: Tensor  # int64 []: pairs dropped here for lack of capacity
    route: Any  # of the transport
    degraded: bool  # a rank is masked: results lack its experts


class Transport(Protocol):
    """Sends rows between ranks: matrices of any dtype, contiguous in their last axis. Errors name `phase`."""

    degraded: bool

    def plan(self, indices: Tensor, kind: int) -> tuple[Any, Tensor, int]:
        """Agrees on an exchange.

        Returns:
            The route of this rank's pairs; int32 [R, K], the local expert of each pair of the arriving rows, -1 for an
            expert of another rank; and an upper bound of how many are not -1.

        Raises:
            ValueError: ranks differ in `kind`.
        """

    def scatter(self, route: Any, segments: list[Tensor], phase: str) -> list[Tensor]:
        """Sends the rows of matrices [T, ...]; returns those that arrive, [R, ...]."""

    def gather(self, route: Any, rows: Tensor, slot_of: Tensor, phase: str) -> Tensor:
        """Returns rows [S, ...] of the local experts to their tokens: one for each pair of this rank, ordered as in
        `home`; zeros for a pair without a slot."""

    def home(self, route: Any) -> tuple[Tensor, Tensor]:
        """int32 [T, K], the returned row of each pair, -1 for none; and int32, the token of each returned row."""

    def without(self, route: Any, home_slot_of: Tensor) -> Any:
        """The route with another `home`, in which dropped pairs have no row."""


class Sizes(NamedTuple):
    """The sizes that `ExpertParallel` is created with: they determine its buffers."""

    num_experts: int  # over all ranks
    hidden: int
    top_k: int
    max_tokens: int
    row_dtype: torch.dtype


class DispatchOptions(NamedTuple):
    """Options of `ExpertParallel.dispatch`; all but `capacity` must agree over the ranks."""

    alignment: int = 1
    quantize: bool = False
    power_of_two: bool = False
    scale_layout: str = "row"
    capacity: int | None = None

    def slots(self, num_experts: int, pairs: int) -> int:
        """How many slots `num_experts` local experts get for up to `pairs` pairs."""
        if self.capacity is not None:
            return self.capacity
        return sufficient_capacity(num_experts, pairs, self.alignment)


@uncompiled
def dispatch(
    transport: Transport, x: Tensor, indices: Tensor, weights: Tensor, num_experts: int, options: DispatchOptions
) -> Dispatched:
    """The rows of all ranks' tokens for the `num_experts` local experts."""
    data, scales, plan, route = _TransportDispatch.apply(x, transport, indices, num_experts, options)
    slot_of, token_of_slot, offsets, counts, overflow = plan
    handle = ExchangeHandle(slot_of, token_of_slot, offsets, counts, weights, overflow, route, transport.degraded)
    return Dispatched(data, scales, offsets, counts, handle)


@uncompiled
def combine(
    transport: Transport,
    y: Tensor,
    handle: ExchangeHandle,
    shared: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Each token's weighted sum of its rows of y, over all ranks."""
    return _TransportCombine.apply(y, handle.weights, shared, residual, transport, handle, out_dtype)


class _TransportDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, transport: Transport, indices: Tensor, num_experts: int, options: DispatchOptions
    ) -> tuple:
        kind = 8 * FLOATS.index(x.dtype) + 4 * options.quantize + 2 * options.power_of_two
        kind += options.capacity is not None
        route, experts, pairs = transport.plan(indices, kind)
        if options.quantize:
            codes, scales = quantize_1x128(x, power_of_two=options.power_of_two)
            codes, scales = transport.scatter(route, [codes, scales], "dispatch")
            data, scales, plan = codes_to_slots(codes, scales, experts, pairs, num_experts, options)
        else:
            (rows,) = transport.scatter(route, [x], "dispatch")
            scales, (data, plan) = None, to_slots(rows, experts, pairs, num_experts, options)
        slot_of, home_slot_of = plan[0], transport.home(route)[0]
        if options.capacity is not None:  # the tokens' ranks learn which pairs were dropped
            kept = torch.ones(len(plan[1]), 4, dtype=torch.uint8, device=x.device)
            kept = transport.gather(route, kept, slot_of, "dispatch, what had room")[:, 0]
            if len(kept):
                home_slot_of = torch.where(kept[home_slot_of.clamp(min=0)] > 0, home_slot_of, -1)
            route = transport.without(route, home_slot_of)
        ctx.transport, ctx.route, ctx.slot_of, ctx.quantize = transport, route, slot_of, options.quantize
        return data, scales, plan, route

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        if ctx.quantize:
            raise RuntimeError("ExpertParallel.dispatch: with quantize=True there is no gradient of x; detach x")
        rows = ctx.transport.gather(ctx.route, grad, ctx.slot_of, "dispatch backward")
        d_x = combine_rows(rows, *ctx.transport.home(ctx.route), None, None, None, grad.dtype)
        return d_x, None, None, None, None


class _TransportCombine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weights: Tensor,
        shared: Tensor | None,
        residual: Tensor | None,
        transport: Transport,
        handle: ExchangeHandle,
        out_dtype: torch.dtype,
    ) -> Tensor:
        rows = transport.gather(handle.route, y, handle.slot_of, "combine")
        ctx.transport, ctx.route = transport, handle.route
        ctx.dtypes = [None if t is None else t.dtype for t in (shared, residual)]
        ctx.save_for_backward(y, handle.slot_of, handle.token_of_slot, weights)
        return combine_rows(rows, *transport.home(handle.route), weights, shared, residual, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        y, slot_of, token_of_slot, weights = ctx.saved_tensors
        home_slot_of, _ = ctx.transport.home(ctx.route)
        rows, factors = ctx.transport.scatter(ctx.route, [grad, weights], "combine backward")
        d_y, d_factors = combine_rows_backward(rows, y, slot_of, token_of_slot, factors)
        # The number of a pair is returned like a row; row * K + k is its slot.
        places = torch.arange(slot_of.numel(), dtype=torch.int32, device=y.device).view(slot_of.shape)
        places = torch.where(slot_of >= 0, places, -1)
        returned = ctx.transport.gather(
            ctx.route, d_factors.reshape(-1, 1), places, "combine backward, gradient of the weights"
        )
        d_weights = weights.new_zeros(weights.shape)
        if len(returned):
            found = returned[:, 0][home_slot_of.clamp(min=0)]
            d_weights = torch.where(home_slot_of >= 0, found, d_weights)
        d_shared, d_residual = (
            grad.to(dtype) if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad[2:4])
        )
        return d_y, d_weights, d_shared, d_residual, None, None, None


def to_slots(
    rows: Tensor, experts: Tensor, pairs: int, num_experts: int, options: DispatchOptions
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The arrived rows in the slots of their experts, and the plan: slot_of ... overflow."""
    capacity = options.slots(num_experts, pairs)
    data, *plan = dispatch_rows(rows, experts, num_experts, options.alignment, capacity)
    return data, tuple(plan)


def codes_to_slots(
    codes: Tensor, scales: Tensor, experts: Tensor, pairs: int, num_experts: int, options: DispatchOptions
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The same for quantised rows; the scales are in the layout of the options."""
    data, plan = to_slots(_words(codes), experts, pairs, num_experts, options)
    data = data.view(torch.uint8)[:, : codes.shape[1]].contiguous().view(codes.dtype)
    return data, store_scales(permute_rows(scales, *plan[:2]), options.scale_layout), plan


def _words(codes: Tensor) -> Tensor:
    """Bytes viewed as numbers of two or four bytes, which dispatch copies unchanged."""
    codes = codes.view(torch.uint8)
    if odd := codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, odd))
    return codes.view(torch.float32 if codes.shape[1] % 4 == 0 else torch.bfloat16)
