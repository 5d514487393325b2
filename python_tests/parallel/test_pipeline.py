"""Pipelines of 2 and 4 processes, against one process with all tokens."""

import pytest
from ranks import run
from test_sharded_muon import tolerance

SCENARIOS = [("schedules", 2), ("experts", 4), ("mtp", 2), ("fsdp", 4)]


@pytest.mark.parametrize("scenario, world", SCENARIOS)
def test_a_pipeline_is_one_process(scenario, world):
    """Losses, gradients, statistics in each of three steps; weights after them."""
    clips = {}
    found = run([(f"pipeline_scenarios.{scenario}", world)]).popitem()[1]
    for rank, results in enumerate(found):
        assert isinstance(results, dict), f"rank {rank}: {results}"
        for schedule, seen in results.items():
            assert seen["moved"] > 1e-2, f"rank {rank}, {schedule}: {seen}"
            assert seen["worst"] < tolerance(seen["longest"]) < 1e-9, f"rank {rank}, {schedule}: {seen}"
            clips[schedule] = clips.get(schedule, 0) + seen["clips"]
    assert all(clips.values()), clips
