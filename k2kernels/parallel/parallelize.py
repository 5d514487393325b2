"""A whole model over the ranks of a mesh, for training: experts over "ep", every weight's shards by torch's FSDP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from k2kernels._backend import UnsupportedError
from k2kernels.model.layer import DecoderLayer
from k2kernels.model.moe import Experts, Moe, Router
from k2kernels.ops._check import FLOATS
from k2kernels.parallel.layout import Layout
from k2kernels.parallel.model import expert_parallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=nn.Module)
HALVES = (torch.bfloat16, torch.float16)


def parallelize(
    model: Model,
    mesh: DeviceMesh | Layout,
    *,
    max_tokens: int,
    fsdp: bool = True,
    checkpoint_activations: bool = False,
    compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> Model:
    """Distributes a `K2Model` over the ranks of a mesh for training, each rank with its own tokens; call it on all.

    Every rank must have the same weights, or meta tensors, which stay so. Create the optimizer afterwards, with
    `MuonClip(model, lr, mesh=mesh)`. A step:

        loss.backward()  # of this rank's tokens; as many backward passes as there are micro-batches
        layout.reduce_gradients(model)  # nothing to do with fsdp
        layout.reduce_statistics(model)
        optimizer.step()
        model.update_router_bias(1e-3)

    Gradients are then means over the losses of all ranks: of the tokens of all ranks, if each loss is the mean over a
    rank's tokens and these are equally many. Names of modules and parameters do not change.

    - Experts are DTensors, Shard(0) over "ep": rows of tokens go to them (see `expert_parallel`).
    - With fsdp=True the rest is sharded over all ranks by `fully_shard`: each layer, embedding and head are gathered
      for their forward and their backward pass. Where the experts have replicas (over "dp"), these are sharded too, by
      whole matrices; with ep = 1, over all ranks like any other weight.
    - With fsdp=False every rank keeps all weights but the experts of other ranks.

    Args:
        model: changed in place. Its class stays a subclass of what it was. A part of a `K2Model`, as a pipeline stage,
            is treated alike.
        mesh: with the dimensions "dp" and "ep" (see `make_mesh`), or its `Layout`.
        max_tokens: the most tokens of a rank in one call: batch times length.
        fsdp: as above.
        checkpoint_activations: each decoder layer keeps its input for the backward pass, and is run again there.
        compute_dtype: None, or torch.bfloat16 with float32 weights and fsdp: products are computed in bfloat16 from
            weights that are rounded when they are gathered, gradients are added up over the ranks in float32, and the
            weights stay float32 (MuonClip needs no other masters). The router is computed in float32 from its float32
            weight. Gradients of bfloat16 weights are added up in float32 over the ranks too, but kept in bfloat16.
        options: capacity, transport and others of `expert_parallel`, but gradients, which is "mean"; micro_batches is
            for fsdp=False.

    Returns:
        The model.

    Raises:
        ValueError: the model is distributed already, or its weights are not of one floating-point dtype; and what
            `expert_parallel` and `Layout` raise.
        UnsupportedError: other compute dtypes, and MTP layers with tied embeddings or several micro-batches under fsdp.
    """
    layout = Layout.of(mesh)
    _check(model, fsdp, compute_dtype)
    if fsdp and options.get("micro_batches", 1) != 1:
        raise UnsupportedError(
            "parallelize: micro_batches must be 1 with fsdp, whose gathered weights belong to one stream, got "
            f"{options['micro_batches']}; pass fsdp=False"
        )
    if any(isinstance(module, Moe) for module in model.modules()):
        expert_parallel(model, layout, max_tokens=max_tokens, gradients="mean", **options)
    else:
        layout.shard_experts(model)  # none; the model learns about its ranks
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            module.checkpoints = checkpoint_activations
        elif hasattr(module, "statistics_reduced"):  # a K2Model
            module.gradients = "mean"  # a stage of a pipeline may have no experts
    if fsdp:
        _fully_shard(model, layout, compute_dtype)
    return model


def _check(model: nn.Module, fsdp: bool, compute_dtype: torch.dtype | None) -> None:
    from torch.distributed.fsdp import FSDPModule

    if not any(isinstance(module, DecoderLayer) for module in model.modules()):
        raise ValueError(f"parallelize: model must have decoder layers, got a {type(model).__name__} without")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("parallelize: model must not be distributed yet, got one with fully_shard modules")
    dtypes = {p.dtype for p in model.parameters()}
    if fsdp and not (len(dtypes) == 1 and dtypes <= set(FLOATS)):
        raise ValueError(
            "parallelize: with fsdp the weights must be of one dtype of float32, bfloat16, float16 or float64, got "
            f"{sorted(map(str, dtypes))}; load the model without keep_fp8, or pass fsdp=False"
        )
    if compute_dtype is not None and (compute_dtype != torch.bfloat16 or not fsdp or dtypes != {torch.float32}):
        raise UnsupportedError(
            "parallelize: compute_dtype must be None, or torch.bfloat16 with fsdp and float32 weights, got "
            f"{compute_dtype} with fsdp={fsdp} and {sorted(map(str, dtypes))}"
        )
    if fsdp and _tied(model) and getattr(model, "mtp_layers", ()):
        raise UnsupportedError("parallelize: with fsdp embedding and head must not share a weight beside MTP layers")


def _tied(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "tie_word_embeddings", False))


def _fully_shard(model: nn.Module, layout: Layout, compute_dtype: torch.dtype | None) -> None:
    """One unit of FSDP for each decoder layer, its router in float32, its experts over "dp", embedding and head.

    What is left, the final norm, is the root's. Weights are sharded again after each forward pass, the root's too, so
    that `model.parameters()` are always the shards, and `mtp_logits` can call embedding, head and its layers after the
    model's own forward pass: each call gathers what it needs.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = next(model.parameters()).dtype
    reduce_dtype = torch.float32 if compute_dtype is not None or dtype in HALVES else None
    # Inputs are not cast: routing weights, rotary embeddings and the router's rows have their own dtypes.
    policy = MixedPrecisionPolicy(compute_dtype, reduce_dtype, cast_forward_inputs=False)
    of_router = MixedPrecisionPolicy(None, reduce_dtype, cast_forward_inputs=False)
    whole = dict(mesh=layout.flat, reshard_after_forward=True)
    ignored: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, Experts):
            module.pack_once = False  # the version of a gathered weight does not tell whether it has changed
        if isinstance(module, Experts) and module.ranks is not None:
            module.compute_dtype = compute_dtype
            if layout.dp is not None and layout.dp.size() > 1:
                fully_shard(module, mesh=layout.dp, reshard_after_forward=True, mp_policy=policy)
            else:  # not FSDP's
                ignored |= set(module.parameters(recurse=False))
        elif isinstance(module, Router) and compute_dtype is not None:
            fully_shard(module, **whole, mp_policy=of_router)
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    for layer in layers:
        fully_shard(layer, **whole, mp_policy=policy, ignored_params=ignored)
    inside = {module for layer in layers for module in layer.modules()}
    outside = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.Linear)) and m not in inside]
    for modules in [outside] if _tied(model) else [[module] for module in outside]:
        fully_shard(modules if len(modules) > 1 else modules[0], **whole, mp_policy=policy)
    fully_shard(model, **whole, mp_policy=policy, ignored_params=ignored)
