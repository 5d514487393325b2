"""What a caller of `Engine.submit` holds: a request, and its samples."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from k2kernels.engine.pool import Key, extend_keys, root_key
from k2kernels.engine.sampling import Sampling, TokenLogprobs


@dataclass(eq=False)
class Sample:
    """One text that continues the prompt. Iterating over it yields its tokens as they come, and ends with it.

    Attributes:
        tokens: the new tokens so far, the stop id included.
        logprobs: of each of them, if `Sampling.logprobs` asks for them.
        finish_reason: None while it goes on; "stop" (a stop id), "length" (max_new_tokens), "cancelled" or "error".
    """

    request: Request
    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    # For the scheduler and the engine:
    ids: list[int] = field(default_factory=list)  # prompt and new tokens
    keys: list[Key] = field(default_factory=list)  # of their full pages
    pages: list[int] = field(default_factory=list)
    computed: int = 0  # rows in the pages
    published: int = 0  # pages
    row: int = -1  # of the block table
    drafts: list[int] = field(default_factory=list)  # what may follow `ids`
    cancelled: bool = False

    def cancel(self) -> None:
        """Ends this sample in the next step, from any thread, unless it has ended."""
        self.cancelled = True

    @property
    def pending(self) -> int:
        """Tokens without a row in the cache. With 1 the next pass chooses a token, with more it is over a chunk."""
        return len(self.ids) - self.computed

    @property
    def age(self) -> tuple[int, int]:
        return self.request.number, self.index

    def update_keys(self) -> None:
        extend_keys(self.keys, self.request.root, self.ids)

    def __iter__(self) -> Iterator[int]:
        seen = 0
        while True:
            self.request.wait(lambda seen=seen: len(self.tokens) > seen or self.finish_reason is not None)
            ended = self.finish_reason is not None
            while seen < len(self.tokens):
                yield self.tokens[seen]
                seen += 1
            if ended:
                break
        if self.finish_reason == "error":
            raise RuntimeError(self.request.error)


class Request:
    """A prompt and its samples; made by `Engine.submit`.

    Iterating over a request with one sample is iterating over that. Where no thread runs the engine, iterating and
    `result` do its steps.

    Attributes:
        prompt: the ids; sampling: as given, with a seed.
        samples: `n` of `Sample`.
        cached_tokens: tokens of the prompt that the first sample found in the cache.
        error: what went wrong, if a finish reason is "error".
    """

    def __init__(
        self,
        number: int,
        prompt: list[int],
        sampling: Sampling,
        n: int,
        *,
        limit: int,
        stops: set[int],
        salt: str,
        on_update: Callable[[Request], None] | None,
        wait: Callable[[Callable[[], bool]], Any],
    ):
        self.number, self.prompt, self.sampling = number, prompt, sampling
        self.limit, self.stops = limit, stops  # tokens of a text with its prompt; stop ids
        self.root, self.on_update, self.wait = root_key(salt), on_update, wait
        self.seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        self.error: str | None = None
        self.cached_tokens = 0
        self.samples = [Sample(self, index, ids=list(prompt)) for index in range(n)]
        self.samples[0].update_keys()
        for sample in self.samples[1:]:
            sample.keys = list(self.samples[0].keys)

    @property
    def done(self) -> bool:
        """Whether all samples have ended."""
        return all(sample.finish_reason is not None for sample in self.samples)

    def cancel(self) -> None:
        """Ends the samples in the next step, from any thread; what has ended stays as it is."""
        for sample in self.samples:
            sample.cancel()

    def result(self) -> list[list[int]]:
        """Waits for all samples; their tokens.

        Raises:
            RuntimeError: a sample ended with "error".
        """
        return [list(sample) for sample in self.samples]

    def __iter__(self) -> Iterator[int]:
        if len(self.samples) > 1:
            raise ValueError(f"Request: iterate over one of the {len(self.samples)} samples, request.samples[i]")
        return iter(self.samples[0])
