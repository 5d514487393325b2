"""Products of many rows with packed 4-bit weights on sm_90a, emulated: the bits of grouped_gemm in all schedules.

test_w4_gemm_kernel.py has this kernel among the others: tails, every code by every scale, one-hot weights.
"""

import math

import pytest
import torch
from test_w4_gemm_kernel import MANY, Groups, bits, decoded, emulated, ints, multiply, of_each_kind
from w4_cases import random_w4

import k2kernels
from k2kernels import _emu, grouped_w4_gemm, pack_w4

BF16 = torch.bfloat16
SCHEDULES = [("sm_90a", seed) for seed in range(4)]

# Tiles of 64, 128, 192 and 256 tokens, which begin anywhere, empty groups between; three by three for six CTAs.
GROUPS = Groups([130, 0, 70, 1, 257, 0], 1, 3)
N, K = 264, 160


@pytest.fixture(scope="module", params=["plain", "swiglu"])
def swiglu(request):
    return request.param == "swiglu"


@pytest.fixture(scope="module", params=["int4", "mxfp4"])
def case(request, swiglu):
    """A, packed weights, what is wanted."""
    codes, scales = random_w4(request.param, len(GROUPS.counts), N, K)
    a = GROUPS.random(K)
    want = decoded(a, codes, scales, GROUPS, ("sm_80", 0), swiglu=swiglu)
    return a, pack_w4(codes, scales, gated=swiglu), want[GROUPS.real]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: str(s[1]))
def test_bits_in_all_schedules(case, swiglu, schedule):
    a, w, want = case
    d = multiply(a, w, GROUPS, schedule, swiglu=swiglu, expected=MANY)
    assert torch.equal(bits(d[GROUPS.real]), bits(want))


@of_each_kind
def test_a_long_k_goes_round_the_ring(kind):
    """An odd number of stages (45, gpt-oss), and two tiles for a CTA."""
    groups, n, k = Groups([3] * 7), 64, 2880
    codes, scales = random_w4(kind, 7, n, k)
    a = groups.random(k)
    d = multiply(a, pack_w4(codes, scales), groups, SCHEDULES[2], expected=MANY, batch_invariant=True)
    assert torch.equal(bits(d), bits(decoded(a, codes, scales, groups, ("sm_80", 0))))


def test_rows_anywhere():
    """Rows of A apart, off 16 bytes, or all the same one; rows of D off 16 bytes."""
    groups, n, k = Groups([65, 0, 3], 2, 1), 72, 96
    rows = dict(offsets=groups.offsets, counts=groups.counts, expected=MANY)
    for swiglu in (False, True):
        codes, scales = random_w4("int4", 3, n, k)
        w = pack_w4(codes, scales, gated=swiglu)
        wide = torch.full((len(groups.real), k + 8), math.nan, dtype=BF16)
        wide[:, 3 : 3 + k] = groups.random(k)
        one = torch.randn(1, k).bfloat16().expand(len(wide), k)
        for a in (wide[:, 3 : 3 + k], wide.roll(5, 1)[:, 8:], one):
            want = decoded(a, codes, scales, groups, ("sm_80", 0), swiglu=swiglu)[groups.real]
            out = torch.full((len(a), want.shape[1] + 3), -7.0, dtype=BF16)
            with emulated(SCHEDULES[3]):
                grouped_w4_gemm(a, w, **rows, swiglu=swiglu, out=out[:, :-3])
            assert torch.equal(bits(out[groups.real, :-3]), bits(want))
            assert (out[:, -3:] == -7).all() and (out[~groups.real] == -7).all()


@of_each_kind
def test_offsets_that_make_no_sense_reach_no_memory(kind):
    w = pack_w4(*random_w4(kind, 3, 80, 96))
    for offsets, counts in (([0, 2**30, -5, 70], [2**31 - 1, 3, 90]), ([60, 60, 60, 60], [9, -9, 4])):
        groups = Groups([20, 30, 14])
        a = groups.random(96)
        groups.offsets, groups.counts = ints(*offsets), ints(*counts)
        groups.real[:] = True
        multiply(a, w, groups, SCHEDULES[2], expected=MANY)


@pytest.mark.parametrize("kind, chunk", [("int4", 2304), ("mxfp4", 2176)])
def test_256_tokens_share_decoded_weights(kind, chunk):
    """And no box of tokens is loaded of which none is the group's. The estimate of rows chooses the kernel."""
    groups, n, k = Groups([256, 0, 1], 1, 100), 256, 192
    a, w = groups.random(k), pack_w4(*random_w4(kind, 3, n, k))
    results, loaded = [], []
    for expected in (64 * 3 + 1, 64 * 3):
        before = _emu.counters()["bytes_loaded"]
        d = multiply(a, w, groups, SCHEDULES[0], expected=expected)
        results.append(bits(d[groups.real]))
        loaded.append(_emu.counters()["bytes_loaded"] - before)
    weights = (n // 64) * (k // 64) * chunk
    assert loaded[0] == 2 * weights + (n // 128) * (256 + 64) * k * 2
    assert loaded[1] != loaded[0]  # by the kernel for few rows
    assert torch.equal(*results)


def test_a_group_alone_has_the_same_bits():
    """Of its rows in other tiles, behind other rows."""
    w = pack_w4(*random_w4("int4", 1, 128, 224))
    a = torch.randn(300, 224).bfloat16()
    with k2kernels.emulated("sm_90a", seed=1):
        together = grouped_w4_gemm(a, w, offsets=ints(0, 300), counts=ints(300))
        later = grouped_w4_gemm(a, w, offsets=ints(111, 300), counts=ints(70), expected=MANY)
    assert torch.equal(bits(together[111:181]), bits(later[111:181]))
