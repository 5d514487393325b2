import contextlib
import functools
import itertools
import math

import numpy as np
import pytest
import torch

import k2kernels
from k2kernels.ops import _fp8_plan, _launch
from k2kernels.ops import fp8_gemm as ops
from k2kernels.ops.fp8_gemm import fp8_gemm, grouped_fp8_gemm, grouped_fp8_wgrad
from k2kernels.ops.quant import dequantize, quantize_1x128, quantize_128x128
from k2kernels.reference import fp8_gemm as reference
from k2kernels.testing.compare import check_close, check_op, cos_diff, worst_tile
from k2kernels.testing.inputs import guarded

E4M3 = torch.float8_e4m3fn
NAN_CODE = 0x7F
RESULTS = [torch.float32, torch.bfloat16, torch.float16]

# Every test that takes `body` runs with the reference and with the kernels, in several schedules of their threads.
BODIES = {
    "reference": None,
    "portable_128x128-0": ("portable_128x128", "sm_80", 0),
    "portable_64x128-1": ("portable_64x128", "sm_80", 1),
    "portable_16x128-2": ("portable_16x128", "sm_80", 2),
    "portable_64x128-3": ("portable_64x128", "sm_89", 3),  # with mma of e4m3
    "sm90_128x128-0": ("sm90_128x128", "sm_90a", 0),
    "sm90_128x192-a-1": ("sm90_128x192", "sm_90a", 1, "a"),
    "sm90_256x128-b-2": ("sm90_256x128", "sm_90a", 2, "b"),
    "sm90_64x256-3": ("sm90_64x256", "sm_90a", 3),
    "sm90_pingpong_128x128-a-2": ("sm90_pingpong_128x128", "sm_90a", 2, "a"),
    "sm90_small_8x64-1": ("sm90_small_8x64", "sm_90a", 1),
    "sm90_small_32x64-4-2": ("sm90_small_32x64", "sm_90a", 2, None, 4),
}


@contextlib.contextmanager
def running(kernel, arch, seed, share=None, split=1):
    with k2kernels.emulated(arch, seed=seed), ops.fp8_gemm_kernel(kernel, share, split):
        yield


def launches():
    return sum(map(k2kernels.launch_count, ("fp8_gemm", "grouped_fp8_gemm", "grouped_fp8_wgrad")))


@pytest.fixture(params=BODIES)
def body(request):
    if request.param == "reference":
        yield
        return
    with running(*BODIES[request.param]):
        before = launches()
        yield
        params = request.node.callspec.params
        nothing = 0 in params.get("shape", (1,))[:2] or params.get("counts") == []
        assert (launches() == before) == nothing


with_kernels = pytest.mark.usefixtures("body")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def ceil128(size):
    return -(-size // 128)


def expand(scales, block, shape):
    """The scale of every element in float64, by index arithmetic: element (n, k) has scale (n // rows, k // 128)."""
    rows, columns = torch.arange(shape[0]) // block[0], torch.arange(shape[1]) // block[1]
    return scales.double()[rows][:, columns]


def exact(a, a_scales, b, b_scales):
    """The product of the dequantised matrices in float64, and the same of magnitudes, which bounds rounding errors."""
    block = (1, 128) if b_scales.shape[0] == b.shape[0] else (128, 128)
    x = a.double() * expand(a_scales, (1, 128), a.shape)
    w = b.double() * expand(b_scales, block, b.shape)
    return x @ w.T, x.abs() @ w.abs().T


def check_gemm(got, want, magnitude, same_sign=False):
    """Similarity of the whole and of the worst tile, and for every element a bound of its rounding errors."""
    info = torch.finfo(got.dtype)
    limit = 1e-6 if same_sign else 1e-7
    if got.dtype != torch.float32:  # rounding is at worst by eps / 2 of every element, on average by less
        limit += min(info.eps**2 / 8, 5e-6 if got.numel() >= 64 else 1)
    assert cos_diff(got, want) < limit
    assert worst_tile(got, want)[0] < limit
    # Up to K = 16384, 127 sums in a block, the product of the scales, the product with it and 127 sums of blocks are
    # 256 roundings to float32; the one to the result's dtype comes last, with a fixed step among its denormals.
    rounding = want.abs().clamp(min=info.tiny) * info.eps / 2
    check_close(got, want, budget=magnitude * (256 * 2.0**-24) + rounding)


def operands(m, n, k, fine=False, same_sign=False):
    """Quantised x [m, k] and w [n, k]; the blocks of w differ in size, so that a mix-up of scales shows."""
    x, w = torch.randn(m, k), torch.randn(n, k)
    if same_sign:
        x, w = x.abs(), w.abs()
    w *= expand(torch.exp2(torch.randint(-2, 3, (ceil128(n), ceil128(k)))), (128, 128), w.shape)
    return *quantize_1x128(x), *(quantize_1x128(w) if fine else quantize_128x128(w))


SHAPES = [
    *[
        (m, n, k)
        for m, n, k in zip((1, 2, 17, 31, 33, 64, 65), (8, 64, 72, 112, 136, 576, 128), (128, 192, 256, 1152) * 2)
    ],
    *[(127, 8, 1152), (129, 136, 192), (257, 72, 128), (5, 2112, 320), (7, 192, 1), (1, 1, 130), (3, 129, 129)],
]


@with_kernels
@pytest.mark.parametrize("fine", [False, True], ids=["128x128", "1x128"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_gemm_is_the_product_of_the_dequantised(shape, fine):
    args = operands(*shape, fine=fine)
    want, magnitude = exact(*args)
    for dtype in RESULTS if math.prod(shape) < 300_000 else RESULTS[:1]:
        got = fp8_gemm(*args, out_dtype=dtype)
        assert got.dtype == dtype and got.is_contiguous()
        check_gemm(got, want, magnitude)
    assert fp8_gemm(*args).dtype == torch.bfloat16


@with_kernels
@pytest.mark.parametrize("k", [7168, 16384])
def test_promotion_keeps_same_sign_sums_unbiased(k):
    args = operands(4, 136, k, same_sign=True)
    want, magnitude = exact(*args)
    got = fp8_gemm(*args, out_dtype=torch.float32)
    check_gemm(got, want, magnitude, same_sign=True)
    assert ((got.double() / want - 1).mean(dim=1).abs() < 1e-3).all()


@with_kernels
@pytest.mark.parametrize("fine", [False, True], ids=["128x128", "1x128"])
def test_every_scale_stands_at_its_place(fine):
    m, n, k = 5, 300, 450
    blocks, rows = ceil128(k), n if fine else ceil128(n)
    a_scales = torch.exp2(torch.arange(m * blocks).view(m, blocks) - 10.0)
    b_scales = torch.exp2(30.0 - torch.arange(rows * blocks).view(rows, blocks) % 61)
    b = torch.ones(n, k).to(E4M3)
    for block in range(blocks):
        inside = torch.arange(k) // 128 == block
        a = inside.float().expand(m, k).to(E4M3)
        got = fp8_gemm(a, a_scales, b, b_scales, out_dtype=torch.float32)
        b_column = b_scales[:, block] if fine else b_scales[torch.arange(n) // 128, block]
        assert torch.equal(got, int(inside.sum()) * a_scales[:, block, None] * b_column)


@with_kernels
@pytest.mark.parametrize("k", [128, 192, 1152])
def test_one_hot_rows_pick_single_weights(k):
    n = 136
    _, _, b, b_scales = operands(1, n, k)
    picked = torch.arange(k)  # every boundary of m, n and the k-blocks
    a = torch.zeros(k, k)
    a[picked, picked] = 1.5
    a_scales = torch.rand(k, ceil128(k)) + 0.5
    got = fp8_gemm(a.to(E4M3), a_scales, b, b_scales, out_dtype=torch.float32)
    rows, blocks = torch.arange(n) // 128, picked // 128
    # Exact product, times the float32 product of the two scales.
    scale = a_scales[picked, blocks][:, None] * b_scales[rows][:, blocks].T
    assert torch.equal(got, (1.5 * b.float().T) * scale)


@with_kernels
def test_small_integers_are_exact():
    a, b = torch.randint(-4, 5, (33, 640)).to(E4M3), torch.randint(-4, 5, (72, 640)).to(E4M3)
    a_scales, b_scales = torch.exp2(torch.randint(-1, 2, (33, 5))), torch.exp2(torch.randint(-1, 2, (1, 5)))
    want, _ = exact(a, a_scales, b, b_scales)
    assert torch.equal(fp8_gemm(a, a_scales, b, b_scales, out_dtype=torch.float32).double(), want)


@with_kernels
def test_blocks_are_added_in_order_and_scales_multiplied_first():
    a, b = torch.ones(1, 384).to(E4M3), torch.ones(1, 384).to(E4M3)
    # 2**24 + 1 rounds to 2**24 in float32, so that only this order gives 0.
    a_scales = torch.tensor([[2.0**24, 1.0, -(2.0**24)]]) / 128
    assert fp8_gemm(a, a_scales, b, torch.ones(1, 3), out_dtype=torch.float32).item() == 0
    # The sum times 2**124 would overflow; the product of the scales is 1.
    huge = torch.tensor([[2.0**124, 0.0, 0.0]])
    got = fp8_gemm(a, huge, b, torch.tensor([[2.0**-124, 0.0, 0.0]]), out_dtype=torch.float32)
    assert got.item() == 128


@with_kernels
def test_bias_and_accumulate_come_before_the_one_rounding():
    # Between 256 and 512 bfloat16 holds the even numbers, 257 rounds down to 256 and 257.001 up to 258.
    a, b = torch.ones(2, 128).to(E4M3), torch.full((3, 128), 2.0).to(E4M3)
    one = torch.ones(2, 1)
    b_257 = torch.cat([b.float(), torch.ones(3, 1)], dim=1).to(E4M3)
    args = torch.ones(2, 129).to(E4M3), one.expand(2, 2), b_257, one[:1].expand(1, 2)
    zeros, ones = torch.zeros(3), torch.ones(2, 3)
    assert fp8_gemm(*args).eq(256).all()
    assert fp8_gemm(*args, bias=ones[0], accumulate=torch.zeros(2, 3)).eq(258).all()
    assert fp8_gemm(*args, bias=zeros, accumulate=ones).eq(258).all()
    args = a, one, b, one[:1]
    assert fp8_gemm(*args, bias=zeros + 1.001).eq(258).all()
    assert fp8_gemm(*args, accumulate=ones * 1.001).eq(258).all()
    bias, c = torch.tensor([1.0, 2, 3]), torch.arange(6.0).view(2, 3)
    got = fp8_gemm(*args, bias=bias.bfloat16(), accumulate=c.half(), out_dtype=torch.float32)
    assert torch.equal(got, 256 + bias + c)
    # Bias first: 256 + C would lose the low bits of C.
    got = fp8_gemm(*args, bias=zeros - 256, accumulate=c + 2.0**-20, out_dtype=torch.float32)
    assert torch.equal(got, c + 2.0**-20)


@with_kernels
def test_row_weights_come_before_bias_and_c():
    args = operands(5, 72, 192)
    weights, bias, c = torch.tensor([1.0, -0.3, 0.0, 3.7, 2.0**-20]), torch.randn(72), torch.randn(5, 72)
    weighted = fp8_gemm(*args, out_dtype=torch.float32) * weights[:, None]
    strided = torch.stack([weights, weights + 1], dim=1)[:, 0]
    assert torch.equal(fp8_gemm(*args, row_weights=strided, out_dtype=torch.float32), weighted)
    assert torch.equal(fp8_gemm(*args, row_weights=weights), weighted.bfloat16())
    kwargs = dict(row_weights=weights, bias=bias, accumulate=c, out_dtype=torch.float32)
    assert torch.equal(fp8_gemm(*args, **kwargs), weighted + bias + c)
    assert torch.equal(fp8_gemm(*args, **kwargs, out=torch.empty(5, 72)), weighted + bias + c)


@with_kernels
@pytest.mark.parametrize("masked", [False, True], ids=["contiguous", "masked"])
def test_row_weights_of_groups(masked):
    counts = [5, 0, 70, 1]
    offsets, real = aligned(counts, 8)
    if masked:
        real = torch.arange(72) < ints(*counts)[:, None]
    groups = dict(masked_m=ints(*counts)) if masked else dict(offsets=offsets, counts=ints(*counts))
    b, b_scales = grouped_weights(4, 72, 192, fine=False)
    a, a_scales = quantize_1x128(torch.randn(*real.shape, 192))
    weights = torch.where(real, torch.randn(real.shape), math.nan)
    out = torch.full((*real.shape, 72), 7.0)
    grouped_fp8_gemm(a, a_scales, b, b_scales, **groups, row_weights=weights, out_dtype=torch.float32, out=out)
    plain = grouped_fp8_gemm(a, a_scales, b, b_scales, **groups, out_dtype=torch.float32)
    assert torch.equal(out[real], (plain * weights[..., None])[real]) and out[~real].eq(7).all()


@with_kernels
@pytest.mark.parametrize("dtype", RESULTS)
def test_out_is_written_in_place_and_nothing_around_it(dtype):
    args = operands(5, 72, 192)
    want = fp8_gemm(*args, out_dtype=dtype)
    canary = torch.full((9, 80), 7.0, dtype=dtype)
    out = canary[2:7, 4:76]
    assert fp8_gemm(*args, out_dtype=dtype, out=out) is out
    assert torch.equal(out, want)
    out.fill_(7)
    assert canary.eq(7).all()


@with_kernels
def test_out_may_be_accumulate():
    args = operands(5, 72, 192)
    main_grad = torch.randn(5, 72)
    want = fp8_gemm(*args, accumulate=main_grad, out_dtype=torch.float32)
    fp8_gemm(*args, accumulate=main_grad, out=main_grad, out_dtype=torch.float32)
    assert torch.equal(main_grad, want)


OVERLAPS = {  # of what is read, and where it and `out` begin in one buffer, in bytes
    "accumulate, one element on": ("accumulate", 0, 4),
    "accumulate, rows on": ("accumulate", 0, 4 * 72 * 16),
    "accumulate, rows back": ("accumulate", 4 * 72 * 16, 0),
    "a": ("a", 64, 0),
    "a of groups": ("a", 64, 0),
    "a_scales": ("a_scales", 400, 0),
}


@with_kernels
@pytest.mark.parametrize("case", OVERLAPS)
def test_out_may_share_memory_with_what_is_read(case):
    name, begin, out_begin = OVERLAPS[case]
    m, n, k = 150, 72, 192
    args = dict(zip(("a", "a_scales", "b", "b_scales"), operands(m, n, k)), out_dtype=torch.float32)
    function = fp8_gemm
    if "groups" in case:
        function = grouped_fp8_gemm
        args |= dict(zip(("b", "b_scales"), grouped_weights(2, n, k, False)), offsets=ints(0, 70, 150))
    elif name == "accumulate":
        args[name] = torch.randn(m, n)
    want = function(**args)
    buffer = torch.zeros(8 * m * n, dtype=torch.uint8)

    def at(place, like):
        return buffer[place : place + like.nbytes].view(like.dtype).view(like.shape)

    args[name] = at(begin, args[name]).copy_(args[name])
    assert torch.equal(function(**args, out=at(out_begin, want)), want)


@with_kernels
def test_scales_in_any_layout_and_operands_with_strides():
    x, w = torch.randn(6, 300), torch.randn(136, 300)
    a, a_scales = quantize_1x128(x)
    b, b_scales = quantize_128x128(w)
    want = fp8_gemm(a, a_scales, b, b_scales)
    column = quantize_1x128(x, scale_layout="column")[1]
    assert column.stride() == (1, 8)
    assert torch.equal(fp8_gemm(a, column, b, b_scales.T.contiguous().T), want)
    wide = torch.zeros(6, 400).to(E4M3)
    wide[:, :300] = a
    assert torch.equal(fp8_gemm(wide[:, :300], a_scales.numpy(), b.T.contiguous().T, b_scales), want)


@with_kernels
def test_nan_stays_in_its_row_and_column():
    a, a_scales, b, b_scales = operands(5, 72, 192)
    clean = fp8_gemm(a, a_scales, b, b_scales)
    a.view(torch.uint8)[3, 150] = NAN_CODE
    b.view(torch.uint8)[7, 1] = NAN_CODE
    got = fp8_gemm(a, a_scales, b, b_scales)
    poisoned = (torch.arange(5)[:, None] == 3) | (torch.arange(72) == 7)
    assert got[poisoned].isnan().all() and torch.equal(got[~poisoned], clean[~poisoned])


@with_kernels
@pytest.mark.parametrize("shape", [(0, 8, 128), (3, 0, 128), (3, 8, 0), (0, 0, 0)], ids=str)
def test_empty(shape):
    args = operands(*shape)
    assert torch.equal(fp8_gemm(*args), torch.zeros(shape[:2], dtype=torch.bfloat16))
    bias, c = torch.randn(shape[1]), torch.randn(shape[:2])
    assert torch.equal(fp8_gemm(*args, bias=bias, accumulate=c, out_dtype=torch.float32), bias + c)


GROUPS = {
    "ragged": [5, 1, 17, 3],
    "empty ends": [0, 9, 0, 8, 0],
    "all empty": [0, 0, 0],
    "one hot": [0, 0, 70, 0, 0, 0],
    "one": [33],
    "none": [],
    "many": [0] * 31 + [2, 1] + [0] * 40 + [3],  # more than a warp looks at, in three parts
}


def aligned(counts, alignment):
    """Offsets of groups that start at multiples of `alignment`, and the rows that belong to a group."""
    starts = np.cumsum([0, *(-(-c // alignment) * alignment for c in counts)])
    offsets = ints(*starts.tolist())
    real = torch.zeros(int(starts[-1]) + 5, dtype=torch.bool)  # some capacity behind the last group
    for start, count in zip(starts, counts):
        real[start : start + count] = True
    return offsets, real


def poison(data, scales, bad):
    data.view(torch.uint8)[bad] = NAN_CODE
    scales[bad] = math.nan


def grouped_weights(groups, n, k, fine):
    return (quantize_1x128 if fine else quantize_128x128)(torch.randn(groups, n, k))


@with_kernels
@pytest.mark.parametrize("alignment, fine", [(1, False), (8, True), (128, False)])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_contiguous_groups(counts, alignment, fine):
    n, k = 136, 192
    offsets, real = aligned(counts, alignment)
    b, b_scales = grouped_weights(len(counts), n, k, fine)
    a, a_scales = quantize_1x128(torch.randn(len(real), k), scale_layout="column")
    poison(a, a_scales, ~real)
    for dtype in RESULTS[:2]:
        out = torch.full((len(real), n), 7.0, dtype=dtype)
        kwargs = dict(offsets=offsets, counts=ints(*counts), out_dtype=dtype)
        assert grouped_fp8_gemm(a, a_scales, b, b_scales, **kwargs, out=out) is out
        assert out[~real].eq(7).all()
        fresh = grouped_fp8_gemm(a, a_scales, b, b_scales, **kwargs)
        assert fresh.dtype == dtype and torch.equal(fresh[real], out[real])
        for group, count in enumerate(counts):
            rows = slice(int(offsets[group]), int(offsets[group]) + count)
            check_gemm(out[rows], *exact(a[rows], a_scales[rows], b[group], b_scales[group]))


@with_kernels
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_masked_groups(counts):
    n, k, most = 72, 320, max(counts, default=0) + 2
    real = torch.arange(most) < ints(*counts)[:, None]
    b, b_scales = grouped_weights(len(counts), n, k, fine=False)
    a, a_scales = quantize_1x128(torch.randn(len(counts), most, k), scale_layout="column")
    poison(a, a_scales, ~real)
    out = torch.full((len(counts), most, n), 7.0, dtype=torch.bfloat16)
    assert grouped_fp8_gemm(a, a_scales, b, b_scales, masked_m=ints(*counts), out=out) is out
    assert out[~real].eq(7).all()
    for expected_m in (None, 1, 1000):
        fresh = grouped_fp8_gemm(a, a_scales, b, b_scales, masked_m=ints(*counts), expected_m=expected_m)
        assert torch.equal(fresh[real], out[real])
    for group, count in enumerate(counts):
        check_gemm(out[group, :count], *exact(a[group, :count], a_scales[group, :count], b[group], b_scales[group]))


@with_kernels
def test_groups_without_counts_fill_the_offsets():
    b, b_scales = grouped_weights(3, 72, 192, fine=False)
    a, a_scales = quantize_1x128(torch.randn(20, 192))
    offsets = ints(2, 9, 9, 18)
    got, want = torch.zeros(2, 20, 72, dtype=torch.bfloat16)
    grouped_fp8_gemm(a, a_scales, b, b_scales, offsets=offsets, out=got)
    grouped_fp8_gemm(a, a_scales, b, b_scales, offsets=offsets, counts=ints(7, 0, 9), out=want)
    assert torch.equal(got, want) and got[2:18].ne(0).any(1).all() and got[:2].eq(0).all() and got[18:].eq(0).all()


@with_kernels
@pytest.mark.parametrize("start, stop", [(64, 200), (1, 2), (130, 300), (255, 300), (100, 228)])
def test_a_shard_may_begin_inside_a_block(start, stop):
    x, w = torch.randn(5, 192), torch.randn(2, 300, 192) * torch.exp2(torch.arange(300.0) // 128)[:, None]
    a, a_scales = quantize_1x128(x)
    b, b_scales = quantize_128x128(w)
    shard = b[:, start:stop], b_scales[:, start // 128 : ceil128(stop)]
    whole = grouped_fp8_gemm(a, a_scales, b, b_scales, offsets=ints(0, 2, 5))
    kwargs = dict(b_row_offset=start % 128)
    assert torch.equal(grouped_fp8_gemm(a, a_scales, *shard, offsets=ints(0, 2, 5), **kwargs), whole[:, start:stop])
    assert torch.equal(fp8_gemm(a, a_scales, shard[0][1], shard[1][1], **kwargs)[2:], whole[2:, start:stop])


def cut_products():
    """Each op that takes weights in 128x128 blocks, of a view of codes and scales [3, N, K]."""

    def gemm(op, **options):
        def run(b, b_scales, **kwargs):
            grouped = "grouped" in op.__name__
            a = quantize_1x128(torch.ones(6, b.shape[-1]))
            groups = dict(offsets=ints(0, 2, 4, 6)) if grouped else {}
            return op(*a, *((b, b_scales) if grouped else (b[0], b_scales[0])), **groups, **options, **kwargs)

        return run

    for op in (fp8_gemm, grouped_fp8_gemm, k2kernels.fp8_gemm_swiglu, k2kernels.grouped_fp8_gemm_swiglu):
        yield op.__name__, gemm(op)
    yield "dequantize", lambda b, b_scales: dequantize(b, b_scales, block=(128, 128))


CUTS = dict(cut_products())


@pytest.mark.parametrize("op", CUTS)
def test_a_shard_that_begins_inside_a_block_of_k_is_refused(op):
    """Its products would be summed in other blocks than those of the scales: wrong numbers, and nothing to see."""
    b, b_scales = quantize_128x128(torch.randn(3, 256, 640))
    run = CUTS[op]
    for column, block in ((192, 1), (16, 0), (576, 4)):
        shard = b[..., column:], b_scales[..., block:]
        wanted = rf"{op}: \w+ must be cut along K at a multiple of 128.* from column {column} on; take it from column "
        with pytest.raises(ValueError, match=wanted + str(block * 128)):
            run(*shard)
        run(shard[0].contiguous(), shard[1])  # looks like a weight of its own
    assert torch.equal(run(b[..., 256:], b_scales[..., 2:])[0], run(b[..., 256:].clone(), b_scales[..., 2:].clone())[0])
    # No matrix begins where the storage does: nothing is known about the view's first column.
    flat = torch.cat([torch.zeros(7, dtype=torch.uint8), b.view(torch.uint8).flatten()]).view(E4M3)[7:]
    run(flat.view(b.shape), b_scales)
    run(flat.view(b.shape)[..., 128:], b_scales[..., 1:])


def test_matrices_in_one_flat_buffer_are_not_taken_for_shards():
    """As optimizers keep them: where one begins says nothing of the rows of another, though numbers may agree."""
    codes, scales = torch.zeros(5 * 128 * 128, dtype=torch.uint8).view(E4M3), torch.ones(5)
    a, a_scales = quantize_1x128(torch.randn(2, 256))
    b, b_scales = codes[3 * 128 * 128 :].view(128, 256), scales[3:].view(1, 2)  # behind a matrix of 128 x 384
    assert fp8_gemm(a, a_scales, b, b_scales).shape == (2, 128)
    assert dequantize(b, b_scales, block=(128, 128)).shape == (128, 256)


def test_zeros_in_front_of_k_serve_a_shard_that_begins_inside_a_block():
    """The remedy of the message: exact, where the shard alone is not."""
    w, x = torch.randn(128, 384) * torch.exp2(torch.arange(384) // 128 * 4), torch.randn(8, 384)
    b, b_scales = quantize_128x128(w)
    a, a_scales = quantize_1x128(torch.nn.functional.pad(x[:, 192:], (64, 0)))
    got = fp8_gemm(a, a_scales, b[:, 128:], b_scales[:, 1:], out_dtype=torch.float32)
    want, magnitude = exact(a, a_scales, b[:, 128:], b_scales[:, 1:])
    check_gemm(got, want, magnitude)
    assert cos_diff(got, x[:, 192:].double() @ w[:, 192:].double().T) < 2e-3  # the rounding of codes


@pytest.mark.parametrize("op", CUTS)
def test_rows_that_visibly_begin_inside_a_block_need_their_offset(op):
    b, b_scales = quantize_128x128(torch.randn(3, 384, 256))
    run = CUTS[op]
    shard = b[:, 192:], b_scales[:, 1:]
    with pytest.raises(ValueError, match=rf"{op}: \w+ must begin with a block of 128 rows.* 64 rows into its block"):
        run(*shard)
    run(b[:, 256:], b_scales[:, 2:])
    if op in ("fp8_gemm", "grouped_fp8_gemm"):
        run(*shard, b_row_offset=64)
    # A later one of several matrices begins inside a block of the storage's rows, but not of its own.
    for n, first in itertools.product((192, 130, 200, 255), (0, 128)):
        b, b_scales = quantize_128x128(torch.randn(3, n, 256))
        for matrix in range(3):
            later = b[matrix : matrix + 1, first : n // 2 * 2], b_scales[matrix : matrix + 1, first // 128 :]
            run(*(x.expand(3, -1, -1) for x in later))


OTHER_LARGE = "sm90_128x128_fine", "sm90_pingpong_128x128"
SCHEDULED = {  # every kernel, its chip, which factor the blocks of a cluster share, parts of K
    "portable_128x128": ("portable_128x128", "sm_80"),
    "portable_64x128": ("portable_64x128", "sm_80"),
    "portable_16x128": ("portable_16x128", "sm_80"),
    "portable_128x128 e4m3": ("portable_128x128", "sm_90a"),
    "portable_64x128 e4m3": ("portable_64x128", "sm_89"),
    "portable_16x128 e4m3": ("portable_16x128", "sm_89"),
    **{
        f"{kernel} {share}": (kernel, "sm_90a", share)
        for kernel in (*(f"sm90_{x}" for x in ("128x128", "128x192", "256x128", "64x256")), *OTHER_LARGE)
        for share in (None, "a", "b")
    },
    "sm90_small_8x64": ("sm90_small_8x64", "sm_90a"),
    "sm90_small_8x64 8": ("sm90_small_8x64", "sm_90a", None, 8),
    "sm90_small_16x64 4": ("sm90_small_16x64", "sm_90a", None, 4),
    "sm90_small_32x64": ("sm90_small_32x64", "sm_90a"),
    "sm90_small_64x64 2": ("sm90_small_64x64", "sm_90a", None, 2),
}


def test_every_kernel_is_scheduled():
    swiglu = "sm90_swiglu_128x256"  # see test_fp8_gemm_swiglu.py
    assert {kernel for kernel, *_ in SCHEDULED.values()} == set(ops.fp8_gemm_kernels()) - {swiglu}


def guarded_case():
    """A grouped GEMM of several rounds of tiles and blocks, around whose operands a kernel faults, and its result."""
    counts, k = [70, 0, 300, 1], 448
    offsets, real = aligned(counts, 8)
    a, a_scales = quantize_1x128(torch.randn(len(real), k), scale_layout="column")
    b, b_scales = quantize_128x128(torch.randn(4, 264, k))
    poison(a, a_scales, ~real)
    weights = torch.where(real, torch.randn(len(real)), math.nan)
    want = torch.zeros(len(real), 264)
    groups = dict(offsets=offsets, counts=ints(*counts))
    options = dict(expected_m=None, out_dtype=torch.float32, row_weights=weights)
    reference.grouped_fp8_gemm_out(want, a, a_scales, b, b_scales, **groups, **options)
    column = guarded(a_scales.mT.contiguous()).mT
    args = guarded(a), column, guarded(b), guarded(b_scales)
    groups["row_weights"] = weights
    return args, {name: guarded(t) for name, t in groups.items()}, want, real


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kernel", SCHEDULED)
def test_every_schedule(kernel, seed):
    args, groups, want, real = guarded_case()
    out = guarded(torch.full(want.shape, 7.0, dtype=torch.bfloat16))
    name, arch, *options = SCHEDULED[kernel]
    with running(name, arch, seed, *options):
        before = launches()
        grouped_fp8_gemm(*args, **groups, out=out)
        again = grouped_fp8_gemm(*args, **groups)
        assert launches() == before + 2
    assert out[~real].eq(7).all() and torch.equal(again[real], out[real])
    assert cos_diff(out[real], want[real]) < 5e-6 and worst_tile(out[real], want[real])[0] < 5e-6


@pytest.mark.parametrize("fine", [False, True], ids=["128x128", "1x128"])
@pytest.mark.parametrize("chip", ["sm_80", "sm_89", "sm_90a"])
def test_a_row_does_not_depend_on_its_batch_or_tile(chip, fine):
    args = operands(70, 264, 448, fine=fine)
    want = None
    for name, arch, *options in SCHEDULED.values():
        if arch != chip or len(options) == 2:  # another chip, or K in parts
            continue
        for rows in (slice(70), slice(1), slice(13, 14), slice(60, 70)):
            with running(name, arch, 2, *options):
                got = fp8_gemm(args[0][rows], args[1][rows], *args[2:], out_dtype=torch.float32)
            want = got if want is None else want
            assert torch.equal(got, want[rows])


@pytest.mark.parametrize("split", [2, 4, 8])
def test_parts_of_k_are_added_in_order(split):
    args = operands(3, 72, 1280)
    with running("sm90_small_8x64", "sm_90a", 2, None, split):
        got = fp8_gemm(*args, out_dtype=torch.float32)
        assert all(torch.equal(fp8_gemm(*args, out_dtype=torch.float32), got) for _ in range(3))
    bounds = [10 * part // split for part in range(split + 1)]
    with running("sm90_small_8x64", "sm_90a", 0):
        parts = [
            fp8_gemm(
                args[0][:, 128 * first : 128 * end],
                args[1][:, first:end],
                args[2][:, 128 * first : 128 * end],
                args[3][:, first:end],
                out_dtype=torch.float32,
            )
            for first, end in itertools.pairwise(bounds)
        ]
    assert torch.equal(got, functools.reduce(torch.add, parts))


K2_LINEARS = [(2112, 7168), (12288, 1536), (16384, 512), (7168, 8192), (4096, 7168), (7168, 2048), (7168, 18432)]


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(_fp8_plan, "chip", lambda device: _launch.Chip(90, 132, 227 * 1024))


@pytest.mark.parametrize("groups", [1, 48])
@pytest.mark.parametrize("m", [1, 8, 64, 85, 512, 4096])
def test_the_plan_is_the_cheapest_there_is(m, groups, h100):
    for n, k in K2_LINEARS:
        for options in ({}, dict(fine=True), dict(batch_invariant=True)):
            costs = ops.fp8_gemm_costs(m, n, k, groups=groups, **options)
            assert costs[0][1] == min(clocks for _, clocks in costs) > 0
            assert costs[0][0] == ops.fp8_gemm_plan(m, n, k, groups=groups, **options)
            plans = [plan for plan, _ in costs]
            assert len(set(plans)) == len(plans) >= 7
            assert not any("fine" in options and "small" not in p.kernel and "fine" not in p.kernel for p in plans)
            assert not any("batch_invariant" in options and p.split > 1 for p in plans)


def test_plans(h100):
    # A decoding step must fill 132 multiprocessors, be it by parts of K, and many rows must take large tiles.
    for n, k in K2_LINEARS:
        plan = ops.fp8_gemm_plan(1, n, k)
        assert plan.kernel.startswith("sm90_small") and -(-n // 64) * plan.split >= 112
    assert ops.fp8_gemm_plan(1, 2112, 7168).split >= 4
    for n, k in K2_LINEARS:
        kernel = ops.fp8_gemm_plan(4096, n, k).kernel
        assert kernel == "sm90_pingpong_128x128" if k <= 2048 else kernel in ("sm90_128x192", "sm90_256x128")
    assert ops.fp8_gemm_plan(5, 7, 0).kernel.startswith("portable")
    # Blocks that share a factor do not meet in each of many tiles of few blocks of K.
    assert ops.fp8_gemm_plan(4096, 32768, 512) == ("sm90_pingpong_128x128", "a", 1)


def tile_work(plan, m, n, sms):
    """Elements of D that an SM multiplies, padding counted, and the share of SMs that get a tile at all."""
    rows, columns = map(int, plan.kernel.split("_")[-1].split("x"))
    small = "small" in plan.kernel
    cluster = plan.split if small else 2 if plan.share else 1
    units = -(-m // (rows * (2 if plan.share == "b" else 1))) * -(-n // (columns * (2 if plan.share == "a" else 1)))
    resident = 2 if small and units * cluster > sms else 1  # blocks on an SM
    at_once = resident * sms // cluster
    return -(-units // at_once) * rows * columns, min(units, at_once) * cluster / (sms * resident)


@pytest.mark.parametrize("sms", [132, 108, 78])  # H100, and parts of one, or the 78 of an H20
def test_plans_use_the_sms_there_are(sms):
    """Beside the model that chooses: counted tiles. What bounds the ratio for few rows is the menu of tiles."""
    chip = _launch.Chip(90, sms, 227 * 1024)
    for m in (1, 8, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192):
        for n, k in (*K2_LINEARS, (24576, 1536), (32768, 512), (7168, 16384)):
            costs = ops.plans_on(chip, 1, m, n, k)
            (plan, clocks), least = costs[0], min(clocks for _, clocks in costs)
            assert clocks == least
            work, used = tile_work(plan, m, n, sms)
            where = f"{m} x {n} x {k}: {plan}"
            assert used >= (0.5 if m <= 64 or m >= 512 else 0.25), where  # each may read 46 bytes a clock
            if m > 64:
                best = min(tile_work(p, m, n, sms)[0] for p, _ in costs if "small" not in p.kernel)
                assert work <= best * (1.1 if m >= 512 else 1.5), where
                assert work <= m * n / sms * (1.25 if m >= 4096 else 2.0 if m >= 512 else 3.5), where


def test_groups_that_must_be_empty_are_not_planned_for(monkeypatch):
    """Of 384 groups one row fills one: the weights of the others are not read."""
    plans = []
    monkeypatch.setattr(ops, "_launch", lambda *args, plan, **kwargs: plans.append(plan))
    a, a_scales = quantize_1x128(torch.zeros(1, 1024))
    b, b_scales = (x.expand(384, -1, -1) for x in quantize_128x128(torch.zeros(1, 1024, 1024)))
    with k2kernels.emulated("sm_90a"):
        k2kernels.grouped_fp8_gemm_swiglu(a, a_scales, b, b_scales, offsets=torch.zeros(385, dtype=torch.int32))
        few, many = (ops.fp8_gemm_plan(1, 1024, 1024, groups=groups, swiglu=True) for groups in (1, 384))
    assert few != many
    assert plans == [few]


def test_plans_of_other_chips():
    with k2kernels.emulated("sm_80"):
        assert ops.fp8_gemm_plan(1, 4096, 7168) == ("portable_16x128", None, 1)
        assert ops.fp8_gemm_plan(4096, 4096, 7168) == ("portable_128x128", None, 1)
    small = _launch.Chip(89, 128, 99 * 1024)  # as an RTX 4090
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fp8_plan, "chip", lambda device: small)
        assert ops.fp8_gemm_plan(4096, 4096, 7168) == ("portable_64x128", None, 1)


def test_kernels_are_served_by_the_plan_or_by_force():
    args = operands(3, 8, 128)
    with k2kernels.emulated("sm_80"):
        with ops.fp8_gemm_kernel("portable_64x128"):
            forced = fp8_gemm(*args)
        assert torch.equal(forced, fp8_gemm(*args))
    for arch in ("sm_80", "sm_90a"):
        args = operands(3, 72, 1280)
        with k2kernels.emulated(arch, seed=2):
            alone, batch = fp8_gemm(args[0][:1], args[1][:1], *args[2:], batch_invariant=True), fp8_gemm(*args)
            assert torch.equal(alone, fp8_gemm(*args, batch_invariant=True)[:1])
            check_gemm(batch, *exact(*args))
    with pytest.raises(ValueError, match=r"fp8_gemm_kernel: kernel must be one of 'portable_128x128', .*, got 'best'"):
        with ops.fp8_gemm_kernel("best"):
            pass
    with pytest.raises(ValueError, match=r"fp8_gemm_kernel: split must be one of 1, got 2"):
        with ops.fp8_gemm_kernel("sm90_128x128", split=2):
            pass
    with pytest.raises(ValueError, match=r"fp8_gemm_kernel: share must be one of None, got 'a'"):
        with ops.fp8_gemm_kernel("sm90_small_8x64", "a"):
            pass
    with k2kernels.emulated("sm_80"), ops.fp8_gemm_kernel("sm90_128x128"):
        with pytest.raises(RuntimeError, match="fp8_gemm: sm90_128x128 does not run on this GPU, sm_80 with"):
            fp8_gemm(*args)


@with_kernels
@pytest.mark.parametrize("dtype", RESULTS)
@pytest.mark.parametrize("counts", [[100, 0, 128, 300, 1], [0, 0], [0, 513, 0], []], ids=str)
def test_wgrad(counts, dtype):
    n, k = 136, 72
    offsets, real = aligned(counts, 128)
    dy, x = torch.randn(len(real), n), torch.randn(len(real), k)
    kwargs = dict(offsets=offsets, counts=ints(*counts))
    a, a_scales = quantize_1x128(dy, transpose=True, **kwargs)
    b, b_scales = quantize_1x128(x, transpose=True, scale_layout="column", **kwargs)
    a.view(torch.uint8)[:, ~real] = NAN_CODE
    b.view(torch.uint8)[:, ~real] = NAN_CODE
    unused = torch.tensor([not real[128 * i : 128 * (i + 1)].any() for i in range(a_scales.shape[1])])
    a_scales[:, unused] = math.nan
    b_scales[:, unused] = math.nan
    c = torch.randn(len(counts), n, k)
    got = grouped_fp8_wgrad(a, a_scales, b, b_scales, **kwargs, out_dtype=dtype)
    added = grouped_fp8_wgrad(a, a_scales, b, b_scales, **kwargs, out_dtype=dtype, accumulate=c)
    assert got.shape == (len(counts), n, k) and got.dtype == dtype
    for group, count in enumerate(counts):
        start = int(offsets[group])
        tokens, blocks = slice(start, start + count), slice(start // 128, start // 128 + ceil128(count))
        want, magnitude = exact(a[:, tokens], a_scales[:, blocks], b[:, tokens], b_scales[:, blocks])
        check_gemm(got[group], want, magnitude)
        check_gemm(added[group], want + c[group].double(), magnitude + c[group].abs().double())


@with_kernels
def test_wgrad_ignores_where_an_empty_group_starts():
    full = grouped_fp8_wgrad(*TOKENS, offsets=ints(0, 256), counts=ints(200))
    got = grouped_fp8_wgrad(*TOKENS, offsets=ints(0, 200, 200), counts=ints(200, 0))
    assert torch.equal(got[0], full[0]) and got[1].eq(0).all()


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_a_group_of_wgrad_inside_a_block_is_nan_where_nobody_checks(arch):
    """A GPU's offsets are not looked at by the host: neither a misaligned address nor another group's tokens."""
    offsets, counts = ints(0, 128, 133, 256), ints(128, 0, 100)
    with k2kernels.emulated(arch, seed=2):
        got = torch.full((3, 8, 16), math.nan)
        ops._launch(got, *TOKENS, offsets, counts, op="grouped_fp8_wgrad")
    right = grouped_fp8_wgrad(*TOKENS, offsets=ints(0, 128), counts=ints(128))
    torch.testing.assert_close(got[0], right[0], rtol=1e-4, atol=1e-3)
    assert got[1].eq(0).all() and got[2].isnan().all()


@with_kernels
def test_wgrad_is_the_gradient_of_the_grouped_gemm():
    counts, n, k = [300, 40, 129], 64, 72
    offsets, real = aligned(counts, 128)
    kwargs = dict(offsets=offsets, counts=ints(*counts))
    x = torch.randn(len(real), k, dtype=torch.float64)
    w = torch.randn(3, n, k, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(len(real), n, dtype=torch.float64)
    for group, count in enumerate(counts):
        rows = slice(int(offsets[group]), int(offsets[group]) + count)
        (x[rows] @ w[group].T).backward(dy[rows])
    transposed = [t for m in (dy, x) for t in quantize_1x128(m.float(), transpose=True, **kwargs)]
    got = grouped_fp8_wgrad(*transposed, **kwargs)
    # Two e4m3 roundings of uniform relative error up to 2**-4: about 30 dB.
    noise = (got - w.grad).square().sum() / w.grad.square().sum()
    assert 10 * math.log10(noise) < -28


@with_kernels
def test_wgrad_accumulates_microbatches_in_float32():
    kwargs = dict(offsets=ints(0, 128), counts=ints(128))
    total, want = torch.zeros(1, 8, 8), torch.zeros(8, 8, dtype=torch.float64)
    for _ in range(100):
        a, a_scales = quantize_1x128(torch.rand(8, 128))
        b, b_scales = quantize_1x128(torch.rand(8, 128))
        total = grouped_fp8_wgrad(a, a_scales, b, b_scales, **kwargs, accumulate=total)
        want += exact(a, a_scales, b, b_scales)[0]
    torch.testing.assert_close(total[0].double(), want, rtol=2e-6, atol=0)


DENSE = (torch.ones(3, 192).to(E4M3), torch.ones(3, 2), torch.ones(136, 192).to(E4M3), torch.ones(2, 2))
EXPERTS = (torch.ones(2, 136, 192).to(E4M3), torch.ones(2, 2, 2))
ROWS = (torch.ones(9, 192).to(E4M3), torch.ones(2, 9).T, *EXPERTS)
MASKED = (torch.ones(2, 4, 192).to(E4M3), torch.ones(2, 4, 2), *EXPERTS)
TOKENS = (torch.ones(8, 256).to(E4M3), torch.ones(8, 2), torch.ones(16, 256).to(E4M3), torch.ones(16, 2))
BIAS, C, OUT = torch.ones(136), torch.ones(3, 136), torch.zeros(3, 136)
PLAIN = torch.float32, 0, False, None  # out_dtype, b_row_offset, batch_invariant, row_weights
REGISTERED = {
    "fp8_gemm": (ops._fp8_gemm, (*DENSE, None, None, torch.float16, 0, False, None)),
    "fp8_gemm full": (ops._fp8_gemm, (*DENSE, BIAS, C, torch.float32, 0, True, C[:, 0])),
    "fp8_gemm out": (ops._fp8_gemm.out, (*DENSE, BIAS, C, *PLAIN, OUT)),
    "contiguous": (ops._grouped_fp8_gemm, (*ROWS, ints(0, 4, 8), ints(3, 0), None, torch.bfloat16, 0, False, None)),
    "contiguous out": (ops._grouped_fp8_gemm.out, (*ROWS, ints(0, 4, 8), None, 4, *PLAIN, torch.zeros(9, 136))),
    "masked": (ops._grouped_fp8_gemm, (*MASKED, None, ints(3, 0), 2, torch.float32, 0, False, torch.ones(2, 4))),
    "masked out": (ops._grouped_fp8_gemm.out, (*MASKED, None, ints(3, 0), None, *PLAIN, torch.zeros(2, 4, 136))),
    "wgrad": (ops._grouped_fp8_wgrad, (*TOKENS, ints(0, 128, 256), ints(3, 9), torch.float32, torch.ones(2, 8, 16))),
}


@pytest.mark.parametrize("case", REGISTERED)
def test_registration(case):
    check_op(*REGISTERED[case])


def chain(x, w, w_scales, offsets, main_grad):
    a, a_scales = quantize_1x128(x, scale_layout="column")
    dense = fp8_gemm(a, a_scales, w[0], w_scales[0], bias=main_grad[0])
    fp8_gemm(a, a_scales, w[0], w_scales[0], accumulate=main_grad, out=main_grad, out_dtype=torch.float32)
    grouped = grouped_fp8_gemm(a, a_scales, w, w_scales, offsets=offsets)
    masked = grouped_fp8_gemm(a[None], a_scales[None], w[:1], w_scales[:1], masked_m=offsets[1:2])
    transposed = quantize_1x128(x, transpose=True, offsets=offsets)
    return (
        dense,
        grouped,
        masked,
        grouped_fp8_wgrad(*transposed, *transposed, offsets=offsets, counts=offsets[1:]),
        main_grad,
    )


def test_compiles_as_one_graph():
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (7, 12):
        w, w_scales = quantize_128x128(torch.randn(1, 136, 200))
        args = torch.randn(rows, 200), w, w_scales, ints(0, 5)
        for got, want in zip(compiled(*args, torch.ones(rows, 136)), chain(*args, torch.ones(rows, 136))):
            assert got.dtype == want.dtype and torch.equal(got, want)


def meta(tensors):
    return [t.to("meta") for t in tensors]


def test_meta_tensors():
    groups = [t.to("meta") for t in (ints(0, 4, 8), ints(3, 0))]
    assert fp8_gemm(*meta(DENSE), out_dtype=torch.float16).shape == (3, 136)
    assert grouped_fp8_gemm(*meta(ROWS), offsets=groups[0]).shape == (9, 136)
    assert grouped_fp8_gemm(*meta(MASKED), masked_m=groups[1]).shape == (2, 4, 136)
    wgrad = grouped_fp8_wgrad(*meta(TOKENS), offsets=groups[0], counts=groups[1])
    assert wgrad.shape == (2, 8, 16) and wgrad.dtype == torch.float32


def dense(a=DENSE[0], a_scales=DENSE[1], b=DENSE[2], b_scales=DENSE[3], **kwargs):
    return lambda: fp8_gemm(a, a_scales, b, b_scales, **kwargs)


def rows(*args, **kwargs):
    return lambda: grouped_fp8_gemm(*(args or ROWS), **kwargs)


def tokens(*args, offsets=ints(0, 128, 256), counts=ints(3, 9), **kwargs):  # noqa: B008 (never written)
    return lambda: grouped_fp8_wgrad(*(args or TOKENS), offsets=offsets, counts=counts, **kwargs)


GRAD = torch.ones(136, requires_grad=True)
BAD = {
    "a dtype": (dense(a=C), TypeError, r"fp8_gemm: a must be \[M, K\] float8_e4m3fn, got \[3, 136\] float32"),
    "e5m2": (dense(b=DENSE[2].to(torch.float8_e5m2)), TypeError, "b must be .* float8_e4m3fn, got .* float8_e5m2"),
    "b K": (dense(b=EXPERTS[0][0, :, :128]), ValueError, r"b must be \[N=136, K=192\] .*, got \[136, 128\]"),
    "a_scales": (dense(a_scales=C[:, :3]), ValueError, r"a_scales must be \[M=3, 2\] float32, got \[3, 3\]"),
    "a_scales ue8m0": (dense(a_scales=ints(1, 2)), TypeError, "a_scales must be .* float32, got .* int32"),
    "b_scales": (
        dense(b_scales=torch.ones(3, 2)),
        ValueError,
        r"b_scales must be \[2, 2\] float32, got \[3, 2\] float32; one scale per 128x128 of b, or a row",
    ),
    "bias": (dense(bias=BIAS[:3]), ValueError, r"bias must be \[N=136\] .*, got \[3\]"),
    "accumulate": (dense(accumulate=C.T), ValueError, r"accumulate must be \[M=3, N=136\] .*, got \[136, 3\]"),
    "accumulate dtype": (dense(accumulate=C.double()), TypeError, "accumulate must be .*, got .* float64"),
    "row_weights": (dense(row_weights=BIAS), ValueError, r"row_weights must be \[M=3\] float32, got \[136\]"),
    "row_weights dtype": (
        dense(row_weights=C[:, 0].half()),
        TypeError,
        "row_weights must be .* float32, got .* float16",
    ),
    "out_dtype": (dense(out_dtype=torch.float64), ValueError, "out_dtype must be one of torch.bfloat16, .*float64"),
    "out dtype": (dense(out=OUT), TypeError, "out must be .* bfloat16, got .* float32; out_dtype= must name"),
    "out shape": (dense(out=OUT.T, out_dtype=torch.float32), ValueError, r"out must be \[M=3, N=136\] float32, got"),
    "out grad": (
        dense(out=OUT, bias=GRAD, out_dtype=torch.float32),
        ValueError,
        "fp8_gemm: bias must be a tensor that needs no gradient, got one with requires_grad",
    ),
    "out memory": (
        dense(out=torch.empty(3, 136).as_strided((3, 136), (100, 1)), out_dtype=torch.float32),
        ValueError,
        "out must be a tensor with memory for each element, got one whose elements share it; call .contiguous",
    ),
    "list": (dense(a=[1.0]), TypeError, "a must be a tensor .* got list"),
    "device": (dense(b=DENSE[2].to("meta")), ValueError, "b must be on cpu like the arguments before it, got meta"),
    "no layout": (rows(), ValueError, "grouped_fp8_gemm: the layout must be given by offsets .* got neither"),
    "two layouts": (rows(offsets=ints(0, 4, 8), masked_m=ints(1, 1)), ValueError, "the layout must be .* got both"),
    "masked counts": (rows(*MASKED, masked_m=ints(1, 1), counts=ints(1, 1)), ValueError, "counts must be None with"),
    "masked 2-D": (rows(masked_m=ints(1, 1)), ValueError, r"a must be \[G, maxM, K\] .*, got \[9, 192\]"),
    "contiguous 3-D": (rows(*MASKED, offsets=ints(0, 4, 8)), ValueError, r"a must be \[cap, K\] .*, got \[2, 4, 192\]"),
    "offsets size": (rows(offsets=ints(0, 4)), ValueError, r"offsets must be \[3\] int32, got \[2\]"),
    "offsets dtype": (rows(offsets=torch.tensor([0, 4, 8])), TypeError, "offsets must be .* int32, got .* int64"),
    "offsets range": (
        rows(offsets=ints(0, 4, 10)),
        ValueError,
        r"offsets must rise within 0 .. 9 .*, got \[0, 4, 10\]",
    ),
    "offsets fall": (rows(offsets=ints(0, 4, 3)), ValueError, "offsets must rise"),
    "offsets negative": (rows(offsets=ints(-1, 4, 8)), ValueError, "offsets must rise"),
    "counts fit": (
        rows(offsets=ints(0, 4, 8), counts=ints(5, 1)),
        ValueError,
        r"grouped_fp8_gemm: counts must fit between the offsets, at most \[4, 4\], got \[5, 1\]",
    ),
    "masked range": (
        rows(*MASKED, masked_m=ints(5, 0)),
        ValueError,
        r"grouped_fp8_gemm: masked_m must be within 0 .. 4 \(the rows of a group\), got \[5, 0\]",
    ),
    "masked negative": (rows(*MASKED, masked_m=ints(0, -1)), ValueError, "masked_m must be within"),
    "out validated": (
        rows(offsets=ints(0, 4, 10), out=torch.zeros(9, 136), out_dtype=torch.float32),
        ValueError,
        "offsets must rise within",
    ),
    "grouped b_scales": (
        rows(*ROWS[:3], torch.ones(2, 3, 2), offsets=ints(0, 4, 8)),
        ValueError,
        r"must be \[2, 2, 2\] float32, got \[2, 3, 2\]",
    ),
    "grouped out": (rows(offsets=ints(0, 4, 8), out=OUT.bfloat16()), ValueError, r"out must be \[cap=9, N=136\]"),
    "contiguous row_weights": (
        rows(offsets=ints(0, 4, 8), row_weights=torch.ones(8)),
        ValueError,
        r"row_weights must be \[cap=9\] float32, got \[8\]",
    ),
    "masked row_weights": (
        rows(*MASKED, masked_m=ints(1, 1), row_weights=torch.ones(8)),
        ValueError,
        r"row_weights must be \[G=2, maxM=4\] float32, got \[8\]",
    ),
    "wgrad rows": (
        tokens(TOKENS[0].T, *TOKENS[1:]),
        ValueError,
        r"b must be \[K=16, T=8\] .*; the token axis is the last",
    ),
    "wgrad scales": (tokens(*TOKENS[:3], torch.ones(1, 2)), ValueError, r"b_scales must be \[K=16, 2\]"),
    "wgrad alignment": (
        tokens(offsets=ints(0, 64, 256)),
        ValueError,
        r"grouped_fp8_wgrad: offsets must be multiples of 128 where a group has rows, got \[0, 64, 256\]",
    ),
    "wgrad counts": (tokens(counts=ints(3, 129)), ValueError, "counts must fit between the offsets"),
    "wgrad C": (tokens(accumulate=torch.ones(2, 16, 8)), ValueError, r"accumulate must be \[G=2, N=8, K=16\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_no_backward():
    for call in (dense(bias=GRAD), dense(accumulate=GRAD.expand(3, 136))):
        with pytest.raises(RuntimeError, match="fp8_gemm: this op has no backward"):
            call().sum().backward()


def test_dequantised_weights_agree_with_the_gemm():
    a, a_scales, b, b_scales = operands(4, 192, 200)
    x, w = dequantize(a, a_scales, dtype=torch.float64), dequantize(b, b_scales, block=(128, 128), dtype=torch.float64)
    torch.testing.assert_close(x @ w.T, exact(a, a_scales, b, b_scales)[0])
