"""Models over 2 and 4 processes: against one process, and their files against those of a whole model."""

import pytest
from layout_checks import LAYOUT_CHECKS
from ranks import run


@pytest.fixture(scope="module")
def found():
    return run([("layouts", 2), ("layouts", 4)])


@pytest.mark.parametrize("check", LAYOUT_CHECKS)
@pytest.mark.parametrize("world", [2, 4])
def test_layout(found, world, check):
    for rank, results in enumerate(found[f"layouts/{world}"]):
        assert isinstance(results, dict), f"rank {rank} {results}"
        assert results.get(check, "not run: an earlier check failed") is None, f"rank {rank}: {results.get(check)}"
