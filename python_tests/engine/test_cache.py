import pytest
import tiny
import torch

from k2kernels.engine.cache import LatentCache
from k2kernels.model import K2Config
from k2kernels.ops.mla_cache import mla_append, mla_gather


def cache(**changes):
    return LatentCache(tiny.config("kimi"), **{**dict(layers=2, rows=3, max_tokens=200), **changes})


def pages_of(made, row):
    return [page for page in made.block_table[row].tolist() if page >= 0]


def test_pages_are_handed_out_when_needed():
    made = cache()
    assert made.free_pages == 3 * 4
    for tokens, pages in [(1, 1), (64, 1), (65, 2), (3, 2), (200, 4)]:
        made.reserve(1, tokens)
        assert len(pages_of(made, 1)) == pages
    made.reserve(0, 130)
    taken = pages_of(made, 0) + pages_of(made, 1)
    assert len(set(taken)) == 7 and made.free_pages == 5
    assert pages_of(made, 2) == []


def test_growing_keeps_the_pages_and_freeing_returns_them():
    made = cache(num_pages=5)
    made.reserve(0, 64)
    first = pages_of(made, 0)
    made.reserve(1, 100)
    made.reserve(0, 180)
    assert pages_of(made, 0)[:1] == first and made.free_pages == 0
    with pytest.raises(ValueError, match=r"row 2 needs 2 more pages, 0 of 5 are free"):
        made.reserve(2, 70)
    assert pages_of(made, 2) == []
    freed = pages_of(made, 1)
    made.free(1)
    made.free(1)  # nothing is given back twice
    assert pages_of(made, 1) == [] and made.free_pages == 2
    made.reserve(2, 70)
    assert sorted(pages_of(made, 2)) == sorted(freed)
    made.free(2)
    made.reserve(1, 1)
    assert pages_of(made, 1)[0] in freed


def test_rows_are_written_where_the_table_says():
    made = cache()
    made.reserve(0, 70)
    made.reserve(2, 130)
    rows = torch.randn(2 * 66, 64)
    positions = torch.cat([torch.arange(66), torch.arange(64, 130)])
    positions[:3] = -1
    mla_append(rows, made.pages[1], made.block_table[[0, 2]], positions)
    got = mla_gather(made.pages[1], made.block_table[[0, 2]], positions, dtype=torch.float32)
    assert torch.equal(got[3:], rows[3:])
    assert not made.pages[0].any()
    assert made.pages[1].any(dim=-1).sum() == 2 * 66 - 3
    page = pages_of(made, 2)[2]
    assert torch.equal(made.pages[1, page, 1], rows[-1])


@pytest.mark.parametrize("cache_dtype, size", [("auto", 61 * 576 * 2), ("fp8", 61 * 656)])
def test_bytes_per_token_of_kimi_k2(cache_dtype, size):
    config = K2Config.preset("kimi-k2")
    made = LatentCache(
        config, layers=61, rows=1, max_tokens=64, dtype=torch.bfloat16, device="meta", cache_dtype=cache_dtype
    )
    assert made.bytes_per_token == size
    assert made.pages.numel() * made.pages.element_size() == 64 * size


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"tokens of row 0 must be at most max_tokens=200, got 201"):
        cache().reserve(0, 201)
    with pytest.raises(ValueError, match=r"'fp8' needs kv_lora_rank 512 and qk_rope_head_dim 64, got 48 and 16"):
        cache(cache_dtype="fp8")
    with pytest.raises(ValueError, match=r"cache_dtype must be 'auto' or 'fp8', got 'int8'"):
        cache(cache_dtype="int8")
