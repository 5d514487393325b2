"""Micro-batches of one pass, which run through the layers alternately, each on a CUDA stream of its own.

Letters of shapes: B sequences.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_made = threading.local()  # the streams of a thread, by device: other threads have others


class MicroBatch:
    """Some of the sequences of a pass. It comes to the layers as an argument, so that a layer that runs again in the
    backward pass (activation checkpointing) belongs to the same one.

    Attributes: number: its place; share: its part of the pass's sequences.
    """

    def __init__(self, number: int, share: float):
        self.number, self.share = number, share
        self._recorded: list[tuple[Callable[..., None], tuple]] | None = []

    def later(self, function: Callable[..., None], *args: Any) -> None:
        """Calls `function` at the end of the pass, when the current stream has waited for those of all micro-batches:
        for what a layer adds up over them. Does nothing after that end, in a backward pass."""
        if self._recorded is not None:
            self._recorded.append((function, args))

    def end(self) -> None:
        recorded, self._recorded = self._recorded, None
        for function, args in recorded or ():
            function(*args)


def divide(batch: int, count: int) -> list[tuple[int, MicroBatch]]:
    """`batch` sequences in up to `count` parts, the first ones longer by one if need be: the size of each, and the
    object that comes to the layers."""
    count = min(batch, count)
    sizes = [batch // count + (number < batch % count) for number in range(count)]
    return [(size, MicroBatch(number, size / batch)) for number, size in enumerate(sizes)]


def alternately(layers: Iterable[Callable[..., Tensor]], steps: list[Any], x: Tensor, *beside: Tensor) -> Tensor:
    """What `layers` make of x [B, ...], one after the other: each is called with it, with `beside`, and with a step.

    Args:
        steps: of each micro-batch, a `Prefill` of its sequences.

    The host runs the first layer for each micro-batch, then the second one, and so on. On a GPU the first micro-batch
    is on the current stream and each other one on its own; at the end the current stream waits for all. Autograd runs
    an operation's backward on the stream of its forward, and of those that are ready the one that was recorded last:
    the backward pass is this one in reverse, micro-batches alternating by layer.
    """
    sizes = [len(step.cu_seqlens) - 1 for step in steps]
    given = [t.split(sizes) for t in (x, *beside)]
    xs, more = list(given[0]), list(zip(*given[1:])) or [()] * len(steps)
    streams = _streams(x, len(steps))
    for stream, step in zip(streams[1:], steps[1:]):
        stream.wait_stream(streams[0])
        for t in (x, *beside, *step.rope, step.cu_seqlens):
            t.record_stream(stream)  # else their memory could be used again before this stream has read it
    for layer in layers:
        for i, step in enumerate(steps):
            with torch.cuda.stream(streams[i]) if streams and i else contextlib.nullcontext():
                xs[i] = layer(xs[i], *more[i], step)
    for stream, y in zip(streams[1:], xs[1:]):
        streams[0].wait_stream(stream)
        y.record_stream(streams[0])
    for step in steps:
        step.micro_batch.end()
    return torch.cat(xs)


def _streams(x: Tensor, count: int) -> list[Any]:
    """The current stream, and others of this thread; none on a CPU."""
    if not x.is_cuda:
        return []
    made = _made.__dict__.setdefault(x.device, [])
    while len(made) < count - 1:
        made.append(torch.cuda.Stream(x.device))
    return [torch.cuda.current_stream(x.device), *made[: count - 1]]
