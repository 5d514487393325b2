"""Expert parallelism applied to a whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from k2kernels.model.moe import Moe
from k2kernels.parallel.expert import ExpertParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def expert_parallel(
    model: nn.Module,
    group: ProcessGroup | None,
    *,
    max_tokens: int,
    capacity: int | None = None,
    **options: Any,
) -> ExpertParallel:
    """Distributes the routed experts of a `K2Model` (or of any module with `Moe` layers) over the ranks of `group`.

    Each `Moe` keeps the weights of this rank's experts, as parameters of the same names; all other weights stay on
    every rank. Call it on every rank, with the same full weights, before creating the optimizer. Each rank then runs
    the model on its own tokens. The gradient of an expert includes the tokens of all ranks; other gradients,
    `gate.expert_counts` and `max_logits` are of this rank: the training loop must add them up over the ranks (or take
    the largest maxima: see `MuonClip`).

    Args:
        model: changed in place.
        group: as in `ExpertParallel`.
        max_tokens: the most tokens of a rank in one call: batch times length.
        capacity: slots for the rows that arrive here in one call, a multiple of 128 where the model is trained in FP8
            (`use_fp8`). None: as many as arrive, or, with "symmetric", as could arrive: the number of ranks times
            max_tokens times top-k at most. Every buffer between dispatch and combine has that many rows. Routing sends
            max_tokens times top-k on average; pairs beyond the capacity are dropped and counted in
            `ExpertParallel.overflow`.
        options: transport, ranks_per_node, init_timeout and step_timeout of `ExpertParallel`.

    Returns:
        The ExpertParallel that all layers share.

    Raises:
        ValueError: the model has no `Moe`, or its experts are distributed already; and what ExpertParallel raises.
    """
    layers = [module for module in model.modules() if isinstance(module, Moe)]
    if not layers:
        raise ValueError(f"expert_parallel: model must have Moe layers, got a {type(model).__name__} without")
    if any(layer.exchange is not None for layer in layers):
        raise ValueError("expert_parallel: model must have all experts, got one whose experts are distributed")
    config = layers[0].config
    experts = ExpertParallel(
        group,
        num_experts=config.n_routed_experts,
        hidden=config.hidden_size,
        top_k=config.num_experts_per_tok,
        max_tokens=max_tokens,
        **options,
    )
    first = experts.first_expert
    here = slice(first, first + experts.num_local_experts)
    for layer in layers:
        for name, weight in list(layer.experts.named_parameters(recurse=False)):
            part = nn.Parameter(weight.detach()[here].clone(), requires_grad=weight.requires_grad)
            setattr(layer.experts, name, part)
        layer.exchange, layer.capacity = experts, capacity
    return experts
