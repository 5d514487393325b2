"""The kernels of newton_schulz that go by tiles in the emulator, against the singular value decomposition in float64:
what the reference is compared with in test_newton_schulz.py. Small matrices are made to go by tiles, too."""

import pytest
import torch

import k2kernels
from k2kernels import _emu
from k2kernels.ops import newton_schulz as module
from k2kernels.ops._launch import Chip
from k2kernels.ops.newton_schulz import newton_schulz, newton_schulz_grouped
from k2kernels.reference.newton_schulz import polar_express, restarts
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import guarded, guarded_memory

SCHEDULES = [("sm_80", 0), ("sm_90a", 1), ("sm_80", 2), ("sm_89", 3)]
QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5
TEN_STEPS = [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2
# Sides of one and of several tiles, multiples of 8 and not, wide and tall.
SHAPES = [(8, 8), (2, 40, 60), (2, 60, 40), (50, 130), (130, 50), (129, 200), (200, 129), (1, 7), (7, 1), (16, 600)]
HALVES = [torch.float16, torch.bfloat16]
TABLE_ENTRY, TABLE_PIECE = 96, 32


@pytest.fixture(autouse=True)
def by_tiles(monkeypatch):
    """No matrix is small on a chip without shared memory to ask for."""
    monkeypatch.setattr(module, "chip", lambda device: Chip(80, 6, 0))


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory is full of NaN: the workspace, and the results."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def stages(steps, algorithm, dtype=torch.float16):
    """Launches of an iteration after the prologue, counted by hand: products that cannot run side by side."""
    if algorithm == "standard":
        return 3 * steps
    again = [*restarts(steps, dtype)]
    count = 2  # the first Gram matrix, and the last product
    for step in range(steps):
        goes_on = step + 1 < steps and step + 1 not in again
        fresh = step == 0 or step in again
        count += 2 * (step in again) + 1 + (goes_on or not fresh) + goes_on
    return count


def run(arch, seed, x, *, launches=None, **options):
    grouped = isinstance(x, list)
    name = "newton_schulz_grouped" if grouped else "newton_schulz"
    before = k2kernels.launch_count(name)
    with k2kernels.emulated(arch, seed=seed):
        got = (newton_schulz_grouped if grouped else newton_schulz)(x, **options)
    started = k2kernels.launch_count(name) - before
    assert started == launches if launches is not None else started > 0
    return got


def exact(x, triples):
    """U p(S) Vᵀ: the polynomials applied to the singular values, from the SVD."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vh


def check(got, x, triples, algorithm, dtype):
    """No element errs by more than twice what PyTorch's dense products, rounded to that dtype, err at most: on x and,
    as few elements say little about the largest error, on other matrices of the shape."""
    others = torch.cat([x.float().reshape(-1, *x.shape[-2:]), torch.randn(max(1, 2000 // x.numel()), *x.shape[-2:])])
    options = dict(schedule=triples, steps=len(triples), algorithm=algorithm, iterate_dtype=dtype)
    largest = (newton_schulz(others, **options) - exact(others, triples)).abs().max()
    want = exact(x, triples)
    check_close(got, want, budget=2 * largest + torch.finfo(got.dtype).eps * want.abs())


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, algorithm, arch, seed):
    x = torch.randn(shape)
    dtype = HALVES[seed % 2]
    got = run(
        arch, seed, guarded(x), algorithm=algorithm, iterate_dtype=dtype, launches=3 + stages(5, algorithm, dtype)
    )
    assert torch.equal(got, got.to(dtype).float())
    check(got, x, QUINTIC, algorithm, dtype)


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8, 10])
def test_schedules_of_coefficients(steps, algorithm, arch, seed):
    x = torch.randn(24, 40 + steps)
    triples = TEN_STEPS if steps == 10 else polar_express(steps)
    for dtype in HALVES:
        launches = 3 + stages(steps, algorithm, dtype)
        options = dict(algorithm=algorithm, iterate_dtype=dtype)
        check(
            run(arch, seed, x, schedule=triples, steps=steps, launches=launches, **options),
            x, triples, algorithm, dtype,
        )  # fmt: skip


def test_five_steps_are_so_many_launches():
    assert [stages(5, "standard"), stages(5, "gram"), stages(5, "gram", torch.bfloat16)] == [15, 17, 17]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(12, 16), (16, 12), (137, 150), (150, 137)])
def test_one_step_rounds_each_intermediate_once(dtype, shape):
    """As the reference; sums in another order turn a rounding over here and there, of X_0, of R or of Z."""
    a, b, c = QUINTIC[0]
    x = torch.randn(shape)
    x0 = (x.double() / x.double().norm()).float().to(dtype).double()
    short = (lambda t: t.mT @ t) if shape[0] > shape[1] else (lambda t: t @ t.mT)
    gram = short(x0).to(dtype).double()
    z = (b * gram + c * (gram @ gram)).to(dtype).double()
    want = (a * x0 + (x0 @ z if shape[0] > shape[1] else z @ x0)).to(dtype).double()
    got = run("sm_80", 2, x, steps=1, schedule=[(a, b, c)], algorithm="standard", iterate_dtype=dtype)
    check_close(got, want, budget=torch.finfo(dtype).eps * float(want.abs().max()))


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("dtype", HALVES)
def test_it_errs_no_more_than_dense_products_on_the_whole(algorithm, dtype):
    """Root mean squares over 16 matrices, where chance has averaged out."""
    x = torch.randn(16, 40, 72)
    want = exact(x, QUINTIC)
    got = run("sm_80", 2, x, algorithm=algorithm, iterate_dtype=dtype)
    plain = newton_schulz(x, algorithm=algorithm, iterate_dtype=dtype)
    assert (got - want).square().mean() < 1.2 * (plain - want).square().mean()


def buffers(workspace, batch, m, n, gram):
    """{name: [batch, rows, pitch]} of a call with one float16 tensor, by the words of csrc/newton_schulz/config.h."""
    s = min(m, n)
    chunks = -(-m * -(-n // 512) // 64) * batch
    at = TABLE_ENTRY + (chunks + chunks % 2) * 8
    found = {}
    for name in ["X0", "X1", "R", "Z", *(["T", "Q0", "Q1"] if gram else [])]:
        rows, pitch = (m, -(-n // 8) * 8) if name[0] == "X" else (s, -(-s // 8) * 8)
        size = batch * rows * pitch * 2
        found[name] = workspace[at : at + size].view(torch.float16).view(batch, rows, pitch)
        at += size
    return found


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("m, n", [(40, 61), (61, 40), (133, 150), (261, 20), (8, 20)])
def test_products_are_symmetric_to_the_bit_and_stay_in_their_places(m, n, gram, arch, seed):
    check_places(2, m, n, gram, int(arch[3:5]), seed, by=80)


def one_call(x, result, gram, chip):
    """The call that iterates on x in float16, on a chip."""
    options = [gram], [v for t in QUINTIC for v in t], [2], False, 1 << 40, chip
    (call,) = _emu.newton_schulz_plan([x], [result], options)
    return call


def guarded_workspace(call):
    size = -(-call.workspace_bytes // 16) * 16
    return guarded_memory(size, size)


def check_places(batch, m, n, gram, chip, seed, by):
    """By the kernel of capability `by`: products are symmetric, and nothing is written but where it belongs."""
    x = guarded(torch.randn(batch, m, n))
    result = guarded(torch.full((batch, m, n), torch.nan))
    call = one_call(x, result, gram, Chip(by, 6, 0))
    assert call.counts == [int(not gram), int(gram), 0, 0, 0]
    workspace = guarded_workspace(call)
    _emu.configure(chip, seed)
    _emu.newton_schulz(call, workspace)
    s = min(m, n)
    for name, buffer in buffers(workspace, batch, m, n, gram).items():
        if name[0] == "X":
            assert not buffer[..., :n].isnan().any() and not buffer[..., n:].any()
        else:
            square = buffer[..., :s]
            assert square.any() and torch.equal(square.view(torch.int16), square.mT.view(torch.int16)), name
            assert not buffer[..., s:].any()
    check(result, x, QUINTIC, "gram" if gram else "standard", torch.float16)


def many_shapes():
    """More tensors than a piece of the table holds, wide and tall, batched and not, of all dtypes."""
    shapes = [(12 + 3 * i, 50 - i) for i in range(30)] + [(2, 3, 9, 40), (2, 140, 20), (5, 5), (20, 21), (1, 1)]
    return [torch.randn(shape).to([torch.float32, *HALVES][i % 3]) for i, shape in enumerate(shapes)]


def test_a_matrix_does_not_depend_on_schedule_batch_or_list():
    xs = many_shapes()
    assert len(xs) > TABLE_PIECE
    want = [run("sm_80", 2, x) for x in xs]
    for arch, seed in SCHEDULES:
        got = run(arch, seed, xs, launches=2 + 2 + 17)
        assert all(torch.equal(g, w) and g.dtype == x.dtype for g, w, x in zip(got, want, xs))
    for x, w in zip(xs, want):
        for one, w_one in zip(x.flatten(0, -3), w.flatten(0, -3)) if x.ndim > 2 else ():
            assert torch.equal(run("sm_90a", 1, one), w_one)


def test_lists_of_both_iterations():
    xs = [torch.randn(shape) for shape in [(30, 30), (30, 100), (2, 33, 20), (100, 30), (140, 150)]]
    for algorithm, launches in (("auto", 3 + 17), ("standard", 3 + 15), ("gram", 3 + 17)):
        got = run("sm_80", 3, xs, algorithm=algorithm, launches=launches)
        for g, x in zip(got, xs):
            chosen = algorithm if algorithm != "auto" else "gram" if 100 in x.shape or 20 in x.shape else "standard"
            check(g, x, QUINTIC, chosen, torch.float16)


@pytest.mark.parametrize("limit, calls", [(1, 8), (45_000, 6), (80_000, 3), (1 << 30, 1)])
def test_results_do_not_depend_on_the_size_of_the_workspace(limit, calls, monkeypatch):
    """A matrix takes 32,264, 5,640 or 8,072 bytes, and each tensor of a call 112."""
    xs = [torch.randn(5, 48, 48), torch.randn(2, 16, 48), torch.randn(24, 24)]
    want = run("sm_80", 1, xs, algorithm="gram", launches=3 + 17)
    monkeypatch.setattr(module, "WORKSPACE_BYTES", limit)
    got = run("sm_80", 2, xs, algorithm="gram", launches=calls * (3 + 17))
    assert all(torch.equal(g, w) for g, w in zip(got, want))


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_zero_gives_zero_and_nan_stays_in_its_matrix(shape, algorithm, arch, seed):
    x = torch.randn(5, *shape)
    x[1] = 0
    clean = run(arch, seed, x, algorithm=algorithm)
    assert torch.equal(clean[1], torch.zeros(shape))
    x[2, 3, 4] = torch.nan
    x[3, 5, 6] = -torch.inf
    got = run(arch, seed, x, algorithm=algorithm)
    assert got[2:4].isnan().all()
    assert torch.equal(got[[0, 1, 4]], clean[[0, 1, 4]])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(40, 44), (20, 70), (70, 20)])
def test_rank_one(shape, dtype):
    """The singular value goes where the polynomials lead it, and nothing else grows."""
    m, n = shape
    x = torch.randn(m, 1) * torch.randn(1, n)
    for triples in (QUINTIC, polar_express(5)):
        value = torch.ones((), dtype=torch.float64)
        for a, b, c in triples:
            value = a * value + b * value**3 + c * value**5
        got = run("sm_80", 2, x, schedule=triples, iterate_dtype=dtype)
        plain = newton_schulz(x, schedule=triples, iterate_dtype=dtype)
        ours, theirs = (torch.linalg.svdvals(y.double()) for y in (got, plain))
        assert abs(ours[0] - value) <= 2 * abs(theirs[0] - value) + 4 * torch.finfo(dtype).eps
        assert ours[1] <= 2 * theirs[1] + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-120, 2.0**-63, 2.0**33, 2.0**120])
def test_scale_does_not_matter(scale):
    x = torch.randn(20, 50)
    if scale == 2.0**-140:
        x = (x * 64).round() / 64  # stays exact among the subnormals
    assert torch.equal(run("sm_80", 2, x * scale), run("sm_80", 2, x))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_views_give_what_their_copies_give(dtype):
    x = torch.randn(4, 12, 20).to(dtype)
    wide = torch.full((3, 20, 37), torch.nan, dtype=dtype)
    wide[..., 1:34] = torch.randn(3, 20, 33).to(dtype)
    for view in (x.mT, x[::2], x[:, 3:10], x[..., ::2], x.permute(1, 0, 2), wide[..., 1:34], x[:, None]):
        before = view.clone()
        got = run("sm_80", 2, view)
        assert torch.equal(got, run("sm_80", 2, view.contiguous())) and torch.equal(view, before)
        assert got.is_contiguous() and got.dtype == dtype
        check_close(got, exact(view, QUINTIC), budget=0.05)


def test_what_kernels_do_not_serve():
    empty = torch.empty(3, 0, 5)
    assert run("sm_80", 0, empty, launches=0).shape == empty.shape
    assert [x.shape for x in run("sm_80", 0, [empty, torch.empty(0, 4)], launches=0)] == [(3, 0, 5), (0, 4)]
    x = torch.randn(4, 6)
    for call, message in (
        (
            lambda: newton_schulz(x, iterate_dtype=torch.float32),
            "iterate_dtype must be .* bfloat16, got float32",
        ),
        (
            lambda: newton_schulz_grouped([x, x.double()]),
            "newton_schulz_grouped: .* xs must be float32, .*, got float64",
        ),
    ):
        with k2kernels.emulated(), pytest.raises(k2kernels.UnsupportedError, match=message):
            call()
