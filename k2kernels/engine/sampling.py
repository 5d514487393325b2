"""Choice of the next token."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draws a token from each row of logits [..., vocab] -> int64 [...]."""
    # From the largest on, so that a small temperature makes -inf of the others and never inf of any; float32 has no
    # smaller ones than this.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-37)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # of the likelier tokens: the likeliest one always stays
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(before >= top_p, 0))
    flat = probabilities.flatten(0, -2)
    return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])
