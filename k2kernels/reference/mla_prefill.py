"""Attention of whole sequences with expanded keys and values: the definition.

Shape suffixes: T tokens of all sequences, B sequences, H heads, Q and K positions of one sequence, D dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.reference._attention import Sequences, attend, key_borders
from k2kernels.reference._numeric import wide


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
    return_max_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(scale * q k^T) v per sequence and head: out [T,H,Dv], natural lse [T,H], max logits [T,H] (or [0])."""
    queries, keys = Sequences(cu_seqlens_q.diff()), Sequences(cu_seqlens_k.diff())
    q_BHQD, k_BHKD = queries.split(wide(q) * softmax_scale), keys.split(wide(k))
    scores_BHQK = _scores(q_BHQD, k_BHKD, queries, keys, causal)
    state = attend(scores_BHQK, keys.split(wide(v)))
    tokens = q.shape[0]
    lse = queries.join(state.lse, tokens, -torch.inf).squeeze(-1)
    maximum = queries.join(state.maximum, tokens, -torch.inf).squeeze(-1)
    max_logits = maximum if return_max_logits else lse.new_empty(0)
    return queries.join(state.out, tokens).to(q.dtype), lse, max_logits


def mla_prefill_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the probabilities are computed again from `lse`."""
    queries, keys = Sequences(cu_seqlens_q.diff()), Sequences(cu_seqlens_k.diff())
    q_BHQD, k_BHKD, v_BHKD = queries.split(wide(q) * softmax_scale), keys.split(wide(k)), keys.split(wide(v))
    grad_out = wide(grad_out)
    grad_out_BHQD = queries.split(grad_out)

    sees_nothing = lse == -torch.inf
    shift_BHQ1 = queries.split(lse.masked_fill(sees_nothing, 0).unsqueeze(-1))
    probabilities_BHQK = _scores(q_BHQD, k_BHKD, queries, keys, causal).sub_(shift_BHQ1).exp_()
    grad_v_BHKD = probabilities_BHQK.mT @ grad_out_BHQD

    # The softmax takes sum_k P_k dP_k, which is dO . O, off every dP; each logit moves lse by its probability.
    offset = grad_lse.masked_fill(sees_nothing, 0) - (grad_out * wide(out)).sum(-1)
    grad_scores_BHQK = (grad_out_BHQD @ v_BHKD.mT).add_(queries.split(offset.unsqueeze(-1))).mul_(probabilities_BHQK)
    grad_q_BHQD = (grad_scores_BHQK @ k_BHKD).mul_(softmax_scale)
    grad_k_BHKD = grad_scores_BHQK.mT @ q_BHQD
    grads = ((queries, grad_q_BHQD, q), (keys, grad_k_BHKD, k), (keys, grad_v_BHKD, v))
    return tuple(sequences.join(grad, len(x)).to(x.dtype) for sequences, grad, x in grads)


def _scores(q_BHQD: Tensor, k_BHKD: Tensor, queries: Sequences, keys: Sequences, causal: bool) -> Tensor:
    """Logits [B, H, Q, K] of scaled queries, -inf where the query does not see the key."""
    scores_BHQK = q_BHQD @ k_BHKD.mT
    if not causal and keys.real is None:
        return scores_BHQK
    border_BQ = key_borders(queries, keys.lengths, causal)
    if queries.real is None and keys.real is None:
        border_BQ = border_BQ[:1]  # the same for every sequence
    position_K = torch.arange(keys.longest, device=q_BHQD.device)
    return scores_BHQK.masked_fill_(position_K >= border_BQ[:, None, :, None], -torch.inf)
