"""The `torch` transport with 1 to 4 processes, against one rank with all tokens: bit for bit."""

import pytest
from rank_checks import CHECKS
from ranks import run

WORLDS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def found():
    return run([("checks", world) for world in WORLDS])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("world", WORLDS)
def test_ranks(found, world, check):
    for rank, results in enumerate(found[f"checks/{world}"]):
        assert isinstance(results, dict), f"rank {rank} {results}"
        assert results.get(check, "not run: an earlier check failed") is None, f"rank {rank}: {results.get(check)}"
