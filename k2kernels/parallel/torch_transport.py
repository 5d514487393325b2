"""Rows by `all_to_all_single` of a process group: NCCL, or gloo on a CPU.

Dispatch is three all-to-alls: how many rows and pairs come, their experts, the rows, packed with their scales (or, of
gradients, weights) into bytes, because gloo knows no float8. The host waits for the first one: it sizes buffers.

Bytes a token: dispatch, for each rank that has an expert of it, 4 K + the row (+ 4 for each 128 columns when
quantised), each part rounded up to 16; combine, the row in y's dtype for each of its K experts. Backward the same with
gradients, and K weights with each of combine's rows; then 4 bytes a pair return.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from k2kernels.parallel.peers import Peers
from k2kernels.parallel.split import Split, in_range


class Route(NamedTuple):
    """Who gets what. A list has one number for each rank."""

    sent_tokens: Tensor  # int64: the token of each row that is sent, by rank, then token
    sent_rows: list[int]
    arrived_rows: list[int]
    home_slot_of: Tensor  # int32 [T, K]: which row that comes back is a pair's, -1: none
    home_token_of_slot: Tensor  # int32: the token of each; they come back by rank, then token, then k
    home_counts: list[int]
    arrived_pairs: Tensor  # int64: row * K + k of each pair that arrived here, by row, then k
    arrived_counts: list[int]


class TorchTransport:
    """See `exchange.Transport`."""

    def __init__(self, split: Split, peers: Peers):
        self.split = split
        self.peers = peers
        self.epoch = 0

    @property
    def degraded(self) -> bool:
        return bool(self.peers.masked)

    def plan(self, indices: Tensor, kind: int) -> tuple[Route, Tensor, int]:
        world, device = len(self.peers.live), indices.device
        self.epoch += 1
        indices, bad = in_range(indices, self.split.num_experts)
        rank, local = self.split.places(indices, self.peers.live)
        tokens, ones = indices.shape[0], torch.ones_like(rank)
        wanted = torch.zeros(tokens, world + 1, dtype=torch.bool, device=device).scatter_(1, rank, True)[:, :world]
        pairs_to = ones.new_zeros(world + 1).scatter_add_(0, rank.flatten(), ones.flatten())[:world]

        # A line for each rank: rows, pairs; and what tells ranks apart that do not do the same.
        same = torch.cat([ones.new_tensor([self.epoch, 2 * kind + torch.is_grad_enabled()]), bad])
        header = torch.cat([wanted.sum(0)[:, None], pairs_to[:, None], same.expand(world, -1)], dim=1)
        answer = self._all_to_all(_bytes(header), [1] * world, [1] * world, "dispatch").view(torch.int64)
        sent, arrived = torch.stack([header, answer]).tolist()
        self.peers.compare({rank: line[2:] for rank, line in zip(self.peers.live, arrived)})
        sent_rows, home_counts, arrived_rows, arrived_counts = (
            [line[i] for line in side] for side in (sent, arrived) for i in (0, 1)
        )

        sent_rank, sent_tokens = wanted.t().nonzero(as_tuple=True)
        home_pairs = rank.flatten().argsort(stable=True)[: sum(home_counts)]
        home_slot_of = torch.full((rank.numel(),), -1, dtype=torch.int32, device=device)
        home_slot_of[home_pairs] = torch.arange(len(home_pairs), dtype=torch.int32, device=device)
        experts = torch.where(rank[sent_tokens] == sent_rank[:, None], local[sent_tokens], -1).int()
        (experts,) = self._carry([experts], sent_rows, arrived_rows, "dispatch")
        arrived_pairs = (experts >= 0).flatten().nonzero()[:, 0]
        route = Route(
            sent_tokens,
            sent_rows,
            arrived_rows,
            home_slot_of.view(rank.shape),
            (home_pairs // rank.shape[1]).int(),
            home_counts,
            arrived_pairs,
            arrived_counts,
        )
        return route, experts, sum(arrived_counts)

    def scatter(self, route: Route, segments: list[Tensor], phase: str) -> list[Tensor]:
        segments = [_bytes(s)[route.sent_tokens].view(s.dtype) for s in segments]
        return self._carry(segments, route.sent_rows, route.arrived_rows, phase)

    def gather(self, route: Route, rows: Tensor, slot_of: Tensor, phase: str) -> Tensor:
        slots = slot_of.flatten()[route.arrived_pairs]
        sent = _bytes(rows).new_zeros(len(slots), rows.shape[1] * rows.itemsize)
        if len(rows):
            sent = _bytes(rows)[slots.clamp(min=0)].masked_fill_(slots[:, None] < 0, 0)
        return self._all_to_all(sent, route.arrived_counts, route.home_counts, phase).view(rows.dtype)

    def home(self, route: Route) -> tuple[Tensor, Tensor]:
        return route.home_slot_of, route.home_token_of_slot

    def without(self, route: Route, home_slot_of: Tensor) -> Route:
        return route._replace(home_slot_of=home_slot_of)

    def _carry(self, segments: list[Tensor], sent: list[int], arrived: list[int], phase: str) -> list[Tensor]:
        """Matrices of the same rows, packed into one, each at a multiple of 16 bytes."""
        starts, pitch = [], 0
        for segment in segments:
            starts.append(pitch)
            pitch += -(-segment.shape[1] * segment.itemsize // 16) * 16
        packed = segments[0].new_empty(len(segments[0]), pitch, dtype=torch.uint8)
        for segment, start in zip(segments, starts):
            packed[:, start : start + segment.shape[1] * segment.itemsize] = _bytes(segment)
        packed = self._all_to_all(packed, sent, arrived, phase)
        return [packed[:, start : start + s.shape[1] * s.itemsize].view(s.dtype) for s, start in zip(segments, starts)]

    def _all_to_all(self, rows: Tensor, sent: list[int], arrived: list[int], phase: str) -> Tensor:
        """Rows of bytes, so many to and from each rank that takes part."""
        with self.peers.step(phase, self.epoch):
            out = rows.new_empty(sum(arrived), rows.shape[1])
            group = self.peers.group
            work = dist.all_to_all_single(out, rows.contiguous(), arrived, sent, group=group, async_op=True)
            self.peers.wait(work, rows.device)
            return out


def _bytes(x: Tensor) -> Tensor:
    """Rows as bytes."""
    x = x.contiguous()
    if x.stride(-1) != 1:  # of a single column any stride counts as contiguous
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.uint8)
