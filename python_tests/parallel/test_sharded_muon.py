"""MuonClip over 1 to 4 ranks, against one process."""

import re

import pytest
import torch
from ranks import run

from k2kernels.model import K2Config, K2Model
from k2kernels.parallel import muon_traffic
from k2kernels.parallel.owners import assign, cut, held, overlap, rounds


def found_by_ranks(scenario, world):
    return run([(f"muon_scenarios.{scenario}", world)]).popitem()[1]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_given_the_same_gradients_all_is_the_same_to_the_bit(world):
    for rank, found in enumerate(found_by_ranks("same_gradients", world)):
        assert found == "the same", f"rank {rank}: {found}"


def tolerance(longest, steps=3, lr=0.02):
    """Largest difference of a weight in float64 whose gradients differ by rounding.

    An update is lr 0.2 sqrt(max(m, n)) NewtonSchulz(M / |M|), whose singular values grow by at most 3.4445 in each of
    five iterations, and so does a difference. Gradients are taken to differ by 2^12 roundings of 2^-53, relative to
    their norm: their sums over tokens, channels and layers have up to some thousand terms.
    """
    return steps * lr * 0.2 * longest**0.5 * 3.4445**5 * 2**12 * 2**-53


@pytest.mark.parametrize("scenario, world", [("models", 2), ("models", 4), ("preset", 2)])
def test_a_model_is_that_of_one_process(scenario, world):
    for rank, found in enumerate(found_by_ranks(scenario, world)):
        assert isinstance(found, dict), f"rank {rank}: {found}"
        for how, seen in found.items():
            assert seen["clips"] > 0 and seen["moved"] > 1e-2, f"rank {rank}, {how}: {seen}"
            assert seen["worst"] < tolerance(seen["longest"]) < 1e-9, f"rank {rank}, {how}: {seen}"


@pytest.mark.parametrize(
    "scenarios",
    [
        [("save", 2), ("resume", 1), ("resume_plain", 1), ("resume", 4)],
        [("save_plain", 1), ("resume", 2)],
        [("save", 4), ("resume", 2)],
    ],
    ids=["2 to 1 and 4", "one process to 2", "4 to 2"],
)
def test_a_checkpoint_goes_on_at_another_world_size(scenarios, tmp_path, monkeypatch):
    monkeypatch.setenv("K2K_TEST_CHECKPOINTS", str(tmp_path))
    for scenario, found in run([(f"muon_scenarios.{name}", world) for name, world in scenarios]).items():
        for rank, what in enumerate(found):
            assert what == ("saved" if "save" in scenario else "the same"), f"{scenario}, rank {rank}: {what}"


@pytest.mark.parametrize("world", [2, 3])
def test_traffic_is_what_is_sent(world):
    for rank, found in enumerate(found_by_ranks("sent", world)):
        assert isinstance(found, dict), f"rank {rank}: {found}"
        for how, (counted, computed) in found.items():
            assert counted == computed, f"rank {rank}, {how}"


@pytest.mark.parametrize("world", [2, 4])
def test_planted_faults_are_seen(world):
    for rank, found in enumerate(found_by_ranks("faults", world)):
        assert isinstance(found, dict), f"rank {rank}: {found}"
        for fault, seen in found.items():
            assert seen == (not fault.startswith("nothing")), f"rank {rank}: {fault}"


SHARDED = r"ValueError: MuonClip: a \[.*\] must be whole on every rank, Shard\(0\) of a matrix over the 2 ranks"
MESSAGES = {
    "columns": SHARDED,
    "two dimensions": SHARDED,
    "rows of a stack": SHARDED,
    "target": SHARDED,
    "partial": r"ValueError: MuonClip: a must be replicated or sharded, got \(Partial",
    "fsdp1": "ValueError: MuonClip: a must be a whole parameter, got a shard",
    "mesh": r"ValueError: MuonClip: mesh must have one dimension, got 2",
    "no mesh": "TypeError: MuonClip: mesh must be a DeviceMesh or a Layout, got",
    "capturable": "UnsupportedError: MuonClip: capturable must not be True over ranks",
    "local": r"ValueError: MuonClip: local match no parameter: 'b\.\*'",
    "optim": r"ValueError: MuonClip: a must be a whole parameter.* take k2kernels.parallel.MuonClip",
    "derived": "TypeError: Derived: mesh must be None; derive from k2kernels.parallel.MuonClip",
    "add": "UnsupportedError: MuonClip.add_param_group: owners are chosen on construction",
    "gradient on some ranks": "ValueError: MuonClip: a must have an averaged gradient on every rank",
}


def test_messages():
    for rank, found in enumerate(found_by_ranks("refused", 2)):
        assert isinstance(found, dict), f"rank {rank}: {found}"
        assert found.keys() == MESSAGES.keys()
        for case, message in found.items():
            assert re.match(MESSAGES[case], message), f"rank {rank}, {case}: {message}"


def test_overflow_on_one_rank_skips_the_step_on_all():
    assert found_by_ranks("overflow", 2) == ["skipped"] * 2


# ---- owners and traffic, without ranks


def test_owners_are_balanced():
    assert assign([7, 9, 2, 2, 5], 2) == [1, 0, 0, 0, 1]  # 9 + 2 + 2 and 7 + 5
    assert assign([4, 4, 4], 5) == [0, 1, 2]
    costs = [part.cost for i in range(40) for part in cut(i, (64 + i, 32), None)]
    loads = [0] * 7
    for cost, owner in zip(costs, assign(costs, 7)):
        loads[owner] += cost
    assert max(loads) - min(loads) <= max(costs)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", [(11, 3), (2, 5), (1, 4), (3, 6, 5)])
def test_shards_are_those_of_torch(shape, ranks):
    chunks = torch.arange(shape[0]).chunk(ranks)
    for rank in range(ranks):
        first, end = held(shape[0], ranks, rank)
        assert list(range(first, end)) == (chunks[rank].tolist() if rank < len(chunks) else [])
    for part in cut(0, shape, [shape[-2] - 1, 1] if shape[-2] > 1 else None):
        rows = [row for rank in range(ranks) for row in range(*overlap(part, shape, ranks, rank))]
        assert rows == list(range(part.first, part.first + part.rows))


def test_rounds_have_every_part_once_and_a_bound():
    parts = [part for i in range(9) for part in cut(i, (3 + i, 7), None)]
    owners = assign([part.cost for part in parts], 3)
    found = rounds(parts, owners, 3, 60)
    assert sorted(part for one in found for some in one for part in some) == sorted(parts)
    for one in found:
        for owner, some in enumerate(one):
            assert len(some) == 1 or sum(part.elements for part in some) <= 60
            assert all(owners[part.parameter] == owner for part in some)


@pytest.mark.parametrize(
    "ranks, collectives, sent, received", [(16, 39, 2.12, 2.12), (64, 11, 0.58, 0.58), (256, 5, 0.32, 0.32)]
)
def test_traffic_of_kimi_k2(ranks, collectives, sent, received):
    """docs/training.md has these: bf16 weights sharded by fully_shard, experts on their ranks; GiB of the busiest."""
    with torch.device("meta"):
        model = K2Model(K2Config.preset("kimi-k2")).to(torch.bfloat16)
    found = muon_traffic(model, ranks)
    assert {one.collectives for one in found} == {collectives}
    assert max(one.sent for one in found) / 2**30 == pytest.approx(sent, abs=0.006)
    assert max(one.received for one in found) / 2**30 == pytest.approx(sent, abs=0.006)
    assert sum(one.sent for one in found) == sum(one.received for one in found)
