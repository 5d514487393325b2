"""Rows between ranks through buffers that every rank can write: four steps, each as a kernel and in plain PyTorch.

csrc/moe/kernel_exchange.cuh describes the protocol. A `Rank` is one of the W ranks as its own process sees it: its
buffer, the others', and how many exchanges it has made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from k2kernels import _backend
from k2kernels.ops import _launch

SCATTER, GATHER = 0, 1
PEER_SILENT, PEER_ABORTED, BAD_INDEX, BAD_HALF = 1, 2, 3, 4
MOST_RANKS = 64
_FLAG = 128  # bytes


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
        pairs = most_tokens * top_k
        sizes = {  # of one half
            SCATTER: (world * _FLAG, to_16(4 * world * pairs), world * most_tokens * (row_bytes + extra_bytes)),
            GATHER: (world * _FLAG, to_16(4 * pairs), pairs * row_bytes),
        }
        self.bytes = _FLAG  # the abort word
        self._starts: dict[tuple[int, int], tuple[int, int, int]] = {}
        for kind, parts in sizes.items():
            for half in (0, 1):
                flags, numbers, _ = starts = [self.bytes + sum(parts[:i]) for i in range(3)]
                self._starts[kind, half] = flags, numbers, starts[2]
                self.bytes += -(-sum(parts) // _FLAG) * _FLAG

    def place(self, kind: int, half: int, pitch: int) -> tuple[int, int, int, int, int]:
        """flags, abort, numbers, rows, pitch: k2k::ExchangePlace."""
        flags, numbers, rows = self._starts[kind, half]
        return flags, 0, numbers, rows, pitch


class Fault(NamedTuple):
    """k2k::ExchangeError, read."""

    fault: int
    kind: int
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
        self.state = torch.zeros(4, dtype=torch.int32, device=buffer.device)
        self.error = torch.zeros(5, dtype=torch.int32)  # of the host, which reads it without waiting for the device
        if buffer.is_cuda:
            self.error = self.error.pin_memory()
        self.live = (1 << layout.world) - 1
        self.epochs = [0, 0]
        self.timeout = 10**10  # nanoseconds

    def reset(self, live: int) -> None:
        """As new, with these ranks; no kernel of any rank may be on its way."""
        for tensor in (self.buffer[: self.layout._starts[SCATTER, 0][0]], self.state, self.error):
            tensor.zero_()
        for kind in (SCATTER, GATHER):
            for half in (0, 1):
                flags = self.layout._starts[kind, half][0]
                self.buffer[flags : flags + self.layout.world * _FLAG].zero_()
        self.live, self.epochs = live, [0, 0]

    def fault(self) -> Fault | None:
        """What went wrong first, if anything has."""
        _, kind, who, number, fault = self.error.tolist()
        return Fault(fault, kind, who, number) if fault else None

    # ---- the steps

    def scatter(self, parts: list[Tensor], indices: Tensor) -> None:
        """Sends each token's row of the one or two matrices `parts` [T, ...] to the ranks of its experts."""
        place, self.widths = self._begin(SCATTER, parts)
        if self._kernels():
            rows = [_rows(part) for part in parts]
            self._keep = [parts, indices]
            second = rows[1] if len(rows) > 1 else (0, 0, 0)
            at = to_16(rows[0][2])
            self._launch("moe_scatter", place, rows[0], second, at, _indices(indices), self.blocks)
        else:
            _scatter(self, place, parts, indices)

    def scatter_wait(self) -> Tensor:
        """int32 [W * most_tokens, K]: the local expert of each pair of the rows that came, or -1."""
        layout = self.layout
        experts = torch.empty(
            (layout.world * layout.most_tokens, layout.top_k), dtype=torch.int32, device=self.buffer.device
        )
        place = layout.place(SCATTER, self.epochs[SCATTER] % 2, 0)
        if self._kernels():
            self._launch("moe_scatter_wait", place, experts.data_ptr())
        else:
            _scatter_wait(self, place, experts)
        return experts

    def arrived(self, part: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[W * most_tokens, columns]: the rows that came. They last until the scatter after the next."""
        layout, half = self.layout, self.epochs[SCATTER] % 2
        pitch = sum(map(to_16, self.widths))
        start = layout.place(SCATTER, half, pitch)[3]
        rows = self.buffer[start : start + layout.world * layout.most_tokens * pitch].view(-1, pitch)
        first = to_16(self.widths[0]) if part else 0
        return rows[:, first : first + columns * dtype.itemsize].view(dtype)

    def gather(self, rows: Tensor, experts: Tensor, slot_of: Tensor) -> None:
        """Sends the row of each pair's slot back to its token."""
        place, self.returned_width = self._begin(GATHER, [rows])
        if self._kernels():
            self._keep = [rows, experts, slot_of]
            self._launch("moe_gather", place, _rows(rows), experts.data_ptr(), slot_of.data_ptr(), self.blocks)
        else:
            _gather(self, place, rows, experts, slot_of)

    def gather_wait(self, indices: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """int32 [T, K], which of the returned rows is each pair's, or -1; and the weights (ones), float32 [T, K].

        The weights of pairs whose rank did not answer are NaN.
        """
        slot_of = torch.empty(indices.shape, dtype=torch.int32, device=indices.device)
        poisoned = torch.empty(indices.shape, dtype=torch.float32, device=indices.device)
        place = self.layout.place(GATHER, self.epochs[GATHER] % 2, 0)
        if self._kernels():
            self._kept = [indices, weights]
            out = _launch.address(weights), slot_of.data_ptr(), poisoned.data_ptr()
            self._launch("moe_gather_wait", place, _indices(indices), *out)
        else:
            _gather_wait(self, place, indices, weights, slot_of, poisoned)
        return slot_of, poisoned

    def returned(self, columns: int, dtype: torch.dtype) -> Tensor:
        """[most_tokens * K, columns]: the rows that returned. They last until the gather after the next."""
        layout, pitch = self.layout, to_16(self.returned_width)
        start = layout.place(GATHER, self.epochs[GATHER] % 2, pitch)[3]
        rows = self.buffer[start : start + layout.most_tokens * layout.top_k * pitch].view(-1, pitch)
        return rows[:, : columns * dtype.itemsize].view(dtype)

    # ---- how

    def _begin(self, kind: int, parts: list[Tensor]) -> tuple[tuple[int, ...], list[int] | int]:
        self.epochs[kind] += 1
        widths = [part.shape[1] * part.itemsize for part in parts]
        place = self.layout.place(kind, self.epochs[kind] % 2, sum(map(to_16, widths)))
        return place, widths if kind == SCATTER else widths[0]

    def _kernels(self) -> bool:
        device = self.buffer.device.type
        chosen = _backend.choose("moe_exchange", device, self._why_not)
        if chosen == "reference" and self.buffers is None:
            raise _backend.UnsupportedError("moe_exchange: no plain PyTorch reaches another process; needs kernels")
        return chosen != "reference"

    def _why_not(self) -> str | None:
        device = self.buffer.device
        return _launch.why_not_emulated() if device.type == "cpu" else _launch.why_not_cuda(device.index)

    def _launch(self, function: str, place: tuple[int, ...], *args: object) -> None:
        layout, kind = self.layout, SCATTER if "scatter" in function else GATHER
        peers = self.peers.data_ptr(), self.state.data_ptr(), self.error.data_ptr()
        ranks = (
            layout.world,
            self.rank,
            self.live,
            self.epochs[kind] % 2,
            layout.experts,
            layout.top_k,
            layout.most_tokens,
            self.timeout,
        )
        _launch.launch("moe_exchange", function, self.buffer.device, peers, place, ranks, *args)


def to_16(size: int) -> int:
    return -(-size // 16) * 16


def _rows(x: Tensor) -> tuple[int, int, int]:
    if x.stride(-1) != 1 and x.shape[1] > 1:
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


def _record(rank: Rank, fault: int, kind: int, who: int, number: int) -> None:
    if not rank.error[0]:
        rank.error.copy_(torch.tensor([1, kind, who, number, fault]).int())


def _set_flags(rank: Rank, place: tuple[int, ...], kind: int, rows: int) -> None:
    for there in _lives(rank):
        flag = _view(rank, there, place[0] + rank.rank * _FLAG, (2,), torch.int32)
        flag.copy_(torch.tensor([rows, rank.epochs[kind]]))


def _flag(rank: Rank, place: tuple[int, ...], kind: int, source: int) -> int:
    """The rows that `source` announces; -1 if it has not."""
    rows, epoch = _view(rank, rank.rank, place[0] + source * _FLAG, (2,), torch.int32).tolist()
    if epoch == rank.epochs[kind]:
        return rows
    abort = _view(rank, rank.rank, 0, (2,), torch.int32)
    if missed := int(abort[0]):
        _record(rank, PEER_ABORTED, kind, missed - 1, rank.epochs[kind])
    else:
        _record(rank, PEER_SILENT, kind, source, rank.epochs[kind])
        for there in _lives(rank):
            if there != source:
                _view(rank, there, 0, (2,), torch.int32).copy_(torch.tensor([source + 1, rank.epochs[kind]]))
    return -1


def _scatter(rank: Rank, place: tuple[int, ...], parts: list[Tensor], indices: Tensor) -> None:
    layout, tokens = rank.layout, indices.shape[0]
    owner, number = _places(rank, indices)
    bad = (indices < -1) | (indices >= layout.experts)
    if bad.any():
        token, k = bad.nonzero()[0].tolist()
        _record(rank, BAD_INDEX, SCATTER, token, (int(indices[token, k]) + 2**31) % 2**32 - 2**31)
    for there in _lives(rank):
        mine = (layout.world, layout.most_tokens)
        numbers = _view(rank, there, place[2], (*mine, layout.top_k), torch.int32)
        numbers[rank.rank, :tokens] = torch.where(owner == there, number, -1).int()
        rows = _view(rank, there, place[3], (*mine, place[4]), torch.uint8)[rank.rank, :tokens]
        wanted, start = (owner == there).any(1), 0
        for part in parts:
            width = part.shape[1] * part.itemsize
            rows[:, start : start + width][wanted] = part.contiguous().view(torch.uint8)[wanted]
            start += to_16(width)
    _set_flags(rank, place, SCATTER, tokens)


def _scatter_wait(rank: Rank, place: tuple[int, ...], experts: Tensor) -> None:
    layout = rank.layout
    shape = layout.world, layout.most_tokens, layout.top_k
    numbers = _view(rank, rank.rank, place[2], shape, torch.int32)
    experts.fill_(-1)
    for source in _lives(rank):
        if (rows := _flag(rank, place, SCATTER, source)) > 0:
            experts.view(shape)[source, :rows] = numbers[source, :rows]


def _gather(rank: Rank, place: tuple[int, ...], rows: Tensor, experts: Tensor, slot_of: Tensor) -> None:
    layout = rank.layout
    shape = layout.world, layout.most_tokens * layout.top_k
    here, slots = experts.view(shape) >= 0, slot_of.view(shape)
    values, width = rows.contiguous().view(torch.uint8), rows.shape[1] * rows.itemsize
    for home in _lives(rank):
        pairs = here[home].nonzero()[:, 0]
        kept = slots[home][pairs] >= 0
        numbers = _view(rank, home, place[2], shape[1:], torch.int32)
        numbers[pairs] = torch.where(kept, pairs, -1).int()
        back = _view(rank, home, place[3], (shape[1], place[4]), torch.uint8)
        back[pairs[kept], :width] = values[slots[home][pairs[kept]].long()]
    _set_flags(rank, place, GATHER, 0)


def _gather_wait(
    rank: Rank, place: tuple[int, ...], indices: Tensor, weights: Tensor | None, slot_of: Tensor, poisoned: Tensor
) -> None:
    owner, _ = _places(rank, indices)
    numbers = _view(rank, rank.rank, place[2], (rank.layout.most_tokens * rank.layout.top_k,), torch.int32)
    numbers = numbers[: indices.numel()].view(indices.shape)
    slot_of.copy_(torch.where(owner >= 0, numbers, -1))
    poisoned.copy_(torch.ones_like(poisoned) if weights is None else weights)
    for source in _lives(rank):
        if _flag(rank, place, GATHER, source) < 0:
            lost = owner == source
            pairs = torch.arange(indices.numel(), dtype=torch.int32, device=indices.device).view(indices.shape)
            slot_of.copy_(torch.where(lost, pairs, slot_of))
            poisoned.masked_fill_(lost, float("nan"))
