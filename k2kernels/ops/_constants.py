"""Numbers that C++ defines and Python needs too: both extension modules export them, so that each has one definition.

They are read when a kernel is about to be launched, not at import: importing k2kernels and every body in plain PyTorch
work without an extension, except `k2kernels.parallel.VirtualRanks`, whose buffers are laid out as the kernels' are.
"""

from __future__ import annotations

from k2kernels.ops._launch import any_module


class _Constants:
    """`constants.X` is what `constant(m, "X", ...)` in csrc/bind exports.

    Raises:
        ImportError: neither extension module with kernels is built.
        AttributeError: C++ exports no such number.
    """

    def __getattr__(self, name: str) -> int:
        self.__dict__.update(any_module().constants)
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"csrc/bind exports no constant {name!r}") from None


constants = _Constants()
