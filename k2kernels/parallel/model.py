"""Expert parallelism applied to a whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from k2kernels.model.model import K2Model
from k2kernels.model.moe import Moe
from k2kernels.ops._check import Arguments
from k2kernels.parallel.expert import ExpertParallel
from k2kernels.parallel.layout import Layout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def expert_parallel(
    model: nn.Module,
    group: ProcessGroup | DeviceMesh | Layout | None,
    *,
    max_tokens: int,
    capacity: int | None = None,
    gradients: str = "sum",
    micro_batches: int = 1,
    **options: Any,
) -> ExpertParallel:
    """Distributes the routed experts of a `K2Model` (or of any module with `Moe` layers) over the ranks of `group`.

    Each `Moe` keeps the weights of this rank's experts, under the same names: DTensors with Shard(0), so that
    torch.distributed.checkpoint, DistributedDataParallel and `save_pretrained` treat them as what they are. All other
    weights stay on every rank. Call it on every rank, with the same full weights or with a model that
    `K2Model.from_pretrained(mesh=)` has loaded in parts, before creating the optimizer. Each rank then runs the model
    on its own tokens. `gate.expert_counts` and `max_logits` are of this rank: see `Layout.reduce_statistics`.

    Args:
        model: changed in place. DistributedDataParallel must wrap it directly, not a module that contains it.
        group: a process group of all ranks that share the model; or, where the experts have replicas too, a mesh with
            dimensions "dp" and "ep" or its `Layout`; None: all experts stay here.
        max_tokens: the most tokens of a rank in one call: batch times length; with micro_batches, of the largest one.
        capacity: slots for the rows that arrive here in one call, a multiple of 128 where the model is trained in FP8
            (`use_fp8`). None: as many as arrive, or, with "symmetric", as could arrive: the number of ranks times
            max_tokens times top-k at most. Every buffer between dispatch and combine has that many rows. Routing sends
            max_tokens times top-k on average; pairs beyond the capacity are dropped and counted in
            `ExpertParallel.overflow`.
        gradients: an expert's gradient includes the tokens of all W ranks, each by its own loss; other gradients are of
            this rank. "sum": that sum, to which belong other gradients added up over the ranks. "mean": divided by W in
            each backward pass, to which belong gradients averaged over the ranks, as DistributedDataParallel and FSDP
            do. `Layout.reduce_gradients` does what belongs to either. Where the experts have replicas, W is the ranks
            of "ep", and the replicas' gradients are still to be added up, or averaged.
        micro_batches: more than 1, usually 2: each forward pass of the model divides its sequences into so many parts,
            which run through the layers alternately, on a GPU on a stream each, so that one's dispatch and combine can
            run while another is computed; see docs/pipelines.md. Each has its own ExpertParallel, and its own process
            group of the same ranks. A pass has no more parts than sequences; all ranks must have equally many. Passes
            of `k2kernels.engine` (generation) are not divided. `fully_shard` is not supported.
        options: transport, ranks_per_node, init_timeout and step_timeout of `ExpertParallel`.

    Returns:
        The ExpertParallel that all layers share; with micro_batches, that of the first one (those of the others are in
        each layer's `more_exchanges`).

    Raises:
        ValueError: the model has no `Moe`, its experts are distributed already, or their number is not a multiple of
            the ranks (`ExpertParallel` itself takes any number); micro_batches for a module without a `K2Model`; and
            what ExpertParallel raises.
    """
    layers = [module for module in model.modules() if isinstance(module, Moe)]
    if not layers:
        raise ValueError(f"expert_parallel: model must have Moe layers, got a {type(model).__name__} without")
    args = Arguments("expert_parallel")
    args.choice("gradients", gradients, ("sum", "mean"))
    args.integer("micro_batches", micro_batches, 1)
    divides = any(isinstance(module, K2Model) for module in model.modules())
    args.require(micro_batches == 1 or divides, "micro_batches", "1 for a module without a K2Model", micro_batches)
    layout = None
    if group is not None:
        layout = Layout.of(group, device_type=_device_type(layers[0]))
    loaded = {id(layer.experts.ranks): layer.experts.ranks for layer in layers}
    if any(layer.exchange is not None for layer in layers):
        raise ValueError("expert_parallel: model must have all experts, got one whose experts are distributed")
    in_parts = any(ranks is not None for ranks in loaded.values())
    if in_parts and (layout is None or any(ranks is None or ranks.ep != layout.ep for ranks in loaded.values())):
        raise ValueError("expert_parallel: group must be the mesh that the model was loaded with, got another")
    config = layers[0].config
    made = []
    for number in range(micro_batches):
        # Exchanges of one group would wait for one another on NCCL's stream of it.
        group = None if layout is None else layout.ep.get_group() if number == 0 else layout.another_ep()
        made.append(
            ExpertParallel(
                group,
                num_experts=config.n_routed_experts,
                hidden=config.hidden_size,
                top_k=config.num_experts_per_tok,
                max_tokens=max_tokens,
                **options,
            )
        )
    experts = made[0]
    if layout is not None and not in_parts:
        layout.shard_experts(model)
    for layer in layers:
        layer.exchange, layer.more_exchanges, layer.capacity = experts, tuple(made[1:]), capacity
        layer.experts.gradients = gradients
        layer.experts.divisor = experts.world_size if gradients == "mean" else 1
    return experts


def _device_type(layer: Moe) -> str | None:
    """Where the experts are; None: unknown, on the meta device."""
    device = layer.experts.gate_up_proj.device.type
    return None if device == "meta" else device
