"""Rows between ranks through buffers that every rank can write: four steps, each as a kernel and in plain PyTorch.

csrc/exchange/kernel.cuh describes the protocol. A `Rank` is one of the W ranks as its own process sees it: its
buffer, the others', and the state of its exchanges.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from k2kernels import _backend
from k2kernels.ops import _launch
from k2kernels.ops._check import FLOATS
from k2kernels.ops._constants import constants

KINDS = ("scatter", "gather")
PHASES = (
    "dispatch",
    "combine",
    "dispatch backward",
    "combine backward",
    "combine backward, gradient of the weights",
    "probe",
)


class Call(NamedTuple):
    """What the ranks must agree on in an exchange; every flag carries it, so that a mismatch is detected."""

    phase: str
    dtype: torch.dtype
    quantize: bool = False
    power_of_two: bool = False

    def code(self) -> int:
        """In 7 bits."""
        code = PHASES.index(self.phase) << 2 | FLOATS.index(self.dtype)
        return code << 2 | self.quantize << 1 | self.power_of_two

    @staticmethod
    def phase_of(code: int) -> str:
        return PHASES[code >> 4]


class Layout:
    """Where things lie in every rank's buffer.

    Args:
        world, experts, top_k, most_tokens: W, E, K, and the most tokens of a rank.
        row_bytes: the longest row that travels.
        extra_bytes: what may stand beside a row on its way to the experts: scales, or K weights.
    """

    def __init__(self, world: int, experts: int, top_k: int, most_tokens: int, row_bytes: int, extra_bytes: int):
        self.world, self.experts, self.top_k, self.most_tokens = world, experts, top_k, most_tokens
        row_bytes, extra_bytes = to_16(row_bytes), to_16(extra_bytes)
        self.row_bytes, self.extra_bytes = row_bytes, extra_bytes
        line, pairs = constants.EXCHANGE_FLAG_BYTES, most_tokens * top_k
        sizes = dict(  # of one half
            scatter=(world * line, to_16(4 * world * pairs), world * most_tokens * (row_bytes + extra_bytes)),
            gather=(world * line, to_16(4 * pairs), pairs * row_bytes),
        )
        self.bytes = line  # the abort word
        self._places: dict[str, tuple[int, ...]] = {}
        for kind, parts in sizes.items():
            half = -(-sum(parts) // line) * line
            self._places[kind] = 0, *(self.bytes + sum(parts[:i]) for i in range(3)), half
            self.bytes += 2 * half

    def place(self, kind: str, pitch: int) -> tuple[int, int, int, int, int, int]:
        """abort, flags, numbers, rows, half, pitch: k2k::ExchangePlace."""
        return *self._places[kind], pitch

    def cleared(self, buffer: Tensor) -> list[Tensor]:
        """What must be zeros before the first exchange: the abort word and the flags."""
        line = constants.EXCHANGE_FLAG_BYTES
        parts = [buffer[:line]]
        for kind in KINDS:
            _, flags, _, _, half, _ = self.place(kind, 0)
            parts += [buffer[start : start + self.world * line] for start in (flags, flags + half)]
        return parts


class Halves(NamedTuple):
    """Rows that lie in one of the two halves of a buffer. Which one is kept in device memory: a recorded graph that is
    replayed finds them now in one half, now in the other."""

    rows: Tensor  # [2, R, columns]
    half: Tensor  # int32 [1]

    def copy(self) -> Tensor:
        """[R, columns]."""
        return self.rows.index_select(0, self.half)[0]


class Fault(NamedTuple):
    """k2k::ExchangeError, read."""

    fault: int
    phase: str
    who: int
    number: int


class Rank:
    """One rank. Every method is a step of an exchange; a wait follows each send, in the order of a stream.

    Args:
        buffer: uint8 [layout.bytes], this rank's own, zeros at first.
        peers: int64 [W], on the device: the addresses of all ranks' buffers as seen from here.
        buffers: the buffers themselves, where they are of this process: for the bodies in plain PyTorch.
        blocks: of a kernel that sends, at most.
    """

    def __init__(
        self, layout: Layout, rank: int, buffer: Tensor, peers: Tensor, buffers: list[Tensor] | None, blocks: int
    ):
        self.layout, self.rank, self.blocks = layout, rank, blocks
        self.buffer, self.peers, self.buffers = buffer, peers, buffers
        self.state = torch.zeros(constants.EXCHANGE_STATE_WORDS, dtype=torch.int32, device=buffer.device)
        # Of the host, which reads it without waiting for the device.
        self.error = torch.zeros(constants.EXCHANGE_ERROR_WORDS, dtype=torch.int32)
        if buffer.is_cuda:
            self.error = self.error.pin_memory()
        self.live = (1 << layout.world) - 1
        self.plain_epochs, self.plain_failed = dict.fromkeys(KINDS, 0), False  # of the bodies in plain PyTorch
        self.timeout = 10**10  # nanoseconds

    def reset(self, live: int) -> None:
        """As new, with these ranks; no kernel of any rank may be on its way."""
        for tensor in (*self.layout.cleared(self.buffer), self.state, self.error):
            tensor.zero_()
        self.live = live
        self.plain_epochs, self.plain_failed = dict.fromkeys(KINDS, 0), False

    def fault(self) -> Fault | None:
        """What went wrong first, if anything has."""
        fault = int(self.error[constants.EXCHANGE_ERROR_FAULT])
        if not fault:
            return None
        record = self.error.tolist()  # only now: the device writes the fault last
        call, who, number = (
            record[place]
            for place in (constants.EXCHANGE_ERROR_CALL, constants.EXCHANGE_ERROR_WHO, constants.EXCHANGE_ERROR_NUMBER)
        )
        if fault != constants.EXCHANGE_BAD_INDEX:
            number %= 2**32  # an epoch
        return Fault(fault, Call.phase_of(call), who, number)

    # ---- the steps

    def scatter(self, parts: list[Tensor], indices: Tensor, call: Call) -> None:
        """Sends each token's row of the one or two matrices `parts` [T, ...] to the ranks of its experts."""
        place, self.widths = self._begin("scatter", parts, call)
        if self.by_kernels():
            rows = [_rows(part) for part in parts]
            self._keep = [parts, indices]
            second = rows[1] if len(rows) > 1 else (0, 0, 0)
            at = to_16(rows[0][2])
            self._launch("moe_scatter", place, rows[0], second, at, _indices(indices), self.blocks)
        else:
            _scatter(self, place, parts, indices)

    def scatter_wait(self) -> tuple[Tensor, Tensor]:
        """int32 [W * most_tokens, K], the local expert of each pair of the rows that came, or -1; and int32 [W], how
        many rows of each source there are."""
        layout, device = self.layout, self.buffer.device
        experts = torch.empty((layout.world * layout.most_tokens, layout.top_k), dtype=torch.int32, device=device)
        told = torch.empty(layout.world + 1, dtype=torch.int32, device=device)
        place = layout.place("scatter", 0)
        if self.by_kernels():
            self._launch("moe_scatter_wait", place, experts.data_ptr(), told.data_ptr())
        else:
            _scatter_wait(self, place, experts, told)
        self._scattered = told[-1:]
        return experts, told[:-1]

    def arrived(self, part: int, columns: int, dtype: torch.dtype) -> Halves:
        """[W * most_tokens, columns]: the rows that came. They last until the scatter after the next."""
        first = to_16(self.widths[0]) if part else 0
        rows = self._halves("scatter", self.layout.world * self.layout.most_tokens, sum(map(to_16, self.widths)))
        return Halves(rows[..., first : first + columns * dtype.itemsize].view(dtype), self._scattered)

    def gather(self, rows: Tensor, experts: Tensor, slot_of: Tensor, told: Tensor, call: Call) -> None:
        """Sends the row of each pair's slot back to its token."""
        place, (self.returned_width,) = self._begin("gather", [rows], call)
        if self.by_kernels():
            self._keep = [rows, experts, slot_of, told]
            where = experts.data_ptr(), slot_of.data_ptr(), told.data_ptr()
            self._launch("moe_gather", place, _rows(rows), *where, self.blocks)
        else:
            _gather(self, place, rows, experts, slot_of)

    def gather_wait(self, indices: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """int32 [T, K], which of the returned rows is each pair's, or -1; and the weights (ones), float32 [T, K].

        The weights of pairs whose rank did not answer are NaN.
        """
        slot_of = torch.empty(indices.shape, dtype=torch.int32, device=indices.device)
        poisoned = torch.empty(indices.shape, dtype=torch.float32, device=indices.device)
        self._gathered = torch.empty(1, dtype=torch.int32, device=indices.device)
        place = self.layout.place("gather", 0)
        if self.by_kernels():
            self._kept = [indices, weights]
            out = slot_of.data_ptr(), poisoned.data_ptr(), self._gathered.data_ptr()
            self._launch("moe_gather_wait", place, _indices(indices), _launch.address(weights), *out)
        else:
            _gather_wait(self, place, indices, weights, slot_of, poisoned)
        return slot_of, poisoned

    def returned(self, columns: int, dtype: torch.dtype) -> Halves:
        """[most_tokens * K, columns]: the rows that returned. They last until the gather after the next."""
        pairs = self.layout.most_tokens * self.layout.top_k
        rows = self._halves("gather", pairs, to_16(self.returned_width))
        return Halves(rows[..., : columns * dtype.itemsize].view(dtype), self._gathered)

    # ---- how

    def _halves(self, kind: str, rows: int, pitch: int) -> Tensor:
        _, _, _, start, half, _ = self.layout.place(kind, pitch)
        start += self.buffer.storage_offset()  # the buffer may be part of a larger allocation
        return self.buffer.as_strided((2, rows, pitch), (half, pitch, 1), start)

    def _begin(self, kind: str, parts: list[Tensor], call: Call) -> tuple[tuple[int, ...], list[int]]:
        self.call = call.code()
        self.plain_epochs[kind] = (self.plain_epochs[kind] + 1) % 2**32
        widths = [part.shape[1] * part.itemsize for part in parts]
        return self.layout.place(kind, sum(map(to_16, widths))), widths

    def by_kernels(self) -> bool:
        """Whether kernels serve the steps; else plain PyTorch does."""
        device = self.buffer.device.type
        chosen = _backend.choose("moe_exchange", device, self._why_not)
        if chosen == "reference" and self.buffers is None:
            raise _backend.UnsupportedError("moe_exchange: no plain PyTorch reaches another process; needs kernels")
        return chosen != "reference"

    def _why_not(self) -> str | None:
        device = self.buffer.device
        return _launch.why_not_emulated() if device.type == "cpu" else _launch.why_not_cuda(device.index)

    def _launch(self, function: str, place: tuple[int, ...], *args: object) -> None:
        layout = self.layout
        peers = self.peers.data_ptr(), self.state.data_ptr(), self.error.data_ptr()
        ranks = (
            layout.world,
            self.rank,
            self.live,
            self.call,
            layout.experts,
            layout.top_k,
            layout.most_tokens,
            self.timeout,
        )
        _launch.launch_numbers("moe_exchange", function, self.buffer.device, peers, place, ranks, *args)


def to_16(size: int) -> int:
    return -(-size // 16) * 16


def _rows(x: Tensor) -> tuple[int, int, int]:
    if x.numel() and x.stride(-1) != 1 and x.shape[1] > 1:  # of no rows any strides will do: expand() leaves 0
        raise ValueError("moe_exchange: rows must have their columns side by side")
    return x.data_ptr(), x.stride(0) * x.itemsize, x.shape[1] * x.itemsize


def _indices(indices: Tensor) -> tuple[int, bool, int]:
    return indices.data_ptr(), indices.dtype == torch.int64, indices.shape[0]


# ---- the same in plain PyTorch, for ranks of one process


def _view(rank: Rank, there: int, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return rank.buffers[there][start : start + size].view(dtype).view(shape)


def _bytes(x: Tensor) -> Tensor:
    """The rows of a matrix as bytes. Of no rows, `contiguous` keeps any strides, which `view` may not take."""
    if x.numel() == 0:
        return x.new_empty((x.shape[0], x.shape[1] * x.itemsize), dtype=torch.uint8)
    return x.contiguous().view(torch.uint8)


def _half(rank: Rank, kind: str) -> int:
    return rank.plain_epochs[kind] % 2


def _in_half(rank: Rank, kind: str, place: tuple[int, ...]) -> tuple[int, int, int]:
    """flags, numbers, rows."""
    _, flags, numbers, rows, half, _ = place
    half *= _half(rank, kind)
    return flags + half, numbers + half, rows + half


def _lives(rank: Rank) -> list[int]:
    return [r for r in range(rank.layout.world) if rank.live >> r & 1]


def _places(rank: Rank, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rank and number there of each pair's expert, -1 for none."""
    layout = rank.layout
    each, more = divmod(layout.experts, layout.world)
    indices = indices.long()
    larger = indices < more * (each + 1)
    rest = indices - more * (each + 1)
    owner = torch.where(larger, indices // (each + 1), more + rest // each)
    number = torch.where(larger, indices % (each + 1), rest % each)
    live = torch.tensor([bool(rank.live >> r & 1) for r in range(layout.world)], device=indices.device)
    none = (indices < 0) | (indices >= layout.experts)
    none |= ~live[owner.clamp(0, layout.world - 1)]
    return owner.masked_fill(none, -1), number.masked_fill(none, -1)


def _record(rank: Rank, fault: int, who: int, number: int) -> None:
    if not rank.error[constants.EXCHANGE_ERROR_FAULT]:
        rank.error[constants.EXCHANGE_ERROR_CALL] = rank.call
        rank.error[constants.EXCHANGE_ERROR_WHO] = who
        rank.error[constants.EXCHANGE_ERROR_NUMBER] = torch.tensor(number).int()  # its last 32 bits
        rank.error[constants.EXCHANGE_ERROR_FAULT] = fault


def _set_flags(rank: Rank, flags: int, kind: str, rows: int) -> None:
    if rank.plain_failed:
        return
    word = rank.call << constants.EXCHANGE_FLAG_ROWS_BITS | rows
    for there in _lives(rank):
        flag = _view(rank, there, flags + rank.rank * constants.EXCHANGE_FLAG_BYTES, (2,), torch.int32)
        flag.copy_(torch.tensor([word, rank.plain_epochs[kind]]).int())


def _flag(rank: Rank, flags: int, kind: str, source: int) -> int:
    """The rows that `source` announces; -1 if it has not."""
    flag = _view(rank, rank.rank, flags + source * constants.EXCHANGE_FLAG_BYTES, (2,), torch.int32)
    abort = _view(rank, rank.rank, 0, (2,), torch.int32)
    word, epoch = (number % 2**32 for number in flag.tolist())
    if epoch == (now := rank.plain_epochs[kind]):
        call, rows = divmod(word, 1 << constants.EXCHANGE_FLAG_ROWS_BITS)
        if call == rank.call:
            return rows
        found = constants.EXCHANGE_OTHER_CALL, source
    elif aborted := int(abort[0]):
        why, who = divmod(aborted, 1 << 16)
        other = constants.EXCHANGE_OTHER_CALL
        _record(rank, other if why == other else constants.EXCHANGE_PEER_ABORTED, who - 1, now)
        found = None
    else:
        found = constants.EXCHANGE_PEER_SILENT, source
    if found:
        fault, who = found
        _record(rank, fault, who, now)
        for there in _lives(rank):
            _view(rank, there, 0, (2,), torch.int32).copy_(torch.tensor([fault << 16 | who + 1, now]))
    rank.plain_failed = True
    return -1


def _scatter(rank: Rank, place: tuple[int, ...], parts: list[Tensor], indices: Tensor) -> None:
    layout, tokens, pitch = rank.layout, indices.shape[0], place[-1]
    flags, numbers_at, rows_at = _in_half(rank, "scatter", place)
    owner, number = _places(rank, indices)
    bad = (indices < -1) | (indices >= layout.experts)
    if bad.any():
        token, k = bad.nonzero()[0].tolist()
        _record(rank, constants.EXCHANGE_BAD_INDEX, token, int(indices[token, k]))
    for there in [] if rank.plain_failed else _lives(rank):
        mine = (layout.world, layout.most_tokens)
        numbers = _view(rank, there, numbers_at, (*mine, layout.top_k), torch.int32)
        numbers[rank.rank, :tokens] = torch.where(owner == there, number, -1).int()
        rows = _view(rank, there, rows_at, (*mine, pitch), torch.uint8)[rank.rank, :tokens]
        wanted, start = (owner == there).any(1), 0
        for part in parts:
            width = part.shape[1] * part.itemsize
            rows[:, start : start + width][wanted] = _bytes(part)[wanted]
            start += to_16(width)
    _set_flags(rank, flags, "scatter", tokens)


def _scatter_wait(rank: Rank, place: tuple[int, ...], experts: Tensor, told: Tensor) -> None:
    layout = rank.layout
    shape = layout.world, layout.most_tokens, layout.top_k
    flags, numbers_at, _ = _in_half(rank, "scatter", place)
    numbers = _view(rank, rank.rank, numbers_at, shape, torch.int32)
    experts.fill_(-1)
    told.zero_()
    told[-1] = _half(rank, "scatter")
    for source in _lives(rank):
        if (rows := _flag(rank, flags, "scatter", source)) > 0:
            experts.view(shape)[source, :rows] = numbers[source, :rows]
            told[source] = rows


def _gather(rank: Rank, place: tuple[int, ...], rows: Tensor, experts: Tensor, slot_of: Tensor) -> None:
    layout, pitch = rank.layout, place[-1]
    flags, numbers_at, rows_at = _in_half(rank, "gather", place)
    shape = layout.world, layout.most_tokens * layout.top_k
    here, slots = experts.view(shape) >= 0, slot_of.view(shape)
    values, width = _bytes(rows), rows.shape[1] * rows.itemsize
    for home in [] if rank.plain_failed else _lives(rank):
        pairs = here[home].nonzero()[:, 0]
        kept = slots[home][pairs] >= 0
        numbers = _view(rank, home, numbers_at, shape[1:], torch.int32)
        numbers[pairs] = torch.where(kept, pairs, -1).int()
        back = _view(rank, home, rows_at, (shape[1], pitch), torch.uint8)
        back[pairs[kept], :width] = values[slots[home][pairs[kept]].long()]
    _set_flags(rank, flags, "gather", 0)


def _gather_wait(
    rank: Rank, place: tuple[int, ...], indices: Tensor, weights: Tensor | None, slot_of: Tensor, poisoned: Tensor
) -> None:
    flags, numbers_at, _ = _in_half(rank, "gather", place)
    rank._gathered.fill_(_half(rank, "gather"))
    owner, _ = _places(rank, indices)
    numbers = _view(rank, rank.rank, numbers_at, (rank.layout.most_tokens * rank.layout.top_k,), torch.int32)
    numbers = numbers[: indices.numel()].view(indices.shape)
    slot_of.copy_(torch.where(owner >= 0, numbers, -1))
    poisoned.copy_(torch.ones_like(poisoned) if weights is None else weights)
    for source in _lives(rank):
        if _flag(rank, flags, "gather", source) < 0:
            lost = owner == source
            pairs = torch.arange(indices.numel(), dtype=torch.int32, device=indices.device).view(indices.shape)
            slot_of.copy_(torch.where(lost, pairs, slot_of))
            poisoned.masked_fill_(lost, float("nan"))
