"""The sm_90a kernel for few rows a group, in the emulator: its three tiles, K cut into parts over clusters."""

import pytest
import torch
from test_w4_gemm_kernel import Groups, bits, check, decoded, multiply
from w4_cases import QUANTIZERS, random_w4

from k2kernels import pack_w4

SEEDS = [("sm_90a", seed) for seed in range(4)]
TOKENS = (8, 32, 64)

in_all_schedules = pytest.mark.parametrize("schedule", SEEDS, ids=lambda s: f"seed{s[1]}")
in_each_tile = pytest.mark.parametrize("tokens", TOKENS)


def expected_for(tokens, groups):
    """The estimate of rows that chooses a tile of so many tokens."""
    return tokens * len(groups.counts) // (1 if len(groups.counts) == 1 else 2)


# K: less than a stage, a stage and a half chunk, stages and tails of any tile; N: of 64, 128 and 256 rows.
CASES = {
    "tails": (Groups([5, 0, 33, 66], 1, 3), 328, 288),
    "short": (Groups([1, 12], 8), 48, 32),
    "odd N": (Groups([3, 9, 65], 2, 3), 90, 608),
    "one": (Groups([3]), 136, 96),
}


@in_all_schedules
@in_each_tile
@pytest.mark.parametrize("case", CASES)
def test_bits_of_grouped_gemm(case, tokens, schedule):
    groups, n, k = CASES[case]
    at = schedule[1] + TOKENS.index(tokens) + list(CASES).index(case)
    kind, swiglu = list(QUANTIZERS)[at % 2], at // 2 % 2 == 1
    check(kind, groups, n, k, schedule, swiglu=swiglu, expected=expected_for(tokens, groups))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_long_k_in_one_part(kind):
    """K of gpt-oss."""
    groups = Groups([3, 0, 18])
    check(kind, groups, 64, 2880, SEEDS[1], expected=expected_for(8, groups), batch_invariant=True)


def test_many_experts():
    """A warp of the tile scheduler passes over 13 times 32 groups."""
    counts = [0] * 400
    counts[3], counts[255], counts[399] = 1, 2, 1
    check("int4", Groups(counts), 64, 64, SEEDS[2], expected=4)


def integers(kind, groups, n, k):
    """Weights and rows whose products and sums are exact, in any order."""
    codes, scales = random_w4(kind, len(groups.counts), n, k)
    scales = torch.full_like(scales, 0.25) if kind == "int4" else torch.full_like(scales, 128)
    a = groups.random(k)
    a[groups.real] = torch.randint(-2, 3, (int(groups.real.sum()), k)).bfloat16()
    return a, codes, scales


# By the parts that K is cut into: groups, N, K. The parts are of unequal length.
SPLITS = {2: (Groups([3, 9]), 80, 1120), 4: (Groups([10]), 144, 2080)}


@in_all_schedules
@pytest.mark.parametrize("split", SPLITS)
def test_parts_of_k_add_up(split, schedule):
    groups, n, k = SPLITS[split]
    kind, swiglu = list(QUANTIZERS)[schedule[1] % 2], schedule[1] >= 2
    a, codes, scales = integers(kind, groups, n, k)
    w = pack_w4(codes, scales, gated=swiglu)
    want = decoded(a, codes, scales, groups, ("sm_80", 0), swiglu=swiglu)
    for tokens in (8, 32):
        got = multiply(a, w, groups, schedule, swiglu=swiglu, expected=expected_for(tokens, groups))
        assert torch.equal(bits(got[groups.real]), bits(want[groups.real]))


@pytest.mark.parametrize("tokens", [8, 32])
def test_parts_are_added_in_their_order(tokens):
    """In float32, with parts of two equal numbers whose sum depends on the order and on where K is cut."""
    k, n, big = 2048, 64, 2.0**24  # and 1: all times 2^-26, as scales of int4 are below 1/2
    orders = torch.tensor([[big, 2, -big, 0], [2, big, -big, 1], [big, 1, 1, -big], [big, -big, 1, 2]])
    parts = orders[torch.arange(n) % 4] * 2.0**-26
    codes = torch.full((1, n, k // 8), -0x77777778, dtype=torch.int32)  # 8 everywhere: zeros
    codes[0, :, k // 64 :: k // 32] += 0x11  # the first two of a part are 1
    scales = torch.zeros(1, n, k // 32, dtype=torch.bfloat16)
    scales[0, :, k // 256 :: k // 128] = (parts / 2).bfloat16()
    in_parts, whole = torch.zeros(n), torch.zeros(n)
    for part in parts.T:
        in_parts, whole = in_parts + part, whole + part / 2 + part / 2
    from_the_last = parts.flip(1).cumsum(1)[:, -1]
    assert not torch.equal(in_parts, whole) and not torch.equal(in_parts, from_the_last)
    groups, w = Groups([1]), pack_w4(codes, scales)
    for batch_invariant, want in ((False, in_parts), (True, whole)):
        d = multiply(torch.ones(1, k).bfloat16(), w, groups, SEEDS[1], expected=tokens, batch_invariant=batch_invariant)
        assert torch.equal(d[0].float(), want)


def test_parts_of_k_do_not_depend_on_the_batch():
    """Nor on the tile and the schedule; with batch_invariant, K is whole."""
    (groups, n, k), kind = SPLITS[4], "int4"
    codes, scales = random_w4(kind, 1, n, k)
    w, a = pack_w4(codes, scales), groups.random(k)
    whole = multiply(a, w, groups, SEEDS[0], expected=8, batch_invariant=True)
    assert torch.equal(bits(whole), bits(decoded(a, codes, scales, groups, ("sm_80", 0))))
    d = multiply(a, w, groups, SEEDS[0], expected=8)
    for expected, schedule in ((10**6, SEEDS[2]), (32, SEEDS[3])):
        assert torch.equal(bits(multiply(a, w, groups, schedule, expected=expected)), bits(d))
    alone = multiply(a[9:], w, Groups([1]), SEEDS[1])
    assert torch.equal(bits(alone[0]), bits(d[9]))
