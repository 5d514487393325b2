"""Parts that the attention references share.

Shape suffixes: T tokens of all sequences, B sequences, H heads, Q and K positions of one sequence, D dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences:
    """Cuts packed tokens into sequences: [T, H, D] to [B, H, longest, D] and back; short sequences are zero-padded.

    Tokens behind the last sequence belong to none.
    """

    def __init__(self, lengths: Tensor):
        self.lengths = lengths
        sizes = lengths.tolist()
        self.tokens = sum(sizes)
        self.longest = max([1, *sizes])  # at least 1, so that reductions over keys have something to reduce
        self.batch = len(sizes)
        self.real = None  # [B, longest], which positions hold a token; None if all do: then no padding is needed
        if any(size != self.longest for size in sizes):
            self.real = torch.arange(self.longest, device=lengths.device) < lengths.unsqueeze(-1)

    def split(self, x: Tensor) -> Tensor:
        x = x[: self.tokens]
        if self.real is None:
            return x.unflatten(0, (self.batch, self.longest)).transpose(1, 2).contiguous()
        padded = x.new_zeros(self.batch, self.longest, *x.shape[1:])
        padded[self.real] = x
        return padded.transpose(1, 2).contiguous()

    def join(self, x: Tensor, tokens: int, fill: float = 0) -> Tensor:
        """[tokens, H, D]; those of no sequence hold `fill`."""
        x = x.transpose(1, 2)
        x = x.flatten(0, 1).contiguous() if self.real is None else x[self.real]
        rest = tokens - self.tokens
        return torch.cat([x, x.new_full((rest, *x.shape[1:]), fill)]) if rest else x


def key_borders(queries: Sequences, key_lengths: Tensor, causal: bool, diagonal: Tensor | None = None) -> Tensor:
    """[B, Q] or [B, 1]: a query sees the keys before its border.

    Causal: query i sees the keys up to i + diagonal [B], by default s_k - s_q, which aligns the ends.
    """
    if not causal:
        return key_lengths.unsqueeze(-1)
    if diagonal is None:
        diagonal = key_lengths - queries.lengths
    position = torch.arange(queries.longest, device=key_lengths.device)
    return diagonal.unsqueeze(-1) + position + 1


class State(NamedTuple):
    """Attention of rows [..., Q, D] over some keys; a row that sees none has out 0, maximum -inf, total 0."""

    out: Tensor  # [..., Q, D]
    maximum: Tensor  # [..., Q, 1], largest logit
    total: Tensor  # [..., Q, 1], sum of exp(logit - maximum)

    @property
    def lse(self) -> Tensor:
        return self.maximum + self.total.log()


def attend(scores: Tensor, values: Tensor) -> State:
    """Softmax of scores [..., Q, K] (-inf: not seen) times values [..., K, D]."""
    maximum = scores.amax(-1, keepdim=True)
    sees_nothing = maximum == -torch.inf
    probabilities = torch.softmax(scores, dim=-1)
    # The largest probability is exp(0) / total, which spares another pass of exponentials.
    total = probabilities.amax(-1, keepdim=True).reciprocal()
    out = probabilities @ values
    return State(out.masked_fill_(sees_nothing, 0), maximum, total.masked_fill_(sees_nothing, 0))


def merge(a: State, b: State) -> State:
    """Attention over the keys of both."""
    maximum = torch.maximum(a.maximum, b.maximum)
    shift = maximum.masked_fill(maximum == -torch.inf, 0)
    weight_a, weight_b = a.total * (a.maximum - shift).exp(), b.total * (b.maximum - shift).exp()
    total = weight_a + weight_b
    out = (a.out * weight_a + b.out * weight_b) / total.masked_fill(total == 0, 1)
    return State(out, maximum, total)
