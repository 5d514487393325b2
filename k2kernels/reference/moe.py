"""Mixture of experts: the definitions of routing, balance, dispatch and combine.

T tokens, E experts, K experts per token, H hidden, I intermediate, S slots (rows of the expert-major buffer).
Index -1 in `indices`, `slot_of` or `token_of_slot` means "none".
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.reference._numeric import wide, wide_dtype
from k2kernels.reference.quant import quantize_1x128, store_scales


def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    score: str,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights and the experts of each token, and how often each expert was taken."""
    tokens, experts = logits.shape
    scores = _scores(logits, score)
    lowest = torch.finfo(scores.dtype).min
    # An expert with a NaN or -inf logit is taken only when no other is left, whatever its bias.
    choice = scores if bias is None else scores + bias.to(scores.dtype)
    choice = torch.where(logits > -torch.inf, choice, lowest).nan_to_num(nan=lowest, neginf=lowest)
    if n_group > 1:
        grouped = choice.view(tokens, n_group, experts // n_group)
        best = grouped.topk(1 if bias is None else min(2, grouped.shape[-1])).values.sum(-1).clamp(min=lowest)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(1, _best(best, topk_group), True)
        choice = torch.where(kept[..., None], grouped, -torch.inf).view(tokens, experts)
    indices = _best(choice, top_k)
    weights = scores.gather(1, indices)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, indices.int(), histogram(indices, experts)


def moe_route_backward(
    grad: Tensor, logits: Tensor, indices: Tensor, score: str, normalize: bool, scale: float
) -> Tensor:
    """Gradient of `moe_route`'s weights [T, K] with respect to the logits [T, E]."""
    scores = _scores(logits, score)
    indices = indices.long()
    weights = scores.gather(1, indices)
    grad = grad.to(scores.dtype) * scale
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        grad = grad - (grad * weights).sum(-1, keepdim=True)
    # Going through the logarithm of the scores, nothing is divided by a score that may be 0.
    d_log_scores = torch.zeros_like(scores).scatter(1, indices, grad * weights)
    return _scores_backward(d_log_scores, logits, scores, score)


def moe_sequence_loss(logits: Tensor, indices: Tensor, cu_seqlens: Tensor | None, alpha: float, score: str) -> Tensor:
    """alpha * mean over sequences of sum_e f_e P_e."""
    scores = _scores(logits, score)
    shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    return (_loss_slope(shares, indices, cu_seqlens, alpha) * shares).sum()


def moe_sequence_loss_backward(
    grad: Tensor, logits: Tensor, indices: Tensor, cu_seqlens: Tensor | None, alpha: float, score: str
) -> Tensor:
    """Gradient of `moe_sequence_loss`, a scalar, with respect to the logits [T, E]."""
    scores = _scores(logits, score)
    shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    slope = _loss_slope(shares, indices, cu_seqlens, alpha) * grad
    d_log_scores = shares * (slope - (slope * shares).sum(-1, keepdim=True))
    return _scores_backward(d_log_scores, logits, scores, score)


def _loss_slope(shares: Tensor, indices: Tensor, cu_seqlens: Tensor | None, alpha: float) -> Tensor:
    """[T, E]: the derivative of the loss, which is linear in the shares: alpha * f / (length * sequences)."""
    (tokens, experts), top_k = shares.shape, indices.shape[1]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(2, device=shares.device) * tokens
    cu_seqlens = cu_seqlens.long()
    lengths = cu_seqlens.diff()
    sequence = torch.searchsorted(cu_seqlens[1:], torch.arange(tokens, device=shares.device), right=True)
    cell = torch.where(indices < 0, -1, sequence[:, None] * experts + indices)
    hits = histogram(cell, lengths.numel() * experts).view(-1, experts)
    length = lengths.clamp(min=1)[:, None].to(shares.dtype)
    frequency = hits * (experts / top_k) / length
    sequences = (lengths > 0).sum().clamp(min=1)
    return (alpha * frequency / (length * sequences))[sequence]


def moe_update_bias(bias: Tensor, counts: Tensor, rate: float, mode: str) -> Tensor:
    """The bias after one step against the load, from integer counts."""
    counts, experts = counts.long().contiguous(), counts.numel()
    if mode == "sign":
        return bias + rate * torch.sign(counts.sum() - experts * counts).to(bias.dtype)
    ordered = counts.sort().values
    below = torch.searchsorted(ordered, counts, right=False)
    above = experts - torch.searchsorted(ordered, counts, right=True)
    return bias + rate * (above - below).to(bias.dtype) / max(experts - 1, 1)


def moe_plan(
    indices: Tensor, num_experts: int, alignment: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A slot for each (token, k): stable counting sort by expert, then token, then k."""
    pairs, top_k = indices.numel(), indices.shape[1]
    expert = indices.flatten().long()
    expert = torch.where((expert < 0) | (expert >= num_experts), num_experts, expert)  # the last bin: dropped pairs
    wanted = histogram(expert, num_experts + 1)
    starts = _exclusive_sum(wanted)
    aligned = torch.div(wanted[:-1] + alignment - 1, alignment, rounding_mode="floor") * alignment
    aligned_starts = _exclusive_sum(aligned)

    by_expert = expert.argsort(stable=True)
    ordered = expert[by_expert]
    rank = torch.arange(pairs, device=indices.device) - starts[ordered]  # among the pairs of its expert
    slot = torch.empty_like(expert).scatter(0, by_expert, aligned_starts[ordered] + rank)
    served = expert < num_experts
    overflow = (served & (slot >= capacity)).sum()
    slot = torch.where(served & (slot < capacity), slot, capacity)

    token = torch.arange(pairs, device=indices.device) // max(top_k, 1)
    token_of_slot = torch.full((capacity + 1,), -1, device=indices.device).scatter(0, slot, token)[:capacity]
    slot_of = torch.where(slot < capacity, slot, -1).view(indices.shape)
    offsets = aligned_starts.clamp(max=capacity)
    counts = torch.minimum(wanted[:-1], capacity - offsets[:-1])
    return slot_of.int(), token_of_slot.int(), offsets.int(), counts.int(), overflow


def moe_permute(x: Tensor, slot_of: Tensor, token_of_slot: Tensor) -> Tensor:
    """[S, H]: the token's row in each of its slots, zeros in the others."""
    return _taken(x, token_of_slot)


def moe_dispatch(
    x: Tensor, indices: Tensor, num_experts: int, alignment: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`moe_plan`, and the rows of x in its slots, before it."""
    plan = moe_plan(indices, num_experts, alignment, capacity)
    return moe_permute(x, *plan[:2]), *plan


def moe_dispatch_quantize(
    x: Tensor,
    indices: Tensor,
    num_experts: int,
    alignment: int,
    capacity: int,
    power_of_two: bool,
    scale_layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`moe_dispatch` of the codes [T, H] and the scales [T, ceil(H/128)] of x."""
    plan = moe_plan(indices, num_experts, alignment, capacity)
    token_of_slot = plan[1]
    data, scales = quantize_1x128(x, power_of_two)
    codes = _taken(data.view(torch.uint8), token_of_slot)  # bytes: few operations support float8
    return codes.view(data.dtype), store_scales(_taken(scales, token_of_slot), scale_layout), *plan


def moe_combine(
    y: Tensor,
    slot_of: Tensor,
    token_of_slot: Tensor,
    weights: Tensor | None,
    shared: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """[T, H]: sum over k, in this order, of weight * row, then shared, then residual; rounded once.

    `weights=None`: ones; a pair without a slot adds nothing, whatever its weight.
    """
    dtype = wide_dtype(y.dtype)
    if weights is not None:
        weights = weights.masked_fill(slot_of < 0, 0)
    total = y.new_zeros((slot_of.shape[0], y.shape[1]), dtype=dtype)
    rows, slot = _with_zero_row(y, slot_of)
    for k in range(slot_of.shape[1]):
        row = rows.index_select(0, slot[:, k]).to(dtype)
        total += row if weights is None else row * weights[:, k, None].to(dtype)
    for term in (shared, residual):
        if term is not None:
            total += term.to(dtype)
    return total.to(out_dtype)


def moe_combine_backward(
    grad: Tensor, y: Tensor, slot_of: Tensor, token_of_slot: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `moe_combine` with respect to y [S, H] and the weights [T, K]."""
    y_wide, slots = wide(y), y.shape[0]
    grad_rows = _taken(grad.to(y_wide.dtype), token_of_slot)
    target = torch.where(slot_of < 0, slots, slot_of).flatten().long()
    weight_of_slot = y_wide.new_zeros(slots + 1).scatter(0, target, weights.flatten().to(y_wide.dtype))[:slots]
    d_y = (grad_rows * weight_of_slot[:, None]).to(y.dtype)
    d_weight_of_slot = (grad_rows * y_wide).sum(-1)
    return d_y, _taken(d_weight_of_slot, slot_of).to(weights.dtype)


def histogram(indices: Tensor, bins: int) -> Tensor:
    """How often each of 0 ... bins-1 occurs, int64 [bins]; negative entries are left out."""
    cell = torch.where(indices < 0, bins, indices).flatten().long()
    return cell.new_zeros(bins + 1).scatter_add(0, cell, torch.ones_like(cell))[:bins]


def _exclusive_sum(counts: Tensor) -> Tensor:
    """[n] gives [n+1]: 0, c0, c0 + c1, ..."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """x[index], with zeros where the index is -1."""
    rows, index = _with_zero_row(x, index)
    return rows.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


def _with_zero_row(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """x with a row of zeros at its end, and the index with -1 turned into that row's."""
    return torch.cat([x, x.new_zeros((1, *x.shape[1:]))]), torch.where(index < 0, x.shape[0], index)


def _best(values: Tensor, k: int) -> Tensor:
    """[rows, k]: where the k largest values of each row are, in descending order, equals in that of their index."""
    values, found = values.clone(), []
    for _ in range(k):
        found.append(values.max(dim=-1, keepdim=True).indices)  # returns the first of equals; topk need not
        values.scatter_(1, found[-1], -torch.inf)
    return torch.cat(found, dim=1)


def _clean(logits: Tensor) -> Tensor:
    """The logits in float32 (float64 stays), NaN as -inf, +inf as the largest finite number."""
    return wide(logits).nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def _scores(logits: Tensor, score: str) -> Tensor:
    """Scores in [0, 1]; a softmax over nothing but -inf gives zeros."""
    if score == "sigmoid":
        return torch.sigmoid(_clean(logits))
    return torch.softmax(_clean(logits), dim=-1).nan_to_num(nan=0.0)


def _scores_backward(d_log_scores: Tensor, logits: Tensor, scores: Tensor, score: str) -> Tensor:
    if score == "sigmoid":
        d_logits = d_log_scores * torch.sigmoid(-_clean(logits))
    else:
        d_logits = d_log_scores - scores * d_log_scores.sum(-1, keepdim=True)
    return d_logits.to(logits.dtype)
