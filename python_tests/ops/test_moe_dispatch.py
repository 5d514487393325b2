"""`moe_dispatch` and `moe_combine` against formulas of their own, in plain PyTorch."""

import math

import pytest
import torch

from k2kernels.ops.moe import (
    moe_combine,
    moe_dispatch,
)
from k2kernels.ops.quant import quantize_1x128
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import expert_indices

F64 = torch.float64
TOKENS = [0, 1, 2, 7, 127, 128, 129]
FAMILY = [(8, 2, 4, 2), (64, 6, 8, 3), (256, 8, 8, 4), (384, 8, 1, 1), (896, 16, 1, 1)]  # E, K, n_group, topk_group


def plan(indices, experts, alignment):
    """Slots by the book: walk the experts, then the tokens, then k."""
    slot_of = [[-1] * indices.shape[1] for _ in range(indices.shape[0])]
    rows, offsets, counts = {}, [0], []
    for e in range(experts):
        slot = offsets[-1]
        for t, k in (indices == e).nonzero().tolist():
            slot_of[t][k], rows[slot] = slot, t
            slot += 1
        counts.append(slot - offsets[-1])
        offsets.append(math.ceil(slot / alignment) * alignment)
    return slot_of, rows, offsets, counts


@pytest.mark.parametrize("skew", ["uniform", "one hot expert", "some dropped", "all dropped"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("family", FAMILY)
def test_dispatch_and_combine(family, tokens, skew):
    experts, top_k = family[:2]
    hidden, alignment = 8, {0: 1, 1: 4, 2: 16}[tokens % 3]
    indices = expert_indices(skew, tokens, top_k, experts).int()
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top_k)
    got = moe_dispatch(x, indices, weights, num_experts=experts, alignment=alignment)

    slot_of, rows, offsets, counts = plan(indices, experts, alignment)
    assert got.scales is None and got.handle.weights is weights
    assert got.handle.slot_of.tolist() == slot_of
    assert got.offsets.tolist() == got.handle.offsets.tolist() == offsets
    assert got.counts.tolist() == got.handle.counts.tolist() == counts
    capacity = got.data.shape[0]
    assert offsets[-1] <= capacity and capacity % alignment == 0
    assert got.handle.token_of_slot.tolist() == [rows.get(s, -1) for s in range(capacity)]
    assert got.handle.overflow == 0
    for slot, token in rows.items():
        assert torch.equal(got.data[slot], x[token])

    # Nothing may read pad rows: they are NaN here. The sum is bitwise that of a loop in the order of k.
    y = torch.full((capacity, hidden), math.nan)
    for slot in rows:
        y[slot] = torch.randn(hidden)
    shared, residual = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    want = torch.zeros(tokens, hidden)
    for k in range(top_k):
        for t in range(tokens):
            if slot_of[t][k] >= 0:
                want[t] += weights[t, k] * y[slot_of[t][k]]
    assert torch.equal(moe_combine(y, got.handle), want)
    assert torch.equal(moe_combine(y, got.handle, shared=shared, residual=residual), want + shared + residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_combine_rounds_once(dtype):
    tokens, experts, top_k, hidden = 40, 64, 8, 256
    indices = expert_indices("uniform", tokens, top_k, experts).int()
    x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, top_k)
    shared, residual = torch.randn(2, tokens, hidden).to(dtype)
    dispatched = moe_dispatch(x, indices, weights, num_experts=experts)
    exact = x.double() * weights.double().sum(-1, keepdim=True) + shared.double() + residual.double()
    got = moe_combine(dispatched.data, dispatched.handle, shared=shared, residual=residual)
    assert got.dtype == dtype
    # Half a unit in the last place for the one rounding, and a little for the float32 sum.
    budget = exact.abs() * torch.finfo(dtype).eps * 0.5 + 1e-5
    check_close(got, exact, budget=budget)
    precise = moe_combine(dispatched.data, dispatched.handle, out_dtype=torch.float32)
    assert precise.dtype == torch.float32
    check_close(precise, x.double() * weights.double().sum(-1, keepdim=True), budget=1e-5)


def test_combine_of_a_token_does_not_depend_on_its_batch():
    tokens, experts, top_k, hidden = 129, 64, 6, 72
    indices = expert_indices("uniform", tokens, top_k, experts).int()
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top_k)
    expert_scale = torch.randn(experts)

    def layer(rows):
        d = moe_dispatch(x[rows], indices[rows], weights[rows], num_experts=experts, alignment=8)
        expert_of_slot = torch.searchsorted(d.offsets[1:], torch.arange(d.data.shape[0]).int(), right=True)
        return moe_combine(d.data * expert_scale[expert_of_slot.clamp(max=experts - 1), None], d.handle)

    together = layer(torch.arange(tokens))
    for rows in ([0], [128], [5, 77], list(range(100, 129))):
        assert torch.equal(layer(torch.tensor(rows)), together[rows])


@pytest.mark.parametrize("alignment", [1, 4])
def test_dispatch_drops_the_highest_slots_when_full(alignment):
    tokens, experts, top_k, capacity = 32, 8, 2, 24
    indices = expert_indices("uniform", tokens, top_k, experts).int()
    x, weights = torch.randn(tokens, 8), torch.rand(tokens, top_k)
    call = dict(num_experts=experts, alignment=alignment)
    full = moe_dispatch(x, indices, weights, **call)
    got = moe_dispatch(x, indices, weights, capacity=capacity, **call)
    kept = (full.handle.slot_of >= 0) & (full.handle.slot_of < capacity)
    assert got.data.shape[0] == capacity
    assert torch.equal(got.handle.slot_of, torch.where(kept, full.handle.slot_of, -1))
    assert torch.equal(got.handle.token_of_slot, full.handle.token_of_slot[:capacity])
    assert got.handle.overflow == (~kept).sum() > 0
    assert torch.equal(got.offsets, full.offsets.clamp(max=capacity))
    assert got.counts.sum() == kept.sum() and (got.offsets[:-1] + got.counts <= got.offsets[1:]).all()
    assert torch.equal(moe_combine(got.data, got.handle)[~kept.any(-1)], torch.zeros(int((~kept.any(-1)).sum()), 8))


def test_dispatch_without_capacity():
    got = moe_dispatch(torch.randn(3, 4), torch.tensor([[0], [1], [-1]]), torch.rand(3, 1), num_experts=2, capacity=0)
    assert got.data.shape == (0, 4) and got.handle.overflow == 2
    assert torch.equal(moe_combine(got.data, got.handle), torch.zeros(3, 4))


def test_dispatch_of_an_expert_twice_in_a_row():
    x, weights = torch.randn(2, 4), torch.tensor([[0.25, 0.5], [1.0, 2.0]])
    got = moe_dispatch(x, torch.tensor([[1, 1], [1, 0]]), weights, num_experts=2)
    assert got.handle.slot_of.tolist() == [[1, 2], [3, 0]] and got.counts.tolist() == [1, 3]
    assert torch.equal(moe_combine(got.data, got.handle), x * torch.tensor([[0.75], [3.0]]))


def test_capacity_always_suffices():
    for tokens, top_k, experts, alignment in ((1, 8, 384, 128), (7, 2, 3, 5), (128, 2, 8, 64)):
        for skew in ("uniform", "one hot expert"):
            indices = expert_indices(skew, tokens, min(top_k, experts), experts).int()
            weights = torch.ones(indices.shape)
            got = moe_dispatch(torch.zeros(tokens, 1), indices, weights, num_experts=experts, alignment=alignment)
            assert got.handle.overflow == 0 and (got.handle.slot_of >= 0).all()
    # One row for each of 8 experts takes 8 aligned blocks: the bound is tight for few tokens.
    one = moe_dispatch(torch.zeros(1, 1), torch.arange(8)[None] * 40, torch.ones(1, 8), num_experts=384, alignment=128)
    assert one.data.shape[0] == one.offsets[-1] == 8 * 128


@pytest.mark.parametrize("alignment", [1, 4])
def test_dispatch_and_combine_gradient(alignment):
    tokens, experts, top_k, hidden = 6, 5, 3, 4
    indices = expert_indices("some dropped", tokens, top_k, experts).int()
    x, shared, residual = (torch.randn(tokens, hidden, dtype=F64, requires_grad=True) for _ in range(3))
    weights = torch.rand(tokens, top_k, dtype=F64, requires_grad=True)

    def layer(x, weights, shared, residual):
        d = moe_dispatch(x, indices, weights, num_experts=experts, alignment=alignment)
        return moe_combine(d.data.square(), d.handle, shared=shared, residual=residual)

    assert torch.autograd.gradcheck(layer, (x, weights, shared, residual))


def test_combine_gradient_ignores_pad_rows():
    indices = torch.tensor([[0, 2], [2, -1]])
    d = moe_dispatch(torch.randn(2, 4), indices, torch.rand(2, 2).requires_grad_(), num_experts=3, alignment=4)
    pad = d.handle.token_of_slot < 0
    y = d.data.masked_fill(pad[:, None], math.nan).requires_grad_()
    moe_combine(y, d.handle).sum().backward()
    assert y.grad[~pad].isfinite().all() and (y.grad[pad] == 0).all()
    want = y.detach()[d.handle.slot_of.long()].sum(-1).masked_fill(indices < 0, 0)
    torch.testing.assert_close(d.handle.weights.grad, want)


def test_combine_gradient_in_bfloat16():
    tokens, experts, top_k, hidden = 16, 8, 2, 64
    indices = expert_indices("uniform", tokens, top_k, experts).int()
    weights = torch.rand(tokens, top_k, requires_grad=True)
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    shared = torch.randn(tokens, hidden, requires_grad=True)
    d = moe_dispatch(x, indices, weights, num_experts=experts)
    out = moe_combine(d.data, d.handle, shared=shared)
    grad = torch.randn(tokens, hidden).bfloat16()
    out.backward(grad)
    assert x.grad.dtype == torch.bfloat16 and shared.grad.dtype == torch.float32
    assert torch.equal(shared.grad, grad.float())
    exact = grad.double() * weights.detach().double().sum(-1, keepdim=True)
    check_close(
        x.grad, exact, budget=exact.abs() * 2**-8 + (weights.detach().double() * 2**-8).sum(-1, keepdim=True) * 4
    )
    want = (grad.double() * x.detach().double()).sum(-1, keepdim=True).expand(-1, top_k)
    check_close(weights.grad, want, budget=1e-4)


def test_dispatch_bad_arguments():
    x, indices, weights = torch.randn(3, 4), torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
    for bad in (-2, 5):
        indices[2, 1] = bad
        with pytest.raises(ValueError, match=rf"moe_dispatch: indices must be from -1 .none. to E-1=4, got {bad}"):
            moe_dispatch(x, indices, weights, num_experts=5)
    indices[2, 1] = 4
    with pytest.raises(ValueError, match=r"moe_dispatch: weights must be \[T=3, K=2\] .*, got \[3, 1\] float32"):
        moe_dispatch(x, indices, weights[:, :1], num_experts=5)
    with pytest.raises(
        TypeError, match=r"moe_dispatch: indices must be \[T=3, K\] int32 or int64, got \[3, 2\] float32"
    ):
        moe_dispatch(x, weights, weights, num_experts=5)
    with pytest.raises(ValueError, match=r"moe_dispatch: capacity must be a multiple of alignment=8, got 12"):
        moe_dispatch(x, indices, weights, num_experts=5, alignment=8, capacity=12)
    with pytest.raises(ValueError, match=r"moe_dispatch: alignment must be an int >= 1, got 0"):
        moe_dispatch(x, indices, weights, num_experts=5, alignment=0)
    dispatched = moe_dispatch(x, indices, weights, num_experts=5)
    with pytest.raises(ValueError, match=r"moe_combine: y must be \[S=6, H\] .*, got \[5, 4\] float32"):
        moe_combine(dispatched.data[:5], dispatched.handle)
    with pytest.raises(ValueError, match=r"moe_combine: shared must be \[T=3, H=4\] .*, got \[3, 5\] float32"):
        moe_combine(dispatched.data, dispatched.handle, shared=torch.randn(3, 5))
    with pytest.raises(TypeError, match=r"moe_combine: handle must be the handle of moe_dispatch, got Dispatched"):
        moe_combine(dispatched.data, dispatched)
    with pytest.raises(ValueError, match=r"moe_combine: out_dtype must be one of .*, got torch.int64"):
        moe_combine(dispatched.data, dispatched.handle, out_dtype=torch.int64)


@pytest.mark.parametrize("field", ["slot_of", "token_of_slot", "weights"])
def test_a_forged_handle_is_refused(field):
    indices = torch.tensor([[0, 1], [2, 0], [1, 2]])
    dispatched = moe_dispatch(torch.randn(3, 4), indices, torch.rand(3, 2), num_experts=3)
    good = getattr(dispatched.handle, field)
    wrong = [None, [1, 2], good.tolist(), good[None], good.to(torch.int16), good.to_sparse()]
    if field != "weights":
        wrong += [good + 1000, good - 1000, good.float()]
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=rf"^moe_combine: handle.{field} must be .*got "):
            moe_combine(dispatched.data, dispatched.handle._replace(**{field: value}))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("scale_layout", ["row", "column"])
def test_quantised_dispatch_moves_the_codes_of_each_row(power_of_two, scale_layout):
    tokens, experts, top_k, hidden = 13, 8, 3, 320  # the last group has 64 elements
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16) * torch.logspace(-3, 3, tokens)[:, None]
    x[2, 5] = math.nan
    indices, weights = expert_indices("some dropped", tokens, top_k, experts).int(), torch.rand(tokens, top_k)
    got = moe_dispatch(
        x,
        indices,
        weights,
        num_experts=experts,
        alignment=4,
        quantize=True,
        power_of_two=power_of_two,
        scale_layout=scale_layout,
    )
    plain = moe_dispatch(x, indices, weights, num_experts=experts, alignment=4)
    assert all(torch.equal(a, b) for a, b in zip(got.handle, plain.handle))
    real = got.handle.token_of_slot >= 0
    data, scales = quantize_1x128(plain.data[real], power_of_two=power_of_two)
    assert torch.equal(got.data.view(torch.uint8)[real], data.view(torch.uint8))
    assert torch.equal(got.scales[real], scales)
    slots = got.data.shape[0]
    assert got.scales.shape == (slots, 3)
    assert got.scales.stride() == ((3, 1) if scale_layout == "row" else (1, -(-slots // 4) * 4))


def test_handle_crosses_compiled_regions():
    dispatch = torch.compile(lambda x, i, w: moe_dispatch(x, i, w, num_experts=8), fullgraph=True, backend="aot_eager")
    combine = torch.compile(moe_combine, fullgraph=True, backend="aot_eager")
    x, indices, weights = torch.randn(6, 4), expert_indices("some dropped", 6, 2, 8).int(), torch.rand(6, 2)
    dispatched = dispatch(x, indices, weights)
    got = combine(dispatched.data, dispatched.handle)
    assert torch.equal(got, moe_combine(dispatched.data, dispatched.handle))
