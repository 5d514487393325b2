"""Choice of the next token: of `generate`, and of the requests of an `Engine`."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from k2kernels.engine.options import check_float32
from k2kernels.ops._check import Arguments


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
        before = ordered.cumsum(dim=-1) - ordered  # of the likelier tokens
        excluded = before >= top_p
        excluded[..., 0] = False  # also where float32 has 0 for top_p
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(excluded, 0))
    flat = probabilities.flatten(0, -2)
    return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])


@dataclass(frozen=True)
class Sampling:
    """How the texts of a request of an `Engine` are chosen, and where they end.

    What is not None or 0 applies in this order: the penalties, logit_bias, temperature, top_k, top_p, min_p.

    Args:
        max_new_tokens: 1 or more; None: as many as the context and the cache have room for.
        temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
        top_k, top_p: draw from the k likeliest tokens, and from the smallest set of likeliest ones that together have
            probability p or more.
        min_p: draw from the tokens of at least this fraction of the largest probability.
        seed: of the draws, 0 or more. A draw depends on the seed, the number of the sample and the position in its text
            alone: a request has the same texts whatever else the engine does. None: another one for each request.
        presence_penalty, frequency_penalty: subtracted from the logits of the tokens that the text has, the second one
            as often as it has them. The prompt does not count.
        logit_bias: added to the logits of these tokens.
        logprobs: record the log-probability of each token, and of so many likeliest ones (0: of none), as the model
            has them: before the penalties, the bias and the temperature.
        eos_token_ids: a text ends with the first of these; None takes the checkpoint's, [] never stops early.

    Raises:
        TypeError, ValueError: for an argument of another type or out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    eos_token_ids: Collection[int] | None = None

    def __post_init__(self) -> None:
        args = Arguments("Sampling")
        for name, low in dict(max_new_tokens=1, top_k=1, seed=0, logprobs=0).items():
            if getattr(self, name) is not None:
                args.integer(name, getattr(self, name), low)
        for name in ("temperature", "presence_penalty", "frequency_penalty"):
            check_float32(args, name, getattr(self, name))
        args.require(self.temperature >= 0, "temperature", "0 or more", self.temperature)
        if self.top_p is not None:
            args.require(0 < args.number("top_p", self.top_p) <= 1, "top_p", "above 0 and at most 1", self.top_p)
        if self.min_p is not None:
            args.require(0 <= args.number("min_p", self.min_p) <= 1, "min_p", "from 0 to 1", self.min_p)
        if self.logit_bias is not None:
            good = isinstance(self.logit_bias, Mapping) and all(type(token) is int for token in self.logit_bias)
            args.require(good, "logit_bias", "a mapping from ints to numbers", repr(self.logit_bias))
            for token, bias in self.logit_bias.items():
                check_float32(args, f"logit_bias[{token}]", bias)
        stops = self.eos_token_ids
        good = stops is None or (isinstance(stops, Collection) and all(type(token) is int for token in stops))
        args.require(good, "eos_token_ids", "a list of ints", repr(stops))


class Place(NamedTuple):
    """What the choice after a token depends on, beside the logits."""

    sampling: Sampling
    new: Sequence[int]  # the text so far, without the prompt
    uniform: float  # in [0, 1)


class TokenLogprobs(NamedTuple):
    """Log-probabilities where a token was chosen."""

    logprob: float  # of the chosen one
    top: list[tuple[int, float]]  # of the likeliest ones, these first


class Choice(NamedTuple):
    token: int
    finite: bool  # the logits were, and are with penalties and bias; otherwise the token is arbitrary
    logprobs: TokenLogprobs | None


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1), of 48 bits, for the token at `position` of sample `index`."""
    digest = hashlib.blake2b(struct.pack("<3Q", seed, index, position), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def choose(logits: Tensor, places: Sequence[Place]) -> list[Choice]:
    """Chooses a token from each row of logits [N, vocab]; rows do not affect each other. The host waits once, and once
    more for log-probabilities."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores = logits
    changed = [i for i, place in enumerate(places) if _changes(place.sampling)]
    if changed:
        scores = logits.clone()
        for i in changed:
            _change(scores[i], places[i])
    finite = scores.amax(dim=-1).isfinite()
    tokens = scores.argmax(dim=-1)
    drawn = [i for i, place in enumerate(places) if place.sampling.temperature > 0]
    if drawn:
        rows = torch.where(finite[drawn, None], scores[drawn], 0.0)  # an index from NaN would end a GPU's context
        tokens[drawn] = _draw(rows.double(), [places[i] for i in drawn])
    logprobs = _logprobs(logits, tokens, places)
    chosen = torch.stack([tokens, finite], dim=1).tolist()
    return [Choice(token, bool(good), some) for (token, good), some in zip(chosen, logprobs)]


def _changes(sampling: Sampling) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias)


def _change(row: Tensor, place: Place) -> None:
    """Penalties and bias, in place."""
    sampling = place.sampling
    change: Counter = Counter()
    for token, count in Counter(place.new).items():
        change[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    for token, bias in (sampling.logit_bias or {}).items():
        change[token] += bias
    if change:
        row[list(change)] += row.new_tensor(list(change.values()))


def _draw(logits: Tensor, places: Sequence[Place]) -> Tensor:
    """Inverts the distribution function, in the order of the vocabulary, at each place's number; float64."""
    temperature, number = logits.new_tensor([(place.sampling.temperature, place.uniform) for place in places]).T
    p = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]).softmax(dim=-1)
    limits = [(place.sampling.top_k, place.sampling.top_p, place.sampling.min_p) for place in places]
    narrow = [i for i, limit in enumerate(limits) if any(limit)]
    if narrow:
        p[narrow] = _narrow(p[narrow], [limits[i] for i in narrow])
    below = p.cumsum(dim=-1)
    return torch.searchsorted(below, number[:, None] * below[:, -1:], right=True).squeeze(-1)


def _narrow(p: Tensor, limits: list[tuple[int | None, float | None, float | None]]) -> Tensor:
    """Probabilities with zeros at the tokens that top_k, top_p and min_p exclude; their sums are arbitrary."""
    filled = [(top_k or p.shape[-1], top_p or 2.0, min_p or 0.0) for top_k, top_p, min_p in limits]
    top_k, top_p, min_p = p.new_tensor(filled).T[..., None]
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(p.shape[-1], device=p.device) >= top_k, 0)
    before = ordered.cumsum(dim=-1) - ordered  # of the likelier tokens
    excluded = (before >= top_p * ordered.sum(dim=-1, keepdim=True)) | (ordered < min_p * ordered[:, :1])
    excluded[:, 0] = False  # also where top_p times the sum is 0
    return torch.zeros_like(p).scatter(-1, order, ordered.masked_fill(excluded, 0))


def _logprobs(logits: Tensor, tokens: Tensor, places: Sequence[Place]) -> list[TokenLogprobs | None]:
    result: list[TokenLogprobs | None] = [None] * len(places)
    wanted = [i for i, place in enumerate(places) if place.sampling.logprobs is not None]
    if not wanted:
        return result
    counts = [min(places[i].sampling.logprobs, logits.shape[-1]) for i in wanted]
    rows = logits[wanted].log_softmax(dim=-1)
    own = rows.gather(-1, tokens[wanted, None]).squeeze(-1)
    top, ids = rows.topk(max(counts), dim=-1)
    for i, count, one, values, names in zip(wanted, counts, own.tolist(), top.tolist(), ids.tolist()):
        result[i] = TokenLogprobs(one, list(zip(names[:count], values[:count])))
    return result
