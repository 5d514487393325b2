"""Timing on a GPU: cold caches, CUDA graphs, medians, and the share of the machine's measured peak rates."""

from __future__ import annotations

import datetime
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = tuple[Any, ...]
CACHE_MULTIPLE = 3  # the rotating inputs together exceed the L2 cache this many times
MAX_SETS = 64
OURS = "k2kernels"


@dataclass(frozen=True)
class Case:
    """One shape of one op, with the functions to be timed.

    Attributes:
        op: the op's name; shape: the shape's name, as in `k2kernels.testing.inputs`.
        bytes: memory traffic of a call with each input read once and each output written once.
        flops: on tensor cores, in `dtype` ("bf16" or "fp8"); 0 for ops that only move data.
        make: one set of random inputs on the device.
        bodies: name -> function of such a set; `OURS` is this library, the others are peers.
    """

    op: str
    shape: str
    bytes: int
    make: Callable[[torch.device], Inputs]
    bodies: dict[str, Callable[..., Any]]
    flops: int = 0
    dtype: str = "bf16"


@dataclass(frozen=True)
class Ceilings:
    """Measured peak rates: bytes per second of a large copy, FLOP per second of a large matrix product."""

    copy: float
    matmul: dict[str, float] = field(default_factory=dict)

    def floor_us(self, case: Case) -> float:
        """The larger of the time for the bytes and the time for the FLOPs, in microseconds.

        A GPU without FP8 cores does those products in 16 bits.
        """
        compute = case.flops / self.matmul.get(case.dtype, self.matmul["bf16"]) if case.flops else 0.0
        return 1e6 * max(case.bytes / self.copy, compute)


@dataclass(frozen=True)
class Line:
    """One measured figure, a line of bench/results."""

    op: str
    shape: str
    who: str
    us: float
    gb_per_s: float
    tflop_per_s: float
    roofline: float  # floor / time
    graph: bool  # replayed from a CUDA graph; False: launched one by one, launch cost included
    device: str
    clock_mhz: int | None
    date: str
    commit: str
    torch: str


def measure(cases: Iterable[Case], ceilings: Ceilings, device: torch.device, repeats: int = 20) -> Iterable[Line]:
    """Times every body of every case, the bodies of a case one after another on the same inputs.

    A peer that raises is left out with a warning; ours is not.
    """
    where = _where(device)
    for case in cases:
        sets = input_sets(case, device)
        for who, body in case.bodies.items():
            try:
                us, graph = time_us(body, sets, repeats)
            except Exception as error:
                if who == OURS:
                    raise
                warnings.warn(f"{case.op}, {case.shape}: {who} is left out: {error}", stacklevel=2)
                continue
            yield Line(
                op=case.op,
                shape=case.shape,
                who=who,
                us=us,
                gb_per_s=case.bytes / us / 1e3,
                tflop_per_s=case.flops / us / 1e6,
                roofline=ceilings.floor_us(case) / us,
                graph=graph,
                clock_mhz=_clock_mhz(),
                **where,
            )


def measure_host(calls: dict[str, Callable[[], Any]], device: torch.device) -> Iterable[Line]:
    """Host time of each of `calls` (op -> call), from the public function to the launch."""
    where = _where(device)
    for op, call in calls.items():
        us = host_us(call)
        yield Line(op, "one row", "host", us, 0.0, 0.0, 0.0, graph=False, clock_mhz=_clock_mhz(), **where)


def host_us(call: Callable[[], Any], repeats: int = 20, calls: int = 100) -> float:
    """Median microseconds until a call returns. The GPU is synchronised before each series, not within it."""
    times = []
    for repeat in range(repeats + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if repeat >= 3:  # compiled, loaded, allocated
            times.append(1e6 * (time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return statistics.median(times)


def input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """Sets of inputs that exceed the L2 cache `CACHE_MULTIPLE` times together, so that each set is cold when reused."""
    first = case.make(device)
    size = sum(t.numel() * t.element_size() for t in first if isinstance(t, torch.Tensor))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(MAX_SETS, max(2, -(-CACHE_MULTIPLE * cache // max(1, size))))
    return [first, *(case.make(device) for _ in range(count - 1))]


def time_us(body: Callable[..., Any], sets: list[Inputs], repeats: int = 20) -> tuple[float, bool]:
    """Median microseconds of one call, and whether a CUDA graph replayed it (else launch cost is included)."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for inputs in sets[:2] * 2:  # compile, allocate
            body(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for inputs in sets:
                body(*inputs)
        run, replayed = graph.replay, True
    except RuntimeError:  # the body reads a number from the GPU, which a graph cannot

        def run() -> None:
            for inputs in sets:
                body(*inputs)

        replayed = False
        torch.cuda.synchronize()
    times = []
    for repeat in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= 3:  # clocks have risen
            times.append(1e3 * start.elapsed_time(end) / len(sets))
    return statistics.median(times), replayed


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copies 1 GiB, and multiplies square matrices of 8192 in bf16 and, where the GPU can, in e4m3."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
    copy_us, _ = time_us(lambda target: target.copy_(source), [(torch.empty_like(source),)])
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    rates = {"bf16": 2e6 * n**3 / time_us(torch.mm, [(a, b)])[0]}
    if torch.cuda.get_device_capability(device) >= (8, 9):
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T, torch.ones((), device=device)

        def fp8(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        rates["fp8"] = 2e6 * n**3 / time_us(fp8, [(a8, b8)])[0]
    return Ceilings(copy=2 * source.numel() * 1e6 / copy_us, matmul=rates)


def table(lines: Iterable[Line]) -> str:
    """The lines as a table, one row per body, in order."""
    rows = [f"{'op':<18}{'shape':<26}{'who':<16}{'us':>10}{'GB/s':>8}{'TFLOP/s':>9}{'roofline':>10}"]
    for line in lines:
        launched = "" if line.graph else "  (launch cost included)"
        rows.append(
            f"{line.op:<18}{line.shape:<26}{line.who:<16}{line.us:>10.1f}{line.gb_per_s:>8.0f}{line.tflop_per_s:>9.1f}"
            f"{line.roofline:>10.0%}{launched}"
        )
    return "\n".join(rows)


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _where(device: torch.device) -> dict[str, str]:
    return dict(
        device=torch.cuda.get_device_name(device),
        date=datetime.date.today().isoformat(),
        commit=_git_commit(),
        torch=torch.__version__,
    )


def _git_commit() -> str:
    return _command("git", "rev-parse", "--short", "HEAD") or "unknown"


def _clock_mhz() -> int | None:
    text = _command("nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits")
    return int(text.splitlines()[0]) if text and text.splitlines()[0].isdigit() else None
