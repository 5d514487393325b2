"""QK-Clip in the steps of an optimizer: reads the maxima before an update, has rows scaled, reports after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from k2kernels.optim.qk_clip import ClipReport, ClipTarget, QKClip, find_targets, resolve_targets, row_factors
from k2kernels.optim.rules import Specs, Step, wide_dtype

WHERE_POSSIBLE = QKClip()  # the default: clip if the model has maxima to clip by


class Clipper:
    """Applies a `QKClip` to the attention layers of a model.

    Args:
        clip: the settings.
        targets: the layers, resolved to parameters.
        read, reset: return the largest logits since the last reset, and reset them.
        over_ranks: the optimizer takes the largest of all ranks itself.

    `last` is what `MuonClip.last_clip` describes.
    """

    def __init__(
        self,
        clip: QKClip,
        targets: list[ClipTarget],
        read: Callable[[], Mapping[Any, Tensor]],
        reset: Callable[[], None],
        over_ranks: bool = False,
    ):
        self.clip, self.targets, self.read, self.reset = clip, targets, read, reset
        self.over_ranks = over_ranks
        self.last: dict[Any, ClipReport] = {}
        self._pending: list[tuple[ClipTarget, ClipReport, Tensor | None]] = []
        self.check_ranks()

    def check_ranks(self) -> None:
        """Refuses to clip by one rank's own maxima where there are several ranks."""
        if self.over_ranks or self.clip.max_logits is not None:
            return
        dist = torch.distributed
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks > 1:
            raise ValueError(
                f"MuonClip: the maxima of QK-clip must be those of all {ranks} ranks, or copies of a weight would "
                "differ, got a model's max_logits(), which are this rank's; pass QKClip(max_logits=f) with a function "
                "that takes the largest of all ranks (all_reduce with ReduceOp.MAX), k2kernels.parallel.MuonClip, or "
                "qk_clip=None"
            )

    def state(self) -> dict[Tensor, Specs]:
        """What clipping keeps in the state of parameters: the running averages, with the queries."""
        if self.clip.mode == "exact":
            return {}
        return {t.query[0]: {"clip_average": ((t.num_heads,), torch.float64)} for t in self.targets}

    def measure(self, count: int | Tensor, step: Step, state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        """Computes the factors of the step after `count` steps, and adds them to `step.row_scales`."""
        self._pending = []
        self.check_ranks()
        maxima = self.read()
        for target in self.targets:
            if not all(p.requires_grad for p in target.query + target.key):
                continue
            s = maxima.get(target.layer)
            if s is None or tuple(s.shape) != (target.num_heads,):
                got = "nothing" if s is None else list(s.shape)
                raise ValueError(
                    f"MuonClip: max_logits() must give [{target.num_heads}] for layer {target.layer!r}, got {got}; "
                    f"it has the layers {list(maxima)}"
                )
            s = s.detach().clone()
            average = None
            if self.clip.mode != "exact":
                average = state[target.query[0]].get("clip_average")
                if average is None:
                    average = torch.ones(target.num_heads, dtype=torch.float64, device=s.device)
            gamma, average = self.clip.gamma(s, average, count)
            self._pending.append((target, ClipReport(s, gamma), average))
            # Multiplying by 1 changes nothing: it is left out where reading gamma does not make the host wait.
            if step.captures or bool((gamma != 1).any()):
                applied = gamma if step.skip is None else torch.where(step.skip.to(gamma.device), 1.0, gamma)
                for p, factors in row_factors(target, applied, self.clip.alpha):
                    factors = factors.to(p.device, wide_dtype(p))
                    step.row_scales[p] = factors * step.row_scales[p] if p in step.row_scales else factors

    def report(self, step: Step, state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        """Publishes what was clipped: in new tensors, or in ones that stay in place for a captured graph."""
        if step.captures:
            self._report_captured(step.skip, state)
            return
        self.last = {target.layer: report for target, report, _ in self._pending}
        for target, report, average in self._pending:
            if average is not None:
                state[target.query[0]]["clip_average"] = average
            if bool(report.non_finite.any()):
                heads = report.non_finite.nonzero().flatten().tolist()
                warnings.warn(
                    f"MuonClip: the largest logit of layer {target.layer}, heads {heads}, is not finite; "
                    "they were not scaled",
                    stacklevel=5,
                )

    def _report_captured(self, skip: Tensor | None, state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        def keep(old: Tensor, new: Tensor) -> None:
            old.copy_(new if skip is None else torch.where(skip.to(old.device), old, new))

        for target, report, average in self._pending:
            if target.layer not in self.last:
                none_seen = ClipReport(torch.full_like(report.max_logit, -torch.inf), torch.ones_like(report.gamma))
                self.last[target.layer] = none_seen
            for old, new in zip(self.last[target.layer], report):
                keep(old, new)
            if average is not None:
                keep(state[target.query[0]].setdefault("clip_average", torch.ones_like(average)), average)


def clipper(
    clip: QKClip | None, model: nn.Module | None, parameters: dict[str, Tensor], over_ranks: bool = False
) -> Clipper | None:
    """The Clipper of `MuonClip(qk_clip=clip)`: finds the layers and the functions that read and reset their maxima."""
    if clip is None:
        return None
    if not isinstance(clip, QKClip):
        raise TypeError(f"MuonClip: qk_clip must be a QKClip or None, got {clip!r}; write QKClip(threshold=...)")
    targets, read, reset = clip.targets, clip.max_logits, clip.reset_max_logits
    if model is not None:
        targets = find_targets(model) if targets is None else targets
        source = next((m for m in model.modules() if hasattr(m, "max_logits")), None)
        if source is not None:
            read, reset = read or source.max_logits, reset or getattr(source, "reset_max_logits", None)
    if targets and read is not None:
        if reset is None:
            raise ValueError(
                "MuonClip: QKClip(max_logits=...) must come with reset_max_logits=..., which resets the maxima after "
                "each step: otherwise old ones are clipped again; if max_logits() resets them, pass "
                "reset_max_logits=lambda: None"
            )
        return Clipper(clip, resolve_targets(targets, parameters), read, reset, over_ranks)
    missing = "attention with qk_clip_spec()" if not targets else "max_logits()"
    message = f"MuonClip: the model has no {missing}; give QKClip(targets=..., max_logits=...) or qk_clip=None"
    if clip is not WHERE_POSSIBLE:
        raise ValueError(message)
    warnings.warn(message + "; nothing is clipped now", stacklevel=3)
    return None
