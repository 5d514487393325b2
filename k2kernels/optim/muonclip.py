"""MuonClip: Muon for the hidden matrices, AdamW for the rest, QK-Clip after each update.

Source: Kimi K2 technical report (2025), section 2.1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from k2kernels._backend import UnsupportedError
from k2kernels.optim.adamw import adamw_update
from k2kernels.optim.muon import Muon, check_number
from k2kernels.optim.qk_clip import ClipReport, ClipTarget, QKClip, find_targets, resolve_targets, row_factors
from k2kernels.optim.routing import METHODS, Route, route, row_splits

_WHERE_POSSIBLE = QKClip()  # the default: clip if the model can tell its logits


class MuonClip(Muon):
    """Muon, AdamW and QK-Clip in one optimizer with two parameter groups: [0] "muon", [1] "adamw".

    Args:
        model_or_named_parameters: a module, or (name, parameter) pairs such as `model.named_parameters()`.
        lr: learning rate; at rms_scale 0.2 Muon's updates are as large as AdamW's.
        weight_decay, momentum, nesterov, rms_scale: as in `Muon`.
        adamw: options of the other group: lr (default: the same lr), betas (0.9, 0.95), eps 1e-8 and weight_decay
            (default: the same).
        qk_clip: a `QKClip`, or None: no clipping. By default QKClip() if the model tells its logits (`max_logits()`
            and attention with `qk_clip_spec()`), else no clipping and a warning.
        splits: glob pattern of names -> how a fused matrix is cut by rows before orthogonalisation: "gate_up" (two
            equal blocks), "heads" (one block per attention head), a number of equal blocks, a list of block sizes, or
            None (not at all). The first pattern that matches wins. By default "*gate_up_proj*" is cut in two, and
            kv_a_proj_with_mqa into latent and rope rows.
        rules: glob pattern of names -> "muon" or "adamw", over the default routing (see `routing_table`).
        router: the method of the expert router's matrix.
        schedule, steps, momentum_dtype, iterate_dtype, max_elements, master_weights, skip_non_finite, capturable: as in
            `Muon`; AdamW's parameters are treated alike.
        process_group: must be None.

    The report's Algorithm 1 has no Nesterov momentum and does not cut matrices; this does both by default. Literally it
    is nesterov=False, with splits that give None for each matrix that `routing_table` shows cut.

    The order of a step: Muon and AdamW updates with weight decay; QK-Clip with the largest logits since the last
    step; `model.reset_max_logits()`. Layers whose query or key weights do not require a gradient are not clipped.
    When a step is skipped (overflow seen by a torch.amp.GradScaler, or `skip_non_finite`), the maxima are reset and
    nothing else happens; a loop that skips steps by itself calls `reset_max_logits()`.

    Over several ranks that hold copies of the parameters, average the gradients before the step, and give QK-Clip the
    maxima of all ranks; those of a model are its own rank's, and are refused. (Maxima and loads of experts are buffers,
    which must not be replaced by those of rank 0.)

        copies = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

        def max_logits():
            maxima = model.max_logits()
            for s in maxima.values():
                torch.distributed.all_reduce(s, torch.distributed.ReduceOp.MAX)
            return maxima

        MuonClip(model, lr, qk_clip=QKClip(max_logits=max_logits))

    Memory, beside parameter and gradient, in bytes an element: Muon's as in `Muon`; AdamW's moments 8, and 4 for the
    master weight of a parameter in half precision.

    `last_clip` is {layer: ClipReport(max_logit [H], gamma [H])} of the last step that was not skipped. A head whose
    maximum is NaN or +inf is not scaled; there is a warning, but with `capturable` (where the host would have to wait)
    only `last_clip[layer].non_finite`, in tensors that each step overwrites.

    Raises:
        ValueError: for options out of range, patterns that match nothing, sizes that do not fit, sharded parameters,
            and QK-Clip by the maxima of one rank of several.
        TypeError: for parameters without names, complex parameters and sparse gradients.
        UnsupportedError: for a process group.
    """

    def __init__(
        self,
        model_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
        lr: float,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        rms_scale: float = 0.2,
        adamw: Mapping[str, Any] | None = None,
        qk_clip: QKClip | None = _WHERE_POSSIBLE,
        splits: Mapping[str, str | int | Sequence[int] | None] | None = None,
        rules: Mapping[str, str] | None = None,
        router: str = "muon",
        schedule: str | Sequence[Sequence[float]] = "quintic",
        steps: int = 5,
        momentum_dtype: torch.dtype = torch.float32,
        iterate_dtype: torch.dtype | None = None,
        max_elements: int = 2**27,
        master_weights: bool | None = None,
        skip_non_finite: bool = False,
        capturable: bool | None = None,
        process_group: None = None,
    ):
        if process_group is not None:
            raise UnsupportedError("MuonClip: process_group must be None; updates are not distributed yet")
        self._configure(momentum_dtype, iterate_dtype, max_elements, master_weights, skip_non_finite, capturable)
        model = model_or_named_parameters if isinstance(model_or_named_parameters, nn.Module) else None
        named = _named(model_or_named_parameters)
        self._check_parameters(dict(params=[p for _, p in named], param_names=[name for name, _ in named]))
        self._table = route(named, model=model, rules=rules, router=router)
        parameters = dict(named)
        self._set_up_clip(qk_clip, model, parameters)
        latent, heads = _fused_rows(model, parameters)
        self._cuts = row_splits(self._table, splits, known=latent, heads=heads)
        self._row_splits = {parameters[name]: rows for name, rows in self._cuts.items()}

        muon = dict(
            method="muon",
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            rms_scale=rms_scale,
            schedule=schedule,
            steps=steps,
            step=0,
        )
        rest = dict(method="adamw", lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
        if not isinstance(adamw, (Mapping, type(None))):
            raise TypeError(f"MuonClip: adamw must be a dict or None, got {adamw!r}")
        unknown = set(adamw or {}) - {"lr", "betas", "eps", "weight_decay"}
        if unknown:
            raise ValueError(f"MuonClip: adamw takes lr, betas, eps and weight_decay, got {sorted(unknown)}")
        rest.update(adamw or {})
        self._options = {options["method"]: set(options) for options in (muon, rest)}
        groups = []
        for options in (muon, rest):
            members = [pair for pair, row in zip(named, self._table) if row.method == options["method"]]
            names, tensors = [name for name, _ in members], [p for _, p in members]
            groups.append(dict(params=tensors, param_names=names, **options))
        Optimizer.__init__(self, groups, dict(lr=lr, weight_decay=weight_decay))

    def routing_table(self) -> list[Route]:
        """(name, shape, "muon" or "adamw", reason) of every parameter; the reason also tells how a matrix is cut."""
        table = []
        for row in self._table:
            cut = self._cuts.get(row.name)
            table.append(row._replace(reason=f"{row.reason}, rows cut {_sizes(cut)}") if cut else row)
        return table

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds (name, parameter) pairs with "method" "muon" or "adamw"; other options default to that group's.

        They are taken as they are: their rows are not cut, and `routing_table` does not list them.

        Raises:
            ValueError: for another method, an option out of range, or what the method does not take.
        """
        method = param_group.get("method")
        if method not in METHODS:
            raise ValueError(f"MuonClip.add_param_group: method must be 'muon' or 'adamw', got {method!r}")
        for group in self.param_groups:
            if group["method"] == method:
                for key in group.keys() - {"params", "param_names"}:
                    param_group.setdefault(key, group[key])
        super().add_param_group(param_group)

    def reset_max_logits(self) -> None:
        """Forgets the logits seen since the last step, as `step` does: for loops that skip a step by themselves."""
        if self._reset_source is not None:
            self._reset_source()

    def _set_up_clip(self, clip: QKClip | None, model: nn.Module | None, parameters: dict[str, Tensor]) -> None:
        """Finds the layers to clip and who tells their logits."""
        self.last_clip: dict[Any, ClipReport] = {}
        self._clip, self._targets = clip, []
        self._read_source = self._reset_source = None
        self._pending: list[tuple[ClipTarget, ClipReport, Tensor | None]] = []
        if clip is None:
            return
        if not isinstance(clip, QKClip):
            raise TypeError(f"MuonClip: qk_clip must be a QKClip or None, got {clip!r}; write QKClip(threshold=...)")
        targets, self._read_source, self._reset_source = clip.targets, clip.max_logits, clip.reset_max_logits
        if model is not None:
            if targets is None:
                targets = find_targets(model)
            source = next((m for m in model.modules() if hasattr(m, "max_logits")), None)
            if source is not None:
                self._read_source = self._read_source or source.max_logits
                self._reset_source = self._reset_source or getattr(source, "reset_max_logits", None)
        if targets and self._read_source is not None:
            if self._reset_source is None:
                raise ValueError(
                    "MuonClip: QKClip(max_logits=...) must come with reset_max_logits=..., which forgets the maxima "
                    "after each step: old ones would be clipped again and again; if max_logits() does it by itself, "
                    "pass reset_max_logits=lambda: None"
                )
            self._check_ranks()
            self._targets = resolve_targets(targets, parameters)
            return
        missing = "attention with qk_clip_spec()" if not targets else "max_logits()"
        message = f"MuonClip: the model has no {missing}; give QKClip(targets=..., max_logits=...) or qk_clip=None"
        if clip is not _WHERE_POSSIBLE:
            raise ValueError(message)
        warnings.warn(message + "; nothing is clipped now", stacklevel=3)
        self._clip = self._read_source = self._reset_source = None

    def _check_ranks(self) -> None:
        """Refuses to clip by one rank's own maxima where there are several ranks."""
        if self._clip is None or self._clip.max_logits is not None:
            return
        dist = torch.distributed
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks > 1:
            raise ValueError(
                f"MuonClip: the maxima of QK-clip must be those of all {ranks} ranks, or copies of a weight would "
                "differ, got a model's max_logits(), which are this rank's; pass QKClip(max_logits=f) with a function "
                "that takes the largest of all ranks (all_reduce with ReduceOp.MAX), or qk_clip=None"
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["method"] == "muon":
            return super()._check_group(group)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"MuonClip: adamw's betas must be two numbers, got {betas!r}")
        for key in ("lr", "eps", "weight_decay"):
            check_number(f"MuonClip: adamw's {key}", group[key])
        for beta in betas:
            check_number("MuonClip: each of adamw's betas", beta, below=1)
        self._check_parameters(group)

    def _prepare(self, skip: Tensor | None) -> None:
        self._pending, self._row_scales = [], {}
        if self._clip is None:
            return
        self._check_ranks()
        maxima, step, captured = self._read_source(), self._count(), self._captures()
        for target in self._targets:
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
            if self._clip.mode != "exact":
                average = self.state[target.query[0]].get("clip_average")
                if average is None:
                    average = torch.ones(target.num_heads, dtype=torch.float64, device=s.device)
            gamma, average = self._clip.gamma(s, average, step)
            self._pending.append((target, ClipReport(s, gamma), average))
            # Multiplying by 1 changes nothing: it is skipped where looking does not make the host wait.
            if captured or bool((gamma != 1).any()):
                applied = gamma if skip is None else torch.where(skip.to(gamma.device), 1.0, gamma)
                for p, factors in row_factors(target, applied, self._clip.alpha):
                    factors = factors.to(p.device, torch.float64 if p.dtype == torch.float64 else torch.float32)
                    self._row_scales[p] = factors * self._row_scales[p] if p in self._row_scales else factors

    def _update(self, group: dict[str, Any], grad_scale: Tensor | None, skip: Tensor | None) -> None:
        if group["method"] == "muon":
            return super()._update(group, grad_scale, skip)
        by_device: dict[torch.device, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                self._master(p)
                by_device.setdefault(p.device, []).append(p)
        for device, parameters in by_device.items():
            adamw_update(
                parameters,
                [p.grad for p in parameters],
                [self.state[p] for p in parameters],
                lr=self._lr(group, device),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_scale=None if grad_scale is None else grad_scale.to(device, non_blocking=True),
                skip=None if skip is None else skip.to(device, non_blocking=True),
                capturable=self._captures(),
            )

    def _updated(self, skip: Tensor | None) -> None:
        for p, factors in self._row_scales.items():  # what no update of a matrix has scaled: biases, no gradient
            weight = self._master(p) if "master" in self.state.get(p, {}) else p
            weight.mul_(factors.reshape(-1, *[1] * (p.ndim - 1)))
            if weight is not p:
                p.copy_(weight)
        self._row_scales = {}
        if self._captures():
            self._keep_reports(skip)
            count = self._count()
            count += 1.0 if skip is None else (~skip).to(count.device, count.dtype)
        else:
            self._report()
            self.param_groups[0]["step"] = self._count() + 1
        self._pending = []
        self.reset_max_logits()

    def _report(self) -> None:
        """Publishes what was clipped."""
        if self._clip is not None:
            self.last_clip = {target.layer: report for target, report, _ in self._pending}
        for target, report, average in self._pending:
            if average is not None:
                self.state[target.query[0]]["clip_average"] = average
            if bool(report.non_finite.any()):
                heads = report.non_finite.nonzero().flatten().tolist()
                warnings.warn(
                    f"MuonClip: the largest logit of layer {target.layer}, heads {heads}, is not finite; "
                    "they were not scaled",
                    stacklevel=6,
                )

    def _keep_reports(self, skip: Tensor | None) -> None:
        """The same in tensors that stay where they are, for the graph that a step may be part of."""

        def keep(old: Tensor, new: Tensor) -> None:
            old.copy_(new if skip is None else torch.where(skip.to(old.device), old, new))

        for target, report, average in self._pending:
            if target.layer not in self.last_clip:
                nothing = ClipReport(torch.full_like(report.max_logit, -torch.inf), torch.ones_like(report.gamma))
                self.last_clip[target.layer] = nothing
            for old, new in zip(self.last_clip[target.layer], report):
                keep(old, new)
            if average is not None:
                state = self.state[target.query[0]]
                keep(state.setdefault("clip_average", torch.ones_like(average)), average)

    def _count(self) -> int | Tensor:
        """Steps done so far; with `capturable` a tensor, in the group, so that it is saved."""
        group = self.param_groups[0]
        if not self._captures():
            return int(group["step"])
        device = self._device_of(group)
        if not isinstance(group["step"], Tensor) or group["step"].device != device:
            group["step"] = torch.as_tensor(group["step"], dtype=torch.float64).to(device)
        return group["step"]

    def _skipped(self) -> None:
        self.reset_max_logits()

    def _options_of(self, group: dict[str, Any]) -> set[str]:
        return self._options[group["method"]]

    def _state_of(self, group: dict[str, Any], p: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if group["method"] == "muon":
            return super()._state_of(group, p)
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        moments = {"exp_avg": (tuple(p.shape), wide), "exp_avg_sq": (tuple(p.shape), wide)}
        return {"step": ((), torch.float32), **moments}

    def _optional_state_of(self, p: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        state = super()._optional_state_of(p)
        if self._clip is not None and self._clip.mode != "exact":
            heads = {target.query[0]: target.num_heads for target in self._targets}
            if p in heads:
                state["clip_average"] = (heads[p],), torch.float64
        return state


def _named(model_or_named_parameters: Any) -> list[tuple[str, Tensor]]:
    if isinstance(model_or_named_parameters, nn.Module):
        return list(model_or_named_parameters.named_parameters())
    named = list(model_or_named_parameters) if isinstance(model_or_named_parameters, Iterable) else [None]
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in named):
        raise TypeError(
            "MuonClip: parameters must be a module or (name, parameter) pairs; pass model.named_parameters()"
        )
    if len({name for name, _ in named}) < len(named):
        raise ValueError("MuonClip: parameter names must be unique")
    return named


def _fused_rows(
    model: nn.Module | None, parameters: dict[str, Tensor]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """What latent attention tells by name: latent and rope rows of its down projection, heads of the others."""
    names = {id(p): name for name, p in parameters.items()}
    latent, heads = {}, {}
    for path, module in model.named_modules() if model is not None else ():
        if not hasattr(module, "qk_clip_spec"):
            continue
        spec = module.qk_clip_spec()
        for p in (spec["query"], spec["key"]):
            heads[names.get(id(p))] = spec["num_heads"]
        down = f"{path}.kv_a_proj_with_mqa.weight"
        if down in parameters and spec["rope_dim"]:
            latent[down] = (parameters[down].shape[0] - spec["rope_dim"], spec["rope_dim"])
    return latent, heads


def _sizes(rows: Sequence[int]) -> str:
    """2x384 for equal blocks, 512+64 for others."""
    return f"{len(rows)}x{rows[0]}" if len(set(rows)) == 1 else "+".join(map(str, rows))
