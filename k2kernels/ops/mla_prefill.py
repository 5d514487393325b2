"""Attention of whole sequences with expanded keys and values (training and prefill): the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments, check_cu_seqlens
from k2kernels.ops._constants import constants
from k2kernels.ops._launch import chip, launch, module, rows_on_16_bytes
from k2kernels.ops._register import declare
from k2kernels.ops.mla_decode import MlaOutput
from k2kernels.reference import mla_prefill as reference
from k2kernels.reference._numeric import wide_dtype


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    k_rope: Tensor | None = None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool = True,
    return_max_logits: bool = False,
) -> MlaOutput:
    """softmax(softmax_scale * q k^T) v for each sequence and head of a packed batch.

    Args:
        q: [Tq, H, Dqk]; bfloat16, float16, float32 or float64. Kimi-K2 has Dqk = 192 (128 nope and 64 rotary dims, in
            this order) and Dv = 128: these have kernels.
        k: [Tk, H, Dqk] in q's dtype; with k_rope [Tk, H, Dqk - R].
        v: [Tk, H, Dv] in q's dtype. It may be None if there is k_rope: k is then [Tk, H, Dqk - R + Dv], keys and
            values side by side as one projection gives them, and has one gradient.
        k_rope: [Tk, R] in q's dtype, the rotary part of the keys, which all heads share; its gradient is summed over
            heads in float32.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1]; sequence b has the tokens cu_seqlens[b] to cu_seqlens[b + 1]. Tokens
            behind the last sequence belong to none.
        softmax_scale: factor of the logits.
        causal: align the ends: query i of s_q sees keys < s_k - s_q + i + 1.
        return_max_logits: also return the largest logit of each row (what QK-clip watches).

    Returns:
        out [Tq, H, Dv] in q's dtype; lse [Tq, H], the natural logarithm of the sum of exponentials; max_logits [Tq, H],
        the maximum of the scaled, masked logits, or None. lse and max_logits are float32 (float64 for float64).
        A row that sees no key, or belongs to no sequence, has out 0, lse -inf and max_logits -inf. Differentiable in q,
        k, v and k_rope through out and lse; max_logits carries no gradient. With k_rope, where k and v are views of
        one [Tk, H, Dk + Dv], so are their gradients (not under torch.compile). The bits of a row of finite
        numbers depend on its own query and keys alone.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and, on a CPU, for cu_seqlens that do not rise from 0 to at
            most the number of tokens.

    Source: FlashAttention-2 (Dao, 2023) for the backward from lse; the varlen argument convention is flash-attention's
    (flash_attn_interface.py).
    """
    args = Arguments("mla_prefill")
    q, k, v, k_rope = _tensors(args, q, k, v, k_rope)
    cu_seqlens_q, cu_seqlens_k = _sequences(args, cu_seqlens_q, cu_seqlens_k)
    softmax_scale = args.number("softmax_scale", softmax_scale, positive=True)
    args.boolean("causal", causal)
    args.boolean("return_max_logits", return_max_logits)
    out, lse, max_logits = _mla_prefill(
        q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, return_max_logits
    )
    return MlaOutput(out, lse, max_logits if return_max_logits else None)


def mla_prefill_piece(
    state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    k_rope: Tensor | None = None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    diagonal: Tensor,
    softmax_scale: float,
    last: bool,
    return_max_logits: bool = False,
) -> Tensor | MlaOutput:
    """Causal `mla_prefill` whose keys come in pieces, one call each: a prompt longer than its expanded keys may be.

    Pieces are in ascending order, and all but the last have a multiple of 128 keys of each sequence that goes on. The
    kernels' results then have the bits of one call with all keys.

    Args:
        state: what the call with the piece before returned; it is overwritten. None: this is the first piece.
        q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, softmax_scale, return_max_logits: as `mla_prefill` takes them;
            the keys are those of the piece.
        diagonal: int32 [B]; query i of sequence b sees the piece's keys up to i + diagonal[b]: the position of its
            first query minus that of the piece's first key.
        last: this is the last piece.

    Returns:
        The state, float32 [Tq, H, Dv + 8] (float64 for float64), to hand to the next call and nothing else; after the
        last piece what `mla_prefill` returns. Not differentiable.

    Raises:
        TypeError, ValueError: as `mla_prefill`.
    """
    args = Arguments("mla_prefill_piece")
    q, k, v, k_rope = _tensors(args, q, k, v, k_rope)
    cu_seqlens_q, cu_seqlens_k = _sequences(args, cu_seqlens_q, cu_seqlens_k)
    diagonal = args.tensor("diagonal", diagonal, (cu_seqlens_q.shape[0] - 1,), torch.int32)
    softmax_scale = args.number("softmax_scale", softmax_scale, positive=True)
    args.boolean("last", last)
    args.boolean("return_max_logits", return_max_logits)
    args.no_gradient(state=state, q=q, k=k, v=v, k_rope=k_rope)
    width = _value_dims(q, k, v, k_rope) + reference.STATE_EXTRA
    first = state is None
    if first:
        state = q.new_empty(0 if last else (*q.shape[:2], width), dtype=wide_dtype(q.dtype))
    else:
        state = args.tensor("state", state, (*q.shape[:2], width), wide_dtype(q.dtype))
        given = state.is_contiguous() and state.data_ptr() % 16 == 0
        args.require(given, "state", "the tensor that the call before returned", "a view or a copy of it")
    out, lse, max_logits = _mla_prefill_piece(
        state, q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, diagonal, softmax_scale, first, last, return_max_logits
    )
    return MlaOutput(out, lse, max_logits if return_max_logits else None) if last else state


def _tensors(
    args: Arguments, q: Any, k: Any, v: Any, k_rope: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    q = args.tensor("q", q, ("Tq", "H", "Dqk"), FLOATS)
    if k_rope is None:
        k = args.tensor("k", k, ("Tk", "H", "Dqk"), q.dtype)
        args.require(v is not None, "v", "a tensor where k_rope is None", None)
        return q, k, args.tensor("v", v, ("Tk", "H", "Dv"), q.dtype), None
    k_rope = args.tensor("k_rope", k_rope, ("Tk", "R"), q.dtype)
    nope = q.shape[-1] - k_rope.shape[-1]
    args.require(nope >= 0, "k_rope", lambda: f"[Tk, R] with R at most q's {q.shape[-1]}", k_rope.shape)
    if v is not None:
        k = args.tensor("k", k, ("Tk", "H", nope), q.dtype, remedy="k_rope holds the rest of q's dims")
        return q, k, args.tensor("v", v, ("Tk", "H", "Dv"), q.dtype), k_rope
    k = args.tensor("k", k, ("Tk", "H", "Dk+Dv"), q.dtype)
    args.require(k.shape[-1] > nope, "k", lambda: f"[Tk, H, more than {nope}] without v, which it holds", k.shape)
    return q, k, None, k_rope


def _sequences(args: Arguments, cu_seqlens_q: Any, cu_seqlens_k: Any) -> tuple[Tensor, Tensor]:
    cu_seqlens_q = args.tensor("cu_seqlens_q", cu_seqlens_q, ("B+1",), torch.int32)
    cu_seqlens_k = args.tensor("cu_seqlens_k", cu_seqlens_k, ("B+1",), torch.int32)
    args.require(cu_seqlens_q.shape[0] > 0, "cu_seqlens_q", "of length B + 1", cu_seqlens_q.shape)
    return cu_seqlens_q, cu_seqlens_k


def _validate(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    check_cu_seqlens("mla_prefill", "cu_seqlens_q", cu_seqlens_q, q.shape[0], padded=True)
    check_cu_seqlens("mla_prefill", "cu_seqlens_k", cu_seqlens_k, k.shape[0], padded=True)


def _value_dims(q: Tensor, k: Tensor, v: Tensor | None, k_rope: Tensor | None) -> int:
    return v.shape[-1] if v is not None else k.shape[-1] - (q.shape[-1] - k_rope.shape[-1])


def _unserved(q: Tensor, k: Tensor, v: Tensor | None, k_rope: Tensor | None, softmax_scale: float) -> str | None:
    """Why the kernels do not serve these arguments."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"kernels take bfloat16 and float16, not {q.dtype}"
    nope, rope, value = constants.PREFILL_NOPE, constants.PREFILL_ROPE, constants.PREFILL_VALUE
    of_rope = rope if k_rope is None else k_rope.shape[-1]
    got = (q.shape[-1] - of_rope, of_rope, _value_dims(q, k, v, k_rope))
    if got != (nope, rope, value):
        return f"kernels take {nope} nope, {rope} rope and {value} value dims, not {got[0]}, {got[1]} and {got[2]}"
    if softmax_scale < torch.finfo(torch.float32).tiny:
        return f"kernels take softmax_scale in float32, not {softmax_scale}"
    if max(len(q), len(k)) > 1 << 30:
        return f"kernels take at most 2**30 tokens, not {max(len(q), len(k))}"
    return None


# ---- forward


def _outputs(
    q: Tensor, k: Tensor, v: Tensor | None, k_rope: Tensor | None, return_max_logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, row_dtype = q.shape[:2], wide_dtype(q.dtype)
    max_logits = q.new_empty(rows if return_max_logits else 0, dtype=row_dtype)
    return q.new_empty(*rows, _value_dims(q, k, v, k_rope)), q.new_empty(rows, dtype=row_dtype), max_logits


def _piece_outputs(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor | None, k_rope: Tensor | None, last: bool, return_max_logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if last:
        return _outputs(q, k, v, k_rope, return_max_logits)
    return q.new_empty(0), state.new_empty(0), state.new_empty(0)


def _rows(x: Tensor) -> Tensor:
    """x [T, ..., D] as the kernels take it; copied only if it must be."""
    return rows_on_16_bytes(x, distinct=True)


def _operands(
    q: Tensor, k: Tensor, v: Tensor | None, k_rope: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As the kernels take them."""
    return _rows(q), _rows(k), None if v is None else _rows(v), None if k_rope is None else _rows(k_rope)


def _launch(
    out: Tensor,
    lse: Tensor,
    max_logits: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    k_rope: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
    diagonal: Tensor | None = None,
    state_in: Tensor | None = None,
    state_out: Tensor | None = None,
    *,
    op: str = "mla_prefill",
) -> None:
    if q.numel() == 0:
        return
    q, k, v, k_rope = _operands(q, k, v, k_rope)
    plan = module(q.device).mla_prefill_plan(chip(q.device), q, k, v, k_rope)
    ticket = q.new_zeros(1, dtype=torch.int32)
    launch(
        "mla_prefill", q, k, v, k_rope, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), diagonal, softmax_scale,
        causal, out, lse, max_logits, state_in, state_out, ticket, plan, op=op,
    )  # fmt: skip


def _launch_piece(
    out: Tensor,
    lse: Tensor,
    max_logits: Tensor,
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    k_rope: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    diagonal: Tensor,
    softmax_scale: float,
    first: bool,
    last: bool,
) -> None:
    _launch(
        out, lse, max_logits, q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, softmax_scale, True, diagonal.contiguous(),
        None if first else state, None if last else state, op="mla_prefill_piece",
    )  # fmt: skip


# ---- backward


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, ctx.softmax_scale, ctx.causal, _ = inputs
    out, lse, max_logits = output
    ctx.save_for_backward(q, k, v, k_rope, out, lse, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(max_logits)


def _grad(ctx: Any, grad_out: Tensor, grad_lse: Tensor, _: Tensor) -> tuple:
    q, k, v, k_rope, *rest = ctx.saved_tensors
    kv = None if v is None or k_rope is None else _side_by_side(k, v)
    keys = (k, v) if kv is None else (kv, None)
    grad_q, grad_k, grad_v, grad_k_rope = _mla_prefill_backward(
        grad_out, grad_lse, q, *keys, k_rope, *rest, ctx.softmax_scale, ctx.causal
    )
    if kv is not None:
        grad_k, grad_v = grad_k.split([k.shape[-1], v.shape[-1]], dim=-1)
    grads = (grad_q, grad_k, None if v is None else grad_v, None if k_rope is None else grad_k_rope)
    return (*grads, None, None, None, None, None)


def _side_by_side(k: Tensor, v: Tensor) -> Tensor | None:
    """[Tk, H, Dk + Dv], if k and v are views of one such tensor."""
    adjacent = (
        k.stride() == v.stride()
        and k.stride(-1) == 1
        and k.stride(-2) >= k.shape[-1] + v.shape[-1]
        and torch._C._is_alias_of(k, v)
        and v.storage_offset() == k.storage_offset() + k.shape[-1]
    )
    return k.as_strided((*k.shape[:-1], k.shape[-1] + v.shape[-1]), k.stride()) if adjacent else None


def _gradients(q: Tensor, k: Tensor, v: Tensor | None, k_rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(q.new_empty(0 if x is None else x.shape) for x in (q, k, v, k_rope))


def _launch_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_k_rope: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    k_rope: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
) -> None:
    q, k, v, k_rope = _operands(q, k, v, k_rope)
    plan = module(q.device).mla_prefill_plan(chip(q.device), q, k, v, k_rope)
    workspace = q.new_empty(plan.workspace_floats(q, k, k_rope is not None), dtype=torch.float32)
    tickets = q.new_zeros(2, dtype=torch.int32)
    launch(
        "mla_prefill_backward", _rows(grad_out), grad_lse.contiguous(), q, k, v, k_rope, _rows(out.contiguous()),
        lse.contiguous(), cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), softmax_scale, causal, grad_q, grad_k,
        grad_v, None if k_rope is None else grad_k_rope, workspace, tickets, plan,
    )  # fmt: skip


_mla_prefill = declare(
    reference.mla_prefill,
    outputs=_outputs,
    launch=_launch,
    unserved=_unserved,
    validate=_validate,
    setup_context=_setup_context,
    backward=_grad,
)
_mla_prefill_piece = declare(
    reference.mla_prefill_piece,
    outputs=_piece_outputs,
    launch=_launch_piece,
    unserved=_unserved,
    validate=_validate,
    mutates=("state",),
)
_mla_prefill_backward = declare(
    reference.mla_prefill_backward, outputs=_gradients, launch=_launch_backward, unserved=_unserved
)
