"""GRPO and DPO: against numbers worked out by hand."""

import math

import pytest
import torch

from k2kernels.train.dpo import answer_log_probs, dpo_loss
from k2kernels.train.grpo import group_advantages, grpo_loss, kl_k3

NAN = math.nan


def test_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 4.0, 0.0, 4.0]])
    root = math.sqrt(3)  # mean 1/4, variance 3/16
    want = torch.tensor([[root, -1 / root, -1 / root, -1 / root], [0, 0, 0, 0], [-1, 1, -1, 1]])
    torch.testing.assert_close(group_advantages(rewards), want)
    plain = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0], [-2, 2, -2, 2]])
    torch.testing.assert_close(group_advantages(rewards, normalize=False), plain)
    assert (group_advantages(torch.full((2, 7), 0.1)) == 0).all()  # whose mean is rounded


def test_k3():
    p, q = torch.tensor([0.7, 0.3], dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64)
    k3 = kl_k3(p.log(), q.log())
    torch.testing.assert_close(k3[0], torch.tensor(2 / 7 - math.log(2 / 7) - 1, dtype=torch.float64))
    torch.testing.assert_close((p * k3).sum(), (p * (p / q).log()).sum())  # unbiased: the divergence itself
    same = torch.randn(9)
    assert (kl_k3(same, same) == 0).all()
    near = kl_k3(torch.zeros(1), torch.full((1,), 1e-3))  # d^2 / 2 + d^3 / 6, of numbers near 1
    torch.testing.assert_close(near, torch.full((1,), 5.00167e-7), rtol=1e-3, atol=0)


# Two texts of 3 places. Ratios of the first: 1.5 (clipped to 1.2, advantage above 0), 0.5 (not clipped: it may grow);
# of the second: 0.5 (clipped to 0.8, advantage below 0). NaN where nothing counts.
RATIO = torch.tensor([[1.5, 0.5, NAN], [NAN, 0.5, NAN]])
MASK = torch.tensor([[True, True, False], [False, True, False]])
ADVANTAGES = torch.tensor([2.0, -1.0])


@pytest.mark.parametrize(
    "mean, high, loss, gradient",
    [
        # texts: -1/2 [(1.2 * 2 + 0.5 * 2) / 2 - 0.8] = -0.45; d loss / d log p = -A r / (2 texts * 2 tokens)
        ("texts", None, -0.45, [[0, -0.25, 0], [0, 0, 0]]),
        # tokens: -(2.4 + 1 - 0.8) / 3
        ("tokens", None, -2.6 / 3, [[0, -1 / 3, 0], [0, 0, 0]]),
        # with clip_high 0.6 the ratio 1.5 counts: -1/2 [(3 + 1) / 2 - 0.8]
        ("texts", 0.6, -0.6, [[-0.75, -0.25, 0], [0, 0, 0]]),
    ],
)
def test_clipped_ratios(mean, high, loss, gradient):
    old = torch.full((2, 3), -2.0)
    log_probs = (RATIO.log() + old).requires_grad_()
    got = grpo_loss(log_probs, old, ADVANTAGES, MASK, clip=0.2, clip_high=high, mean=mean)
    torch.testing.assert_close(got.loss.item(), loss)
    torch.testing.assert_close(got.clipped.item(), (1 if high else 2) / 3)
    assert got.kl == 0 and not got.kl.requires_grad and not got.clipped.requires_grad
    got.loss.backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor(gradient, dtype=torch.float32))


def test_kl_to_the_reference():
    old = torch.tensor([[-1.0, -2.0, NAN], [NAN, -1.0, NAN]])
    reference = old + torch.tensor([[0.0, math.log(2), 0.0], [0.0, -math.log(2), 0.0]])
    log_probs = old.clone().requires_grad_()
    got = grpo_loss(log_probs, old, torch.zeros(2), MASK, reference=reference, beta=0.5)
    up, down = 1 - math.log(2), math.log(2) - 0.5  # e^d - d - 1 for d = log 2 and -log 2
    torch.testing.assert_close(got.kl.item(), (up + down) / 3)
    torch.testing.assert_close(got.loss.item(), 0.5 * (up / 2 + down) / 2)
    got.loss.backward()  # of k3: 1 - e^d, by weights 1/4 and 1/2
    want = torch.tensor([[0, 0.5 * (1 - 2) / 4, 0], [0, 0.5 * (1 - 0.5) / 2, 0]])
    torch.testing.assert_close(log_probs.grad, want)
    first = grpo_loss(log_probs, old, ADVANTAGES, MASK, reference=old)
    assert first.kl == 0 and first.clipped == 0  # exactly


def test_texts_without_tokens():
    mask = MASK & torch.tensor([[True], [False]])
    log_probs = torch.zeros(2, 3, requires_grad=True)
    got = grpo_loss(log_probs, torch.zeros(2, 3), ADVANTAGES, mask)
    torch.testing.assert_close(got.loss.item(), -2.0)
    none = grpo_loss(log_probs, torch.zeros(2, 3), ADVANTAGES, torch.zeros_like(mask))
    none.loss.backward()
    assert none.loss == 0 and (log_probs.grad == 0).all()


def test_dpo():
    log_probs = torch.tensor([[-1.0, -2.0, NAN], [-0.5, NAN, -0.25]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert answer_log_probs(log_probs, mask).tolist() == [-3.0, -0.75]
    chosen = torch.tensor([-3.0, -1.0], requires_grad=True)
    rejected = torch.tensor([-4.0, -1.0], requires_grad=True)
    got = dpo_loss(chosen, rejected, torch.tensor([-5.0, -1.0]), torch.tensor([-5.0, 1.0]), beta=0.5)
    # margins 0.5 * (2 - 1) = 0.5 and 0.5 * (0 + 2) = 1
    want = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1))) / 2
    torch.testing.assert_close(got.loss.item(), want)
    assert got.margin.item() == 0.75 and got.accuracy.item() == 1
    got.loss.backward()  # -beta sigmoid(-margin) / 2
    want = torch.tensor([-0.25 / (1 + math.exp(0.5)), -0.25 / (1 + math.exp(1))])
    torch.testing.assert_close(chosen.grad, want)
    torch.testing.assert_close(rejected.grad, -want)
    start = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach())
    torch.testing.assert_close(start.loss.item(), math.log(2))
    assert start.accuracy == 0


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: group_advantages(x[:, :1]), ValueError, "group_advantages: rewards must be of groups of 2 texts"),
        (lambda x: group_advantages(x.long()), TypeError, "group_advantages: rewards must be .* got .* int64"),
        (lambda x: grpo_loss(x, x, x[0], x > 0), ValueError, r"grpo_loss: advantages must be \[B=2\].* got \[3\]"),
        (lambda x: grpo_loss(x, x, x[:, 0], x), TypeError, "grpo_loss: mask must be .* bool"),
        (lambda x: grpo_loss(x, x.requires_grad_(), x[:, 0].detach(), x > 0), ValueError, "old_log_probs must be a"),
        (lambda x: grpo_loss(x, x, x[:, 0], x > 0, clip=1.0), ValueError, "clip must be above 0 and below 1, got 1"),
        (lambda x: grpo_loss(x, x, x[:, 0], x > 0, beta=-1), ValueError, "beta must be 0 or more, got -1"),
        (lambda x: grpo_loss(x, x, x[:, 0], x > 0, mean="all"), ValueError, "mean must be one of 'texts', 'tokens'"),
        (lambda x: dpo_loss(x[0], x[1], x[0], x[1], beta=0), ValueError, "dpo_loss: beta must be positive"),
        (lambda x: dpo_loss(*[x[0, :0]] * 4), ValueError, "dpo_loss: chosen must be 1 pair or more"),
        (lambda x: answer_log_probs(x, x), TypeError, "answer_log_probs: mask must be .* bool"),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3))
