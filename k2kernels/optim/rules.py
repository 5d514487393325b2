"""Update rules: how Muon and AdamW change the parameters of one group in one step.

A rule gets the parameters with their state (`Member`) and what holds for the whole step (`Step`); the loop around it,
master weights and checkpoints are the optimizer's (`base.py`). State is float32, float64 for float64 parameters.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS
from k2kernels.ops.newton_schulz import muon_update, newton_schulz_grouped

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each entry of a parameter's state


class Step(NamedTuple):
    """What holds for all updates of one step."""

    captures: bool  # all decisions are made on the device, so that a CUDA graph can hold the step
    grad_scale: Tensor | None  # gradients are divided by it
    skip: Tensor | None  # a bool, with `captures` only: where it is True, nothing may change
    row_scales: dict[Tensor, Tensor]  # factors for a parameter's rows; a rule takes out what it applies

    def rate(self, group: dict[str, Any], device: torch.device) -> float | Tensor:
        """The group's learning rate: a number, or with `captures` the tensor that it is, on `device`."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and self.captures:
            return lr.to(device, torch.float32, non_blocking=True).reshape(())
        return float(lr)

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """grad_scale and skip on `device`, as scalars."""
        both = (self.grad_scale, self.skip)
        return tuple(None if x is None else x.to(device, non_blocking=True).reshape(()) for x in both)


class Member(NamedTuple):
    """A parameter that has a gradient, and its state."""

    parameter: Tensor
    state: dict[str, Tensor]

    @property
    def weight(self) -> Tensor:
        """What is updated: the float32 master weight, if there is one, else the parameter."""
        return self.state.get("master", self.parameter)


class Rule(Protocol):
    """An update rule."""

    def check(self, group: dict[str, Any]) -> None:
        """Raises TypeError or ValueError for options out of range and parameters that the rule does not take."""

    def state(self, p: Tensor) -> Specs:
        """The state of a parameter after its first step, without its master weight."""

    def update(self, group: dict[str, Any], members: list[Member], step: Step) -> None:
        """One step of a group."""


# ---- Muon ------------------------------------------------------------------------------------------------------------


class Matrices(NamedTuple):
    """Matrices of one shape that are orthogonalised one by one: views [k, m, n] into what the optimizer updates."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor
    copy: Tensor | None  # of the weight, in the parameter's dtype
    row_scale: Tensor | None  # [k, m]


class MuonRule:
    """Muon; the formula is in `muon.py`.

    Args:
        owner: the optimizer's name, for messages.
        momentum_dtype, iterate_dtype, max_elements: as in `Muon`.
        row_splits: parameter -> sizes of the row blocks that are orthogonalised apart.

    A sharded optimizer gathers the gradients of the matrices that it owns, passes them to `apply`, and sends the new
    weights. Matrices do not influence one another, so `apply` may be called any number of times in a step.
    """

    def __init__(
        self,
        owner: str,
        momentum_dtype: torch.dtype,
        iterate_dtype: torch.dtype | None,
        max_elements: int,
        row_splits: dict[Tensor, tuple[int, ...]] | None = None,
    ):
        if momentum_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{owner}: momentum_dtype must be float32 or bfloat16, got {momentum_dtype!r}")
        if iterate_dtype is not None and iterate_dtype not in FLOATS:
            raise ValueError(f"{owner}: iterate_dtype must be None or one of {FLOATS}, got {iterate_dtype!r}")
        if not isinstance(max_elements, int) or max_elements < 1:
            raise ValueError(f"{owner}: max_elements must be an int of at least 1, got {max_elements!r}")
        self.owner, self.momentum_dtype, self.iterate_dtype = owner, momentum_dtype, iterate_dtype
        self.max_elements, self.row_splits = max_elements, row_splits or {}

    def check(self, group: dict[str, Any]) -> None:
        for key in ("lr", "weight_decay", "momentum", "rms_scale"):
            check_number(f"{self.owner}: {key}", group[key], below=1 if key == "momentum" else math.inf)
        if not isinstance(group["nesterov"], bool):
            raise TypeError(f"{self.owner}: nesterov must be True or False, got {group['nesterov']!r}")
        newton_schulz_grouped([], schedule=group["schedule"], steps=group["steps"])  # checks both
        for name, p in named_parameters(group):
            if p.ndim not in (2, 3):
                raise ValueError(
                    f"{self.owner}: {name} must be a matrix [m, n] or a stack of matrices [E, m, n], "
                    f"got {list(p.shape)}; MuonClip sends such parameters to AdamW"
                )

    def state(self, p: Tensor) -> Specs:
        return {"momentum_buffer": (tuple(p.shape), wide_dtype(p) if p.dtype == torch.float64 else self.momentum_dtype)}

    def update(self, group: dict[str, Any], members: list[Member], step: Step) -> None:
        self.apply(group, [part for member in members for part in self.matrices(member, step.row_scales)], step)

    def apply(self, group: dict[str, Any], matrices: Sequence[Matrices], step: Step) -> None:
        """One step of matrices, with the options of a group."""
        for batch in batched(matrices, self.max_elements):
            first = batch[0].weight
            grad_scale, skip = step.on(first.device)
            copies, scales = [b.copy for b in batch], [b.row_scale for b in batch]
            none = first.new_empty(0)
            muon_update(
                [b.weight for b in batch],
                [b.grad for b in batch],
                [b.momentum for b in batch],
                lr=step.rate(group, first.device),
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                rms_scale=group["rms_scale"],
                copies=[] if copies[0] is None else copies,
                row_scales=[none if s is None else s for s in scales] if any(s is not None for s in scales) else [],
                grad_scale=grad_scale,
                skip=skip,
                schedule=group["schedule"],
                steps=group["steps"],
                iterate_dtype=self.iterate_dtype or (torch.float16 if first.is_cuda else wide_dtype(first)),
            )

    def matrices(self, member: Member, row_scales: dict[Tensor, Tensor], key: Tensor | None = None) -> list[Matrices]:
        """The matrices of a parameter; scales of a matrix's rows become part of its update.

        `key` is the parameter in `row_splits` and `row_scales`, if it is not the member's: whole matrices of a DTensor
        on this rank.
        """
        p, state = member
        key = p if key is None else key
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=self.state(p)["momentum_buffer"][1])
        copy = None if member.weight is p else p
        scale = row_scales.pop(key, None) if p.ndim == 2 else None
        parts = member.weight, p.grad, state["momentum_buffer"], copy
        stacked = (t if t is None or t.ndim == 3 else t.unsqueeze(0) for t in parts)
        return _cut(Matrices(*stacked, None if scale is None else scale.unsqueeze(0)), self.row_splits.get(key))


def _cut(whole: Matrices, rows: tuple[int, ...] | None) -> list[Matrices]:
    """Views of matrices [k, m, n] cut into blocks of `rows`; equal ones are one view, where strides allow it."""
    if rows is None:
        return [whole]
    if len(set(rows)) == 1:
        try:
            return [Matrices(*(None if t is None else t.view(-1, rows[0], *t.shape[2:]) for t in whole))]
        except RuntimeError:  # stacked matrices that are not contiguous with one another
            pass
    count = len(rows)
    return [Matrices(*b) for b in zip(*([None] * count if t is None else t.split(rows, dim=1) for t in whole))]


def batched(matrices: Sequence[Matrices], max_elements: int) -> Iterator[list[Matrices]]:
    """All matrices, in lists of one device and precision, equal shapes together, of at most `max_elements` elements
    (or one matrix)."""

    def kind(part: Matrices) -> tuple[Any, ...]:
        w = part.weight
        return str(w.device), w.dtype == torch.float64, part.copy is not None, tuple(w.shape[1:])

    batch: list[Matrices] = []
    room = max_elements
    for whole in sorted((b for b in matrices if b.weight.numel()), key=kind):
        count, m, n = whole.weight.shape
        most = max(1, max_elements // (m * n))
        for first in range(0, count, most):
            some = slice(first, first + most)
            part = whole if most >= count else Matrices(*(None if t is None else t[some] for t in whole))
            if batch and (part.weight.numel() > room or kind(part)[:-1] != kind(batch[0])[:-1]):
                yield batch
                batch, room = [], max_elements
            batch.append(part)
            room -= part.weight.numel()
    if batch:
        yield batch


# ---- AdamW -----------------------------------------------------------------------------------------------------------


class AdamWRule:
    """AdamW as torch.optim.AdamW computes it. Parameters of half precision without a master weight are updated in
    float32 and rounded once."""

    def __init__(self, owner: str):
        self.owner = owner

    def check(self, group: dict[str, Any]) -> None:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"{self.owner}: adamw's betas must be two numbers, got {betas!r}")
        for key in ("lr", "eps", "weight_decay"):
            check_number(f"{self.owner}: adamw's {key}", group[key])
        for beta in betas:
            check_number(f"{self.owner}: each of adamw's betas", beta, below=1)

    def state(self, p: Tensor) -> Specs:
        moment = tuple(p.shape), wide_dtype(p)
        return {"step": ((), torch.float32), "exp_avg": moment, "exp_avg_sq": moment}

    def update(self, group: dict[str, Any], members: list[Member], step: Step) -> None:
        by_device: dict[torch.device, list[Member]] = {}
        for member in members:
            by_device.setdefault(member.parameter.device, []).append(member)
        for device, here in by_device.items():
            self._update(group, here, step, device)

    def _update(self, group: dict[str, Any], members: list[Member], step: Step, device: torch.device) -> None:
        weights = [m.weight.to(wide_dtype(m.weight)) for m in members]
        for member, w in zip(members, weights):
            if "step" not in member.state:
                count = torch.zeros((), dtype=torch.float32, device=device if step.captures else "cpu")
                member.state.update(step=count, exp_avg=torch.zeros_like(w), exp_avg_sq=torch.zeros_like(w))
        grads = [m.parameter.grad.to(w.dtype) for m, w in zip(members, weights)]
        grad_scale, skip = step.on(device)
        if grad_scale is not None:
            grads = torch._foreach_div(grads, grad_scale)
        state = tuple([m.state[key] for m in members] for key in ("exp_avg", "exp_avg_sq", "step"))
        if step.captures:
            _adamw_captured(weights, grads, state, group, step.rate(group, device), skip)
        else:
            _adamw(weights, grads, state, group, step.rate(group, device))
        for member, w in zip(members, weights):
            if w is not member.parameter:
                member.parameter.copy_(w)


def _adamw(
    weights: list[Tensor], grads: list[Tensor], state: tuple[list[Tensor], ...], group: dict[str, Any], lr: float
) -> None:
    """The update; corrections of the bias are computed on the host."""
    first, second, counts = state
    (beta1, beta2), eps, weight_decay = group["betas"], group["eps"], group["weight_decay"]
    torch._foreach_add_(counts, 1)
    steps = [float(count) for count in counts]
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    denominator = torch._foreach_sqrt(second)
    torch._foreach_div_(denominator, [(1 - beta2**t) ** 0.5 for t in steps])
    torch._foreach_add_(denominator, eps)
    torch._foreach_addcdiv_(weights, first, denominator, [-lr / (1 - beta1**t) for t in steps])


def _adamw_captured(
    weights: list[Tensor],
    grads: list[Tensor],
    state: tuple[list[Tensor], ...],
    group: dict[str, Any],
    lr: float | Tensor,
    skip: Tensor | None,
) -> None:
    """The same update in tensors of the device alone. Where the step is skipped, every factor becomes neutral."""
    first, second, counts = state
    (beta1, beta2), eps, weight_decay = group["betas"], group["eps"], group["weight_decay"]
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
    torch._foreach_mul_(weights, 1 - rate * weight_decay)
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
    torch._foreach_sub_(weights, update)


# ---- both ------------------------------------------------------------------------------------------------------------


def wide_dtype(t: Tensor) -> torch.dtype:
    """What a tensor is computed in: float32, or float64 for float64."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def named_parameters(group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a group, with names or numbers."""
    params = group["params"]
    return zip(group.get("param_names") or [f"parameter {i}" for i in range(len(params))], params)


def check_number(what: str, value: Any, *, below: float = math.inf) -> None:
    """Raises TypeError or ValueError unless `value`, which may be a tensor, is a number of at least 0 and `below`."""
    if not isinstance(value, (numbers.Real, Tensor)) or isinstance(value, bool):
        raise TypeError(f"{what} must be a number, got {value!r}")
    if not 0 <= float(value) < below:
        limit = "finite and at least 0" if below == math.inf else f"in [0, {below})"
        raise ValueError(f"{what} must be {limit}, got {value}")
