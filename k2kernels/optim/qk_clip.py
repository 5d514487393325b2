"""QK-Clip: after an update, shrinks the query and key weights of the attention heads whose logits have grown too
large.

A head whose largest scaled logit S exceeds the threshold tau gets gamma = tau / S. In latent attention the logit is
q_nope · k_nope + q_rope · k_rope with k_rope shared by all heads, so the head's own rows are scaled:
q_nope by gamma^alpha, k_nope by gamma^(1 - alpha), q_rope by gamma. k_rope and the values stay as they are.

Source: Kimi K2 technical report (2025), section 2.1; Su, "QK-Clip" (2025, kexue.fm/archives/11126).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MODES = ("exact", "smooth", "smooth_literal")


class ClipTarget(NamedTuple):
    """The weights that produce the logits of one attention layer.

    Rows of `query` are per head [nope | rope], rows of `key` per head [nope | value]; scaling acts on rows only.
    Without latent attention, nope_dim is the head size and rope_dim 0. Where heads share keys (grouped or multi-query
    attention), `key` is None: the query takes all of gamma, so that other heads of a group are unaffected.
    """

    layer: Any  # the key in `max_logits()`
    query: Any  # a parameter, its name, or several (weight and bias)
    key: Any
    num_heads: int
    nope_dim: int
    rope_dim: int = 0
    value_dim: int = 0


class ClipReport(NamedTuple):
    """What QK-Clip measured and did in one layer."""

    max_logit: Tensor  # [H]; -inf: no logit was seen
    gamma: Tensor  # float64 [H]: the logits' factor; 1: not clipped

    @property
    def non_finite(self) -> Tensor:
        """Bool [H]: the maximum was NaN or +inf, so the head was not scaled."""
        return self.max_logit.isnan() | self.max_logit.isposinf()


@dataclass
class QKClip:
    """Settings of QK-Clip.

    Args:
        threshold: tau, or a function of the number of steps done so far. Lower it gradually: a jump from 100 to 30
            scales heads by up to 0.3 in one step. A `capturable` optimizer counts on the device: the function gets a
            float64 tensor and, in a captured graph, must compute with it.
        alpha: distribution of gamma: queries get gamma^alpha, keys gamma^(1 - alpha); any value is exact.
        smoothing: decay of a running average e of gamma, for the two smooth modes; None there means 0.9.
        mode: "exact" (the paper's, default without smoothing): gamma = tau / S where S > tau, else 1.
            "smooth" (default with smoothing): max(e, tau / S) where S > tau, but tau / S at once where S > 2 tau,
            else 1; logits never fall below tau.
            "smooth_literal": e itself, always. It keeps shrinking a head after S has fallen below tau (with tau 100 a
            head that once reached 1000 ends at 2.4); for comparison.
        targets: `ClipTarget`s (or dicts of its fields) for models without `qk_clip_spec()`.
        max_logits: function that returns {layer: [H]}: the largest scaled logit of each head over all the
            micro-batches and ranks of the step, -inf where none was seen; instead of the model's `max_logits()`.
        reset_max_logits: function called after each step, which resets the maxima; instead of the model's
            `reset_max_logits()`. Required with `max_logits` if the model has none.

    Raises:
        ValueError: for a value out of range, or a mode that contradicts `smoothing`.
    """

    threshold: float | Callable[[int], float] = 100.0
    alpha: float = 0.5
    smoothing: float | None = None
    mode: str | None = None
    targets: Sequence[ClipTarget | Mapping[str, Any]] | None = None
    max_logits: Callable[[], Mapping[Any, Tensor]] | None = None
    reset_max_logits: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if self.mode is None:
            self.mode = "exact" if self.smoothing is None else "smooth"
        if self.mode not in MODES:
            raise ValueError(f"QKClip: mode must be one of {MODES}, got {self.mode!r}")
        if self.mode == "exact" and self.smoothing is not None:
            raise ValueError("QKClip: mode 'exact' does not smooth; leave smoothing None, or take mode 'smooth'")
        if self.mode != "exact" and self.smoothing is None:
            self.smoothing = 0.9
        if self.smoothing is not None and not (_is_number(self.smoothing) and 0 <= self.smoothing < 1):
            raise ValueError(f"QKClip: smoothing must be in [0, 1), got {self.smoothing!r}")
        if not (_is_number(self.alpha) and 0 <= self.alpha <= 1):
            raise ValueError(f"QKClip: alpha must be in [0, 1], got {self.alpha!r}")
        if not callable(self.threshold):
            self.threshold_at(0)

    def threshold_at(self, step: int | Tensor) -> float | Tensor:
        """tau for the step after `step` steps."""
        tau = self.threshold(step) if callable(self.threshold) else self.threshold
        if isinstance(step, Tensor) and isinstance(tau, Tensor):
            return tau  # must not be read on the host
        if not (_is_number(tau) and 0 < tau < math.inf):
            raise ValueError(f"QKClip: threshold must be positive and finite, got {tau!r} at step {step}")
        return float(tau)

    def gamma(self, max_logit: Tensor, average: Tensor | None, step: int | Tensor) -> tuple[Tensor, Tensor | None]:
        """Factors float64 [H] for the largest logits [H], and the new running average (None in mode "exact").

        NaN, +inf, and -inf (no logit was seen) give 1 and do not change the average.
        """
        tau = self.threshold_at(step)
        s = max_logit.double()
        seen = s.isfinite()
        # A comparison, not a clamp of tau / s: negative maxima would give negative factors and NaN roots.
        gamma = torch.where(seen & (s > tau), tau / s, 1.0)
        if average is None:
            return gamma, None
        average = torch.where(seen, self.smoothing * average + (1 - self.smoothing) * gamma, average)
        if self.mode == "smooth_literal":
            return torch.where(seen, average, 1.0), average
        # The average is at most 1, so a head at gamma 1 keeps it.
        return torch.where(s > 2 * tau, gamma, torch.maximum(average, gamma)), average


def find_targets(model: nn.Module) -> list[ClipTarget]:
    """The attention layers of a model: its modules with `qk_clip_spec()`, by the last number in their name."""
    found: dict[Any, ClipTarget] = {}
    for path, module in model.named_modules():
        if hasattr(module, "qk_clip_spec"):
            numbers = [int(part) for part in path.split(".") if part.isdecimal()]
            layer = numbers[-1] if numbers else path
            if layer in found:
                raise ValueError(
                    f"QKClip: two attention modules are layer {layer}; give QKClip(targets=..., max_logits=...)"
                )
            found[layer] = ClipTarget(layer, **module.qk_clip_spec())
    return list(found.values())


def resolve_targets(
    targets: Sequence[ClipTarget | Mapping[str, Any]], parameters: Mapping[str, Tensor]
) -> list[ClipTarget]:
    """Targets with `query` and `key` as tuples of parameters of the optimizer, of the right sizes."""
    names = {id(p): name for name, p in parameters.items()}

    def resolve(target: ClipTarget, field: str, rows: int) -> tuple[Tensor, ...]:
        value = getattr(target, field)
        where = f"QKClip: {field} of layer {target.layer}"
        members = () if value is None else value if isinstance(value, (list, tuple)) else (value,)
        result = []
        for member in members:
            p = parameters.get(member) if isinstance(member, str) else member
            if id(p) not in names:
                got = repr(member) if isinstance(member, str) else "another tensor"
                raise ValueError(f"{where} must be a parameter of this optimizer, or its name, got {got}")
            if p.shape[0] != rows:
                raise ValueError(f"{where} must have {rows} rows, got {list(p.shape)} ({names[id(p)]})")
            result.append(p)
        return tuple(result)

    resolved = []
    for target in targets:
        target = target if isinstance(target, ClipTarget) else ClipTarget(**target)
        query = resolve(target, "query", target.num_heads * (target.nope_dim + target.rope_dim))
        key = resolve(target, "key", target.num_heads * (target.nope_dim + target.value_dim))
        if not query:
            raise ValueError(f"QKClip: query of layer {target.layer} must be a parameter, got None")
        resolved.append(target._replace(query=query, key=key))
    return resolved


def row_factors(target: ClipTarget, gamma: Tensor, alpha: float) -> list[tuple[Tensor, Tensor]]:
    """(parameter, factor of each row) that multiply the logits of each head by gamma [H]."""
    nope, rope, value = target.nope_dim, target.rope_dim, target.value_dim
    share = gamma**alpha if target.key else gamma
    query = torch.cat([_per_row(share, nope), _per_row(gamma, rope)], dim=1).flatten()
    key = torch.cat([_per_row(gamma ** (1 - alpha), nope), gamma.new_ones(len(gamma), value)], dim=1).flatten()
    return [(p, query) for p in target.query] + [(p, key) for p in target.key]


def _is_number(value: Any) -> bool:
    return isinstance(value, (numbers.Real, Tensor)) and not isinstance(value, bool)


def _per_row(per_head: Tensor, count: int) -> Tensor:
    return per_head[:, None].expand(-1, count)
