"""The GEMM that ends with SwiGLU and quantisation: one kernel, or a GEMM and the kernel of swiglu_quantize."""

import contextlib
import math

import pytest
import torch
from test_fp8_gemm import NAN_CODE, aligned, ceil128, exact, h100, ints, operands, poison  # noqa: F401 (a fixture)

import k2kernels
from k2kernels.ops import fp8_gemm as ops
from k2kernels.ops.fp8_gemm import fp8_gemm, fp8_gemm_swiglu, grouped_fp8_gemm_swiglu
from k2kernels.ops.quant import quantize_1x128, quantize_128x128
from k2kernels.reference import fp8_gemm as reference
from k2kernels.testing.compare import check_op
from k2kernels.testing.inputs import guarded

E4M3 = torch.float8_e4m3fn
FUSED = "sm90_swiglu_128x256"
BODIES = {
    "reference": None,
    "sm90_swiglu-0": (FUSED, "sm_90a", 0),
    "sm90_swiglu-a-1": (FUSED, "sm_90a", 1, "a"),
    "sm90_swiglu-b-2": (FUSED, "sm_90a", 2, "b"),
    "portable_64x128-1": ("portable_64x128", "sm_80", 1),
    "sm90_128x192-3": ("sm90_128x192", "sm_90a", 3),
    "sm90_small_8x64-4-2": ("sm90_small_8x64", "sm_90a", 2, None, 4),
}
OPS = ("fp8_gemm_swiglu", "grouped_fp8_gemm_swiglu")


def launches():
    return sum(map(k2kernels.launch_count, OPS)), k2kernels.launch_count("swiglu_quantize")


@contextlib.contextmanager
def running(kernel, arch, seed, share=None, split=1):
    with k2kernels.emulated(arch, seed=seed), ops.fp8_gemm_kernel(kernel, share, split):
        yield


@pytest.fixture(params=BODIES)
def body(request):
    if request.param == "reference":
        yield
        return
    fused = BODIES[request.param][0] == FUSED
    with running(*BODIES[request.param]):
        before = launches()
        yield
        nothing = request.node.callspec.params.get("counts") == []
        (gemms, rest), (gemms_before, rest_before) = launches(), before
        assert (gemms > gemms_before) == (not nothing)
        assert nothing or rest - rest_before == (0 if fused else gemms - gemms_before)


with_kernels = pytest.mark.usefixtures("body")


def check_swiglu(data, scales, product, magnitude, weights=None, power_of_two=False):
    """Every scale and code is one that some sums within the rounding errors of the product lead to.

    Args:
        product, magnitude: of `exact`: gate and up in float64, and what bounds their rounding errors.
    """
    gate, up = product.chunk(2, dim=-1)
    gate_error, up_error = (magnitude * (256 * 2.0**-24)).chunk(2, dim=-1)  # see check_gemm
    weight = torch.ones(len(product), 1) if weights is None else weights[:, None].double()
    silu = gate * torch.sigmoid(gate)
    hidden = silu * up * weight
    # The slope of silu is below 1.1; exp is good to two steps, and five roundings follow.
    error = (1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error) * weight.abs()
    error += hidden.abs() * 2.0**-20 + 2.0**-126

    def scale_of(amax):
        scale = (amax.clamp(min=0) / 448).clamp(min=2.0**-126)
        return torch.exp2(scale.log2().ceil()) if power_of_two else scale

    assert data.dtype == E4M3 and data.shape == hidden.shape and scales.shape == (len(data), ceil128(data.shape[1]))
    for block in range(scales.shape[1]):
        here = slice(128 * block, 128 * (block + 1))
        amax, slack = hidden[:, here].abs().amax(dim=1), error[:, here].amax(dim=1)
        scale, small = scales[:, block].double(), 2.0**-22
        assert (scale >= scale_of((amax - slack) * (1 - small)) * (1 - small)).all()
        assert (scale <= scale_of((amax + slack) * (1 + small)) * (1 + small)).all()
        room = error[:, here] / scale[:, None] * (1 + small)
        quotient = hidden[:, here] / scale[:, None]
        low, high = (x.clamp(-448, 448).to(E4M3).double() for x in (quotient - room, quotient + room))
        codes = data[:, here].double()
        assert ((low <= codes) & (codes <= high)).all()


@with_kernels
@pytest.mark.parametrize("m, i, k", [(1, 128, 128), (5, 256, 192), (70, 384, 448), (130, 128, 130)])
def test_dense(m, i, k):
    args = operands(m, 2 * i, k)
    weights = torch.randn(m) if m != 5 else None
    options = dict(power_of_two=m == 70, scale_layout="column" if m == 130 else "row")
    data, scales = fp8_gemm_swiglu(*args, weights=weights, **options)
    assert data.is_contiguous() and scales.stride() == ((1, 132) if m == 130 else (scales.shape[1], 1))
    check_swiglu(data, scales, *exact(*args), weights, options["power_of_two"])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("m, i, k, fine", [(3, 72, 192, False), (130, 200, 130, False), (9, 128, 256, True)])
def test_what_the_one_kernel_does_not_take_is_served_by_two(m, i, k, fine, arch):
    args = operands(m, 2 * i, k, fine=fine)
    with k2kernels.emulated(arch, seed=2):
        before = launches()
        data, scales = fp8_gemm_swiglu(*args)
        assert launches() == (before[0] + 1, before[1] + 1)
    check_swiglu(data, scales, *exact(*args))


GROUPS = {
    "ragged": [5, 1, 130, 3],
    "empty ends": [0, 9, 0, 8, 0],
    "all empty": [0, 0, 0],
    "none": [],
    "many": [0] * 31 + [2, 1] + [0] * 40 + [3],
}


def grouped_case(counts, i, k, masked=False):
    """Arguments of a grouped call, and which rows are real; the others hold NaN."""
    offsets, real = aligned(counts, 8)
    if masked:
        real = torch.arange(max(counts, default=0) + 2) < ints(*counts)[:, None]
    b, b_scales = quantize_128x128(torch.randn(len(counts), 2 * i, k))
    a, a_scales = quantize_1x128(torch.randn(*real.shape, k))
    poison(a, a_scales, ~real)
    weights = torch.where(real, torch.randn(real.shape), math.nan)
    groups = dict(masked_m=ints(*counts)) if masked else dict(offsets=offsets, counts=ints(*counts))
    return (a, a_scales, b, b_scales), dict(weights=weights, **groups), real


@with_kernels
@pytest.mark.parametrize("masked", [False, True], ids=["contiguous", "masked"])
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_groups(counts, masked):
    args, groups, _ = grouped_case(counts, 128, 192, masked)
    a, a_scales, b, b_scales = args
    data, scales = grouped_fp8_gemm_swiglu(*args, **groups, expected_m=4)
    assert data.shape == (*a.shape[:-1], 128) and scales.shape == (*a.shape[:-1], 1)
    for group, count in enumerate(counts):
        start = 0 if masked else int(groups["offsets"][group])
        rows = (group, slice(count)) if masked else slice(start, start + count)
        if count:
            product = exact(a[rows], a_scales[rows], b[group], b_scales[group])
            check_swiglu(data[rows], scales[rows], *product, groups["weights"][rows])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [None, "a", "b"])
def test_every_schedule(share, seed):
    """Several rounds of tiles and blocks; around operands and results a kernel faults, other rows stay as they are."""
    args, groups, real = grouped_case([70, 0, 300, 1], 384, 448)
    with running("sm90_128x128", "sm_90a", 0):
        want, want_scales = grouped_fp8_gemm_swiglu(*args, **groups)
    results = ops._swiglu_outputs(args[0], args[2], "row")
    results = data, scales = [guarded(t.view(torch.uint8).fill_(7).view(t.dtype)) for t in results]
    args = [guarded(t) for t in args]
    groups = {name: guarded(t) for name, t in groups.items()}
    with running(FUSED, "sm_90a", seed, share):
        before = launches()
        ops._launch_swiglu(*results, *args, **groups, op="grouped_fp8_gemm_swiglu")
        assert launches() == (before[0] + 1, before[1])
    codes = data.view(torch.uint8)
    # The sums are the other kernels', bit for bit, and so is the rest.
    assert torch.equal(codes[real], want.view(torch.uint8)[real]) and torch.equal(scales[real], want_scales[real])
    assert codes[~real].eq(7).all() and scales.view(torch.uint8).view(*scales.shape, 4)[~real].eq(7).all()
    assert data.shape == want.shape


@with_kernels
def test_gate_comes_first():
    a, a_scales = torch.ones(1, 128).to(E4M3), torch.ones(1, 1)
    b = torch.zeros(256, 128)
    b[:128, 0], b[128:, 0] = 2.0, torch.linspace(-3, 3, 128)
    b, b_scales = quantize_128x128(b)
    want = reference.fp8_gemm_swiglu(a, a_scales, b, b_scales, None, False, "row")
    data, scales = fp8_gemm_swiglu(a, a_scales, b, b_scales)
    torch.testing.assert_close(scales, want[1], rtol=2e-7, atol=0)
    assert torch.equal(data.float(), want[0].float()) and data.float().unique().numel() == 64


@with_kernels
def test_nan_and_infinities_leave_the_others_of_a_row_alone():
    args = operands(5, 512, 192)
    args[0].view(torch.uint8)[3, 150] = NAN_CODE
    args[2].view(torch.uint8)[7, 1] = NAN_CODE  # of gate
    args[2].view(torch.uint8)[256 + 130, 1] = NAN_CODE  # of up
    weights = torch.tensor([1.0, -2.0, math.inf, 1.0, 0.5])
    data, scales = fp8_gemm_swiglu(*args, weights=weights)
    codes = data.view(torch.uint8)
    bad = (
        (torch.arange(5)[:, None] == 3)
        | (torch.arange(5)[:, None] == 2)
        | torch.isin(torch.arange(256), torch.tensor([7, 130]))
    )
    assert codes[bad].eq(NAN_CODE).all() and not codes[~bad].eq(NAN_CODE).any()
    assert scales[2:4].eq(2.0**-126).all()
    product, magnitude = exact(*args)
    rest = torch.tensor([0, 1, 4])
    finite = ~torch.isin(torch.arange(512), torch.tensor([7, 130, 256 + 7, 256 + 130]))
    product, magnitude = (torch.where(finite, x, 0)[rest] for x in (product, magnitude))
    clean = torch.where(bad, 0, codes).view(E4M3)
    check_swiglu(clean[rest], scales[rest], product, magnitude, weights[rest])


@pytest.mark.parametrize("arch", ["reference", "sm_80", "sm_90a"])
@pytest.mark.parametrize("shape", [(0, 128, 128), (3, 0, 128), (3, 128, 0), (0, 0, 0)], ids=str)
def test_empty(shape, arch):
    m, i, k = shape
    emulated = contextlib.nullcontext() if arch == "reference" else k2kernels.emulated(arch)
    with emulated:
        data, scales = fp8_gemm_swiglu(*operands(m, 2 * i, k), weights=torch.ones(m))
    assert torch.equal(data.float(), torch.zeros(m, i))
    assert torch.equal(scales, torch.full((m, ceil128(i)), 2.0**-126))


def test_plans(h100):  # noqa: F811 (the fixture)
    def kernel(m, n, k, **options):
        return ops.fp8_gemm_plan(m, n, k, swiglu=True, **options).kernel

    assert kernel(4096, 4096, 7168) == kernel(683, 4096, 7168, groups=48) == FUSED
    assert kernel(1, 4096, 7168).startswith("sm90_small")  # 16 blocks would read all weights
    assert FUSED not in (kernel(4096, 4096 - 128, 7168), kernel(4096, 4096, 7168, fine=True), kernel(4096, 4096, 0))
    assert FUSED not in (plan.kernel for plan, _ in ops.fp8_gemm_costs(4096, 4096, 7168))
    for m in (1, 64, 4096):
        costs = ops.fp8_gemm_costs(m, 4096, 7168, swiglu=True)
        assert costs[0][1] == min(clocks for _, clocks in costs)


def test_the_plan_serves_without_force(monkeypatch):
    args = operands(130, 256, 128)
    monkeypatch.setattr(ops, "chip", lambda device: (90, 2, 227 * 1024))  # with so few, large tiles are best
    with k2kernels.emulated("sm_90a", seed=2):
        before = launches()
        data, scales = fp8_gemm_swiglu(*args)
        assert launches() == (before[0] + 1, before[1])
    check_swiglu(data, scales, *exact(*args))


DENSE = (torch.ones(3, 192).to(E4M3), torch.ones(3, 2), torch.ones(256, 192).to(E4M3), torch.ones(2, 2))
EXPERTS = (torch.ones(2, 256, 192).to(E4M3), torch.ones(2, 2, 2))
ROWS = (torch.ones(9, 192).to(E4M3), torch.ones(2, 9).T, *EXPERTS)
MASKED = (torch.ones(2, 4, 192).to(E4M3), torch.ones(2, 4, 2), *EXPERTS)
REGISTERED = {
    "dense": (ops._fp8_gemm_swiglu, (*DENSE, None, False, "row")),
    "dense full": (ops._fp8_gemm_swiglu, (*DENSE, torch.ones(3), True, "column")),
    "contiguous": (
        ops._grouped_fp8_gemm_swiglu,
        (*ROWS, ints(0, 4, 8), ints(3, 0), 4, torch.ones(9), False, "column"),
    ),
    "masked": (ops._grouped_fp8_gemm_swiglu, (*MASKED, None, ints(3, 0), None, None, True, "row")),
}


@pytest.mark.parametrize("case", REGISTERED)
def test_registration(case):
    check_op(*REGISTERED[case])


def test_meta_tensors():
    data, scales = fp8_gemm_swiglu(*(t.to("meta") for t in DENSE), scale_layout="column")
    assert data.shape == (3, 128) and data.dtype == E4M3 and scales.shape == (3, 1) and scales.stride() == (1, 4)
    data, scales = grouped_fp8_gemm_swiglu(*(t.to("meta") for t in MASKED), masked_m=ints(1, 1).to("meta"))
    assert data.shape == (2, 4, 128) and scales.shape == (2, 4, 1)


def dense(*args, **kwargs):
    return lambda: fp8_gemm_swiglu(*(args or DENSE), **kwargs)


def rows(*args, **kwargs):
    return lambda: grouped_fp8_gemm_swiglu(*(args or ROWS), **kwargs)


BAD = {
    "odd": (
        dense(*DENSE[:2], DENSE[2][:255], DENSE[3]),
        r"fp8_gemm_swiglu: b must be even in its rows, .*\[255, 192\]",
    ),
    "weights": (dense(weights=torch.ones(4)), r"weights must be \[M=3\] float32, got \[4\]"),
    "layout": (dense(scale_layout="rows"), "scale_layout must be one of 'row', 'column', got 'rows'"),
    "a_scales": (dense(DENSE[0], torch.ones(3, 3), *DENSE[2:]), r"a_scales must be \[M=3, 2\] float32, got \[3, 3\]"),
    "no groups": (rows(), "grouped_fp8_gemm_swiglu: the layout must be given by offsets .* got neither"),
    "offsets": (rows(offsets=ints(0, 4, 10)), "grouped_fp8_gemm_swiglu: offsets must rise within 0 .. 9"),
    "masked_m": (rows(*MASKED, masked_m=ints(5, 0)), "grouped_fp8_gemm_swiglu: masked_m must be within 0 .. 4"),
    "masked weights": (rows(*MASKED, masked_m=ints(1, 1), weights=torch.ones(8)), r"weights must be \[G=2, maxM=4\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_no_backward():
    with pytest.raises(RuntimeError, match="fp8_gemm_swiglu: this op has no backward"):
        fp8_gemm_swiglu(*DENSE, weights=torch.ones(3, requires_grad=True))[1].sum().backward()


def test_the_kernel_is_for_this_alone():
    with k2kernels.emulated("sm_90a"), ops.fp8_gemm_kernel(FUSED):
        with pytest.raises(RuntimeError, match="takes SwiGLU of a multiple of 128 columns"):
            fp8_gemm(*DENSE)
        for args in (operands(3, 144, 128), operands(3, 256, 128, fine=True), operands(3, 256, 0)):
            with pytest.raises(RuntimeError, match="takes SwiGLU of a multiple of 128 columns"):
                fp8_gemm_swiglu(*args)
