"""The grouped matrix products of unquantised experts, by kernels in the emulator: forward and both gradients."""

import math

import pytest
import torch

import k2kernels
from k2kernels import _emu
from k2kernels.ops import grouped_gemm
from k2kernels.testing.compare import check_close, check_op
from k2kernels.testing.inputs import guarded

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SCHEDULES = [("sm_80", 0), ("sm_90a", 1), ("sm_80", 2), ("sm_90a", 3)]
CANARY = 0xAB

in_all_schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s[0]}-{s[1]}")


class Groups:
    """Rows of each group from multiples of `alignment` on, `behind` more rows after all of them."""

    def __init__(self, counts, alignment=1, behind=0):
        self.sizes = counts
        aligned = [-(-count // alignment) * alignment for count in counts]
        starts = [sum(aligned[:g]) for g in range(len(counts) + 1)]
        self.offsets, self.counts = (torch.tensor(x, dtype=torch.int32) for x in (starts, counts))
        self.rows = starts[-1] + behind
        self.slices = [slice(start, start + count) for start, count in zip(starts, counts)]
        self.real = torch.zeros(self.rows, dtype=torch.bool)
        for group in self.slices:
            self.real[group] = True

    def random(self, columns, dtype):
        """Rows; NaN where there is no group."""
        x = torch.full((self.rows, columns), math.nan, dtype=dtype)
        x[self.real] = torch.randn(int(self.real.sum()), columns).to(dtype)
        return x


def products(kind, groups, a, b, dtype):
    """By torch.mm in `dtype`, group by group; rows of no group are left out."""
    a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
    if kind == WGRAD:
        return torch.stack([a[g].T @ b[g] for g in groups.slices])
    factors = b if kind == DGRAD else b.mT
    return torch.cat([a[g] @ factor for g, factor in zip(groups.slices, factors)])


def operands(kind, groups, n, k, dtype):
    weight = torch.randn(len(groups.sizes), n, k).to(dtype)
    if kind == FORWARD:
        return groups.random(k, dtype), weight
    return groups.random(n, dtype), groups.random(k, dtype) if kind == WGRAD else weight


def multiply(kind, groups, a, b, schedule):
    """D by the kernel, in guarded memory that held canaries."""
    if kind == WGRAD:
        shape = len(groups.sizes), a.shape[1], b.shape[1]
    else:
        shape = groups.rows, b.shape[1] if kind == FORWARD else b.shape[2]
    d = guarded(torch.full((math.prod(shape) * 2,), CANARY, dtype=torch.uint8)).view(a.dtype).view(shape)
    before = k2kernels.launch_count(kind)
    with k2kernels.emulated(schedule[0], seed=schedule[1]):
        grouped_gemm._launching(kind)(d, a, b, guarded(groups.offsets), guarded(groups.counts))
    assert k2kernels.launch_count(kind) == before + (d.numel() > 0)
    return d


def check(kind, groups, a, b, schedule):
    d = multiply(kind, groups, a, b, schedule)
    if kind != WGRAD:
        assert (d[~groups.real].view(torch.uint8) == CANARY).all()
        d = d[groups.real]
    elif (empty := groups.counts == 0).any():
        assert (d[empty] == 0).all()
    check_close(d, products(kind, groups, a, b, torch.float64), same_precision=products(kind, groups, a, b, a.dtype))


# Groups, N, K: up to 32 rows a group by the small tile, else by the large one.
CASES = {
    "few rows": (Groups([1, 0, 16, 17, 3, 0], 1), 136, 200),
    "few rows, aligned": (Groups([5, 0, 0, 33, 2], 16, 32), 264, 64),
    "many empty": (Groups([0] * 40 + [2] + [0] * 30 + [1, 0], 8), 128, 72),
    "hot": (Groups([0, 300, 1], 1, 5), 144, 104),
    "large": (Groups([129, 0, 64, 127], 64), 264, 136),
    "one": (Groups([128]), 128, 32),
    "narrow": (Groups([40, 3, 60], 4), 8, 8),
    "odd": (Groups([70, 0, 33], 2, 3), 37, 45),
    "odd, few rows": (Groups([3, 9]), 5, 67),
    "nothing": (Groups([0, 0, 0], 1, 4), 24, 40),
    "no rows": (Groups([0, 0]), 24, 40),
    "no summed axis": (Groups([3, 40]), 16, 0),
    "more small tiles than blocks": (Groups([20, 0, 18] * 4, 4), 136, 328),
    "more large tiles than blocks": (Groups([33, 0, 40] * 3 + [260], 8), 264, 40),
}


FORWARD, DGRAD, WGRAD = "grouped_gemm", "grouped_gemm_dgrad", "grouped_gemm_wgrad"
of_each_kind = pytest.mark.parametrize("kind", [FORWARD, DGRAD, WGRAD], ids=["forward", "dgrad", "wgrad"])


@in_all_schedules
@of_each_kind
@pytest.mark.parametrize("case", CASES)
def test_products(case, kind, schedule):
    groups, n, k = CASES[case]
    if case == "no summed axis" and kind == DGRAD:
        n, k = k, n
    dtype = F16 if schedule[1] == 2 else BF16
    a, b = (guarded(x) for x in operands(kind, groups, n, k, dtype))
    check(kind, groups, a, b, schedule)


@of_each_kind
@pytest.mark.parametrize("counts", [[3, 0, 9], [70, 0, 33]], ids=["few", "many"])
def test_rows_that_lie_apart_or_off_16_bytes(counts, kind):
    groups = Groups(counts, 2)
    a, b = operands(kind, groups, 48, 80, BF16)

    def apart(x, before, behind):
        wide = torch.full((*x.shape[:-1], before + x.shape[-1] + behind), math.nan, dtype=x.dtype)
        wide[..., before : before + x.shape[-1]] = x
        return wide[..., before : before + x.shape[-1]]

    for a_too, b_too in (
        (apart(a, 8, 16), apart(b, 16, 8)),  # as they are
        (apart(a, 8, 3), b.mT.contiguous().mT),  # by copies
        (a.mT.contiguous().mT, apart(b, 1, 7)),
        (apart(a, 4, 4), b),
    ):
        check(kind, groups, a_too, b_too, SCHEDULES[3])


@of_each_kind
def test_offsets_that_make_no_sense_reach_no_memory(kind):
    """The host does not look into a GPU's offsets: what comes out means nothing, but nothing else is touched."""
    groups = Groups([20, 30, 14])
    a, b = (guarded(x) for x in operands(kind, groups, 40, 48, BF16))
    for offsets, counts in (([0, 2**30, -5, 70], [2**31 - 1, 3, 90]), ([60, 60, 60, 60], [9, -9, 4])):
        groups.offsets, groups.counts = (torch.tensor(x, dtype=torch.int32) for x in (offsets, counts))
        multiply(kind, groups, a, b, SCHEDULES[2])


@of_each_kind
def test_offsets_beyond_two_to_the_31(kind):
    """Rows and experts so far apart that their places pass 2**31 elements; the memory between them is never touched."""
    groups = Groups([3, 2])
    a, b = operands(kind, groups, 16, 24, BF16)

    def apart(x, axis):
        far = 2**31 // (x.shape[axis] - 1) // 8 * 8 + 8
        strides = [far if i == axis else stride for i, stride in enumerate(x.stride())]
        last = sum((size - 1) * stride for size, stride in zip(x.shape, strides))
        return torch.empty(last + 1, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)

    check(kind, groups, apart(a, 0), apart(b, 0), SCHEDULES[1])


@pytest.mark.parametrize("kind", [FORWARD, DGRAD], ids=["forward", "dgrad"])
def test_a_row_does_not_depend_on_its_batch(kind):
    """Not even on the tile that serves it."""
    groups = Groups([150, 3, 70])
    a, weight = operands(kind, groups, 136, 200, BF16)
    together = multiply(kind, groups, a, weight, SCHEDULES[0])
    for row, group in ((0, 0), (149, 0), (151, 1), (222, 2)):
        sizes = [0, 0, 0]
        sizes[group] = 1
        alone = multiply(kind, Groups(sizes), a[row : row + 1], weight, SCHEDULES[1])
        assert torch.equal(alone[0], together[row])


def test_decoding_reads_weights_once():
    """For up to 16 rows a group, 16 bytes at a time."""
    groups = Groups([16, 0, 5, 1])
    a, weight = operands(FORWARD, groups, 256, 192, BF16)
    before = _emu.counters()
    multiply(FORWARD, groups, a, weight, SCHEDULES[0])
    after = _emu.counters()
    tiles = 256 // 128  # each reads the rows
    assert after["bytes_loaded"] - before["bytes_loaded"] == 2 * 192 * (3 * 256 + tiles * 22)
    assert after["bytes_stored"] - before["bytes_stored"] == 2 * 256 * 22


def test_what_no_kernel_serves():
    offsets, counts = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    groups = dict(offsets=offsets, counts=counts)
    for dtype in (F32, torch.float64):
        with (
            k2kernels.emulated(),
            pytest.raises(k2kernels.UnsupportedError, match="a must be bfloat16 or float16 for"),
        ):
            grouped_gemm.grouped_gemm(torch.zeros(2, 8, dtype=dtype), torch.zeros(1, 8, 8, dtype=dtype), **groups)


def test_registered():
    """As torch.compile sees them: without padding, of which an op may leave what it finds there."""
    groups = Groups([3, 0, 2])
    grad, a = groups.random(16, BF16), groups.random(24, BF16)
    places, weight = (groups.offsets, groups.counts), torch.randn(3, 16, 24).bfloat16()
    with k2kernels.emulated():
        check_op(grouped_gemm._grouped_gemm, (a, weight, *places, None), differentiable=True)
        check_op(grouped_gemm._grouped_gemm_dgrad, (grad, weight, *places, 3))
        check_op(grouped_gemm._grouped_gemm_wgrad, (grad, a, *places))


def test_grouped_gemm_neither_reads_nor_spreads_pad_rows():
    offsets, counts = torch.tensor([0, 4, 4, 12], dtype=torch.int32), torch.tensor([3, 0, 5], dtype=torch.int32)
    real = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8])
    a, grad = torch.full((14, 6), math.nan), torch.full((14, 5), math.nan)
    a[real], grad[real] = torch.randn(8, 6), torch.randn(8, 5)
    b = torch.randn(3, 5, 6)
    rows = [slice(0, 3), slice(4, 4), slice(4, 9)]
    pad = [r for r in range(14) if r not in real]

    out = grouped_gemm._grouped_gemm(a, b, offsets, counts, None)
    d_a = grouped_gemm._grouped_gemm_dgrad(grad, b, offsets, counts, None)
    d_b = grouped_gemm._grouped_gemm_wgrad(grad, a, offsets, counts)
    for g, r in enumerate(rows):
        torch.testing.assert_close(out[r], a[r] @ b[g].T)
        torch.testing.assert_close(d_a[r], grad[r] @ b[g])
        torch.testing.assert_close(d_b[g], grad[r].T @ a[r])
    assert (out[pad] == 0).all() and (d_a[pad] == 0).all() and (d_b[1] == 0).all()
