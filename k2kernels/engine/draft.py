"""Drafts of the MTP layers for speculative decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.model.attention import Decode, Prefill
from k2kernels.model.trunk import Trunk


def draft(model: Trunk, hidden: Tensor, following: Tensor, last: Tensor, step: Prefill | Decode) -> Tensor:
    """Guesses one token per MTP layer for each row, continuing a pass of the main model.

    Args:
        hidden: [B, T, hidden], what the main model gave for its pass `step`.
        following: [B, T], the token after each position.
        last: [B], the last position of each row that is real. What stands after it is neither seen by it nor, in the
            next pass, by others: those rows of the cache are written anew.

    Returns:
        int64 [B, MTP layers]: the tokens after `following[b, last[b]]`.

    A layer beyond the first also sees drafts of earlier passes in its own cache, right or wrong. Drafts are verified,
    so that can cost acceptance only.
    """
    rows = torch.arange(len(last), device=last.device)
    drafts = []
    for layer in model.mtp_layers:
        hidden = layer(hidden, model.model.embed_tokens(following), step)
        drafts.append(model.lm_head(hidden[rows, last]).argmax(dim=-1))
        following = following.roll(-1, dims=1)
        following[rows, last] = drafts[-1]
    return torch.stack(drafts, dim=1)
