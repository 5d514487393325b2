import pytest
import torch

from k2kernels.ops import newton_schulz as module
from k2kernels.ops.newton_schulz import newton_schulz, newton_schulz_grouped
from k2kernels.reference.newton_schulz import polar_express
from k2kernels.testing.compare import check_close, check_op

QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5
# The coefficients printed in arXiv 2505.16932, before the division by the safety factor.
PAPER = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
SAFE = [(a / 1.05, b / 1.05**3, c / 1.05**5) for a, b, c in PAPER[:5]]
TEN_STEPS = [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2
SHAPES = [(24, 24), (20, 50), (50, 20), (24, 30), (1, 7), (7, 1), (16, 300)]


def with_spectrum(values, m, n):
    """[m, n] float64 with these singular values."""
    left = torch.linalg.qr(torch.randn(m, len(values), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))[0]
    return left * values @ right.T


def spectrum(kind, rank):
    values = {
        "exponential": torch.logspace(0, -3, rank, dtype=torch.float64),
        "steep": torch.logspace(0, -9, rank, dtype=torch.float64),
        "ten": torch.full((rank,), 1e-4, dtype=torch.float64),
        "rank 2": torch.zeros(rank, dtype=torch.float64),
        "rank 1": torch.zeros(rank, dtype=torch.float64),
    }[kind]
    values[: {"ten": 10, "rank 2": 2, "rank 1": 1}.get(kind, 0)] = 1
    return values


def exact(x, triples):
    """U p(S) Vᵀ: the polynomials applied to the singular values, from the SVD."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vh


def polar(x):
    """The exact polar factor on the singular values above a thousandth of the largest, from the SVD."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return (u * (s > 1e-3 * s[0])) @ vh


def cosine(got, want):
    return float((got.double() * want).sum() / (got.double().norm() * want.norm()))


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("triples", [QUINTIC, SAFE, TEN_STEPS], ids=["quintic", "polar express", "ten steps"])
def test_it_applies_the_polynomials_to_the_singular_values(m, n, algorithm, triples):
    x = torch.randn(3, m, n, dtype=torch.float64)
    options = dict(schedule=triples, steps=len(triples), algorithm=algorithm)
    want = exact(x, triples)
    check_close(newton_schulz(x, iterate_dtype=torch.float64, **options), want, budget=1e-10)
    check_close(
        newton_schulz(x.float(), iterate_dtype=torch.float32, **options), exact(x.float(), triples), budget=3e-4
    )


@pytest.mark.parametrize("m, n", SHAPES)
def test_polar_express_converges_to_the_polar_factor(m, n):
    x = torch.randn(m, n, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    got = newton_schulz(x, schedule="polar_express", steps=14, iterate_dtype=torch.float64)
    check_close(got, u @ vh, budget=1e-9)


def test_polar_express_coefficients_are_those_of_the_paper():
    got = torch.tensor(polar_express(10, safety=1.0), dtype=torch.float64)
    want = torch.tensor([*PAPER, PAPER[-1], PAPER[-1]], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=0)
    # Safety scales the argument of all steps but the last.
    safe = torch.tensor(polar_express(10, safety=1.05), dtype=torch.float64)
    torch.testing.assert_close(safe[:-1] * torch.tensor([1.05, 1.05**3, 1.05**5]), got[:-1], rtol=1e-6, atol=0)
    assert torch.equal(safe[-1], got[-1])


def test_default_is_five_quintic_steps_in_float16():
    x = torch.randn(2, 20, 50)
    want = newton_schulz(x, schedule=QUINTIC, algorithm="gram", iterate_dtype=torch.float16)
    assert torch.equal(newton_schulz(x), want)


@pytest.mark.parametrize("shape", [(30, 44), (44, 30), (30, 45), (45, 30)])
def test_auto_iterates_on_the_gram_matrix_from_aspect_one_and_a_half(shape):
    x = torch.randn(shape)
    chosen = "gram" if 45 in shape else "standard"
    other = {"gram": "standard", "standard": "gram"}[chosen]
    assert torch.equal(newton_schulz(x), newton_schulz(x, algorithm=chosen))
    assert not torch.equal(newton_schulz(x), newton_schulz(x, algorithm=other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12, 16), (16, 12)])
def test_one_step_rounds_each_intermediate_once(dtype, shape):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = torch.randn(shape)
    x0 = (x / x.abs().max() / (x / x.abs().max()).norm()).to(dtype).float()
    short = (lambda t: t.mT @ t) if shape[0] > shape[1] else (lambda t: t @ t.mT)
    gram = short(x0).to(dtype).float()
    z = (b * gram + c * (gram @ gram)).to(dtype).float()
    want = (a * x0 + (x0 @ z if shape[0] > shape[1] else z @ x0)).to(dtype).float()
    got = newton_schulz(x, steps=1, schedule=[(a, b, c)], algorithm="standard", iterate_dtype=dtype)
    # The sums may run in another order, which can turn a rounding over.
    check_close(got, want.double(), budget=torch.finfo(dtype).eps * float(want.abs().max()))
    assert torch.equal(got, got.to(dtype).float())


@pytest.mark.parametrize("kind", ["gauss", "exponential"])
@pytest.mark.parametrize("triples", [QUINTIC, SAFE], ids=["quintic", "polar express"])
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_float16_keeps_the_singular_values_of_exact_arithmetic(kind, triples, algorithm):
    x = torch.randn(256, 896) if kind == "gauss" else with_spectrum(spectrum(kind, 256), 256, 896).float()
    got, want = newton_schulz(x, schedule=triples, algorithm=algorithm), exact(x, triples)
    s, s_exact = torch.linalg.svdvals(got.double()), torch.linalg.svdvals(want)
    assert abs(float(s.max() - s_exact.max())) < 0.03
    assert abs(cosine(got, polar(x)) - cosine(want, polar(x))) < 0.002
    if kind == "gauss":
        low, high = (0.67, 1.15) if triples is QUINTIC else (0.82, 1.14)
        assert low < s.min() and s.max() < high


@pytest.mark.parametrize("kind", ["ten", "rank 2", "rank 1"])
@pytest.mark.parametrize("m, n", [(64, 64), (64, 224)])
def test_low_rank_is_why_the_iteration_is_in_float16(kind, m, n):
    x = with_spectrum(spectrum(kind, 64), m, n).float()
    want = polar(x)
    assert cosine(newton_schulz(x), want) > 0.985
    assert cosine(newton_schulz(x, iterate_dtype=torch.bfloat16), want) < 0.985
    assert torch.linalg.svdvals(newton_schulz(x).double()).max() < 1.21


@pytest.mark.parametrize("kind", ["exponential", "steep", "ten", "rank 2", "rank 1"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("triples", [QUINTIC, SAFE, TEN_STEPS], ids=["quintic", "polar express", "ten steps"])
def test_restarts_keep_the_gram_iteration_stable(kind, dtype, triples):
    x = with_spectrum(spectrum(kind, 96), 96, 336).float()
    options = dict(schedule=triples, steps=len(triples), iterate_dtype=dtype)
    largest = torch.linalg.svdvals(newton_schulz(x, algorithm="gram", **options).double()).max()
    bound = torch.linalg.svdvals(newton_schulz(x, algorithm="standard", **options).double()).max()
    assert largest < 1.12 * bound  # a missing restart multiplies by 1.5 to infinity


@pytest.mark.parametrize("shape", [(16, 16), (20, 50), (50, 20), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_matrix_does_not_depend_on_its_batch(shape, dtype):
    """On one thread: several may cut a product differently alone than in a batch."""
    x = torch.randn(2, 3, *shape)
    want = newton_schulz(x, iterate_dtype=dtype)
    grouped = newton_schulz_grouped([x[0, 0], x, torch.randn(4, 9), x[1]], iterate_dtype=dtype)
    for i in range(2):
        for j in range(3):
            assert torch.equal(newton_schulz(x[i, j], iterate_dtype=dtype), want[i, j])
    assert torch.equal(grouped[0], want[0, 0])
    assert torch.equal(grouped[1], want)
    assert torch.equal(grouped[3], want[1])


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**-66, 2.0**33, 2.0**110])
@pytest.mark.parametrize("shape", [(20, 24), (20, 50)])
def test_scale_does_not_matter(scale, shape):
    x = torch.randn(shape)
    assert torch.equal(newton_schulz(x * scale), newton_schulz(x))
    # Not a power of two either.
    want = newton_schulz(x, iterate_dtype=torch.float32)
    torch.testing.assert_close(newton_schulz(x * (0.7 * scale), iterate_dtype=torch.float32), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_zero_gives_zero_and_nan_stays_in_its_matrix(algorithm):
    x = torch.randn(5, 12, 30)
    x[1] = 0
    clean = newton_schulz(x, algorithm=algorithm)
    assert torch.equal(clean[1], torch.zeros(12, 30))
    x[2, 3, 4] = torch.nan
    x[3, 5, 6] = torch.inf
    got = newton_schulz(x, algorithm=algorithm)
    assert got[2:4].isnan().all()
    assert torch.equal(got[[0, 1, 4]], clean[[0, 1, 4]])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4), (2, 0, 5)])
def test_empty(shape):
    assert newton_schulz(torch.empty(shape)).shape == shape
    assert newton_schulz_grouped([]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_result_is_like_x_and_x_is_not_changed(dtype, algorithm):
    x = torch.randn(2, 8, 12).to(dtype)
    before = x.clone()
    got = newton_schulz(x, algorithm=algorithm)
    assert torch.equal(x, before)
    assert (got.shape, got.dtype, got.is_contiguous()) == (x.shape, dtype, True)
    check_close(got, exact(x, QUINTIC), budget=0.02)


def test_views_give_what_their_copies_give():
    x = torch.randn(6, 40, 20)
    for view in (x.mT, x[::2], x[:, 3:17], x[..., ::2], x.permute(1, 0, 2)):
        assert torch.equal(newton_schulz(view), newton_schulz(view.contiguous()))


def test_a_transposed_matrix_gives_the_transposed_result():
    x = torch.randn(20, 50)
    torch.testing.assert_close(newton_schulz(x.mT), newton_schulz(x).mT, rtol=0, atol=2e-3)


def test_registration():
    x = torch.randn(2, 8, 12)
    coefficients = [v for t in QUINTIC for v in t]
    check_op(module._newton_schulz, (x, coefficients, "auto", torch.float16), compiled=lambda: newton_schulz(x))
    check_op(
        module._newton_schulz_grouped,
        ([x, x[0, :4]], coefficients, "gram", torch.float32),
        compiled=lambda: newton_schulz_grouped([x, x[0, :4]], schedule="polar_express", steps=6),
    )
    assert newton_schulz(torch.empty(3, 4, 5, device="meta")).shape == (3, 4, 5)


def test_it_has_no_backward():
    x = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="newton_schulz: this op has no backward"):
        newton_schulz(x).sum().backward()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=0), r"steps must be an int in 1 .. 100, got 0"),
        (dict(steps=2.0), r"steps must be an int in 1 .. 100, got 2.0"),
        (dict(schedule="cubic"), r"schedule must be one of 'quintic', 'polar_express', got 'cubic'"),
        (dict(schedule=QUINTIC[:3]), r"schedule must be one \(a, b, c\) for each of the 5 steps, got 3; pass steps=3"),
        (dict(schedule=TEN_STEPS), r"schedule must be one \(a, b, c\) for each of the 5 steps, got 10; pass steps=10"),
        (dict(schedule=[(1.0, 2.0)] * 5), r"schedule must be 'quintic', 'polar_express' or a sequence of \(a, b, c\)"),
        (dict(schedule=[(1.0, 2.0, float("nan"))] * 5), r"schedule must be .* of finite numbers, got"),
        (dict(schedule=3), r"schedule must be .*, got 3"),
        (dict(algorithm="fast"), r"algorithm must be one of 'auto', 'standard', 'gram', got 'fast'"),
        (dict(iterate_dtype=torch.int8), r"iterate_dtype must be one of torch.float32, .*, got torch.int8"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match="newton_schulz: " + message):
        newton_schulz(torch.randn(3, 4), **options)
    with pytest.raises(ValueError, match="newton_schulz_grouped: " + message):
        newton_schulz_grouped([torch.randn(3, 4)], **options)


def test_bad_tensors():
    with pytest.raises(ValueError, match=r"newton_schulz: x must be \[..., m, n\] float32 or .*, got \[4\] float32"):
        newton_schulz(torch.randn(4))
    with pytest.raises(TypeError, match=r"newton_schulz: x must be .*, got \[2, 2\] int64"):
        newton_schulz(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"newton_schulz_grouped: xs\[1\] must be .*, got \[2, 2\] int64"):
        newton_schulz_grouped([torch.randn(2, 2), torch.ones(2, 2, dtype=torch.int64)])
    with pytest.raises(TypeError, match=r"newton_schulz_grouped: xs must be a list of tensors, got Tensor"):
        newton_schulz_grouped(torch.randn(2, 2))
