"""Attention of whole sequences with expanded keys and values: the definition.

Shape suffixes: T tokens of all sequences, B sequences, H heads, Q and K positions of one sequence, D dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    queries, keys = _Sequences(cu_seqlens_q), _Sequences(cu_seqlens_k)
    q_BHQD, k_BHKD, v_BHKD = queries.split(wide(q)), keys.split(wide(k)), keys.split(wide(v))
    scores_BHQK = _scores(q_BHQD * softmax_scale, k_BHKD, queries, keys, causal)

    peak_BHQ1 = scores_BHQK.amax(-1, keepdim=True)
    sees_nothing = peak_BHQ1 == -torch.inf
    probabilities_BHQK = torch.softmax(scores_BHQK, dim=-1)
    # The largest probability is exp(0) / sum, so its logarithm gives the sum without another pass of exponentials.
    lse_BHQ1 = peak_BHQ1 - probabilities_BHQK.amax(-1, keepdim=True).log()
    lse_BHQ1 = lse_BHQ1.masked_fill(sees_nothing, -torch.inf)
    out_BHQD = (probabilities_BHQK @ v_BHKD).masked_fill_(sees_nothing, 0)

    out = queries.join(out_BHQD).to(q.dtype)
    lse = queries.join(lse_BHQ1).squeeze(-1)
    max_logits = queries.join(peak_BHQ1).squeeze(-1) if return_max_logits else lse.new_empty(0)
    return out, lse, max_logits


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
    queries, keys = _Sequences(cu_seqlens_q), _Sequences(cu_seqlens_k)
    q_BHQD, k_BHKD, v_BHKD = queries.split(wide(q) * softmax_scale), keys.split(wide(k)), keys.split(wide(v))
    grad_out = wide(grad_out)
    grad_out_BHQD = queries.split(grad_out)

    sees_nothing = lse == -torch.inf
    shift_BHQ1 = queries.split(lse.masked_fill(sees_nothing, 0).unsqueeze(-1))
    probabilities_BHQK = _scores(q_BHQD, k_BHKD, queries, keys, causal).sub_(shift_BHQ1).exp_()
    grad_v_BHKD = probabilities_BHQK.transpose(-1, -2) @ grad_out_BHQD

    # The softmax takes sum_k P_k dP_k, which is dO . O, off every dP; each logit moves lse by its probability.
    offset = grad_lse.masked_fill(sees_nothing, 0) - (grad_out * wide(out)).sum(-1)
    grad_scores_BHQK = (grad_out_BHQD @ v_BHKD.transpose(-1, -2)).add_(queries.split(offset.unsqueeze(-1)))
    grad_scores_BHQK.mul_(probabilities_BHQK)
    grad_q_BHQD = (grad_scores_BHQK @ k_BHKD).mul_(softmax_scale)
    grad_k_BHKD = grad_scores_BHQK.transpose(-1, -2) @ q_BHQD
    return queries.join(grad_q_BHQD).to(q.dtype), keys.join(grad_k_BHKD).to(k.dtype), keys.join(grad_v_BHKD).to(v.dtype)


class _Sequences:
    """Cuts packed tokens into sequences: [T, H, D] to [B, H, longest, D] and back; short sequences are zero-padded."""

    def __init__(self, cu_seqlens: Tensor):
        self.lengths = cu_seqlens.diff()
        lengths = self.lengths.tolist()
        self.longest = max([1, *lengths])  # at least 1, so that reductions over keys have something to reduce
        self.batch = len(lengths)
        self.real = None  # [B, longest], which positions hold a token; None if all do: then no padding is needed
        if any(length != self.longest for length in lengths):
            self.real = torch.arange(self.longest, device=cu_seqlens.device) < self.lengths.unsqueeze(-1)

    def split(self, x: Tensor) -> Tensor:
        if self.real is None:
            return x.unflatten(0, (self.batch, self.longest)).transpose(1, 2).contiguous()
        padded = x.new_zeros(self.batch, self.longest, *x.shape[1:])
        padded[self.real] = x
        return padded.transpose(1, 2).contiguous()

    def join(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return x.flatten(0, 1).contiguous() if self.real is None else x[self.real]


def _scores(q_BHQD: Tensor, k_BHKD: Tensor, queries: _Sequences, keys: _Sequences, causal: bool) -> Tensor:
    """Scaled logits [B, H, Q, K], -inf where the query does not see the key."""
    scores_BHQK = q_BHQD @ k_BHKD.transpose(-1, -2)
    if not causal and keys.real is None:
        return scores_BHQK
    position_K = torch.arange(keys.longest, device=q_BHQD.device)
    border_BQ = keys.lengths.unsqueeze(-1)
    if causal:  # query i of s_q sees keys < s_k - s_q + i + 1
        border_BQ = border_BQ - queries.lengths.unsqueeze(-1) + 1 + torch.arange(queries.longest, device=q_BHQD.device)
    if queries.real is None and keys.real is None:
        border_BQ = border_BQ[:1]  # the same for every sequence
    return scores_BHQK.masked_fill_(position_K >= border_BQ[:, None, :, None], -torch.inf)
