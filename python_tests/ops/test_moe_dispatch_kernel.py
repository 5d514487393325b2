"""The kernels of dispatch and combine in the emulator, against the definition."""

import math

import pytest
import torch
from moe_cases import BF16, CANARY, F16, F32, SCHEDULES, bits, in_all_schedules, kernels, make_handle, rows_of, same

import k2kernels
from k2kernels.ops._constants import constants
from k2kernels.ops.moe import DispatchHandle, dispatch, moe_combine, moe_dispatch
from k2kernels.reference import moe as reference
from k2kernels.testing.inputs import expert_indices, guarded


def untouched(*shape, dtype):
    """Guarded memory of canaries."""
    return guarded(torch.full((math.prod(shape) * dtype.itemsize,), CANARY, dtype=torch.uint8)).view(dtype).view(shape)


def dispatch_into_canaries(x, indices, experts, alignment, capacity, quantize=False, power_of_two=False, layout="row"):
    """Data, scales and plan of the kernels, in guarded memory that held canaries."""
    hidden = x.shape[1]
    data = untouched(capacity, hidden, dtype=torch.float8_e4m3fn if quantize else x.dtype)
    scales, blocks = None, -(-hidden // 128)
    if quantize and layout == "row":
        scales = untouched(capacity, blocks, dtype=F32)
    elif quantize:
        scales = untouched(blocks, -(-capacity // 4) * 4, dtype=F32)[:, :capacity].mT
    sizes = ((indices.shape), (capacity,), (experts + 1,), (experts,))
    plan = [untouched(*size, dtype=torch.int32) for size in sizes] + [untouched(1, dtype=torch.int64)]
    dispatch._launch_dispatch(data, *plan, x, indices, alignment, scales, power_of_two)
    return data, scales, plan


def check_dispatch(x, indices, experts, alignment, capacity, schedule, **quantized):
    launches = 1 if indices.numel() <= constants.MOE_PLAN_TILE else 3
    with kernels(schedule, launches):
        data, scales, plan = dispatch_into_canaries(
            guarded(x), guarded(indices), experts, alignment, capacity, **quantized
        )
    want = reference.moe_plan(indices, experts, alignment, capacity)
    for g, w in zip(plan, want):
        assert torch.equal(g.view(w.shape), w)
    token_of_slot = want[1]
    real, pad = token_of_slot >= 0, token_of_slot < 0
    rows = x[token_of_slot[real].long()]
    if quantized:
        rows, row_scales = k2kernels.quantize_1x128(rows, power_of_two=quantized["power_of_two"])
        same(scales[real], row_scales)
        assert (bits(scales[pad]) == CANARY).all()
    same(data[real], rows)
    assert (bits(data[pad]) == CANARY).all()


# Tokens, experts, top-k, hidden, alignment, skew: up to 2,048 pairs in one launch, more in three.
DISPATCHES = {
    "none": (0, 8, 2, 64, 4, "uniform"),
    "one": (1, 384, 8, 1024, 16, "uniform"),
    "two, three experts": (2, 3, 2, 72, 1, "uniform"),
    "a tile exactly": (256, 384, 8, 16, 1, "uniform"),
    "odd": (127, 37, 5, 24, 7, "some dropped"),
    "hot": (129, 64, 6, 528, 8, "one hot expert"),
    "all dropped": (33, 8, 2, 32, 4, "all dropped"),
    "K3": (70, 896, 16, 16, 8, "uniform"),
    "K3, wide": (7, 896, 16, 3584, 16, "uniform"),
    "K2, wide": (2, 384, 8, 7168, 1, "uniform"),
    "V2-Lite": (128, 64, 6, 24, 16, "uniform"),
    "half of the experts": (127, 256, 8, 16, 4, "first half"),
    "as many as there may be": (40, 1024, 32, 16, 1, "uniform"),
    "more blocks than there may be": (2048, 8, 1, 1040, 2, "uniform"),
    "more than a tile": (257, 384, 8, 16, 1, "uniform"),
    "ten tiles": (650, 1024, 32, 16, 3, "some dropped"),
    "hot, tiles": (1100, 5, 2, 1000, 16, "one hot expert"),
    "all dropped, tiles": (1025, 8, 2, 16, 4, "all dropped"),
}


@in_all_schedules
@pytest.mark.parametrize("case", DISPATCHES)
def test_dispatch(case, schedule):
    tokens, experts, top_k, hidden, alignment, skew = DISPATCHES[case]
    dtype = (BF16, F16, F32)[schedule[1] % 3]
    indices = expert_indices(skew, tokens, top_k, experts)
    if schedule[1] % 2 == 0:
        indices = indices.int()
    capacity = -(-(indices.numel() + min(experts, indices.numel()) * (alignment - 1)) // alignment) * alignment
    check_dispatch(torch.randn(tokens, hidden).to(dtype), indices, experts, alignment, capacity, schedule)


@in_all_schedules
@pytest.mark.parametrize("tokens", [21, 420])
@pytest.mark.parametrize("capacity", [0, 8, 40, 1 << 14])
def test_dispatch_drops_what_has_no_room(capacity, tokens, schedule):
    indices = expert_indices("some dropped", tokens, 5, 11)
    check_dispatch(torch.randn(tokens, 32), indices, 11, 8, capacity, schedule)


@pytest.mark.parametrize("tokens", [5, 1030])
def test_dispatch_drops_experts_that_do_not_exist(tokens):
    """The host does not look into a GPU's indices: the kernel must not let them reach memory."""
    indices = torch.randint(0, 8, (tokens, 2))
    indices[0, 0], indices[1, 1], indices[2] = 8, -2, torch.tensor([2**31, -(2**33)])
    check_dispatch(torch.randn(tokens, 16), indices, 8, 4, 2 * tokens + 26 & ~3, SCHEDULES[3])


@in_all_schedules
@pytest.mark.parametrize("layout", ["row", "column"])
@pytest.mark.parametrize("tokens", [13, 1025])
def test_dispatch_quantizes(tokens, layout, schedule):
    dtype, hidden = [(BF16, 320), (F16, 128), (F32, 640), (BF16, 200)][schedule[1]]
    x = (torch.randn(tokens, hidden) * torch.logspace(-4, 4, tokens)[:, None]).to(dtype)
    x[2, 5], x[3, 7], x[4] = math.nan, math.inf, 0
    indices = expert_indices("some dropped", tokens, 2, 8)
    options = dict(quantize=True, power_of_two=schedule[1] % 2 == 1, layout=layout)
    check_dispatch(x, indices, 8, 4, 2 * tokens + 26 & ~3, schedule, **options)


def test_dispatch_of_rows_that_lie_apart():
    wide, indices = torch.full((9, 48), math.nan), expert_indices("uniform", 9, 2, 5)
    wide[:, 3:35] = torch.randn(9, 32)
    for x in (wide[:, 3:35], wide[:, 3:35].contiguous().mT.contiguous().mT):
        with kernels(SCHEDULES[2], 2):
            got = moe_dispatch(x, indices.mT.contiguous().mT, torch.ones(9, 2), num_experts=5)
            codes = moe_dispatch(x, indices, torch.ones(9, 2), num_experts=5, quantize=True)
        same(got.data, x[got.handle.token_of_slot.long()])
        want = k2kernels.quantize_1x128(got.data)
        same(codes.data, want[0])
        same(codes.scales, want[1])


COMBINES = {  # tokens, experts, top-k, hidden, y, shared, residual, out
    "K2": (5, 384, 8, 7168, BF16, BF16, None, BF16),
    "fp16": (9, 16, 3, 520, F16, F16, F32, F16),
    "float32": (33, 8, 2, 1040, F32, BF16, F16, F32),
    "mixed": (7, 8, 5, 24, BF16, F32, BF16, F32),
    "narrow, top-32": (20, 40, 32, 7, F32, None, F32, BF16),
    "one k": (129, 4, 1, 16, BF16, None, None, F16),
    "K3": (2, 896, 16, 3584, BF16, BF16, BF16, BF16),
}


@in_all_schedules
@pytest.mark.parametrize("case", COMBINES)
def test_combine_equals_the_reference_bit_for_bit(case, schedule):
    tokens, experts, top_k, hidden, dtype, *terms, out = COMBINES[case]
    handle = make_handle(tokens, experts, top_k)
    y = rows_of(handle, hidden, dtype)
    shared, residual = (None if t is None else torch.randn(tokens, hidden).to(t) for t in terms)
    call = dict(shared=shared, residual=residual, out_dtype=out)
    want = moe_combine(y, handle, **call)
    assert want.isfinite().all()
    handle = DispatchHandle(*map(guarded, handle))
    call = {name: guarded(v) if isinstance(v, torch.Tensor) else v for name, v in call.items()}
    with kernels(schedule, 1):
        same(moe_combine(guarded(y), handle, **call), want)


def test_combine_of_a_token_does_not_depend_on_its_batch():
    handle = make_handle(40, 8, 3, skew="uniform")
    y, shared = rows_of(handle, 40, BF16), torch.randn(40, 40)
    with kernels(SCHEDULES[2]):
        together = moe_combine(y, handle, shared=shared)
        for token in (0, 17, 39):
            slots, weights, one = (t[token : token + 1] for t in (handle.slot_of, handle.weights, shared))
            same(
                dispatch._moe_combine.kernel(y, slots, handle[1], weights, one, None, BF16), together[token : token + 1]
            )


def test_combine_reads_rows_that_lie_apart_and_no_slot_that_does_not_exist():
    """The host does not look into a GPU's slots: the kernel must not let them reach memory."""
    handle = make_handle(6, 8, 3)
    y, shared = rows_of(handle, 40, F32), torch.randn(6, 40)
    wide = torch.full((len(y), 64), math.nan)
    wide[:, 8:48] = y
    want = moe_combine(y, handle, shared=shared)
    none = handle.slot_of < 0
    for no_slot in (-7, len(y), 2**31 - 1):
        slots, apart = handle.slot_of.masked_fill(none, no_slot), shared.mT.contiguous().mT
        with kernels(SCHEDULES[1], 1):
            same(dispatch._moe_combine.kernel(wide[:, 8:48], slots, handle[1], handle.weights, apart, None, F32), want)


def test_combine_of_nothing():
    with kernels(SCHEDULES[0], 1):
        handle = make_handle_emulated = moe_dispatch(
            torch.zeros(0, 16), torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, 2), num_experts=3, capacity=8
        ).handle
    assert make_handle_emulated.token_of_slot.tolist() == [-1] * 8 and handle.offsets.tolist() == [0] * 4
    before = k2kernels.launch_count()
    with k2kernels.emulated():
        assert moe_combine(torch.full((8, 16), math.nan), handle).shape == (0, 16)
    assert k2kernels.launch_count() == before


GRADIENTS = {  # tokens, experts, top-k, hidden, grad, y
    "K2": (4, 384, 8, 7168, BF16, BF16),
    "fp16": (9, 16, 3, 520, F32, F16),
    "float32": (33, 8, 2, 1040, F32, F32),
    "narrow, top-32": (20, 40, 32, 7, BF16, F32),
    "more blocks than there may be": (1600, 8, 2, 520, F32, BF16),
    "none": (0, 4, 2, 16, F32, F32),
}


@in_all_schedules
@pytest.mark.parametrize("case", GRADIENTS)
def test_combine_backward(case, schedule):
    tokens, experts, top_k, hidden, grad_dtype, dtype = GRADIENTS[case]
    handle = make_handle(tokens, experts, top_k, capacity=8 if case == "none" else None)
    slots, weights = handle[:2], torch.randn(tokens, top_k)
    y, grad = rows_of(handle, hidden, dtype), torch.randn(tokens, hidden).to(grad_dtype)
    want, _ = dispatch._moe_combine_backward(grad, y.nan_to_num(), *slots, weights)
    with kernels(schedule, 1):
        d_y, d_weights = dispatch._moe_combine_backward(*map(guarded, (grad, y, *slots, weights)))
    same(d_y, want)
    pairs = y.double()[handle.slot_of.long()] * grad.double()[:, None]
    exact = pairs.sum(-1).masked_fill(handle.slot_of < 0, 0)
    # Each of H products and sums is off by half a unit of the sum of magnitudes at most, mostly far less.
    budget = (pairs.abs().sum(-1) * 2**-24 * max(4, hidden**0.5)).masked_fill(handle.slot_of < 0, 0)
    assert d_weights.dtype == F32 and (((d_weights - exact).abs() <= budget) | (exact == d_weights)).all()


@in_all_schedules
@pytest.mark.parametrize("slots, hidden", [(0, 16), (8, 0)], ids=["no slots", "no columns"])
def test_combine_backward_of_empty_rows(slots, hidden, schedule):
    """y has no memory then, and the weights have gradients all the same: zeros."""
    y, d_weights = torch.zeros(slots, hidden), torch.full((5, 2), math.nan)
    indices = torch.zeros(5, 2, dtype=torch.int32)
    slot_of, token_of_slot, *_ = reference.moe_plan(indices, 1, 1, slots)
    operands = torch.randn(5, hidden), y, slot_of, token_of_slot, torch.randn(5, 2)
    with kernels(schedule, 1):
        dispatch._launch_combine_backward(torch.empty_like(y), d_weights, *operands)
    same(d_weights, torch.zeros(5, 2))


@in_all_schedules
def test_permute(schedule):
    handle = make_handle(21, 8, 3)
    for x in (torch.randn(21, 200).bfloat16(), torch.randn(21, 520).half(), torch.randn(21, 7)):
        want = dispatch._moe_permute(x, *handle[:2])
        with kernels(schedule, 1):
            same(dispatch._moe_permute(guarded(x), *handle[:2]), want)


def test_weight_gradients_are_the_same_bits_in_any_batch_and_schedule():
    handle = make_handle(12, 8, 3, skew="uniform")
    y, grad, weights = rows_of(handle, 5000, BF16), torch.randn(12, 5000), torch.randn(12, 3)
    results = []
    for schedule in SCHEDULES:
        with kernels(schedule):
            results.append(dispatch._moe_combine_backward(grad, y, *handle[:2], weights)[1])
            alone = dispatch._moe_combine_backward(grad[7:8], y, handle.slot_of[7:8], handle[1], weights[7:8])[1]
            same(alone, results[0][7:8])
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("tokens", [11, 1100])
def test_layer_gradients(tokens):
    """Dispatch, something with the rows, combine: the gradients of both ops by kernels alone."""
    indices = expert_indices("some dropped", tokens, 2, 8)
    leaves = [torch.randn(tokens, 24), torch.rand(tokens, 2), torch.randn(tokens, 24), torch.randn(tokens, 24)]
    leaves = [t.requires_grad_() for t in leaves]

    def layer(x, weights, shared, residual):
        d = moe_dispatch(x, indices, weights, num_experts=8, alignment=4)
        rows = torch.where((d.handle.token_of_slot >= 0)[:, None], d.data, 0)
        return moe_combine(rows.square(), d.handle, shared=shared, residual=residual)

    want = torch.autograd.grad(layer(*leaves).square().sum(), leaves)
    with kernels(SCHEDULES[3]):
        got = torch.autograd.grad(layer(*leaves).square().sum(), leaves)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
