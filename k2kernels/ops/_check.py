"""Argument checks of the public functions. A message names op, argument, wanted, got and often the remedy."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int32, torch.int64)
LARGEST = 2**63 - 1  # an op takes ints of 64 bits


class Arguments:
    """The arguments of one call: each check binds the letters of its shape, and later checks must agree.

    Example::

        args = Arguments("fp8_gemm")
        a = args.tensor("a", a, ("M", "K"), torch.float8_e4m3fn)
        b = args.tensor("b", b, ("N", "K"), torch.float8_e4m3fn)  # K must equal a's; same device as a
    """

    def __init__(self, op: str):
        self.op = op
        self.sizes: dict[str, int] = {}
        self.device: torch.device | None = None

    def tensor(
        self,
        name: str,
        value: Any,
        shape: Sequence[int | str] | None = None,
        dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
        *,
        remedy: str = "",
    ) -> torch.Tensor:
        """Returns `value` as a tensor after checking it; anything with `__dlpack__` (CuPy, NumPy ...) is taken too.

        `shape` holds ints (that size), letters (any size, the same for the same letter) and may begin with "..."
        (any leading sizes).

        Raises:
            TypeError: it is no tensor, or of another dtype.
            ValueError: it is of another shape, or on another device than the tensors before it.
        """
        if not isinstance(value, torch.Tensor):
            if not hasattr(value, "__dlpack__"):
                raise TypeError(
                    f"{self.op}: {name} must be a tensor or have __dlpack__, got {type(value).__name__}{_also(remedy)}"
                )
            value = torch.from_dlpack(value)
        if value.layout is not torch.strided:
            raise TypeError(f"{self.op}: {name} must be dense, got layout {value.layout}; convert it with .to_dense()")
        got = value.dtype
        good_dtype = dtype is None or got is dtype or (isinstance(dtype, tuple) and got in dtype)
        if not good_dtype or (shape is not None and not self._bind(shape, value.shape)):
            raise (ValueError if good_dtype else TypeError)(
                f"{self.op}: {name} must be {self._wanted(shape, dtype)}, "
                f"got {list(value.shape)} {short(got)}{_also(remedy)}"
            )
        device = value.device
        if self.device is None:
            self.device = device
        elif device != self.device:
            raise ValueError(
                f"{self.op}: {name} must be on {self.device} like the arguments before it, "
                f"got {device}; move it with .to({str(self.device)!r})"
            )
        return value

    def optional(self, name: str, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """`tensor`, or None for None."""
        return None if value is None else self.tensor(name, value, *args, **kwargs)

    def require(self, condition: Any, name: str, wanted: str | Callable[[], str], got: Any, remedy: str = "") -> None:
        """Raises ValueError unless `condition` holds: `name` must be `wanted`, got `got`.

        What holds sizes is given as a function that makes the text (torch.compile cannot format a symbolic size), or as
        a shape: a text that is made in advance costs more than the check.
        """
        if not condition:
            wanted = wanted() if callable(wanted) else wanted
            got = got() if callable(got) else list(got) if isinstance(got, torch.Size) else got
            raise ValueError(f"{self.op}: {name} must be {wanted}, got {got}{_also(remedy)}")

    def choice(self, name: str, value: Any, choices: Sequence[Any]) -> Any:
        """`value`, which must be one of `choices`."""
        if value not in choices:
            self.require(False, name, "one of " + ", ".join(map(repr, choices)), repr(value))
        return value

    def boolean(self, name: str, value: Any) -> bool:
        """`value`, which must be True or False."""
        if not isinstance(value, bool):
            raise TypeError(f"{self.op}: {name} must be True or False, got {value!r}")
        return value

    def number(self, name: str, value: Any, *, positive: bool = False) -> float:
        """`value` as a float, which must be finite and, with `positive`, above 0."""
        if type(value) is not float and (not isinstance(value, numbers.Real) or isinstance(value, bool)):
            raise TypeError(f"{self.op}: {name} must be a number, got {type(value).__name__}")
        low, wanted = (0, "positive and finite") if positive else (-math.inf, "finite")
        if not low < value < math.inf:
            self.require(False, name, wanted, value)
        return float(value)

    def integer(self, name: str, value: Any, low: int, high: int | None = None, *, remedy: str = "") -> int:
        """`value`, which must be an int of at least `low` and, if given, at most `high`."""
        good = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
        if good and high is None and value > LARGEST:
            high = LARGEST
        if not (good and value >= low and (high is None or value <= high)):
            wanted = f"an int >= {low}" if high is None else f"an int in {low} .. {high}"
            self.require(False, name, wanted, repr(value), remedy)
        return value

    def no_gradient(self, **tensors: torch.Tensor | None) -> None:
        """Raises ValueError where one of `tensors` requires a gradient, for ops that have no backward."""
        for name, value in tensors.items():
            if value is not None and value.requires_grad:
                self.require(
                    not torch.is_grad_enabled(),
                    name,
                    "a tensor that needs no gradient",
                    "one with requires_grad",
                    "call the op under torch.no_grad() or pass a detached tensor",
                )

    def writable(self, name: str, value: torch.Tensor) -> None:
        """Raises ValueError where elements of `value` share memory, for ops that write into it."""
        if value.is_contiguous():
            return
        axes = [(i, value.stride(i), size) for i, size in enumerate(value.shape) if size != 1]
        for i, stride, _ in axes:  # beyond the furthest element of all narrower axes; torch.compile cannot sort sizes
            reach = sum((size - 1) * other for j, other, size in axes if other <= stride and j != i)
            self.require(
                stride > reach or value.numel() == 0,
                name,
                "a tensor with memory for each element",
                "one whose elements share it",
                "call .contiguous() first",
            )

    def _bind(self, shape: Sequence[int | str], got: torch.Size) -> bool:
        skip = len(got) - len(shape)  # one less than the sizes that "..." covers
        if skip and (skip < -1 or "..." not in shape[:1]):
            return False
        sizes, i = self.sizes, skip
        for dim in shape:
            if not isinstance(dim, str):
                if dim != got[i]:
                    return False
            elif dim in sizes:
                if sizes[dim] != got[i]:
                    return False
            elif dim != "...":
                sizes[dim] = got[i]
            i += 1
        return True

    def _wanted(self, shape: Sequence[int | str] | None, dtype: torch.dtype | tuple[torch.dtype, ...] | None) -> str:
        parts = []
        if shape is not None:
            known = [f"{d}={self.sizes[d]}" if d in self.sizes else str(d) for d in shape]
            parts.append("[" + ", ".join(known) + "]")
        if dtype is not None:
            parts.append(" or ".join(map(short, dtype if isinstance(dtype, tuple) else (dtype,))))
        return " ".join(parts)


def check_cu_seqlens(op: str, name: str, cu_seqlens: torch.Tensor, total: int, *, padded: bool = False) -> None:
    """Raises ValueError unless the contents of `cu_seqlens` rise from 0 to `total`; for `validate` of an op.

    `padded`: tokens may follow that belong to no sequence.
    """
    ends = cu_seqlens.tolist()
    wrong_end = ends[-1] > total if padded else ends[-1] != total
    if ends[0] != 0 or wrong_end or any(a > b for a, b in itertools.pairwise(ends)):
        end = f"at most {total}" if padded else total
        raise ValueError(f"{op}: {name} must rise from 0 to {end} (the number of tokens), got {_brief(ends)}")


def check_groups(
    op: str, offsets: torch.Tensor, counts: torch.Tensor | None, capacity: int, *, alignment: int = 1
) -> None:
    """Raises ValueError unless the groups' rows are disjoint, in order and within `capacity`; for `validate` of an op.

    `offsets` [G+1] must rise within 0 .. capacity; `counts` [G], if any, must fit between them; a group that has rows
    must start at a multiple of `alignment`.
    """
    starts = offsets.tolist()
    if starts[0] < 0 or starts[-1] > capacity or any(a > b for a, b in itertools.pairwise(starts)):
        raise ValueError(f"{op}: offsets must rise within 0 .. {capacity} (the capacity), got {_brief(starts)}")
    room = [b - a for a, b in itertools.pairwise(starts)]
    sizes = room if counts is None else counts.tolist()
    if any(not 0 <= size <= most for size, most in zip(sizes, room)):
        raise ValueError(f"{op}: counts must fit between the offsets, at most {_brief(room)}, got {_brief(sizes)}")
    if any(size and start % alignment for size, start in zip(sizes, starts)):
        raise ValueError(f"{op}: offsets must be multiples of {alignment} where a group has rows, got {_brief(starts)}")


def check_counts(op: str, name: str, counts: torch.Tensor, most: int) -> None:
    """Raises ValueError unless the contents of `counts` are within 0 .. most; for `validate` of an op."""
    sizes = counts.tolist()
    if any(not 0 <= size <= most for size in sizes):
        raise ValueError(f"{op}: {name} must be within 0 .. {most} (the rows of a group), got {_brief(sizes)}")


def check_blocks(
    args: Arguments,
    name: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    row_offset: int = 0,
    *,
    columns_remedy: str = "",
    rows_remedy: str = "",
) -> None:
    """Raises ValueError where `codes` [..., N, K] is visibly a shard that begins inside a 128x128 block.

    `scales` [..., blocks of rows, blocks of K] belong to blocks that begin at the shard's first column, and
    `row_offset` rows before its first row. A view shows where it begins in the matrix that it was cut from; a copy
    of a shard is not distinguishable from a weight. In a graph of torch.compile nothing is checked.
    """
    if torch.compiler.is_compiling():
        return
    start, stride, (n, k) = codes.storage_offset(), codes.stride(-2), codes.shape[-2:]
    if start == 0 or codes.stride(-1) != 1 or n < 2 or stride < k:
        return
    row, column = divmod(start, stride)
    if column % 128 and column + k <= stride and codes.untyped_storage().nbytes() % stride == 0:
        block = column // 128 * 128
        raise ValueError(
            f"{args.op}: {name} must be cut along K at a multiple of 128, where a block with its scale begins, "
            f"got a view from column {column} on; take it from column {block} on{columns_remedy}, or, if its blocks do "
            f"begin at column {column}, pass {name}.contiguous()"
        )
    scales_stride = scales.stride(-2)
    if scales.stride(-1) != 1 or scales_stride < scales.shape[-1]:
        return
    # Scales cut from those of the same matrix begin with the block that holds the first row, in its column. Those of a
    # later one of several matrices, whose rows are no multiple of 128, have further rows of scales before them; a
    # matrix in a flat buffer of others begins anywhere.
    scale_row, scale_column = divmod(scales.storage_offset(), max(scales_stride, 1))
    inside = column + k <= stride and scale_column == column // 128
    if inside and row_offset == 0 and scale_row > 0 and scale_row == row // 128 and row % 128:
        raise ValueError(
            f"{args.op}: {name} must begin with a block of 128 rows, got a view from row {row} on, "
            f"{row % 128} rows into its block{_also(rows_remedy)}"
        )


def _brief(values: list) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, {values[2]}, ..., {values[-1]}]"


def short(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _also(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""
