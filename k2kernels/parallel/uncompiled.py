"""`torch.compiler.disable` that does not import torch._dynamo, which takes as long as torch itself."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def uncompiled(function: Function) -> Function:
    """`function`, which torch.compile neither traces nor compiles: a graph breaks where it is called."""
    disabled: list[Callable] = []

    @functools.wraps(function)
    def run(*args, **kwargs):
        if "torch._dynamo" not in sys.modules:  # nothing is being compiled
            return function(*args, **kwargs)
        if not disabled:
            import torch

            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    run._torchdynamo_disable = True  # as torch.compiler.disable marks what it returns
    return run
