"""Writing and reading the paged latent cache against torch's indexing of a contiguous one, at sizes of a CPU."""

import pytest
import torch

from k2kernels.ops.mla_cache import mla_append, mla_gather
from k2kernels.testing.bench import Case
from k2kernels.testing.inputs import KIMI_K2, poisoned_cache

CACHES = ("bfloat16", "656-byte")
SHAPES = {"one token of 8 sequences": (8, 1), "512 tokens": (1, 512)}


def make(shape, cache):
    batch, tokens = SHAPES[shape]
    torch.manual_seed(0)
    rows = [torch.randn(tokens, KIMI_K2.cache_row, dtype=torch.bfloat16) for _ in range(batch)]
    paged = poisoned_cache(rows, 64, quantize=cache == "656-byte")
    return torch.cat(rows), paged.kv_cache, paged.block_table, torch.arange(tokens).repeat(batch)


@pytest.mark.benchmark(group="mla_append")
@pytest.mark.parametrize("who", [*CACHES, "torch index"])
@pytest.mark.parametrize("shape", SHAPES)
def test_append(benchmark, shape, who):
    kv, cache, block_table, positions = make(shape, who)
    if who == "torch index":
        flat, slots = cache.flatten(0, 1), torch.randperm(cache.shape[0] * cache.shape[1])[: len(kv)]
        benchmark(flat.index_copy_, 0, slots, kv)
    else:
        benchmark(mla_append, kv, cache, block_table, positions)


@pytest.mark.benchmark(group="mla_gather")
@pytest.mark.parametrize("who", [*CACHES, "torch index"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gather(benchmark, shape, who):
    kv, cache, block_table, positions = make(shape, who)
    if who == "torch index":
        flat, slots = cache.flatten(0, 1), torch.randperm(cache.shape[0] * cache.shape[1])[: len(kv)]
        benchmark(flat.index_select, 0, slots)
    else:
        benchmark(mla_gather, cache, block_table, positions)


def gpu_cases() -> list[Case]:
    """Rows of 128 sequences, and of a prompt of 4096 tokens, into and out of both layouts."""
    cases = []
    for tokens in (128, 4096):
        for name, dtype, width, row_bytes in (
            ("bf16", torch.bfloat16, KIMI_K2.cache_row, 2 * KIMI_K2.cache_row),
            ("656", torch.uint8, 656, 656),
        ):

            def rows(device: torch.device, tokens=tokens, dtype=dtype, width=width) -> tuple[torch.Tensor, ...]:
                pages = tokens // 64
                kv = torch.randn(tokens, KIMI_K2.cache_row, device=device).bfloat16()
                cache = torch.zeros(pages, 64, width, dtype=dtype, device=device)
                table = torch.randperm(pages, device=device).int()[None]
                positions = torch.arange(tokens, device=device)
                mla_append(kv, cache, table, positions)
                return kv, cache, table, positions

            moved = tokens * (2 * KIMI_K2.cache_row + row_bytes)
            shape = f"{tokens} tokens, {name}"
            cases += [
                Case("mla_append", shape, moved, rows, {"k2kernels": mla_append}),
                Case("mla_gather", shape, moved, rows, {"k2kernels": lambda kv, *args: mla_gather(*args)}),
            ]
    return cases
