"""MuonClip over 1 to 4 ranks, against one process."""

import pytest
from ranks import run

from k2kernels.model import K2Config, K2Model


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
