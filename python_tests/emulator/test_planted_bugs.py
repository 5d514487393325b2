"""Every planted bug is caught: by a report that names the line marked `@<bug>` in the kernel, or by wrong numbers.

A bug need not show under every schedule; it must show under one of the four schedules of seeds 0 to 3.
"""

import re

import numpy as np
import pytest
from emulated_kernels import KERNELS, SCHEDULES, EmulatorError, from_bf16, run, to_bf16

WRONG = "wrong numbers"

# kernel: {bug: part of the report, WRONG, or None where the schedule decides which of the two}
BUGS = {
    "gemm_mma": {
        1: WRONG,  # no wait for cp.async
        2: WRONG,  # no barrier after the wait
        3: WRONG,  # no barrier before the stage is overwritten
        4: WRONG,  # another swizzle for reading
        5: "access beyond a global allocation",  # rows beyond the matrix
        6: WRONG,  # the last group is not waited for
        7: "sync_block is reached from two places",  # a barrier that one warp skips
        8: "is not a multiple of 16",  # misaligned cp.async
    },
    "gemm_wgmma": {
        1: "mbarrier arrive: 1 arrivals, 0 of the phase's 1 are missing",  # no wait for full
        2: "in flight",  # parity never flips
        3: "0 of the phase's 1 are missing",  # no wait for empty
        4: WRONG,  # the map's swizzle is not the descriptor's
        5: "16 bytes to come",  # expects too many bytes
        6: "in flight",  # expects too few
        7: "overwritten while a wgmma read it",  # releases a stage before its wgmma is done
        8: WRONG,  # reads accumulators before wgmma_wait
        9: "without wgmma_fence",
        10: "wgmma",  # descriptors advance too far along K
        11: "1 of 3 arrivals missing",  # counts a warpgroup too many
        12: "not initialised",  # barriers are used before they are made
        13: "access beyond a global allocation",  # stores rows beyond the matrix
        14: "0 of the phase's 1 are missing",  # waits for the other parity
        15: None,  # arrives 128 times: over-arrival or a phase too early
        16: "see different operands",  # one warp releases for four
        17: "access beyond a global allocation",  # a map taller than the tensor
        18: "is not a multiple of 1024",  # misaligned tile
        19: "16384 bytes to come",  # half of the copies are not issued
        20: "1 of 2 arrivals missing",  # one arrival is lost
        21: "setmaxnreg for registers that no warp releases",  # the producer keeps its registers
        22: "not executed by all four warps",  # one warp of the producer gives them back
    },
    "thread_operands": {
        30: "without fence.proxy.async",
        31: "see different operands",  # no barrier after writing operands
        32: "accumulator registers of a wgmma in flight were written",
    },
    "dsmem": {
        33: WRONG,  # no cluster barrier before reading the other block
        34: "shared memory of a block that has ended",  # nor before ending
        52: "is not in this block's shared memory",  # the shared-space address of another block's
    },
    "reverse": {
        35: WRONG,  # no sync_warp
        36: "wrote outside its 128 bytes of shared memory",
        37: "misaligned vector access",
        38: "sync_warp",  # half a warp only
    },
    "double_tiles": {
        39: WRONG,  # no wait for the tile
        40: "without fence.proxy.async",
        41: None,  # no barrier before the store
        42: "without committing its bulk store",
        43: "ends while its bulk store reads",
        44: "overwritten while a bulk store read it",
    },
    "exchange": {
        45: WRONG,  # data after the flag
        46: "only poll, and nothing changes",  # a flag nobody raises
        56: "only poll, and nothing changes",  # not launched as cooperative
    },
    "split_sum": {
        53: WRONG,  # no barrier before the ticket
        54: WRONG,  # a part written after the ticket
        55: WRONG,  # a ticket counter that is not reset: the second launch has no last block
    },
    "pass_on": {
        57: "not initialised",  # barriers of another block are used before they are made
        58: None,  # overwrites what the neighbour reads
        59: None,  # no wait for the row
    },
    "count_threads": {47: WRONG},  # load and store instead of an atomic
    "handover": {
        48: WRONG,  # overwrites what is being read
        49: "threads expected here",  # two counts for one barrier
        50: "deadlock",  # one side never arrives
    },
    "warp_sum": {51: WRONG},  # no barrier between writing and reading the warps' sums
    "defined": {  # what PTX leaves undefined, though a chip may do what was meant
        60: "to the block itself",
        61: "in a cluster of one block",
        62: "of an mbarrier; mbarrier_inval comes before",
        63: "no thread has seen the end of the phase before",
        64: "17 of 16 bytes",
        65: "another one of the same group",
        66: "before all four warps have executed the last one",
        67: "lanes of one warp come from two places",
        68: "is not initialised",  # a number whose bits are those of an mbarrier
        69: "another block's mbarrier",
        70: "from another block's shared memory",
    },
}


def launch(kernel, bug, seed):
    """Whether the kernel's numbers are right."""
    rng = np.random.default_rng(bug)

    def empty(*shape):
        return np.full(shape, np.nan, np.float32)

    def integers(*shape):
        return rng.integers(-4, 5, shape).astype(np.float32)

    def go(*arguments):
        run(kernel, *arguments, seed=seed, bug=bug)

    if kernel.startswith("gemm"):
        m, n, k = 70, 100, 328
        a, b, c = to_bf16(rng.standard_normal((m, k))), to_bf16(rng.standard_normal((n, k))), empty(m, n)
        go(a, b, c, m, n, k)
        return np.abs(c - from_bf16(a) @ from_bf16(b).T).max() < 1e-4
    if kernel == "thread_operands":
        a, b, c = integers(64, 64), integers(64, 64), empty(64, 64)
        go(to_bf16(a), to_bf16(b), c)
        return (c == a @ b.T).all()
    if kernel == "dsmem":
        x, result = integers(512), empty(1)
        go(x, result, 512)
        return result[0] == x.sum()
    if kernel == "reverse":
        x, y = integers(32), empty(32)
        go(x, y)
        return (y == x[::-1]).all()
    if kernel == "double_tiles":
        x, y = integers(21, 44), empty(21, 44)
        go(x, y, 21, 44)
        return (y == 2 * x).all()
    if kernel == "exchange":
        values, flags, sums = empty(9), np.zeros(9, np.uint32), empty(8)
        go(values, flags, sums, 8, 1 if bug == 56 else 2)
        return (sums == 36).all()
    if kernel == "split_sum":
        x, tickets, right = integers(3, 5, 64), np.zeros(3, np.uint32), True
        for _ in range(2):  # the second launch finds the tickets as the first has left them
            sums = empty(3, 64)
            go(x, empty(3, 5, 64), tickets, sums, 3, 5)
            right &= (sums == x.sum(1)).all()
        return right
    if kernel == "pass_on":
        x, y = integers(4, 3, 32), empty(4, 3, 32)
        go(x, y, 3)
        return (y == np.roll(x, 1, axis=0)).all()
    if kernel == "count_threads":
        counter = np.zeros(1, np.uint32)
        go(counter, 3)
        return counter[0] == 3 * 64
    if kernel == "handover":
        x, y = integers(5, 32), empty(5, 32)
        go(x, y, 5)
        return (y == x[:, ::-1]).all()
    if kernel == "defined":
        x, y = rng.integers(0, 1 << 20, (2, 32, 4), np.uint32), np.zeros((2, 32, 4), np.uint32)
        go(x, y)
        x[..., 0] += np.arange(32, dtype=np.uint32)
        return (y == x[::-1]).all()
    x, sums = integers(3, 1024), empty(3)
    go(x, sums, 3)
    return (sums == x.sum(1)).all()


def marked_lines(bug):
    """`file:line` of each `@bug` in the kernels."""
    for path in KERNELS.glob("*.cu"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(rf"//.*@{bug}\b", line):
                yield f"{path.name}:{number}"


@pytest.mark.parametrize(
    "kernel, bug, expected", [(kernel, bug, text) for kernel, bugs in BUGS.items() for bug, text in bugs.items()]
)
def test_planted_bug_is_caught(kernel, bug, expected):
    reports, wrong = [], False
    for seed in SCHEDULES.values():
        try:
            wrong |= not launch(kernel, bug, seed)
        except EmulatorError as error:
            reports.append(str(error))
    if expected in (WRONG, None):
        assert wrong or (expected is None and reports), "not noticed"
        return
    # GEMM bugs 1 to 8 exist in both kernels: the marks are told apart by the file's name
    lines = [line for line in marked_lines(bug) if not kernel.startswith("gemm") or line.startswith(kernel)]
    told = [r for r in reports if expected in r and (not lines or any(line in r for line in lines))]
    assert told, "\n".join(reports) or "not noticed"


@pytest.mark.parametrize("seed", SCHEDULES.values(), ids=SCHEDULES)
def test_what_is_defined_is_accepted(seed):
    assert launch("defined", 0, seed)


def test_there_are_enough():
    assert sum(len(bugs) for bugs in BUGS.values()) >= 30
    marked = [
        b for kernel in BUGS for b, text in BUGS[kernel].items() if text and text is not WRONG and list(marked_lines(b))
    ]
    assert len(marked) >= 20, "reports are compared with a line"
