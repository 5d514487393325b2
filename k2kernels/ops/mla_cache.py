"""Writing and reading the paged cache of latent rows: the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments
from k2kernels.ops._launch import launch
from k2kernels.ops._register import declare
from k2kernels.reference import mla_cache as reference

ROW_BYTES, LATENT = reference.ROW_BYTES, reference.LATENT
QUANTIZED_SIZE = reference.LATENT + reference.ROPE  # elements of a row of ROW_BYTES
CACHE_DTYPES = (*FLOATS, torch.uint8)


def mla_append(
    kv: Tensor, kv_cache: Tensor, block_table: Tensor, positions: Tensor, *, power_of_two: bool = False
) -> None:
    """Writes new latent rows into a paged cache, in place.

    Args:
        kv: [T, D], rows [latent | rope]; bfloat16, float16, float32 or float64; rounded to the cache's dtype.
        kv_cache: [pages, page_size, D] floats, or uint8 [pages, page_size, 656] for D = 576: 512 e4m3 codes, 4 float32
            scales (one per 128 codes, as `quantize_1x128` makes them), 64 bfloat16. Any strides but those of expand().
        block_table: int32 [B, max_pages], the pages of each sequence. T is a multiple of B and token t belongs to
            sequence t // (T // B): B x s tokens of a batch, or one row of the table for each token (B = T).
        positions: int32 or int64 [T], place of each token in its sequence, 0 being the first; -1 writes nothing.
        power_of_two: round the scales up to powers of two, which a kernel that keeps scales in bfloat16 needs.

    Raises:
        TypeError, ValueError: for dtypes and shapes, for a kv that requires a gradient, and, on a CPU, for positions or
            pages out of range and for two tokens that go to the same slot. Nothing is written then.

    Source: the 656-byte row is FlashMLA's (tests/quant.py, "V32_FP8Sparse") and vLLM's ("fp8_ds_mla").
    """
    args = Arguments("mla_append")
    kv = args.tensor("kv", kv, ("T", "D"), FLOATS)
    kv_cache = check_cache(args, kv_cache, CACHE_DTYPES, kv.shape[1])
    block_table, positions = _check_tokens(args, block_table, positions)
    args.boolean("power_of_two", power_of_two)
    args.no_gradient(kv=kv, kv_cache=kv_cache)
    args.writable("kv_cache", kv_cache)
    _mla_append(kv, kv_cache, block_table, positions, power_of_two)


def mla_gather(
    kv_cache: Tensor, block_table: Tensor, positions: Tensor, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Reads latent rows back from a paged cache.

    Args:
        kv_cache, block_table, positions: as in `mla_append`; a position -1 reads nothing.
        dtype: of the result: bfloat16, float16, float32 or float64.

    Returns:
        [T, D] in dtype (D = 576 for the 656-byte layout: codes times scales in float32, rounded once); zeros where the
        position is -1. Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and, on a CPU, for positions or pages out of range.
    """
    args = Arguments("mla_gather")
    kv_cache = check_cache(args, kv_cache, CACHE_DTYPES)
    block_table, positions = _check_tokens(args, block_table, positions)
    args.choice("dtype", dtype, FLOATS)
    return _mla_gather(kv_cache, block_table, positions, dtype)


def check_cache(args: Arguments, kv_cache: Tensor, dtypes: tuple[torch.dtype, ...], size: int | None = None) -> Tensor:
    """A cache of rows with `size` elements (any number, if None)."""
    kv_cache = args.tensor("kv_cache", kv_cache, ("pages", "page_size", "row"), dtypes)
    shape = kv_cache.shape
    if kv_cache.dtype == torch.uint8:
        args.require(
            size in (None, QUANTIZED_SIZE),
            "kv_cache",
            lambda: f"floats for rows of {size} elements",
            "uint8",
            f"the {ROW_BYTES}-byte layout holds rows of {QUANTIZED_SIZE}",
        )
        size = ROW_BYTES
    args.require(size in (None, shape[2]), "kv_cache", lambda: f"[pages, page_size, {size}]", shape)
    args.require(shape[1] > 0, "kv_cache", "of page_size >= 1", shape)
    return kv_cache


def check_pages(op: str, block_table: Tensor, read: Tensor, pages: int) -> None:
    """Raises ValueError unless the entries of block_table that are `read` (a mask) name one of `pages` pages."""
    wrong = read & ((block_table < 0) | (block_table >= pages))
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: block_table must be in [0, {pages}) (pages of kv_cache) where it is used, "
            f"got {int(block_table[row, column])} at [{row}, {column}]"
        )


def _check_tokens(args: Arguments, block_table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    block_table = args.tensor("block_table", block_table, ("B", "max_pages"), torch.int32)
    positions = args.tensor("positions", positions, ("T",), (torch.int32, torch.int64))
    tokens, sequences = args.sizes["T"], args.sizes["B"]
    args.require(
        tokens == 0 or (sequences > 0 and tokens % sequences == 0),
        "positions",
        lambda: f"[T] with T a multiple of block_table's rows, {sequences}",
        positions.shape,
        "give one row of block_table per sequence with equally many tokens, or one per token",
    )
    return block_table, positions


def _validate(op: str, kv_cache: Tensor, block_table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Checks positions and pages; returns page and place inside the page of the tokens that have one."""
    pages, page_size = kv_cache.shape[:2]
    capacity = block_table.shape[1] * page_size
    if (wrong := positions[(positions < -1) | (positions.long() >= capacity)]).numel():
        raise ValueError(f"{op}: positions must be in [-1, {capacity}) (max_pages * page_size), got {int(wrong[0])}")
    wanted = positions >= 0
    sequence, position = reference.token_sequences(block_table, positions)[wanted], positions[wanted].long()
    column = position // page_size
    read = torch.zeros_like(block_table, dtype=torch.bool)
    read[sequence, column] = True
    check_pages(op, block_table, read, pages)
    return block_table[sequence, column].long(), position % page_size


def _validate_append(kv_cache: Tensor, block_table: Tensor, positions: Tensor) -> None:
    page, slot = _validate("mla_append", kv_cache, block_table, positions)
    place = (page * kv_cache.shape[1] + slot).sort().values
    if (twice := place[1:][place[1:] == place[:-1]]).numel():
        page, slot = divmod(int(twice[0]), kv_cache.shape[1])
        raise ValueError(f"mla_append: positions must name each slot once, got two tokens for page {page}, slot {slot}")


def _gather_outputs(kv_cache: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    size = QUANTIZED_SIZE if kv_cache.dtype == torch.uint8 else kv_cache.shape[-1]
    return kv_cache.new_empty(positions.shape[0], size, dtype=dtype)


def _table(block_table: Tensor) -> Tensor:
    return block_table if block_table.stride(-1) == 1 else block_table.contiguous()


def _launch_append(kv: Tensor, kv_cache: Tensor, block_table: Tensor, positions: Tensor, power_of_two: bool) -> None:
    kv = kv if kv.stride(-1) == 1 else kv.contiguous()
    launch("mla_append", kv, kv_cache, _table(block_table), positions.contiguous(), power_of_two)


def _launch_gather(rows: Tensor, kv_cache: Tensor, block_table: Tensor, positions: Tensor) -> None:
    launch("mla_gather", rows, kv_cache, _table(block_table), positions.contiguous())


def _unserved(dtype: torch.dtype, kv_cache: Tensor) -> str | None:
    """Why the kernels do not move rows of `dtype` into or out of this cache."""
    if torch.float64 in (dtype, kv_cache.dtype):
        return "no kernel computes in float64"
    if kv_cache.stride(-1) != 1:
        return f"kv_cache must have stride 1 in its last axis, got {kv_cache.stride(-1)}"
    if kv_cache.dtype == torch.uint8 and any(n % 16 for n in (kv_cache.data_ptr(), *kv_cache.stride()[:2])):
        return f"the {ROW_BYTES}-byte rows of kv_cache must begin at multiples of 16 bytes"
    return None


_mla_append = declare(
    reference.mla_append,
    launch=_launch_append,
    unserved=lambda kv, kv_cache: _unserved(kv.dtype, kv_cache),
    validate=_validate_append,
    mutates=("kv_cache",),
)
_mla_gather = declare(
    reference.mla_gather,
    outputs=_gather_outputs,
    launch=_launch_gather,
    unserved=_unserved,
    validate=lambda kv_cache, block_table, positions: _validate("mla_gather", kv_cache, block_table, positions),
)
