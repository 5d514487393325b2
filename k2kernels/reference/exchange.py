"""Rows between ranks through buffers that every rank can write: the four steps, for ranks of one process.

csrc/exchange/kernel.cuh describes the protocol. Plain PyTorch cannot wait: all ranks send before one of them waits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

KINDS = ("scatter", "gather")


def to_16(size: int) -> int:
    """`size` rounded up to a multiple of 16."""
    return -(-size // 16) * 16


class Layout:
    """Where the parts of every rank's buffer begin.

    Args:
        world, experts, top_k, most_tokens: W, E, K, and the most tokens of a rank.
        row_bytes: the longest row that is sent.
        extra_bytes: what may be sent with a row to the experts: scales, or K weights.
        flag_bytes: the distance of flags.
    """

    def __init__(
        self,
        world: int,
        experts: int,
        top_k: int,
        most_tokens: int,
        row_bytes: int,
        extra_bytes: int,
        flag_bytes: int,
    ):
        self.world, self.experts, self.top_k, self.most_tokens = world, experts, top_k, most_tokens
        row_bytes, extra_bytes = to_16(row_bytes), to_16(extra_bytes)
        self.row_bytes, self.extra_bytes, self.flag_bytes = row_bytes, extra_bytes, flag_bytes
        pairs = most_tokens * top_k
        sizes = dict(  # of one half
            scatter=(world * flag_bytes, to_16(4 * world * pairs), world * most_tokens * (row_bytes + extra_bytes)),
            gather=(world * flag_bytes, to_16(4 * pairs), pairs * row_bytes),
        )
        self.bytes = flag_bytes  # the abort word
        self._places: dict[str, tuple[int, ...]] = {}
        for kind, parts in sizes.items():
            half = -(-sum(parts) // flag_bytes) * flag_bytes
            self._places[kind] = 0, *(self.bytes + sum(parts[:i]) for i in range(3)), half
            self.bytes += 2 * half

    def place(self, kind: str, pitch: int) -> tuple[int, int, int, int, int, int]:
        """abort, flags, numbers, rows, half, pitch: k2k::ExchangePlace."""
        return *self._places[kind], pitch

    def cleared(self, buffer: Tensor) -> list[Tensor]:
        """What must be zeros before the first exchange: the abort word and the flags."""
        parts = [buffer[: self.flag_bytes]]
        for kind in KINDS:
            _, flags, _, _, half, _ = self.place(kind, 0)
            parts += [buffer[start : start + self.world * self.flag_bytes] for start in (flags, flags + half)]
        return parts


class PlainRank:
    """One rank and its steps in plain PyTorch.

    Args:
        rank: which one.
        buffers: uint8 [layout.bytes] of each rank; None where they are of other processes, which no step here reaches.
        state: int32, k2k::ExchangeState, which begins with the epochs: how often this rank has sent, by kind.
        error: int32, the record of the first fault.
        constants: numbers of csrc/exchange: k2kernels.ops._constants.constants.

    Attributes:
        live: a bit for each rank that takes part.
        call: the code of the current call, which must be equal on all ranks.
    """

    def __init__(
        self, layout: Layout, rank: int, buffers: list[Tensor] | None, state: Tensor, error: Tensor, constants: Any
    ):
        self.layout, self.rank, self.buffers = layout, rank, buffers
        self.state, self.error, self.constants = state, error, constants
        self.call = 0
        self.restart((1 << layout.world) - 1)

    def restart(self, live: int) -> None:
        """As new, with these ranks."""
        self.state.zero_()
        self.error.zero_()
        self.live = live
        self._failed = False  # after a fault, no further sends and waits

    def plain_scatter(self, parts: list[Tensor], indices: Tensor, pitch: int) -> None:
        """Sends each token's row of the matrices `parts` to the ranks of its experts."""
        layout, tokens = self.layout, indices.shape[0]
        self.state[KINDS.index("scatter")] += 1
        flags, numbers_at, rows_at = self._in_half("scatter")
        owner, number = self._experts_of(indices)
        bad = (indices < -1) | (indices >= layout.experts)
        if bad.any():
            token, k = bad.nonzero()[0].tolist()
            self._record(self.constants.EXCHANGE_BAD_INDEX, token, int(indices[token, k]))
        for there in [] if self._failed else self._lives():
            mine = (layout.world, layout.most_tokens)
            numbers = self._view(there, numbers_at, (*mine, layout.top_k), torch.int32)
            numbers[self.rank, :tokens] = torch.where(owner == there, number, -1).int()
            rows = self._view(there, rows_at, (*mine, pitch), torch.uint8)[self.rank, :tokens]
            sent, start = (owner == there).any(1), 0
            for part in parts:
                width = part.shape[1] * part.itemsize
                rows[:, start : start + width][sent] = _bytes(part)[sent]
                start += to_16(width)
        self._set_flags(flags, "scatter", tokens)

    def plain_scatter_wait(self, experts: Tensor, arrived: Tensor) -> None:
        """Fills experts [W * most_tokens, K] and arrived [W + 1]: the rows of each source, and the half."""
        layout = self.layout
        shape = layout.world, layout.most_tokens, layout.top_k
        flags, numbers_at, _ = self._in_half("scatter")
        numbers = self._view(self.rank, numbers_at, shape, torch.int32)
        experts.fill_(-1)
        arrived.zero_()
        arrived[-1] = self._epoch("scatter") % 2
        for source in self._lives():
            if (rows := self._rows_announced(flags, "scatter", source)) > 0:
                experts.view(shape)[source, :rows] = numbers[source, :rows]
                arrived[source] = rows

    def plain_gather(self, rows: Tensor, experts: Tensor, slot_of: Tensor, pitch: int) -> None:
        """Returns the row of each pair's slot to its token."""
        layout = self.layout
        self.state[KINDS.index("gather")] += 1
        flags, numbers_at, rows_at = self._in_half("gather")
        shape = layout.world, layout.most_tokens * layout.top_k
        here, slots = experts.view(shape) >= 0, slot_of.view(shape)
        values, width = _bytes(rows), rows.shape[1] * rows.itemsize
        for home in [] if self._failed else self._lives():
            pairs = here[home].nonzero()[:, 0]
            kept = slots[home][pairs] >= 0
            numbers = self._view(home, numbers_at, shape[1:], torch.int32)
            numbers[pairs] = torch.where(kept, pairs, -1).int()
            back = self._view(home, rows_at, (shape[1], pitch), torch.uint8)
            back[pairs[kept], :width] = values[slots[home][pairs[kept]].long()]
        self._set_flags(flags, "gather", 0)

    def plain_gather_wait(
        self, indices: Tensor, weights: Tensor | None, slot_of: Tensor, poisoned: Tensor, half: Tensor
    ) -> None:
        """Fills slot_of [T, K], the returned row of each pair, or -1; the weights, NaN for pairs whose rank sent no
        flag; and the half."""
        flags, numbers_at, _ = self._in_half("gather")
        half.fill_(self._epoch("gather") % 2)
        owner, _ = self._experts_of(indices)
        numbers = self._view(self.rank, numbers_at, (self.layout.most_tokens * self.layout.top_k,), torch.int32)
        numbers = numbers[: indices.numel()].view(indices.shape)
        slot_of.copy_(torch.where(owner >= 0, numbers, -1))
        poisoned.copy_(torch.ones_like(poisoned) if weights is None else weights)
        for source in self._lives():
            if self._rows_announced(flags, "gather", source) < 0:
                lost = owner == source
                pairs = torch.arange(indices.numel(), dtype=torch.int32, device=indices.device).view(indices.shape)
                slot_of.copy_(torch.where(lost, pairs, slot_of))
                poisoned.masked_fill_(lost, float("nan"))

    def _view(self, there: int, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = dtype.itemsize * math.prod(shape)
        return self.buffers[there][start : start + size].view(dtype).view(shape)

    def _epoch(self, kind: str) -> int:
        """How often this rank has sent, modulo 2^32."""
        return int(self.state[KINDS.index(kind)]) % 2**32

    def _in_half(self, kind: str) -> tuple[int, int, int]:
        """flags, numbers, rows of the current epoch."""
        _, flags, numbers, rows, half, _ = self.layout.place(kind, 0)
        half *= self._epoch(kind) % 2
        return flags + half, numbers + half, rows + half

    def _lives(self) -> list[int]:
        return [r for r in range(self.layout.world) if self.live >> r & 1]

    def _experts_of(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Rank and number there of each pair's expert, -1 for none."""
        layout = self.layout
        each, more = divmod(layout.experts, layout.world)
        indices = indices.long()
        larger = indices < more * (each + 1)
        rest = indices - more * (each + 1)
        owner = torch.where(larger, indices // (each + 1), more + rest // each)
        number = torch.where(larger, indices % (each + 1), rest % each)
        live = torch.tensor([bool(self.live >> r & 1) for r in range(layout.world)], device=indices.device)
        none = (indices < 0) | (indices >= layout.experts)
        none |= ~live[owner.clamp(0, layout.world - 1)]
        return owner.masked_fill(none, -1), number.masked_fill(none, -1)

    def _record(self, fault: int, who: int, number: int) -> None:
        constants = self.constants
        if not self.error[constants.EXCHANGE_ERROR_FAULT]:
            self.error[constants.EXCHANGE_ERROR_CALL] = self.call
            self.error[constants.EXCHANGE_ERROR_WHO] = who
            self.error[constants.EXCHANGE_ERROR_NUMBER] = torch.tensor(number).int()  # its last 32 bits
            self.error[constants.EXCHANGE_ERROR_FAULT] = fault

    def _set_flags(self, flags: int, kind: str, rows: int) -> None:
        if self._failed:
            return
        word = self.call << self.constants.EXCHANGE_FLAG_ROWS_BITS | rows
        for there in self._lives():
            flag = self._view(there, flags + self.rank * self.layout.flag_bytes, (2,), torch.int32)
            flag.copy_(torch.tensor([word, self._epoch(kind)]).int())

    def _rows_announced(self, flags: int, kind: str, source: int) -> int:
        """The number in the flag of `source`; -1 if there is no flag of this epoch, or one of another call."""
        constants = self.constants
        flag = self._view(self.rank, flags + source * self.layout.flag_bytes, (2,), torch.int32)
        abort = self._view(self.rank, 0, (2,), torch.int32)
        word, epoch = (number % 2**32 for number in flag.tolist())
        if epoch == (now := self._epoch(kind)):
            call, rows = divmod(word, 1 << constants.EXCHANGE_FLAG_ROWS_BITS)
            if call == self.call:
                return rows
            found = constants.EXCHANGE_OTHER_CALL, source
        elif aborted := int(abort[0]):
            why, who = divmod(aborted, 1 << 16)
            other = constants.EXCHANGE_OTHER_CALL
            self._record(other if why == other else constants.EXCHANGE_PEER_ABORTED, who - 1, now)
            found = None
        else:
            found = constants.EXCHANGE_PEER_SILENT, source
        if found:
            fault, who = found
            self._record(fault, who, now)
            for there in self._lives():
                self._view(there, 0, (2,), torch.int32).copy_(torch.tensor([fault << 16 | who + 1, now]))
        self._failed = True
        return -1


def _bytes(x: Tensor) -> Tensor:
    """The rows of a matrix as bytes. Of no rows, `contiguous` keeps any strides, which `view` may not take."""
    if x.numel() == 0:
        return x.new_empty((x.shape[0], x.shape[1] * x.itemsize), dtype=torch.uint8)
    return x.contiguous().view(torch.uint8)
