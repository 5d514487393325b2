"""Which body of an op serves a call: the reference, the CUDA kernel, or the emulated kernel.

The device of the tensors decides (`auto`): CPU tensors get the reference, CUDA tensors the kernel. `backend()` and
`emulated()` override that for the calls inside a `with` block.

A mode belongs to the context (`contextvars`) that entered it: a thread of its own starts with `auto`, also those of a
pool. `asyncio.to_thread` and `contextvars.copy_context().run` carry the mode along.
"""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_120")


class UnsupportedError(RuntimeError):
    """No kernel serves this device, this size or these options."""


class PeerTimeout(RuntimeError):
    """Another rank did not answer in time.

    Attributes:
        phase: what was waited for ("dispatch", "combine", "dispatch backward", ...).
        ranks: who did not answer, as far as is known.
        epoch: the number of the call that waited, counted by each transport from 1 on.
    """

    def __init__(self, message: str, *, phase: str = "", ranks: tuple[int, ...] = (), epoch: int = 0):
        super().__init__(message)
        self.phase = phase
        self.ranks = ranks
        self.epoch = epoch


class Mode(NamedTuple):
    """What the innermost `with` block selects."""

    backend: str = "auto"  # auto, reference, cuda or emulated
    arch: str | None = None  # emulated only
    seed: int = 0  # emulated only: the adversarial schedule


_mode: contextvars.ContextVar[Mode] = contextvars.ContextVar("k2kernels_mode", default=Mode())  # noqa: B039 (immutable)
_outer: contextvars.ContextVar[tuple[Mode, ...]] = contextvars.ContextVar("k2kernels_outer_modes", default=())
_launches: Counter[str] = Counter()
_warned: set[tuple[str, str]] = set()


class _Entered(contextlib.ContextDecorator):
    """A `with` block of a mode; the same object may be entered again, also inside its own block."""

    def __init__(self, mode: Mode):
        self.mode = mode

    def __enter__(self) -> None:
        _outer.set((*_outer.get(), _mode.get()))
        _mode.set(self.mode)

    def __exit__(self, *_: object) -> None:
        if not _outer.get():
            raise RuntimeError(
                "a block of backend() or emulated() must be left in the thread, or the task, that entered it"
            )
        *outer, mode = _outer.get()
        _outer.set(tuple(outer))
        _mode.set(mode)


def backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Forces one body for the calls in a `with` block: "reference", "cuda", or "auto" (by device).

    Raises:
        ValueError: for any other name.
    """
    if name not in ("auto", "reference", "cuda"):
        raise ValueError(f"backend: name must be 'auto', 'reference' or 'cuda', got {name!r}")
    return _Entered(Mode(name))


def emulated(arch: str = "sm_80", seed: int = 0) -> contextlib.AbstractContextManager[None]:
    """Runs the CUDA kernels on the CPU emulator, for CPU tensors, in a `with` block.

    Args:
        arch: of which chip: "sm_80" (A100: the portable kernels), "sm_89" or "sm_120" (the same with 99 KB of shared
            memory and e4m3 products) or "sm_90a" (Hopper's).
        seed: the adversarial schedule of warps and CTAs: 0 is round robin, 1 depth first, any other number random
            priorities of the warps. Asynchronous copies complete as late as the program allows, which finds most
            bugs; of every eight seeds, with the seventh (6, 14, ...) they complete at any time, with the eighth (7, 15,
            ...) at once.

    The block applies to the thread, or asyncio task, that entered it, and not to threads that are started inside.
    Several threads may emulate at once. Until the last of their launches ends, SIGSEGV, SIGBUS, SIGFPE and SIGILL are
    the emulator's; a fault outside kernels reaches the handler from before.

    Raises:
        ValueError: for any other arch, or a seed that is no int.
    """
    if arch not in ARCHS:
        raise ValueError(f"emulated: arch must be one of {ARCHS}, got {arch!r}")
    if not isinstance(seed, int):
        raise ValueError(f"emulated: seed must be an int, got {seed!r}")
    return _Entered(Mode("emulated", arch, seed))


def mode() -> Mode:
    """What applies to a call made here."""
    return _mode.get()


def choose(op: str, device: str, why_not: Callable[..., str | None], *args: Any) -> str:
    """The body that serves `op` on tensors of `device` ("cpu" or "cuda"): "reference", "cuda" or "emulated".

    Args:
        why_not: called with `args` where a kernel could serve; says what keeps it from doing so, if anything.

    Raises:
        UnsupportedError: when the mode selects a kernel that cannot serve, or another device.
    """
    wanted = _mode.get().backend
    if wanted == "reference" or (wanted == "auto" and device == "cpu"):
        return "reference"
    if wanted == "emulated":
        if device != "cpu":
            raise UnsupportedError(f"{op}: emulated() takes CPU tensors, got {device} tensors; move them with .cpu()")
        if reason := why_not(*args):
            raise UnsupportedError(f"{op}: cannot be emulated: {reason}; leave emulated() to get the reference")
        return "emulated"
    if wanted == "cuda" and device != "cuda":
        raise UnsupportedError(
            f"{op}: backend('cuda') takes CUDA tensors, got {device} tensors; "
            "move them with .cuda(), or run the kernel on the CPU inside emulated()"
        )
    reason = why_not(*args)
    if not reason:
        return "cuda"
    if wanted == "cuda":
        raise UnsupportedError(f"{op}: {reason}; backend('auto') serves it by the reference")
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(f"{op}: {reason}; the reference (plain PyTorch) runs on the GPU", stacklevel=3)
    return "reference"


def count_launch(op: str, kernels: int = 1) -> None:
    """Notes that `kernels` kernels of `op` were started, natively or emulated."""
    _launches[op] += kernels


def launch_count(op: str | None = None) -> int:
    """Kernels launched so far, natively or emulated: of one op, or of all (None).

    A test that compares a kernel with the reference asserts that this number grew; else it compared the
    reference with itself.
    """
    return sum(_launches.values()) if op is None else _launches[op]
