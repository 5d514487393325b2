"""Numbers that C++ defines and Python needs too: both extension modules export them, so that each has one definition.

They are read when a kernel is about to be launched, not at import: importing k2kernels and every body in plain PyTorch
work without an extension, except `k2kernels.parallel.VirtualRanks`, whose buffers are laid out as the kernels' are.
"""

from __future__ import annotations

import importlib
from typing import Any


class _Constants:
    """`constants.X` is what `constant(m, "X", ...)` in csrc/bind exports.

    Raises:
        ImportError: neither extension module with kernels is built.
        AttributeError: C++ exports no such number.
    """

    def __getattr__(self, name: str) -> int:
        self.__dict__.update(_exported())
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"csrc/bind exports no constant {name!r}") from None


def _exported() -> dict[str, Any]:
    errors = []
    for module in ("_C", "_emu"):  # the same numbers; a _C that was built without nvcc has none
        try:
            return importlib.import_module(f"k2kernels.{module}").constants
        except (ImportError, AttributeError) as error:
            errors.append(str(error))
    raise ImportError(f"the extension is not built ({errors[0]}); build it with: pip install -e .")


constants = _Constants()
