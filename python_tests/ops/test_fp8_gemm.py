import math

import numpy as np
import pytest
import torch

from k2kernels.ops import fp8_gemm as ops
from k2kernels.ops.fp8_gemm import fp8_gemm, grouped_fp8_gemm, grouped_fp8_wgrad
from k2kernels.ops.quant import dequantize, quantize_1x128, quantize_128x128
from k2kernels.testing.compare import check_close, check_op, cos_diff, worst_tile

E4M3 = torch.float8_e4m3fn
NAN_CODE = 0x7F
RESULTS = [torch.float32, torch.bfloat16, torch.float16]


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
    limit = (1e-6 if same_sign else 1e-7) if got.dtype == torch.float32 else 5e-6
    assert cos_diff(got, want) < limit
    assert worst_tile(got, want)[0] < limit
    # Up to K = 16384, 127 sums in a block, the product of the scales, the product with it and 127 sums of blocks are
    # 256 roundings to float32; the one to the result's dtype comes last, with a fixed step among its denormals.
    info = torch.finfo(got.dtype)
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


@pytest.mark.parametrize("fine", [False, True], ids=["128x128", "1x128"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_gemm_is_the_product_of_the_dequantised(shape, fine):
    args = operands(*shape, fine=fine)
    want, magnitude = exact(*args)
    for dtype in RESULTS:
        got = fp8_gemm(*args, out_dtype=dtype)
        assert got.dtype == dtype and got.is_contiguous()
        check_gemm(got, want, magnitude)
    assert torch.equal(fp8_gemm(*args), fp8_gemm(*args, out_dtype=torch.bfloat16))


@pytest.mark.parametrize("k", [7168, 16384])
def test_promotion_keeps_same_sign_sums_unbiased(k):
    args = operands(4, 136, k, same_sign=True)
    want, magnitude = exact(*args)
    got = fp8_gemm(*args, out_dtype=torch.float32)
    check_gemm(got, want, magnitude, same_sign=True)
    assert ((got.double() / want - 1).mean(dim=1).abs() < 1e-3).all()
    check_gemm(fp8_gemm(*args), want, magnitude, same_sign=True)


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


def test_small_integers_are_exact():
    a, b = torch.randint(-4, 5, (33, 640)).to(E4M3), torch.randint(-4, 5, (72, 640)).to(E4M3)
    a_scales, b_scales = torch.exp2(torch.randint(-1, 2, (33, 5))), torch.exp2(torch.randint(-1, 2, (1, 5)))
    want, _ = exact(a, a_scales, b, b_scales)
    assert torch.equal(fp8_gemm(a, a_scales, b, b_scales, out_dtype=torch.float32).double(), want)


def test_blocks_are_added_in_order_and_scales_multiplied_first():
    a, b = torch.ones(1, 384).to(E4M3), torch.ones(1, 384).to(E4M3)
    # 2**24 + 1 rounds to 2**24 in float32, so that only this order gives 0.
    a_scales = torch.tensor([[2.0**24, 1.0, -(2.0**24)]]) / 128
    assert fp8_gemm(a, a_scales, b, torch.ones(1, 3), out_dtype=torch.float32).item() == 0
    # The sum times 2**124 would overflow; the product of the scales is 1.
    huge = torch.tensor([[2.0**124, 0.0, 0.0]])
    got = fp8_gemm(a, huge, b, torch.tensor([[2.0**-124, 0.0, 0.0]]), out_dtype=torch.float32)
    assert got.item() == 128


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


def test_out_may_be_accumulate():
    args = operands(5, 72, 192)
    main_grad = torch.randn(5, 72)
    want = fp8_gemm(*args, accumulate=main_grad, out_dtype=torch.float32)
    fp8_gemm(*args, accumulate=main_grad, out=main_grad, out_dtype=torch.float32)
    assert torch.equal(main_grad, want)


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


def test_nan_stays_in_its_row_and_column():
    a, a_scales, b, b_scales = operands(5, 72, 192)
    clean = fp8_gemm(a, a_scales, b, b_scales)
    a.view(torch.uint8)[3, 150] = NAN_CODE
    b.view(torch.uint8)[7, 1] = NAN_CODE
    got = fp8_gemm(a, a_scales, b, b_scales)
    poisoned = (torch.arange(5)[:, None] == 3) | (torch.arange(72) == 7)
    assert got[poisoned].isnan().all() and torch.equal(got[~poisoned], clean[~poisoned])


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
    "many": [k % 3 for k in range(48)],
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


@pytest.mark.parametrize("fine", [False, True], ids=["128x128", "1x128"])
@pytest.mark.parametrize("alignment", [1, 8, 128])
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


def test_groups_without_counts_fill_the_offsets():
    b, b_scales = grouped_weights(3, 72, 192, fine=False)
    a, a_scales = quantize_1x128(torch.randn(20, 192))
    offsets = ints(2, 9, 9, 18)
    got = grouped_fp8_gemm(a, a_scales, b, b_scales, offsets=offsets)
    want = grouped_fp8_gemm(a, a_scales, b, b_scales, offsets=offsets, counts=ints(7, 0, 9))
    assert torch.equal(got, want) and got[2:18].ne(0).any(1).all() and got[:2].eq(0).all() and got[18:].eq(0).all()


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


def test_wgrad_ignores_where_an_empty_group_starts():
    full = grouped_fp8_wgrad(*TOKENS, offsets=ints(0, 256), counts=ints(200))
    got = grouped_fp8_wgrad(*TOKENS, offsets=ints(0, 200, 200), counts=ints(200, 0))
    assert torch.equal(got[0], full[0]) and got[1].eq(0).all()


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
REGISTERED = {
    "fp8_gemm": (ops._fp8_gemm, (*DENSE, None, None, torch.float16)),
    "fp8_gemm full": (ops._fp8_gemm, (*DENSE, BIAS, C, torch.float32)),
    "fp8_gemm out": (ops._fp8_gemm_out, (*DENSE, BIAS, C, OUT)),
    "contiguous": (ops._grouped_fp8_gemm, (*ROWS, ints(0, 4, 8), ints(3, 0), None, torch.bfloat16)),
    "contiguous out": (ops._grouped_fp8_gemm_out, (*ROWS, ints(0, 4, 8), None, 4, torch.zeros(9, 136))),
    "masked": (ops._grouped_fp8_gemm, (*MASKED, None, ints(3, 0), 2, torch.float32)),
    "masked out": (ops._grouped_fp8_gemm_out, (*MASKED, None, ints(3, 0), None, torch.zeros(2, 4, 136))),
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
    "out_dtype": (dense(out_dtype=torch.float64), ValueError, "out_dtype must be one of torch.bfloat16, .*float64"),
    "out dtype": (dense(out=OUT), TypeError, "out must be .* bfloat16, got .* float32; out_dtype= must name"),
    "out shape": (dense(out=OUT.T, out_dtype=torch.float32), ValueError, r"out must be \[M=3, N=136\] float32, got"),
    "out grad": (
        dense(out=OUT, bias=GRAD, out_dtype=torch.float32),
        ValueError,
        "fp8_gemm: bias must be a tensor that needs no gradient, got one with requires_grad",
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
