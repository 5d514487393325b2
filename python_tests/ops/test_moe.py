import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from k2kernels.ops import moe
from k2kernels.ops.moe import (
    Routing,
    moe_combine,
    moe_dispatch,
    moe_mlp,
    moe_route,
    moe_sequence_loss,
    moe_update_bias,
)
from k2kernels.ops.quant import dequantize, quantize_1x128, quantize_128x128
from k2kernels.testing.compare import check_close, check_op

F64 = torch.float64
TOKENS = [0, 1, 2, 7, 127, 128, 129]
FAMILY = [(8, 2, 4, 2), (64, 6, 8, 3), (256, 8, 8, 4), (384, 8, 1, 1), (896, 16, 1, 1)]  # E, K, n_group, topk_group


# moe_route


def route_row(scores, bias, top_k, n_group, topk_group):
    """The experts of one token, by sorting a Python list."""
    choice = (scores if bias is None else scores + bias).tolist()
    size = len(choice) // n_group
    groups = [range(g * size, (g + 1) * size) for g in range(n_group)]
    quality = []
    for group in groups:
        best = sorted((choice[e] for e in group), reverse=True)
        quality.append(best[0] if bias is None else sum(best[:2]))
    kept = sorted(range(n_group), key=lambda g: (-quality[g], g))[:topk_group]
    return sorted((e for g in kept for e in groups[g]), key=lambda e: (-choice[e], e))[:top_k]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_route_takes_the_best_experts(family, tokens, score):
    experts, top_k, n_group, topk_group = family
    logits = torch.randn(tokens, experts, dtype=F64)
    scores = logits.sigmoid() if score == "sigmoid" else logits.exp() / logits.exp().sum(-1, keepdim=True)
    for bias in (None, torch.randn(experts, dtype=F64)):
        want = [route_row(row, bias, top_k, n_group, topk_group) for row in scores]
        got = moe_route(
            logits, bias, top_k=top_k, n_group=n_group, topk_group=topk_group, score=score, normalize=True, scale=2.827
        )
        assert got.indices.dtype == torch.int32 and got.counts.dtype == torch.int64
        assert got.indices.tolist() == want
        taken = scores.gather(1, got.indices.long())
        check_close(got.weights, taken / taken.sum(-1, keepdim=True) * 2.827, budget=1e-12)
        assert got.counts.tolist() == [sum(row.count(e) for row in want) for e in range(experts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_route_weights_in_float32(dtype, score):
    logits = torch.randn(33, 64).to(dtype)
    got = moe_route(logits, top_k=6, normalize=False, scale=2.5, score=score)
    assert got.weights.dtype == torch.float32
    exact = logits.double().sigmoid() if score == "sigmoid" else logits.double().softmax(-1)
    plain = logits.float().sigmoid() if score == "sigmoid" else logits.float().softmax(-1)
    index = got.indices.long()
    check_close(got.weights, 2.5 * exact.gather(1, index), same_precision=2.5 * plain.gather(1, index))


def test_route_agrees_with_transformers():
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    for n_group, topk_group, normalize in itertools.product((1, 4), (1, 2), (True, False)):
        if topk_group > n_group:
            continue
        config = DeepseekV3Config(
            hidden_size=32,
            n_routed_experts=32,
            num_experts_per_tok=6,
            n_group=n_group,
            topk_group=topk_group,
            norm_topk_prob=normalize,
            routed_scaling_factor=2.827,
        )
        router = deepseek.DeepseekV3TopkRouter(config)
        torch.nn.init.normal_(router.weight)
        router.e_score_correction_bias.normal_()
        logits, weights, indices = router(torch.randn(50, 32))
        got = moe_route(
            logits,
            router.e_score_correction_bias,
            top_k=6,
            n_group=n_group,
            topk_group=topk_group,
            normalize=normalize,
            scale=2.827,
        )
        want_order, got_order = indices.argsort(-1), got.indices.argsort(-1)
        assert torch.equal(got.indices.gather(1, got_order).long(), indices.gather(1, want_order))
        torch.testing.assert_close(got.weights.gather(1, got_order), weights.gather(1, want_order))


def test_route_ties_go_to_the_lowest_index():
    assert moe_route(torch.zeros(3, 384), top_k=8).indices.tolist() == [list(range(8))] * 3
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0]])
    assert moe_route(logits, top_k=5).indices.tolist() == [[1, 2, 4, 0, 3]]
    # Equal groups too: the first two of four.
    got = moe_route(torch.zeros(1, 8), torch.zeros(8), top_k=3, n_group=4, topk_group=2)
    assert got.indices.tolist() == [[0, 1, 2]]


def test_route_group_score_is_the_top_two_sum_only_with_a_bias():
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.6]])
    call = dict(top_k=1, n_group=2, topk_group=1)
    assert moe_route(scores.logit(), **call).indices.item() == 0
    assert moe_route(scores.logit(), torch.zeros(4), **call).indices.item() == 2


def test_route_bias_steers_the_choice_and_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    got = moe_route(logits, torch.tensor([-7.0, -8.0, -6.0, -9.0]), top_k=2, normalize=False)
    assert got.indices.tolist() == [[2, 0]]  # every s + b is below -1
    assert torch.equal(got.weights, logits.sigmoid()[:, [2, 0]])


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("bias", [None, torch.linspace(3, -3, 8)])
def test_route_survives_nan_and_infinities(score, bias):
    nan, inf = math.nan, math.inf
    logits = torch.tensor(
        [
            [nan] * 8,
            [-inf] * 8,
            [inf] * 8,
            [nan, nan, 1.0, nan, 2.0, nan, nan, 0.5],
            [nan, -inf, inf, 0.0, nan, nan, nan, nan],
        ],
        requires_grad=True,
    )
    for n_group, topk_group in ((1, 1), (2, 1)):
        got = moe_route(logits, bias, top_k=3, score=score, n_group=n_group, topk_group=topk_group)
        assert all(len(set(row)) == 3 and min(row) >= 0 and max(row) < 8 for row in got.indices.tolist())
        assert got.weights.isfinite().all()
        assert got.indices[:2].tolist() == [[0, 1, 2]] * 2 and (got.weights[:2] == 0).all()
        assert (got.weights[2] == got.weights[2, 0]).all() and got.weights[2, 0] > 0.3  # +inf is a large number
        if n_group == 1:
            assert sorted(got.indices[3].tolist()) == [2, 4, 7]  # a bad expert only when no other is left
            assert sorted(got.indices[4].tolist()[:2]) == [2, 3]
            assert got.weights[4].max() > 0.6
        (grad,) = torch.autograd.grad(got.weights.square().sum(), logits)
        assert grad.isfinite().all() and (grad[:2] == 0).all()


def test_route_of_nothing_but_nan_keeps_as_many_groups():
    got = moe_route(torch.full((2, 8), math.nan), torch.zeros(8), top_k=4, n_group=4, topk_group=2)
    assert got.indices.tolist() == [[0, 1, 2, 3]] * 2


def test_route_survives_a_bad_bias():
    bias = torch.tensor([math.nan, -math.inf, 0.0, -1.0, math.inf, 0.0, 0.0, 0.0])
    got = moe_route(torch.zeros(1, 8), bias, top_k=7)
    assert got.indices.tolist() == [[4, 2, 5, 6, 7, 3, 0]]
    assert got.weights.isfinite().all()
    got = moe_route(torch.zeros(1, 8), bias, top_k=4, n_group=2, topk_group=1)
    assert got.indices.tolist() == [[4, 5, 6, 7]]


def test_route_of_vanishing_scores_is_zero_not_nan():
    logits = torch.full((2, 8), -200.0, requires_grad=True)  # every sigmoid underflows
    got = moe_route(logits, top_k=2)
    assert (got.weights == 0).all()
    got.weights.sum().backward()
    assert (logits.grad == 0).all()
    assert moe_route(torch.full((1, 8), -60.0), top_k=2).weights.isfinite().all()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [True, False])
def test_route_gradient(score, normalize):
    logits = torch.randn(5, 8, dtype=F64, requires_grad=True)
    bias = torch.randn(8)

    def weights(logits):
        call = dict(top_k=3, n_group=4, topk_group=2, score=score, normalize=normalize, scale=2.5)
        return moe_route(logits, bias, **call).weights

    assert torch.autograd.gradcheck(weights, logits)


def test_route_gives_the_bias_no_gradient():
    logits, bias = torch.randn(3, 8, requires_grad=True), torch.zeros(8, requires_grad=True)
    moe_route(logits, bias, top_k=2, normalize=False).weights.sum().backward()
    assert logits.grad.abs().sum() > 0 and bias.grad is None


def test_route_of_a_token_does_not_depend_on_its_batch():
    logits, bias = torch.randn(129, 384), torch.randn(384) * 0.1
    together = moe_route(logits, bias, top_k=8, scale=2.827)
    for token in (0, 1, 64, 128):
        alone = moe_route(logits[token : token + 1], bias, top_k=8, scale=2.827)
        assert torch.equal(alone.indices[0], together.indices[token])
        assert torch.equal(alone.weights[0], together.weights[token])


def test_route_bad_arguments():
    logits = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"moe_route: top_k must be from 1 to E=8, got 9"):
        moe_route(logits, top_k=9)
    with pytest.raises(ValueError, match=r"moe_route: n_group must be a divisor of E=8, got 3"):
        moe_route(logits, top_k=2, n_group=3)
    with pytest.raises(ValueError, match=r"moe_route: topk_group must be from 1 to n_group=4, got 5"):
        moe_route(logits, top_k=2, n_group=4, topk_group=5)
    with pytest.raises(ValueError, match=r"top_k must be at most the 2 experts of the kept groups, got 3; raise topk_"):
        moe_route(logits, top_k=3, n_group=4, topk_group=1)
    with pytest.raises(ValueError, match=r"moe_route: bias must be \[E=8\] .*, got \[7\] float32"):
        moe_route(logits, torch.zeros(7), top_k=2)
    with pytest.raises(TypeError, match=r"bias must be .*, got \[8\] bfloat16; keep the bias in float32"):
        moe_route(logits, torch.zeros(8, dtype=torch.bfloat16), top_k=2)
    with pytest.raises(ValueError, match=r"score must be one of 'sigmoid', 'softmax', got 'tanh'"):
        moe_route(logits, top_k=2, score="tanh")
    with pytest.raises(TypeError, match=r"moe_route: logits must be \[T, E\] float32 or .*, got \[3, 8\] int64"):
        moe_route(logits.long(), top_k=2)


# moe_sequence_loss


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_sequence_loss_formula(score):
    experts, top_k, alpha, ends = 6, 2, 0.3, [0, 4, 4, 7, 11]
    logits = torch.randn(11, experts, dtype=F64)
    indices = torch.randint(-1, experts, (11, top_k), dtype=torch.int32)
    losses = []
    for start, end in ((0, 4), (4, 7), (7, 11)):
        length, loss = end - start, 0.0
        for e in range(experts):
            f = experts / (top_k * length) * int((indices[start:end] == e).sum())
            scores = logits[start:end].sigmoid() if score == "sigmoid" else logits[start:end].exp()
            loss += f * sum(float(row[e] / row.sum()) for row in scores) / length
        losses.append(alpha * loss)
    got = moe_sequence_loss(logits, indices, top_k=top_k, alpha=alpha, cu_seqlens=torch.tensor(ends), score=score)
    assert got.item() == pytest.approx(sum(losses) / 3, rel=1e-12)
    whole = moe_sequence_loss(logits[:4], indices[:4], top_k=top_k, alpha=alpha, score=score)
    assert whole.item() == pytest.approx(losses[0], rel=1e-12)


def test_sequence_loss_of_balanced_routing_is_alpha():
    indices = torch.arange(16).reshape(8, 2) % 4
    got = moe_sequence_loss(torch.zeros(8, 4), indices, top_k=2, alpha=0.001)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(0.001, rel=1e-6)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 2, 2, 7], dtype=torch.int32)])
def test_sequence_loss_gradient(score, cu_seqlens):
    logits = torch.randn(7, 8, dtype=F64, requires_grad=True)
    indices = moe_route(logits, top_k=3, score=score).indices
    loss = lambda x: moe_sequence_loss(x, indices, top_k=3, alpha=0.5, cu_seqlens=cu_seqlens, score=score)  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits)


def test_sequence_loss_edges():
    none = torch.zeros(0, 8, requires_grad=True)
    empty = moe_sequence_loss(none, torch.zeros(0, 2, dtype=torch.int32), top_k=2, alpha=1.0)
    empty.backward()
    assert empty.item() == 0 and none.grad.shape == (0, 8)
    logits = torch.full((2, 8), math.nan, requires_grad=True)
    got = moe_sequence_loss(logits, torch.tensor([[0, 1], [0, 2]]), top_k=2, alpha=1.0)
    got.backward()
    assert got.item() == 0 and (logits.grad == 0).all()


def test_sequence_loss_bad_arguments():
    logits, indices = torch.zeros(4, 8), torch.zeros(4, 2, dtype=torch.int32)
    for ends in ([0, 3], [1, 4], [0, 3, 2, 4]):
        with pytest.raises(ValueError, match=r"moe_sequence_loss: cu_seqlens must rise from 0 to 4 .*, got \[\d"):
            moe_sequence_loss(logits, indices, top_k=2, alpha=1.0, cu_seqlens=torch.tensor(ends))
    with pytest.raises(ValueError, match=r"top_k must be the width of indices, 2, got 3"):
        moe_sequence_loss(logits, indices, top_k=3, alpha=1.0)
    with pytest.raises(ValueError, match=r"moe_sequence_loss: indices must be from -1 .none. to E-1=7, got 8"):
        moe_sequence_loss(logits, indices + 8, top_k=2, alpha=1.0)


# moe_update_bias


def test_update_bias_by_sign():
    bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
    counts = torch.tensor([1, 3, 9, 3])  # mean 4
    got = moe_update_bias(bias, counts, rate=0.25)
    assert got.tolist() == [0.75, 0.25, -0.75, 0.25]
    assert bias.tolist() == [0.5, 0.0, -0.5, 0.0]  # not in place
    assert moe_update_bias(bias, torch.full((4,), 7), rate=0.25).tolist() == bias.tolist()


def test_update_bias_by_rank():
    counts = torch.tensor([5, 5, 1, 90, 7], dtype=torch.int32)
    got = moe_update_bias(torch.zeros(5), counts, rate=1.0, mode="quantile")
    assert got.tolist() == [0.25, 0.25, 1.0, -1.0, -0.5]
    assert moe_update_bias(torch.ones(3), torch.full((3,), 7), rate=1.0, mode="quantile").tolist() == [1.0] * 3
    assert moe_update_bias(torch.ones(1), torch.tensor([7]), rate=1.0, mode="quantile").tolist() == [1.0]


@pytest.mark.parametrize("mode", ["sign", "quantile"])
def test_update_bias_counts_are_exact(mode):
    base = 2**40  # float32 holds no odd number above 2**24, float64 none above 2**53
    counts = torch.tensor([base + 1, base, base - 1])
    assert counts.float().unique().numel() == 1
    assert moe_update_bias(torch.zeros(3), counts, rate=1.0, mode=mode).tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("mode", ["sign", "quantile"])
def test_update_bias_balances_the_load(mode):
    experts, top_k = 16, 2
    skew = torch.linspace(-1.5, 1.5, experts)
    bias = torch.zeros(experts)
    imbalance = []
    for step in range(300):
        counts = moe_route(torch.randn(512, experts) + skew, bias, top_k=top_k).counts
        bias = moe_update_bias(bias, counts, rate=0.02 if step < 150 else 0.002, mode=mode)
        imbalance.append(float(counts.max() / counts.double().mean()))
    assert imbalance[0] > 2.5
    assert sum(imbalance[-20:]) / 20 < 1.3  # sampling noise alone gives about 1.2
    if mode == "quantile":
        assert abs(bias.sum()) < 1e-3


def test_update_bias_bad_arguments():
    with pytest.raises(
        TypeError, match=r"moe_update_bias: counts must be .* int64, got \[4\] float32; count in integers"
    ):
        moe_update_bias(torch.zeros(4), torch.zeros(4), rate=0.1)
    with pytest.raises(TypeError, match=r"bias must be \[E\] float32, got \[4\] bfloat16; keep the bias in float32"):
        moe_update_bias(torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64), rate=0.1)
    with pytest.raises(ValueError, match=r"mode must be one of 'sign', 'quantile', got 'median'"):
        moe_update_bias(torch.zeros(4), torch.zeros(4, dtype=torch.int64), rate=0.1, mode="median")


# moe_dispatch and moe_combine


def make_indices(skew, tokens, top_k, experts):
    if skew == "one hot expert":  # every token, plus one spread pair
        indices = torch.full((tokens, top_k), experts - 1)
        indices[:, 0] = torch.arange(tokens) % experts
    elif skew == "some dropped":
        indices = torch.randint(-1, experts, (tokens, top_k))
        indices[::3] = -1
    elif skew == "all dropped":
        indices = torch.full((tokens, top_k), -1)
    else:
        indices = torch.rand(tokens, experts).argsort(-1)[:, :top_k]
    return indices.int()


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
    indices = make_indices(skew, tokens, top_k, experts)
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
    indices = make_indices("uniform", tokens, top_k, experts)
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
    indices = make_indices("uniform", tokens, top_k, experts)
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
    indices = make_indices("uniform", tokens, top_k, experts)
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
            indices = make_indices(skew, tokens, min(top_k, experts), experts)
            weights = torch.ones(indices.shape)
            got = moe_dispatch(torch.zeros(tokens, 1), indices, weights, num_experts=experts, alignment=alignment)
            assert got.handle.overflow == 0 and (got.handle.slot_of >= 0).all()
    # One row for each of 8 experts takes 8 aligned blocks: the bound is tight for few tokens.
    one = moe_dispatch(torch.zeros(1, 1), torch.arange(8)[None] * 40, torch.ones(1, 8), num_experts=384, alignment=128)
    assert one.data.shape[0] == one.offsets[-1] == 8 * 128


@pytest.mark.parametrize("alignment", [1, 4])
def test_dispatch_and_combine_gradient(alignment):
    tokens, experts, top_k, hidden = 6, 5, 3, 4
    indices = make_indices("some dropped", tokens, top_k, experts)
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
    indices = make_indices("uniform", tokens, top_k, experts)
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


# The grouped GEMM


def test_grouped_gemm_neither_reads_nor_spreads_pad_rows():
    offsets, counts = torch.tensor([0, 4, 4, 12], dtype=torch.int32), torch.tensor([3, 0, 5], dtype=torch.int32)
    real = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8])
    a, grad = torch.full((14, 6), math.nan), torch.full((14, 5), math.nan)
    a[real], grad[real] = torch.randn(8, 6), torch.randn(8, 5)
    b = torch.randn(3, 5, 6)
    rows = [slice(0, 3), slice(4, 4), slice(4, 9)]
    pad = [r for r in range(14) if r not in real]

    out = moe._grouped_gemm(a, b, offsets, counts)
    d_a = moe._grouped_gemm_dgrad(grad, b, offsets, counts)
    d_b = moe._grouped_gemm_wgrad(grad, a, offsets, counts)
    for g, r in enumerate(rows):
        torch.testing.assert_close(out[r], a[r] @ b[g].T)
        torch.testing.assert_close(d_a[r], grad[r] @ b[g])
        torch.testing.assert_close(d_b[g], grad[r].T @ a[r])
    assert (out[pad] == 0).all() and (d_a[pad] == 0).all() and (d_b[1] == 0).all()


# moe_mlp


def dense_mlp(x, indices, weights, gate_up, down):
    """Every expert on every token, then a weighted sum."""
    one_hot = F.one_hot(indices.long() + 1, gate_up.shape[0] + 1)[..., 1:].to(x.dtype)  # [T, K, E]
    expert_weights = (weights[..., None] * one_hot).sum(1)
    gate, up = torch.einsum("th,eih->tei", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("tei,ehi,te->th", F.silu(gate) * up, down, expert_weights)


def make_mlp(tokens, experts, hidden, intermediate, dtype=F64):
    x = torch.randn(tokens, hidden, dtype=dtype)
    gate_up = torch.randn(experts, 2 * intermediate, hidden, dtype=dtype) * hidden**-0.5
    down = torch.randn(experts, hidden, intermediate, dtype=dtype) * intermediate**-0.5
    return x, gate_up, down


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("family", [(8, 2), (64, 6), (384, 8)])
def test_mlp_equals_dense_experts_with_gradients(family, tokens):
    experts, top_k = family
    x, gate_up, down = make_mlp(tokens, experts, 16, 8)
    logits, bias = torch.randn(tokens, experts, dtype=F64), torch.randn(experts) * 0.1
    shared, residual = torch.randn(2, tokens, 16, dtype=F64)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, logits, shared, residual)]
    routing = moe_route(logits, bias, top_k=top_k, scale=2.827)
    got = moe_mlp(x, routing, gate_up, down, shared=shared, residual=residual, alignment=4)

    taken = logits.sigmoid().gather(1, routing.indices.long())
    weights = taken / taken.sum(-1, keepdim=True) * 2.827
    want = dense_mlp(x, routing.indices, weights, gate_up, down) + shared + residual
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(want)
    got_grads = torch.autograd.grad(got, leaves, grad)
    want_grads = torch.autograd.grad(want, leaves, grad)
    for g, w in zip(got_grads, want_grads):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)
    if tokens > 1:
        assert got_grads[3].abs().max() > 1e-6  # the router learns


@pytest.mark.parametrize("skew", ["one hot expert", "some dropped", "all dropped"])
def test_mlp_of_skewed_routing(skew):
    x, gate_up, down = make_mlp(33, 8, 16, 8)
    indices, weights = make_indices(skew, 33, 2, 8), torch.rand(33, 2, dtype=F64)
    got = moe_mlp(x, Routing(indices, weights, None), gate_up, down)
    torch.testing.assert_close(got, dense_mlp(x, indices, weights, gate_up, down), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp_precision(dtype):
    x, gate_up, down = make_mlp(64, 8, 64, 32, dtype)
    routing = moe_route(torch.randn(64, 8), top_k=2)
    got = moe_mlp(x, routing, gate_up, down)
    assert got.dtype == dtype
    exact = dense_mlp(*(t.double() for t in (x, routing.indices, routing.weights, gate_up, down)))
    plain = dense_mlp(x, routing.indices, routing.weights.to(dtype), gate_up, down)
    check_close(got, exact, same_precision=plain, max_cos_diff=1e-4)


def test_mlp_gradcheck():
    x, gate_up, down = make_mlp(5, 4, 3, 2)
    indices, weights = make_indices("some dropped", 5, 2, 4), torch.rand(5, 2, dtype=F64)
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]

    def layer(x, weights, gate_up, down):
        return moe_mlp(x, Routing(indices, weights, None), gate_up, down, residual=x, alignment=2)

    assert torch.autograd.gradcheck(layer, leaves)


def test_mlp_recomputed_or_repeated_is_bitwise_the_same():
    x, gate_up, down = make_mlp(100, 8, 32, 16, torch.float32)
    logits = torch.randn(100, 8)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, logits)]

    def layer(x, gate_up, down, logits):
        return moe_mlp(x, moe_route(logits, top_k=2), gate_up, down)

    results = []
    for run in (layer, layer, lambda *a: checkpoint(layer, *a, use_reentrant=False)):
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_mlp_refuses_a_second_backward():
    x, gate_up, down = make_mlp(4, 4, 4, 4)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(moe_mlp(x, moe_route(x, top_k=2), gate_up, down).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="this op has no backward"):
        grad.sum().backward()


def test_mlp_bad_arguments():
    x, gate_up, down = make_mlp(4, 4, 6, 3)
    routing = moe_route(torch.randn(4, 4), top_k=2)
    with pytest.raises(TypeError, match=r"moe_mlp: gate_up must be \[E, 2I, H=6\] float64, got .* float32"):
        moe_mlp(x, routing, gate_up.float(), down)
    with pytest.raises(ValueError, match=r"moe_mlp: down must be \[E=4, H=6, I=3\] float64, got \[4, 3, 6\] float64"):
        moe_mlp(x, routing, gate_up, down.mT)
    with pytest.raises(ValueError, match=r"moe_mlp: gate_up must be even in its middle axis, got \[4, 5, 6\]"):
        moe_mlp(x, routing, gate_up[:, :5], down)


# FP8


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("scale_layout", ["row", "column"])
def test_quantised_dispatch_moves_the_codes_of_each_row(power_of_two, scale_layout):
    tokens, experts, top_k, hidden = 13, 8, 3, 320  # the last group has 64 elements
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16) * torch.logspace(-3, 3, tokens)[:, None]
    x[2, 5] = math.nan
    indices, weights = make_indices("some dropped", tokens, top_k, experts), torch.rand(tokens, top_k)
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


def make_fp8_mlp(tokens, experts, hidden, intermediate, dtype):
    x, gate_up, down = make_mlp(tokens, experts, hidden, intermediate, torch.float32)
    return x.to(dtype), quantize_128x128(gate_up), quantize_128x128(down)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("alignment", [1, 16])
def test_fp8_mlp_of_the_quantised_operands(power_of_two, alignment):
    tokens, experts, top_k = 21, 4, 2
    x, gate_up, down = make_fp8_mlp(tokens, experts, 192, 96, torch.float32)
    indices, weights = make_indices("some dropped", tokens, top_k, experts), torch.rand(tokens, top_k)
    routing = Routing(indices, weights, None)
    shared = torch.randn(tokens, 192)
    got = moe_mlp(x, routing, gate_up, down, shared=shared, power_of_two=power_of_two, alignment=alignment)

    def rounded(t):  # to what the codes and scales hold
        return dequantize(*quantize_1x128(t.float(), power_of_two=power_of_two), dtype=F64)

    w_up, w_down = (dequantize(*w, block=(128, 128), dtype=F64) for w in (gate_up, down))
    want = shared.double()
    for t, k in itertools.product(range(tokens), range(top_k)):
        if (e := indices[t, k]) >= 0:
            gate, up = (rounded(x[t : t + 1]) @ w_up[e].T).chunk(2, dim=-1)
            want[t] += weights[t, k] * (rounded(F.silu(gate) * up) @ w_down[e].T)[0]
    check_close(got, want, budget=2e-5)


def test_fp8_mlp_is_near_the_unquantised_one():
    x, gate_up, down = make_fp8_mlp(64, 8, 256, 128, torch.bfloat16)
    routing = moe_route(torch.randn(64, 8), top_k=2)
    got = moe_mlp(x, routing, gate_up, down)
    assert got.dtype == torch.bfloat16
    w_up, w_down = (dequantize(*w, block=(128, 128), dtype=F64) for w in (gate_up, down))
    want = dense_mlp(x.double(), routing.indices, routing.weights.double(), w_up, w_down)
    # Two quantisations of about 2.6e-2 relative error each.
    assert (got.double() - want).norm() / want.norm() < 0.05


def test_fp8_mlp_gradient_flows_to_the_routing_weights_only():
    x, gate_up, down = make_fp8_mlp(8, 4, 128, 64, torch.float32)
    logits = torch.randn(8, 4, requires_grad=True)
    moe_mlp(x, moe_route(logits, top_k=2), gate_up, down).square().sum().backward()
    assert logits.grad.abs().max() > 0
    with pytest.raises(RuntimeError, match="this op has no backward"):
        moe_mlp(x.requires_grad_(), moe_route(logits, top_k=2), gate_up, down).sum().backward()


def test_fp8_mlp_bad_arguments():
    x, gate_up, down = make_fp8_mlp(8, 4, 128, 192, torch.float32)
    routing = moe_route(torch.randn(8, 4), top_k=2)
    with pytest.raises(ValueError, match=r"moe_mlp: down must be a pair .fp8, scales. like gate_up, got Tensor"):
        moe_mlp(x, routing, gate_up, down[0])
    with pytest.raises(ValueError, match=r"moe_mlp: gate_up must be a pair .fp8, scales., got a tuple of 1"):
        moe_mlp(x, routing, gate_up[:1], down)
    with pytest.raises(ValueError, match=r"moe_mlp: the scales of down must be \[4, 1, 2\] float32, got \[4, 2, 1\]"):
        moe_mlp(x, routing, gate_up, (down[0], down[1].mT))
    with pytest.raises(TypeError, match=r"moe_mlp: x must be .*, got \[8, 128\] float64"):
        moe_mlp(x.double(), routing, gate_up, down)
    with pytest.raises(TypeError, match=r"moe_mlp: routing must be what moe_route returned, got Tensor"):
        moe_mlp(x, routing.indices, gate_up, down)


# What every op must pass


def test_registration():
    logits = torch.randn(7, 8, requires_grad=True)
    bias = torch.randn(8)
    route = (logits, bias, 2, 2, 1, "sigmoid", True, 2.5)
    check_op(moe._moe_route, route, differentiable=True, compiled=lambda: moe_route(logits, bias, top_k=2))
    routing = moe_route(logits.detach(), top_k=2)
    check_op(moe._moe_route_backward, (torch.randn(7, 2), logits.detach(), routing.indices, "softmax", True, 2.5))
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    loss = lambda: moe_sequence_loss(logits, routing.indices, top_k=2, alpha=0.1, cu_seqlens=cu_seqlens)  # noqa: E731
    check_op(
        moe._moe_sequence_loss,
        (logits, routing.indices, cu_seqlens, 0.1, "sigmoid"),
        differentiable=True,
        compiled=loss,
    )
    check_op(
        moe._moe_sequence_loss_backward,
        (torch.tensor(2.0), logits.detach(), routing.indices, None, 0.1, "softmax"),
    )
    for mode in ("sign", "quantile"):
        check_op(moe._moe_update_bias, (bias, routing.counts, 0.1, mode))

    x, gate_up, _ = make_mlp(7, 8, 16, 8, torch.float32)
    x.requires_grad_()
    weights = routing.weights.clone().requires_grad_()
    d = moe_dispatch(x.detach(), routing.indices, routing.weights, num_experts=8, alignment=4)
    slots = d.handle.slot_of, d.handle.token_of_slot
    check_op(moe._moe_dispatch, (x, routing.indices, 8, 4, 40), differentiable=True)
    check_op(moe._moe_permute, (x, *slots), differentiable=True)
    for layout in ("row", "column"):
        check_op(moe._moe_dispatch_quantize, (x, routing.indices, 8, 4, 40, False, layout))
    y = torch.randn(d.data.shape, requires_grad=True)
    shared = torch.randn(7, 16, dtype=torch.bfloat16, requires_grad=True)
    check_op(moe._moe_combine, (y, *slots, weights, shared, None, torch.bfloat16), differentiable=True)
    check_op(moe._moe_combine, (y, *slots, None, None, None, torch.float32), differentiable=True)
    check_op(moe._moe_combine_backward, (torch.randn(7, 16), y, *slots, weights))
    groups = d.offsets, d.counts
    gate_up.requires_grad_()
    hidden = torch.randn(d.data.shape[0], 16)
    check_op(moe._grouped_gemm, (y, gate_up, *groups), differentiable=True)
    check_op(moe._grouped_gemm_dgrad, (hidden, gate_up, *groups))
    check_op(moe._grouped_gemm_wgrad, (hidden, y, *groups))


def test_mlp_compiles_with_its_backward_for_any_number_of_tokens():
    _, gate_up, down = make_mlp(0, 8, 16, 8)
    bias = torch.randn(8)
    leaves = [gate_up.requires_grad_(), down.requires_grad_()]

    def layer(x, logits):
        routing = moe_route(logits, bias, top_k=2)
        out = moe_mlp(x, routing, *leaves, alignment=4)
        return out.square().sum() + moe_sequence_loss(logits, routing.indices, top_k=2, alpha=0.1)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (7, 12, 33):
        x, logits = torch.randn(tokens, 16, dtype=F64, requires_grad=True), torch.randn(tokens, 8, dtype=F64)
        inputs = [x, logits.requires_grad_(), *leaves]
        want, got = layer(x, logits), compiled(x, logits)
        assert torch.equal(got, want)
        for g, w in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)):
            assert torch.equal(g, w)


def test_fp8_mlp_compiles():
    x, gate_up, down = make_fp8_mlp(9, 4, 128, 64, torch.bfloat16)
    routing = moe_route(torch.randn(9, 4), top_k=2)
    torch._dynamo.reset()
    compiled = torch.compile(moe_mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 5):
        inputs = x[:tokens], Routing(*(t[:tokens] for t in routing))
        assert torch.equal(compiled(*inputs, gate_up, down), moe_mlp(*inputs, gate_up, down))


def test_handle_crosses_compiled_regions():
    dispatch = torch.compile(lambda x, i, w: moe_dispatch(x, i, w, num_experts=8), fullgraph=True, backend="aot_eager")
    combine = torch.compile(moe_combine, fullgraph=True, backend="aot_eager")
    x, indices, weights = torch.randn(6, 4), make_indices("some dropped", 6, 2, 8), torch.rand(6, 2)
    dispatched = dispatch(x, indices, weights)
    got = combine(dispatched.data, dispatched.handle)
    assert torch.equal(got, moe_combine(dispatched.data, dispatched.handle))


def test_shapes_without_data():
    def layer(tokens, hidden, intermediate, experts, top_k):
        x = torch.empty(tokens, hidden, device="meta", dtype=torch.bfloat16, requires_grad=True)
        gate_up = torch.empty(experts, 2 * intermediate, hidden, device="meta", dtype=torch.bfloat16)
        down = torch.empty(experts, hidden, intermediate, device="meta", dtype=torch.bfloat16)
        logits = torch.empty(tokens, experts, device="meta", requires_grad=True)
        out = moe_mlp(x, moe_route(logits, top_k=top_k), gate_up, down, alignment=128)
        out.sum().backward()
        assert out.shape == x.grad.shape == (tokens, hidden) and out.dtype == x.grad.dtype == torch.bfloat16
        assert logits.grad.shape == (tokens, experts)

    layer(0, 16, 8, 8, 2)
    layer(2**20, 7168, 2048, 384, 8)  # more than 2**31 elements in every buffer
    with pytest.raises(ValueError, match=r"capacity must be below 2\*\*31 slots, got 21475"):
        layer(2**28, 16, 8, 384, 8)
