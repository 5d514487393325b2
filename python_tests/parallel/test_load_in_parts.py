"""Models that FSDP and expert parallelism have distributed, filled from files and saved: bits, bytes read, memory."""

import pytest
from load_scenarios import HOW
from ranks import run

RUNS = [("load_scenarios.load", 2), ("load_scenarios.load_ep_2", 2), ("load_scenarios.load_ep_2", 4)]


@pytest.fixture(scope="module")
def found():
    return run([*RUNS, ("load_scenarios.stages", 2), ("load_scenarios.stages", 4)])


@pytest.mark.parametrize("check", ["check_load", "check_errors"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("scenario, world", RUNS)
def test_parts(found, scenario, world, how, check):
    for rank, results in enumerate(found[f"{scenario}/{world}"]):
        assert isinstance(results, dict), f"rank {rank} {results}"
        result = results.get(f"{how}: {check}", "not run: an earlier check failed")
        assert result is None, f"rank {rank}: {result}"


@pytest.mark.parametrize("world", [2, 4])
def test_stages_of_a_pipeline(found, world):
    assert found[f"load_scenarios.stages/{world}"] == ["read"] * world
