"""newton_schulz on a GPU, at sizes of Kimi-K2. Run by `make gpu`."""

import pytest
import torch

import k2kernels as k
from k2kernels.ops import newton_schulz as module
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
    got = served("newton_schulz", 18 if algorithm == "standard" else 20, lambda: k.newton_schulz(x, **options))
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
    got = served("newton_schulz_grouped", 20, lambda: k.newton_schulz_grouped(xs))
    assert all(torch.equal(g, a) for g, a in zip(got, alone))
    assert torch.equal(k.newton_schulz(xs[0][1]), got[0][1])
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(k.newton_schulz_grouped(xs), got))
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 1 << 20)
    assert all(torch.equal(a, b) for a, b in zip(k.newton_schulz_grouped(xs), got))


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
