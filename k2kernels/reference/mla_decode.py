"""Attention over a paged cache of latent rows, in the absorbed form: the definition.

Every head sees the same keys, the cache rows [latent | rope]; the values are their latent part.
Shape suffixes: T tokens of all sequences, B sequences, H heads, Q and K positions of one sequence, D dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.reference._attention import Sequences, State, attend, key_borders, merge
from k2kernels.reference._numeric import wide
from k2kernels.reference.mla_cache import read_rows

AUTO = 0  # for `split`
TILE = 1024  # keys read at a time if the split is free: bounds the memory


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    causal: bool,
    head_dim_v: int,
    split: int,
    return_max_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [..., H, head_dim_v], natural lse [..., H], max logits [..., H] (or [0]) of q [B, s_q, H, D] or [T, H, D]."""
    if cu_seqlens_q is None:
        q_THD, lengths = q.flatten(0, 1), torch.full_like(seq_lens, q.shape[1])
    else:
        q_THD, lengths = q, cu_seqlens_q.diff()
    q_THD = wide(q_THD) * softmax_scale
    options = (causal, head_dim_v)
    if split == AUTO or not len(lengths):
        results = [_attend_paged(q_THD, lengths, kv_cache, block_table, seq_lens, TILE, *options)]
    else:
        # Each sequence by itself: a product of batched matrices may round differently at another batch size.
        sizes = lengths.tolist()
        sizes[-1] += len(q_THD) - sum(sizes)  # with the tokens that belong to none
        results = [
            _attend_paged(
                one, lengths[b : b + 1], kv_cache, block_table[b : b + 1], seq_lens[b : b + 1], split, *options
            )
            for b, one in enumerate(q_THD.split(sizes))
        ]
    out, lse, maximum = (torch.cat(parts) for parts in zip(*results))
    rows = q.shape[:-1]
    max_logits = maximum.reshape(rows) if return_max_logits else lse.new_empty(0)
    return out.reshape(*rows, head_dim_v).to(q.dtype), lse.reshape(rows), max_logits


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of a and b together, from the results [..., D] and lse [...] over each of them."""

    def state(out, lse):
        sees_nothing = (lse == -torch.inf).unsqueeze(-1)
        total = (~sees_nothing).to(lse.dtype)  # exp(lse) is total * exp(maximum): lse serves as the maximum
        return State(out.masked_fill(sees_nothing, 0), lse.unsqueeze(-1), total)

    merged = merge(state(out_a, lse_a), state(out_b, lse_b))
    return merged.out.to(out_a.dtype), merged.lse.squeeze(-1)


def _attend_paged(
    q_THD: Tensor,
    lengths: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    split: int,
    causal: bool,
    head_dim_v: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [T, H, D], lse [T, H, 1], largest logits [T, H, 1] of scaled queries, over `split` keys at a time."""
    queries = Sequences(lengths)
    q_BHQD = queries.split(q_THD)
    border_BQ = key_borders(queries, seq_lens, causal)
    sequence_B1 = torch.arange(queries.batch, device=seq_lens.device).unsqueeze(-1)
    longest = max([1, *seq_lens.tolist()])

    state = None
    for start in range(0, longest, split):
        position_K = torch.arange(start, min(start + split, longest), device=seq_lens.device)
        real_BK = position_K < seq_lens.unsqueeze(-1)
        place = (sequence_B1.expand_as(real_BK), position_K.expand_as(real_BK))
        keys_BKD = read_rows(kv_cache, block_table, *place, real_BK, q_THD.dtype)
        # All heads of a sequence share its keys: one matrix product for the rows of all of them.
        scores_BHQK = (q_BHQD.flatten(1, 2) @ keys_BKD.mT).unflatten(1, q_BHQD.shape[1:3])
        scores_BHQK.masked_fill_(position_K >= border_BQ[:, None, :, None], -torch.inf)
        part = attend(scores_BHQK.flatten(1, 2), keys_BKD[..., :head_dim_v])
        state = part if state is None else merge(state, part)

    heads = q_BHQD.shape[1:3]
    parts = ((state.out, 0), (state.lse, -torch.inf), (state.maximum, -torch.inf))
    return tuple(queries.join(x.unflatten(1, heads), len(q_THD), fill) for x, fill in parts)
