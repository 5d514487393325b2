"""Calls without their kernels, to run and time the host's work alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from k2kernels import _backend
from k2kernels.ops import _launch
from k2kernels.ops._register import OPS


class _Nothing:
    """An extension module whose functions do nothing and return 1 as the number of kernels; plans are computed."""

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
    """In this context CPU tensors take the path of CUDA tensors, from the public function to the stand-in.

    Results are uninitialised. Ops without a kernel run their reference.
    """
    nothing, choose = _Nothing(), _backend.choose
    with contextlib.ExitStack() as patched:
        for target, name, value in (
            (_backend, "choose", lambda op, device, *rest: choose(op, "cuda", *rest)),
            (_launch, "why_not_emulated", lambda: None),
            (_launch, "_module", lambda name: nothing),
            (_launch, "_cuda_chip", lambda index: _launch.EMULATED_CHIPS["sm_90a"]),
            *((op, "validate", None) for op in OPS.values()),  # which looks into CPU tensors alone
        ):
            patched.enter_context(mock.patch.object(target, name, value))
        yield
