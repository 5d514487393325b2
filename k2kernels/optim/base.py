"""What Muon and MuonClip share: an optimizer whose parameter groups are updated by rules.

`RuleOptimizer` owns the groups and their checks, master weights, the detection of overflow, and the checks of a state
that is loaded. A `step` is `_begin`, for each group its rule's `update`, then `_end`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from k2kernels.optim.rules import Member, Rule, Specs, Step, named_parameters

HALVES = (torch.bfloat16, torch.float16)


class RuleOptimizer(Optimizer):
    """A torch optimizer whose groups are updated by rules: by the one of their "method", or by "muon" without one.

    Args:
        params, defaults: as `torch.optim.Optimizer` takes them.
        rules: method -> its rule.
        options: method -> the options that its groups must have. Others (a scheduler's) may be there too.
        master_weights, skip_non_finite, capturable: as in `Muon`.
    """

    # With it, GradScaler also calls step() on overflow, and passes scale and overflow in `grad_scale` and `found_inf`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        rules: Mapping[str, Rule],
        options: Mapping[str, Iterable[str]],
        *,
        master_weights: bool | None,
        skip_non_finite: bool,
        capturable: bool | None,
    ):
        self._name = type(self).__name__
        if not isinstance(skip_non_finite, bool):
            raise TypeError(f"{self._name}: skip_non_finite must be True or False, got {skip_non_finite!r}")
        for option, value in (("master_weights", master_weights), ("capturable", capturable)):
            if not isinstance(value, (bool, type(None))):
                raise TypeError(f"{self._name}: {option} must be True, False or None, got {value!r}")
        self._master_weights, self._skip_non_finite, self._capturable = master_weights, skip_non_finite, capturable
        self._rules, self._options = dict(rules), {method: set(names) for method, names in options.items()}
        self._more_state: dict[Tensor, Specs] = {}  # what a parameter's state may hold beside its rule's and a master
        self._versions: dict[Tensor, int] = {}  # of parameters with a master weight, after the last step
        self.last_skipped: bool | Tensor = False
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in any torch optimizer."""
        super().add_param_group(param_group)
        self._check_group(self.param_groups[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Everything, so that copy.deepcopy((model, optimizer)) gives a working pair; torch keeps only the groups."""
        return self.__dict__.copy()

    # ---- a step

    def _begin(self, closure: Callable[[], Any] | None) -> tuple[Any, Step | None]:
        """Calls `closure`; returns its result, and the step to make: None if the gradients overflowed."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_grads()
        skip, captures = self._overflow(), self._captures()
        if not captures:
            self.last_skipped = skip is not None and bool(skip)
            if self.last_skipped:
                return loss, None
            skip = None
        elif skip is not None:
            self.last_skipped = skip
        return loss, Step(captures, getattr(self, "grad_scale", None), skip, {})

    def _rule(self, group: dict[str, Any]) -> Rule:
        return self._rules[group.get("method", "muon")]

    def _members(self, group: dict[str, Any]) -> list[Member]:
        """The parameters of a group that have a gradient; their masters are up to date."""
        members = [Member(p, self.state[p]) for p in group["params"] if p.grad is not None]
        for p, _ in members:
            self._refresh_master(p)
        return members

    def _end(self) -> None:
        """Records the versions of parameters, to detect writes before the next step."""
        self._versions = {p: p._version for p, state in self.state.items() if "master" in state}

    def _check_grads(self) -> None:
        """Raises for gradients that are not supported, before anything has changed."""
        absent = []
        for group in self.param_groups:
            for name, p in named_parameters(group):
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
        """Whether all decisions are made on the device."""
        if self._capturable is not None:
            return self._capturable
        return any(p.is_cuda for group in self.param_groups for p in group["params"][:1])

    def _overflow(self) -> Tensor | None:
        """Whether any gradient is not finite, as a bool tensor, from GradScaler's found_inf or (skip_non_finite) the
        gradients; None if neither is checked."""
        found = getattr(self, "found_inf", None)
        skip = None if found is None else found > 0
        if self._skip_non_finite:
            grads = [g for g in self._gradients() if g.numel()]
            if grads:
                # Largest magnitudes: unlike sums of squares they do not overflow where the gradients have not.
                largest = torch._foreach_norm(grads, torch.inf)
                here = ~torch.stack([x.to(grads[0].device) for x in largest]).isfinite().all()
                skip = here if skip is None else skip.to(here.device) | here
        return skip if skip is None else skip.reshape(())

    def _gradients(self) -> list[Tensor]:
        """All gradients."""
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _has_master(self, p: Tensor) -> bool:
        """Whether a parameter has a master weight: those of half precision do, unless turned off."""
        return self._master_weights is not False and p.dtype in HALVES

    def _refresh_master(self, p: Tensor) -> None:
        """Makes the float32 master weight of a parameter, or takes over what was written to the parameter."""
        if not self._has_master(p):
            return
        state = self.state[p]
        if "master" not in state:
            state["master"] = p.detach().float()
        elif self._versions.get(p) != p._version:  # written since the last step: where they differ, p counts
            master = state["master"]
            master.copy_(torch.where(master.to(p.dtype) == p, master, p))

    def _device_of(self, group: dict[str, Any]) -> torch.device:
        """Where the parameters are: those of `group`, or of any other if it has none."""
        return next((p.device for g in (group, *self.param_groups) for p in g["params"]), torch.device("cpu"))

    # ---- groups and states

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_parameters(named_parameters(group))
        self._rule(group).check(group)

    def _check_parameters(self, named: Iterable[tuple[str, Tensor]]) -> None:
        check_parameters(type(self).__name__, named)

    def _optional_state(self, p: Tensor) -> Specs:
        """State that may be missing when it is loaded."""
        master = {"master": (tuple(p.shape), torch.float32)} if self._has_master(p) else {}
        return master | self._more_state.get(p, {})

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
        self._load_checked(state_dict)

    def _load_checked(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype, which would round the float32 momentum of bfloat16 parameters.
        captures = self._captures()
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            for saved_id, p in zip(saved["params"], group["params"]):
                wanted = self._rule(group).state(p) | self._optional_state(p)
                for key, value in state_dict["state"].get(saved_id, {}).items():
                    if key in wanted:
                        device = "cpu" if key == "step" and not captures else p.device
                        self.state[p][key] = value.detach().clone().to(device, wanted[key][1])
                    else:  # a master weight, which the parameter equals
                        del self.state[p][key]
        self._versions = {}
        if captures:  # a copy from the host would be a constant of the graph
            for group in self.param_groups:
                for key, value in group.items():
                    if isinstance(value, Tensor):
                        group[key] = value.to(self._device_of(group))

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        where = f"{self._name}.load_state_dict"

        def require(got: Any, wanted: Any, what: str) -> None:
            if got != wanted:
                raise ValueError(f"{where}: {what} must be {wanted}, got {got}")

        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
            got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"{where}: state_dict must be what state_dict() returned, got {got}")
        saved_groups = state_dict["param_groups"]
        require(len(saved_groups), len(self.param_groups), "number of parameter groups")
        for i, (saved, group) in enumerate(zip(saved_groups, self.param_groups)):
            require(len(saved["params"]), len(group["params"]), f"number of parameters of group {i}")
            require(saved.get("method"), group.get("method"), f"method of group {i}")
            names = group.get("param_names") or list(map(str, saved["params"]))
            for name, saved_name in zip(names, saved.get("param_names") or names):
                require(saved_name, name, f"parameter names of group {i}")
            options = self._options[group.get("method", "muon")]
            if lacking := sorted(options - saved.keys()):
                raise ValueError(
                    f"{where}: options of group {i} must be {sorted(options)}, got none for {lacking}; of another "
                    "optimizer, take the state and this one's param_groups"
                )
            self._check_group({**saved, "params": group["params"], "param_names": names})
            for saved_id, p, name in zip(saved["params"], group["params"], names):
                entries = dict(state_dict["state"].get(saved_id, {}))
                expected, optional = self._rule(group).state(p), self._optional_state(p)
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
                            f"{where}: {key} of {name} must be {dtype}, or exact in it, got {value.dtype}; keep that "
                            "(momentum_dtype, dtype of the parameters), or cast the state if it may be rounded"
                        )

    def _check_surplus_master(self, name: str, p: Tensor, master: Tensor) -> None:
        """Refuses a saved master weight for a parameter that has none, unless the parameter equals it."""
        if p.dtype in HALVES:
            raise ValueError(
                f"{self._name}.load_state_dict: master of {name} must be absent with master_weights=False, as the "
                "weights would be rounded; pass master_weights=None, or take the masters out of the state"
            )
        if p.shape != master.shape or not torch.equal(p.detach(), master.to(p.device, p.dtype)):
            raise ValueError(
                f"{self._name}.load_state_dict: {name} ({p.dtype}) must equal its saved float32 master weight; copy "
                "state['master'] into the parameter first"
            )


def check_parameters(owner: str, named: Iterable[tuple[str, Tensor]]) -> None:
    """Raises TypeError or ValueError for parameters that no rule takes."""
    for name, p in named:
        if p.is_complex():
            raise TypeError(f"{owner}: complex parameters are not supported, got {name} {p.dtype}")
        # DTensors; the flat parameters of FSDP1, and the views of them that keep their names.
        if any(hasattr(p, mark) for mark in ("device_mesh", "_is_flat_param", "_fsdp_flattened")):
            raise ValueError(
                f"{owner}: {name} must be a whole parameter, got a shard (DTensor or FSDP); take "
                "k2kernels.parallel.MuonClip, which serves fully_shard, or keep all parameters on every rank, with "
                "averaged gradients (DistributedDataParallel)"
            )
