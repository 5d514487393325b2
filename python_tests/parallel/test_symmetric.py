"""What is around the kernels of `symmetric`: rendezvous, trial, refusal. Real symmetric memory needs GPUs."""

import pytest
from ranks import run


@pytest.fixture(scope="module")
def seen():
    return run([("symmetric_buffers", 2), ("symmetric_buffers", 3), ("symmetric_is_refused", 3)])


@pytest.mark.parametrize("world", [2, 3])
def test_bits(seen, world):
    assert seen[f"symmetric_buffers/{world}"] == ["the same"] * world


def test_all_ranks_refuse_together(seen):
    reasons = "no luck (rank 1)", "writes do not arrive", "the rendezvous failed: symmetric memory gives 0x"
    for rank, found in enumerate(seen["symmetric_is_refused/3"]):
        assert isinstance(found, list), found
        for i, reason in enumerate(reasons):
            refused, instead = found[2 * i : 2 * i + 2]
            assert refused["type"] == "UnsupportedError"
            assert "transport 'symmetric' does not work here" in refused["message"]
            assert instead["transport"] == "torch"
            assert len(instead["warned"]) == (rank == 0)
            text = refused["message"]
            assert reason in text and (i != 1 or "rank 2" in text)
