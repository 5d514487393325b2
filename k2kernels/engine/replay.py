"""Functions that run repeatedly on the same memory: on a GPU, replayed from CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

Run = Callable[[], None]


class Replay:
    """Calls `parts`, (name, function) pairs, in order; with a recorder, from CUDA graphs after the first call.

    Inputs, outputs and intermediate results of the parts must be tensors of fixed addresses: a graph contains addresses
    and all values that the host had when it was captured.

    The first call runs the parts one by one and detects those that wait for the device, which cannot be captured. The
    second captures the others, adjacent ones into one graph; later calls replay these graphs and run the waiting parts
    in between. A warning names the parts that are not captured.
    """

    def __init__(self, parts: Sequence[tuple[str, Run]], recorder: CudaRecorder | None):
        self.parts, self.recorder = parts, recorder
        self.waiting: set[str] | None = None  # None before the first call
        self.schedule: list[Run] | None = None

    def __call__(self) -> None:
        if self.recorder is not None and self.waiting is None:
            self.waiting = {name for name, run in self.parts if self.recorder.waits(run)}
            return
        if self.schedule is None:
            self.schedule = [run for _, run in self.parts] if self.recorder is None else self._record()
        for run in self.schedule:
            run()

    def _record(self) -> list[Run]:
        schedule = []
        for waits, group in itertools.groupby(self.parts, key=lambda part: part[0] in self.waiting):
            names, runs = zip(*group)
            if waits:
                schedule += runs
                continue
            try:
                schedule.append(self.recorder.record(runs))
            except RuntimeError as error:
                _warn_once(f"{names[0]} to {names[-1]} cannot be recorded in a CUDA graph and are launched: {error}")
                schedule += runs
        if self.waiting:
            first = next(name for name, _ in self.parts if name in self.waiting)
            _warn_once(
                f"{len(self.waiting)} of {len(self.parts)} parts of a decoding pass, the first of them {first}, wait "
                "for the device; they are launched between CUDA graphs of the others"
            )
        return schedule


class CudaRecorder:
    """Runs functions on a side stream of `device`: detects whether they wait for it, or captures what they launch.

    All graphs of a recorder share one memory pool: replay one at a time.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, _side_stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def waits(self, run: Run) -> bool:
        """Calls `run`; returns whether the host waited for the device in it."""
        before = torch.cuda.get_sync_debug_mode()
        with self._beside(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        found = False
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                found = True
            elif "Synchronization debug mode" not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return found

    def record(self, runs: Sequence[Run]) -> Run:
        """Captures what `runs` launch, without executing it; returns a function that replays it."""
        # Not `with torch.cuda.graph(...)`, which waits for the device and empties the allocator's cache each time.
        graph = torch.cuda.CUDAGraph()
        with self._beside():
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                for run in runs:
                    run()
            finally:
                graph.capture_end()
        return graph.replay

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device and process: the BLAS libraries keep a workspace for every stream they are used on."""
    return torch.cuda.Stream(device)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"generate: {message}", stacklevel=2)
