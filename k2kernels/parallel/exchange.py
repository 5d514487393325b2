"""Dispatch and combine over ranks, whatever carries the rows, with the bits of dispatch and combine on one rank.

T tokens of this rank, K experts a token, R rows that arrive here, S slots of the experts here. A pair is (token, k).

- scatter: each token's row goes once to every rank that has one of its experts. Rows arrive ordered by source rank,
  then token; the local dispatch orders them by expert, source rank, token and k, as one rank with all tokens would.
- gather: every pair's row comes back by itself, and the token's own rank adds them up: one float32 sum, in the order
  of k, one rounding. Adding up on the expert's rank first would send less and round twice.

The gradient of dispatch is gather, that of combine is scatter. The weights stay at home; combine's gradient sends
them along with the gradient's rows, because the products are then made on the expert's rank, and K numbers a token,
the weights' gradient, return.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2kernels.ops import moe
from k2kernels.ops._check import FLOATS
from k2kernels.ops.quant import quantize_1x128
from k2kernels.reference.quant import store_scales


class Handle(NamedTuple):
    """Where dispatch put the rows, for combine; what `k2kernels.ops.moe.Handle` is on one rank.

    All but `weights` and `route` describe the rows that arrived here.
    """

    slot_of: Tensor  # int32 [R, K]: of the rows that arrived, each pair's slot; -1: another rank's, or no room
    token_of_slot: Tensor  # int32 [S]: the arrived row in each slot, -1 in pad slots
    offsets: Tensor  # int32 [experts here + 1]
    counts: Tensor  # int32 [experts here]
    weights: Tensor  # [T, K], of this rank's tokens
    overflow: Tensor  # int64 []: pairs dropped here for want of capacity
    route: Any  # the transport's own
    degraded: bool  # a rank is masked: tokens lack its experts


class Transport(Protocol):
    """Carries rows. `phase` names a call in errors; rows are matrices of any dtype with columns side by side."""

    degraded: bool

    def plan(self, indices: Tensor, kind: int) -> tuple[Any, Tensor, int]:
        """The route of this rank's pairs; the local expert of each pair of the arriving rows, int32 [R, K], -1 for
        another rank's; and at most how many are not -1. Ranks whose calls differ in `kind` are told."""

    def scatter(self, route: Any, segments: list[Tensor], phase: str) -> list[Tensor]:
        """Matrices [T, ...] as they arrive: [R, ...]."""

    def gather(self, route: Any, rows: Tensor, slot_of: Tensor, phase: str) -> Tensor:
        """Rows [S, ...] of the experts here as they return: one for each pair of this rank, as `home` orders them.

        A pair without a slot returns zeros.
        """

    def home(self, route: Any) -> tuple[Tensor, Tensor]:
        """Which row that returns is each pair's, int32 [T, K], -1: none; and the token of each that returns, int32."""

    def without(self, route: Any, home_slot_of: Tensor) -> Any:
        """The route with another `home`: pairs without room have lost their rows."""


class Options(NamedTuple):
    """Of a call of dispatch; all but `capacity` must agree over the ranks."""

    num_experts: int  # here
    alignment: int
    quantize: bool
    power_of_two: bool
    scale_layout: str
    capacity: int | None


@torch.compiler.disable
def dispatch(transport: Transport, x: Tensor, indices: Tensor, weights: Tensor, options: Options) -> moe.Dispatched:
    """The rows of all ranks' tokens for the experts here."""
    data, scales, plan, route = _Dispatch.apply(x, transport, indices, options)
    slot_of, token_of_slot, offsets, counts, overflow = plan
    handle = Handle(slot_of, token_of_slot, offsets, counts, weights, overflow, route, transport.degraded)
    return moe.Dispatched(data, scales, offsets, counts, handle)


@torch.compiler.disable
def combine(
    transport: Transport,
    y: Tensor,
    handle: Handle,
    shared: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Each token's weighted sum of its rows of y, wherever they are."""
    return _Combine.apply(y, handle.weights, shared, residual, transport, handle, out_dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transport: Transport, indices: Tensor, options: Options) -> tuple:
        kind = 8 * FLOATS.index(x.dtype) + 4 * options.quantize + 2 * options.power_of_two
        kind += options.capacity is not None
        route, experts, pairs = transport.plan(indices, kind)
        if options.quantize:
            codes, scales = quantize_1x128(x, power_of_two=options.power_of_two)
            codes, scales = transport.scatter(route, [codes, scales], "dispatch")
            data, scales, plan = codes_to_slots(codes, scales, experts, pairs, options)
        else:
            (rows,) = transport.scatter(route, [x], "dispatch")
            scales, (data, plan) = None, to_slots(rows, experts, pairs, options)
        slot_of, home_slot_of = plan[0], transport.home(route)[0]
        if options.capacity is not None:  # home is told what had no room
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
        d_x = moe._moe_combine(rows, *ctx.transport.home(ctx.route), None, None, None, grad.dtype)
        return d_x, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weights: Tensor,
        shared: Tensor | None,
        residual: Tensor | None,
        transport: Transport,
        handle: Handle,
        out_dtype: torch.dtype,
    ) -> Tensor:
        rows = transport.gather(handle.route, y, handle.slot_of, "combine")
        ctx.transport, ctx.route = transport, handle.route
        ctx.dtypes = [None if t is None else t.dtype for t in (shared, residual)]
        ctx.save_for_backward(y, handle.slot_of, handle.token_of_slot, weights)
        return moe._moe_combine(rows, *transport.home(handle.route), weights, shared, residual, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        y, slot_of, token_of_slot, weights = ctx.saved_tensors
        home_slot_of, _ = ctx.transport.home(ctx.route)
        rows, factors = ctx.transport.scatter(ctx.route, [grad, weights], "combine backward")
        d_y, d_factors = moe._moe_combine_backward(rows, y, slot_of, token_of_slot, factors)
        # A pair's number returns like a row of its own: row * K + k is the slot, in which it lies.
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


def to_slots(rows: Tensor, experts: Tensor, pairs: int, options: Options) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The arrived rows in the slots of their experts, and the plan: slot_of ... overflow."""
    capacity = options.capacity
    if capacity is None:
        capacity = pairs + min(options.num_experts, pairs) * (options.alignment - 1)
        capacity = -(-capacity // options.alignment) * options.alignment
    data, *plan = moe._moe_dispatch(rows, experts, options.num_experts, options.alignment, capacity)
    return data, tuple(plan)


def codes_to_slots(
    codes: Tensor, scales: Tensor, experts: Tensor, pairs: int, options: Options
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The same of quantised rows, with their scales in the layout that is asked for."""
    data, plan = to_slots(_words(codes), experts, pairs, options)
    data = data.view(torch.uint8)[:, : codes.shape[1]].contiguous().view(codes.dtype)
    return data, store_scales(moe._moe_permute(scales, *plan[:2]), options.scale_layout), plan


def _words(codes: Tensor) -> Tensor:
    """Bytes as numbers of two or four bytes, which every body of dispatch moves as they are."""
    codes = codes.view(torch.uint8)
    if odd := codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, odd))
    return codes.view(torch.float32 if codes.shape[1] % 4 == 0 else torch.bfloat16)
