"""Muon: momentum, orthogonalised matrix by matrix.

    M <- M + (1 - mu) (G - M);   O = NewtonSchulz(M, or G + mu (M - G) with Nesterov)
    W <- (1 - lr wd) W - lr rms_scale sqrt(max(m, n)) O

Source: Jordan et al., "Muon" (2024); update scale: Liu et al., "Muon is scalable for LLM training" (arXiv
2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from k2kernels.optim.base import RuleOptimizer
from k2kernels.optim.rules import MuonRule


class Muon(RuleOptimizer):
    """Muon for matrices [m, n] and stacks of matrices [E, m, n].

    Args:
        params: parameters, (name, parameter) pairs or groups, as any torch optimizer takes them.
        lr: learning rate; with `rms_scale` 0.2 one that suits AdamW suits Muon too.
        weight_decay: decoupled; W shrinks by lr * weight_decay, without the update's scale.
        momentum: decay of the gradient's average.
        nesterov: mix the gradient into the average once more before orthogonalising.
        rms_scale: root mean square of an update's elements, about, in units of lr: updates are scaled by
            rms_scale * sqrt(max(m, n)).
        schedule, steps: as in `k2kernels.newton_schulz`.
        momentum_dtype: how the momentum is stored, float32 or bfloat16; float64 parameters always have a float64 one.
        iterate_dtype: as in `k2kernels.newton_schulz`; None takes float16 on a GPU, float32 on a CPU, and float64 for
            float64 parameters.
        max_elements: matrices are updated together up to this many elements (or one matrix), which bounds the memory
            a step needs: at most 14 bytes per element on a GPU with kernels (the default: 1.9 GB), 24 elsewhere.
            Results are bit-identical for any value (on a CPU with one thread).
        master_weights: None (the default) or True: the state keeps float32 weights of bfloat16 and float16 parameters,
            4 bytes more per element, created in the first step, so that no update is lost to rounding. False: updates
            below half a unit in the last place have no effect.
        skip_non_finite: a step in which any gradient has a NaN or an infinity changes nothing.
        capturable: make all decisions on the device, so that a step can be captured in a CUDA graph and the host never
            waits; None: on a GPU, not on a CPU. Run one step before the capture, to create the state. Options are
            constants of the graph, except for `lr` as a tensor on the device, and so is the set of parameters with a
            gradient: with True, and in any captured step, each that requires a gradient must have one.

    A step computes in float32 (float64 for float64) and rounds half-precision parameters once. Gradients are not
    changed. A parameter whose gradient is None is not changed, nor is its state. A gradient with NaN or an infinity
    makes that matrix NaN, as in torch's optimizers, unless `skip_non_finite`; others are unaffected. With a
    torch.amp.GradScaler, a step with overflow changes nothing. `last_skipped` is whether the last step was skipped: a
    bool, or a bool tensor with `capturable`.

    If a parameter is written between two steps (`model.load_state_dict`, an average of weights), its master weight
    follows. Writes through `p.data`, and between replays of a captured step, are not detected.

    Memory, beside parameter and gradient, in bytes per element: momentum 4 (2 in bfloat16), master weight 4.

    Raises:
        ValueError: for an option out of range, a parameter that is no matrix or stack of matrices, and one that is
            sharded (DTensor, FSDP).
        TypeError: for complex parameters and sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        rms_scale: float = 0.2,
        schedule: str | Sequence[Sequence[float]] = "quintic",
        steps: int = 5,
        momentum_dtype: torch.dtype = torch.float32,
        iterate_dtype: torch.dtype | None = None,
        max_elements: int = 2**27,
        master_weights: bool | None = None,
        skip_non_finite: bool = False,
        capturable: bool | None = None,
    ):
        matrix = dict(momentum=momentum, nesterov=nesterov, rms_scale=rms_scale, schedule=schedule, steps=steps)
        defaults = dict(lr=lr, weight_decay=weight_decay, **matrix)
        rule = MuonRule(type(self).__name__, momentum_dtype, iterate_dtype, max_elements)
        loop = dict(master_weights=master_weights, skip_non_finite=skip_non_finite, capturable=capturable)
        super().__init__(params, defaults, {"muon": rule}, {"muon": defaults}, **loop)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what `closure`, if given, returned."""
        loss, step = self._begin(closure)
        if step is not None:
            for group in self.param_groups:
                self._rule(group).update(group, self._members(group), step)
            self._end()
        return loss
