"""Muon: momentum, orthogonalised matrix by matrix.

    M <- M + (1 - mu) (G - M);   O = NewtonSchulz(M, or G + mu (M - G) with Nesterov)
    W <- (1 - lr wd) W - lr rms_scale sqrt(max(m, n)) O

Source: Jordan et al., "Muon" (2024); update scale: Liu et al., "Muon is scalable for LLM training" (arXiv
2502.16982).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from k2kernels.ops._check import FLOATS
from k2kernels.ops.newton_schulz import muon_update, newton_schulz_grouped


class Blocks(NamedTuple):
    """Matrices of one shape that are orthogonalised one by one: views [k, m, n] into what the optimizer updates."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor
    copy: Tensor | None  # of the weight, in the parameter's dtype
    row_scale: Tensor | None  # [k, m]


class Muon(Optimizer):
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
            a step needs: at most 14 bytes an element on a GPU whose kernels serve (the default: 1.9 GB), 24 elsewhere.
            Results do not depend on it (to the bit; on a CPU with one thread).
        master_weights: parameters in bfloat16 or float16 are copies of float32 weights, which the state keeps, so that
            no update is lost to rounding. None (the default) and True: they are, at 4 bytes an element more, made in
            the first step. False: they are not, and updates below half of a unit in the last place have no effect.
            float32 and float64 parameters have none.
        skip_non_finite: a step in which any gradient has a NaN or an infinity changes nothing.
        capturable: decide everything on the device, so that a step can be captured in a CUDA graph and never makes
            the host wait; None: on a GPU, not on a CPU. Take one step before the capture: it makes the state. Options
            are constants of the graph, but for `lr` where it is a tensor on the device, and so is the set of parameters
            with a gradient: with True, and in any step that is captured, each that requires a gradient must have one.

    A step computes in float32 (float64 for float64) and rounds half-precision parameters once. Gradients are not
    changed. A parameter whose gradient is None is left alone with its state: no decay, no momentum. A gradient with
    NaN or an infinity makes that matrix NaN, as in torch's optimizers, unless `skip_non_finite`; others are unaffected.
    With a torch.amp.GradScaler, a step with overflow changes nothing: no parameter, no state, no count. `last_skipped`
    tells whether that happened: a bool, or a bool tensor with `capturable`.

    A parameter that was written between two steps (`model.load_state_dict`, an average of weights) takes its master
    weight along. Writes through `p.data`, and between replays of a captured step, are not seen.

    Memory, beside parameter and gradient, in bytes an element: momentum 4 (2 in bfloat16), master weight 4.

    Raises:
        ValueError: for an option out of range, a parameter that is no matrix or stack of matrices, and one that is
            sharded (DTensor, FSDP).
        TypeError: for complex parameters and sparse gradients.
    """

    # GradScaler then calls step() also on overflow and leaves scale and verdict in `grad_scale` and `found_inf`.
    _step_supports_amp_scaling = True

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
        defaults = dict(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            rms_scale=rms_scale,
            schedule=schedule,
            steps=steps,
        )
        self._configure(momentum_dtype, iterate_dtype, max_elements, master_weights, skip_non_finite, capturable)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in any torch optimizer; matrices and stacks of matrices only."""
        super().add_param_group(param_group)
        self._check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_grads()
        skip = self._overflow()
        if not self._captures():
            self.last_skipped = skip is not None and bool(skip)
            if self.last_skipped:
                self._skipped()
                return loss
            skip = None
        elif skip is not None:
            self.last_skipped = skip
        self._prepare(skip)
        for group in self.param_groups:
            self._update(group, getattr(self, "grad_scale", None), skip)
        self._updated(skip)
        self._versions = {p: p._version for p, state in self.state.items() if "master" in state}
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """Everything, so that copy.deepcopy((model, optimizer)) gives a working pair; torch keeps only the groups."""
        return self.__dict__.copy()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, to the bit, on the devices of the parameters.

        State of another precision is taken where that is exact. A momentum in bfloat16 becomes one in float32. Master
        weights that were not saved are made from the parameters; those that were saved go to float32 parameters that
        hold the same numbers.

        Raises:
            ValueError: when names, shapes, dtypes, options or the kind of state do not fit this optimizer.
            TypeError: for an option of another type.
        """
        self._check_state_dict(state_dict)
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype, which would round the float32 momentum of bfloat16 parameters.
        for saved_id, p, group in self._saved_parameters(state_dict):
            wanted = self._state_of(group, p) | self._optional_state_of(p)
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if key in wanted:
                    device = "cpu" if key == "step" and not self._captures() else p.device
                    self.state[p][key] = value.detach().clone().to(device, wanted[key][1])
                else:  # a master weight, which the parameter equals
                    del self.state[p][key]
        self._versions = {}
        if self._captures():  # a copy from the host would be a constant of the graph
            for group in self.param_groups:
                for key, value in group.items():
                    if isinstance(value, Tensor):
                        group[key] = value.to(self._device_of(group))

    def _configure(
        self,
        momentum_dtype: Any,
        iterate_dtype: Any,
        max_elements: int,
        master_weights: bool | None,
        skip_non_finite: bool,
        capturable: bool | None,
    ) -> None:
        """Checks and keeps the options that concern how, not what, is computed."""
        self._name = type(self).__name__
        if momentum_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{self._name}: momentum_dtype must be float32 or bfloat16, got {momentum_dtype!r}")
        if iterate_dtype is not None and iterate_dtype not in FLOATS:
            raise ValueError(f"{self._name}: iterate_dtype must be None or one of {FLOATS}, got {iterate_dtype!r}")
        if not isinstance(max_elements, int) or max_elements < 1:
            raise ValueError(f"{self._name}: max_elements must be an int of at least 1, got {max_elements!r}")
        self._momentum_dtype, self._iterate_dtype, self._max_elements = momentum_dtype, iterate_dtype, max_elements
        if not isinstance(skip_non_finite, bool):
            raise TypeError(f"{self._name}: skip_non_finite must be True or False, got {skip_non_finite!r}")
        for option, value in (("master_weights", master_weights), ("capturable", capturable)):
            if not isinstance(value, (bool, type(None))):
                raise TypeError(f"{self._name}: {option} must be True, False or None, got {value!r}")
        self._master_weights, self._skip_non_finite, self._capturable = master_weights, skip_non_finite, capturable
        self.last_skipped: bool | Tensor = False
        self._versions: dict[Tensor, int] = {}  # of parameters with a master weight, after the last step
        self._row_splits: dict[Tensor, tuple[int, ...]] = {}
        self._row_scales: dict[Tensor, Tensor] = {}  # of the step that is being made

    def _check_group(self, group: dict[str, Any]) -> None:
        for key in ("lr", "weight_decay", "momentum", "rms_scale"):
            check_number(f"{self._name}: {key}", group[key], below=1 if key == "momentum" else math.inf)
        if not isinstance(group["nesterov"], bool):
            raise TypeError(f"{self._name}: nesterov must be True or False, got {group['nesterov']!r}")
        # Checks schedule and steps, as every step will.
        newton_schulz_grouped([], schedule=group["schedule"], steps=group["steps"])
        self._check_parameters(group)
        for name, p in _named(group):
            if p.ndim not in (2, 3):
                raise ValueError(
                    f"{self._name}: {name} must be a matrix [m, n] or a stack of matrices [E, m, n], "
                    f"got {list(p.shape)}; MuonClip sends such parameters to AdamW"
                )

    def _check_parameters(self, group: dict[str, Any]) -> None:
        """Refuses parameters that no method takes."""
        for name, p in _named(group):
            if p.is_complex():
                raise TypeError(f"{self._name}: complex parameters are not supported, got {name} {p.dtype}")
            # DTensors; the flat parameters of FSDP1, and the views of them that keep their names.
            if any(hasattr(p, mark) for mark in ("device_mesh", "_is_flat_param", "_fsdp_flattened")):
                raise ValueError(
                    f"{self._name}: {name} must be a whole parameter, got a shard (DTensor or FSDP); updates are not "
                    "distributed yet: keep all parameters on every rank, with averaged gradients "
                    "(DistributedDataParallel), or shard with another optimizer"
                )

    def _check_grads(self) -> None:
        """Refuses what cannot be served, before anything has changed."""
        absent = []
        for group in self.param_groups:
            for name, p in _named(group):
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise TypeError(f"{self._name}: gradients must be dense, got {p.grad.layout} for {list(p.shape)}")
                if p.grad is None and p.requires_grad:
                    absent.append(name)
        if absent and (self._capturable or self._is_captured()):
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            raise ValueError(
                f"{self._name}: with capturable, each parameter that requires a gradient must have one, got None for "
                f"{', '.join(absent[:5])}{more}; a captured step would leave them out of all replays: run backward "
                "before, freeze them (requires_grad_(False)), or do not pass them"
            )

    def _is_captured(self) -> bool:
        """Whether a CUDA graph is being captured."""
        on_gpu = any(p.is_cuda for group in self.param_groups for p in group["params"])
        return on_gpu and torch.cuda.is_current_stream_capturing()

    def _captures(self) -> bool:
        """Whether the host leaves all decisions to the device."""
        if self._capturable is not None:
            return self._capturable
        return any(p.is_cuda for group in self.param_groups for p in group["params"][:1])

    def _overflow(self) -> Tensor | None:
        """A bool: the gradients hold something that is not finite, as a scaler or they themselves say; None: no."""
        found = getattr(self, "found_inf", None)
        skip = None if found is None else found > 0
        if self._skip_non_finite:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            grads = [g for g in grads if g.numel()]
            if grads:
                # Largest magnitudes: unlike sums of squares they do not overflow where the gradients have not.
                largest = torch._foreach_norm(grads, torch.inf)
                here = ~torch.stack([x.to(grads[0].device) for x in largest]).isfinite().all()
                skip = here if skip is None else skip.to(here.device) | here
        return skip if skip is None else skip.reshape(())

    def _prepare(self, skip: Tensor | None) -> None:
        """Called before the updates of a step, which change nothing where `skip` says so."""

    def _update(self, group: dict[str, Any], grad_scale: Tensor | None, skip: Tensor | None) -> None:
        """One step of a parameter group."""
        blocks = []
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, dtype=self._stored(p))
            master = self._master(p)
            scale = self._row_scales.pop(p, None) if p.ndim == 2 else None
            whole = Blocks(
                _stacked(p if master is None else master),
                _stacked(p.grad),
                _stacked(state["momentum_buffer"]),
                None if master is None else _stacked(p),
                None if scale is None else scale.unsqueeze(0),
            )
            blocks += _cut(whole, self._row_splits.get(p))
        for chunk in _chunks(blocks, self._max_elements):
            first = chunk[0].weight
            wide = torch.float64 if first.dtype == torch.float64 else torch.float32
            here = [
                None if x is None else x.to(first.device, non_blocking=True).reshape(()) for x in (grad_scale, skip)
            ]
            nothing = first.new_empty(0)
            copies, scales = [b.copy for b in chunk], [b.row_scale for b in chunk]
            muon_update(
                [b.weight for b in chunk],
                [b.grad for b in chunk],
                [b.momentum for b in chunk],
                lr=self._lr(group, first.device),
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                rms_scale=group["rms_scale"],
                copies=[] if copies[0] is None else copies,
                row_scales=[nothing if s is None else s for s in scales] if any(s is not None for s in scales) else [],
                grad_scale=here[0],
                skip=here[1],
                schedule=group["schedule"],
                steps=group["steps"],
                iterate_dtype=self._iterate_dtype or (torch.float16 if first.is_cuda else wide),
            )

    def _lr(self, group: dict[str, Any], device: torch.device) -> float | Tensor:
        """The learning rate; a tensor on `device` stays one if the host may not look into it."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and self._captures():
            return lr.to(device, torch.float32, non_blocking=True).reshape(())
        return float(lr)

    def _has_master(self, p: Tensor) -> bool:
        """Whether there is to be a weight behind a parameter: behind those of half precision, unless turned off."""
        return self._master_weights is not False and p.dtype in (torch.bfloat16, torch.float16)

    def _master(self, p: Tensor) -> Tensor | None:
        """The float32 weight behind a parameter, if there is to be one."""
        if not self._has_master(p):
            return None
        state = self.state[p]
        if "master" not in state:
            state["master"] = p.detach().float()
        elif self._versions.get(p) != p._version:  # written since the last step: where they differ, p counts
            master = state["master"]
            master.copy_(torch.where(master.to(p.dtype) == p, master, p))
        return state["master"]

    def _device_of(self, group: dict[str, Any]) -> torch.device:
        """Where the parameters are: those of `group`, or of any other if it has none."""
        return next((p.device for g in (group, *self.param_groups) for p in g["params"]), torch.device("cpu"))

    def _skipped(self) -> None:
        """Called instead of the updates when the gradients overflowed."""

    def _updated(self, skip: Tensor | None) -> None:
        """Called after the updates of a step."""

    def _stored(self, p: Tensor) -> torch.dtype:
        return torch.float64 if p.dtype == torch.float64 else self._momentum_dtype

    def _state_of(self, group: dict[str, Any], p: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the state that a parameter has after its first step."""
        return {"momentum_buffer": (tuple(p.shape), self._stored(p))}

    def _optional_state_of(self, p: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The same for state that may be missing when it is loaded."""
        return {"master": (tuple(p.shape), torch.float32)} if self._has_master(p) else {}

    def _options_of(self, group: dict[str, Any]) -> set[str]:
        """The options that a step reads; others (a scheduler's) may stand in the group too."""
        return set(self.defaults)

    def _saved_parameters(self, state_dict: dict[str, Any]) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """Each parameter with its number in `state_dict` and its group."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            for saved_id, p in zip(saved["params"], group["params"]):
                yield saved_id, p, group

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        def require(got: Any, wanted: Any, what: str) -> None:
            if got != wanted:
                raise ValueError(f"{self._name}.load_state_dict: {what} must be {wanted}, got {got}")

        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
            got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"{self._name}.load_state_dict: state_dict must be what state_dict() returned, got {got}")
        saved_groups = state_dict["param_groups"]
        require(len(saved_groups), len(self.param_groups), "number of parameter groups")
        for i, (saved, group) in enumerate(zip(saved_groups, self.param_groups)):
            require(len(saved["params"]), len(group["params"]), f"number of parameters of group {i}")
            require(saved.get("method"), group.get("method"), f"method of group {i}")
            names = group.get("param_names") or list(map(str, saved["params"]))
            for name, saved_name in zip(names, saved.get("param_names") or names):
                require(saved_name, name, f"parameter names of group {i}")
            options = self._options_of(group)
            if lacking := sorted(options - saved.keys()):
                raise ValueError(
                    f"{self._name}.load_state_dict: options of group {i} must be {sorted(options)}, got none for "
                    f"{lacking}; of another optimizer, take the state and this one's param_groups"
                )
            self._check_group({**saved, "params": group["params"], "param_names": names})
            for saved_id, p, name in zip(saved["params"], group["params"], names):
                entries = dict(state_dict["state"].get(saved_id, {}))
                expected, optional = self._state_of(group, p), self._optional_state_of(p)
                if "master" in entries and "master" not in optional:
                    self._check_surplus_master(name, p, entries.pop("master"))
                if core := sorted(entries.keys() - optional.keys()):
                    require(core, sorted(expected), f"state of {name}")
                expected |= optional
                for key, value in entries.items():
                    shape, dtype = expected[key]
                    if tuple(value.shape) != shape:
                        require((tuple(value.shape), value.dtype), (shape, dtype), f"{key} of {name}")
                    if torch.promote_types(value.dtype, dtype) != dtype:
                        raise ValueError(
                            f"{self._name}.load_state_dict: {key} of {name} must be {dtype}, or exact in it, got "
                            f"{value.dtype}; keep that (momentum_dtype, dtype of the parameters), or cast the state if "
                            "it may be rounded"
                        )

    def _check_surplus_master(self, name: str, p: Tensor, master: Tensor) -> None:
        """Refuses a saved master weight for a parameter that has none, unless the parameter is that weight."""
        if p.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"{self._name}.load_state_dict: master of {name} must not be there with master_weights=False, as the "
                "weights would be rounded; pass master_weights=None, or take the masters out of the state"
            )
        if p.shape != master.shape or not torch.equal(p.detach(), master.to(p.device, p.dtype)):
            raise ValueError(
                f"{self._name}.load_state_dict: {name} ({p.dtype}) must equal its saved float32 master weight; copy "
                "state['master'] into the parameter first"
            )


def check_number(what: str, value: Any, *, below: float = math.inf) -> None:
    """Raises TypeError or ValueError unless `value`, which may be a tensor, is a number of at least 0 and `below`."""
    if not isinstance(value, (numbers.Real, Tensor)) or isinstance(value, bool):
        raise TypeError(f"{what} must be a number, got {value!r}")
    if not 0 <= float(value) < below:
        limit = "finite and at least 0" if below == math.inf else f"in [0, {below})"
        raise ValueError(f"{what} must be {limit}, got {value}")


def _named(group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a group, with names or numbers."""
    params = group["params"]
    return zip(group.get("param_names") or [f"parameter {i}" for i in range(len(params))], params)


def _stacked(t: Tensor) -> Tensor:
    return t if t.ndim == 3 else t.unsqueeze(0)


def _cut(whole: Blocks, rows: tuple[int, ...] | None) -> list[Blocks]:
    """Views of matrices [k, m, n] cut into blocks of `rows`; equal ones are one view, where strides allow it."""
    if rows is None:
        return [whole]
    if len(set(rows)) == 1:
        try:
            return [Blocks(*(None if t is None else t.view(-1, rows[0], *t.shape[2:]) for t in whole))]
        except RuntimeError:  # stacked matrices that do not follow one another
            pass
    count = len(rows)
    return [Blocks(*b) for b in zip(*([None] * count if t is None else t.split(rows, dim=1) for t in whole))]


def _chunks(blocks: Sequence[Blocks], max_elements: int) -> Iterator[list[Blocks]]:
    """Runs of blocks of one device and precision, equal shapes together, of at most `max_elements` (or one matrix)."""

    def kind(block: Blocks) -> tuple[Any, ...]:
        w = block.weight
        return str(w.device), w.dtype == torch.float64, block.copy is not None, tuple(w.shape[1:])

    chunk: list[Blocks] = []
    room = max_elements
    for block in sorted((b for b in blocks if b.weight.numel()), key=kind):
        count, m, n = block.weight.shape
        most = max(1, max_elements // (m * n))
        for first in range(0, count, most):
            part = block if most >= count else Blocks(*(None if t is None else t[first : first + most] for t in block))
            if chunk and (part.weight.numel() > room or kind(part)[:-1] != kind(chunk[0])[:-1]):
                yield chunk
                chunk, room = [], max_elements
            chunk.append(part)
            room -= part.weight.numel()
    if chunk:
        yield chunk
