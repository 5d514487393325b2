"""Linear layers with FP8 products: result and gradients against the products of the dequantised operands in float64."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from test_fp8_gemm import aligned, ceil128, check_gemm, exact, expand, ints
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import k2kernels
from k2kernels.functional import fp8_linear as functional
from k2kernels.functional.fp8_linear import fp8_linear, grouped_fp8_linear
from k2kernels.ops.quant import quantize_1x128, quantize_128x128

OPS = ("quantize_1x128", "quantize_128x128", "fp8_gemm", "grouped_fp8_gemm", "grouped_fp8_wgrad")
BODIES = {"reference": None, "sm_80": ("sm_80", 2), "sm_90a": ("sm_90a", 3)}


@pytest.fixture(params=BODIES)
def body(request):
    """A context in which `launches` finds what each op launched."""

    @contextlib.contextmanager
    def running(**launches):
        chosen = BODIES[request.param]
        before = {op: k2kernels.launch_count(op) for op in OPS}
        with k2kernels.emulated(*chosen) if chosen else contextlib.nullcontext():
            yield
        launched = {op: k2kernels.launch_count(op) - before[op] for op in OPS}
        assert launched == {op: launches.get(op, 0) if chosen else 0 for op in OPS}

    return running


FORWARD = dict(quantize_1x128=2, quantize_128x128=1)  # the second for the gradient of the weight


def matrix(rows, columns, dtype=torch.float32):
    """Blocks of 128x128 differ in size, rows in them too, so that a mix-up of scales or of their order shows."""
    x = torch.randn(rows, columns) * torch.exp2(torch.randint(-2, 3, (rows, 1)))
    sizes = torch.exp2(torch.randint(-3, 4, (ceil128(rows), ceil128(columns))))
    return (x * expand(sizes, (128, 128), x.shape)).to(dtype)


def check(got, want, magnitude, name):
    assert got.shape == want.shape, name
    if got.numel():
        check_gemm(got, want, magnitude)


def check_linear(x, weight, grad, got, power_of_two, bias=None):
    """`got`: y, dx and dW, against float64 products of what one quantisation makes of x, dy, their transposes and W."""
    y, d_x, d_weight = got
    rows, columns = (dict(power_of_two=power_of_two) for _ in range(2))
    w, w_scales = quantize_128x128(weight, **rows)
    want, magnitude = exact(*quantize_1x128(x, **rows), w, w_scales)
    if bias is not None:
        want, magnitude = want + bias.double(), magnitude + bias.abs().double()
    check(y, want, magnitude, "y")
    # dy · W by the formula of y · Wᵀ with the dequantised weight as it is: no use is made of transposed scales.
    codes, scales = quantize_1x128(grad, **rows)
    dy = codes.double() * expand(scales, (1, 128), codes.shape)
    wide = w.double() * expand(w_scales, (128, 128), w.shape)
    check(d_x, dy @ wide, dy.abs() @ wide.abs(), "d_x")
    transposed = [quantize_1x128(m.T.contiguous(), **columns) for m in (grad, x)]
    dy_t, x_t = (c.double() * expand(s, (1, 128), c.shape) for c, s in transposed)
    check(d_weight, dy_t @ x_t.T, dy_t.abs() @ x_t.T.abs(), "d_weight")


DENSE = [(1, 8, 128), (127, 136, 72), (129, 300, 260), (0, 8, 16), (3, 1, 1)]


@pytest.mark.parametrize("shape", DENSE, ids=str)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str
)
def test_products_and_gradients(shape, dtypes, body):
    tokens, n, k = shape
    x, weight = matrix(tokens, k, dtypes[0]).requires_grad_(), matrix(n, k, dtypes[1]).requires_grad_()
    bias, grad = torch.randn(n, requires_grad=True), matrix(tokens, n, dtypes[0])
    power_of_two = shape != DENSE[1]
    some = tokens > 0
    launches = dict(quantize_1x128=4 * some, quantize_128x128=2, fp8_gemm=2 * some + 1)
    with body(**launches):
        y = fp8_linear(x, weight, bias=bias, power_of_two=power_of_two)
        y.backward(grad)
    assert y.dtype == x.grad.dtype == dtypes[0] and weight.grad.dtype == dtypes[1] and bias.grad.dtype == torch.float32
    got = y.detach(), x.grad, weight.grad
    check_linear(x.detach(), weight.detach(), grad, got, power_of_two, bias.detach())
    torch.testing.assert_close(
        bias.grad.double(), grad.double().sum(0), rtol=1e-5, atol=1e-4 * float(grad.abs().max() if some else 0)
    )


GROUPS = {
    "ragged": [5, 1, 127, 129],
    "empty": [0, 130, 0, 7, 0],
    "nothing": [0, 0],
    "none": [],
}


@pytest.mark.parametrize("alignment", [1, 8, 128])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_groups(counts, alignment, body):
    """Padding holds NaN, in x and in the gradient of y; wherever groups start, results are those of each alone."""
    n, k, dtype = 136, 72, torch.bfloat16 if alignment == 8 else torch.float32
    offsets, real = aligned(counts, alignment)
    weight = (
        torch.stack([matrix(n, k) for _ in counts]).requires_grad_()
        if counts
        else torch.empty(0, n, k, requires_grad=True)
    )
    x, grad = matrix(len(real), k, dtype), matrix(len(real), n, dtype)
    x[~real] = grad[~real] = math.nan
    x.requires_grad_()
    some = bool(counts)
    quantized = 4 if some or alignment == 128 else 2  # without groups, room for aligned ones has no row
    launches = dict(
        quantize_1x128=quantized, quantize_128x128=2 * some, grouped_fp8_gemm=2 * some, grouped_fp8_wgrad=some
    )
    with body(**launches):
        y = grouped_fp8_linear(x, weight, offsets=offsets, counts=ints(*counts), alignment=alignment)
        y.backward(grad)
    assert y.dtype == x.grad.dtype == dtype and weight.grad.dtype == torch.float32
    assert x.grad[~real].eq(0).all()
    for group, count in enumerate(counts):
        rows = slice(int(offsets[group]), int(offsets[group]) + count)
        got = y[rows].detach(), x.grad[rows], weight.grad[group]
        check_linear(x[rows].detach(), weight[group].detach(), grad[rows], got, True)
        if count == 0:
            assert weight.grad[group].eq(0).all()


def test_groups_may_stand_anywhere():
    """Without counts they fill the offsets; rows before the first and behind the last belong to none."""
    x, weight, grad = matrix(300, 72), torch.stack([matrix(136, 72) for _ in range(3)]), matrix(300, 136)
    offsets = ints(3, 131, 131, 290)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    y = grouped_fp8_linear(*leaves, offsets=offsets)
    y.backward(grad)
    for group, rows in ((0, slice(3, 131)), (1, slice(0, 0)), (2, slice(131, 290))):
        got = y[rows].detach(), leaves[0].grad[rows], leaves[1].grad[group]
        check_linear(x[rows], weight[group], grad[rows], got, True)
    assert leaves[0].grad[:3].eq(0).all() and leaves[0].grad[290:].eq(0).all()


def noise(got, want):
    """In dB."""
    return 10 * math.log10(float((got.double() - want).square().sum() / want.square().sum()))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_gradients_are_nearly_those_of_the_linear_layer(power_of_two):
    """Both factors rounded to e4m3: noise of about -29 dB; scales that are powers of two shift codes, no more."""
    x, weight, bias = torch.randn(300, 260), torch.randn(200, 260), torch.randn(200)
    grad = torch.randn(300, 200)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    got = torch.autograd.grad(fp8_linear(leaves[0], leaves[1], bias=leaves[2], power_of_two=power_of_two), leaves, grad)
    doubles = [t.double().requires_grad_() for t in (x, weight, bias)]
    want = torch.autograd.grad(F.linear(*doubles), doubles, grad.double())
    assert noise(got[0], want[0]) < -28 and noise(got[1], want[1]) < -28
    torch.testing.assert_close(got[2].double(), want[2], rtol=1e-5, atol=1e-4)
    experts = weight.expand(2, -1, -1).clone().requires_grad_()
    x, offsets, counts = leaves[0], ints(0, 100, 300), ints(90, 200)
    real = (torch.arange(300) < 90) | (torch.arange(300) >= 100)
    y = grouped_fp8_linear(x, experts, offsets=offsets, counts=counts, power_of_two=power_of_two)
    got = torch.autograd.grad(y, (x, experts), grad)
    assert noise(got[0][real], (grad.double() @ weight.double())[real]) < -28
    for group, rows in enumerate((slice(0, 90), slice(100, 300))):
        assert noise(got[1][group], grad[rows].double().T @ x[rows].detach().double()) < -28


def test_the_quantisation_does_not_hurt_what_it_need_not():
    """Operands that e4m3 holds exactly give the linear layer's own gradients."""
    x, weight, grad = (torch.randint(-8, 9, shape).float() for shape in ((130, 136), (72, 136), (130, 72)))
    leaves = [t.requires_grad_() for t in (x, weight)]
    got = torch.autograd.grad(fp8_linear(*leaves), leaves, grad)
    want = torch.autograd.grad(F.linear(*leaves), leaves, grad)
    assert all(torch.equal(g, w) for g, w in zip(got, want))


def test_leading_axes_and_strides():
    x, weight = matrix(24, 200), matrix(72, 200)
    want = fp8_linear(x, weight)
    assert torch.equal(fp8_linear(x.view(2, 3, 4, 200), weight), want.view(2, 3, 4, 72))
    assert torch.equal(fp8_linear(x[5], weight), want[5])
    assert torch.equal(fp8_linear(x.T.contiguous().T, weight.T.contiguous().T), want)
    weight.requires_grad_()
    sums = torch.autograd.grad(fp8_linear(x, weight).sum(), weight)[0]  # an expanded gradient
    assert torch.equal(sums, torch.autograd.grad(fp8_linear(x, weight), weight, torch.ones(24, 72))[0])


@pytest.mark.parametrize("grouped", [False, True], ids=["dense", "grouped"])
def test_micro_batches_add_up_in_float32(grouped, body):
    """Into a buffer beside a bfloat16 weight, whose own .grad would forget small additions."""
    groups = dict(offsets=ints(0, 40), counts=ints(40)) if grouped else {}
    shape = (1, 24, 136) if grouped else (24, 136)
    weight = torch.randn(shape).bfloat16().requires_grad_()
    main_grad, want = torch.ones(shape), torch.ones(shape, dtype=torch.float64)
    function = grouped_fp8_linear if grouped else fp8_linear
    products = dict(grouped_fp8_gemm=2, grouped_fp8_wgrad=2) if grouped else dict(fp8_gemm=4)
    batches = [(torch.randn(40, 136), torch.randn(40, 24)) for _ in range(2)]
    with body(quantize_1x128=6, quantize_128x128=2, **products):
        for x, grad in batches:
            function(x, weight, main_grad=main_grad, **groups).backward(grad)
    for x, grad in batches:
        a, b = (quantize_1x128(t.T.contiguous(), power_of_two=True) for t in (grad, x))
        want += exact(*a, *b)[0]
    assert weight.grad is None
    torch.testing.assert_close(main_grad.double(), want, rtol=1e-5, atol=1e-5)


def saved(function):
    """What a forward pass keeps for its backward: shapes and dtypes."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((list(t.shape), t.dtype)) or t, lambda t: t):
        function()
    return kept


def test_only_what_is_needed_is_kept_and_computed(body):
    x, weight = torch.randn(130, 256).bfloat16(), torch.randn(24, 256)
    codes, scales, master = ([256, 130], torch.float8_e4m3fn), ([256, 2], torch.float32), ([24, 256], torch.float32)
    with body(quantize_1x128=2, quantize_128x128=1, fp8_gemm=1):
        assert saved(lambda: fp8_linear(x, weight.requires_grad_())) == [codes, scales]
    with body(quantize_1x128=2, quantize_128x128=1, fp8_gemm=1):
        assert saved(lambda: fp8_linear(x.requires_grad_(), weight)) == [master, codes, scales]
    with body(quantize_1x128=1, quantize_128x128=1, fp8_gemm=1):
        assert saved(lambda: fp8_linear(x, weight.detach())) == [master]
    with body(quantize_1x128=1, quantize_128x128=1, fp8_gemm=1), torch.no_grad():
        assert saved(lambda: fp8_linear(x, weight)) == []
    y = fp8_linear(x, weight)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpointing_repeats_the_gradients():
    x, weight = matrix(130, 200).requires_grad_(), torch.stack([matrix(72, 200)] * 2).requires_grad_()
    real = (torch.arange(130) < 120)[:, None]

    def run(x, weight):
        grouped = grouped_fp8_linear(x, weight, offsets=ints(0, 60, 120), counts=ints(60, 60))
        return (fp8_linear(x, weight[0]) + grouped.where(real, 0)).square().sum()

    want = torch.autograd.grad(run(x, weight), (x, weight))
    got = torch.autograd.grad(checkpoint(run, x, weight, use_reentrant=False), (x, weight))
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    checkpoint(run, x, weight, use_reentrant=True).backward()
    assert torch.equal(x.grad, want[0]) and torch.equal(weight.grad, want[1])


def test_a_second_derivative_is_refused():
    x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    for op, y in (
        ("fp8_linear", fp8_linear(x, weight)),
        ("grouped_fp8_linear", grouped_fp8_linear(x, weight[None], offsets=ints(0, 3))),
    ):
        with pytest.raises(
            RuntimeError, match=rf"^{op}: has a first derivative only, and create_graph=True .*F?.linear"
        ):
            torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_as_one_graph_forward_and_backward(dynamic):
    bias = torch.randn(136, requires_grad=True)
    weight = torch.stack([matrix(136, 200) for _ in range(3)]).requires_grad_()

    def run(x, weight, bias, offsets, counts, real):
        dense = fp8_linear(x, weight[0], bias=bias)
        loose = grouped_fp8_linear(x, weight, offsets=offsets, counts=counts)
        return (dense + loose.where(real[:, None], 0)).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (50, 70, 300):
        x = matrix(rows, 200).requires_grad_()
        groups = ints(0, 10, 20, rows - 5), ints(9, 0, rows - 30)
        real = (torch.arange(rows) < 9) | (torch.arange(rows) >= 20) & (torch.arange(rows) < rows - 10)
        got, want = (torch.autograd.grad(f(x, weight, bias, *groups, real), (x, weight, bias)) for f in (compiled, run))
        assert all(torch.equal(g, w) for g, w in zip(got, want))


def test_nothing_waits_for_the_device():
    """Fake tensors have shapes but no numbers: reading one fails."""
    with FakeTensorMode():
        x = torch.empty(300, 200, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(4, 136, 200, requires_grad=True)
        offsets, counts = (torch.empty(n, dtype=torch.int32) for n in (5, 4))
        for alignment in (1, 128):
            y = grouped_fp8_linear(x, weight, offsets=offsets, counts=counts, alignment=alignment)
            y = y + fp8_linear(x, weight[0], bias=torch.empty(136))
            d_x, d_weight = torch.autograd.grad(y.sum(), (x, weight))
            assert d_x.shape == x.shape and d_weight.shape == weight.shape


def test_meta_tensors():
    x, weight = torch.empty(5, 200, device="meta", requires_grad=True), torch.empty(2, 136, 200, device="meta")
    assert fp8_linear(x, weight[0]).shape == (5, 136)
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    grouped_fp8_linear(x, weight, offsets=offsets).sum().backward()
    assert x.grad.shape == x.shape


X, W, E = torch.ones(3, 16), torch.ones(8, 16), torch.ones(2, 8, 16)
BAD = {
    "x dtype": (
        lambda: fp8_linear(X.double(), W),
        TypeError,
        r"fp8_linear: x must be .*bfloat16 or float16 or float32, got",
    ),
    "x 0-D": (lambda: fp8_linear(X[0, 0], W), ValueError, r"x must be \[..., K\]"),
    "weight codes": (
        lambda: fp8_linear(X, W.to(torch.float8_e4m3fn)),
        TypeError,
        r"weight must be \[N, K=16\] .*, got \[8, 16\] float8_e4m3fn; weights are quantised here; for codes",
    ),
    "weight shape": (lambda: fp8_linear(X, W.T), ValueError, r"weight must be \[N=16, K=16\] .*, got \[16, 8\]"),
    "bias": (lambda: fp8_linear(X, W, bias=X[0]), ValueError, r"bias must be \[N=8\] .*, got \[16\]"),
    "bias dtype": (lambda: fp8_linear(X, W, bias=torch.ones(8).double()), TypeError, "bias must be .* got .* float64"),
    "power_of_two": (lambda: fp8_linear(X, W, power_of_two=1), TypeError, "power_of_two must be True or False, got 1"),
    "main_grad": (
        lambda: fp8_linear(X, W, main_grad=torch.ones(8, 16).bfloat16()),
        TypeError,
        r"main_grad must be \[N=8, K=16\] float32, got \[8, 16\] bfloat16",
    ),
    "main_grad memory": (
        lambda: fp8_linear(X, W, main_grad=torch.ones(1, 16).expand(8, 16)),
        ValueError,
        "main_grad must be a tensor with memory for each element, got one whose elements share it",
    ),
    "main_grad grad": (
        lambda: fp8_linear(X, W, main_grad=torch.ones(8, 16, requires_grad=True)),
        ValueError,
        "main_grad must be a tensor that needs no gradient",
    ),
    "grouped x": (lambda: grouped_fp8_linear(X[None], E, offsets=ints(0, 1, 3)), ValueError, r"x must be \[cap, K\]"),
    "grouped weight": (
        lambda: grouped_fp8_linear(X, W, offsets=ints(0, 1, 3)),
        ValueError,
        r"grouped_fp8_linear: weight must be \[G, N, K=16\] .*, got \[8, 16\]",
    ),
    "offsets": (
        lambda: grouped_fp8_linear(X, E, offsets=ints(0, 1)),
        ValueError,
        r"offsets must be \[3\] int32, got \[2\]",
    ),
    "offsets range": (
        lambda: grouped_fp8_linear(X, E, offsets=ints(0, 1, 4)),
        ValueError,
        r"offsets must rise within 0 .. 3 .*, got \[0, 1, 4\]",
    ),
    "counts": (
        lambda: grouped_fp8_linear(X, E, offsets=ints(0, 1, 3), counts=ints(2, 1)),
        ValueError,
        "counts must fit between the offsets",
    ),
    "alignment": (
        lambda: grouped_fp8_linear(X, E, offsets=ints(0, 1, 3), alignment=0),
        ValueError,
        "alignment must be an int >= 1, got 0",
    ),
    "alignment not kept": (
        lambda: (
            grouped_fp8_linear(X, E.clone().requires_grad_(), offsets=ints(0, 1, 3), alignment=128).sum().backward()
        ),
        ValueError,
        r"grouped_fp8_wgrad: offsets must be multiples of 128 where a group has rows, got \[0, 1, 3\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


# What these tests must see: each of these changes to the backward pass, made on purpose.


def _swapped(operands):
    codes, scales, w, w_scales = operands
    return codes, scales, w, w_scales.flip(-1, -2)


def _not_transposed(operands):
    codes, scales, w, w_scales = operands
    return codes, scales, w, w_scales.mT.reshape(w_scales.shape)


@pytest.mark.parametrize("bug", [_swapped, _not_transposed])
def test_planted_scales_of_the_transposed_weight_are_caught(bug, monkeypatch):
    class Ops:
        def __getattr__(self, name):
            real = getattr(torch.ops.k2kernels, name)
            if name != "fp8_gemm":
                return real
            return lambda *args: real(*(bug(args[:4]) if args[2].stride(-1) != 1 else args[:4]), *args[4:])

    monkeypatch.setattr(functional, "_ops", Ops())
    x, weight, grad = matrix(129, 260).requires_grad_(), matrix(300, 260).requires_grad_(), matrix(129, 300)
    y = fp8_linear(x, weight)
    y.backward(grad)
    with pytest.raises(AssertionError):
        check_linear(x.detach(), weight.detach(), grad, (y.detach(), x.grad, weight.grad), True)
