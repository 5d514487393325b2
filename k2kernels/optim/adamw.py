"""AdamW for the parameters that are not hidden matrices: the rule of torch.optim.AdamW, with state in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_update(
    parameters: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float,
) -> None:
    """One step for every parameter; `states` (empty dicts at first) are updated, gradients are not.

    Parameters of half precision are updated in float32 and rounded once; gradients are divided by `grad_scale`.
    """
    if not parameters:
        return
    beta1, beta2 = betas
    wide = [p if p.dtype in (torch.float32, torch.float64) else p.float() for p in parameters]
    for p, state in zip(wide, states):
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        state["step"] += 1
    grads = [g.to(p.dtype) for g, p in zip(grads, wide)]
    if grad_scale != 1:
        grads = torch._foreach_div(grads, grad_scale)
    first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    steps = [float(s["step"]) for s in states]

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
