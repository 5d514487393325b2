"""FP8 GEMMs where a mistake would hide: far scales, poisoned tails, hundreds of groups, and sums as H100 makes them."""

import contextlib
import math

import pytest
import torch
from test_fp8_gemm import (
    E4M3,
    NAN_CODE,
    aligned,
    body,  # noqa: F401 (a fixture)
    ceil128,
    check_gemm,
    exact,
    grouped_weights,
    ints,
    operands,
    poison,
    running,
    with_kernels,
)

import k2kernels
from k2kernels.ops.fp8_gemm import fp8_gemm, grouped_fp8_gemm, grouped_fp8_wgrad
from k2kernels.ops.quant import quantize_1x128, quantize_128x128
from k2kernels.testing.compare import cos_diff, worst_tile


@pytest.mark.parametrize("kernel", ["portable_64x128", "sm90_128x128", "sm90_small_16x64"])
def test_operands_may_repeat_or_interleave(kernel):
    """One B for all groups, one row for all of A, groups inside the rows of A: tensor maps take no stride 0."""
    a, a_scales = (x.transpose(0, 1) for x in quantize_1x128(torch.randn(70, 3, 256)))
    b, b_scales = (x.expand(3, -1, -1) for x in quantize_128x128(torch.randn(72, 256)))
    copies = [torch.stack(list(x.unbind())) for x in (a, a_scales, b, b_scales)]
    masked = dict(masked_m=ints(70, 0, 33))
    row, scale = (x.expand(5, -1) for x in quantize_1x128(torch.randn(1, 256)))
    with running(kernel, "sm_90a", 1):
        got, want = (grouped_fp8_gemm(*x, **masked) for x in ((a, a_scales, b, b_scales), copies))
        assert torch.equal(got[0], want[0]) and torch.equal(got[2, :33], want[2, :33])
        want = fp8_gemm(torch.stack(list(row.unbind())), scale, b[0], b_scales[0])
        assert torch.equal(fp8_gemm(row, scale, b[0], b_scales[0]), want)


@with_kernels
@pytest.mark.parametrize("fine", [False, True], ids=["128x128", "1x128"])
def test_scales_far_down_and_across(fine):
    """Rows and columns of several tiles: operands are ones, scales powers of two, and every sum is exact."""
    m, n, k = 300, 392, 300
    blocks, rows = ceil128(k), n if fine else ceil128(n)
    a_scales = torch.exp2(torch.randint(-4, 5, (m, blocks)))
    b_scales = torch.exp2(torch.randint(-4, 5, (rows, blocks)))
    a, b = torch.ones(m, k).to(E4M3), torch.ones(n, k).to(E4M3)
    got = fp8_gemm(a, a_scales, b, b_scales, out_dtype=torch.float32)
    of_column = b_scales if fine else b_scales[torch.arange(n) // 128]
    sizes = torch.tensor([min(128, k - 128 * block) for block in range(blocks)])
    assert torch.equal(got, (a_scales * sizes) @ of_column.T)


@with_kernels
def test_one_hot_columns_across_tiles():
    """Every boundary of columns too: each result is one code of B, of 392 rows."""
    n, k = 392, 192
    _, _, b, b_scales = operands(1, n, k)
    a = torch.zeros(k, k)
    a[torch.arange(k), torch.arange(k)] = 0.5
    got = fp8_gemm(a.to(E4M3), torch.ones(k, 2), b, b_scales, out_dtype=torch.float32)
    scale = b_scales[torch.arange(n) // 128][:, torch.arange(k) // 128]
    assert torch.equal(got, (0.5 * b.float() * scale).T)


@with_kernels
def test_nothing_beyond_the_matrices_is_used():
    """NaN stands behind the last column, between the rows, below the last row, and so in the scales."""
    m, n, k = 33, 72, 200
    a, a_scales, b, b_scales = operands(m, n, k)
    want = fp8_gemm(a, a_scales, b, b_scales)

    def within(x, rows, columns):
        wide = torch.full((rows, columns), math.nan).to(x.dtype)
        wide[: x.shape[0], : x.shape[1]] = x
        return wide[: x.shape[0], : x.shape[1]]

    a, b = within(a, 40, 256), within(b, 80, 256)  # rows begin at multiples of 16 bytes: they are not copied
    by_column = within(a_scales.T, 4, 48).T
    assert torch.equal(fp8_gemm(a, within(a_scales, 40, 5), b, within(b_scales, 3, 4)), want)
    assert torch.equal(fp8_gemm(a, by_column, b, within(b_scales, 3, 4)), want)


@with_kernels
def test_as_many_groups_as_experts():
    """384 of them, most of none, some of few rows, one of many."""
    counts = torch.randint(-6, 3, (384,)).clamp(min=0)
    counts[200] = 70
    counts = counts.tolist()
    n, k = 72, 128
    offsets, real = aligned(counts, 1)
    b, b_scales = grouped_weights(384, n, k, fine=False)
    a, a_scales = quantize_1x128(torch.randn(len(real), k))
    poison(a, a_scales, ~real)
    got = grouped_fp8_gemm(a, a_scales, b, b_scales, offsets=offsets, counts=ints(*counts), out_dtype=torch.float32)
    group_of = torch.repeat_interleave(torch.arange(384), torch.tensor(counts))
    x = a[real].double() * a_scales[real].double()
    w = (b.double() * b_scales.double())[group_of]
    check_gemm(got[real], torch.einsum("mk,mnk->mn", x, w), torch.einsum("mk,mnk->mn", x.abs(), w.abs()))


@with_kernels
def test_wgrad_reads_no_token_of_another_group():
    """The blocks of a group are full of NaN from its count on, and others' tokens of 448 would be seen anywhere."""
    counts = [1, 129, 0, 127]
    offsets, real = aligned(counts, 128)
    dy, x = torch.randn(len(real), 24), torch.randn(len(real), 40)
    kwargs = dict(offsets=offsets, counts=ints(*counts))
    (a, a_scales), (b, b_scales) = (quantize_1x128(t, transpose=True, **kwargs) for t in (dy, x))
    a.view(torch.uint8)[:, ~real] = NAN_CODE
    b.view(torch.uint8)[:, ~real] = NAN_CODE
    alone = grouped_fp8_wgrad(a, a_scales, b, b_scales, **kwargs)
    for group in range(len(counts)):
        others = real.clone()
        others[int(offsets[group]) : int(offsets[group]) + counts[group]] = False
        loud, loud_scales = a.clone(), a_scales.clone()
        loud.view(torch.uint8)[:, others] = 0x7E  # 448
        start = int(offsets[group]) // 128
        mine = torch.zeros(a_scales.shape[1], dtype=torch.bool)
        mine[start : start + ceil128(counts[group])] = True
        loud_scales[:, ~mine] = 1e6
        got = grouped_fp8_wgrad(loud, loud_scales, b, b_scales, **kwargs)
        assert torch.equal(got[group], alone[group])


@contextlib.contextmanager
def sums_as_hopper():
    from k2kernels import _emu

    _emu.sum_fp8_as_hopper(True)
    try:
        yield
    finally:
        _emu.sum_fp8_as_hopper(False)


@pytest.mark.parametrize("same_sign", [False, True], ids=["both signs", "one sign"])
@pytest.mark.parametrize(
    "kernel, n, k", [("sm90_small_8x64", 72, 7168), ("sm90_small_8x64", 72, 16384), ("sm90_128x128", 72, 1152)]
)
def test_promotion_bounds_what_hopper_cuts_off(kernel, n, k, same_sign):
    """H100 keeps 13 bits below the largest of 32 products and cuts off the rest, toward zero.

    A block of 128 loses at most 4 x 33 units of 2**-13 of its largest term, and on average half of that: 1e-3 of sums
    of one sign, whatever K. Added up in the tensor core over the whole of K, the bits lost would be those of the total:
    percents. Signs that differ leave noise of the same size, without a bias.
    """
    args = operands(4, n, k, same_sign=same_sign)
    want, magnitude = exact(*args)
    with running(kernel, "sm_90a", 2):
        unrounded = fp8_gemm(*args, out_dtype=torch.float32)
        with sums_as_hopper():
            got = fp8_gemm(*args, out_dtype=torch.float32)
            narrow = fp8_gemm(*args)
    assert not torch.equal(got, unrounded)
    bias = ((got.double() - want) / magnitude).mean(dim=1)
    assert bias.abs().max() < (1e-3 if same_sign else 1e-4)
    if same_sign:
        assert bias.max() < 0  # toward zero
    limit = 1e-6 if same_sign else 1e-7
    assert cos_diff(got, want) < limit and worst_tile(got, want)[0] < limit
    assert cos_diff(narrow, want) < 5e-6 and worst_tile(narrow, want)[0] < 5e-6


def test_rounding_as_hopper_ends_with_its_block():
    args = operands(4, 72, 256)
    with running("sm90_small_8x64", "sm_90a", 2):
        before = fp8_gemm(*args, out_dtype=torch.float32)
        with sums_as_hopper():
            assert not torch.equal(fp8_gemm(*args, out_dtype=torch.float32), before)
        assert torch.equal(fp8_gemm(*args, out_dtype=torch.float32), before)
    assert k2kernels.launch_count("fp8_gemm") >= 3
