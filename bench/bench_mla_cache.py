"""Writing and reading the paged latent cache against torch's indexing of a contiguous one, at sizes of a CPU."""

import pytest
import torch

from k2kernels.ops.mla_cache import mla_append, mla_gather
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
