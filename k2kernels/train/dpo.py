"""Direct preference optimisation: a loss on pairs of answers of which one is preferred.

    loss = -log sigmoid(beta [(chosen - reference of chosen) - (rejected - reference of rejected)])

Source: Rafailov et al. (2023), arXiv 2305.18290, equation 7. Letters of shapes: B pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from k2kernels.ops._check import Arguments
from k2kernels.train.grpo import EXACT


class DpoLoss(NamedTuple):
    """The mean loss, and what to log, without gradients."""

    loss: Tensor
    margin: Tensor  # mean of beta times the bracket: how much more the policy prefers the chosen answer
    accuracy: Tensor  # the fraction of pairs with a margin above 0


def answer_log_probs(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Sums over the tokens of each answer: [B, T] float32 or float64, of which `mask` [B, T] bool counts -> [B].

    Tokens that do not count may have any log-probabilities, NaN too. Differentiable.

    Raises:
        TypeError, ValueError: for dtypes and shapes.
    """
    args = Arguments("answer_log_probs")
    log_probs = args.tensor("log_probs", log_probs, ("B", "T"), EXACT)
    mask = args.tensor("mask", mask, ("B", "T"), torch.bool)
    return log_probs.masked_fill(~mask, 0).sum(dim=1)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float = 0.1
) -> DpoLoss:
    """The loss of B pairs of answers.

    Args:
        chosen, rejected: [B] float32 or float64, log-probabilities of the answers (`answer_log_probs`) by the policy.
        reference_chosen, reference_rejected: [B], by the model where training began; no gradient.
        beta: how strongly the policy is held to the reference.

    Returns:
        DpoLoss(loss, margin, accuracy), scalars; the loss is differentiable in chosen and rejected.

    Raises:
        TypeError, ValueError: for dtypes, shapes, no pairs, and beta.
    """
    args = Arguments("dpo_loss")
    chosen = args.tensor("chosen", chosen, ("B",), EXACT)
    rejected = args.tensor("rejected", rejected, ("B",), chosen.dtype)
    reference_chosen = args.tensor("reference_chosen", reference_chosen, ("B",), chosen.dtype)
    reference_rejected = args.tensor("reference_rejected", reference_rejected, ("B",), chosen.dtype)
    args.no_gradient(reference_chosen=reference_chosen, reference_rejected=reference_rejected)
    args.require(len(chosen) > 0, "chosen", "1 pair or more", chosen.shape)
    beta = args.number("beta", beta, positive=True)
    margins = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    right = (margins.detach() > 0).to(chosen.dtype)
    return DpoLoss(-F.logsigmoid(margins).mean(), margins.detach().mean(), right.mean())
