"""QK-Clip on two ranks that hold copies of one model: clipped alike by the maxima of both, as MuonClip's page says."""

from ranks import run


def test_copies_stay_equal():
    for rank, found in enumerate(run([("clipped_copies", 2)])["clipped_copies/2"]):
        assert isinstance(found, dict), f"rank {rank} {found}"
        assert "must be those of all 2 ranks" in found["refused"]
        assert found["clips"] > 0 and found["parted"] == [], f"rank {rank}: {found}"
