"""Correct kernels give correct numbers under every schedule and every delivery of asynchronous copies."""

import numpy as np
import pytest
import torch
from emulated_kernels import SCHEDULES, EmulatorError, from_bf16, library, run, to_bf16

BF16, FP16, E4M3 = 1, 2, 3  # k2k::Type
LATE, EARLY, RANDOM = range(3)

every_schedule = pytest.mark.parametrize("seed", SCHEDULES.values(), ids=SCHEDULES)


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
@every_schedule
@pytest.mark.parametrize("kernel", ["gemm_mma", "gemm_wgmma"])
@pytest.mark.parametrize("m, n, k", [(128, 192, 128), (70, 100, 200), (1, 1, 8)])
def test_gemm(kernel, m, n, k, seed, delivery):
    rng = np.random.default_rng(m + n + k)
    a, b = to_bf16(rng.standard_normal((m, k))), to_bf16(rng.standard_normal((n, k)))
    exact = from_bf16(a) @ from_bf16(b).T
    c = np.full((m, n), np.nan, np.float32)
    run(kernel, a, b, c, m, n, k, seed=seed, delivery=delivery)
    # k sequential float additions of terms that sum to sum|a||b|
    bound = k * 2.0**-24 * (np.abs(from_bf16(a)) @ np.abs(from_bf16(b)).T)
    assert (np.abs(c - exact) <= bound).all()


@pytest.mark.parametrize("registers", [0, 1])
@pytest.mark.parametrize("kind", [BF16, FP16, E4M3])
def test_wgmma_k_major(kind, registers):
    rng = np.random.default_rng(kind)
    depth = 128 if kind == E4M3 else 64
    a, b = integers(rng, 64, depth), integers(rng, 64, depth)
    c = np.full((64, 64), np.nan, np.float32)
    run("wgmma_k_major", encode(a, kind), encode(b, kind), c, kind, registers, seed=2)
    assert (c == a @ b.T).all()


@pytest.mark.parametrize("form", range(4))
def test_wgmma_mn_major(form):
    rng = np.random.default_rng(form)
    a, b = integers(rng, 64, 64), integers(rng, 128, 64)
    c = np.full((64, 128), np.nan, np.float32)
    run("wgmma_mn_major", to_bf16(a.T if form in (0, 2) else a), to_bf16(b.T if form else b), c, form)
    assert (c == a @ b.T).all()


@every_schedule
class TestSmallKernels:
    def test_warp_sum(self, seed):
        x = np.random.default_rng(0).standard_normal((5, 1024)).astype(np.float32)
        sums = np.full(5, np.nan, np.float32)
        run("warp_sum", x, sums, 5, seed=seed)
        np.testing.assert_allclose(
            sums, x.sum(1, dtype=np.float64), rtol=0, atol=1024 * 2.0**-24 * np.abs(x).sum(1).max()
        )

    def test_thread_operands(self, seed):
        rng = np.random.default_rng(1)
        a, b = integers(rng, 64, 64), integers(rng, 64, 64)
        c = np.full((64, 64), np.nan, np.float32)
        run("thread_operands", to_bf16(a), to_bf16(b), c, seed=seed)
        assert (c == a @ b.T).all()

    def test_dsmem(self, seed):
        x, result = np.arange(512, dtype=np.float32), np.zeros(1, np.float32)
        run("dsmem", x, result, 512, seed=seed)
        assert result[0] == x.sum()

    def test_reverse(self, seed):
        x, y = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
        run("reverse", x, y, seed=seed)
        assert (y == x[::-1]).all()

    @pytest.mark.parametrize("rows, columns", [(8, 32), (21, 44), (1, 4)])
    def test_double_tiles(self, rows, columns, seed):
        x = np.random.default_rng(2).standard_normal((rows, columns)).astype(np.float32)
        y = np.full_like(x, np.nan)
        run("double_tiles", x, y, rows, columns, seed=seed)
        assert (y == 2 * x).all()

    @pytest.mark.parametrize("num_grids", [1, 2, 4])
    def test_exchange(self, num_grids, seed):
        values, flags, sums = np.full(9, np.nan, np.float32), np.zeros(9, np.uint32), np.zeros(8, np.float32)
        run("exchange", values, flags, sums, 8, num_grids, seed=seed)
        assert (sums == 36).all()

    def test_count_threads(self, seed):
        counter = np.zeros(1, np.uint32)
        run("count_threads", counter, 5, seed=seed)
        assert counter[0] == 5 * 64

    def test_split_sum(self, seed):
        x = np.random.default_rng(3).standard_normal((3, 5, 64)).astype(np.float32)
        tickets = np.zeros(3, np.uint32)
        for _ in range(2):  # the first launch leaves the tickets as they were
            parts, sums = np.full_like(x, np.nan), np.full((3, 64), np.nan, np.float32)
            run("split_sum", x, parts, tickets, sums, 3, 5, seed=seed)
            np.testing.assert_allclose(sums, x.sum(1, dtype=np.float64), rtol=0, atol=1e-5)

    def test_pass_on(self, seed):
        x = np.arange(4 * 3 * 32, dtype=np.float32).reshape(4, 3, 32)
        y = np.zeros_like(x)
        run("pass_on", x, y, 3, seed=seed)
        assert (y == np.roll(x, 1, axis=0)).all()

    def test_handover(self, seed):
        x = np.arange(160, dtype=np.float32).reshape(5, 32)
        y = np.zeros_like(x)
        run("handover", x, y, 5, seed=seed)
        assert (y == x[:, ::-1]).all()


@every_schedule
def test_portable_fibers(seed):
    """Threads switched by ucontext: values, waiting blocks, a report and a fault."""
    rng = np.random.default_rng(0)
    for kernel in ("gemm_mma", "gemm_wgmma"):
        a, b = integers(rng, 70, 328), integers(rng, 40, 328)
        c = np.full((70, 40), np.nan, np.float32)
        run(kernel, to_bf16(a), to_bf16(b), c, 70, 40, 328, seed=seed, ucontext=True)
        assert (c == a @ b.T).all()
    values, flags, sums = np.full(9, np.nan, np.float32), np.zeros(9, np.uint32), np.zeros(8, np.float32)
    run("exchange", values, flags, sums, 8, 2, seed=seed, ucontext=True)
    assert (sums == 36).all()
    with pytest.raises(EmulatorError, match=r"1 of 3 arrivals missing.*gemm_wgmma\.cu"):
        run("gemm_wgmma", to_bf16(a), to_bf16(b), c, 70, 40, 328, seed=seed, bug=11, ucontext=True)
    with pytest.raises(EmulatorError, match="access beyond a global allocation"):
        run("gemm_mma", to_bf16(a), to_bf16(b), c, 70, 40, 328, seed=seed, bug=5, ucontext=True)
    x = np.arange(32, dtype=np.float32)
    run("reverse", x, y := np.zeros_like(x), seed=seed, ucontext=True)  # after the errors
    assert (y == x[::-1]).all()


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
        run("gemm_mma", a, a, c, 64, 64, 64, seed=seed)
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
    run("wgmma_k_major", a, b, c, E4M3, 0, hopper_fp8=True)
    a, b = (torch.from_numpy(x).view(torch.float8_e4m3fn) for x in (a, b))
    expected = mmaemu.accumulate(a, b, use_fast_accum=True, profile="hopper", splitk=1)
    assert torch.equal(torch.from_numpy(c), expected)
    assert not torch.equal(torch.from_numpy(c).double(), a.double() @ b.double().T)  # it does round


def test_a_tensor_map_is_that_of_its_arguments():
    """The cache of maps is indexed by few bits of a hash: maps of other arguments must not be returned."""
    for count in (8, 4000):
        wrong = np.zeros(2, np.uint32)
        run("tensor_maps", wrong, count)
        assert wrong.tolist() == [0, 2 * count]
