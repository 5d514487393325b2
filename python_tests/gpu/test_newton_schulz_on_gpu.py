"""newton_schulz on a GPU, at sizes of Kimi-K2. Run by `make gpu`."""

import pytest
import torch

import k2kernels as k
from k2kernels.ops import newton_schulz as module
from k2kernels.ops._launch import Chip
from k2kernels.optim import MuonClip
from k2kernels.testing.compare import check_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HALVES = [torch.float16, torch.bfloat16]
SHAPES = [
    (2, 2048, 7168), (7168, 2048), (2, 2048, 2048), (512, 7168), (64, 192, 1536), (1536, 192), (384, 7168),
    (3, 1000, 1111), (1111, 333), (1, 9), (126, 24, 72),
]  # fmt: skip
LIST = [(3, 512, 2048), (700, 650), (2, 2048, 512), (64, 192, 384), (5, 7), (128, 1152)]


def matrices(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


def served(name, launches, call):
    before = k.launch_count(name)
    result = call()
    assert k.launch_count(name) - before == launches
    return result


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_errs_no_more_than_dense_products(shape, algorithm, dtype):
    """In no element more than twice, and on the whole not more, than cuBLAS's products rounded to the same dtype."""
    x = matrices(*shape)
    options = dict(algorithm=algorithm, iterate_dtype=dtype)
    launches = 4 if min(shape[-2:]) <= 192 else 18 if algorithm == "standard" else 20
    got = served("newton_schulz", launches, lambda: k.newton_schulz(x, **options))
    with k.backend("reference"):
        plain = k.newton_schulz(x, **options)
        want = k.newton_schulz(x.double(), algorithm="standard", iterate_dtype=torch.float64)
    check_close(got, want, same_precision=plain)
    if x.numel() > 10_000:
        ours, theirs = ((y - want).square().mean() for y in (got, plain))
        assert ours < 1.2 * theirs


def test_a_matrix_does_not_depend_on_its_list(monkeypatch):
    xs = [matrices(*shape, dtype=dtype) for shape, dtype in zip(LIST, [torch.float32, *HALVES] * 2)]
    alone = [k.newton_schulz(x) for x in xs]
    got = served("newton_schulz_grouped", 20 + 3, lambda: k.newton_schulz_grouped(xs))
    assert all(torch.equal(g, a) for g, a in zip(got, alone))
    assert torch.equal(k.newton_schulz(xs[0][1]), got[0][1])
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(k.newton_schulz_grouped(xs), got))
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 1 << 20)
    assert all(torch.equal(a, b) for a, b in zip(k.newton_schulz_grouped(xs), got))


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(64, 192, 1536), (128, 128, 512), (7168, 128), (20, 60, 50), (3, 130, 130)], ids=str)
def test_small_matrices_are_those_that_go_by_tiles(shape, algorithm, monkeypatch):
    x = matrices(*shape)
    got = served("newton_schulz", 4, lambda: k.newton_schulz(x, algorithm=algorithm))
    monkeypatch.setattr(module, "chip", lambda device: Chip(80, 1, 0))
    assert torch.equal(got, k.newton_schulz(x, algorithm=algorithm))


def test_a_step_is_that_of_plain_pytorch():
    """Weights, momenta and copies; nothing at all where the step is skipped."""
    lists = [[matrices(*shape) for shape in [(3, 512, 1024), (1, 700, 650), (64, 128, 384)]] for _ in range(3)]
    lists.append([w.bfloat16() for w in lists[0]])
    rows = [torch.rand(w.shape[:2], device="cuda") + 0.5 for w in lists[0]]
    options = dict(row_scales=rows, lr=torch.tensor(0.02, device="cuda"), grad_scale=torch.tensor(8.0, device="cuda"))

    def step(skip):
        w, g, m, copies = ([t.clone() for t in ts] for ts in lists)
        module.muon_update(w, g, m, copies=copies, skip=torch.tensor(skip, device="cuda"), **options)
        return w, g, m, copies

    skipped = served("muon_update", 2 + 2 + 17 + 1, lambda: step(True))
    assert all(torch.equal(a, b) for now, then in zip(skipped, lists) for a, b in zip(now, then))
    got = step(False)
    with k.backend("reference"):
        want = step(False)
    for w, x, m, y, c in zip(got[0], want[0], got[2], want[2], got[3]):
        check_close(m, y.double(), budget=1e-6 * (y.abs().double() + 1))
        check_close(w, x.double(), budget=0.02 * 0.2 * max(w.shape) ** 0.5 * 0.02 + 1e-6 * x.abs().double())
        assert torch.equal(c, w.bfloat16())


def test_an_optimizer_step_in_a_graph():
    """Replays equal steps that are not captured: the rate comes from a tensor, and an overflow changes nothing."""
    runs = []
    for captured in (False, True):
        torch.manual_seed(3)
        names = {"a.weight": (256, 512), "b.weight": (300, 130), "norm.weight": (256,)}
        named = [(n, torch.nn.Parameter(matrices(*shape))) for n, shape in names.items()]
        rate = torch.tensor(0.02, device="cuda")
        optimizer = MuonClip(named, rate, qk_clip=None, skip_non_finite=True)
        for _, p in named:
            p.grad = torch.randn_like(p)
        optimizer.step()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        for i in range(4):
            for _, p in named:
                p.grad.copy_(torch.randn_like(p))
            if i == 1:
                named[2][1].grad[3] = torch.inf
            rate.fill_(0.01 if i > 2 else 0.02)
            graph.replay() if captured else optimizer.step()
        runs.append([p.detach() for _, p in named] + [optimizer.param_groups[0]["step"]])
    assert float(runs[0][-1]) == 4
    assert all(map(torch.equal, *runs))


def test_zero_nan_and_infinity_stay_in_their_matrices():
    x = matrices(5, 300, 700)
    x[1] = 0
    clean = k.newton_schulz(x)
    assert not clean[1].any()
    x[2, 3, 4], x[3, 299, 699] = torch.nan, torch.inf
    got = k.newton_schulz(x)
    assert got[2:4].isnan().all() and torch.equal(got[[0, 1, 4]], clean[[0, 1, 4]])


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**120])
def test_scale_does_not_matter(scale):
    x = matrices(200, 500)
    assert torch.equal(k.newton_schulz(x * scale), k.newton_schulz(x))


def test_views():
    x = matrices(4, 210, 301)
    for view in (x.mT, x[::2], x[:, 3:170, 1:290], x.permute(1, 0, 2)):
        assert torch.equal(k.newton_schulz(view), k.newton_schulz(view.contiguous()))


def test_offsets_beyond_32_bits(monkeypatch):
    """Of x, of the result and of each buffer of the workspace."""
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB")
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 1 << 40)
    x = torch.zeros(2100, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    x[-1] = matrices(1024, 1024)
    got = k.newton_schulz(x)
    assert torch.equal(got[-1], k.newton_schulz(x[-1])) and got[:-1].count_nonzero() == 0
