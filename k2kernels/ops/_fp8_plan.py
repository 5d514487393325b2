"""Which kernel serves an FP8 GEMM: the plans there are, their estimated costs, and plans that a caller forces."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from k2kernels.ops._check import Arguments
from k2kernels.ops._constants import constants
from k2kernels.ops._launch import Chip, any_module, chip

PIN = "K2KERNELS_FP8_GEMM"


class GemmPlan(NamedTuple):
    """What serves a GEMM: k2k::GemmPlan.

    Attributes:
        kernel: its name, one of `fp8_gemm_kernels()`.
        share: the operand that the two CTAs of a cluster share, "a" or "b", if any; of the large kernels.
        split: parts into which K is cut, one per CTA of a cluster; of the small kernels.
    """

    kernel: str
    share: str | None = None
    split: int = 1


def fp8_gemm_kernels() -> tuple[str, ...]:
    """The names of the kernels that serve FP8 GEMMs; the numbers are the rows and columns of a tile."""
    return tuple(families())


@functools.cache
def families() -> dict[str, str]:
    """Kernel -> k2k::GemmFamily, by name."""
    return dict(any_module().fp8_gemm_kernels())


def fp8_gemm_plan(
    m: int,
    n: int,
    k: int,
    *,
    groups: int = 1,
    fine: bool = False,
    batch_invariant: bool = False,
    swiglu: bool = False,
    device: torch.device | str = "cuda",
) -> GemmPlan:
    """What serves a GEMM of these sizes, unless `fp8_gemm_kernel` forces something else.

    Args:
        m: rows of A; where there are several groups, approximate rows of one: `expected_m`, or cap / G, or maxM.
        n, k: the other sizes.
        groups: matrices of B.
        fine: scales of B are 1x128, or b_row_offset is not 0.
        batch_invariant: as for `fp8_gemm`.
        swiglu: a call of `fp8_gemm_swiglu` with n = 2I: sm90_swiglu_128x256 serves it, or another kernel and that of
            `swiglu_quantize`.
        device: a CUDA device; within `emulated()` the emulated chip takes its place.
    """
    options = dict(groups=groups, fine=fine, batch_invariant=batch_invariant, swiglu=swiglu, device=device)
    return fp8_gemm_costs(m, n, k, **options)[0][0]


def fp8_gemm_costs(
    m: int,
    n: int,
    k: int,
    *,
    groups: int = 1,
    fine: bool = False,
    batch_invariant: bool = False,
    swiglu: bool = False,
    device: torch.device | str = "cuda",
) -> list[tuple[GemmPlan, float]]:
    """All plans that can serve a GEMM and their estimated clocks; the first one serves it.

    Arguments as for `fp8_gemm_plan`.
    """
    sizes = groups, m, n, k
    return plans_on(chip(torch.device(device)), *sizes, fine=fine, batch_invariant=batch_invariant, swiglu=swiglu)


def plans_on(
    chip: Chip,
    groups: int,
    m: int,
    n: int,
    k: int,
    *,
    fine: bool = False,
    batch_invariant: bool = False,
    swiglu: bool = False,
) -> list[tuple[GemmPlan, float]]:
    """`fp8_gemm_costs` on a chip that need not be present."""
    costs = any_module().fp8_gemm_costs(chip, groups, m, n, k, fine, batch_invariant, swiglu)
    return sorted(costs, key=lambda cost: cost[1])


@contextlib.contextmanager
def fp8_gemm_kernel(kernel: str, share: str | None = None, split: int = 1) -> Iterator[None]:
    """Serves the GEMMs in a `with` block by this `GemmPlan`, whatever their sizes.

    sm90_128x128_fine serves scales for each column instead of the other large kernels of sm90, and groups along K
    instead of the small ones. sm90_swiglu_128x256 is for `fp8_gemm_swiglu` alone; with another kernel that op takes a
    second one for the quantisation.

    The environment variable K2KERNELS_FP8_GEMM does the same for a whole process, except in such blocks:
    "sm90_128x192,share=a", "sm90_small_8x64,split=4". It is read when the first GEMM starts (`pinned_plan`).

    Raises:
        ValueError: for a name that is none of `fp8_gemm_kernels()`, a `share` that is not "a", "b" or None, a `split`
            that is not 1, 2, 4 or 8, or one that the kernel does not support. A GEMM raises RuntimeError where the
            kernel does not run on the GPU or does not support the arguments.
    """
    token = _forced.set(_checked("fp8_gemm_kernel", GemmPlan(kernel, share, split)))
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def pinned_plan() -> GemmPlan | None:
    """The plan that the environment variable K2KERNELS_FP8_GEMM names; None where it is not set or empty.

    Raises:
        ValueError: it is not KERNEL[,share=a|b][,split=N], or names what `fp8_gemm_kernel` refuses.
    """
    text = os.environ.get(PIN, "")
    if not text:
        return None
    kernel, *rest = text.split(",")
    options: dict[str, str] = {}
    for part in rest:
        name, equals, value = part.partition("=")
        known = name in ("share", "split") and name not in options
        if not known or not equals or (name == "split" and not value.isdecimal()):
            raise ValueError(
                f"{PIN}: must be KERNEL[,share=a|b][,split=1|2|4|8], such as sm90_128x192,share=a, got {text!r}; unset "
                "it to let sizes choose"
            )
        options[name] = value
    return _checked(PIN, GemmPlan(kernel, options.get("share"), int(options.get("split", 1))))


def forced_plan() -> GemmPlan | None:
    """The plan of the innermost `fp8_gemm_kernel` block, else the pinned one."""
    return _forced.get() or pinned_plan()


def _checked(caller: str, plan: GemmPlan) -> GemmPlan:
    args = Arguments(caller)
    args.choice("kernel", plan.kernel, fp8_gemm_kernels())
    family = families()[plan.kernel]
    args.choice("share", plan.share, (None, "a", "b") if family in ("sm90", "sm90_swiglu") else (None,))
    splits = [1 << i for i in range(constants.GEMM_MOST_SPLIT.bit_length())]
    args.choice("split", plan.split, tuple(splits) if family == "sm90_small" else (1,))
    return plan


_forced: contextvars.ContextVar[GemmPlan | None] = contextvars.ContextVar("k2kernels_fp8_gemm_kernel", default=None)
