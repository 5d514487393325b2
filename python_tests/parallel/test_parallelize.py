"""Training over 2 and 4 ranks by `parallelize`, against one process with all tokens."""

import pytest
from parallelize_checks import CASES
from ranks import run

SCENARIOS = ("cases", "bfloat16", "more")


@pytest.fixture(scope="module")
def found():
    return run([(f"parallelize_checks.{name}", world) for name in SCENARIOS for world in (2, 4)])


@pytest.mark.parametrize("case", CASES)
def test_layouts(found, case):
    for rank, results in enumerate(found[f"parallelize_checks.cases/{CASES[case][0]}"]):
        assert isinstance(results, dict), f"rank {rank} {results}"
        assert results[case] is None, f"rank {rank}: {results[case]}"


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("scenario", SCENARIOS[1:])
def test_others(found, scenario, world):
    for rank, results in enumerate(found[f"parallelize_checks.{scenario}/{world}"]):
        assert isinstance(results, dict), f"rank {rank} {results}"
        assert results and not any(results.values()), f"rank {rank}: {results}"
