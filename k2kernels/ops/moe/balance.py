"""An even load of the experts: a loss, and a step of the router bias. The public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, INDICES, Arguments, check_cu_seqlens
from k2kernels.ops._constants import constants
from k2kernels.ops._launch import launch, matrices
from k2kernels.ops._register import declare
from k2kernels.ops.moe._limits import check_indices, float32, unserved
from k2kernels.reference import moe as reference
from k2kernels.reference._numeric import wide_dtype


def moe_sequence_loss(
    logits: Tensor,
    indices: Tensor,
    *,
    top_k: int,
    alpha: float,
    cu_seqlens: Tensor | None = None,
    score: str = "sigmoid",
) -> Tensor:
    """The sequence-wise balance loss: alpha * mean over sequences of sum_e f_e P_e.

    In a sequence of L tokens, f_e = E / (K L) * (number of its `indices` equal to e) and P_e = mean over its tokens of
    s_e / sum(s), with s the scores of the logits. Balanced routing gives alpha. Nothing else is scaled: not by the
    batch, not by ranks.

    Args:
        logits: [T, E], as in `moe_route`.
        indices: int32 or int64 [T, K]. They are counted as given. DeepSeek-V3 counts the choice without the bias: for
            that, pass `moe_route(logits, top_k=K).indices`. Index -1 is not counted.
        top_k: K.
        cu_seqlens: int32 or int64 [B+1], from 0 to T: where each of B sequences begins and ends; None is one
            sequence. Empty sequences do not count in the mean.
        score: as in `moe_route`.

    Returns:
        A float32 scalar (float64 for float64 logits), 0 for T=0; differentiable in logits through P.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and, on a CPU, for indices below -1 or from E on, or for
            cu_seqlens that do not rise from 0 to T.

    Source: DeepSeek-V3 report (arXiv 2412.19437), equations 17 to 20.
    """
    args = Arguments("moe_sequence_loss")
    logits = args.tensor("logits", logits, ("T", "E"), FLOATS)
    indices = args.tensor("indices", indices, ("T", "K"), INDICES)
    cu_seqlens = args.optional("cu_seqlens", cu_seqlens, ("B+1",), INDICES)
    args.choice("score", score, ("sigmoid", "softmax"))
    args.integer("top_k", top_k, 1)
    args.require(top_k == indices.shape[1], "top_k", lambda: f"the width of indices, {indices.shape[1]}", top_k)
    alpha = args.number("alpha", alpha)
    args.require(cu_seqlens is None or cu_seqlens.numel() > 0, "cu_seqlens", "at least [0]", "an empty tensor")
    return _moe_sequence_loss(logits, indices, cu_seqlens, alpha, score)


def moe_update_bias(bias: Tensor, counts: Tensor, *, rate: float, mode: str = "sign") -> Tensor:
    """One step of the router bias against the load: busy experts down, idle ones up. Not in place.

    Args:
        bias: float32 [E].
        counts: int32 or int64 [E], the load of one global batch: `Routing.counts`, summed over micro-batches and ranks
            *as integers* (in bfloat16 40,840 reads as 40,704 or 41,216, which flips signs).
        rate: the largest step.
        mode: "sign": rate * sign(mean(counts) - count), 0 at the mean (DeepSeek-V3).
            "quantile": rate * (experts busier - experts idler) / (E - 1): a step by the load's rank among all loads,
            from -rate for the busiest to rate for the idlest, 0 for the median and for equal loads. The steps add up
            to 0, so the bias does not drift as a whole. It sees counts only; it is not the score-histogram solve of
            Kimi-K3.

    Returns:
        The new bias, float32 [E]. Comparisons are made in integers and are exact, for loads below 2**63 / E.

    Raises:
        TypeError, ValueError: for dtypes (a bias not in float32, counts not integers), shapes and mode.

    Source: Wang et al., "Auxiliary-Loss-Free Load Balancing" (arXiv 2408.15664).
    """
    args = Arguments("moe_update_bias")
    bias = args.tensor("bias", bias, ("E",), torch.float32, remedy="keep the bias in float32")
    counts = args.tensor("counts", counts, ("E",), INDICES, remedy="count in integers")
    args.choice("mode", mode, ("sign", "quantile"))
    return _moe_update_bias(bias, counts, args.number("rate", rate), mode)


def _validate(logits: Tensor, indices: Tensor, cu_seqlens: Tensor | None) -> None:
    check_indices("moe_sequence_loss", indices, logits.shape[1])
    if cu_seqlens is not None:
        check_cu_seqlens("moe_sequence_loss", "cu_seqlens", cu_seqlens, logits.shape[0])


def _unserved(logits: Tensor, indices: Tensor, cu_seqlens: Tensor | None) -> str | None:
    if logits.shape[0] > 0 and cu_seqlens is not None and cu_seqlens.shape[0] < 2:
        return f"cu_seqlens must end at T={logits.shape[0]} for the kernels, got no sequence"
    return unserved({"logits": logits.dtype}, {"T K of indices": (indices.numel(), 2**31 - 1)})


def _launch(
    op: str,
    logits: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor | None,
    alpha: float,
    score: str,
    *,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
    d_logits: Tensor | None = None,
) -> None:
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    hits = logits.new_zeros((sequences, logits.shape[1]), dtype=torch.int32)
    sums = None if loss is None else logits.new_empty(constants.MOE_LOSS_BLOCKS, dtype=torch.float32)
    operands = matrices(logits), indices.contiguous(), None if cu_seqlens is None else cu_seqlens.contiguous()
    launch("moe_sequence_loss", *operands, alpha, score == "softmax", hits, sums, loss, grad, d_logits, op=op)


def _launch_loss(
    loss: Tensor, logits: Tensor, indices: Tensor, cu_seqlens: Tensor | None, alpha: float, score: str
) -> None:
    _launch("moe_sequence_loss", logits, indices, cu_seqlens, alpha, score, loss=loss)


def _launch_backward(
    d_logits: Tensor,
    grad: Tensor,
    logits: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor | None,
    alpha: float,
    score: str,
) -> None:
    operands = logits, indices, cu_seqlens, alpha, score
    _launch("moe_sequence_loss_backward", *operands, grad=float32(grad), d_logits=d_logits)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    return (_moe_sequence_loss_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 4)


_moe_sequence_loss = declare(
    reference.moe_sequence_loss,
    outputs=lambda logits: logits.new_empty((), dtype=wide_dtype(logits.dtype)),
    launch=_launch_loss,
    unserved=_unserved,
    validate=_validate,
    setup_context=_setup,
    backward=_gradients,
)
_moe_sequence_loss_backward = declare(
    reference.moe_sequence_loss_backward,
    outputs=lambda logits: logits.new_empty(logits.shape),
    launch=_launch_backward,
    unserved=_unserved,
)
_moe_update_bias = declare(
    reference.moe_update_bias,
    outputs=lambda bias: bias.new_empty(bias.shape),
    launch=lambda result, bias, counts, rate, mode: launch(
        "moe_update_bias", bias.contiguous(), counts.contiguous(), rate, mode == "quantile", result
    ),
    unserved=lambda bias: unserved({}, {"E of bias": (bias.shape[0], constants.MOE_MOST_EXPERTS)}),
)
