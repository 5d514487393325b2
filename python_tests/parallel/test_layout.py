"""Models over 2 and 4 processes: against one process, and their files against those of a whole model."""

import pytest
from layout_checks import LAYOUT_CHECKS, OF_FILES
from ranks import run

RUNS = [(scenario, world) for scenario in ("layout_steps", "layout_files") for world in (2, 4)]


@pytest.fixture(scope="module")
def found():
    return run(RUNS)


@pytest.mark.parametrize("check", LAYOUT_CHECKS)
@pytest.mark.parametrize("world", [2, 4])
def test_layout(found, world, check):
    scenario = "layout_files" if check in OF_FILES else "layout_steps"
    for rank, results in enumerate(found[f"{scenario}/{world}"]):
        assert isinstance(results, dict), f"rank {rank} {results}"
        assert results.get(check, "not run: an earlier check failed") is None, f"rank {rank}: {results.get(check)}"
