"""The `torch` transport with 1 to 6 processes, against one rank with all tokens: bit for bit."""

import pytest
from rank_checks import CHECKS
from ranks import run

RUNS = [("checks", 1), ("checks", 2), ("checks", 3), ("checks", 4), ("checks_on_nodes", 4), ("checks_on_nodes", 6)]


@pytest.fixture(scope="module")
def found():
    return run(RUNS)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("scenario, world", RUNS[:-1])
def test_ranks(found, scenario, world, check):
    for rank, results in enumerate(found[f"{scenario}/{world}"]):
        assert isinstance(results, dict), f"rank {rank} {results}"
        assert results.get(check, "not run: an earlier check failed") is None, f"rank {rank}: {results.get(check)}"


def test_three_nodes(found):
    for rank, results in enumerate(found["checks_on_nodes/6"]):
        assert results == {"check_bits": None, "check_a_token_goes_to_a_node_once": None}, f"rank {rank}: {results}"
