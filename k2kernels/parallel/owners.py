"""Which rank updates which matrix, and what a step of the sharded MuonClip sends: functions of shapes alone.

Letters: W ranks, R rows and n columns of a parameter seen as a matrix [R, n] (a stack [E, m, n] has R = E m).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A matrix that is orthogonalised by itself: rows first .. first + rows - 1 of a parameter."""

    parameter: int  # its number
    first: int
    rows: int
    columns: int

    @property
    def cost(self) -> int:
        """Proportional to the time of Newton-Schulz."""
        return self.rows * self.columns * min(self.rows, self.columns)

    @property
    def elements(self) -> int:
        return self.rows * self.columns


def cut(parameter: int, shape: Sequence[int], rows: Sequence[int] | None) -> list[Part]:
    """The matrices of a parameter [m, n] or [E, m, n] whose matrices are cut into blocks of `rows`."""
    matrices = shape[0] if len(shape) == 3 else 1
    parts, first = [], 0
    for size in list(rows or [shape[-2]]) * matrices:
        parts.append(Part(parameter, first, size, shape[-1]))
        first += size
    return [part for part in parts if part.elements]


def assign(costs: Sequence[int], ranks: int) -> list[int]:
    """An owner for each cost: the largest first, each to the rank with the least so far (the lower rank of equals)."""
    owners = [0] * len(costs)
    loads = [(0, rank) for rank in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = loads[0]
        owners[i] = rank
        heapq.heapreplace(loads, (load + costs[i], rank))
    return owners


def held(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """The first index, and the one after the last, that a rank holds of an axis under Shard: ceil(length / W) each, the
    last ranks fewer or none."""
    each = -(-length // ranks)
    return min(rank * each, length), min((rank + 1) * each, length)


def overlap(part: Part, shape: Sequence[int], ranks: int, rank: int) -> tuple[int, int]:
    """The rows, from the first to the one after the last, that are of `part` and, under Shard(0), on `rank`."""
    each = shape[1] if len(shape) == 3 else 1
    first, end = (row * each for row in held(shape[0], ranks, rank))
    first, end = max(first, part.first), min(end, part.first + part.rows)
    return first, max(first, end)


Round = list[list[Part]]  # of each owner


def rounds(parts: Sequence[Part], owners: Sequence[int], ranks: int, limit: int) -> list[Round]:
    """The parts in rounds, in each of which an owner has at most `limit` elements, or one part.

    Every owner begins with its largest, so that those of a round are of about the same size, and equal shapes meet.
    """
    queues: list[list[Part]] = [[] for _ in range(ranks)]
    order = sorted(zip(parts, owners), key=lambda pair: (-pair[0].cost, pair[0].rows, pair[0]))
    for part, owner in order:
        queues[owner].append(part)
    lists = [list(_filled(queue, limit)) for queue in queues]
    count = max(map(len, lists), default=0)
    return [[queue[i] if i < len(queue) else [] for queue in lists] for i in range(count)]


def _filled(queue: list[Part], limit: int) -> Iterator[list[Part]]:
    some: list[Part] = []
    for part in queue:
        if some and sum(p.elements for p in some) + part.elements > limit:
            yield some
            some = []
        some.append(part)
    if some:
        yield some


class Traffic(NamedTuple):
    """What a rank passes to collectives in one step.

    Bytes from a rank to itself are not counted; those of a broadcast and an all-reduce are counted once at the sender,
    however the library forwards them.
    """

    collectives: int = 0
    sent: int = 0  # bytes
    received: int = 0  # bytes

    def plus(self, collectives: int, sent: int, received: int) -> Traffic:
        return Traffic(self.collectives + collectives, self.sent + sent, self.received + received)


class Kind(NamedTuple):
    """Parameters of one kind and dtype whose matrices have owners.

    Args:
        shapes: parameter -> its shape.
        parts, owners: the matrices, and their owners.
        sharded: the ranks hold Shard(0) of the parameters; else each holds the whole.
        itemsize: bytes of an element.
        weights: the weights are gathered with the gradients: the owner has no master weights.
        limit: elements of an owner in a round.
    """

    shapes: dict[int, tuple[int, ...]]
    parts: list[Part]
    owners: list[int]
    sharded: bool
    itemsize: int
    weights: bool
    limit: int


def traffic(of: Kind, ranks: int) -> list[Traffic]:
    """What each rank sends and receives in a step in which every parameter has a gradient."""
    totals = [Traffic()] * ranks
    gathered = (2 if of.weights else 1) * of.itemsize
    for one in rounds(of.parts, of.owners, ranks, of.limit):
        sent, received, collectives = [0] * ranks, [0] * ranks, 0
        if of.sharded:
            collectives = 2  # gradients to owners, weights back
            for owner, parts in enumerate(one):
                for part in parts:
                    for rank in range(ranks):
                        first, end = overlap(part, of.shapes[part.parameter], ranks, rank)
                        if rank != owner:
                            elements = (end - first) * part.columns
                            sent[rank] += elements * gathered
                            received[owner] += elements * gathered
                            sent[owner] += elements * of.itemsize
                            received[rank] += elements * of.itemsize
        else:
            for owner, parts in enumerate(one):
                size = sum(part.elements for part in parts) * of.itemsize
                collectives += 1 if size else 0
                sent[owner] += size
                for rank in range(ranks):
                    received[rank] += 0 if rank == owner else size
        totals = [t.plus(collectives, s, r) for t, s, r in zip(totals, sent, received)]
    return totals
