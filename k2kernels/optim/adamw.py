"""AdamW for the parameters that are not hidden matrices: the rule of torch.optim.AdamW, with state in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_update(
    parameters: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    skip: Tensor | None = None,
    capturable: bool = False,
) -> None:
    """One step for every parameter; `states` (empty dicts at first) are updated, gradients are not.

    Parameters of half precision are updated in float32 and rounded once, or by their "master" where their state has
    one; gradients are divided by `grad_scale`. With `capturable` the steps are counted on the parameters' device and
    the host is never made to wait; where the tensor `skip`, if any, is not zero, nothing changes.
    """
    if not parameters:
        return
    beta1, beta2 = betas
    full = (torch.float32, torch.float64)
    wide = [p if p.dtype in full else s["master"] if "master" in s else p.float() for p, s in zip(parameters, states)]
    for p, state in zip(wide, states):
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if capturable else "cpu")
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
    grads = [g.to(p.dtype) for g, p in zip(grads, wide)]
    if grad_scale is not None:
        grads = torch._foreach_div(grads, grad_scale)
    first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    counts = [s["step"] for s in states]
    if capturable:
        _captured(wide, grads, first, second, counts, lr, beta1, beta2, eps, weight_decay, skip)
    else:
        torch._foreach_add_(counts, 1)
        steps = [float(count) for count in counts]
        torch._foreach_mul_(wide, 1 - lr * weight_decay)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, [(1 - beta2**t) ** 0.5 for t in steps])
        torch._foreach_add_(denominator, eps)
        torch._foreach_addcdiv_(wide, first, denominator, [-lr / (1 - beta1**t) for t in steps])
    for p, w in zip(parameters, wide):
        if w is not p:
            p.copy_(w)


def _captured(
    wide: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    counts: list[Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip: Tensor | None,
) -> None:
    """The same update in tensors of the device alone. Where the step is skipped, every factor becomes neutral."""
    kept = counts[0].new_ones(()) if skip is None else (skip == 0).to(counts[0].dtype)
    if skip is not None:
        grads = [torch.where(skip == 0, g, 0) for g in grads]
    torch._foreach_add_(counts, kept, alpha=1)  # without alpha, the tensor is read as a number
    # A first step that is skipped leaves a count of 0, for which the corrections would be 0 too.
    steps = torch._foreach_maximum([count.double() for count in counts], 1.0)
    correction1, correction2 = torch._foreach_pow(beta1, steps), torch._foreach_pow(beta2, steps)
    for correction in (correction1, correction2):
        torch._foreach_neg_(correction)
        torch._foreach_add_(correction, 1)
    rate = lr * kept
    torch._foreach_mul_(wide, 1 - rate * weight_decay)
    change = torch._foreach_sub(grads, first)
    torch._foreach_mul_(change, (1 - beta1) * kept)
    torch._foreach_add_(first, change)
    torch._foreach_mul_(second, 1 - (1 - beta2) * kept)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    denominator = torch._foreach_sqrt(second)
    torch._foreach_sqrt_(correction2)
    torch._foreach_div_(denominator, [c.to(d.dtype) for c, d in zip(correction2, denominator)])
    torch._foreach_add_(denominator, eps)
    update = torch._foreach_div(first, denominator)
    torch._foreach_mul_(update, [(rate / c).to(u.dtype) for c, u in zip(correction1, update)])
    torch._foreach_sub_(wide, update)
