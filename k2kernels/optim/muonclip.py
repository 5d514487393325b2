"""MuonClip: Muon for the hidden matrices, AdamW for the rest, QK-Clip after each update.

Source: Kimi K2 technical report (2025), section 2.1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from k2kernels._backend import UnsupportedError
from k2kernels.optim.base import RuleOptimizer
from k2kernels.optim.clipper import WHERE_POSSIBLE, clipper
from k2kernels.optim.qk_clip import ClipReport, QKClip
from k2kernels.optim.routing import METHODS, Route, route, row_splits
from k2kernels.optim.rules import AdamWRule, MuonRule, Step


class MuonClip(RuleOptimizer):
    """Muon, AdamW and QK-Clip in one optimizer with two parameter groups: [0] "muon", [1] "adamw".

    Args:
        model_or_named_parameters: a module, or (name, parameter) pairs such as `model.named_parameters()`.
        lr: learning rate; at rms_scale 0.2 Muon's updates are as large as AdamW's.
        weight_decay, momentum, nesterov, rms_scale: as in `Muon`.
        adamw: options of the other group: lr (default: the same lr), betas (0.9, 0.95), eps 1e-8 and weight_decay
            (default: the same).
        qk_clip: a `QKClip`, or None: no clipping. By default QKClip() if the model provides its logits
            (`max_logits()` and attention with `qk_clip_spec()`), else no clipping and a warning.
        splits: glob pattern of names -> how a fused matrix is cut by rows before orthogonalisation: "gate_up" (two
            equal blocks), "heads" (one block per attention head), a number of equal blocks, a list of block sizes, or
            None (not at all). The first pattern that matches wins. By default "*gate_up_proj*" is cut in two, and
            kv_a_proj_with_mqa into latent and rope rows.
        rules: glob pattern of names -> "muon" or "adamw", over the default routing (see `routing_table`).
        router: the method of the expert router's matrix.
        schedule, steps, momentum_dtype, iterate_dtype, max_elements, master_weights, skip_non_finite, capturable: as in
            `Muon`; AdamW's parameters are treated alike.
        process_group: must be None; see `mesh`.
        mesh: the DeviceMesh or `k2kernels.parallel.Layout` of a model over ranks (`k2kernels.parallel.parallelize`):
            makes a `k2kernels.parallel.MuonClip`, which shards its matrices over the ranks. That subclass has all
            process groups; nothing in this package knows any.

    The report's Algorithm 1 has no Nesterov momentum and does not cut matrices; by default this class does both. To
    follow it literally, pass nesterov=False and splits of None for each matrix that `routing_table` shows cut.

    The order of a step: Muon and AdamW updates with weight decay; QK-Clip with the largest logits since the last
    step; `model.reset_max_logits()`. Layers whose query or key weights do not require a gradient are not clipped.
    When a step is skipped (overflow seen by a torch.amp.GradScaler, or `skip_non_finite`), the maxima are reset and
    nothing else happens; a loop that skips steps itself must call `reset_max_logits()`.

    Without `mesh`, and copies of the parameters on several ranks, average the gradients before the step, and pass
    QK-Clip the maxima of all ranks; a model's own maxima, which are of one rank, are refused. (Maxima and loads of
    experts are buffers, which must not be replaced by those of rank 0.)

        copies = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

        def max_logits():
            maxima = model.max_logits()
            for s in maxima.values():
                torch.distributed.all_reduce(s, torch.distributed.ReduceOp.MAX)
            return maxima

        MuonClip(model, lr, qk_clip=QKClip(max_logits=max_logits))

    Memory, beside parameter and gradient, in bytes per element: Muon's as in `Muon`; AdamW's moments 8, and 4 for the
    master weight of a parameter in half precision.

    `last_clip` is {layer: ClipReport(max_logit [H], gamma [H])} of the last step that was not skipped. A head whose
    maximum is NaN or +inf is not scaled, with a warning; with `capturable`, where the host does not wait, only
    `last_clip[layer].non_finite` shows it, in tensors that each step overwrites.

    Raises:
        ValueError: for options out of range, patterns that match nothing, sizes that do not fit, sharded parameters,
            and QK-Clip by the maxima of one rank of several.
        TypeError: for parameters without names, complex parameters and sparse gradients.
        UnsupportedError: for a process group.
    """

    _over_ranks = False  # whether `_overflow` takes the largest logits of all ranks

    def __new__(cls, *args: Any, mesh: Any = None, **options: Any) -> MuonClip:
        if mesh is not None and not cls._over_ranks:
            if cls is not MuonClip:
                raise TypeError(
                    f"{cls.__name__}: mesh must be None; derive from k2kernels.parallel.MuonClip over ranks"
                )
            cls = importlib.import_module("k2kernels.parallel").MuonClip  # by name: that package stands above this one
        return super().__new__(cls)

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
        qk_clip: QKClip | None = WHERE_POSSIBLE,
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
        mesh: Any = None,
    ):
        if process_group is not None:
            raise UnsupportedError("MuonClip: process_group must be None; k2kernels.parallel has the mesh for mesh=")
        name = type(self).__name__
        model = model_or_named_parameters if isinstance(model_or_named_parameters, nn.Module) else None
        named = _named(model_or_named_parameters)
        self._check_parameters(named)
        self._table = route(named, model=model, rules=rules, router=router)
        parameters = dict(named)
        self._clipper = clipper(qk_clip, model, parameters, self._over_ranks)
        latent, heads = _fused_rows(model, parameters)
        self._cuts = row_splits(self._table, splits, known=latent, heads=heads)
        cuts = {parameters[name]: rows for name, rows in self._cuts.items()}

        matrix = dict(momentum=momentum, nesterov=nesterov, rms_scale=rms_scale, schedule=schedule, steps=steps)
        muon = dict(method="muon", lr=lr, weight_decay=weight_decay, **matrix, step=0)
        rest = dict(method="adamw", lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
        if not isinstance(adamw, (Mapping, type(None))):
            raise TypeError(f"MuonClip: adamw must be a dict or None, got {adamw!r}")
        unknown = set(adamw or {}) - {"lr", "betas", "eps", "weight_decay"}
        if unknown:
            raise ValueError(f"MuonClip: adamw takes lr, betas, eps and weight_decay, got {sorted(unknown)}")
        rest.update(adamw or {})
        options = {group["method"]: set(group) for group in (muon, rest)}
        groups = []
        for group in (muon, rest):
            members = [pair for pair, row in zip(named, self._table) if row.method == group["method"]]
            names, tensors = [name for name, _ in members], [p for _, p in members]
            groups.append(dict(params=tensors, param_names=names, **group))
        both = dict(muon=MuonRule(name, momentum_dtype, iterate_dtype, max_elements, cuts), adamw=AdamWRule(name))
        loop = dict(master_weights=master_weights, skip_non_finite=skip_non_finite, capturable=capturable)
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay), both, options, **loop)
        if self._clipper is not None:
            self._more_state = self._clipper.state()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, then clips; returns what `closure`, if given, returned."""
        loss, step = self._begin(closure)
        if step is not None:
            count = self._count()
            if self._clipper is not None:
                self._clipper.measure(count, step, self.state)
            for group in self.param_groups:
                self._update(group, step)
            self._scale_remaining_rows(step)
            if self._clipper is not None:
                self._clipper.report(step, self.state)
            if step.captures:
                count += 1.0 if step.skip is None else (~step.skip).to(count.device, count.dtype)
            else:
                self.param_groups[0]["step"] = count + 1
            self._end()
        self.reset_max_logits()
        return loss

    def routing_table(self) -> list[Route]:
        """(name, shape, "muon" or "adamw", reason) of every parameter; the reason includes how a matrix is cut."""
        table = []
        for row in self._table:
            cut = self._cuts.get(row.name)
            table.append(row._replace(reason=f"{row.reason}, rows cut {_sizes(cut)}") if cut else row)
        return table

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds (name, parameter) pairs with "method" "muon" or "adamw"; other options default to that group's.

        Their rows are not cut, and `routing_table` does not list them.

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
        """Resets the maxima, as `step` does: for loops that skip a step themselves."""
        if self._clipper is not None:
            self._clipper.reset()

    @property
    def last_clip(self) -> dict[Any, ClipReport]:
        """What the last step that was not skipped clipped, by layer."""
        return {} if self._clipper is None else self._clipper.last

    def _update(self, group: dict[str, Any], step: Step) -> None:
        self._rule(group).update(group, self._members(group), step)

    def _scale_remaining_rows(self, step: Step) -> None:
        """Scales what no update of a matrix has scaled: biases, parameters of AdamW or without a gradient."""
        for p, factors in step.row_scales.items():
            state = self.state.get(p, {})
            if "master" in state:
                self._refresh_master(p)
            weight = state.get("master", p)
            weight.mul_(factors.reshape(-1, *[1] * (p.ndim - 1)))
            if weight is not p:
                p.copy_(weight)

    def _count(self) -> int | Tensor:
        """Steps done so far; with `capturable` a tensor, in the group, so that it is saved."""
        group = self.param_groups[0]
        if not self._captures():
            return int(group["step"])
        device = self._device_of(group)
        if not isinstance(group["step"], Tensor) or group["step"].device != device:
            group["step"] = torch.as_tensor(group["step"], dtype=torch.float64).to(device)
        return group["step"]


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
    """Of latent attention, by name: latent and rope rows of its down projection, and the heads of the others."""
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
