"""The choice of experts for each token: the public function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments
from k2kernels.ops._constants import constants
from k2kernels.ops._launch import launch, matrices
from k2kernels.ops._register import declare
from k2kernels.ops.moe._limits import float32, unserved
from k2kernels.reference import moe as reference
from k2kernels.reference._numeric import wide_dtype


class Routing(NamedTuple):
    """What `moe_route` returns."""

    indices: Tensor  # int32 [T, K], by descending choice
    weights: Tensor  # float32 (float64 for float64 logits) [T, K]
    counts: Tensor  # int64 [E]: how often each expert was taken


def moe_route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    score: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Chooses `top_k` experts for each token.

    With s = sigmoid(logits) or softmax(logits), a token takes the top_k experts of largest s + bias; the bias steers
    the choice only, the weights are made of s. With groups, the E experts are n_group equal runs, and only experts of
    the topk_group best groups can be taken. A group's score is the sum of its two largest s + bias;
    without a bias, its largest s.

    Args:
        logits: [T, E], float32, bfloat16, float16 or float64; computed in float32 (float64 for float64).
        bias: float32 or float64 [E], or None. No gradient flows to it.
        score: "sigmoid" (DeepSeek-V3, Kimi-K2) or "softmax" (DeepSeek-V2).
        normalize: divides each token's weights by their sum (+ 1e-20).
        scale: multiplies the weights (routed_scaling_factor).

    Returns:
        Routing(indices int32 [T, K], weights [T, K] float32 (float64 for float64 logits), counts int64 [E]).
        indices are in descending order of s + bias; of equals the lowest index comes first. Experts whose logit is NaN
        or -inf have score 0 and are taken only when no other is left, so every row has K distinct experts; +inf counts
        as the largest finite number. Differentiable in logits.

    Raises:
        TypeError, ValueError: for dtypes and shapes, when n_group does not divide E, or when the kept groups hold fewer
            than top_k experts.

    Source: DeepSeek-V3 `inference/model.py` (class Gate), and the routers of Megatron-LM.
    """
    args = Arguments("moe_route")
    logits = args.tensor("logits", logits, ("T", "E"), FLOATS)
    bias = args.optional("bias", bias, ("E",), (torch.float32, torch.float64), remedy="keep the bias in float32")
    experts = logits.shape[1]
    args.choice("score", score, ("sigmoid", "softmax"))
    for name, value in (("top_k", top_k), ("n_group", n_group), ("topk_group", topk_group)):
        args.integer(name, value, 1)
    args.boolean("normalize", normalize)
    scale = args.number("scale", scale)
    args.require(top_k <= experts, "top_k", lambda: f"from 1 to E={experts}", top_k)
    args.require(experts % n_group == 0, "n_group", lambda: f"a divisor of E={experts}", n_group)
    args.require(topk_group <= n_group, "topk_group", lambda: f"from 1 to n_group={n_group}", topk_group)
    kept = topk_group * (experts // n_group)
    args.require(
        top_k <= kept, "top_k", lambda: f"at most the {kept} experts of the kept groups", top_k, "raise topk_group"
    )
    # The op returns the weights first: PyTorch's opcheck sums the outputs, the first of which must be floating point.
    weights, indices, counts = _moe_route(logits, bias, top_k, n_group, topk_group, score, normalize, scale)
    return Routing(indices, weights, counts)


def _outputs(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    return (
        logits.new_empty(tokens, top_k, dtype=wide_dtype(logits.dtype)),
        logits.new_empty(tokens, top_k, dtype=torch.int32),
        logits.new_empty(experts, dtype=torch.int64),
    )


def _launch(
    weights: Tensor,
    indices: Tensor,
    counts: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    n_group: int,
    topk_group: int,
    score: str,
    normalize: bool,
    scale: float,
) -> None:
    if logits.shape[0] > constants.MOE_ROUTE_WARPS:
        counts.zero_()  # several CTAs add to them; a single one writes them
    how = n_group, topk_group, score == "softmax", normalize, scale
    launch("moe_route", matrices(logits), float32(bias), *how, weights, indices, counts)


def _launch_backward(
    d_logits: Tensor, grad: Tensor, logits: Tensor, indices: Tensor, score: str, normalize: bool, scale: float
) -> None:
    operands = float32(grad), matrices(logits), indices.contiguous()
    launch("moe_route_backward", *operands, score == "softmax", normalize, scale, d_logits)


def _unserved(logits: Tensor, top_k: int, n_group: int) -> str | None:
    return unserved(
        {"logits": logits.dtype},
        {
            "E of logits": (logits.shape[1], constants.MOE_MOST_EXPERTS),
            "top_k": (top_k, constants.MOE_MOST_TOP_K),
            "n_group": (n_group, constants.MOE_MOST_GROUPS),
        },
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.rest = inputs[5:]  # score, normalize, scale


def _gradients(ctx: Any, grad: Tensor, _indices: None, _counts: None) -> tuple:
    return (_moe_route_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 7)


_moe_route = declare(
    reference.moe_route,
    outputs=_outputs,
    launch=_launch,
    unserved=_unserved,
    setup_context=_setup,
    backward=_gradients,
)
_moe_route_backward = declare(
    reference.moe_route_backward,
    outputs=lambda logits: logits.new_empty(logits.shape),
    launch=_launch_backward,
    unserved=lambda logits, indices: _unserved(logits, indices.shape[1], 1),
)
