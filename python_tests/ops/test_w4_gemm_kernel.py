"""Products with packed 4-bit weights by the kernel, in the emulator: the bits of grouped_gemm with decoded weights."""

import math

import pytest
import torch
from w4_cases import QUANTIZERS, random_w4

import k2kernels
from k2kernels import W4, _emu, dequantize_w4, grouped_w4_gemm, pack_w4, w4_gemm
from k2kernels.ops.grouped_gemm import grouped_gemm
from k2kernels.ops.w4_gemm import product
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import guarded

BF16 = torch.bfloat16
SCHEDULES = [("sm_80", 0), ("sm_90a", 1), ("sm_89", 2), ("sm_80", 3)]
CANARY = 0xAB
FEW, MANY = 1, 10**6  # expected rows: the tile of 16 tokens and that of 64

in_all_schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s[0]}-{s[1]}")
of_each_kind = pytest.mark.parametrize("kind", QUANTIZERS)
in_each_tile = pytest.mark.parametrize("expected", [FEW, MANY], ids=["16", "64"])


def ints(*x):
    return torch.tensor(x, dtype=torch.int32)


class Groups:
    """Rows of each group from multiples of `alignment` on, `behind` more rows after all of them."""

    def __init__(self, counts, alignment=1, behind=0):
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + -(-count // alignment) * alignment)
        self.offsets, self.counts = ints(*starts), ints(*counts)
        self.slices = [slice(start, start + count) for start, count in zip(starts, counts)]
        self.real = torch.zeros(starts[-1] + behind, dtype=torch.bool)
        for group in self.slices:
            self.real[group] = True

    def random(self, columns):
        """Rows; NaN where there is no group."""
        x = torch.full((len(self.real), columns), math.nan, dtype=BF16)
        x[self.real] = torch.randn(int(self.real.sum()), columns).bfloat16()
        return x


def bits(x):
    return x.contiguous().view(torch.int16)


def emulated(schedule):
    return k2kernels.emulated(schedule[0], seed=schedule[1])


def multiply(a, w, groups, schedule, *, swiglu=False, expected=None, batch_invariant=False):
    """D by the kernel, in guarded memory that held canaries."""
    n = w.shape[1] // 2 if swiglu else w.shape[1]
    d = guarded(torch.full((len(a) * n * 2,), CANARY, dtype=torch.uint8)).view(BF16).view(len(a), n)
    before = k2kernels.launch_count("grouped_w4_gemm")
    with emulated(schedule):
        sizes = guarded(groups.offsets), guarded(groups.counts)
        product._launch(d, guarded(a), guarded(w.data), *sizes, w.kind, swiglu, batch_invariant, expected)
    assert k2kernels.launch_count("grouped_w4_gemm") == before + (d.numel() > 0)
    assert (d[~groups.real].contiguous().view(torch.uint8) == CANARY).all()
    return d


def decoded(a, codes, scales, groups, schedule, *, swiglu=False):
    """The same by grouped_gemm's kernel, and swiglu's, with the weights as bfloat16."""
    with emulated(schedule):
        d = grouped_gemm(a, dequantize_w4(codes, scales), offsets=groups.offsets, counts=groups.counts)
        d[~groups.real] = 0
        return k2kernels.swiglu(d) if swiglu else d


def check(kind, groups, n, k, schedule, *, swiglu=False, expected=None, batch_invariant=False):
    codes, scales = random_w4(kind, len(groups.counts), n, k)
    a = groups.random(k)
    w = pack_w4(codes, scales, gated=swiglu)
    assert w.kind == kind
    d = multiply(a, w, groups, schedule, swiglu=swiglu, expected=expected, batch_invariant=batch_invariant)
    want = decoded(a, codes, scales, groups, schedule, swiglu=swiglu)
    assert torch.equal(bits(d[groups.real]), bits(want[groups.real]))
    return a, codes, scales, d


# Groups, N, K: tails of both, empty groups and single rows, more tiles than CTAs.
CASES = {
    "few rows": (Groups([1, 0, 16, 17, 3, 0]), 136, 192),
    "tails": (Groups([5, 0, 0, 33, 2], 16, 32), 48, 96),
    "one group of K": (Groups([2, 1]), 48, 32),
    "odd N": (Groups([3, 9, 65], 2, 3), 90, 160),
    "many empty": (Groups([0] * 40 + [2] + [0] * 30 + [1, 0], 8), 128, 64),
    "hot": (Groups([0, 140, 1], 1, 5), 144, 160),
    "around tiles": (Groups([7, 8, 9, 15, 64, 63, 65]), 64, 96),
    "one": (Groups([1]), 128, 512),
    "nothing": (Groups([0, 0, 0], 1, 4), 48, 64),
    "no rows": (Groups([0, 0]), 48, 64),
    "more tiles than CTAs": (Groups([20, 0, 18] * 4, 4), 328, 352),
}


@in_all_schedules
@of_each_kind
@in_each_tile
@pytest.mark.parametrize("case", CASES)
def test_bits_of_grouped_gemm(case, expected, kind, schedule):
    groups, n, k = CASES[case]
    check(kind, groups, n, k, schedule, expected=expected)


@in_all_schedules
@of_each_kind
@in_each_tile
@pytest.mark.parametrize("case", ["few rows", "tails", "odd N", "hot", "nothing"])
def test_fused_swiglu_has_the_bits_of_the_two_ops(case, expected, kind, schedule):
    groups, n, k = CASES[case]
    check(kind, groups, n, k, schedule, swiglu=True, expected=expected)


@of_each_kind
def test_a_long_k(kind):
    """K of gpt-oss, 45 x 64, with the error of the product against float64."""
    groups = Groups([3, 0, 18])
    for expected, schedule in ((FEW, SCHEDULES[0]), (MANY, SCHEDULES[0]), (FEW, SCHEDULES[2])):
        a, codes, scales, d = check(kind, groups, 64, 2880, schedule, expected=expected)
        weight = dequantize_w4(codes, scales)
        want = torch.cat([a[g].double() @ w.double().T for g, w in zip(groups.slices, weight)])
        same = torch.cat([a[g] @ w.T for g, w in zip(groups.slices, weight)])
        check_close(d, want, same_precision=same)


def identity(w, k, schedule, swiglu=False):
    """The decoded weights [N, K], as products with rows of the identity."""
    d = multiply(torch.eye(k).bfloat16(), w, Groups([k]), schedule, swiglu=swiglu, expected=MANY)
    return d.T


def every_code(n):
    """Codes of n rows of 64, in bytes: all 16 in each group, in each row at other places."""
    nibbles = (torch.arange(64, dtype=torch.uint8) + torch.arange(n, dtype=torch.uint8)[:, None]) % 16
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4)[None]


ON_EACH_ARCH = [SCHEDULES[1], SCHEDULES[3], SCHEDULES[2], ("sm_120", 4)]
on_each_arch = pytest.mark.parametrize("schedule", ON_EACH_ARCH, ids=lambda s: s[0])


@on_each_arch
def test_every_int4_code_by_every_scale(schedule):
    """The 16 codes by all bfloat16 below 0.5 in magnitude, subnormal ones and both zeros among them: -8, too."""
    scales = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
    scales = scales[scales.abs() < 0.5]
    assert scales.numel() == 2 * 126 * 128 and (scales == 0).sum() == 2
    n = scales.numel() // 2
    codes, scales = every_code(n).view(torch.int32), scales.view(1, n, 2)
    packed = pack_w4(codes, scales)
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(k2kernels.unpack_w4(packed), (codes, scales)))
    assert torch.equal(identity(packed, 64, schedule), dequantize_w4(codes, scales)[0])


@on_each_arch
def test_every_int4_code_by_every_finite_scale(schedule):
    """Of any size, by the packed kind that has them as they are. Rows with weights that overflow are not finite."""
    scales = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
    scales = scales[scales.isfinite()]
    n = scales.numel() // 2
    codes, scales = every_code(n).view(torch.int32), scales.view(1, n, 2)
    packed = pack_w4(codes, scales)
    assert packed.kind == "int4_wide"
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(k2kernels.unpack_w4(packed), (codes, scales)))
    want = dequantize_w4(codes, scales)[0]
    finite, got = want.isfinite().all(-1), identity(packed, 64, schedule)
    assert torch.equal(got[finite], want[finite]) and not got[~finite].isfinite().all(-1).any()


LARGE = {case: CASES[case] for case in ("few rows", "tails", "odd N", "one")}
LARGE["parts of K"] = Groups([3]), 64, 1024  # which the kernel for few rows of sm_90a would add


@pytest.mark.parametrize("schedule", [*SCHEDULES, ("sm_90a", 5)], ids=lambda s: f"{s[0]}-{s[1]}")
@in_each_tile
@pytest.mark.parametrize("swiglu", [False, True], ids=["plain", "swiglu"])
@pytest.mark.parametrize("case", LARGE)
def test_int4_with_large_scales(case, swiglu, expected, schedule):
    """By the portable kernel, on sm_90a too."""
    groups, n, k = LARGE[case]
    check("int4_wide", groups, n, k, schedule, swiglu=swiglu, expected=expected)


@on_each_arch
def test_every_mxfp4_code_by_every_scale(schedule):
    scales = torch.arange(130, dtype=torch.uint8).clamp(max=128).view(1, 65, 2)
    codes = every_code(65)
    want = dequantize_w4(codes, scales)[0]
    assert torch.equal(identity(pack_w4(codes, scales), 64, schedule), want)


@of_each_kind
@in_each_tile
def test_each_row_and_column_is_in_its_place(kind, expected):
    """With one-hot weights: a row of D is a row of A, permuted."""
    n = k = 160
    places = torch.randperm(n)
    weight = torch.zeros(1, n, k)
    weight[0, torch.arange(n), places] = 1
    codes, scales = (QUANTIZERS[kind](weight)) if kind == "mxfp4" else (None, None)
    if kind == "int4":
        nibbles = (weight.int() + 8).view(1, n, -1, 8)
        codes = (nibbles << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1, dtype=torch.int32)
        scales = torch.full((1, n, k // 32), 0.25, dtype=BF16)
    a = torch.randn(70, k).bfloat16()
    d = multiply(a, pack_w4(codes, scales), Groups([70]), SCHEDULES[2], expected=expected)
    assert torch.equal(d, a[:, places] * (0.25 if kind == "int4" else 1))


@of_each_kind
@pytest.mark.parametrize("swiglu", [False, True], ids=["plain", "swiglu"])
def test_a_row_does_not_depend_on_its_batch(kind, swiglu):
    """Not even on the tile that serves it."""
    groups = Groups([70, 3, 40])
    w = pack_w4(*random_w4(kind, 3, 136, 192), gated=swiglu)
    a = groups.random(192)
    together = multiply(a, w, groups, SCHEDULES[0], swiglu=swiglu, expected=MANY)
    assert torch.equal(bits(together), bits(multiply(a, w, groups, SCHEDULES[1], swiglu=swiglu, expected=FEW)))
    for row, group in ((0, 0), (69, 0), (71, 1), (112, 2)):
        sizes = [0, 0, 0]
        sizes[group] = 1
        alone = multiply(a[row : row + 1], w, Groups(sizes), SCHEDULES[2], swiglu=swiglu, expected=FEW)
        assert torch.equal(bits(alone[0]), bits(together[row]))


def test_public_functions_reach_the_kernel():
    """Rows apart and off 16 bytes, weights off 16 bytes, results apart; one group of all rows."""
    groups, n, k = Groups([3, 0, 20], 2, 1), 48, 96
    rows = dict(offsets=groups.offsets, counts=groups.counts)
    for kind in QUANTIZERS:
        codes, scales = random_w4(kind, 3, n, k)
        a = groups.random(k)
        for swiglu in (False, True):
            w = pack_w4(codes, scales, gated=swiglu)
            want = decoded(a, codes, scales, groups, SCHEDULES[0], swiglu=swiglu)[groups.real]
            columns = want.shape[1]
            before = k2kernels.launch_count("grouped_w4_gemm")
            with emulated(SCHEDULES[0]):
                got = [grouped_w4_gemm(a, w, **rows, swiglu=swiglu, batch_invariant=True)]
                wide = torch.full((len(a), k + 3), math.nan, dtype=BF16)
                wide[:, 3:] = a
                got.append(grouped_w4_gemm(wide[:, 3:], w, **rows, swiglu=swiglu, expected=0))
                raw = torch.empty(w.data.numel() + 1, dtype=torch.uint8)[1:].view(w.data.shape).copy_(w.data)
                got.append(grouped_w4_gemm(a.mT.contiguous().mT, W4(raw, *w[1:]), **rows, swiglu=swiglu))
                for out in (
                    torch.full((len(a), columns + 8), -7.0, dtype=BF16),
                    torch.full((len(a), columns + 3), -7.0, dtype=BF16),
                    torch.full((columns + 3, len(a)), -7.0, dtype=BF16).mT,
                ):
                    grouped_w4_gemm(a, w, **rows, swiglu=swiglu, out=out[:, :columns])
                    assert (out[:, columns:] == -7).all() and (out[~groups.real] == -7).all()
                    got.append(out[:, :columns])
                one = W4(w.data[2], kind, (n, k), swiglu)
                alone = w4_gemm(a[groups.slices[2]], one, swiglu=swiglu)
            assert k2kernels.launch_count("grouped_w4_gemm") == before + 7
            assert all(torch.equal(bits(x[groups.real]), bits(want)) for x in got)
            assert torch.equal(bits(alone), bits(want[3:]))


@of_each_kind
def test_offsets_that_make_no_sense_reach_no_memory(kind):
    """The host does not look into a GPU's offsets: what comes out means nothing, but nothing else is touched."""
    w = pack_w4(*random_w4(kind, 3, 80, 96))
    for offsets, counts in (([0, 2**30, -5, 70], [2**31 - 1, 3, 90]), ([60, 60, 60, 60], [9, -9, 4])):
        groups = Groups([20, 30, 14])
        a = groups.random(96)
        groups.offsets, groups.counts = ints(*offsets), ints(*counts)
        groups.real[:] = True
        multiply(a, w, groups, SCHEDULES[2])


def test_experts_of_a_moe_layer():
    """Dispatch, both products and combine by kernels: the bits of the layer with decoded weights."""
    experts, hidden, width = 6, 96, 64
    for kind in QUANTIZERS:
        x, routing = torch.randn(21, hidden).bfloat16(), k2kernels.moe_route(torch.randn(21, experts), top_k=2)
        gate_up, down = random_w4(kind, experts, 2 * width, hidden), random_w4(kind, experts, hidden, width)
        packed = pack_w4(*gate_up, gated=True), pack_w4(*down)
        before = k2kernels.launch_count("grouped_w4_gemm")
        with emulated(SCHEDULES[1]):
            got = k2kernels.moe_mlp(x, routing, *packed)
            want = k2kernels.moe_mlp(x, routing, dequantize_w4(*gate_up), dequantize_w4(*down))
        assert k2kernels.launch_count("grouped_w4_gemm") == before + 2
        assert torch.equal(bits(got), bits(want))


def test_decoding_reads_weights_once():
    """For up to 16 rows a group, 16 bytes at a time."""
    groups, n, k = Groups([16, 0, 5, 1]), 256, 192
    for kind, chunk in (("int4", 2304), ("mxfp4", 2176)):
        w = pack_w4(*random_w4(kind, 4, n, k))
        before = _emu.counters()
        multiply(groups.random(k), w, groups, SCHEDULES[0], expected=FEW)
        after = _emu.counters()
        tiles = n // 128  # each reads the rows
        read = 3 * (n // 64) * (k // 64) * chunk + tiles * 22 * k * 2
        assert after["bytes_loaded"] - before["bytes_loaded"] == read
        assert after["bytes_stored"] - before["bytes_stored"] == 2 * n * 22
