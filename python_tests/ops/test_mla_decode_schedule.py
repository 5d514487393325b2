"""How mla_decode divides keys among SMs: the tasks that each CTA computes, emulated without queries or a cache."""

import itertools
import random

import pytest
import torch

from k2kernels import _emu
from k2kernels.ops._launch import Chip

OVERHEAD = 5  # blocks of 64 keys: FlashMLA's figure of what a piece costs beside its keys


def tasks(seq_lens, multiprocessors, *, heads=64, s_q=1, cu_seqlens_q=None, tokens=None, split=0, capacity=None):
    """[(block, sequence, first row, first key, end key, split, number of splits, tile of the workspace)], and the plan.

    A pure function of lengths and sizes: with `cu_seqlens_q` the batch is ragged, else each sequence has s_q queries.
    """
    queries = s_q if cu_seqlens_q is None else 0
    tokens = tokens or len(seq_lens) * s_q
    capacity = capacity or max([64, *seq_lens])
    sizes = tokens, heads, queries, capacity
    plan = _emu.mla_decode_plan_of(Chip(90, multiprocessors, 232448), len(seq_lens), *sizes, 64, split, False, True)
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    offsets = None if cu_seqlens_q is None else torch.tensor(cu_seqlens_q, dtype=torch.int32)
    blocks = plan.teams * plan.team_size
    _emu.configure(90, 0)
    for most in (4 << i for i in itertools.count()):  # tasks of a block
        found = torch.full((blocks, most, 13), -1, dtype=torch.int32)
        _emu.mla_decode_schedule(lengths, offsets, *sizes, plan, found)
        if (found[:, -1] == -1).all():
            break
    rows = []
    for block, place in (found[..., 0] >= 0).nonzero().tolist():
        sequence, _, _, _, first_row, _, first_key, end_key, _, part, parts, partial, _ = found[block, place].tolist()
        rows.append((block, sequence, first_row, first_key, end_key, part, parts, partial))
    return rows, plan


def check(rows, plan, seq_lens):
    """Each tile's keys are worked on once, in splits that the joining finds; no two share a tile of the workspace."""
    team_size, partials = plan.team_size, plan.partials
    tiles = {}
    for _, sequence, first_row, *task in rows:
        tiles.setdefault((sequence, first_row), []).append(task)
    used = []
    for (sequence, _), pieces in tiles.items():
        pieces.sort(key=lambda piece: piece[2])
        assert [piece[2] for piece in pieces] == list(range(len(pieces)))
        assert {piece[3] for piece in pieces} == {len(pieces)}
        ends = [0, *(piece[1] for piece in pieces)]
        assert [piece[0] for piece in pieces] == ends[:-1] and ends[-1] == seq_lens[sequence]
        places = [piece[4] for piece in pieces]
        if len(pieces) == 1:
            assert places == [-1]
        else:
            assert places == list(range(places[0], places[0] + team_size * len(pieces), team_size))
            used += places
    assert len(set(used)) == len(used) and all(0 <= place < partials for place in used)
    return tiles


def measure(pieces):
    """(SMs with work, most blocks of 64 keys on one, most with the overhead of its pieces, split tiles) of pieces
    (SM, sequence, blocks)."""
    blocks, load, parts = {}, {}, {}
    for where, sequence, count in pieces:
        blocks[where] = blocks.get(where, 0) + count
        load[where] = load.get(where, 0) + count + OVERHEAD
        parts[sequence] = parts.get(sequence, 0) + 1
    return len(load), max(blocks.values()), max(load.values()), sum(n for n in parts.values() if n > 1)


def ours(seq_lens, multiprocessors):
    rows, plan = tasks(seq_lens, multiprocessors)
    check(rows, plan, seq_lens)
    return measure([(row[0], row[1], max(1, -(-(row[4] - row[3]) // 64))) for row in rows])


def flash_mla(seq_lens, multiprocessors):
    """FlashMLA's division (csrc/smxx/decode/get_decoding_sched_meta): each SM in turn takes blocks up to an
    equal share of them all, of which each piece uses up OVERHEAD more than its blocks."""
    blocks = [max(1, -(-n // 64)) for n in seq_lens]
    share = -(-sum(n + OVERHEAD for n in blocks) // multiprocessors) + OVERHEAD
    pieces, sequence, done = [], 0, 0
    for where in range(multiprocessors):
        room = share
        while sequence < len(blocks):
            left = blocks[sequence] - done
            if room >= left + OVERHEAD:
                pieces.append((where, sequence, left))
                room -= left + OVERHEAD
                sequence, done = sequence + 1, 0
                continue
            if room > OVERHEAD:
                pieces.append((where, sequence, room - OVERHEAD))
                done += room - OVERHEAD
            break
    assert sequence == len(blocks)
    return measure(pieces)


@pytest.mark.parametrize("multiprocessors", [132, 108, 78])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8, 16, 32, 64, 100, 128, 132, 160, 256])
def test_no_worse_than_flash_mla(batch, multiprocessors):
    for length in (1024, 4096, 8192, 32768) if batch <= 132 else (4096, 16384):
        used, blocks, load, split = ours([length] * batch, multiprocessors)
        theirs = flash_mla([length] * batch, multiprocessors)
        assert used >= theirs[0] and blocks <= theirs[1] and load <= theirs[2]
        # Where it works less on keys it may split more: writing and reading a tile of 64 x 512 floats takes about as
        # long as 1/36 block (config.h).
        assert load + split / 36 <= 1.035 * (theirs[2] + theirs[3] / 36)


@pytest.mark.parametrize("multiprocessors", [132, 78])
@pytest.mark.parametrize("shortest, longest", [(1, 4096), (2048, 6144), (3900, 4200), (0, 40000)])
@pytest.mark.parametrize("batch", [5, 64, 131, 300])
def test_no_worse_than_flash_mla_with_mixed_lengths(batch, shortest, longest, multiprocessors):
    draw = random.Random(batch)
    seq_lens = [draw.randint(shortest, longest) for _ in range(batch)]
    (used, _, load, split), theirs = ours(seq_lens, multiprocessors), flash_mla(seq_lens, multiprocessors)
    assert used >= theirs[0] and load <= theirs[2]
    assert load + split / 36 <= 1.035 * (theirs[2] + theirs[3] / 36)


@pytest.mark.parametrize(
    "batch, length, multiprocessors, want",
    [
        (1, 4096, 132, (64, 1, 6, 64)),  # every SM that a block of keys can be given to has one
        (1, 32768, 132, (128, 4, 9, 128)),
        (4, 4096, 132, (88, 3, 8, 88)),
        (8, 4096, 132, (128, 4, 9, 128)),
        (64, 4096, 132, (128, 32, 37, 128)),  # halves
        (128, 4096, 132, (128, 64, 69, 0)),  # whole sequences
        (256, 4096, 132, (128, 128, 138, 0)),
        (100, 4096, 108, (100, 64, 69, 0)),
        (78, 8192, 78, (78, 128, 133, 0)),
    ],
)
def test_shares_of_equal_sequences(batch, length, multiprocessors, want):
    assert ours([length] * batch, multiprocessors) == want


def best_load(blocks, multiprocessors):
    """The least that the busiest SM can have to do, by trying all ways to cut and to place pieces."""

    def cuts(n, most):
        if n == 0:
            yield ()
        for first in range(min(n, most), 0, -1):
            for rest in cuts(n - first, first):
                yield first, *rest

    def fits(pieces, room):
        if not pieces:
            return True
        tried = set()
        for i, left in enumerate(room):
            if left >= pieces[0] and left not in tried:
                tried.add(left)
                if fits(pieces[1:], (*room[:i], left - pieces[0], *room[i + 1 :])):
                    return True
        return False

    choices = [list(cuts(n, n)) for n in blocks]
    costs = ([x + OVERHEAD for x in itertools.chain(*way)] for way in itertools.product(*choices))
    ways = {tuple(sorted(way, reverse=True)) for way in costs}
    for load in itertools.count(OVERHEAD + 1):
        if any(sum(way) <= load * multiprocessors and fits(way, (load,) * multiprocessors) for way in ways):
            return load


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 5])
def test_near_the_best_that_is_possible(multiprocessors):
    """Equal shares are no longer than the best, but a share may begin inside a turn and pay its overhead again."""
    for blocks in ([1], [7], [12], [1, 6], [5, 5], [2, 9], [1, 1, 7], [4, 4, 4], [6, 1, 5]):
        load = ours([64 * n for n in blocks], multiprocessors)[2]
        assert load <= best_load(blocks, multiprocessors) + OVERHEAD


@pytest.mark.parametrize("split", [0, 64, 200, 100000])
@pytest.mark.parametrize("heads, s_q", [(16, 1), (64, 1), (64, 2), (96, 1), (128, 3)])
@pytest.mark.parametrize("multiprocessors", [1, 7, 40])
def test_all_keys_are_worked_on_once(multiprocessors, heads, s_q, split):
    draw = random.Random(heads * s_q + multiprocessors)
    for batch in (1, 6, 45):
        seq_lens = [draw.choice([0, 1, 64, 65, draw.randint(1, 5000)]) for _ in range(batch)]
        rows, plan = tasks(seq_lens, multiprocessors, heads=heads, s_q=s_q, split=split)
        tiles = check([row for row in rows if row[2] < heads * s_q], plan, seq_lens)  # pairs may have no rows
        assert set(tiles) == {(b, row) for b in range(batch) for row in range(0, heads * s_q, plan.tile_rows)}


@pytest.mark.parametrize("split", [0, 64])
@pytest.mark.parametrize("offsets", [[0, 3, 3, 4, 12], [0, 8, 0, 8, 12], [2, 5, 1, 40, 3], [-7, 3, -1, 2**31 - 1, 9]])
def test_offsets_that_fall_give_no_row_to_two_sequences(offsets, split):
    seq_lens = [400, 0, 70, 1000]
    rows, plan = tasks(seq_lens, 5, heads=40, cu_seqlens_q=offsets, tokens=12, split=split)
    kept = list(itertools.accumulate((min(max(x, 0), 12) for x in offsets), max))
    check(rows, plan, seq_lens)
    owned = {row[1:3] for row in rows}
    want = {(b, row) for b in range(4) for row in range(0, 40 * (kept[b + 1] - kept[b]), plan.tile_rows)}
    assert {tile for tile in owned if tile in want} == want and all(
        tile in want or plan.team_size > 1 for tile in owned
    )


def test_lengths_beyond_the_block_table():
    rows, plan = tasks([2**31 - 1, -5, 70], 6, capacity=640)
    check(rows, plan, [640, 0, 70])


def test_splits_of_a_sequence_do_not_depend_on_the_batch():
    alone, _ = tasks([3000], 132, split=512)
    among, _ = tasks([100, 3000, 5, 70000], 40, split=512)
    pieces = [[(row[3], row[4], row[5]) for row in rows] for rows in (alone, [row for row in among if row[1] == 1])]
    assert sorted(pieces[0]) == sorted(pieces[1])
