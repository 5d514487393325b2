"""Correct kernels give correct numbers under every schedule and every delivery of asynchronous copies."""

import numpy as np
import pytest
import torch
from emulated_kernels import SCHEDULES, EmulatorError, from_bf16, library, run, to_bf16

BF16, FP16, E4M3 = 1, 2, 3  # k2k::Type
LATE, EARLY, RANDOM = range(3)


def encode(x, kind):
    x = np.ascontiguousarray(x, np.float32)
    if kind == BF16:
        return to_bf16(x)
    if kind == FP16:
        return x.astype(np.float16).view(np.uint16)
    return torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def integers(rng, *shape):
    return rng.integers(-4, 5, shape).astype(np.float32)  # products and sums are exact


@pytest.mark.parametrize("delivery", [LATE, EARLY, RANDOM])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kernel", ["gemm_mma", "gemm_wgmma"])
@pytest.mark.parametrize("m, n, k", [(128, 192, 128), (70, 100, 200), (1, 1, 8)])
def test_gemm(kernel, m, n, k, schedule, delivery):
    rng = np.random.default_rng(m + n + k)
    a, b = to_bf16(rng.standard_normal((m, k))), to_bf16(rng.standard_normal((n, k)))
    exact = from_bf16(a) @ from_bf16(b).T
    c = np.full((m, n), np.nan, np.float32)
    run(kernel, a, b, c, m, n, k, schedule=schedule, delivery=delivery)
    # k sequential float additions of terms that sum to sum|a||b|
    bound = k * 2.0**-24 * (np.abs(from_bf16(a)) @ np.abs(from_bf16(b)).T)
    assert (np.abs(c - exact) <= bound).all()


@pytest.mark.parametrize("registers", [0, 1])
@pytest.mark.parametrize("n", [8, 16, 24, 32, 64, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("kind", [BF16, FP16, E4M3])
def test_wgmma_k_major(kind, n, registers):
    rng = np.random.default_rng(n)
    depth = 128 if kind == E4M3 else 64
    a, b = integers(rng, 64, depth), integers(rng, n, depth)
    c = np.full((64, n), np.nan, np.float32)
    run("wgmma_k_major", encode(a, kind), encode(b, kind), c, kind, n, registers, schedule="pct1")
    assert (c == a @ b.T).all()


@pytest.mark.parametrize("form", range(4))
def test_wgmma_mn_major(form):
    rng = np.random.default_rng(form)
    a, b = integers(rng, 64, 64), integers(rng, 128, 64)
    c = np.full((64, 128), np.nan, np.float32)
    run("wgmma_mn_major", to_bf16(a.T if form in (0, 2) else a), to_bf16(b.T if form else b), c, form)
    assert (c == a @ b.T).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
class TestSmallKernels:
    def test_warp_sum(self, schedule):
        x = np.random.default_rng(0).standard_normal((5, 1024)).astype(np.float32)
        sums = np.full(5, np.nan, np.float32)
        run("warp_sum", x, sums, 5, schedule=schedule)
        np.testing.assert_allclose(
            sums, x.sum(1, dtype=np.float64), rtol=0, atol=1024 * 2.0**-24 * np.abs(x).sum(1).max()
        )

    def test_thread_operands(self, schedule):
        rng = np.random.default_rng(1)
        a, b = integers(rng, 64, 64), integers(rng, 64, 64)
        c = np.full((64, 64), np.nan, np.float32)
        run("thread_operands", to_bf16(a), to_bf16(b), c, schedule=schedule)
        assert (c == a @ b.T).all()

    def test_dsmem(self, schedule):
        x, result = np.arange(512, dtype=np.float32), np.zeros(1, np.float32)
        run("dsmem", x, result, 512, schedule=schedule)
        assert result[0] == x.sum()

    def test_reverse(self, schedule):
        x, y = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
        run("reverse", x, y, schedule=schedule)
        assert (y == x[::-1]).all()

    @pytest.mark.parametrize("rows, columns", [(8, 32), (21, 44), (1, 4)])
    def test_double_tiles(self, rows, columns, schedule):
        x = np.random.default_rng(2).standard_normal((rows, columns)).astype(np.float32)
        y = np.full_like(x, np.nan)
        run("double_tiles", x, y, rows, columns, schedule=schedule)
        assert (y == 2 * x).all()

    @pytest.mark.parametrize("num_grids", [1, 2, 4])
    def test_exchange(self, num_grids, schedule):
        values, flags, sums = np.full(9, np.nan, np.float32), np.zeros(9, np.uint32), np.zeros(8, np.float32)
        run("exchange", values, flags, sums, 8, num_grids, schedule=schedule)
        assert (sums == 36).all()

    def test_count_threads(self, schedule):
        counter = np.zeros(1, np.uint32)
        run("count_threads", counter, 5, schedule=schedule)
        assert counter[0] == 5 * 64

    def test_handover(self, schedule):
        x = np.arange(160, dtype=np.float32).reshape(5, 32)
        y = np.zeros_like(x)
        run("handover", x, y, 5, schedule=schedule)
        assert (y == x[:, ::-1]).all()


def test_an_earlier_chip_is_refused():
    x, result = np.zeros((64, 64), np.uint16), np.zeros((64, 64), np.float32)
    with pytest.raises(EmulatorError, match=r"fence\.proxy\.async needs sm_90; this launch emulates sm_80"):
        run("thread_operands", x, x, result, arch=80)
    with pytest.raises(EmulatorError, match="clusters need sm_90"):
        run("dsmem", np.zeros(4, np.float32), np.zeros(1, np.float32), 4, arch=89)
    a, c = np.zeros((64, 32), np.uint16), np.full((64, 64), np.nan, np.float32)
    run("gemm_mma", a, a, c, 64, 64, 32, arch=80)
    assert (c == 0).all()


def test_seeds_reproduce_a_run():
    def switches(seed):
        before = library().count_switches()
        a, c = np.zeros((64, 64), np.uint16), np.zeros((64, 64), np.float32)
        run("gemm_mma", a, a, c, 64, 64, 64, schedule=(2, seed))
        return library().count_switches() - before

    assert switches(7) == switches(7)


def test_bytes_are_counted():
    before = library().count_bytes_loaded()
    a, c = np.zeros((64, 32), np.uint16), np.zeros((64, 64), np.float32)
    run("gemm_mma", a, a, c, 64, 64, 32)
    assert library().count_bytes_loaded() - before == 2 * 64 * 32 * 2


def test_fp8_as_hopper_sums_it():
    """Against mmaemu, which was compared with H100s bit for bit by its authors."""
    mmaemu = pytest.importorskip("mmaemu")
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((64, 128)), rng.standard_normal((64, 128))
    a, b = encode(8 * a, E4M3), encode(8 * b, E4M3)
    c = np.full((64, 64), np.nan, np.float32)
    run("wgmma_k_major", a, b, c, E4M3, 64, 0, hopper_fp8=True)
    a, b = (torch.from_numpy(x).view(torch.float8_e4m3fn) for x in (a, b))
    expected = mmaemu.accumulate(a, b, use_fast_accum=True, profile="hopper", splitk=1)
    assert torch.equal(torch.from_numpy(c), expected)
    assert not torch.equal(torch.from_numpy(c).double(), a.double() @ b.double().T)  # it does round
