"""Matrices with a short side of at most 192, each iterated on by one block, in the emulator: against the singular value
decomposition in float64, and to the bit what goes by tiles."""

import pytest
import torch
from test_newton_schulz_kernel import guarded_workspace, one_call

import k2kernels
from k2kernels import _emu
from k2kernels.ops import newton_schulz as module
from k2kernels.ops._launch import EMULATED_CHIPS, Chip
from k2kernels.ops.newton_schulz import newton_schulz, newton_schulz_grouped
from k2kernels.reference.newton_schulz import polar_express
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import guarded

SCHEDULES = [("sm_80", 0), ("sm_90a", 1), ("sm_80", 2), ("sm_89", 3)]
HALVES = [torch.float16, torch.bfloat16]
QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5
# One, two and three blocks of 64 along the short side, one panel and several, whole and in part, wide and tall.
SHAPES = [
    (8, 8), (2, 40, 60), (1, 7), (7, 1), (64, 128), (2, 16, 300), (257, 30), (65, 70), (140, 100), (70, 150),
]  # fmt: skip
LARGE = [("sm_80", 2, (130, 140)), ("sm_90a", 1, (200, 129)), ("sm_80", 0, (192, 192)), ("sm_90a", 3, (128, 200))]


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory is full of NaN: the workspace, and the results."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(arch, seed, x, *, launches=None, **options):
    """By small matrices; by tiles where `launches` is "tiles"."""
    name = "newton_schulz_grouped" if isinstance(x, list) else "newton_schulz"
    before = k2kernels.launch_count(name)
    with pytest.MonkeyPatch.context() as patch, k2kernels.emulated(arch, seed=seed):
        if launches == "tiles":
            patch.setattr(module, "chip", lambda device: Chip(80, 6, 0))
        got = (newton_schulz_grouped if isinstance(x, list) else newton_schulz)(x, **options)
    started = k2kernels.launch_count(name) - before
    assert started == launches if isinstance(launches, int) else started > 4 * (launches == "tiles")
    return got


def exact(x, triples):
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-300)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vh


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("arch, seed, shape", [(*s, shape) for s in SCHEDULES for shape in SHAPES] + LARGE)
def test_shapes(arch, seed, shape, algorithm):
    """What tiles make of it, and in no element more than twice the largest error of dense products."""
    x, dtype = torch.randn(shape), HALVES[seed % 2]
    options = dict(algorithm=algorithm, iterate_dtype=dtype)
    got = run(arch, seed, guarded(x), launches=4, **options)
    assert torch.equal(got, run("sm_80", 0, x, launches="tiles", **options))
    others = torch.cat([x.reshape(-1, *x.shape[-2:]), torch.randn(max(1, 2000 // x.numel()), *x.shape[-2:])])
    largest = (newton_schulz(others, **options) - exact(others, QUINTIC)).abs().max()
    check_close(got, exact(x, QUINTIC), budget=2 * largest)


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10])
@pytest.mark.parametrize("dtype", HALVES)
def test_schedules_of_coefficients(steps, algorithm, dtype):
    x = torch.randn(2, 24, 150)
    options = dict(schedule="polar_express", steps=steps, algorithm=algorithm, iterate_dtype=dtype)
    got = run("sm_90a", 3, x, launches=4, **options)
    assert torch.equal(got, run("sm_80", 0, x, launches="tiles", **options))
    budget = 2 * (newton_schulz(x, **options) - exact(x, polar_express(steps))).abs().max()
    check_close(got, exact(x, polar_express(steps)), budget=budget + torch.finfo(dtype).eps)


def test_a_hundred_steps():
    x = torch.randn(12, 30)
    for algorithm in ("standard", "gram"):
        options = dict(schedule="polar_express", steps=100, algorithm=algorithm)
        assert torch.equal(run("sm_80", 2, x, launches=4, **options), run("sm_80", 0, x, launches="tiles", **options))


@pytest.mark.parametrize("triple", [(0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (-0.5, 0.5, 0.0)])
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_coefficients_of_zero(triple, algorithm):
    x = torch.randn(20, 70)
    options = dict(schedule=[triple] * 3, steps=3, algorithm=algorithm)
    assert torch.equal(run("sm_80", 2, x, launches=4, **options), run("sm_80", 0, x, launches="tiles", **options))


def test_lists_of_all_kinds_and_dtypes():
    """Standard and Gram by tiles, and small ones of one, two and three blocks, each kind in a launch."""
    shapes = [(194, 200), (193, 300), (2, 3, 9, 40), (3, 20, 20), (2, 140, 70), (5, 5), (70, 80), (130, 140)]
    xs = [torch.randn(shape).to([torch.float32, *HALVES][i % 3]) for i, shape in enumerate(shapes)]
    want = [run("sm_80", 0, x, launches="tiles") for x in xs]
    for arch, seed in (("sm_90a", 1), ("sm_89", 2)):
        # The table, norm and cast; 17 stages of both iterations; three kinds, the last for want of memory by tiles.
        got = run(arch, seed, xs, launches=3 + 17 + (2 if arch == "sm_89" else 3))
        assert all(torch.equal(g, w) and g.dtype == x.dtype for g, w, x in zip(got, want, xs))


def test_a_matrix_does_not_depend_on_its_batch_or_the_workspace(monkeypatch):
    x = torch.randn(5, 24, 140)
    want = torch.stack([run("sm_80", 2, m, launches=4) for m in x])
    assert torch.equal(run("sm_90a", 1, x, launches=4), want)
    # A matrix has 24 x 144 elements of two bytes and a sum; a tensor 112 bytes.
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 2 * (24 * 144 * 2 + 8) + 112)
    assert torch.equal(run("sm_90a", 1, x, launches=3 * 4), want)


def blocks(call):
    """The blocks of 64 of the short side of a call's only tensor, where its matrices are small; else 0."""
    return max(call.counts.index(1) - 1, 0)


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("m, n, gram", [(40, 61, 0), (61, 40, 1), (70, 300, 1), (300, 70, 0), (130, 140, 1)])
def test_it_stays_in_its_places(m, n, gram, arch, seed):
    """Nothing is read or written beside x, result and workspace, and rows keep the zeros behind their ends."""
    batch, gram = 2, bool(gram)
    x, result = guarded(torch.randn(batch, m, n)), guarded(torch.full((batch, m, n), torch.nan))
    call = one_call(x, result, gram, EMULATED_CHIPS["sm_90a"])
    assert blocks(call) == -(-min(m, n) // 64)
    workspace = guarded_workspace(call)
    _emu.configure(90, seed)
    assert _emu.newton_schulz(call, workspace) == 4
    pitch = -(-n // 8) * 8
    start = 96 + -(-(-(-m * -(-n // 512) // 64) * batch) // 2) * 16
    x0 = workspace[start : start + batch * m * pitch * 2].view(torch.float16).view(batch, m, pitch)
    assert not x0[..., :n].isnan().any() and not x0[..., n:].any()
    check_close(result, exact(x, QUINTIC), budget=0.01)


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(12, 30), (150, 12), (100, 90)])
def test_zero_gives_zero_and_nan_stays_in_its_matrix(shape, algorithm, arch, seed):
    x = torch.randn(5, *shape)
    x[1] = 0
    clean = run(arch, seed, x, algorithm=algorithm, launches=4)
    assert torch.equal(clean[1], torch.zeros(shape))
    x[2, 3, 4], x[3, 5, 6] = torch.nan, -torch.inf
    got = run(arch, seed, x, algorithm=algorithm, launches=4)
    assert got[2:4].isnan().all()
    assert torch.equal(got[[0, 1, 4]], clean[[0, 1, 4]])


def spectra(s, long):
    """Inputs on which orthogonalisation is hard: name -> [s, long], with the singular values that momentum may have."""
    torch.manual_seed(3)
    u = torch.linalg.qr(torch.randn(s, s, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(long, s, dtype=torch.float64))[0]
    few = torch.full((s,), 1e-4, dtype=torch.float64)
    few[:10] = 1
    values = {
        "exponential to 1e-3": torch.logspace(0, -3, s, dtype=torch.float64),
        "exponential to 1e-9": torch.logspace(0, -9, s, dtype=torch.float64),
        "linear": torch.linspace(1, 0, s, dtype=torch.float64),
        "10 large ones": few,
        "half zeros": (torch.arange(s) % 2).double(),
        "rank 2": (torch.arange(s) < 2).double(),
        "rank 1": (torch.arange(s) < 1).double(),
    }
    return {name: ((u * sigma) @ v.mT).float() for name, sigma in values.items()}


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("schedule", ["quintic", "polar_express"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("s, long", [(48, 160), (40, 44)])
def test_hard_spectra(s, long, dtype, schedule, tiles):
    """Finite, no singular value where the reference has none in that dtype, and as near to the exact result."""
    triples = QUINTIC if schedule == "quintic" else polar_express(5)
    names, xs = zip(*spectra(s, long).items())
    options = dict(schedule=schedule, iterate_dtype=dtype)
    for name, x, got in zip(names, xs, run("sm_80", 2, list(xs), launches="tiles" if tiles else 4, **options)):
        plain, want = newton_schulz(x, **options), exact(x, triples)
        assert got.isfinite().all()
        ours, theirs = (torch.linalg.svdvals(y.double())[0] for y in (got, plain))
        assert ours <= 1.05 * theirs + 4 * torch.finfo(dtype).eps, (name, ours, theirs)
        errors = [(y - want).norm() for y in (got, plain)]
        assert errors[0] <= 1.25 * errors[1] + torch.finfo(dtype).eps * want.norm(), (name, errors)


@pytest.mark.parametrize("chip, most", [("sm_80", 192), ("sm_89", 128), ("sm_90a", 192)])
def test_which_matrices_are_small(chip, most):
    memory = EMULATED_CHIPS[chip].shared_memory
    for m, n in ((1, 1), (64, 4000), (4000, 64), (65, 65), (128, 512), (129, 512), (192, 1536), (193, 193)):
        one, two = (torch.empty(count, m, n) for count in (1, 2))
        small, tiles = (
            [one_call(x, x, True, Chip(90, 6, shared_memory)) for x in (one, two)] for shared_memory in (memory, 0)
        )
        assert blocks(small[0]) == (-(-min(m, n) // 64) if min(m, n) <= most else 0) and blocks(tiles[0]) == 0
        each, by_tiles = (calls[1].workspace_bytes - calls[0].workspace_bytes for calls in (small, tiles))
        assert each <= by_tiles / 2 or not blocks(small[0])
