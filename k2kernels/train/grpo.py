"""Group relative policy optimisation: losses on log-probabilities, which `k2kernels.linear_log_probs` computes.

    r = exp(log_probs - old_log_probs);   A = (reward - mean of the group) / standard deviation of the group
    loss = -mean over texts of mean over tokens of [min(r A, clip(r, 1 - low, 1 + high) A) - beta KL]

Source: DeepSeekMath (2024), arXiv 2402.03300, section 4.1. Letters of shapes: B texts, T tokens of each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from k2kernels.ops._check import Arguments

EXACT = (torch.float32, torch.float64)
SMALLEST_DEVIATION = 1e-6  # of rewards; a group of less has learnt, or failed, alike


class GrpoLoss(NamedTuple):
    """The loss, and what to log, without gradients: means over the tokens that count (0 if none does)."""

    loss: Tensor
    kl: Tensor  # `kl_k3` to the reference model; 0 without one
    clipped: Tensor  # the fraction of tokens without a gradient from their reward, since the ratio is clipped


def group_advantages(rewards: Tensor, *, normalize: bool = True) -> Tensor:
    """How much better each text of a group is than the mean of its group.

    Args:
        rewards: [..., n] float32 or float64: n texts of one prompt, 2 or more.
        normalize: divide by the standard deviation of the group (of the n numbers, not an estimate with n - 1).
            Without, prompts of which nearly all or nearly none succeed do not count more (Dr. GRPO, arXiv 2503.20783).

    Returns:
        [..., n]; zeros where all rewards of a group are equal.

    Raises:
        TypeError, ValueError: for dtype and shape.
    """
    args = Arguments("group_advantages")
    rewards = args.tensor("rewards", rewards, ("...", "n"), EXACT)
    args.boolean("normalize", normalize)
    args.require(rewards.shape[-1] > 1, "rewards", "of groups of 2 texts or more", rewards.shape)
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    if not normalize:
        return centred
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()
    return torch.where(deviation > SMALLEST_DEVIATION, centred / deviation.clamp_min(SMALLEST_DEVIATION), 0)


def kl_k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """An unbiased estimate, from a token drawn by the policy, of its KL divergence to the reference model.

    exp(d) - d - 1 with d = reference - log_probs: never negative, and exactly 0 where both are equal. Any equal shapes;
    differentiable.

    Source: Schulman, "Approximating KL divergence" (2020), k3; DeepSeekMath, equation 4.
    """
    difference = reference - log_probs
    return torch.expm1(difference) - difference


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reference: Tensor | None = None,
    beta: float = 0.04,
    clip: float = 0.2,
    clip_high: float | None = None,
    mean: str = "texts",
) -> GrpoLoss:
    """The loss of some texts of the policy's own.

    Args:
        log_probs: [B, T] float32 or float64, of the tokens by the policy that is trained.
        old_log_probs: [B, T], by the policy as it drew them; no gradient.
        advantages: [B], of `group_advantages`.
        mask: [B, T] bool, the tokens that count: not the prompt, nor what follows the end. Others may have any
            log-probabilities, NaN too.
        reference: [B, T], by the model to stay close to; no gradient. None: no KL term.
        beta: weight of the KL term.
        clip, clip_high: the ratio counts from 1 - clip to 1 + clip_high (None: 1 + clip; DAPO, arXiv 2503.14476).
        mean: "texts": over the tokens of each text, then over the texts with tokens, as DeepSeekMath; "tokens": over
            all tokens, so that long texts count more (DAPO).

    Returns:
        GrpoLoss(loss, kl, clipped), scalars; the loss is differentiable in log_probs.

    Raises:
        TypeError, ValueError: for dtypes, shapes and numbers out of range.
    """
    args = Arguments("grpo_loss")
    log_probs = args.tensor("log_probs", log_probs, ("B", "T"), EXACT)
    old_log_probs = args.tensor("old_log_probs", old_log_probs, ("B", "T"), log_probs.dtype)
    advantages = args.tensor("advantages", advantages, ("B",), log_probs.dtype)
    mask = args.tensor("mask", mask, ("B", "T"), torch.bool)
    reference = args.optional("reference", reference, ("B", "T"), log_probs.dtype)
    args.no_gradient(old_log_probs=old_log_probs, advantages=advantages, reference=reference)
    args.require(args.number("beta", beta) >= 0, "beta", "0 or more", beta)
    args.require(0 < args.number("clip", clip) < 1, "clip", "above 0 and below 1", clip)
    clip_high = clip if clip_high is None else args.number("clip_high", clip_high, positive=True)
    args.choice("mean", mean, ("texts", "tokens"))

    def average(of_tokens: Tensor) -> Tensor:
        if mean == "tokens":
            return of_tokens.sum() / count
        lengths = mask.sum(dim=1)
        return (of_tokens.sum(dim=1) / lengths.clamp_min(1)).sum() / (lengths > 0).sum().clamp_min(1)

    # Masked before the exponential: NaN times 0 would be NaN, in the gradient too.
    log_probs, old_log_probs = log_probs.masked_fill(~mask, 0), old_log_probs.masked_fill(~mask, 0)
    count, advantages = mask.sum().clamp_min(1), advantages[:, None] * mask
    ratio = torch.exp(log_probs - old_log_probs)
    free, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + clip_high) * advantages
    loss, kl = -average(torch.minimum(free, bounded)), torch.zeros_like(count, dtype=log_probs.dtype)
    if reference is not None:
        kls = kl_k3(log_probs, reference.masked_fill(~mask, 0))
        loss, kl = loss + beta * average(kls), kls.detach().sum() / count
    return GrpoLoss(loss, kl, (bounded < free).sum() / count)
