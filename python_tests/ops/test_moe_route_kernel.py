"""The kernels of route in the emulator, against formulas and the definition."""

import math

import pytest
import torch
from moe_cases import BF16, F16, F32, SCHEDULES, in_all_schedules, kernels

import k2kernels
from k2kernels.ops.moe import moe_route, route
from k2kernels.reference import moe as reference
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import expert_indices, guarded


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
        ordered = torch.cat([best.sort(descending=True).values, torch.full((tokens, 1), -torch.inf)], 1)
        limit, left_out = ordered[:, topk_group - 1 : topk_group], ordered[:, topk_group : topk_group + 1]
        taken_group = index // grouped.shape[-1]
        assert (best.gather(1, taken_group) >= limit - 2 * slack).all()
        # Of groups that are equal but for rounding, those that were taken.
        kept = (best > left_out + 2 * slack).scatter(1, taken_group, True)
        assert (kept.sum(1) <= topk_group).all()
        choice = torch.where(kept[..., None], grouped, -torch.inf).view(tokens, experts)
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
    if dtype != F32:  # ties are many; another test checks that they go to the lowest index
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
    indices = expert_indices("uniform", tokens, top_k, experts).int()
    rest = indices, score, normalize, 2.5
    exact = reference.moe_route_backward(grad.double(), logits.double(), *rest)
    plain = reference.moe_route_backward(grad, logits, *rest)
    with kernels(schedule, 1):
        got = route._moe_route_backward(*map(guarded, (grad, logits, indices)), *rest[1:])
    assert got.dtype == dtype
    check_close(got, exact, same_precision=plain)


def test_route_backward_of_bad_logits():
    logits = torch.tensor([[math.nan] * 8, [-math.inf] * 8, [math.inf] * 8, [-200.0] * 8, [math.nan, 1, 2, 3] * 2])
    indices = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [0, 3]], dtype=torch.int32)
    for score in ("sigmoid", "softmax"):
        args = torch.ones(5, 2) * torch.tensor([1.0, 2.0]), logits, indices, score, True, 2.5
        with kernels(SCHEDULES[1], 1):
            got = route._moe_route_backward(*args)
        torch.testing.assert_close(got, route._moe_route_backward(*args), rtol=1e-6, atol=1e-7)
