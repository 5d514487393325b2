"""Parallelism applied to a model that knows nothing of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    transport: str = "auto",
    ranks_per_node: int | None = None,
    init_timeout: float | None = None,
    step_timeout: float | None = None,
) -> ExpertParallel:
    """Shares the routed experts of a `K2Model` (or of any module with `Moe` layers) out over the ranks of `group`.

    Each `Moe` keeps the weights of this rank's experts alone, as parameters of the old names; everything else stays on
    every rank. Call it on every rank, with the same full weights, before the optimizer is made. Each rank then runs the
    model on its own tokens. An expert's gradient holds the tokens of all ranks; other gradients, and
    `gate.expert_counts`, hold this rank's: to add them up over the ranks is the trainer's.

    Args:
        model: changed in place.
        group, transport, ranks_per_node, init_timeout, step_timeout: as in `ExpertParallel`.
        max_tokens: the most tokens a rank brings to one call: batch times length.
        capacity: slots for the rows that arrive here in one call, a multiple of 128 where the model is trained in FP8
            (`use_fp8`). None: as many as arrive, or, with "symmetric", as could arrive, which is the number of ranks
            times max_tokens times top-k at most; every buffer between dispatch and combine has so many rows. Routing
            sends max_tokens times top-k on average; what has no room is dropped, and `ExpertParallel.overflow` counts
            it.

    Returns:
        The ExpertParallel that all layers share.

    Raises:
        ValueError: for a model without `Moe`, or one that is shared out already; and what ExpertParallel raises.
    """
    layers = [module for module in model.modules() if isinstance(module, Moe)]
    if not layers:
        raise ValueError(f"expert_parallel: model must have Moe layers, got a {type(model).__name__} without")
    if any(layer.exchange is not None for layer in layers):
        raise ValueError("expert_parallel: model must be a whole one, got one whose experts are shared out already")
    config = layers[0].config
    shared_out = ExpertParallel(
        group,
        num_experts=config.n_routed_experts,
        hidden=config.hidden_size,
        top_k=config.num_experts_per_tok,
        max_tokens=max_tokens,
        transport=transport,
        ranks_per_node=ranks_per_node,
        init_timeout=init_timeout,
        step_timeout=step_timeout,
    )
    first = shared_out.first_expert
    here = slice(first, first + shared_out.num_local_experts)
    for layer in layers:
        for name, weight in list(layer.experts.named_parameters(recurse=False)):
            part = nn.Parameter(weight.detach()[here].clone(), requires_grad=weight.requires_grad)
            setattr(layer.experts, name, part)
        layer.exchange, layer.capacity = shared_out, capacity
    return shared_out
