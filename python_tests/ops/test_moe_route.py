"""`moe_route` against formulas of its own, in plain PyTorch."""

import itertools
import math

import pytest
import torch

from k2kernels.ops.moe import (
    moe_route,
)
from k2kernels.testing.compare import check_close

F64 = torch.float64
TOKENS = [0, 1, 2, 7, 127, 128, 129]
FAMILY = [(8, 2, 4, 2), (64, 6, 8, 3), (256, 8, 8, 4), (384, 8, 1, 1), (896, 16, 1, 1)]  # E, K, n_group, topk_group


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
