"""The kernels of moe in the emulator, against the definition and against formulas of their own."""

import contextlib
import math

import pytest
import torch

import k2kernels
from k2kernels import _emu
from k2kernels.ops import moe
from k2kernels.ops._constants import constants
from k2kernels.ops.moe import moe_combine, moe_dispatch, moe_route
from k2kernels.reference import moe as reference
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import guarded

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SCHEDULES = [("sm_80", 0), ("sm_90a", 1), ("sm_80", 2), ("sm_90a", 3)]
CANARY = 0xAB

in_all_schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s[0]}-{s[1]}")


@contextlib.contextmanager
def kernels(schedule, launches=None):
    """The kernels in that schedule; they must have been launched, `launches` times."""
    before = k2kernels.launch_count()
    with k2kernels.emulated(schedule[0], seed=schedule[1]):
        yield
    launched = k2kernels.launch_count() - before
    assert launched == launches if launches is not None else launched > 0


def make_indices(skew, tokens, top_k, experts):
    if skew == "one hot expert":
        indices = torch.full((tokens, top_k), experts - 1)
        indices[:, :1] = torch.arange(tokens)[:, None] % experts
    elif skew == "all dropped":
        indices = torch.full((tokens, top_k), -1)
    elif skew == "some dropped":  # and some repeated
        indices = torch.randint(-1, experts, (tokens, top_k))
        indices[::3] = -1
    else:
        some = experts // 2 if skew == "first half" else experts
        indices = torch.rand(tokens, some).argsort(-1)[:, :top_k]
    return indices


def bits(x):
    return x.contiguous().view(torch.uint8)


def same(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(bits(got), bits(want))


# dispatch


def untouched(*shape, dtype):
    """Guarded memory of canaries."""
    return guarded(torch.full((math.prod(shape) * dtype.itemsize,), CANARY, dtype=torch.uint8)).view(dtype).view(shape)


def dispatch_into_canaries(x, indices, experts, alignment, capacity, quantize=False, power_of_two=False, layout="row"):
    """Data, scales and plan of the kernels, in guarded memory that held canaries."""
    hidden = x.shape[1]
    data = untouched(capacity, hidden, dtype=moe.E4M3 if quantize else x.dtype)
    scales, blocks = None, -(-hidden // 128)
    if quantize and layout == "row":
        scales = untouched(capacity, blocks, dtype=F32)
    elif quantize:
        scales = untouched(blocks, -(-capacity // 4) * 4, dtype=F32)[:, :capacity].mT
    sizes = ((indices.shape), (capacity,), (experts + 1,), (experts,))
    plan = [untouched(*size, dtype=torch.int32) for size in sizes] + [untouched(1, dtype=torch.int64)]
    moe._launch_dispatch("moe_dispatch", x, indices, experts, alignment, capacity, data, scales, power_of_two, plan)
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
    indices = make_indices(skew, tokens, top_k, experts)
    if schedule[1] % 2 == 0:
        indices = indices.int()
    capacity = -(-(indices.numel() + min(experts, indices.numel()) * (alignment - 1)) // alignment) * alignment
    check_dispatch(torch.randn(tokens, hidden).to(dtype), indices, experts, alignment, capacity, schedule)


@in_all_schedules
@pytest.mark.parametrize("tokens", [21, 420])
@pytest.mark.parametrize("capacity", [0, 8, 40, 1 << 14])
def test_dispatch_drops_what_has_no_room(capacity, tokens, schedule):
    indices = make_indices("some dropped", tokens, 5, 11)
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
    indices = make_indices("some dropped", tokens, 2, 8)
    options = dict(quantize=True, power_of_two=schedule[1] % 2 == 1, layout=layout)
    check_dispatch(x, indices, 8, 4, 2 * tokens + 26 & ~3, schedule, **options)


def test_dispatch_of_rows_that_lie_apart():
    wide, indices = torch.full((9, 48), math.nan), make_indices("uniform", 9, 2, 5)
    wide[:, 3:35] = torch.randn(9, 32)
    for x in (wide[:, 3:35], wide[:, 3:35].contiguous().mT.contiguous().mT):
        with kernels(SCHEDULES[2], 2):
            got = moe_dispatch(x, indices.mT.contiguous().mT, torch.ones(9, 2), num_experts=5)
            codes = moe_dispatch(x, indices, torch.ones(9, 2), num_experts=5, quantize=True)
        same(got.data, x[got.handle.token_of_slot.long()])
        want = k2kernels.quantize_1x128(got.data)
        same(codes.data, want[0])
        same(codes.scales, want[1])


# combine


def make_handle(tokens, experts, top_k, alignment=4, skew="some dropped", capacity=None):
    indices, weights = make_indices(skew, tokens, top_k, experts), torch.randn(tokens, top_k)
    weights[indices < 0] = math.nan  # of no consequence
    return moe_dispatch(
        torch.zeros(tokens, 1), indices, weights, num_experts=experts, alignment=alignment, capacity=capacity
    ).handle


def rows_of(handle, hidden, dtype):
    """Rows of all slots; what is padding is NaN."""
    y = torch.randn(len(handle.token_of_slot), hidden).to(dtype)
    y[handle.token_of_slot < 0] = math.nan
    return y


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
    handle = moe.Handle(*map(guarded, handle))
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
            same(moe._combine_kernel(y, slots, handle[1], weights, one, None, BF16), together[token : token + 1])


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
            same(moe._combine_kernel(wide[:, 8:48], slots, handle[1], handle.weights, apart, None, F32), want)


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


# Gradients of dispatch and combine


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
    want, _ = moe._moe_combine_backward(grad, y.nan_to_num(), *slots, weights)
    with kernels(schedule, 1):
        d_y, d_weights = moe._moe_combine_backward(*map(guarded, (grad, y, *slots, weights)))
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
    rest = slot_of, token_of_slot, torch.randn(5, 2), torch.empty_like(y), d_weights
    with kernels(schedule, 1):
        moe._launch_combine_backward("moe_combine_backward", torch.randn(5, hidden), y, *rest)
    same(d_weights, torch.zeros(5, 2))


@in_all_schedules
def test_permute(schedule):
    handle = make_handle(21, 8, 3)
    for x in (torch.randn(21, 200).bfloat16(), torch.randn(21, 520).half(), torch.randn(21, 7)):
        want = moe._moe_permute(x, *handle[:2])
        with kernels(schedule, 1):
            same(moe._moe_permute(guarded(x), *handle[:2]), want)


def test_weight_gradients_are_the_same_bits_in_any_batch_and_schedule():
    handle = make_handle(12, 8, 3, skew="uniform")
    y, grad, weights = rows_of(handle, 5000, BF16), torch.randn(12, 5000), torch.randn(12, 3)
    results = []
    for schedule in SCHEDULES:
        with kernels(schedule):
            results.append(moe._moe_combine_backward(grad, y, *handle[:2], weights)[1])
            alone = moe._moe_combine_backward(grad[7:8], y, handle.slot_of[7:8], handle[1], weights[7:8])[1]
            same(alone, results[0][7:8])
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("tokens", [11, 1100])
def test_layer_gradients(tokens):
    """Dispatch, something with the rows, combine: the gradients of both ops by kernels alone."""
    indices = make_indices("some dropped", tokens, 2, 8)
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


# route


def exact_scores(logits, score):
    return logits.double().sigmoid() if score == "sigmoid" else logits.double().softmax(-1)


def check_routing(got, logits, bias, top_k, score, normalize, scale, groups):
    """Distinct experts by descending choice, none better left out but for rounding, and their weights."""
    n_group, topk_group = groups
    tokens, experts = logits.shape
    index = got.indices.long()
    assert got.indices.dtype == torch.int32 and got.counts.dtype == torch.int64
    assert index.sort(-1).values.diff(dim=-1).gt(0).all() and ((index >= 0) & (index < experts)).all()
    assert torch.equal(got.counts, torch.bincount(index.flatten(), minlength=experts))
    scores = exact_scores(logits, score)
    choice = scores if bias is None else scores + bias.double()
    slack = 4e-7 * choice.abs().amax() if tokens else 0
    if n_group > 1:
        grouped = choice.view(tokens, n_group, -1)
        best = grouped.topk(1 if bias is None else min(2, grouped.shape[-1])).values.sum(-1)
        limit = best.topk(topk_group).values[:, -1:]
        taken_group = index // grouped.shape[-1]
        assert (best.gather(1, taken_group) >= limit - 2 * slack).all()
        choice = torch.where((best >= limit)[..., None], grouped, -torch.inf).view(tokens, experts)
    taken = choice.gather(1, index)
    want = choice.topk(top_k).values
    assert ((taken - want).abs() <= 2 * slack).all()
    weights = scores.gather(1, index)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    # exp, division, sum of K and products: an ulp or two each.
    check_close(got.weights, weights * scale, budget=(weights * scale).abs() * 1e-6 + 1e-30)


ROUTES = {  # tokens, experts, top-k, groups (all, kept), dtype
    "K2": (33, 384, 8, (1, 1), F32),
    "V3": (9, 256, 8, (8, 4), BF16),
    "K3": (5, 896, 16, (1, 1), F32),
    "largest": (3, 1024, 32, (32, 7), F16),
    "odd": (20, 37, 5, (1, 1), BF16),
    "one": (1, 6, 6, (1, 1), F32),
    "groups of one": (9, 16, 3, (16, 5), F32),
    "odd groups": (17, 66, 4, (6, 3), F32),
    "four vectors": (9, 512, 10, (1, 1), F32),
    "V2-Lite": (127, 64, 6, (1, 1), BF16),
    "all experts": (2, 896, 32, (32, 32), F32),
    "K3's next": (128, 1024, 16, (1, 1), F32),
    "more blocks than there may be": (4300, 8, 2, (1, 1), F32),
    "nothing": (0, 8, 2, (1, 1), F32),
}


@in_all_schedules
@pytest.mark.parametrize("case", ROUTES)
def test_route(case, schedule):
    tokens, experts, top_k, groups, dtype = ROUTES[case]
    score = ("sigmoid", "softmax")[schedule[1] // 2]
    bias = torch.randn(experts) * 0.3 if schedule[1] % 2 else None
    normalize, scale = schedule[1] != 2, 2.827
    logits = torch.randn(tokens, experts).to(dtype)
    if dtype != F32:  # ties are many; that they go to the lowest index is told elsewhere
        logits = (torch.rand(tokens, experts).argsort(-1) / 64 - 3).to(dtype)
    options = dict(n_group=groups[0], topk_group=groups[1], score=score, normalize=normalize, scale=scale)
    with kernels(schedule, 1):
        got = moe_route(guarded(logits), None if bias is None else guarded(bias), top_k=top_k, **options)
    check_routing(got, logits, bias, top_k, score, normalize, scale, groups)


@in_all_schedules
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_route_agrees_with_the_reference_where_it_is_tricky(score, schedule):
    nan, inf = math.nan, math.inf
    rows = [
        [nan] * 8,
        [-inf] * 8,
        [inf] * 8,
        [nan, nan, 1.0, nan, 2.0, nan, nan, 0.5],
        [nan, -inf, inf, 0.0, nan, nan, nan, nan],
        [0.0] * 8,
        [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0],
        [-200.0] * 8,
        [300.0, -300.0, 3e38, -3e38, 0.0, 1e-30, -1e-30, 88.0],
    ]
    logits = torch.tensor(rows)
    biases = [None, torch.zeros(8), torch.linspace(3, -3, 8), torch.full((8,), -7.0)]
    biases += [torch.tensor([nan, -inf, 0.0, -1.0, inf, 0.0, 0.0, 0.0]), torch.full((8,), 3e38)]
    with kernels(schedule):
        for bias in biases:
            for n_group, topk_group in ((1, 1), (2, 1), (4, 2), (8, 5)):
                options = dict(top_k=3, n_group=n_group, topk_group=topk_group, score=score, scale=2.5)
                if 8 // n_group * topk_group < 3:
                    continue
                for normalize in (True, False):
                    got = moe_route(logits, bias, normalize=normalize, **options)
                    with k2kernels.backend("reference"):
                        want = moe_route(logits, bias, normalize=normalize, **options)
                    assert got.indices.tolist() == want.indices.tolist()
                    assert torch.equal(got.counts, want.counts)
                    torch.testing.assert_close(got.weights, want.weights, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("second", [1, 4, 7])
def test_route_counts_two_equal_experts_of_a_group(second):
    """In one lane (0, 1) or in two; a group's best counted once would lose to the other group."""
    scores = torch.full((1, 16), 0.1)
    scores[0, [0, second]], scores[0, 8], scores[0, 12] = 0.9, 0.95, 0.7
    with kernels(SCHEDULES[1], 1):
        got = moe_route(scores.logit(), torch.zeros(16), top_k=2, n_group=2, topk_group=1)
    assert got.indices.tolist() == [[0, second]]


def test_route_of_a_token_does_not_depend_on_its_batch():
    logits, bias = torch.randn(20, 384), torch.randn(384) * 0.1
    with kernels(SCHEDULES[3]):
        together = moe_route(logits, bias, top_k=8, scale=2.827)
        for token in (0, 7, 19):
            alone = moe_route(logits[token : token + 1], bias, top_k=8, scale=2.827)
            assert torch.equal(alone.indices[0], together.indices[token])
            assert torch.equal(alone.weights[0], together.weights[token])


def test_route_reads_rows_that_lie_apart():
    wide = torch.full((9, 50), math.inf)
    wide[:, 1:41] = torch.randn(9, 40)
    for logits in (wide[:, 1:41], wide[:, 1:41].mT.contiguous().mT, wide[:, 1:41].bfloat16()):
        with kernels(SCHEDULES[0], 1):
            got = moe_route(logits, top_k=3)
        assert torch.equal(got.indices, moe_route(logits, top_k=3).indices)


@in_all_schedules
@pytest.mark.parametrize("case", [case for case in ROUTES if "more" not in case and case != "nothing"])
def test_route_backward(case, schedule):
    tokens, experts, top_k, _, dtype = ROUTES[case]
    score, normalize = ("sigmoid", "softmax")[schedule[1] // 2], schedule[1] % 2 == 0
    logits, grad = torch.randn(tokens, experts).to(dtype), torch.randn(tokens, top_k)
    indices = make_indices("uniform", tokens, top_k, experts).int()
    rest = indices, score, normalize, 2.5
    exact = reference.moe_route_backward(grad.double(), logits.double(), *rest)
    plain = reference.moe_route_backward(grad, logits, *rest)
    with kernels(schedule, 1):
        got = moe._moe_route_backward(*map(guarded, (grad, logits, indices)), *rest[1:])
    assert got.dtype == dtype
    check_close(got, exact, same_precision=plain)


def test_route_backward_of_bad_logits():
    logits = torch.tensor([[math.nan] * 8, [-math.inf] * 8, [math.inf] * 8, [-200.0] * 8, [math.nan, 1, 2, 3] * 2])
    indices = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [0, 3]], dtype=torch.int32)
    for score in ("sigmoid", "softmax"):
        args = torch.ones(5, 2) * torch.tensor([1.0, 2.0]), logits, indices, score, True, 2.5
        with kernels(SCHEDULES[1], 1):
            got = moe._moe_route_backward(*args)
        torch.testing.assert_close(got, moe._moe_route_backward(*args), rtol=1e-6, atol=1e-7)


# What all have in common


HALF = BF16


def moved_dispatch(**options):
    x, indices = torch.randn(20, 1024, dtype=HALF), make_indices("uniform", 20, 4, 16)
    return lambda: moe_dispatch(x, indices, torch.ones(20, 4), num_experts=16, alignment=32, **options)


def moved_combine(backward):
    handle = make_handle(20, 16, 4, skew="uniform")
    y, shared = rows_of(handle, 1024, HALF), torch.randn(20, 1024, dtype=HALF)
    if backward:
        return lambda: moe._moe_combine_backward(shared, y, *handle[:2], handle.weights)
    return lambda: moe_combine(y, handle, shared=shared)


MOVED = {  # rows of 1024 bfloat16 loaded, bytes stored; what is less than 16 bytes is not counted
    "dispatch": (moved_dispatch(), 20, 20 * 4 * 2048),
    "dispatch and quantize": (moved_dispatch(quantize=True), 20, 20 * 4 * 1024),
    "combine": (moved_combine(False), 20 * 4 + 20, 20 * 2048),
    "combine backward": (moved_combine(True), 20 * 4 + 20, None),
}


@pytest.mark.parametrize("case", MOVED)
def test_kernels_move_each_byte_once_in_vectors(case):
    call, rows, stored = MOVED[case]
    with k2kernels.emulated():
        before = _emu.counters()
        call()
        after = _emu.counters()
    if stored is None:  # every slot is written, as zeros if it is padding
        stored = len(make_handle(20, 16, 4, skew="uniform").token_of_slot) * 2048
    assert after["bytes_loaded"] - before["bytes_loaded"] == rows * 2048
    assert after["bytes_stored"] - before["bytes_stored"] == stored


def test_what_no_kernel_serves():
    call = dict(num_experts=1025)
    indices, weights = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    with k2kernels.emulated():
        with pytest.raises(k2kernels.UnsupportedError, match=r"moe_dispatch: .* up to 1024 experts"):
            moe_dispatch(torch.zeros(2, 16), indices, weights, **call)
        with pytest.raises(k2kernels.UnsupportedError, match=r"moe_route: .* up to 32 experts for a token"):
            moe_route(torch.zeros(2, 64), top_k=33)
        with pytest.raises(k2kernels.UnsupportedError, match=r"moe_route: .* up to 32 groups"):
            moe_route(torch.zeros(2, 64), top_k=3, n_group=64, topk_group=5)
        with pytest.raises(k2kernels.UnsupportedError, match=r"moe_route: .* float64"):
            moe_route(torch.zeros(2, 64, dtype=F64), top_k=3)
