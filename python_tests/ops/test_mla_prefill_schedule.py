"""In which order mla_prefill's CTAs take tiles: the task of each ticket, emulated without queries or keys."""

import heapq
import random

import pytest
import torch

from k2kernels import _emu
from k2kernels.ops._launch import Chip

FIELDS = ("head", "first_query", "queries", "first_key", "keys", "tile", "rows", "diagonal", "last")


def tasks(lengths_q, lengths_k, *, heads=2, group=2, causal=True, over_keys=False, rows=128, padding=0, diagonal=None):
    """The tasks of tickets 0, 1, ..., as dicts, up to the last."""
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (lengths_q, lengths_k))
    tokens = (int(cu_q[-1]) + padding, int(cu_k[-1]) + padding)
    most = heads * ((tokens[1] if over_keys else tokens[0]) // rows + len(lengths_q) + 1)  # config.h: most_tasks
    found = torch.full((most + 1, len(FIELDS)), -1, dtype=torch.int32)
    _emu.configure(90, 0)
    _emu.mla_prefill_schedule(cu_q, cu_k, diagonal, *tokens, heads, group, causal, over_keys, rows, found)
    found[:, -1] &= 0xFF  # a bool
    named = [dict(zip(FIELDS, row)) for row in found.tolist()]
    count = next(i for i, task in enumerate(named) if task["last"])
    assert all(task["last"] for task in named[count:])
    return named[:count]


def cost(task, over_keys):
    """Pairs of rows that a tile visits, in tiles."""
    if over_keys:
        first = min(max(task["tile"] - task["diagonal"], 0), task["queries"])
        return task["queries"] - first
    return min(max(task["tile"] + task["rows"] + task["diagonal"], 0), task["keys"])


MANY = [random.Random(i).randrange(400) for i in range(70)]
BATCHES = {
    "one": ([1000], [1000]),
    "one tile": ([7], [7]),
    "after a context": ([300], [5000]),
    "more queries than keys": ([1500], [200]),
    "mixed": ([1000, 1, 0, 129, 2048, 64], [1000, 4000, 300, 129, 2048, 0]),
    "many": (MANY, MANY),
    "nothing": ([], []),
    "empty": ([0, 0], [0, 5]),
}


@pytest.mark.parametrize("over_keys, rows", [(False, 128), (False, 64), (True, 64)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_tile_once_and_the_longest_first(batch, causal, over_keys, rows):
    lengths_q, lengths_k = BATCHES[batch]
    heads, group, padding = 5, 2, 100
    got = tasks(
        lengths_q, lengths_k, heads=heads, group=group, causal=causal, over_keys=over_keys, rows=rows, padding=padding
    )
    want, q, k = set(), 0, 0
    for s_q, s_k in [*zip(lengths_q, lengths_k), (0, padding) if over_keys else (padding, 0)]:
        length = s_k if over_keys else s_q
        for tile in range(0, length, rows):
            for head in range(heads):
                diagonal = s_k - s_q if causal else s_k
                want.add((head, q, s_q, k, s_k, tile, min(rows, length - tile), diagonal, 0))
        q, k = q + s_q, k + s_k
    assert len(got) == len(want) and {tuple(task.values()) for task in got} == want
    # Groups of heads one after the other, and in each the longest tiles first: levels are exact to one tile.
    groups = [task["head"] // group for task in got]
    assert groups == sorted(groups)
    for number in set(groups):
        costs = [cost(task, over_keys) for task, of in zip(got, groups) if of == number]
        assert all(later <= earlier + rows for i, earlier in enumerate(costs) for later in costs[i : i + 50])


def test_a_diagonal_moves_the_levels():
    lengths_q, lengths_k = [256, 256], [512, 512]
    diagonal = torch.tensor([-1000, 256], dtype=torch.int32)
    got = tasks(lengths_q, lengths_k, diagonal=diagonal)
    assert [task["diagonal"] for task in got] == [256] * 4 + [-1000] * 4
    assert [cost(task, False) for task in got] == [512, 512, 384, 384, 0, 0, 0, 0]


@pytest.mark.parametrize("bogus", [[0, 50, 20, 30], [-5, 10, 20, 30], [0, 10, 20, 1 << 30]], ids=str)
def test_bogus_offsets_stay_inside_the_tensors(bogus):
    """A GPU's cu_seqlens are not checked by the host."""
    cu = torch.tensor(bogus, dtype=torch.int32)
    for over_keys in (False, True):
        found = torch.full((40, len(FIELDS)), -1, dtype=torch.int32)
        _emu.mla_prefill_schedule(cu, cu, None, 30, 30, 2, 2, True, over_keys, 64, found)
        for task in (dict(zip(FIELDS, row)) for row in found.tolist()):
            if task["last"] & 0xFF:
                break
            assert 0 <= task["first_query"] and task["first_query"] + task["queries"] <= 30
            assert 0 <= task["first_key"] and task["first_key"] + task["keys"] <= 30


@pytest.mark.parametrize("length", [546, 600, 700, 800, 1500, 2048, 4096, 8192])
@pytest.mark.parametrize("capability, rows", [(90, 128), (80, 64)])
def test_groups_of_heads_are_of_about_equal_size(length, capability, rows):
    """64 heads in the groups of the plan. Tiles that fit a wave or two leave SMs idle; uneven groups add to it."""
    q, kv = torch.empty(length, 64, 192).bfloat16(), torch.empty(length, 64, 256).bfloat16()
    chip = Chip(capability, 132, 232448)
    plan = _emu.mla_prefill_plan(chip, q, kv, None, torch.empty(length, 64).bfloat16())
    assert plan.kernel == ("sm90" if capability == 90 else "sm80")
    groups = -(-64 // plan.heads_per_group)
    assert 64 - (groups - 1) * plan.heads_per_group > plan.heads_per_group - groups
    got = tasks([length], [length], heads=64, group=plan.heads_per_group, rows=rows)
    times = [cost(task, False) + rows for task in got]
    ends = [0] * 132
    for time in times:
        heapq.heapreplace(ends, ends[0] + time)
    assert max(ends) <= 1.13 * max(sum(times) / 132, max(times))


@pytest.mark.parametrize("lengths", [[8192], [2048] * 4, [32768], [100, 3000, 500, 8000, 20]], ids=str)
@pytest.mark.parametrize("over_keys, rows", [(False, 128), (True, 64)])
def test_tickets_balance_132_multiprocessors(lengths, over_keys, rows):
    """The longest SM against the mean, of CTAs that take the next ticket when they are done: a model of time."""
    got = tasks(lengths, lengths, heads=16, group=4, over_keys=over_keys, rows=rows)
    times = [cost(task, over_keys) + rows for task in got]
    ends = [0] * 132
    for time in times:
        heapq.heapreplace(ends, ends[0] + time)
    ideal = max(sum(times) / 132, max(times))
    assert max(ends) <= 1.06 * ideal
