"""Rows by `all_to_all_single` of process groups: NCCL, or gloo on a CPU.

Dispatch is three all-to-alls: the numbers of rows and pairs; their experts; the rows, packed with their scales (or, in
the backward of combine, weights) into bytes, as gloo does not support float8. The host waits for the first one, which
determines the sizes of buffers, and for nothing else: one read in a dispatch, none in combine and the backward passes.

Bytes per token: dispatch, for each rank that has an expert of it, 4 K + the row (+ 4 for each 128 columns when
quantised), each part rounded up to 16; combine, the row in y's dtype for each of its K experts. Backward the same with
gradients, and K weights with each of combine's rows; then 4 bytes per pair are returned.

Over several nodes all of this happens twice: a hop among the ranks of equal local rank on all nodes (a rail), whose
parts of the experts are nodes; then a hop among the ranks of a node, whose tokens are the rows that the first hop
brought. A token crosses to each node once, however many ranks there need it, and a rank exchanges data over the network
with one rank of each other node only. Rows return by the same hops in reverse order. The host waits once per hop.

Bytes per token between nodes of 8 ranks, estimates by counting (K2's shape: 384 experts, top 8, hidden 7168; every
expert, and every choice of nodes, equally likely; dispatch in FP8, combine in bfloat16):

    4 nodes, a token's experts      dispatch, one hop     two hops     combine, either way
    anywhere                                   40 300       20 100                  86 000
    on 2 of the nodes                          36 500       11 100                  86 000

The bytes of combine stay the same, as the row of every pair is returned. Partial sums on a node would send less, but
((a + b) + c) + d and (a + b) + (c + d) round differently: the bits would depend on which experts share a node.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from k2kernels.parallel.peers import Peers
from k2kernels.parallel.split import Places, Split, in_range


class Leg(NamedTuple):
    """What is sent to whom in a hop, whose tokens are the rows here before it. Lists have one number per member."""

    sent_tokens: Tensor  # int64: the token of each row that is sent, by member, then token
    sent_rows: list[int]
    arrived_rows: list[int]
    home_slot_of: Tensor  # int32 [T, K]: the returned row of each pair, -1: none
    home_token_of_slot: Tensor  # int32: the token of each returned row; they are ordered by member, token, k
    home_counts: list[int]
    arrived_pairs: Tensor  # int64: row * K + k of each pair that arrived here, by row, then k
    arrived_counts: list[int]

    def sources(self, device: torch.device) -> Tensor:
        """Which member sent each row that arrived: int32 [R, 1]."""
        members = torch.arange(len(self.arrived_rows), dtype=torch.int32, device=device)
        counts = torch.tensor(self.arrived_rows, device=device)
        return members.repeat_interleave(counts, output_size=sum(self.arrived_rows))[:, None]


class HopsRoute(NamedTuple):
    """The route of rows through all hops."""

    legs: list[Leg]
    order: Tensor | None  # int64 [R]: orders the rows of the last hop by source rank; None: they are in order


class TorchTransport:
    """See `exchange.Transport`.

    Args:
        split: of the experts.
        peers: the ranks that take part.
        ranks_per_node: for two hops, if no rank is masked; 0 for one.
    """

    def __init__(self, split: Split, peers: Peers, ranks_per_node: int = 0):
        self.split = split
        self.peers = peers
        bounds = [split.bounds(rank) for rank in range(split.world_size)]
        if ranks_per_node:
            node, number = divmod(peers.rank, ranks_per_node)
            starts = range(0, split.world_size, ranks_per_node)
            nodes = [(bounds[i][0], bounds[i + ranks_per_node - 1][1]) for i in starts]
            rail = [i + number for i in starts]
            here = list(range(starts[node], starts[node] + ranks_per_node))
            first, end = nodes[node]
            parts = [(bounds[rank][0] - first, bounds[rank][1] - first) for rank in here]
            self.hops = [
                Hop(peers, peers.subgroup(rail), Places(split.num_experts, nodes)),
                Hop(peers, peers.subgroup(here), Places(end - first, parts)),
            ]
        else:
            self.hops = [Hop(peers, peers.group, Places(split.num_experts, [bounds[rank] for rank in peers.live]))]

    @property
    def degraded(self) -> bool:
        return bool(self.peers.masked)

    def plan(self, indices: Tensor, kind: int) -> tuple[HopsRoute, Tensor, int]:
        self.peers.epoch += 1
        indices, bad = in_range(indices, self.split.num_experts)
        # A line of each rank whose data has reached this one, to detect ranks that make another call.
        mine = bad.new_tensor([self.peers.rank, self.peers.epoch, 2 * kind + torch.is_grad_enabled()])
        lines, legs, sources = torch.cat([mine, bad])[None], [], []
        for hop in self.hops:
            leg, lines, (indices, *sources) = hop.plan(lines, indices, sources)
            legs.append(leg)
            if hop is not self.hops[-1]:
                sources.append(leg.sources(indices.device))
        self.peers.compare({line[0]: line[1:] for line in lines})
        order = None
        if len(self.hops) > 1:  # rows are ordered by local rank of their source, then node, then token
            order = sources[0][:, 0].argsort(stable=True)
            indices = indices[order]
        return HopsRoute(legs, order), indices, sum(legs[-1].arrived_counts)

    def scatter(self, route: HopsRoute, segments: list[Tensor], phase: str) -> list[Tensor]:
        for hop, leg in zip(self.hops, route.legs, strict=True):
            segments = hop.scatter(leg, segments, phase)
        return segments if route.order is None else [_selected(segment, route.order) for segment in segments]

    def gather(self, route: HopsRoute, rows: Tensor, slot_of: Tensor, phase: str) -> Tensor:
        if route.order is not None:
            slot_of = torch.empty_like(slot_of).index_copy_(0, route.order, slot_of)
        for hop, leg in zip(reversed(self.hops), reversed(route.legs), strict=True):
            rows, slot_of = hop.gather(leg, rows, slot_of, phase), leg.home_slot_of
        return rows

    def home(self, route: HopsRoute) -> tuple[Tensor, Tensor]:
        return route.legs[0].home_slot_of, route.legs[0].home_token_of_slot

    def without(self, route: HopsRoute, home_slot_of: Tensor) -> HopsRoute:
        return route._replace(legs=[route.legs[0]._replace(home_slot_of=home_slot_of), *route.legs[1:]])


class Hop:
    """An exchange among the members of a group; each has, or forwards to, a part of the experts."""

    def __init__(self, peers: Peers, group: dist.ProcessGroup, places: Places):
        self.peers = peers
        self.group = group
        self.places = places

    def plan(self, lines: Tensor | list, indices: Tensor, beside: list[Tensor]) -> tuple[Leg, list, list[Tensor]]:
        """The leg, the lines of all members, and, of the arriving rows, the local experts and what was sent beside."""
        world, device = self.places.parts, indices.device
        part, local = self.places(indices)
        tokens, ones = indices.shape[0], torch.ones_like(part)
        wanted = torch.zeros(tokens, world + 1, dtype=torch.bool, device=device).scatter_(1, part, True)[:, :world]
        pairs_to = ones.new_zeros(world + 1).scatter_add_(0, part.flatten(), ones.flatten())[:world]

        # For each member: rows, pairs; and the lines.
        lines = torch.as_tensor(lines, dtype=torch.int64, device=device)
        header = torch.cat([wanted.sum(0)[:, None], pairs_to[:, None], lines.flatten().expand(world, -1)], dim=1)
        answer = self._all_to_all(_bytes(header), [1] * world, [1] * world, "dispatch").view(torch.int64)
        sent, arrived = torch.stack([header, answer]).tolist()
        width = lines.shape[1]
        lines = [line[i : i + width] for line in arrived for i in range(2, len(line), width)]
        sent_rows, home_counts, arrived_rows, arrived_counts = (
            [line[i] for line in side] for side in (sent, arrived) for i in (0, 1)
        )

        sent_part, sent_tokens = torch.nonzero_static(wanted.t(), size=sum(sent_rows)).unbind(1)
        home_pairs = part.flatten().argsort(stable=True)[: sum(home_counts)]
        home_slot_of = torch.full((part.numel(),), -1, dtype=torch.int32, device=device)
        home_slot_of[home_pairs] = torch.arange(len(home_pairs), dtype=torch.int32, device=device)
        experts = torch.where(part[sent_tokens] == sent_part[:, None], local[sent_tokens], -1).int()
        beside = [_selected(b, sent_tokens) for b in beside]
        experts, *beside = self._carry([experts, *beside], sent_rows, arrived_rows, "dispatch")
        arrived_pairs = torch.nonzero_static((experts >= 0).flatten(), size=sum(arrived_counts))[:, 0]
        leg = Leg(
            sent_tokens,
            sent_rows,
            arrived_rows,
            home_slot_of.view(part.shape),
            (home_pairs // part.shape[1]).int(),
            home_counts,
            arrived_pairs,
            arrived_counts,
        )
        return leg, lines, [experts, *beside]

    def scatter(self, leg: Leg, segments: list[Tensor], phase: str) -> list[Tensor]:
        return self._carry([_selected(s, leg.sent_tokens) for s in segments], leg.sent_rows, leg.arrived_rows, phase)

    def gather(self, leg: Leg, rows: Tensor, slot_of: Tensor, phase: str) -> Tensor:
        slots = slot_of.flatten()[leg.arrived_pairs]
        sent = _bytes(rows).new_zeros(len(slots), rows.shape[1] * rows.itemsize)
        if len(rows):
            sent = _bytes(rows)[slots.clamp(min=0)].masked_fill_(slots[:, None] < 0, 0)
        return self._all_to_all(sent, leg.arrived_counts, leg.home_counts, phase).view(rows.dtype)

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
        """Exchanges rows of bytes; `sent` and `arrived` are the numbers for each member."""
        with self.peers.step(phase):
            out = rows.new_empty(sum(arrived), rows.shape[1])
            work = dist.all_to_all_single(out, rows.contiguous(), arrived, sent, group=self.group, async_op=True)
            self.peers.wait(work, rows.device)
            return out


def _bytes(x: Tensor) -> Tensor:
    """Rows as bytes; rows need not be adjacent."""
    if x.stride(-1) != 1:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.uint8)


def _selected(x: Tensor, which: Tensor) -> Tensor:
    """Some rows, of any dtype."""
    return _bytes(x)[which].view(x.dtype)
