"""The way of a call to its kernel, without kernels: what remains is what the host does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from k2kernels import _backend
from k2kernels.ops import _launch
from k2kernels.ops._register import OPS


class _Nothing:
    """An extension module whose functions do nothing, and say that they started one kernel; plans are made."""

    def __getattr__(self, function: str) -> Callable[..., Any]:
        if function.endswith("_plan"):
            from k2kernels import _emu

            found = getattr(_emu, function)
        else:
            found = lambda *args: 1  # noqa: E731 (cheaper to call than a method)
        setattr(self, function, found)
        return found


@contextlib.contextmanager
def no_kernels() -> Iterator[None]:
    """Inside, CPU tensors go the way of CUDA tensors, from the public function to a module that does nothing.

    Results hold whatever was in memory. Ops without a kernel run their reference.
    """
    nothing, choose = _Nothing(), _backend.choose
    with contextlib.ExitStack() as patched:
        for target, name, value in (
            (_backend, "choose", lambda op, device, *rest: choose(op, "cuda", *rest)),
            (_launch, "why_not_emulated", lambda: None),
            (_launch, "_module", lambda name: nothing),
            (_launch, "_cuda_chip", lambda index: _launch.EMULATED_CHIPS["sm_90a"]),
            (torch._C, "_cuda_getCurrentRawStream", lambda index: 0),
            *((op, "validate", None) for op in OPS.values()),  # which looks into CPU tensors alone
        ):
            patched.enter_context(mock.patch.object(target, name, value, create=target is torch._C))
        yield
