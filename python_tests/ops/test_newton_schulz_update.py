"""One step of Muon as one op: the reference and, in the emulator, the kernels against the formula in float64."""

import math

import pytest
import torch

import k2kernels
from k2kernels.ops import newton_schulz as module
from k2kernels.ops._launch import Chip
from k2kernels.ops.newton_schulz import muon_update
from k2kernels.optim import MuonClip, QKClip
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import guarded

SCHEDULES = [("sm_80", 0), ("sm_90a", 1), ("sm_80", 2), ("sm_89", 3)]
HALVES = [torch.float16, torch.bfloat16]
QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5
SHAPES = [(2, 20, 33), (1, 70, 30), (3, 24, 24), (1, 130, 140), (1, 14, 300), (1, 1, 9), (2, 200, 9)]
OPTIONS = dict(lr=0.02, weight_decay=0.3, momentum=0.9, rms_scale=0.4)


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory is full of NaN: the workspace."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["small", "tiles"])
def way(request, monkeypatch):
    """Small matrices by blocks of their own, or by tiles like the others."""
    if request.param == "tiles":
        monkeypatch.setattr(module, "chip", lambda device: Chip(80, 6, 0))
    return request.param


def step(dtype=torch.float32, grad_dtype=torch.float32, momentum_dtype=torch.float32, shapes=SHAPES):
    """Weights, gradients and momenta."""
    return tuple(
        [torch.randn(shape).to(d) * s for shape in shapes]
        for d, s in ((dtype, 1), (grad_dtype, 3), (momentum_dtype, 0.5))
    )


def clone(lists):
    return tuple([t.clone() for t in ts] for ts in lists)


def run(arch, seed, lists, **options):
    before = k2kernels.launch_count("muon_update")
    with k2kernels.emulated(arch, seed=seed):
        muon_update(*lists, **{**OPTIONS, **options})
    assert k2kernels.launch_count("muon_update") > before


def exact(before, stored, *, lr, weight_decay, momentum, rms_scale, nesterov=True, row_scales=(), grad_scale=None):
    """Weights and momenta after the step, in float64; into the weights M enters as it was stored."""
    weights, momenta = [], []
    for i, (w, g, m, kept) in enumerate(zip(*before, stored)):
        g = g.double() if grad_scale is None else g.double() / float(grad_scale)
        momenta.append(momentum * m.double() + (1 - momentum) * g)
        x = momentum * kept.double() + (1 - momentum) * g if nesterov else kept.double()
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        s = s / s.norm(dim=-1, keepdim=True)
        for a, b, c in QUINTIC:
            s = a * s + b * s**3 + c * s**5
        rate = float(lr)
        new = (1 - rate * weight_decay) * w.double()
        new -= rate * rms_scale * math.sqrt(max(w.shape[1:])) * ((u * s[..., None, :]) @ vh)
        if row_scales and row_scales[i].numel():
            new *= row_scales[i].double().unsqueeze(-1)
        weights.append(new)
    return weights, momenta


def check(after, before, *, iterate, **options):
    """The update may err by 16 units of the iteration's eps (an element of O is at most about 1), the weight's own
    arithmetic by four roundings of float32 and one of its dtype."""
    options = {**OPTIONS, **options}
    weights, momenta = exact(before, after[2], **options)
    for w, x, m, y in zip(after[0], weights, after[2], momenta):
        update = float(options["lr"]) * options["rms_scale"] * math.sqrt(max(w.shape[1:]))
        budget = update * 16 * torch.finfo(iterate).eps + (4 * 2**-24 + torch.finfo(w.dtype).eps / 2) * x.abs()
        check_close(w, x, budget=budget, name="weight")
        rounding = torch.finfo(m.dtype).eps / 2 if m.dtype != torch.float32 else 0
        check_close(m, y, budget=(4 * 2**-24 + rounding) * (y.abs() + 3), name="momentum")


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_reference(dtype, momentum_dtype, nesterov):
    lists = step(dtype, dtype, momentum_dtype)
    before = clone(lists)
    muon_update(*lists, nesterov=nesterov, iterate_dtype=torch.float64, **OPTIONS)
    check(lists, before, nesterov=nesterov, iterate=torch.float32)
    assert all(map(torch.equal, lists[1], before[1]))


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("iterate", HALVES)
def test_kernels(iterate, nesterov, arch, seed, way):
    lists = tuple([guarded(t) for t in ts] for ts in step())
    before = clone(lists)
    run(arch, seed, lists, nesterov=nesterov, iterate_dtype=iterate)
    check(lists, before, nesterov=nesterov, iterate=iterate)
    assert all(map(torch.equal, lists[1], before[1]))


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_dtypes(dtype, grad_dtype, momentum_dtype):
    lists = step(dtype, grad_dtype, momentum_dtype, SHAPES[:4])
    before = clone(lists)
    run("sm_80", 2, lists)
    check(lists, before, iterate=torch.float16)


@pytest.mark.parametrize("arch, seed", SCHEDULES)
def test_copies_row_scales_and_what_a_graph_reads(arch, seed, way):
    """The copies are the weights rounded, to the bit; rows are scaled last; rate and scale come from tensors."""
    lists = step()
    copies = [guarded(torch.randn(w.shape).to(HALVES[i % 2])) for i, w in enumerate(lists[0])]
    scales = [torch.rand(w.shape[:2]) + 0.5 if i % 3 else torch.empty(0) for i, w in enumerate(lists[0])]
    scales[1] = scales[1].double()
    lr, grad_scale, skip = torch.tensor(0.03), torch.tensor(512.0), torch.tensor(False)
    extra = dict(lr=lr, row_scales=scales, grad_scale=grad_scale)
    before = clone(lists)
    run(arch, seed, lists, copies=copies, skip=skip, **extra)
    check(lists, before, iterate=torch.float16, **extra)
    assert all(torch.equal(c, w.to(c.dtype)) for c, w in zip(copies, lists[0]))


@pytest.mark.parametrize("backend", ["reference", *SCHEDULES])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_skipped_step_changes_nothing(backend, bad, way):
    lists = step()
    lists[1][2][1, 3, 4] = bad
    copies, scales = [w.half() for w in lists[0]], [torch.rand(w.shape[:2]) for w in lists[0]]
    before = clone((*lists, copies))
    options = dict(skip=torch.tensor(True), copies=copies, row_scales=scales, grad_scale=torch.tensor(2.0))
    if backend == "reference":
        muon_update(*lists, iterate_dtype=torch.float32, **OPTIONS, **options)
    else:
        run(*backend, lists, **options)
    for now, then in zip((*lists, copies), before):
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(now, then))


@pytest.mark.parametrize("backend", ["reference", ("sm_80", 2)])
def test_a_bad_gradient_spoils_its_own_matrix_only(backend, way):
    lists = step()
    clean = clone(lists)
    lists[1][0][1, 3, 4], lists[1][1][0, 0, 0] = torch.nan, torch.inf
    for each in (lists, clean):
        if backend == "reference":
            muon_update(*each, iterate_dtype=torch.float32, **OPTIONS)
        else:
            run(*backend, each)
    assert lists[0][0][1].isnan().all() and lists[0][1].isnan().all()
    assert torch.equal(lists[0][0][0], clean[0][0][0])
    assert all(map(torch.equal, lists[0][2:], clean[0][2:]))


def test_zero_gradients_give_zero_updates(way):
    lists = step()
    for g, m in zip(lists[1], lists[2]):
        g.zero_(), m.zero_()
    want = [w * (1 - 0.02 * 0.3) for w in lists[0]]
    run("sm_80", 2, lists)
    for w, x in zip(lists[0], want):
        check_close(w, x.double(), budget=2**-23 * x.abs())


def test_lists_batches_and_workspaces_do_not_matter(monkeypatch):
    """To the bit: together, one by one, matrix by matrix, in small workspaces, by blocks of their own or by tiles."""
    together = step()
    apart, split, tight, tiles = (clone(together) for _ in range(4))
    run("sm_90a", 1, together)
    for i in range(len(SHAPES)):
        run("sm_80", 2, tuple(ts[i : i + 1] for ts in apart))
        for j in range(len(split[0][i])):
            run("sm_80", 0, tuple([ts[i][j : j + 1]] for ts in split))
    run_limited = [(tight, "WORKSPACE_BYTES", 6000), (tiles, "chip", lambda device: Chip(80, 6, 0))]
    for lists, name, value in run_limited:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            run("sm_80", 3, lists)
    for other in (apart, split, tight, tiles):
        assert all(map(torch.equal, together[0], other[0])) and all(map(torch.equal, together[2], other[2]))


def test_views_of_parameters(way):
    """Heads of a projection, every other matrix, rows of a wider tensor; columns that lie apart are not served."""
    base = [guarded(torch.randn(4, 36, 70)) for _ in range(3)]
    views = lambda t: [t[0].view(3, 12, 70), t[1::2, 3:20, 5:50], t[2, 8:].unsqueeze(0)]  # noqa: E731
    lists = tuple(views(t) for t in base)
    copies = clone(lists)
    before = [t.clone() for t in base]
    run("sm_80", 2, lists)
    run("sm_80", 0, copies)
    for t, then, ts in zip(base, before, copies):
        for view, want in zip(views(then), ts):
            view.copy_(want)
        assert torch.equal(t, then)
    grads = [g.mT.contiguous().mT for g in copies[1]]  # these are only read, so they are copied
    again = clone(copies)
    run("sm_80", 2, (copies[0], grads, copies[2]))
    run("sm_80", 2, again)
    assert all(map(torch.equal, copies[0], again[0]))
    turned = tuple([t.mT.contiguous().mT for t in ts] for ts in copies)
    with (
        k2kernels.emulated(),
        pytest.raises(k2kernels.UnsupportedError, match="weights must have stride 1 in"),
    ):
        muon_update(*turned, **OPTIONS)


def optimize(limit, emulated):
    """Two steps of MuonClip on bfloat16 parameters, cut by heads, clipped, with masters; returns these."""
    torch.manual_seed(5)
    shapes = {"q.weight": (12, 40), "experts.gate_up_proj": (3, 20, 16), "norm.weight": (12,)}
    named = [(n, torch.nn.Parameter(torch.randn(shape).bfloat16())) for n, shape in shapes.items()]
    target = dict(layer=0, query="q.weight", key=None, num_heads=3, nope_dim=3, rope_dim=1)
    maxima = {0: torch.tensor([50.0, 200.0, 400.0])}
    optimizer = MuonClip(
        named, 0.02, splits={"q.weight": 3},
        iterate_dtype=torch.float16, max_elements=limit, capturable=emulated, skip_non_finite=True,
        qk_clip=QKClip(targets=[target], max_logits=lambda: maxima, reset_max_logits=lambda: None),
    )  # fmt: skip
    for _ in range(2):
        for _, p in named:
            p.grad = torch.randn(p.shape).bfloat16()
        if not emulated:
            optimizer.step()
            continue
        before = k2kernels.launch_count("muon_update")
        with k2kernels.emulated("sm_80", seed=2):
            optimizer.step()
        assert k2kernels.launch_count("muon_update") > before
    masters = [optimizer.state[p]["master"] for _, p in named]
    assert all(torch.equal(p, m.bfloat16()) for (_, p), m in zip(named, masters))
    return masters


def test_the_optimizer_is_served():
    """A step with kernels is that of plain PyTorch, however its matrices are batched."""
    served, plain = [optimize(limit, True) for limit in (10**6, 500, 1)], optimize(10**6, False)
    for others in served[1:]:
        assert all(map(torch.equal, served[0], others))
    for ours, theirs in zip(served[0], plain):
        check_close(ours, theirs.double(), budget=3e-4)


def test_what_is_refused():
    w, g, m = step(shapes=[(2, 4, 6)])
    for change, message in [
        (dict(grads=[]), r"grads must be a list of 1, as many as weights, got 0"),
        (dict(momenta=[torch.zeros(2, 4, 7)]), r"momenta\[0\] must be \[B0=2, m0=4, n0=6\]"),
        (dict(row_scales=[torch.ones(2, 6)]), r"row_scales\[0\] must be \[B0=2, m0=4\]"),
        (dict(copies=[torch.zeros(2, 4, 1).expand(2, 4, 6)]), r"copies\[0\] must be a tensor with memory for each"),
        (dict(lr=torch.zeros(1)), r"lr must be \[\] float32"),
        (dict(lr=math.inf), "lr must be finite, got inf"),
        (dict(skip=torch.zeros(())), r"skip must be \[\] bool"),
        (dict(steps=0), "steps must be an int in 1 .. 100, got 0"),
    ]:
        arguments = dict(weights=w, grads=g, momenta=m) | OPTIONS | change
        with pytest.raises((TypeError, ValueError), match="muon_update: " + message):
            muon_update(arguments.pop("weights"), arguments.pop("grads"), arguments.pop("momenta"), **arguments)
    muon_update([], [], [], lr=0.1)
    with (
        k2kernels.emulated(),
        pytest.raises(k2kernels.UnsupportedError, match="momenta must be float32 or bfloat16, got float16"),
    ):
        muon_update(w, g, [x.half() for x in m], lr=0.1)


def test_in_a_full_graph():
    """torch.compile keeps the op and sees what it writes."""
    lists = step(shapes=SHAPES[:2])
    again = clone(lists)

    def twice(w, g, m):
        muon_update(w, g, m, lr=0.02, iterate_dtype=torch.float32)
        muon_update(w, g, m, lr=0.02, iterate_dtype=torch.float32)
        return [x + 1 for x in w]

    torch._dynamo.reset()
    got, want = torch.compile(twice, fullgraph=True, backend="aot_eager")(*lists), twice(*again)
    assert all(map(torch.equal, got, want))
    assert all(map(torch.equal, lists[0], again[0])) and all(map(torch.equal, lists[2], again[2]))
