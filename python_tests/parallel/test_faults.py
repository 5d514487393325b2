"""Ranks that die, stop, come late or not at all: the others end in time, with a message that names them."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from ranks import run

FAULTS = [
    ("killed", 3),
    ("killed_on_nodes", 4),
    ("silent", 3),
    ("silent_on_nodes", 4),
    ("stopped_in_backward", 3),
    ("absent", 2),
]


@pytest.fixture(scope="module")
def seen():
    return run(FAULTS)


def check_timeout(seen, phase, ranks, epoch, seconds):
    assert seen["type"] == "PeerTimeout", seen
    assert (seen["phase"], seen["ranks"], seen["epoch"]) == (phase, ranks, epoch), seen
    assert seen["seconds"] < seconds, seen


@pytest.mark.parametrize("scenario, others", [("killed/3", (0, 2)), ("killed_on_nodes/4", (0, 2, 3))])
def test_a_killed_rank_is_named_and_the_others_go_on_without_it(seen, scenario, others):
    ranks = seen[scenario]
    assert ranks[1] == "ended with -9"
    for rank in others:
        assert isinstance(ranks[rank], dict), ranks[rank]
        first, again = ranks[rank]["seen"]
        check_timeout(first, "dispatch", [1], 3, 2)
        assert f"rank {rank} timed out in 'dispatch', epoch 3: rank 1 without heartbeat" in first["message"]
        check_timeout(again, "dispatch", [1], 3, 0.5)
        assert "this ExpertParallel cannot continue: mask the rank, or make a new group" in again["message"]


@pytest.mark.parametrize("scenario, others", [("silent/3", (0, 1)), ("silent_on_nodes/4", (0, 1, 3))])
def test_a_late_rank_is_named_by_the_others_and_told(seen, scenario, others):
    ranks = seen[scenario]
    for rank in others:
        check_timeout(ranks[rank], "dispatch", [2], 3, 1.5 * 2)
        assert "rank 2 late, although alive (rank 2 at 'dispatch backward', epoch 2)" in ranks[rank]["message"]
    check_timeout(ranks[2], "dispatch", [2], 3, 1.5 * 2)
    assert "the others treat this rank as missing" in ranks[2]["message"]


def test_who_only_waits_for_a_late_rank_is_not_blamed():
    from k2kernels.parallel.peers import Peers

    peers, counts = object.__new__(Peers), itertools.count()
    peers.rank, peers.live, peers._store = 3, [0, 1, 2, 3], torch.distributed.HashStore()
    peers._heartbeat = SimpleNamespace(interval=0.001, calls=7)
    peers._heartbeats = lambda ranks: {
        0: (next(counts), 6, "here"),
        1: (next(counts), 7, ""),
        2: (next(counts), 5, "there"),
    }
    assert peers._culprit() == ((2,), "rank 2 late, although alive (rank 2 at there)")


def test_a_rank_that_stops_in_a_backward_pass_is_named(seen):
    ranks = seen["stopped_in_backward/3"]
    assert ranks[0] == "ended with -9"
    for rank in (1, 2):
        check_timeout(ranks[rank], "combine backward", [0], 1, 1.5 * 2)


def test_a_rank_that_never_comes_is_named(seen):
    check_timeout(seen["absent/2"][0], "config", [1], 0, 2)
    assert "rank 1 did not respond within 1 s" in seen["absent/2"][0]["message"]


@pytest.mark.parametrize("variable", ["K2K_PARALLEL_INIT_TIMEOUT", "K2K_PARALLEL_STEP_TIMEOUT"])
def test_timeouts_come_from_arguments_then_the_environment(variable, monkeypatch):
    from k2kernels.parallel.peers import timeouts

    assert timeouts(None, None) == (30, 10)
    monkeypatch.setenv(variable, "2.5")
    assert sorted(timeouts(None, None)) == ([2.5, 10] if "INIT" in variable else [2.5, 30])
    assert timeouts(3, 4) == (3, 4)
    with pytest.raises(ValueError, match=r"timeouts must be more than 0 seconds, got 0 and"):
        timeouts(0, None)
