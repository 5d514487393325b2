"""Attention of whole sequences with expanded keys and values (training and prefill): the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments, check_cu_seqlens
from k2kernels.ops._register import declare
from k2kernels.ops.mla_decode import MlaOutput
from k2kernels.reference import mla_prefill as reference
from k2kernels.reference._numeric import wide_dtype


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool = True,
    return_max_logits: bool = False,
) -> MlaOutput:
    """softmax(softmax_scale * q k^T) v for each sequence and head of a packed batch.

    Args:
        q: [Tq, H, Dqk]; bfloat16, float16, float32 or float64. Kimi-K2 has Dqk = 192 (128 and 64 rotary), Dv = 128.
        k: [Tk, H, Dqk] in q's dtype.
        v: [Tk, H, Dv] in q's dtype.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1]; sequence b has the tokens cu_seqlens[b] to cu_seqlens[b + 1]. Tokens
            behind the last sequence belong to none.
        softmax_scale: factor of the logits.
        causal: align the ends: query i of s_q sees keys < s_k - s_q + i + 1.
        return_max_logits: also return the largest logit of each row (what QK-clip watches).

    Returns:
        out [Tq, H, Dv] in q's dtype; lse [Tq, H], the natural logarithm of the sum of exponentials; max_logits [Tq, H],
        the maximum of the scaled, masked logits, or None. lse and max_logits are float32 (float64 for float64).
        A row that sees no key, or belongs to no sequence, has out 0, lse -inf and max_logits -inf. Differentiable in q,
        k and v through out and lse; max_logits carries no gradient.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and, on a CPU, for cu_seqlens that do not rise from 0 to at
            most the number of tokens.

    Source: FlashAttention-2 (Dao, 2023) for the backward from lse; the varlen argument convention is flash-attention's
    (flash_attn_interface.py).
    """
    args = Arguments("mla_prefill")
    q = args.tensor("q", q, ("Tq", "H", "Dqk"), FLOATS)
    k = args.tensor("k", k, ("Tk", "H", "Dqk"), q.dtype)
    v = args.tensor("v", v, ("Tk", "H", "Dv"), q.dtype)
    cu_seqlens_q = args.tensor("cu_seqlens_q", cu_seqlens_q, ("B+1",), torch.int32)
    cu_seqlens_k = args.tensor("cu_seqlens_k", cu_seqlens_k, ("B+1",), torch.int32)
    args.require(cu_seqlens_q.shape[0] > 0, "cu_seqlens_q", "of length B + 1", cu_seqlens_q.shape)
    softmax_scale = args.number("softmax_scale", softmax_scale, positive=True)
    args.boolean("causal", causal)
    args.boolean("return_max_logits", return_max_logits)
    out, lse, max_logits = _mla_prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, return_max_logits)
    return MlaOutput(out, lse, max_logits if return_max_logits else None)


def _validate(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    check_cu_seqlens("mla_prefill", "cu_seqlens_q", cu_seqlens_q, q.shape[0], padded=True)
    check_cu_seqlens("mla_prefill", "cu_seqlens_k", cu_seqlens_k, k.shape[0], padded=True)


def _outputs(q: Tensor, v: Tensor, return_max_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
    row_dtype = wide_dtype(q.dtype)
    tokens, heads = q.shape[:2]
    lse = q.new_empty(tokens, heads, dtype=row_dtype)
    max_logits = q.new_empty((tokens, heads) if return_max_logits else 0, dtype=row_dtype)
    return q.new_empty(tokens, heads, v.shape[-1]), lse, max_logits


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, ctx.softmax_scale, ctx.causal, _ = inputs
    out, lse, max_logits = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(max_logits)


def _grad(ctx: Any, grad_out: Tensor, grad_lse: Tensor, _: Tensor) -> tuple:
    grads = _mla_prefill_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.softmax_scale, ctx.causal)
    return (*grads, None, None, None, None, None)


_mla_prefill = declare(
    reference.mla_prefill,
    outputs=_outputs,
    validate=_validate,
    setup_context=_setup_context,
    backward=_grad,
)
_mla_prefill_backward = declare(
    reference.mla_prefill_backward,
    outputs=lambda q, k, v: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)
