import contextlib
import math

import numpy as np
import pytest
import torch

import k2kernels
from k2kernels.ops import mla_cache as module
from k2kernels.ops.mla_cache import mla_append, mla_gather
from k2kernels.testing.compare import check_close, check_op
from k2kernels.testing.inputs import BAD_PAGES, poisoned_cache

FLOAT_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def empty_cache(pages, page_size, size, dtype, strided=False):
    """NaN, or 0xFF in every byte, which is NaN in every field."""
    gap = 16 if strided else 0
    storage = torch.full((pages, page_size + gap, size + gap), 0xFF if dtype == torch.uint8 else math.nan, dtype=dtype)
    return storage[:, :page_size, :size]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("page_size", [1, 5, 64])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_append_writes_the_named_slots_only(dtype, page_size, strided):
    pages = 70
    cache = empty_cache(pages, page_size, 24, dtype, strided)
    table = torch.randperm(pages)[:30].int().view(2, 15)
    table[:, 14] = int32(*BAD_PAGES[:2])  # unused entries
    last = 14 * page_size - 1
    positions = torch.tensor([0, last, -1, 3, last, 0])  # three tokens of each of two sequences
    kv = torch.randn(6, 24).to(dtype)
    mla_append(kv, cache, table, positions)

    want = empty_cache(pages, page_size, 24, dtype, strided)
    for token, position in enumerate(positions.tolist()):
        if position >= 0:
            page = int(table[token // 3, position // page_size])
            want[page, position % page_size] = kv[token]
    # The storage under the views: what lies between pages and rows is untouched too.
    torch.testing.assert_close(cache._base, want._base, rtol=0, atol=0, equal_nan=True)

    got = mla_gather(cache, table, positions.int(), dtype=torch.float64)
    kv[2] = 0  # position -1
    assert torch.equal(got, kv.double())


def test_one_row_of_the_table_per_token():
    cache = empty_cache(9, 2, 4, torch.float32)
    table = int32([4, 7, -1], [4, 7, -1], [0, -1, -1])
    kv = torch.randn(3, 4)
    mla_append(kv, cache, table, torch.tensor([1, 2, 0]))
    assert torch.equal(cache[[4, 7, 0], [1, 0, 0]], kv)
    assert int(cache.isfinite().all(-1).sum()) == 3


@pytest.mark.parametrize("source, target", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_rows_are_rounded_to_the_cache(source, target):
    kv, cache = torch.randn(5, 8, dtype=source), empty_cache(2, 4, 8, target)
    mla_append(kv, cache, int32([1, 0]), torch.arange(5))
    assert torch.equal(mla_gather(cache, int32([1, 0]), torch.arange(5), dtype=target), kv.to(target))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_quantized_rows_byte_by_byte(dtype, power_of_two, strided):
    kv = torch.randn(7, 576).to(dtype)
    kv[0] = 0
    kv[1, :128] *= 1000
    kv[2, 128:256] = torch.tensor([448.0, -448.0] * 64).to(dtype)  # amax 448: the scale is 1
    cache = empty_cache(3, 4, 656, torch.uint8, strided)
    table = int32([2, 0, -1])
    mla_append(kv, cache, table, torch.arange(7), power_of_two=power_of_two)
    assert (cache[1] == 0xFF).all() and (cache[0, 3] == 0xFF).all()

    for token in range(7):
        raw = cache[[2, 0][token // 4], token % 4].numpy().tobytes()
        scales = np.frombuffer(raw[512:528], "<f4")
        groups = kv[token, :512].float().numpy().reshape(4, 128)
        amax = np.abs(groups).max(1)
        if power_of_two:
            mantissa, _ = np.frexp(scales)
            assert (mantissa == 0.5).all()
            assert (scales * 448 >= amax).all() and (scales[amax > 0] * 224 < amax[amax > 0]).all()
        else:
            assert (scales[amax > 0] == (amax / np.float32(448))[amax > 0]).all()
        assert np.isfinite(scales).all() and (scales > 0).all()
        # torch's own cast is the independent e4m3: nearest, ties to even.
        codes = torch.from_numpy(groups / scales[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
        assert raw[:512] == codes.numpy().tobytes()
        assert raw[528:] == kv[token, 512:].bfloat16().view(torch.uint8).numpy().tobytes()

    exact = kv.double()
    got = mla_gather(cache, table, torch.arange(7), dtype=torch.float64)
    # e4m3 has 3 bits after the leading one: half a unit is 2^-4 of the value, or of the smallest normal, 2^-6 scales.
    scales = torch.tensor(np.array([np.frombuffer(cache[[2, 0][t // 4], t % 4].numpy().tobytes()[512:528], "<f4")
                                    for t in range(7)])).double()  # fmt: skip
    step = torch.maximum(exact[:, :512].abs() / 16, scales.repeat_interleave(128, dim=1) * 2.0**-10)
    check_close(got[:, :512], exact[:, :512], budget=step * (1 + 1e-6), name="latent")
    check_close(got[:, 512:], exact[:, 512:], budget=exact[:, 512:].abs() * 2.0**-8, name="rope")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gather_of_quantized_rows_rounds_once(dtype):
    cache = poisoned_cache([torch.randn(70, 576)], 64, quantize=True, strided=True)
    positions = torch.tensor([69, 0, -1, 64, 63])
    exact = mla_gather(cache.kv_cache, cache.block_table, positions, dtype=torch.float64)
    got = mla_gather(cache.kv_cache, cache.block_table, positions, dtype=dtype)
    assert torch.equal(got, exact.float().to(dtype)) and (got[2] == 0).all()


# The reference, which the tests above hold to the definitions, is what the kernels must agree with in every bit: arch
# and schedule, round robin, depth first and two random ones.
SCHEDULES = [("sm_80", 0), ("sm_90a", 1), ("sm_80", 2), ("sm_90a", 3)]
KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same_bits(got, want):
    assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.fixture(params=SCHEDULES, ids=lambda schedule: f"{schedule[0]}-{schedule[1]}")
def emulated(request):
    """A `with` block in which the kernels run, and must."""

    @contextlib.contextmanager
    def block():
        before = k2kernels.launch_count()
        with k2kernels.emulated(*request.param):
            yield
        assert k2kernels.launch_count() == before + 1

    return block


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("size", [24, 576, 1031])
@pytest.mark.parametrize("target", KERNEL_DTYPES)
@pytest.mark.parametrize("source", KERNEL_DTYPES)
def test_kernels_move_rows_as_the_reference_does(emulated, source, target, size, strided):
    kv = torch.randn(6, size).to(source)
    kv[1, 3], kv[1, 20] = math.inf, -0.0
    table = int32([3, 0, *BAD_PAGES[:1]], [1, 2, *BAD_PAGES[:1]])
    positions = torch.tensor([0, 9, -1, 3, 5, 0])
    want, got = (empty_cache(4, 5, size, target, strided) for _ in range(2))
    mla_append(kv, want, table, positions)
    with emulated():
        mla_append(kv, got, table, positions)
    assert_same_bits(got._base, want._base)
    with emulated():
        rows = mla_gather(got, table, positions.int(), dtype=source)
    assert_same_bits(rows, mla_gather(want, table, positions, dtype=source))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernels_quantize_rows_as_the_reference_does(emulated, dtype, strided, power_of_two):
    kv = (torch.randn(7, 600) * torch.exp2(torch.randint(-20, 12, (7, 1)))).to(dtype)[:, 8:584]
    kv[0] = 0
    kv[1, :128], kv[2, 200], kv[3, 300] = 448, math.nan, -math.inf
    table, positions = int32([2, 0, -1]), torch.tensor([0, 1, 2, -1, 4, 5, 7], dtype=torch.int32)
    want, got = (empty_cache(3, 4, 656, torch.uint8, strided) for _ in range(2))
    mla_append(kv, want, table, positions, power_of_two=power_of_two)
    with emulated():
        mla_append(kv, got, table, positions, power_of_two=power_of_two)
    assert_same_bits(got._base, want._base)
    with emulated():
        rows = mla_gather(got, table, positions, dtype=dtype)
    torch.testing.assert_close(rows, mla_gather(want, table, positions, dtype=dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "cache, message",
    [
        (torch.zeros(2, 4, 8, dtype=torch.float64), "no kernel computes in float64"),
        (torch.zeros(2, 8, 4).mT, "kv_cache must have stride 1 in its last axis, got 4"),
        (
            torch.zeros(2, 4, 660, dtype=torch.uint8)[..., :656],
            "656-byte rows of kv_cache must begin at multiples of 16",
        ),
    ],
)
def test_caches_that_kernels_do_not_take(cache, message):
    table, positions = int32([1, 0]), torch.arange(3)
    with k2kernels.emulated(), pytest.raises(k2kernels.UnsupportedError, match="mla_gather: cannot be .*" + message):
        mla_gather(cache, table, positions, dtype=torch.float32)
    with pytest.raises(ValueError, match="got 9"), k2kernels.emulated():  # contents are checked here too
        mla_gather(torch.zeros(2, 4, 8), int32([9]), positions)


def test_foreign_arrays_are_written_in_place():
    kv, cache = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32), np.zeros((2, 2, 4), np.float32)
    table, positions = np.array([[1, 0]], np.int32), np.arange(3)
    mla_append(kv, cache, table, positions)
    assert np.array_equal(cache.reshape(4, 4)[[2, 3, 0]], kv) and (cache[0, 1] == 0).all()
    assert np.array_equal(mla_gather(cache, table, positions, dtype=torch.float32).numpy(), kv)


@pytest.mark.parametrize("sequences, pages, max_pages", [(0, 3, 2), (2, 3, 2), (2, 0, 0)])
def test_nothing_to_do(sequences, pages, max_pages):
    cache, table = empty_cache(pages, 4, 6, torch.float32), torch.full((sequences, max_pages), -7, dtype=torch.int32)
    none = torch.full((2 * sequences,), -1)
    mla_append(torch.randn(2 * sequences, 6), cache, table, none)
    assert cache.isnan().all()
    assert torch.equal(mla_gather(cache, table, none), torch.zeros(2 * sequences, 6, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_registration(dtype):
    table, positions = int32([2, 0], [1, -1]), torch.tensor([0, 5, 3, -1])
    cache = torch.zeros(3, 4, 656 if dtype == torch.uint8 else 576, dtype=dtype)
    kv = torch.randn(4, 576)
    check_op(module._mla_append, (kv, cache, table, positions, True))

    def step():
        mla_append(kv, cache, table, positions)
        return mla_gather(cache, table, positions)

    check_op(module._mla_gather, (cache, table, positions, torch.bfloat16), compiled=step)
    torch._dynamo.reset()
    cache.zero_()
    torch.compile(step, fullgraph=True, backend="aot_eager")()
    assert cache[2, 0].any() and cache[0, 1].any() and cache[1, 3].any()


def test_meta_tensors():
    cache = torch.empty(3, 64, 656, dtype=torch.uint8, device="meta")
    table, positions = (
        torch.empty(2, 4, dtype=torch.int32, device="meta"),
        torch.empty(6, dtype=torch.int64, device="meta"),
    )
    mla_append(torch.empty(6, 576, device="meta"), cache, table, positions)
    got = mla_gather(cache, table, positions)
    assert got.shape == (6, 576) and got.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", [contextlib.nullcontext, k2kernels.emulated])
def test_autograd_sees_the_write(mode):
    """Else a backward that saved the cache would silently use the new rows."""
    cache, weight = torch.zeros(1, 4, 8), torch.ones(8, requires_grad=True)
    loss = (cache * weight).sum()
    with mode():
        mla_append(torch.ones(1, 8), cache, int32([0]), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with mode(), torch.inference_mode():  # its tensors have no version
        mla_append(torch.ones(1, 8), torch.zeros(1, 4, 8), int32([0]), torch.tensor([0]))


GOOD = dict(
    kv=torch.ones(4, 6), kv_cache=torch.zeros(3, 2, 6), block_table=int32([0, 2], [1, 9]),
    positions=torch.tensor([0, 1, 0, 1]),
)  # fmt: skip


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (dict(kv_cache=torch.zeros(3, 2, 5)), ValueError, r"kv_cache must be \[pages, page_size, 6\], got \[3, 2, 5\]"),
        (dict(kv_cache=torch.zeros(3, 2, 6).long()), TypeError, r"kv_cache must be .* uint8, got \[3, 2, 6\] int64"),
        (dict(kv_cache=torch.zeros(3, 2, 656).byte()), ValueError, r"kv_cache must be floats for rows of 6 elements"),
        (dict(kv=torch.ones(4, 576), kv_cache=torch.zeros(3, 2, 576, dtype=torch.uint8)), ValueError,
         r"kv_cache must be \[pages, page_size, 656\], got \[3, 2, 576\]"),
        (dict(kv_cache=torch.zeros(3, 0, 6)), ValueError, r"kv_cache must be of page_size >= 1, got \[3, 0, 6\]"),
        (dict(kv=torch.ones(4)), ValueError, r"kv must be \[T, D\] .*, got \[4\] float32"),
        (dict(kv=torch.ones(4, 6).int()), TypeError, r"kv must be .*, got \[4, 6\] int32"),
        (dict(kv=torch.ones(4, 6, requires_grad=True)), ValueError, r"kv must be a tensor that needs no gradient"),
        (dict(block_table=torch.zeros(2, 2).long()), TypeError, r"block_table must be .* int32, got \[2, 2\] int64"),
        (dict(positions=torch.zeros(4)), TypeError, r"positions must be .* int32 or int64, got \[4\] float32"),
        (dict(positions=torch.zeros(3).long()), ValueError, r"positions must be \[T=4\] .*, got \[3\]"),
        (dict(block_table=torch.zeros(3, 2).int()), ValueError,
         r"positions must be \[T\] with T a multiple of block_table's rows, 3, got \[4\]; give one row"),
        (dict(block_table=torch.zeros(0, 2).int()), ValueError, r"positions must be \[T\] with .* rows, 0, got \[4\]"),
        (dict(positions=torch.tensor([0, 1, 0, 4])), ValueError, r"positions must be in \[-1, 4\) .*, got 4"),
        (dict(positions=torch.tensor([0, 1, -2, 0])), ValueError, r"positions must be in \[-1, 4\) .*, got -2"),
        (dict(positions=torch.tensor([0, 1, 0, 2])), ValueError,
         r"block_table must be in \[0, 3\) .* where it is used, got 9 at \[1, 1\]"),
        (dict(positions=torch.tensor([1, 0, 1, 1])), ValueError,
         r"positions must name each slot once, got two tokens for page 1, slot 1"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_bad_arguments_write_nothing(changed, error, message):
    arguments = {**GOOD, **changed}
    with pytest.raises(error, match="mla_append: " + message):
        mla_append(**arguments)
    assert not arguments["kv_cache"].any()


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (dict(positions=torch.tensor([0, 1, 0, 4])), ValueError, r"positions must be in \[-1, 4\) .*, got 4"),
        (dict(positions=torch.tensor([0, 1, 0, 2])), ValueError, r"block_table .* got 9 at \[1, 1\]"),
        (dict(dtype=torch.int8), ValueError, r"dtype must be one of torch.float32, .*, got torch.int8"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_of_gather(changed, error, message):
    arguments = {**{name: value for name, value in GOOD.items() if name != "kv"}, **changed}
    with pytest.raises(error, match="mla_gather: " + message):
        mla_gather(**arguments)
