"""Dispatch and combine over ranks that write into one another's buffers: GPUs of an NVLink domain, or one process.

What `exchange` describes holds here too; the steps are those of `k2kernels.ops.exchange`. Shapes do not depend on the
data: W * max_tokens rows arrive, the most that could; those that were not sent have no expert. The number of rows sent
and the half of the buffer that holds them stay in device memory, where kernels read them: the host never waits, and a
captured graph may contain any number of exchanges.

A program is one rank's part of an exchange, as a generator that yields twice: after its sends, and after it has
launched everything that may overlap with other ranks. One process may hold several ranks; `Ranks.run` advances their
programs from yield to yield together.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2kernels import _backend
from k2kernels._backend import PeerTimeout
from k2kernels.ops import _launch
from k2kernels.ops._constants import constants
from k2kernels.ops.exchange import Call, Rank
from k2kernels.ops.moe import Dispatched
from k2kernels.ops.moe.dispatch import combine_rows, combine_rows_backward, dispatch_rows, permute_rows
from k2kernels.ops.quant import quantize_1x128
from k2kernels.parallel.exchange import DispatchOptions, ExchangeHandle, Sizes
from k2kernels.parallel.split import Split
from k2kernels.reference.exchange import Layout, to_16
from k2kernels.reference.quant import store_scales

EMULATED_TIMEOUT = 10**8  # in ticks of the emulator's clock, which advances while all threads wait
BLOCKS = 48  # CTAs of a kernel that sends: they fit on 48 of an H100's 132 SMs, or on 16 at three an SM


class BufferRoute(NamedTuple):
    """What combine needs from dispatch."""

    experts: Tensor  # int32 [W * max_tokens, K]: the local expert of each pair that arrived, or -1
    row_counts: Tensor  # int32 [W]: how many rows of each rank arrived
    indices: Tensor  # [T, K]: this rank's tokens


class Ranks:
    """The ranks of this process and their exchanges. Lists have one entry for each of them, None where it is masked.

    Args:
        layout: the layout of every rank's buffer.
        members: the ranks of this process.
        sizes: what the layout was made for.
    """

    def __init__(self, layout: Layout, members: list[Rank], sizes: Sizes):
        self.layout, self.members, self.sizes = layout, members, sizes
        self.splits = [Split(layout.experts, layout.world, member.rank) for member in members]
        self.masked: frozenset[int] = frozenset()
        self.withheld: frozenset[int] = frozenset()  # ranks whose programs are not run, as if they had died
        self.timeout = 10**10  # of a kernel that waits, in nanoseconds
        self.keep: Any = None  # keeps the buffers mapped
        self._stream: Any = None  # stream of the last exchange

    def dispatch(self, xs: list, indices: list, weights: list, options: DispatchOptions) -> list:
        here = [i for i, member in enumerate(self.members) if member.rank not in self.masked]
        sent = _BufferDispatch.apply(
            self, options, here, [indices[i].contiguous() for i in here], *[xs[i] for i in here]
        )
        data, (scales, handles) = sent[:-1], sent[-1]
        results = [None] * len(self.members)
        for n, i in enumerate(here):
            handle = handles[n]._replace(weights=weights[i])
            results[i] = Dispatched(data[n], scales[n], handle.offsets, handle.counts, handle)
        return results

    def combine(self, ys: list, handles: list, shared: list, residual: list, out_dtype: torch.dtype) -> list:
        here = [i for i, member in enumerate(self.members) if member.rank not in self.masked]
        tensors = [t for i in here for t in (ys[i], handles[i].weights, shared[i], residual[i])]
        out = _BufferCombine.apply(self, [handles[i] for i in here], here, out_dtype, *tensors)
        results = [None] * len(self.members)
        for n, i in enumerate(here):
            results[i] = out[n]
        return results

    def mask(self, rank: int) -> None:
        """Continues without `rank`. Other processes must do the same, and no exchange may be in flight."""
        self.masked |= {rank}
        self.withheld -= {rank}
        for member in self.members:
            member.reset(member.live & ~(1 << rank))

    def check(self) -> None:
        """Raises the faults that kernels have reported: PeerTimeout; ValueError for an index out of range, or for ranks
        that made different calls."""
        faults = {m.rank: fault for m in self.members if m.rank not in self.withheld and (fault := m.fault())}
        for rank, fault in faults.items():
            if fault.fault == constants.EXCHANGE_BAD_INDEX:
                raise ValueError(
                    f"ExpertParallel.dispatch: indices must be from -1 (none) to E-1, got {fault.number} for token "
                    f"{fault.who} of rank {rank}; it was treated as -1"
                )
            if fault.fault == constants.EXCHANGE_OTHER_CALL:
                other = "the others" if fault.who == rank else f"rank {fault.who}"
                raise ValueError(
                    f"ExpertParallel: the ranks must make the same calls; rank {rank} differs from {other} in "
                    f"{fault.phase!r}, epoch {fault.number}, or in its dtype or quantisation; results since then are "
                    "NaN: make the calls agree, then make a new group"
                )
        for rank, fault in faults.items():
            how = " (reported by another rank)" if fault.fault == constants.EXCHANGE_PEER_ABORTED else ""
            raise PeerTimeout(
                f"ExpertParallel: rank {rank} timed out in {fault.phase!r}, epoch {fault.number}: rank {fault.who} did "
                f"not send{how}; results of this call are NaN; mask the rank, or make a new group",
                phase=fault.phase,
                ranks=(fault.who,),
                epoch=fault.number,
            )

    def run(self, here: list[int], programs: list[Generator]) -> list:
        """Runs the programs of the members `here`; returns what each returns."""
        self.check()
        emulated = _backend.mode().backend == "emulated"
        for i in here:
            self.members[i].timeout = EMULATED_TIMEOUT if emulated else self.timeout
        if self.members[0].buffer.is_cuda:
            self._stream = follow(torch.cuda.current_stream(self.members[0].buffer.device), self._stream)
        running = [(i, p) for i, p in zip(here, programs) if self.members[i].rank not in self.withheld]
        with _launch.emulated_together() if emulated else contextlib.nullcontext():
            for _stop in range(2):
                for i, program in running:
                    with _launch.emulated_stream(i + 1):
                        next(program)
        if len(self.members) > 1 and self.members[0].buffer.is_cuda:
            self._stream.synchronize()
        if len(self.members) > 1:
            self.check()
        return [_end(program) for program in programs]


def follow(stream: Any, last: Any) -> Any:
    """Makes `stream` wait for `last`, the stream of the previous exchange, and returns it.

    The exchanges of a rank must be ordered: epochs are counted on the device, and a send releases the rows that this
    rank has read. CUDA cannot order a stream that is being captured after one that is not: the caller must order graph
    replays.
    """
    if last is not None and last != stream:
        recorded = [_is_recorded(s) for s in (stream, last)]
        if recorded[0] == recorded[1]:
            stream.wait_stream(last)
    return stream


def _is_recorded(stream: Any) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


class _BufferDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, options: DispatchOptions, here: list[int], indices: list[Tensor], *xs: Tensor
    ) -> tuple:
        programs = []
        for i, x, index in zip(here, xs, indices):
            x = x.contiguous()
            parts = list(quantize_1x128(x, power_of_two=options.power_of_two)) if options.quantize else [x]
            split = ranks.splits[i]
            call = Call("dispatch", x.dtype, options.quantize, options.power_of_two)
            programs.append(_dispatch(ranks.members[i], parts, index, options, split.num_local_experts, call))
        results = ranks.run(here, programs)
        ctx.ranks, ctx.here, ctx.quantize = ranks, here, options.quantize
        ctx.plans = [(route, plan[0]) for _, _, route, plan in results]
        handles = [ExchangeHandle(*plan[:4], None, plan[4], route, bool(ranks.masked)) for _, _, route, plan in results]
        return *[data for data, *_ in results], ([scales for _, scales, *_ in results], handles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple:
        if ctx.quantize:
            raise RuntimeError("ExpertParallel.dispatch: with quantize=True there is no gradient of x; detach x")
        members, phase = ctx.ranks.members, "dispatch backward"
        programs = [
            _returned_sums(members[i], phase, grad.contiguous(), *plan, None, None, None, grad.dtype)
            for i, grad, plan in zip(ctx.here, grads, ctx.plans)
        ]
        d_xs = ctx.ranks.run(ctx.here, programs)
        return None, None, None, None, *d_xs


class _BufferCombine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, handles: list[ExchangeHandle], here: list[int], out_dtype: torch.dtype, *tensors: Any
    ) -> tuple:
        ys, weights, shared, residual = (tensors[i::4] for i in range(4))
        programs = []
        for n, (i, handle) in enumerate(zip(here, handles)):
            terms = (None if t is None else t.contiguous() for t in (weights[n].float(), shared[n], residual[n]))
            plan = handle.route, handle.slot_of
            programs.append(_returned_sums(ranks.members[i], "combine", ys[n].contiguous(), *plan, *terms, out_dtype))
        out = ranks.run(here, programs)
        ctx.ranks, ctx.here = ranks, here
        ctx.routes = [handle.route for handle in handles]
        ctx.plans = [(handle.slot_of, handle.token_of_slot) for handle in handles]
        ctx.dtypes = [[None if t is None else t.dtype for t in (s, r)] for s, r in zip(shared, residual)]
        ctx.save_for_backward(*ys, *weights)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        ranks, here, n = ctx.ranks, ctx.here, len(ctx.here)
        saved = ctx.saved_tensors  # once: a checkpoint unpacks them once
        ys, weights = saved[:n], saved[n:]
        programs = [
            _sent_gradients(ranks.members[i], grad.contiguous(), w.float().contiguous(), route)
            for i, grad, w, route in zip(here, grads, weights, ctx.routes)
        ]
        arrived = ranks.run(here, programs)
        d_ys, programs = [], []
        for i, sent, y, (slot_of, token_of_slot), route in zip(here, arrived, ys, ctx.plans, ctx.routes):
            rows, factors, experts = sent
            # Rows of a rank that did not send are stale: with weights of NaN their gradients become NaN too.
            factors = factors.copy().masked_fill_(experts < 0, math.nan)
            d_y, d_factors = combine_rows_backward(rows, y, slot_of, token_of_slot, factors)
            d_ys.append(d_y)
            places = torch.arange(slot_of.numel(), dtype=torch.int32, device=y.device).view(slot_of.shape)
            places = torch.where(slot_of >= 0, places, -1)
            programs.append(_returned_numbers(ranks.members[i], d_factors.reshape(-1, 1), route, places))
        d_weights = ranks.run(here, programs)
        found: list = [None] * 4
        for m in range(n):
            d_terms = (
                grads[m].to(dtype) if ctx.needs_input_grad[4 + 4 * m + 2 + t] else None
                for t, dtype in enumerate(ctx.dtypes[m])
            )
            found += [d_ys[m], d_weights[m].to(weights[m].dtype), *d_terms]
        return tuple(found)


def _dispatch(
    rank: Rank, parts: list[Tensor], indices: Tensor, options: DispatchOptions, num_experts: int, call: Call
) -> Generator:
    """Returns data, scales, the route, and the plan (slot_of ... overflow)."""
    rank.scatter(parts, indices, call)
    yield
    experts, row_counts = rank.scatter_wait()
    rows, width = parts[0], parts[0].shape[1]
    if options.quantize:  # bytes as 4-byte words; padding of a row's last word is cut off below
        arrived = rank.arrived(0, -(-width // 4), torch.float32, row_counts)
    else:
        arrived = rank.arrived(0, width, rows.dtype, row_counts)
    capacity = options.slots(num_experts, pairs=len(experts) * min(num_experts, experts.shape[1]))
    place = num_experts, options.alignment, capacity
    # While ranks are emulated together, only kernels without a workspace may run: it would have to outlive the call.
    at_once = experts.numel() <= constants.MOE_PLAN_TILE
    if at_once:
        data, *plan = dispatch_rows(arrived, experts, *place)
    yield
    if not at_once:
        data, *plan = dispatch_rows(arrived, experts, *place)
    scales = None
    if options.quantize:
        data = data.view(torch.uint8)[:, :width].contiguous().view(rows.dtype)
        scales = permute_rows(rank.arrived(1, parts[1].shape[1], torch.float32, row_counts), *plan[:2])
        scales = store_scales(scales, options.scale_layout)
    return data, scales, BufferRoute(experts, row_counts, indices), plan


def _returned_sums(
    rank: Rank,
    phase: str,
    rows: Tensor,
    route: BufferRoute,
    slot_of: Tensor,
    weights: Tensor | None,
    shared: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Generator:
    """Returns the rows of all pairs to their tokens, and each token's sum of them."""
    rank.gather(rows, route.experts, slot_of, route.row_counts, Call(phase, rows.dtype))
    yield
    home_slot_of, factors = rank.gather_wait(route.indices, weights)
    returned = rank.returned(rows.shape[1], rows.dtype)
    tokens, top_k = route.indices.shape
    token_of = torch.arange(tokens * top_k, dtype=torch.int32, device=rows.device) // max(top_k, 1)
    out = combine_rows(returned, home_slot_of, token_of, factors, shared, residual, out_dtype)
    yield
    return out


def _sent_gradients(rank: Rank, rows: Tensor, weights: Tensor, route: BufferRoute) -> Generator:
    """Sends gradients of tokens, and their weights, to the ranks of their experts."""
    rank.scatter([rows, weights], route.indices, Call("combine backward", rows.dtype))
    yield
    experts, _ = rank.scatter_wait()  # as in dispatch, or -1 in all rows of a rank that did not send
    yield
    arrived = rank.arrived(0, rows.shape[1], rows.dtype, route.row_counts)
    return arrived, rank.arrived(1, weights.shape[1], torch.float32), experts


def _returned_numbers(rank: Rank, numbers: Tensor, route: BufferRoute, places: Tensor) -> Generator:
    """Returns one number of each pair to its token, [T, K]; zeros where there is none."""
    call = Call("combine backward, gradient of the weights", numbers.dtype)
    rank.gather(numbers, route.experts, places, route.row_counts, call)
    yield
    slot_of, poison = rank.gather_wait(route.indices, None)
    yield
    returned = rank.returned(1, numbers.dtype).copy()[:, 0]
    if len(returned) == 0:
        return poison
    return torch.where(slot_of >= 0, returned[slot_of.clamp(min=0)] * poison, 0)


def _end(program: Generator) -> Any:
    try:
        next(program)
    except StopIteration as end:
        return end.value
    raise AssertionError("a program yields twice")


def layout_of(world: int, sizes: Sizes) -> Layout:
    """The layout of buffers for rows of `sizes.row_dtype`, with scales or weights beside them."""
    num_experts, hidden, top_k, max_tokens, row_dtype = sizes
    extra = 4 * max(top_k, -(-hidden // 128))
    row_bytes = to_16(hidden * row_dtype.itemsize)
    return Layout(world, num_experts, top_k, max_tokens, row_bytes, extra, constants.EXCHANGE_FLAG_BYTES)
