"""Dispatch and combine over ranks that write into one another's buffers: all of a process, or of an NVLink domain.

What `exchange` describes holds here too; the steps are those of `k2kernels.ops._exchange`. Shapes depend on shapes
alone: as many rows arrive as ranks could send, W * max_tokens, those that did not come without experts. How many did
come, and in which half of the buffers they lie, the device knows and kernels read there: nothing waits for it, and a
recorded graph may be replayed any number of times, whatever it holds.

A program is what one rank does in an exchange, written as a generator with two stops: after it has sent, and after it
has started everything that others may run beside. One process may hold several ranks; their programs go from stop to
stop together.
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
from k2kernels._backend import PeerTimeout, UnsupportedError
from k2kernels.ops import _launch, moe
from k2kernels.ops._check import FLOATS, Arguments
from k2kernels.ops._constants import constants
from k2kernels.ops._exchange import Call, Halves, Layout, Rank, to_16
from k2kernels.ops.quant import QUANTIZABLE, quantize_1x128
from k2kernels.parallel.exchange import Handle, Options
from k2kernels.parallel.split import Split
from k2kernels.reference.quant import store_scales

EMULATED_TIMEOUT = 10**8  # of the emulator's clock, which runs on when nobody else does
BLOCKS = 48  # of a kernel that sends: they find room on 48 SMs of an H100's 132, or beside one another on 16


class Route(NamedTuple):
    """What combine needs of a dispatch."""

    experts: Tensor  # int32 [W * max_tokens, K]: the local expert of each pair that arrived, or -1
    told: Tensor  # int32 [W]: how many rows of each rank arrived
    indices: Tensor  # [T, K], of this rank's tokens


class Ranks:
    """The ranks of this process, and what they do together. Lists have an entry for each of them; None where masked.

    Args:
        layout: of every rank's buffer.
        members: those of this process.
        hidden: H.
        row_dtype: the widest rows that travel.
    """

    def __init__(self, layout: Layout, members: list[Rank], hidden: int, row_dtype: torch.dtype):
        self.layout, self.members = layout, members
        self.hidden, self.row_dtype = hidden, row_dtype
        self.splits = [Split(layout.experts, layout.world, member.rank) for member in members]
        self.masked: frozenset[int] = frozenset()
        self.withheld: frozenset[int] = frozenset()  # of these ranks nothing is run, as if they had died
        self.timeout = 10**10  # nanoseconds that a kernel waits
        self.keep: Any = None  # what keeps the buffers open
        self._stream: Any = None  # of the last exchange

    # ---- what callers call

    def dispatch(self, xs: list, indices: list, weights: list, options: Options) -> list:
        here = [i for i, member in enumerate(self.members) if member.rank not in self.masked]
        sent = _Dispatch.apply(self, options, here, [indices[i].contiguous() for i in here], *[xs[i] for i in here])
        data, (scales, handles) = sent[:-1], sent[-1]
        results = [None] * len(self.members)
        for n, i in enumerate(here):
            handle = handles[n]._replace(weights=weights[i])
            results[i] = moe.Dispatched(data[n], scales[n], handle.offsets, handle.counts, handle)
        return results

    def combine(self, ys: list, handles: list, shared: list, residual: list, out_dtype: torch.dtype) -> list:
        here = [i for i, member in enumerate(self.members) if member.rank not in self.masked]
        tensors = [t for i in here for t in (ys[i], handles[i].weights, shared[i], residual[i])]
        out = _Combine.apply(self, [handles[i] for i in here], here, out_dtype, *tensors)
        results = [None] * len(self.members)
        for n, i in enumerate(here):
            results[i] = out[n]
        return results

    def mask(self, rank: int) -> None:
        """All members go on without `rank`; the other processes must do the same, and nothing may be on its way."""
        self.masked |= {rank}
        self.withheld -= {rank}
        for member in self.members:
            member.reset(member.live & ~(1 << rank))

    def check(self) -> None:
        """Raises what a kernel has reported: PeerTimeout, or ValueError for an index that names no expert."""
        faults = {m.rank: fault for m in self.members if m.rank not in self.withheld and (fault := m.fault())}
        for rank, fault in faults.items():
            if fault.fault == constants.EXCHANGE_BAD_INDEX:
                raise ValueError(
                    f"ExpertParallel.dispatch: indices must be from -1 (none) to E-1, got {fault.number} for token "
                    f"{fault.who} of rank {rank}; it was taken for -1"
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

    # ---- programs

    def run(self, here: list[int], programs: list[Generator]) -> list:
        """What the programs of members `here` return."""
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
    """Returns `stream`, having made it wait for what was launched on `last`, the stream of the exchange before.

    Epochs are counted on the device, and a send releases what this rank has read: exchanges of a rank must follow one
    another. Between a stream that is recorded and one that is not, CUDA allows no such order: the caller must order
    graph replays.
    """
    if last is not None and last != stream:
        recorded = [_is_recorded(s) for s in (stream, last)]
        if recorded[0] == recorded[1]:
            stream.wait_stream(last)
    return stream


def _is_recorded(stream: Any) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, options: Options, here: list[int], indices: list[Tensor], *xs: Tensor) -> tuple:
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
        handles = [Handle(*plan[:4], None, plan[4], route, bool(ranks.masked)) for _, _, route, plan in results]
        return *[data for data, *_ in results], ([scales for _, scales, *_ in results], handles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple:
        if ctx.quantize:
            raise RuntimeError("ExpertParallel.dispatch: with quantize=True there is no gradient of x; detach x")
        programs = [
            _returned_sums(
                ctx.ranks.members[i], "dispatch backward", grad.contiguous(), route, slot_of, None, None, None,
                grad.dtype,
            )
            for i, grad, (route, slot_of) in zip(ctx.here, grads, ctx.plans)
        ]  # fmt: skip
        d_xs = ctx.ranks.run(ctx.here, programs)
        return None, None, None, None, *d_xs


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, handles: list[Handle], here: list[int], out_dtype: torch.dtype, *tensors: Any
    ) -> tuple:
        ys, weights, shared, residual = (tensors[i::4] for i in range(4))
        programs = [
            _returned_sums(
                ranks.members[i], "combine", ys[n].contiguous(), handle.route, handle.slot_of,
                weights[n].float().contiguous(),
                *[None if t is None else t.contiguous() for t in (shared[n], residual[n])], out_dtype,
            )
            for n, (i, handle) in enumerate(zip(here, handles))
        ]  # fmt: skip
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
        arrived = ranks.run(
            here,
            [
                _rows_and_weights(ranks.members[i], grad.contiguous(), w.float().contiguous(), route.indices)
                for i, grad, w, route in zip(here, grads, weights, ctx.routes)
            ],
        )
        d_ys, programs = [], []
        for i, (rows, factors, experts), y, (slot_of, token_of_slot), route in zip(
            here, arrived, ys, ctx.plans, ctx.routes
        ):
            # Rows of a rank that did not send are old ones: with weights of NaN their gradients are NaN, too.
            factors = factors.copy().masked_fill_(experts < 0, math.nan)
            d_y, d_factors = _gradients(ranks.members[i], rows, y, slot_of, token_of_slot, factors, told=route.told)
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
    rank: Rank, parts: list[Tensor], indices: Tensor, options: Options, num_experts: int, call: Call
) -> Generator:
    """Data, scales, the route, and the plan: slot_of ... overflow."""
    rank.scatter(parts, indices, call)
    yield
    experts, told = rank.scatter_wait()
    rows, width = parts[0], parts[0].shape[1]
    if options.quantize:  # bytes, as words of four: what follows in a row's last word is dropped again
        arrived = rank.arrived(0, -(-width // 4), torch.float32)
    else:
        arrived = rank.arrived(0, width, rows.dtype)
    capacity = options.capacity
    if capacity is None:
        pairs = len(experts) * min(num_experts, experts.shape[1])
        capacity = pairs + min(num_experts, pairs) * (options.alignment - 1)
        capacity = -(-capacity // options.alignment) * options.alignment
    place = num_experts, options.alignment, capacity
    # While ranks are emulated together, only what needs no workspace, which would have to live on.
    at_once = experts.numel() <= constants.MOE_PLAN_TILE
    if at_once:
        data, *plan = _to_slots(rank, arrived, experts, *place, told=told)
    yield
    if not at_once:
        data, *plan = _to_slots(rank, arrived, experts, *place, told=told)
    scales = None
    if options.quantize:
        data = data.view(torch.uint8)[:, :width].contiguous().view(rows.dtype)
        scales = _permute(rank, rank.arrived(1, parts[1].shape[1], torch.float32), *plan[:2], told=told)
        scales = store_scales(scales, options.scale_layout)
    return data, scales, Route(experts, told, indices), plan


def _returned_sums(
    rank: Rank,
    phase: str,
    rows: Tensor,
    route: Route,
    slot_of: Tensor,
    weights: Tensor | None,
    shared: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Generator:
    """Each token's sum of its rows, which come back."""
    rank.gather(rows, route.experts, slot_of, route.told, Call(phase, rows.dtype))
    yield
    home_slot_of, factors = rank.gather_wait(route.indices, weights)
    returned = rank.returned(rows.shape[1], rows.dtype)
    tokens, top_k = route.indices.shape
    token_of = torch.arange(tokens * top_k, dtype=torch.int32, device=rows.device) // max(top_k, 1)
    out = _sums(rank, returned, home_slot_of, token_of, factors, shared, residual, out_dtype)
    yield
    return out


def _rows_and_weights(rank: Rank, rows: Tensor, weights: Tensor, indices: Tensor) -> Generator:
    """Gradients of tokens, and their weights, where their experts are."""
    rank.scatter([rows, weights], indices, Call("combine backward", rows.dtype))
    yield
    experts, _ = rank.scatter_wait()  # the experts as in dispatch, or -1 in all rows of a rank that did not send
    yield
    return rank.arrived(0, rows.shape[1], rows.dtype), rank.arrived(1, weights.shape[1], torch.float32), experts


def _returned_numbers(rank: Rank, numbers: Tensor, route: Route, places: Tensor) -> Generator:
    """One number for each pair, [T, K]; zeros where there is none."""
    call = Call("combine backward, gradient of the weights", numbers.dtype)
    rank.gather(numbers, route.experts, places, route.told, call)
    yield
    slot_of, poison = rank.gather_wait(route.indices, None)
    yield
    returned = rank.returned(1, numbers.dtype).copy()[:, 0]
    if len(returned) == 0:
        return poison
    return torch.where(slot_of >= 0, returned[slot_of.clamp(min=0)] * poison, 0)


def _where_it_is(op: Any, kernel: Any, unserved: Any) -> Any:
    """A function of a rank and an op's arguments, of which the first is `Halves`. The kernel, if one serves, reads
    these rows where they are; it is called past the op, which might look at what is not there yet. Else the op gets a
    copy of them."""

    def call(rank: Rank, halves: Halves, *args: Any, told: Tensor | None = None) -> Any:
        if rank.by_kernels() and unserved(halves.rows[0], *args) is None:
            return kernel(halves.rows[0], *args, moe.Arrival(halves.half, halves.rows.stride(0), told))
        return op(halves.copy(), *args)

    return call


_to_slots = _where_it_is(moe._moe_dispatch, moe._dispatch_kernel, moe._dispatch_unserved)
_permute = _where_it_is(moe._moe_permute, moe._permute_kernel, moe._permute_unserved)
_sums = _where_it_is(moe._moe_combine, moe._combine_kernel, moe._combine_unserved)
_gradients = _where_it_is(moe._moe_combine_backward, moe._combine_backward_kernel, moe._combine_backward_unserved)


def _end(program: Generator) -> Any:
    try:
        next(program)
    except StopIteration as end:
        return end.value
    raise AssertionError("a program has two stops")


def layout_of(world: int, num_experts: int, hidden: int, top_k: int, max_tokens: int, row_dtype: torch.dtype) -> Layout:
    """Of buffers for rows of `row_dtype`, with scales or weights beside them."""
    extra = 4 * max(top_k, -(-hidden // 128))
    return Layout(world, num_experts, top_k, max_tokens, to_16(hidden * row_dtype.itemsize), extra)


class VirtualRanks:
    """W ranks in one process, for tests: what `ExpertParallel` is, for all ranks at once.

    Their buffers lie on one device, and the kernels are those that serve ranks of an NVLink domain. In
    `k2kernels.emulated()` all ranks' kernels run at once, in the adversarial order of its seed; on a GPU all ranks
    send, then all wait; on CPU tensors otherwise plain PyTorch does the same.

    Args:
        world_size: W.
        num_experts, hidden, top_k, max_tokens: as in `ExpertParallel`.
        row_dtype: the widest rows that travel.
        device: of the buffers.
        step_timeout: seconds; in the emulator, a tenth of a second of its own clock.

    Attributes: splits[r]: first_expert and num_local_experts of rank r; degraded.
    """

    def __init__(
        self,
        world_size: int,
        *,
        num_experts: int,
        hidden: int,
        top_k: int,
        max_tokens: int,
        row_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        step_timeout: float = 10.0,
        blocks: int = BLOCKS,
    ):
        args = Arguments("VirtualRanks")
        args.integer("world_size", world_size, 1, constants.EXCHANGE_MOST_RANKS)
        check_sizes(args, num_experts, hidden, top_k, max_tokens, row_dtype)
        args.integer("max_tokens", max_tokens, 0, constants.EXCHANGE_MOST_TOKENS)
        args.integer("blocks", blocks, 1)
        args.require(num_experts >= world_size, "num_experts", f"at least the {world_size} ranks", num_experts)
        self.world_size, self.top_k, self.max_tokens, self.hidden = world_size, top_k, max_tokens, hidden
        layout = layout_of(world_size, num_experts, hidden, top_k, max_tokens, row_dtype)
        buffers = [self._allocate(layout.bytes, device) for _ in range(world_size)]
        peers = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.int64, device=device)
        members = [Rank(layout, rank, buffers[rank], peers, buffers, blocks) for rank in range(world_size)]
        self.group = Ranks(layout, members, hidden, row_dtype)
        self.group.timeout = int(step_timeout * 1e9)
        self.splits = self.group.splits

    def _allocate(self, size: int, device: str | torch.device) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=device)

    @property
    def degraded(self) -> bool:
        """Whether a rank is masked."""
        return bool(self.group.masked)

    def dispatch(
        self,
        x: list[Tensor],
        indices: list[Tensor],
        weights: list[Tensor],
        *,
        alignment: int = 1,
        quantize: bool = False,
        power_of_two: bool = False,
        scale_layout: str = "row",
        capacity: int | None = None,
    ) -> list[moe.Dispatched]:
        """Each rank's `ExpertParallel.dispatch`; lists have an entry for each rank."""
        options = Options(0, alignment, quantize, power_of_two, scale_layout, capacity)
        check_dispatch(self.group, x, indices, weights, self.max_tokens, options)
        return self.group.dispatch(x, indices, weights, options)

    def combine(
        self,
        y: list[Tensor],
        handles: list[Handle],
        *,
        shared: list[Tensor] | None = None,
        residual: list[Tensor] | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Each rank's `ExpertParallel.combine`."""
        shared, residual = ([None] * self.world_size if terms is None else terms for terms in (shared, residual))
        check_combine(self.group, y, handles, shared, residual, out_dtype)
        out_dtype = next(t for t in y if t is not None).dtype if out_dtype is None else out_dtype
        return self.group.combine(y, handles, shared, residual, out_dtype)

    def withhold(self, rank: int) -> None:
        """Nothing of this rank is run any more, as if it had died."""
        self.group.withheld |= {rank}

    def mask(self, rank: int) -> None:
        """The others go on without it."""
        self.group.mask(rank)


def check_sizes(
    args: Arguments, num_experts: int, hidden: int, top_k: int, max_tokens: int, row_dtype: torch.dtype
) -> None:
    """Raises for what neither `ExpertParallel` nor `VirtualRanks` takes."""
    args.integer("num_experts", num_experts, 1)
    args.integer("hidden", hidden, 1)
    args.integer("top_k", top_k, 1)
    args.require(top_k <= num_experts, "top_k", f"at most num_experts={num_experts}", top_k)
    args.integer("max_tokens", max_tokens, 0)
    args.choice("row_dtype", row_dtype, FLOATS)


def check_dispatch(ranks: Ranks, x: list, indices: list, weights: list, max_tokens: int, options: Options) -> None:
    """Raises TypeError, ValueError or UnsupportedError for what `dispatch` does not take, before a rank has begun."""
    check_options(options)
    check_lists(ranks, "dispatch", x=x, indices=indices, weights=weights)
    for one_x, one_indices, one_weights in zip(x, indices, weights):
        if one_x is None:
            continue
        args = Arguments("ExpertParallel.dispatch")
        args.tensor("x", one_x, ("T", ranks.hidden), QUANTIZABLE if options.quantize else FLOATS)
        args.tensor("indices", one_indices, ("T", ranks.layout.top_k), moe.INDICES)
        args.tensor("weights", one_weights, ("T", ranks.layout.top_k), FLOATS)
        args.require(len(one_x) <= max_tokens, "x", lambda: f"at most max_tokens={max_tokens} rows", len(one_x))
        if not options.quantize:
            check_rows(ranks, "dispatch", "x", [one_x.dtype])


def check_options(options: Options) -> None:
    args = Arguments("ExpertParallel.dispatch")
    args.boolean("quantize", options.quantize)
    args.boolean("power_of_two", options.power_of_two)
    args.integer("alignment", options.alignment, 1)
    args.choice("scale_layout", options.scale_layout, ("row", "column"))
    if (capacity := options.capacity) is not None:
        args.integer("capacity", capacity, 0)
        what = f"a multiple of alignment={options.alignment}"
        args.require(capacity % options.alignment == 0, "capacity", what, capacity)


def check_lists(ranks: Ranks, where: str, **lists: list) -> None:
    """Raises for lists that have not one entry for each rank; a masked rank's may be None."""
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
    """The same for `combine`: of a gradient, rows of out_dtype travel."""
    check_lists(ranks, "combine", y=ys, handles=handles)
    tensors = []
    for y, handle, *added in zip(ys, handles, shared, residual, strict=True):
        if y is None:
            continue
        check_rows_of(y, handle, *added, ranks.hidden, ranks.layout.top_k)
        tensors += [y, handle.weights]
        check_rows(ranks, "combine", "y", [y.dtype])
    if out_dtype is not None:
        Arguments("ExpertParallel.combine").choice("out_dtype", out_dtype, FLOATS)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        check_rows(ranks, "combine", "out_dtype", [tensors[0].dtype if out_dtype is None else out_dtype])


def check_rows_of(
    y: Tensor, handle: Handle, shared: Tensor | None, residual: Tensor | None, hidden: int, top_k: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, shared and residual, if they are those of a handle; raises if not."""
    args = Arguments("ExpertParallel.combine")
    if not isinstance(handle, Handle):
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


def check_rows(ranks: Ranks, where: str, name: str, dtypes: list[torch.dtype]) -> None:
    """Raises UnsupportedError for rows that do not fit into the buffers."""
    for dtype in dtypes:
        if dtype == torch.float64 or dtype.itemsize > ranks.row_dtype.itemsize:
            raise UnsupportedError(
                f"ExpertParallel.{where}: {name} is {dtype}, and the buffers are for rows of {ranks.row_dtype}; "
                "make them with row_dtype="
            )
