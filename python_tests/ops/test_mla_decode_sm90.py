"""Hopper's kernel of mla_decode, in the emulator."""

import math

import pytest
import torch

import k2kernels
from k2kernels import _emu
from k2kernels.ops import mla_decode as module
from k2kernels.ops._launch import EMULATED_CHIPS
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import KIMI_K2, guarded, poisoned_cache

SEEDS = range(4)  # round robin, depth first, two random schedules
SEQ_LENS = [0, 1, 63, 64, 65, 127, 129, 200]
SCALE = KIMI_K2.softmax_scale
# Logits are float32 sums of 576 products of unit normals: partial sums are at most |q| |k| = 576, and a few of their
# roundings (2**-24) do not cancel.
LOGIT_ERROR = 4 * 2.0**-24 * 576 * SCALE


def attention(queries, rows, causal, dtype):
    """out, lse, max_logits of queries[b] [s_q, H, 576] over rows[b] [s_k, 576], computed in `dtype`, packed."""
    outs, lses, peaks = [], [], []
    for q, kv in zip(queries, rows):
        for i, one in enumerate(q.to(dtype)):
            seen = kv[: max(len(kv) - len(q) + i + 1, 0) if causal else len(kv)].to(dtype)
            logits = one @ seen.T * SCALE
            outs.append(torch.softmax(logits, -1) @ seen[:, :512])
            lses.append(torch.logsumexp(logits, -1))
            peaks.append(logits.amax(-1) if len(seen) else torch.full_like(lses[-1], -math.inf))
    return torch.stack(outs), torch.stack(lses), torch.stack(peaks)


def make(seq_lens, q_lens, heads, page_size, dtype=torch.bfloat16, **options):
    rows = [torch.randn(n, 576).to(dtype) for n in seq_lens]
    queries = [torch.randn(n, heads, 576).to(dtype) for n in q_lens]
    return queries, rows, poisoned_cache(rows, page_size, **options)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def run(q, cache, *, seed, split="auto", cu_seqlens_q=None, **options):
    """The result of Hopper's kernel; it is asserted that this is what runs."""
    tokens, heads = math.prod(q.shape[:-2]), q.shape[-2]
    queries = q.shape[1] if cu_seqlens_q is None else 0
    page_size, capacity = cache.kv_cache.shape[1], cache.block_table.shape[1] * cache.kv_cache.shape[1]
    sizes = (len(cache.seq_lens), tokens, heads)
    chip = EMULATED_CHIPS["sm_90a"]
    fixed = 0 if split == "auto" else split
    assert _emu.mla_decode_plan(chip, sizes, queries, capacity, page_size, fixed, False, True)[-1]
    before = k2kernels.launch_count("mla_decode")
    with k2kernels.emulated("sm_90a", seed=seed):
        got = k2kernels.mla_decode(
            q, *cache, softmax_scale=SCALE, split=split, cu_seqlens_q=cu_seqlens_q, return_max_logits=True, **options
        )
    assert k2kernels.launch_count("mla_decode") - before in (1, 2)  # attention, and the joining of its parts
    return got


def check(got, queries, rows, causal=True):
    dtype = queries[0].dtype
    exact = attention(queries, rows, causal, torch.float64)
    same = attention(queries, rows, causal, dtype)
    shape = exact[0].shape
    check_close(got.out.reshape(shape), exact[0], same_precision=same[0], max_cos_diff=5e-6, name="out")
    for name, x, y, units in (("lse", got.lse, exact[1], 8.01), ("max_logits", got.max_logits, exact[2], 2.01)):
        budget = LOGIT_ERROR + units / 65536 * y.abs().nan_to_num(posinf=0)
        check_close(x.reshape(shape[:-1]), y, budget=budget, name=name)


# Every value of each column, and most pairs of them.
@pytest.mark.parametrize(
    "s_q, heads, page_size, causal, split, strided, dtype, seed",
    [
        (1, 64, 64, True, "auto", False, torch.bfloat16, 0),
        (1, 64, 64, True, "auto", True, torch.bfloat16, 1),
        (1, 64, 64, False, 64, False, torch.float16, 2),
        (1, 64, 16, True, "auto", True, torch.bfloat16, 3),
        (1, 128, 32, True, 128, False, torch.bfloat16, 0),
        (1, 63, 128, True, "auto", False, torch.float16, 1),
        (1, 48, 48, True, "auto", False, torch.bfloat16, 2),
        (2, 64, 16, True, 100, False, torch.bfloat16, 1),
        (2, 63, 32, False, "auto", True, torch.bfloat16, 3),
        (2, 128, 128, True, "auto", False, torch.float16, 2),
        (2, 48, 64, True, 64, True, torch.float16, 0),
        (3, 64, 32, True, "auto", False, torch.float16, 0),
        (3, 63, 64, True, 64, False, torch.bfloat16, 2),
        (3, 48, 16, False, "auto", False, torch.bfloat16, 1),
        (3, 128, 64, True, "auto", True, torch.bfloat16, 3),
        (4, 16, 64, True, "auto", False, torch.bfloat16, 3),
    ],
    ids=str,
)
def test_equals_attention(s_q, heads, page_size, causal, split, strided, dtype, seed):
    queries, rows, cache = make(SEQ_LENS, [s_q] * 8, heads, page_size, dtype, strided=strided)
    got = run(torch.stack(queries), cache, seed=seed, split=split, causal=causal)
    check(got, queries, rows, causal)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("q_lens", [[0, 1, 2, 3, 5, 4, 0, 1], [0, 0, 0, 0, 0, 0, 0, 9]], ids=str)
@pytest.mark.parametrize("split", ["auto", 64])
def test_ragged_queries(split, q_lens, seed):
    queries, rows, cache = make(SEQ_LENS, q_lens, 40, 32)
    got = run(torch.cat(queries), cache, seed=seed, split=split, cu_seqlens_q=cumulative(q_lens))
    check(got, queries, rows)


# Long enough that a stage of the ring is filled many times, and short ones behind it, so that tasks are known ahead.
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("split", ["auto", 192])
def test_many_blocks_and_many_tasks(split, seed):
    seq_lens = [1500, *[3, 70] * 12]
    queries, rows, cache = make(seq_lens, [1] * 25, 64, 64)
    got = run(torch.stack(queries), cache, seed=seed, split=split)
    check(got, queries, rows)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("page_size", [16, 64])
def test_nothing_beside_the_inputs_is_read(page_size, seed):
    queries, rows, cache = make([130, 64, 7], [1] * 3, 64, page_size, spare_pages=0)
    # Not even a neighbour of the last needed entry of the block table; a cache of just the pages that are named.
    table = cache.block_table[:, : -(-130 // page_size)]
    cache = type(cache)(guarded(cache.kv_cache), guarded(table), guarded(cache.seq_lens))
    check(run(guarded(torch.stack(queries)), cache, seed=seed), queries, rows)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("split", ["auto", 64])
def test_nothing_beside_out_is_written(split, seed):
    queries, rows, cache = make([130, 0, 64], [2] * 3, 40, 64)
    around = torch.full((3, 2, 42, 600), 123.0, dtype=torch.bfloat16)
    out = around[:, :, 1:41, 48:560]
    got = run(torch.stack(queries), cache, seed=seed, split=split, out=out)
    check(got, queries, rows)
    out.fill_(123.0)
    assert (around == 123.0).all()


@pytest.mark.parametrize(
    "page, page_size, entry, seed",
    [(-1, 64, 0, 0), (11, 64, 2, 1), (8, 128, 1, 2), (1 << 20, 16, 0, 3), (-1, 16, 3, 1), (1 << 30, 16, 8, 2)],
)
def test_a_page_that_does_not_exist_makes_nan_of_its_sequence_alone(page, page_size, entry, seed):
    queries, rows, cache = make([140, 135, 140], [1] * 3, 64, page_size)
    cache.block_table[1, entry] = page
    with k2kernels.emulated("sm_90a", seed=seed):  # the public op finds such a page of a CPU tensor itself
        got = module.MlaOutput(*module._kernel(torch.stack(queries), *cache, SCALE, None, True, 512, 0, True))
    for x in got:
        assert x[1].isnan().all() and not x[0].isnan().any() and not x[2].isnan().any()
    others = [0, 2]
    check(type(got)(*(x[others] for x in got)), [queries[b] for b in others], [rows[b] for b in others])


@pytest.mark.parametrize("seed", SEEDS)
def test_fixed_split_makes_bits_independent_of_the_batch(seed):
    seq_lens = [300, 65, 8, 129]
    queries, _, cache = make(seq_lens, [2] * 4, 40, 64)
    whole = run(torch.stack(queries), cache, seed=seed, split=128)
    for b, q in enumerate(queries):
        part = type(cache)(cache.kv_cache, cache.block_table[b : b + 1], cache.seq_lens[b : b + 1])
        alone = run(q[None], part, seed=0, split=128)
        for x, y in zip(alone, whole):
            assert torch.equal(x[0], y[b])


@pytest.mark.parametrize("seed", SEEDS)
def test_queries_in_any_order_of_memory(seed):
    queries, rows, cache = make([130, 5], [2] * 2, 48, 64)
    q = torch.stack(queries)
    for same in (
        torch.cat([q, torch.full_like(q, math.nan)], dim=-1)[..., :576],  # rows apart, at one stride
        torch.cat([q, torch.full_like(q, math.nan)], dim=2)[:, :, :48],  # tokens apart
        q.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert torch.equal(same, q)
        check(run(same, cache, seed=seed), queries, rows)


def test_large_logits():
    queries, rows, cache = make([129, 70], [1] * 2, 64, 64)
    queries = [q * 256 for q in queries]
    exact = attention(queries, rows, True, torch.float64)
    assert exact[2].max() > 1000
    got = run(torch.stack(queries), cache, seed=0)
    check_close(got.max_logits.flatten(0, 1), exact[2], budget=1e-5 * exact[2].abs(), name="max_logits")
    check_close(got.lse.flatten(0, 1), exact[1], budget=1e-5 * exact[1].abs(), name="lse")
    check_close(got.out.flatten(0, 1), exact[0], budget=3e-2, max_cos_diff=1e-5, name="out")


def plan(chip="sm_90a", heads=64, page_size=64, quantized=False, whole_rows=True):
    return _emu.mla_decode_plan(EMULATED_CHIPS[chip], (4, 4, heads), 1, 4096, page_size, 0, quantized, whole_rows)


@pytest.mark.parametrize("page_size, serves", [(1, False), (8, False), (16, True), (48, True), (64, True), (96, True)])
def test_plan_by_page_size(page_size, serves):
    assert plan(page_size=page_size)[-1] == serves


def test_everything_else_is_left_to_the_portable_kernel():
    assert plan()[-1] and plan(heads=33)[-1]
    others = (dict(chip="sm_80"), dict(chip="sm_89"), dict(heads=32), dict(quantized=True), dict(whole_rows=False))
    for other in others:
        assert not plan(**other)[-1], other


def test_a_cache_that_tma_cannot_copy():
    # One page seen as three: the distance between pages is 0.
    queries, rows, cache = make([64], [1], 64, 64, spare_pages=0)
    cache = type(cache)(cache.kv_cache.expand(3, -1, -1), torch.tensor([[2]], dtype=torch.int32), cache.seq_lens)
    with k2kernels.emulated("sm_90a"):
        got = k2kernels.mla_decode(torch.stack(queries), *cache, softmax_scale=SCALE, return_max_logits=True)
    check(got, queries, rows)
