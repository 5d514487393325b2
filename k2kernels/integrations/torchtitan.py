"""The optimizers of this package in torchtitan: a container of optimizers that resolves their names.

    from k2kernels.integrations.torchtitan import muon_clip

    config = deepseek_v3_debugmodel()  # a Trainer.Config of torchtitan
    config.optimizer = muon_clip(lr=2e-4)

torchtitan looks optimizers up by name in a table of its own. `OptimizersContainer` here is its class with two names
more, for `ParamGroupConfig(optimizer_name=...)`:

- "k2kernels.MuonClip": Muon for matrices and stacks of experts, AdamW for the rest, routed by name and shape. It takes
  all parameters, in one group with the pattern ".*". Where `fully_shard` sharded them over one dimension of a mesh, the
  matrices are distributed over its ranks.
- "k2kernels.Muon": matrices and stacks that are whole on each rank, in any groups, each with its `lr`.

The keys "fused" and "foreach", which torchtitan gives to every group, are dropped. QK-Clip is not included: the
attention of torchtitan does not report its largest logits. Tested with torchtitan 0.3.0, whose container has no public
way to add a name: another version may need another one of this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

try:
    from torchtitan.components import optimizer as titan
except ImportError as error:
    raise ImportError(
        f"k2kernels.integrations.torchtitan: torchtitan must be installed, got {error}; pip install torchtitan==0.3.0"
    ) from error

from k2kernels.optim import Muon, MuonClip

_OF_TITAN = ("fused", "foreach")


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _OF_TITAN}


def _muon(groups: list[dict[str, Any]], **options: Any) -> Muon:
    for group in groups:
        if "lr" not in group:
            raise ValueError("k2kernels.Muon: optimizer_kwargs of each group must have lr, got " + str(sorted(group)))
    return Muon([_options(group) for group in groups], groups[0]["lr"], **options)


def _muon_clip(groups: list[dict[str, Any]], **options: Any) -> MuonClip:
    if len(groups) != 1:
        raise ValueError(
            f"k2kernels.MuonClip: must have one group, of pattern '.*', which it routes itself, got {len(groups)} "
            "groups; see its `rules`"
        )
    group = _options(groups[0])
    parameters = group.pop("params")
    named = list(zip(group.pop("param_names"), parameters))
    mesh = next((p.device_mesh for p in parameters if isinstance(p, DTensor) and p.ndim < 3), None)
    return MuonClip(named, qk_clip=None, mesh=mesh, **group, **options)


FACTORIES: dict[str, Callable[..., Optimizer]] = {"k2kernels.Muon": _muon, "k2kernels.MuonClip": _muon_clip}


class OptimizersContainer(titan.OptimizersContainer):
    """torchtitan's container, with the names of `FACTORIES` beside its own."""

    @dataclass(kw_only=True, slots=True)
    class Config(titan.OptimizersContainer.Config):
        """As torchtitan's."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return FACTORIES.get(name) or titan.OptimizersContainer._resolve_optimizer_factory(name)


def muon_clip(lr: float, **options: Any) -> OptimizersContainer.Config:
    """The configuration of `k2kernels.optim.MuonClip` for all parameters of a model.

    Args:
        lr: learning rate, of AdamW's parameters too unless `adamw=dict(lr=...)` is among the options.
        options: of MuonClip, but for mesh, process_group and qk_clip.
    """
    group = titan.ParamGroupConfig(
        pattern=".*", optimizer_name="k2kernels.MuonClip", optimizer_kwargs=dict(lr=lr, **options)
    )
    return OptimizersContainer.Config(param_groups=[group])
