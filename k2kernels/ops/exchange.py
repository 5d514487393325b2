"""Rows between ranks through buffers that every rank can write: four steps, each a kernel or plain PyTorch.

csrc/exchange/kernel.cuh describes the protocol. A `Rank` is one of the W ranks as its own process sees it: its
buffer, the others', and the state of its exchanges.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from k2kernels import _backend
from k2kernels.ops import _launch
from k2kernels.ops._check import FLOATS
from k2kernels.ops._constants import constants
from k2kernels.reference.exchange import Layout, PlainRank, to_16

PHASES = (
    "dispatch",
    "combine",
    "dispatch backward",
    "combine backward",
    "combine backward, gradient of the weights",
    "probe",
)


class Call(NamedTuple):
    """What must be equal on all ranks in an exchange; every flag carries it, so that a mismatch is detected."""

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


class ArrivedRows(NamedTuple):
    """Rows of other ranks in one of the two halves of a buffer. The half alternates from exchange to exchange; it is in
    device memory, so that a captured graph may be replayed."""

    halves: Tensor  # [2, R, columns]
    half: Tensor  # int32 [1]
    counts: Tensor | None = None  # int32 [W]: of W equal runs of rows, how many arrived; None: all

    def copy(self) -> Tensor:
        """[R, columns]."""
        return self.halves.index_select(0, self.half)[0]


class Fault(NamedTuple):
    """The first fault that a kernel or `PlainRank` recorded (k2k::ExchangeError)."""

    fault: int
    phase: str
    who: int
    number: int


class Rank(PlainRank):
    """One rank. Every method is a step of an exchange; a wait follows each send, in the order of a stream.

    Args:
        buffer: uint8 [layout.bytes], this rank's own, zeros at first.
        peers: int64 [W], on the device: the addresses of all ranks' buffers as seen from here.
        buffers: the buffers themselves, where they are of this process: for the steps in plain PyTorch.
        blocks: CTAs of a kernel that sends, at most.
    """

    def __init__(
        self, layout: Layout, rank: int, buffer: Tensor, peers: Tensor, buffers: list[Tensor] | None, blocks: int
    ):
        # In host memory, which is read without waiting for the device.
        error = torch.zeros(constants.EXCHANGE_ERROR_WORDS, dtype=torch.int32)
        error = error.pin_memory() if buffer.is_cuda else error
        state = torch.zeros(constants.EXCHANGE_STATE_WORDS, dtype=torch.int32, device=buffer.device)
        super().__init__(layout, rank, buffers, state, error, constants)
        self.buffer, self.peers, self.blocks = buffer, peers, blocks
        self.timeout = 10**10  # nanoseconds

    def reset(self, live: int) -> None:
        """As new, with these ranks; no kernel of any rank may be in flight."""
        for tensor in self.layout.cleared(self.buffer):
            tensor.zero_()
        self.restart(live)

    def fault(self) -> Fault | None:
        """The first fault since the last reset, if any."""
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

    # ---- steps

    def scatter(self, parts: list[Tensor], indices: Tensor, call: Call) -> None:
        """Sends each token's row of the one or two matrices `parts` [T, ...] to the ranks of its experts."""
        self.widths = self._begin(parts, call)
        pitch = sum(map(to_16, self.widths))
        if self.by_kernels():
            self._sent = parts, indices  # alive until the next send
            rows, beside = (*parts, None)[:2]
            self._launch("exchange_scatter", "scatter", pitch, rows, beside, indices, self.blocks)
        else:
            self.plain_scatter(parts, indices, pitch)

    def scatter_wait(self) -> tuple[Tensor, Tensor]:
        """int32 [W * most_tokens, K], the local expert of each pair of the rows that arrived, or -1; and int32 [W], how
        many rows of each source there are."""
        layout, device = self.layout, self.buffer.device
        experts = torch.empty((layout.world * layout.most_tokens, layout.top_k), dtype=torch.int32, device=device)
        arrived = torch.empty(layout.world + 1, dtype=torch.int32, device=device)
        if self.by_kernels():
            self._launch("exchange_scatter_wait", "scatter", 0, experts, arrived)
        else:
            self.plain_scatter_wait(experts, arrived)
        self._scattered = arrived[-1:]
        return experts, arrived[:-1]

    def arrived(self, part: int, columns: int, dtype: torch.dtype, counts: Tensor | None = None) -> ArrivedRows:
        """[W * most_tokens, columns]: the rows that arrived. They last until the scatter after the next."""
        first = to_16(self.widths[0]) if part else 0
        rows = self._halves("scatter", self.layout.world * self.layout.most_tokens, sum(map(to_16, self.widths)))
        return ArrivedRows(rows[..., first : first + columns * dtype.itemsize].view(dtype), self._scattered, counts)

    def gather(self, rows: Tensor, experts: Tensor, slot_of: Tensor, row_counts: Tensor, call: Call) -> None:
        """Returns the row of each pair's slot to its token."""
        (self.returned_width,) = self._begin([rows], call)
        pitch = to_16(self.returned_width)
        if self.by_kernels():
            self._sent = rows, experts, slot_of, row_counts
            self._launch("exchange_gather", "gather", pitch, rows, experts, slot_of, row_counts, self.blocks)
        else:
            self.plain_gather(rows, experts, slot_of, pitch)

    def gather_wait(self, indices: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """int32 [T, K], which of the returned rows is each pair's, or -1; and the weights (ones), float32 [T, K].

        The weights of pairs whose rank sent no flag are NaN.
        """
        slot_of = torch.empty(indices.shape, dtype=torch.int32, device=indices.device)
        poisoned = torch.empty(indices.shape, dtype=torch.float32, device=indices.device)
        self._gathered = torch.empty(1, dtype=torch.int32, device=indices.device)
        results = slot_of, poisoned, self._gathered
        if self.by_kernels():
            self._awaited = indices, weights  # alive until the next wait: emulated launches may run later
            self._launch("exchange_gather_wait", "gather", 0, indices, weights, *results)
        else:
            self.plain_gather_wait(indices, weights, *results)
        return slot_of, poisoned

    def returned(self, columns: int, dtype: torch.dtype) -> ArrivedRows:
        """[most_tokens * K, columns]: the rows that returned. They last until the gather after the next."""
        pairs = self.layout.most_tokens * self.layout.top_k
        rows = self._halves("gather", pairs, to_16(self.returned_width))
        return ArrivedRows(rows[..., : columns * dtype.itemsize].view(dtype), self._gathered)

    # ---- launches

    def _halves(self, kind: str, rows: int, pitch: int) -> Tensor:
        _, _, _, start, half, _ = self.layout.place(kind, pitch)
        start += self.buffer.storage_offset()  # the buffer may be part of a larger allocation
        return self.buffer.as_strided((2, rows, pitch), (half, pitch, 1), start)

    def _begin(self, parts: list[Tensor], call: Call) -> list[int]:
        """The bytes of a row of each of `parts`."""
        for x in parts:
            if x.numel() and x.stride(-1) != 1 and x.shape[1] > 1:  # without rows any strides do: expand() leaves 0
                raise ValueError(f"exchange: rows must have stride 1 along columns, got strides {x.stride()}")
        self.call = call.code()
        return [part.shape[1] * part.itemsize for part in parts]

    def by_kernels(self) -> bool:
        """Whether kernels serve the steps; else plain PyTorch does."""
        device = self.buffer.device.type
        chosen = _backend.choose("moe_exchange", device, self._why_not)
        if chosen == "reference" and self.buffers is None:
            raise _backend.UnsupportedError(
                "moe_exchange: plain PyTorch cannot reach the buffers of other processes; kernels are needed"
            )
        return chosen != "reference"

    def _why_not(self) -> str | None:
        device = self.buffer.device
        return _launch.why_not_emulated() if device.type == "cpu" else _launch.why_not_cuda(device.index)

    def _launch(self, function: str, kind: str, pitch: int, *args: Any) -> None:
        layout = self.layout
        sizes = layout.experts, layout.top_k, layout.most_tokens
        numbers = layout.world, self.rank, self.live, self.call, *sizes, self.timeout
        buffers = self.peers, self.state, self.error
        _launch.launch(function, *buffers, layout.place(kind, pitch), numbers, *args, op="moe_exchange")
