"""Hopper's kernel of mla_decode in the emulator: what it does otherwise than the portable one. What all kernels must
do is in test_mla_decode_kernel.py."""

import math

import pytest
import torch
from decode_cases import cumulative, make, naive

import k2kernels
from k2kernels import _emu
from k2kernels.ops import mla_decode as module
from k2kernels.ops._launch import EMULATED_CHIPS
from k2kernels.ops.mla_decode import MlaOutput, mla_decode
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import KIMI_K2, guarded

SEEDS = range(4)  # round robin, depth first, two random schedules
SEQ_LENS = [0, 1, 63, 64, 65, 127, 129, 200]
SCALE = KIMI_K2.softmax_scale
# Logits are float32 sums of 576 products of unit normals: partial sums are at most |q| |k| = 576, and a few of their
# roundings (2**-24) do not cancel.
LOGIT_ERROR = 4 * 2.0**-24 * 576 * SCALE


def k2(seq_lens, q_lens, heads, page_size, dtype=torch.bfloat16, **options):
    return make(seq_lens, q_lens, heads, 512, 64, page_size, dtype, **options)


def run(q, cache, *, seed, split="auto", cu_seqlens_q=None, **options):
    """The result of Hopper's kernel; it is asserted that this is what runs."""
    tokens, heads = math.prod(q.shape[:-2]), q.shape[-2]
    queries = q.shape[1] if cu_seqlens_q is None else 0
    page_size, capacity = cache.kv_cache.shape[1], cache.block_table.shape[1] * cache.kv_cache.shape[1]
    sizes = len(cache.seq_lens), tokens, heads
    fixed = 0 if split == "auto" else split
    chosen = _emu.mla_decode_plan_of(EMULATED_CHIPS["sm_90a"], *sizes, queries, capacity, page_size, fixed, False, True)
    assert chosen.kernel == "sm90"
    before = k2kernels.launch_count("mla_decode")
    with k2kernels.emulated("sm_90a", seed=seed):
        got = mla_decode(
            q, *cache, softmax_scale=SCALE, split=split, cu_seqlens_q=cu_seqlens_q, return_max_logits=True, **options
        )
    assert k2kernels.launch_count("mla_decode") - before in (1, 2)  # attention, and the joining of its parts
    return got


def check(got, queries, rows, causal=True):
    exact = naive([q.double() for q in queries], [r.double() for r in rows], SCALE, causal, 512)
    same = naive(queries, rows, SCALE, causal, 512)
    shape = exact[0].shape
    check_close(got.out.reshape(shape), exact[0], same_precision=same[0], max_cos_diff=5e-6, name="out")
    for name, x, y, units in (("lse", got.lse, exact[1], 8.01), ("max_logits", got.max_logits, exact[2], 2.01)):
        check_close(x.reshape(shape[:-1]), y, budget=LOGIT_ERROR + units / 65536 * y.abs(), name=name)


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
    queries, rows, cache = k2(SEQ_LENS, [s_q] * 8, heads, page_size, dtype, strided=strided)
    got = run(torch.stack(queries), cache, seed=seed, split=split, causal=causal)
    check(got, queries, rows, causal)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("q_lens", [[0, 1, 2, 3, 5, 4, 0, 1], [0, 0, 0, 0, 0, 0, 0, 9]], ids=str)
def test_ragged_queries(q_lens, seed):
    queries, rows, cache = k2(SEQ_LENS, q_lens, 40, 32)
    got = run(torch.cat(queries), cache, seed=seed, cu_seqlens_q=cumulative(q_lens))
    check(got, queries, rows)


# Long enough that a stage of the ring is filled many times, and pages are looked up more than once; short ones behind
# it, so that tasks are known ahead; and such as have no keys, with which Left and Right are done at once, whatever
# the producer warp is doing.
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "seq_lens, page_size",
    [([1200, *[3, 70] * 6], 16), ([1200, *[3, 70] * 6], 64), ([70 if b % 31 == 30 else 0 for b in range(190)], 64)],
    ids=["page 16", "page 64", "few keys"],
)
def test_many_blocks_and_many_tasks(seq_lens, page_size, seed):
    queries, rows, cache = k2(seq_lens, [1] * len(seq_lens), 33, page_size)
    got = run(torch.stack(queries), cache, seed=seed, split=640)
    check(got, queries, rows)


@pytest.mark.parametrize("page_size, seed", [(16, 0), (16, 1), (48, 2), (128, 3)])
def test_nothing_beside_the_inputs_is_read(page_size, seed):
    queries, rows, cache = k2([130, 64, 7], [1] * 3, 64, page_size, spare_pages=0)
    # Not even a neighbour of the last needed entry of the block table.
    table = cache.block_table[:, : -(-130 // page_size)]
    cache = cache._replace(
        kv_cache=guarded(cache.kv_cache), block_table=guarded(table), seq_lens=guarded(cache.seq_lens)
    )
    check(run(guarded(torch.stack(queries)), cache, seed=seed), queries, rows)


# The entry's page is the first that does not exist, or none at all. A stage that was filled before holds numbers, in a
# fresh one the emulator's NaN would hide that nobody noticed.
@pytest.mark.parametrize(
    "page_size, entry, page, split, seed",
    [(64, 0, -1, 640, 0), (64, 5, None, 640, 1), (128, 2, None, 640, 2), (16, 3, -(1 << 31), "auto", 3),
     (16, 16, None, 640, 1), (16, 25, -1, 640, 2)],
)  # fmt: skip
def test_a_page_that_does_not_exist_makes_nan_of_its_sequence_alone(page_size, entry, page, split, seed):
    queries, rows, cache = k2([140, 410, 140], [1] * 3, 64, page_size)
    cache.block_table[1, entry] = len(cache.kv_cache) if page is None else page
    request = (torch.stack(queries), *cache, SCALE, None, True, 512, 0 if split == "auto" else split, True)
    with k2kernels.emulated("sm_90a", seed=seed):  # the public op finds such a page of a CPU tensor itself
        got = module._mla_decode.kernel(*request)
    assert all(x[1].isnan().all() for x in got)
    check(MlaOutput(*(x[::2] for x in got)), queries[::2], rows[::2])


@pytest.mark.parametrize("seed", SEEDS)
def test_queries_in_any_order_of_memory(seed):
    queries, rows, cache = k2([130, 5], [2] * 2, 48, 64)
    q = torch.stack(queries)
    for same in (
        torch.cat([q, torch.full_like(q, math.nan)], dim=-1)[..., :576],  # rows apart, at one stride
        torch.cat([q, torch.full_like(q, math.nan)], dim=2)[:, :, :48],  # tokens apart
        q.transpose(1, 2).contiguous().transpose(1, 2),
        q[:, :, :1].expand(-1, -1, 48, -1),
    ):
        check(run(same, cache, seed=seed), list(same), rows)


def test_offsets_beyond_two_to_the_31():
    # Pages 2**31 + 4096 bytes apart; the memory between them is never touched, so the system need not provide it.
    stride = 2**30 + 2048
    queries, rows, small = k2([120], [1], 64, 64, spare_pages=0)
    kv_cache = torch.empty(stride + 64 * 576, dtype=torch.bfloat16).as_strided((2, 64, 576), (stride, 576, 1))
    kv_cache.copy_(small.kv_cache)
    check(run(torch.stack(queries), small._replace(kv_cache=kv_cache), seed=0), queries, rows)


def plan(chip="sm_90a", heads=64, page_size=64, quantized=False, whole_rows=True):
    """Whether Hopper's kernel serves."""
    shape = 4, 4, heads, 1, 4096, page_size, 0, quantized, whole_rows
    return _emu.mla_decode_plan_of(EMULATED_CHIPS[chip], *shape).kernel == "sm90"


@pytest.mark.parametrize("page_size, serves", [(1, False), (8, False), (16, True), (48, True), (64, True), (96, True)])
def test_plan_by_page_size(page_size, serves):
    assert plan(page_size=page_size) == serves


def test_everything_else_is_left_to_the_portable_kernel():
    assert plan() and plan(heads=33)
    others = (dict(chip="sm_80"), dict(chip="sm_89"), dict(heads=32), dict(quantized=True), dict(whole_rows=False))
    for other in others:
        assert not plan(**other), other


def test_a_cache_that_tma_cannot_copy():
    # One page seen as three: the distance between pages is 0.
    queries, rows, cache = k2([64], [1], 64, 64, spare_pages=0)
    cache = cache._replace(
        kv_cache=cache.kv_cache.expand(3, -1, -1), block_table=torch.tensor([[2]], dtype=torch.int32)
    )
    with k2kernels.emulated("sm_90a"):
        got = mla_decode(torch.stack(queries), *cache, softmax_scale=SCALE, return_max_logits=True)
    check(got, queries, rows)
