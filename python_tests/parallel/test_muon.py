"""MuonClip over 1 to 4 ranks, against one process."""

import pytest
from ranks import run


@pytest.mark.parametrize("world", [1, 2, 4])
def test_given_the_same_gradients_all_is_the_same_to_the_bit(world):
    for rank, found in enumerate(run([("muon_scenarios.same_gradients", world)]).popitem()[1]):
        assert found == "the same", f"rank {rank}: {found}"
