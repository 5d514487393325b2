"""Inputs of tests and benchmarks: model sizes, and caches with poison in everything that must not be read."""

from __future__ import annotations

import ctypes
import functools
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from k2kernels.reference.mla_cache import ROW_BYTES, pack


class ModelSizes(NamedTuple):
    """Sizes of one model, named as in its configuration file where that has a name."""

    hidden: int
    heads: int
    nope: int  # part of a query or key head without rotary position
    rope: int  # part with it
    value: int  # of a head
    latent: int  # kv_lora_rank
    experts: int
    top_k: int
    expert_intermediate: int

    @property
    def cache_row(self) -> int:
        return self.latent + self.rope

    @property
    def softmax_scale(self) -> float:
        """The softmax scale without YaRN's factor."""
        return (self.nope + self.rope) ** -0.5


KIMI_K2 = ModelSizes(
    hidden=7168, heads=64, nope=128, rope=64, value=128, latent=512, experts=384, top_k=8, expert_intermediate=2048
)

BAD_PAGES = (2147480000, -1, -2147483648)  # in entries of the block table that must not be read


class PagedCache(NamedTuple):
    kv_cache: Tensor  # [pages, page_size, D], or uint8 [pages, page_size, 656]
    block_table: Tensor  # int32 [B, max_pages]
    seq_lens: Tensor  # int32 [B]


def expert_indices(skew: str, tokens: int, top_k: int, experts: int) -> Tensor:
    """The experts of each token, int64 [T, K]: "one hot expert", "some dropped" (and some repeated), "all dropped",
    "first half" of the experts, or "uniform"."""
    if skew == "one hot expert":  # every token, plus one spread pair
        indices = torch.full((tokens, top_k), experts - 1)
        indices[:, :1] = torch.arange(tokens)[:, None] % experts
    elif skew == "all dropped":
        indices = torch.full((tokens, top_k), -1)
    elif skew == "some dropped":
        indices = torch.randint(-1, experts, (tokens, top_k))
        indices[::3] = -1
    else:
        some = experts // 2 if skew == "first half" else experts
        indices = torch.rand(tokens, some).argsort(-1)[:, :top_k]
    return indices


@functools.cache
def _tuples() -> Tensor:
    """Sixteen integers each, with a mean of squares of 4**5; about one in ten thousand random ones has it."""
    tuples = torch.randint(-55, 56, (2**19, 16), generator=torch.Generator().manual_seed(0))
    return tuples[tuples.square().sum(1) == 16 * 4**5]


def exact_rms_rows(rows: int, columns: int) -> Tensor:
    """float32 [rows, columns]: integers of at most 6 bits times a power of two, with a mean of squares of 4**n each.

    Sums of their squares are exact in float32 in any order, up to 8192 columns, and so is the inverse of the root:
    RMSNorm (with an eps that keeps it so) then has one right answer, bit for bit.
    """
    tuples = _tuples()
    picked = tuples[torch.randint(len(tuples), (rows, columns // 16))].flatten(1)
    rest = 2**5 * (1 - 2 * torch.randint(2, (rows, columns % 16)))
    return torch.cat([picked, rest], 1) * torch.exp2(torch.randint(-8, 3, (rows, 1)))


def guarded_memory(size: int, claimed: int) -> Tensor:
    """`size` bytes of the emulator's memory as uint8 [claimed]; a kernel that accesses memory around them faults."""
    from k2kernels import _emu

    address = _emu.allocate(size)
    buffer = (ctypes.c_uint8 * claimed).from_address(address)
    weakref.finalize(buffer, _emu.release, address)
    return torch.frombuffer(buffer, dtype=torch.uint8)


def guarded(x: Tensor) -> Tensor:
    """A contiguous copy of x between guard zones, whose access by an emulated kernel faults."""
    size = x.numel() * x.element_size()
    if size == 0:
        return x.clone()
    copy = guarded_memory(size, size).view(x.dtype).view(x.shape)
    return copy.copy_(x)


def poisoned_cache(
    rows: list[Tensor],
    page_size: int,
    *,
    quantize: bool = False,
    power_of_two: bool = False,
    strided: bool = False,
    spare_pages: int = 2,
) -> PagedCache:
    """A paged cache that holds rows[b] [seq_len, D] as sequence b, its pages in random order.

    Everything else is poison: NaN in unused slots and pages (in every field of a quantised row), page ids out of range
    in unused entries of the block table. With `strided`, pages and slots are further apart than their size, with NaN
    in between.
    """
    size = ROW_BYTES if quantize else rows[0].shape[1]
    dtype = torch.uint8 if quantize else rows[0].dtype
    needed = [-(-len(r) // page_size) for r in rows]
    pages = sum(needed) + spare_pages
    gap = 16 if strided else 0
    shape = (pages, page_size + (1 if strided else 0), size + gap)
    storage = torch.full(shape, 0xFF if quantize else torch.nan, dtype=dtype)
    kv_cache = storage[:, :page_size, :size]

    block_table = torch.tensor(BAD_PAGES, dtype=torch.int32).repeat(len(rows), max(needed) + 1)
    free = torch.randperm(pages, dtype=torch.int32)
    for b, (row, count) in enumerate(zip(rows, needed)):
        used, free = free[:count], free[count:]
        block_table[b, :count] = used
        position = torch.arange(len(row))
        page = used[position // page_size].long()
        kv_cache[page, position % page_size] = pack(row, power_of_two) if quantize else row
    return PagedCache(kv_cache, block_table, torch.tensor([len(r) for r in rows], dtype=torch.int32))
