"""Drafts of the MTP layers for speculative decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.model.attention import Decode, Prefill
from k2kernels.model.trunk import Trunk


def draft(model: Trunk, hidden: Tensor, following: Tensor, last: Tensor, step: Prefill | Decode) -> Tensor:
    """Drafts one token per MTP layer for each row, continuing a pass of the main model.

    Args:
        hidden: [B, T, hidden], the result of the main model for its pass `step`.
        following: [B, T], the token after each position.
        last: [B], the last valid position of each row. Later positions do not affect it, nor the next pass, which
            overwrites their rows of the cache.

    Returns:
        int64 [B, MTP layers]: the tokens after `following[b, last[b]]`.

    The caches of layers beyond the first also hold drafts of earlier passes, right or wrong. As drafts are verified,
    this can only reduce their acceptance.
    """
    rows = torch.arange(len(last), device=last.device)
    drafts = []
    for layer in model.mtp_layers:
        hidden = layer(hidden, model.model.embed_tokens(following), step)
        drafts.append(model.lm_head(hidden[rows, last]).argmax(dim=-1))
        following = following.roll(-1, dims=1)
        following[rows, last] = drafts[-1]
    return torch.stack(drafts, dim=1)
