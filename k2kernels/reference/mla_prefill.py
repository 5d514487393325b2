"""Attention of whole sequences with expanded keys and values: the definition.

Shape suffixes: T tokens of all sequences, B sequences, H heads, Q and K positions of one sequence, D dims.

Arguments of all ops here: q [Tq, H, nope + R]; k [Tk, H, nope + R] and v [Tk, H, V]. With k_rope [Tk, R], which all
heads share, k is [Tk, H, nope]; and without v it is [Tk, H, nope + V], keys and values as one projection gives them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.reference._attention import Sequences, State, attend, key_borders, merge
from k2kernels.reference._numeric import wide

# Numbers of a row's state between pieces beside its output: maximum, totals, and what a kernel needs.
STATE_EXTRA = 8


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    k_rope: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
    return_max_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(scale * q k^T) v per sequence and head: out [T,H,V], natural lse [T,H], max logits [T,H] (or [0])."""
    queries, keys = Sequences(cu_seqlens_q.diff()), Sequences(cu_seqlens_k.diff())
    border_BQ = _borders(queries, keys, causal)
    state = _attend(q, k, v, k_rope, queries, keys, border_BQ, softmax_scale)
    return _joined(state, queries, q, return_max_logits)


def mla_prefill_piece(
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
    return_max_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a piece of the keys to `state` [T, H, V + 8], which the first piece begins; results after the last one."""
    queries, keys = Sequences(cu_seqlens_q.diff()), Sequences(cu_seqlens_k.diff())
    border_BQ = torch.minimum(key_borders(queries, keys.lengths, True, diagonal), keys.lengths.unsqueeze(-1))
    new = _attend(q, k, v, k_rope, queries, keys, border_BQ, softmax_scale)
    if not first:
        sizes = [state.shape[-1] - STATE_EXTRA, 1, 1, STATE_EXTRA - 2]
        out_BHQD, maximum_BHQ1, total_BHQ1, _ = queries.split(state).split(sizes, dim=-1)
        new = merge(State(out_BHQD, maximum_BHQ1, total_BHQ1), new)
    if last:
        return _joined(new, queries, q, return_max_logits)
    unused_BHQD = new.total.expand(-1, -1, -1, STATE_EXTRA - 2)
    kept_BHQD = torch.cat([new.out, new.maximum, new.total, unused_BHQD], dim=-1)
    state.copy_(queries.join(kept_BHQD, len(q)))
    return q.new_empty(0), state.new_empty(0), state.new_empty(0)


def mla_prefill_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and k_rope (empty for None); the probabilities are computed again from `lse`."""
    queries, keys = Sequences(cu_seqlens_q.diff()), Sequences(cu_seqlens_k.diff())
    full_k, full_v = _expanded(q, k, v, k_rope)
    q_BHQD, k_BHKD, v_BHKD = queries.split(wide(q) * softmax_scale), keys.split(full_k), keys.split(full_v)
    grad_out = wide(grad_out)
    grad_out_BHQD = queries.split(grad_out)

    sees_nothing = lse == -torch.inf
    shift_BHQ1 = queries.split(lse.masked_fill(sees_nothing, 0).unsqueeze(-1))
    border_BQ = _borders(queries, keys, causal)
    probabilities_BHQK = _scores(q_BHQD, k_BHKD, keys, border_BQ).sub_(shift_BHQ1).exp_()
    grad_v_BHKD = probabilities_BHQK.mT @ grad_out_BHQD

    # The softmax takes sum_k P_k dP_k, which is dO . O, off every dP; each logit moves lse by its probability.
    offset = grad_lse.masked_fill(sees_nothing, 0) - (grad_out * wide(out)).sum(-1)
    grad_scores_BHQK = (grad_out_BHQD @ v_BHKD.mT).add_(queries.split(offset.unsqueeze(-1))).mul_(probabilities_BHQK)
    grad_q = queries.join((grad_scores_BHQK @ k_BHKD).mul_(softmax_scale), len(q))
    grad_k = keys.join(grad_scores_BHQK.mT @ q_BHQD, len(k))
    grad_v = keys.join(grad_v_BHKD, len(k))
    grad_k_rope = grad_k.new_empty(0)
    if k_rope is not None:
        grad_k, grad_k_rope = grad_k.split([grad_k.shape[-1] - k_rope.shape[-1], k_rope.shape[-1]], dim=-1)
        grad_k_rope = grad_k_rope.sum(dim=1)
    if v is None:
        grad_k, grad_v = torch.cat([grad_k, grad_v], dim=-1), grad_v.new_empty(0)
    return tuple(grad.to(q.dtype).contiguous() for grad in (grad_q, grad_k, grad_v, grad_k_rope))


def _expanded(q: Tensor, k: Tensor, v: Tensor | None, k_rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """k [Tk, H, nope + R] and v [Tk, H, V], in the wide dtype."""
    if v is None:
        nope = q.shape[-1] - k_rope.shape[-1]
        k, v = k.split([nope, k.shape[-1] - nope], dim=-1)
    if k_rope is not None:
        k = torch.cat([k, k_rope[:, None].expand(-1, k.shape[1], -1)], dim=-1)
    return wide(k), wide(v)


def _borders(queries: Sequences, keys: Sequences, causal: bool) -> Tensor | None:
    """A query sees the keys before its border, [B or 1, Q or 1]; None: all of them, of sequences of equal length."""
    if not causal and keys.real is None:
        return None
    border_BQ = key_borders(queries, keys.lengths, causal)
    return border_BQ[:1] if queries.real is None and keys.real is None else border_BQ


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    k_rope: Tensor | None,
    queries: Sequences,
    keys: Sequences,
    border_BQ: Tensor | None,
    softmax_scale: float,
) -> State:
    k, v = _expanded(q, k, v, k_rope)
    q_BHQD, k_BHKD = queries.split(wide(q) * softmax_scale), keys.split(k)
    return attend(_scores(q_BHQD, k_BHKD, keys, border_BQ), keys.split(v))


def _scores(q_BHQD: Tensor, k_BHKD: Tensor, keys: Sequences, border_BQ: Tensor | None) -> Tensor:
    """Logits [B, H, Q, K] of scaled queries, -inf where the query does not see the key."""
    scores_BHQK = q_BHQD @ k_BHKD.mT
    if border_BQ is None:
        return scores_BHQK
    position_K = torch.arange(keys.longest, device=q_BHQD.device)
    return scores_BHQK.masked_fill_(position_K >= border_BQ[:, None, :, None], -torch.inf)


def _joined(state: State, queries: Sequences, q: Tensor, return_max_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens = len(q)
    lse = queries.join(state.lse, tokens, -torch.inf).squeeze(-1)
    maximum = queries.join(state.maximum, tokens, -torch.inf).squeeze(-1)
    max_logits = maximum if return_max_logits else lse.new_empty(0)
    return queries.join(state.out, tokens).to(q.dtype), lse, max_logits
