"""From an op's Python body into the extension modules: `_C` on a GPU, `_emu` in the emulator.

Both hold the same functions: they take tensors, options and plans, launch on the current stream of the first tensor's
device, and return how many kernels they started.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import math
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k2kernels import _backend

_emulated_stream: contextvars.ContextVar[int] = contextvars.ContextVar("k2kernels_emulated_stream", default=0)


class Chip(NamedTuple):
    """k2k::Chip: what the choice of a kernel and of its grid depends on."""

    capability: int  # compute capability x 10
    multiprocessors: int  # SMs
    shared_memory: int  # the most bytes of a CTA


# The emulator takes any grid; with few SMs each CTA has several tasks, as on a GPU that is full.
EMULATED_CHIPS = {
    "sm_80": Chip(80, 6, 166912),
    "sm_89": Chip(89, 6, 101376),
    "sm_90a": Chip(90, 6, 232448),
    "sm_120": Chip(120, 6, 101376),
}


def chip(device: torch.device) -> Chip:
    """The chip that a call made here on tensors of `device` runs on."""
    mode = _backend.mode()
    return EMULATED_CHIPS[mode.arch] if mode.backend == "emulated" else _cuda_chip(device.index)


@functools.cache
def _cuda_chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def module(device: torch.device) -> ModuleType:
    """The extension module that serves a call made here: `_emu` or `_C`."""
    return _module("_emu" if device.type == "cpu" else "_C")


def launch(function: str, *args: Any, op: str | None = None) -> None:
    """Calls `function` of the module that the mode selects, which launches on PyTorch's current stream of the device
    of the first tensor; counts the kernels as those of `op`, by default the function's name."""
    mode = _backend.mode()
    if mode.backend == "emulated":
        extension = _module("_emu")
        extension.configure(int(mode.arch.removeprefix("sm_").removesuffix("a")), mode.seed, _emulated_stream.get())
    else:
        extension = _module("_C")
    _backend.count_launch(op or function, getattr(extension, function)(*args))


@contextlib.contextmanager
def emulated_together() -> Iterator[None]:
    """Emulated launches made in the `with` block run concurrently at its end, each on its `emulated_stream`."""
    together = _module("_emu").Together()
    together.begin()
    try:
        yield
    except BaseException:
        together.forget()
        raise
    together.run()


@contextlib.contextmanager
def emulated_stream(number: int) -> Iterator[None]:
    """Launches made in the `with` block run one after the other, concurrently with those of other streams."""
    token = _emulated_stream.set(number)
    try:
        yield
    finally:
        _emulated_stream.reset(token)


def matrices(x: Tensor) -> Tensor:
    """x [..., M, K] as [M, K] or [B, M, K] with stride 1 along columns.

    It is copied only if that stride differs, or if the leading axes cannot be viewed as one.
    """
    if x.stride()[-1] != 1:
        x = x.contiguous()
    return x if x.ndim <= 3 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def rows_begin_on_16_bytes(x: Tensor) -> bool:
    """Whether all rows of x, which lie along its last axis, begin at multiples of 16 bytes.

    `is_contiguous` says nothing of it: a contiguous view into a larger tensor begins anywhere.
    """
    places, size = x.data_ptr(), x.element_size()
    for stride in x.stride()[:-1]:
        places |= stride * size
    return places % 16 == 0


def rows_on_16_bytes(x: Tensor, *, distinct: bool = False) -> Tensor:
    """x [..., rows, columns] as kernels take it that copy 16 bytes at a time: stride 1 along columns, rows that begin
    at multiples of 16 bytes.

    It is copied only if it must be; where a row is no multiple of 16 bytes, the copy has the rest behind each.

    Args:
        distinct: rows may not share memory (a stride of 0), which a tensor map does not take.
    """
    strides, size = x.stride(), x.element_size()
    places = x.data_ptr()  # as rows_begin_on_16_bytes, whose call would cost as much
    for stride in strides[:-1]:
        places |= stride * size
    if places % 16 == 0 and strides[-1] == 1 and not (distinct and 0 in strides):
        return x
    columns, in_16_bytes = x.shape[-1], 16 // size
    copy = x.new_empty((*x.shape[:-1], -(-columns // in_16_bytes) * in_16_bytes))[..., :columns]
    if x.dtype == torch.float8_e4m3fn:
        copy.view(torch.uint8).copy_(x.view(torch.uint8))
        return copy
    return copy.copy_(x)


def why_not_emulated() -> str | None:
    """What keeps kernels from being emulated, if anything."""
    try:
        _module("_emu")
    except ImportError as error:
        return f"the emulator is not built ({error}); build it with: pip install -e ."
    return None


@functools.cache
def why_not_cuda(index: int) -> str | None:
    """What keeps kernels from running on CUDA device `index`, if anything."""
    try:
        archs = _module("_C").build_info()["cuda_archs"]
    except ImportError as error:
        return f"the extension is not built ({error}); build it with: pip install -e ."
    if not archs:
        return "the extension was built without nvcc; install the CUDA toolkit and build again: pip install -e ."
    major, minor = torch.cuda.get_device_capability(index)
    if code_for(archs, major, minor):
        return None
    return (
        f"no kernel is compiled for {torch.cuda.get_device_name(index)} (sm_{major}{minor}), only for "
        f"{', '.join(archs)}; build again with K2K_CUDA_ARCHS"
    )


def code_for(archs: Iterable[str], major: int, minor: int) -> str | None:
    """What a device (major, minor) runs of what CMake compiles for `archs`: "sm_90a", "PTX of sm_80", or None.

    Machine code runs on its own and later minor versions, with "a" on its own alone ("80-real", "90a-real"). Without
    "-real" PTX comes along, which a driver compiles for any later device.
    """
    machine_code, ptx = [], []
    for arch in archs:
        number, _, kind = arch.partition("-")
        of = divmod(int(number.rstrip("a")), 10)
        exact = number.endswith("a")
        if of == (major, minor) or (not exact and of[0] == major and of[1] <= minor):
            machine_code.append((of, exact, f"sm_{number}"))
        elif not exact and kind != "real" and of <= (major, minor):
            ptx.append((of, f"PTX of sm_{number}"))
    return max(machine_code or ptx, default=(None,))[-1]


@functools.cache
def any_module() -> ModuleType:
    """A module that holds kernels: plans and constants are the same in both.

    Raises:
        ImportError: neither is built with kernels.
    """
    errors = []
    for name in ("_C", "_emu"):
        try:
            found = importlib.import_module(f"k2kernels.{name}")
        except ImportError as error:
            errors.append(str(error))
        else:
            if hasattr(found, "constants"):  # a _C that was built without nvcc has none
                return found
            errors.append(f"k2kernels.{name} was built without kernels")
    raise ImportError(f"the extension is not built ({errors[0]}); build it with: pip install -e .")


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"k2kernels.{name}")
