"""Packed 4-bit experts over 2 processes."""

from ranks import run


def test_ranks_read_and_keep_their_packed_experts():
    for rank, result in enumerate(run([("w4_checks.w4_files", 2)])["w4_checks.w4_files/2"]):
        assert result == "done", f"rank {rank} {result}"
