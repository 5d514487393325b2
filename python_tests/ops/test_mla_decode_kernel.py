"""The kernels of mla_decode in the emulator. What the reference is compared with in test_mla_decode.py; here the
reference, in float64, is the definition."""

import ctypes
import math
import struct

import pytest
import torch
from decode_cases import cumulative, dequantised_rows, e4m3, make

import k2kernels
from k2kernels import _emu
from k2kernels.ops import _launch
from k2kernels.ops import mla_decode as module
from k2kernels.ops._launch import Chip
from k2kernels.ops.mla_decode import merge_attention_states, mla_decode
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import KIMI_K2, PagedCache, guarded, poisoned_cache

SCHEDULES = [("sm_80", 0), ("sm_89", 1), ("sm_80", 2), ("sm_90a", 3)]
SEQ_LENS = [0, 1, 63, 64, 65, 127, 129]
SCALE = KIMI_K2.softmax_scale


def k2(seq_lens, q_lens, heads, page_size=64, dtype=torch.bfloat16, **options):
    """Queries and a cache of Kimi-K2's sizes, distributed as in FlashMLA's tests: randn / 10, at most 1."""
    queries, rows, _ = make(seq_lens, q_lens, heads, 512, 64, page_size, torch.float32)
    queries = [(q / 10).clamp(-1, 1).to(dtype) for q in queries]
    rows = [(r / 10).clamp(-1, 1).to(torch.bfloat16 if options.get("quantize") else dtype) for r in rows]
    return queries, poisoned_cache(rows, page_size, **options)


def run(arch, seed, q, cache, launches=2, **arguments):
    arguments = {"softmax_scale": SCALE, "return_max_logits": True, **arguments}
    before = k2kernels.launch_count("mla_decode")
    with k2kernels.emulated(arch, seed=seed):
        got = mla_decode(q, *cache, **arguments)
    assert k2kernels.launch_count("mla_decode") - before == launches
    return got


def exact(q, cache, **arguments):
    kv_cache, block_table, seq_lens = cache
    kv_cache = kv_cache if kv_cache.dtype == torch.uint8 else kv_cache.double()
    arguments = {"softmax_scale": SCALE, "return_max_logits": True, **arguments}
    return mla_decode(q.double(), kv_cache, block_table, seq_lens, **arguments)


def check(got, want):
    """FlashMLA's bounds (tests/test_flash_mla_dense_decoding.py), and for max_logits those of its prefill."""
    check_close(got.out, want.out, budget=(2.01 / 128 * want.out.abs()).clamp(min=8e-4), max_cos_diff=5e-6, name="out")
    check_close(got.lse, want.lse, budget=1e-6 + 8.01 / 65536 * want.lse.abs(), name="lse")
    peak = want.max_logits
    check_close(got.max_logits, peak, budget=1e-6 + 2.01 / 65536 * peak.abs(), name="max_logits")


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads, s_q", [(1, 1), (3, 4), (8, 2), (9, 1), (16, 1), (24, 1), (48, 2), (63, 1), (64, 2)])
def test_heads_and_query_tokens(heads, s_q, causal, arch, seed):
    queries, cache = k2(SEQ_LENS, [s_q] * 7, heads)
    q = torch.stack(queries)
    check(run(arch, seed, q, cache, causal=causal), exact(q, cache, causal=causal))


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("heads, s_q", [(64, 4), (96, 1), (126, 1), (128, 2)])
def test_more_rows_than_a_tile(heads, s_q, arch, seed):
    queries, cache = k2([130, 0, 77], [s_q] * 3, heads)
    q = torch.stack(queries)
    check(run(arch, seed, q, cache), exact(q, cache))


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("cache_type", [torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("page_size", [1, 16, 32, 53, 64, 128])
def test_pages(page_size, cache_type, arch, seed):
    quantize = cache_type == torch.uint8
    queries, cache = k2(
        SEQ_LENS, [1] * 7, 64, page_size, torch.bfloat16 if quantize else cache_type,
        quantize=quantize, strided=page_size in (16, 64),
    )  # fmt: skip
    q = torch.stack(queries)
    check(run(arch, seed, q, cache), of_rounded_rows(q, cache) if quantize else exact(q, cache))


def of_rounded_rows(q, cache):
    """Attention over the dequantised rows as the kernel multiplies them: rounded to bfloat16."""
    rows = [dequantised_rows(cache, b).bfloat16() for b in range(len(cache.seq_lens))]
    return exact(q, poisoned_cache(rows, 64))


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("q_lens", [[0, 1, 2, 3, 5, 0, 4], [3, 0, 0, 0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("split", ["auto", 64])
def test_ragged_queries(split, heads, q_lens, arch, seed):
    queries, cache = k2(SEQ_LENS, q_lens, heads, 16)
    arguments = dict(cu_seqlens_q=cumulative(q_lens))
    q = torch.cat(queries)
    check(run(arch, seed, q, cache, split=split, **arguments), exact(q, cache, **arguments))


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 13, 40])
@pytest.mark.parametrize("split", ["auto", 1, 100, 512, 4096])
def test_any_number_of_multiprocessors_and_splits(split, multiprocessors, arch, seed, monkeypatch):
    chip = _launch.EMULATED_CHIPS[arch]._replace(multiprocessors=multiprocessors)
    monkeypatch.setitem(_launch.EMULATED_CHIPS, arch, chip)
    queries, cache = k2([700, 3, 0, 190], [2] * 4, 8)
    q = torch.stack(queries)
    one_split = split == 4096  # which is more than any row of the block table names
    got = run(arch, seed, q, cache, split=split, launches=1 if one_split else 2)
    check(got, exact(q, cache))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("batch", [33, 70])
def test_batches_of_more_sequences_than_a_warp_has_lanes(batch, arch):
    seq_lens = [(37 * b) % 150 for b in range(batch)]
    queries, cache = k2(seq_lens, [1] * batch, 4)
    q = torch.stack(queries)
    for split in ("auto", 64):
        check(run(arch, 2, q, cache, split=split), exact(q, cache))


@pytest.mark.parametrize("seed", [1, 2])
def test_joining_of_so_many_rows_that_a_block_takes_several(seed):
    queries, cache = k2([66, 70] + [0] * 126, [1] * 128, 32)
    q = torch.stack(queries)
    check(run("sm_80", seed, q, cache, split=64), exact(q, cache))


@pytest.mark.parametrize("heads, s_q", [(16, 1), (64, 2), (128, 1)])
@pytest.mark.parametrize("quantize", [False, True])
def test_every_schedule_gives_the_same_bits(quantize, heads, s_q):
    queries, cache = k2([30, 200], [s_q] * 2, heads, quantize=quantize)
    q = torch.stack(queries)
    for arch in ("sm_80", "sm_90a"):
        first = run(arch, 0, q, cache)
        assert all(same(run(arch, seed, q, cache), first) for seed in range(1, 4))


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("q_lens", [[1] * 5, [1, 3, 0, 5, 2]], ids=str)
def test_fixed_split_makes_bits_independent_of_the_batch(q_lens, heads, arch):
    seq_lens = [300, 65, 8, 150, 129]
    queries, cache = k2(seq_lens, q_lens, heads)
    whole = run(arch, 2, torch.cat(queries), cache, cu_seqlens_q=cumulative(q_lens), split=128)
    for b, q in enumerate(queries):
        if not len(q):
            continue
        place = slice(sum(q_lens[:b]), sum(q_lens[: b + 1]))
        alone = (cache.kv_cache, cache.block_table[b : b + 1], cache.seq_lens[b : b + 1])
        got = run(arch, 3, q[None], alone, split=128)
        assert same([x[0] for x in got], [x[place] for x in whole])


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kimi_k2_loses_no_more_than_torch_in_the_same_precision(dtype, arch, seed):
    queries, _, cache = make([129, 200], [2, 2], KIMI_K2.heads, 512, 64, 64, dtype)  # logits of up to 10
    q = torch.stack(queries)
    want = exact(q, cache)
    got = run(arch, seed, q, cache)
    plain = torch.stack([torch_attention(q[b], cache, b) for b in range(2)])
    check_close(got.out, want.out, same_precision=plain, max_cos_diff=5e-6, name="out")
    check_close(got.lse, want.lse, budget=1e-6 + 8.01 / 65536 * want.lse.abs(), name="lse")
    check_close(got.max_logits, want.max_logits, budget=1e-6 + 2.01 / 65536 * want.max_logits.abs(), name="max")


def torch_attention(q, cache, b):
    """[s_q, H, 512] in q's dtype, as one writes it in PyTorch."""
    length = int(cache.seq_lens[b])
    pages = cache.block_table[b, : -(-length // 64)].long()
    rows = cache.kv_cache[pages].flatten(0, 1)[:length]
    outs = []
    for i in range(len(q)):
        keys = rows[: length - len(q) + i + 1]
        outs.append(torch.softmax(q[i] @ keys.T * SCALE, -1) @ keys[:, :512])
    return torch.stack(outs)


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("split", ["auto", 64])
def test_large_logits(split, arch, seed):
    queries, _, cache = make([129, 70], [2, 2], 32, 512, 64, 16, torch.bfloat16, scale_q=150.0)
    q = torch.stack(queries)
    want = exact(q, cache, softmax_scale=1.0)
    assert want.max_logits.max() > 1e4
    got = run(arch, seed, q, cache, softmax_scale=1.0, split=split)
    check_close(got.max_logits, want.max_logits, budget=1e-6 * want.max_logits.abs(), name="max_logits")
    check_close(got.lse, want.lse, budget=1e-6 * want.lse.abs(), name="lse")
    check_close(got.out, want.out, budget=2e-2, max_cos_diff=1e-5, name="out")


# The portable kernel takes 16 rows at a time, Hopper's 64: as few heads as make it the one that serves.
@pytest.mark.parametrize("arch, heads", [("sm_80", 16), ("sm_90a", 34)])
@pytest.mark.parametrize("keys", [256, 4096])
def test_errors_do_not_grow_with_the_number_of_keys(keys, arch, heads):
    """The first key has the largest logit, so no later block may change what the sums are relative to."""
    cache = torch.randn(keys // 64, 64, 576).bfloat16()
    q = (torch.randn(1, 1, heads, 576) * 0.02).bfloat16()
    cache[..., 512:], q[..., 512:] = 0, 0
    cache[..., 512] = 1  # each logit is raised by q's dim 512 ...
    cache[0, 0, 512] = 1.0625  # ... the first one by a little more
    peaks = torch.tensor([100.0, 1000.0]).repeat(heads // 2)
    q[0, 0, :, 512] = peaks * (0.9 + 0.2 * torch.rand(heads))
    lengths = torch.tensor([keys], dtype=torch.int32)
    case = PagedCache(cache, torch.arange(keys // 64, dtype=torch.int32)[None], lengths)
    got = run(arch, 0, q, case, softmax_scale=1.0, split=keys, launches=1)
    want = exact(q, case, softmax_scale=1.0)
    # Roundings of log2(e), of the largest logit times it, of the sum and of the product with ln(2).
    check_close(got.lse, want.lse, budget=3 * 2.0**-23 * want.lse.abs(), name="lse")
    out, right = got.out.double(), want.out
    scale = (out * right).sum(-1) / right.square().sum(-1)
    check_close(scale, torch.ones_like(scale), budget=5e-4, name="scale of out")


@pytest.mark.parametrize("arch, heads", [("sm_80", 8), ("sm_90a", 34)])  # where queries of different rows share a warp
@pytest.mark.parametrize("gain", [0.1, 0.4])
def test_fixed_split_makes_bits_independent_of_the_number_of_queries(gain, arch, heads):
    q = (torch.randn(3, 2, heads, 576) * gain).bfloat16()
    cache = poisoned_cache([torch.randn(n, 576).bfloat16() for n in (512, 500, 400)], 64)
    both, alone = (run(arch, 0, x, cache, softmax_scale=1.0, split=512) for x in (q, q[:, 1:]))
    assert same([x[:, 1:] for x in both], alone)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_joining_keeps_the_scale_of_the_output_at_large_logits(arch):
    """Three parts of equal keys, whose mean is the row itself. Adding log2(3) to an lse of 2e5 is off by 0.6 %.

    A scale of ln(2) leaves base-2 logits as they are, so that all probabilities of a part are 1 in bfloat16, too.
    """
    row = torch.randn(576).clamp(0.1, 1).bfloat16()
    q = (torch.rand(1, 1, 16, 576) * 3000).bfloat16()
    got = run(arch, 0, q, poisoned_cache([row.expand(192, -1)], 64), softmax_scale=math.log(2), split=64)
    assert got.lse.min() > 1e5
    assert torch.equal(got.out, row[:512].expand(got.out.shape))


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantised_cache_at_the_tolerance_of_bfloat16(power_of_two, arch, seed):
    queries, cache = k2(SEQ_LENS, [2] * 7, 16, quantize=True, power_of_two=power_of_two, strided=True)
    q = torch.stack(queries)
    got = run(arch, seed, q, cache)
    check(got, of_rounded_rows(q, cache))
    # Against the rows themselves, with what rounding each of them to bfloat16 does to a logit.
    want = exact(q, cache)
    error = 2.0**-9 * SCALE * q.double().abs().sum(-1) * 0.5
    check_close(got.max_logits, want.max_logits, budget=error, name="max_logits")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("scale", [0.0123456789, 2.0**-5, 7.7, 2.0**100, 2.0**-110, 3e5])
def test_quantised_cache_holds_every_e4m3_code(scale, arch):
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    latents = torch.cat([codes, codes.flip(0), codes[:4]])
    row = torch.zeros(1, 1, 656, dtype=torch.uint8)
    row[0, 0, :512] = latents
    row[0, 0, 512:528] = torch.tensor([scale] * 4, dtype=torch.float32).view(torch.uint8)
    one = torch.ones(1, dtype=torch.int32)
    q = torch.zeros(1, 1, 2, 576, dtype=torch.bfloat16)  # any logit would do, but not infinities
    got = run(arch, 0, q, (row, one[None] - 1, one))
    want = torch.tensor([e4m3(int(c)) for c in latents], dtype=torch.float64) * float(torch.tensor(scale))
    assert torch.equal(got.out[0, 0], want.bfloat16().expand(2, -1))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("quantize", [False, True])
def test_nan_of_a_row_that_is_seen_comes_through(quantize, arch):
    queries, cache = k2([100, 100], [1, 1], 64, quantize=quantize)
    page = int(cache.block_table[1, 1])
    if quantize:
        cache.kv_cache[page, 7, 300] = 0x7F
    else:
        cache.kv_cache[page, 7, 300] = math.nan
    q = torch.stack(queries)
    got = run(arch, 0, q, cache)
    assert not any(x[0].isnan().any() for x in got)
    assert all(x[1].isnan().all() for x in got)


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("heads", [16, 64])
def test_pages_that_do_not_exist_give_nan_and_no_fault(heads, quantize, arch, seed, monkeypatch):
    """As on a GPU, where the host does not look at the block table."""
    queries, cache = k2([100, 200, 64], [1] * 3, heads, quantize=quantize)
    cache.block_table[1, 2] = 2147480000
    guard = cache._replace(kv_cache=guarded(cache.kv_cache))
    q = torch.stack(queries)
    got = run_unchecked(monkeypatch, arch, seed, q, guard)
    assert all(x[1].isnan().all() for x in got)
    cache.block_table[1, 2] = 0
    want = exact(q, cache)
    for x, y in zip(got, want):
        check_close(x[::2], y[::2], budget=5e-3, name="the other sequences")


def run_unchecked(monkeypatch, arch, seed, q, cache, **arguments):
    request = (q, *cache, SCALE, None, True, 512, 0, True)
    with k2kernels.emulated(arch, seed=seed):
        return module._mla_decode.kernel(*request)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_lengths_out_of_range_stay_inside_the_block_table(arch, monkeypatch):
    queries, cache = k2([100, 64, 30], [1] * 3, 16, spare_pages=1)
    used = [2, 1, 1]
    table = torch.zeros(3, 2, dtype=torch.int32)
    for b, count in enumerate(used):
        table[b, :count] = cache.block_table[b, :count]
    cache = cache._replace(kv_cache=guarded(cache.kv_cache), block_table=guarded(table))
    lengths = torch.tensor([-5, 2**31 - 1, 30], dtype=torch.int32)
    q = torch.stack(queries)
    got = run_unchecked(monkeypatch, arch, 0, q, cache._replace(seq_lens=lengths))
    assert (got[0][0] == 0).all() and (got[1][0] == -math.inf).all()
    want = exact(q[2:], cache._replace(block_table=table[2:], seq_lens=lengths[2:]))
    check(mla_output([x[2:] for x in got]), want)


STALE = [pytest.param(x, id=x.hex()) for x in (struct.pack("f", 1.0), struct.pack("f", math.nan), b"\x7f" * 4)]


@pytest.mark.parametrize("arch, heads", [("sm_80", 16), ("sm_90a", 34)])
@pytest.mark.parametrize("split", ["auto", 64, 4096])
@pytest.mark.parametrize("stale", STALE)
def test_queries_that_no_sequence_owns(stale, split, arch, heads, monkeypatch):
    """As in a batch that is padded for a CUDA graph; memory holds what an earlier tensor left there."""
    q_lens = [2, 0, 1, 0]
    queries, cache = k2([130, 70, 66, 0], q_lens, heads)
    q = torch.cat([*queries, torch.full((5, heads, 576), math.nan).bfloat16()])
    arguments = dict(cu_seqlens_q=cumulative(q_lens), split=split)
    want = exact(torch.cat(queries), cache, **arguments)
    leave_stale(monkeypatch, stale)
    got = run(arch, 0, q, cache, **arguments)
    check(mla_output([x[:3] for x in got]), want)
    assert (got.out[3:] == 0).all() and (got.lse[3:] == -math.inf).all() and (got.max_logits[3:] == -math.inf).all()


@pytest.mark.parametrize("arch, heads", [("sm_80", 16), ("sm_90a", 34)])
@pytest.mark.parametrize("split", ["auto", 64])
@pytest.mark.parametrize("stale", STALE)
def test_results_do_not_depend_on_what_memory_held(stale, split, arch, heads, monkeypatch):
    queries, cache = k2([300, 0, 70], [1] * 3, heads)
    q = torch.stack(queries)
    want = run(arch, 0, q, cache, split=split)
    leave_stale(monkeypatch, stale)
    assert same(run(arch, 0, q, cache, split=split), want)


@pytest.mark.parametrize("arch, heads", [("sm_80", 16), ("sm_90a", 34)])
@pytest.mark.parametrize("split", [0, 64])
def test_offsets_out_of_order_stay_inside_q(split, arch, heads, monkeypatch):
    """On a GPU the host does not look at them. Those that fall count as the largest before them."""
    queries, cache = k2([130, 70, 300, 66, 64], [2, 0, 3, 0, 0], heads)
    q = torch.cat([*queries, queries[0]])
    want = exact(torch.cat(queries), cache, cu_seqlens_q=cumulative([2, 0, 3, 0, 0]))
    leave_stale(monkeypatch, struct.pack("f", 1.0))
    offsets = torch.tensor([-9, 2, 0, 5, 1, 5], dtype=torch.int32)
    with k2kernels.emulated(arch):
        got = module._mla_decode.kernel(q, *cache, SCALE, offsets, True, 512, split, True)
    check(mla_output([x[:5] for x in got]), want)
    assert (got[0][5:] == 0).all() and (got[1][5:] == -math.inf).all() and (got[2][5:] == -math.inf).all()
    for wild in ([0, 7, 0, 7, 0, 7], [2**31 - 1, 3, -5, 4, 9, 6]):
        with k2kernels.emulated(arch):
            module._mla_decode.kernel(q, *cache, SCALE, torch.tensor(wild, dtype=torch.int32), True, 512, split, True)


def leave_stale(monkeypatch, four_bytes):
    """Fills what `new_empty` returns."""
    new_empty = torch.Tensor.new_empty

    def stale(*args, **options):
        tensor = new_empty(*args, **options)
        memory = tensor.untyped_storage()
        ctypes.memmove(memory.data_ptr(), four_bytes * (len(memory) // 4), len(memory) // 4 * 4)
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", stale)


def mla_output(three):
    from k2kernels.ops.mla_decode import MlaOutput

    return MlaOutput(*three)


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("heads", [8, 64])
def test_nothing_beside_the_arguments_is_touched(heads, quantize, arch, seed):
    queries, cache = k2([129, 64], [1, 1], heads, quantize=quantize, spare_pages=0)
    q = guarded(torch.stack(queries))
    cache = cache._replace(**{name: guarded(x) for name, x in cache._asdict().items()})
    want = exact(q, cache)
    around = torch.full((2, 1, heads + 3, 600), 123.0, dtype=q.dtype)
    out = around[:, :, 1 : heads + 1, 48:560]
    got = run(arch, seed, q, cache, out=out)
    assert got.out is out
    for x, y in zip(got, want):
        check_close(x, y, budget=5e-3)
    out.fill_(123.0)
    assert (around == 123.0).all()


def test_strided_queries():
    queries, cache = k2([129, 64], [2, 2], 64)
    q = torch.stack(queries)
    want = run("sm_80", 0, q, cache)
    wide = torch.full((2, 3, 70, 600), math.nan, dtype=q.dtype)
    for strided in (wide[:, :2, 3:67, 8:584], wide[:, :2, 3:67, 7:583], wide.transpose(0, 1)[:2, :2, 3:67, 8:584]):
        assert same(run("sm_80", 1, strided.copy_(q), cache), want)


def test_axes_of_one_whose_strides_say_nothing():
    """One query a sequence, taken out of [s_q, B, H, D]: contiguous, whatever the stride of that axis."""
    queries, cache = k2([129, 64, 65], [1, 1, 1], 8)
    q = torch.stack(queries)
    want = run("sm_80", 0, q, cache)
    odd, out = torch.stack(queries, dim=1).transpose(0, 1), torch.empty(1, 3, 8, 512, dtype=q.dtype).transpose(0, 1)
    assert odd.is_contiguous() and odd.stride(1) != q.stride(1)
    assert same(run("sm_80", 1, odd, cache, out=out), want)
    lengths = torch.stack([cache.seq_lens, cache.seq_lens + 1], dim=1)[:, 0]  # apart, too
    assert same(run("sm_80", 0, q, cache._replace(seq_lens=lengths)), want)


def test_offsets_beyond_two_to_the_31():
    # Pages 2**31 + 4096 bytes apart; the memory between them is never touched, so the system need not provide it.
    stride = 2**31 + 4096
    queries, small = k2([7], [1], 2, 4, quantize=True, spare_pages=0)
    kv_cache = torch.empty(stride + 656 * 4, dtype=torch.uint8).as_strided((2, 4, 656), (stride, 656, 1))
    kv_cache.copy_(small.kv_cache)
    q = torch.stack(queries)
    assert same(run("sm_80", 0, q, small._replace(kv_cache=kv_cache)), run("sm_80", 0, q, small))


@pytest.mark.parametrize("batch, s_q, pages, max_pages", [(0, 1, 4, 2), (3, 0, 4, 2), (2, 1, 0, 0), (2, 2, 0, 3)])
@pytest.mark.parametrize("split", ["auto", 8])
def test_nothing_to_do(batch, s_q, pages, max_pages, split):
    cache = (
        torch.full((pages, 4, 576), math.nan).bfloat16(),
        torch.full((batch, max_pages), -7, dtype=torch.int32),
        torch.zeros(batch, dtype=torch.int32),
    )
    q = torch.randn(batch, s_q, 2, 576).bfloat16()
    splits = split == "auto" or max_pages * 4 > 64
    got = run("sm_90a", 0, q, cache, split=split, launches=(1 + splits) if q.numel() else 0)
    assert got.out.shape == (batch, s_q, 2, 512) and (got.out == 0).all()
    for rows in got[1:]:
        assert rows.shape == (batch, s_q, 2) and (rows == -math.inf).all()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("heads", [16, 64])
def test_bytes_read_are_those_of_the_keys(heads, quantize, arch):
    length, batch = 1024, 4
    queries, cache = k2([length] * batch, [1] * batch, heads, quantize=quantize)
    q = torch.stack(queries)
    before = _emu.counters()["bytes_loaded"]
    run(arch, 0, q, cache, split=4096, launches=1)
    keys = batch * length * (656 if quantize else 1152)
    floor = keys + q.numel() * 2
    assert floor <= _emu.counters()["bytes_loaded"] - before <= 1.05 * floor


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(q=torch.zeros(2, 1, 3, 576)), "kernels take bfloat16 and float16, not torch.float32"),
        (dict(q=torch.zeros(2, 1, 3, 576).half(), kv_cache=torch.zeros(4, 2, 656, dtype=torch.uint8)),
         "kernels take bfloat16 q for 656-byte rows, not torch.float16"),
        (dict(q=torch.zeros(2, 1, 3, 48).half(), kv_cache=torch.zeros(4, 2, 48).half(), head_dim_v=32),
         "kernels take 512 latent and 64 rope dims, not 32 and 16"),
        (dict(kv_cache=torch.zeros(576, 4, 2).bfloat16().permute(1, 2, 0)),
         "kv_cache must have stride 1 in its last axis, got 8"),
        (dict(kv_cache=torch.zeros(4, 2, 580).bfloat16()[..., :576]),
         "the rows of kv_cache must begin at multiples of 16 bytes"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_what_kernels_do_not_serve_is_said(changed, message):
    good = dict(
        q=torch.zeros(2, 1, 3, 576).bfloat16(), kv_cache=torch.zeros(4, 2, 576).bfloat16(),
        block_table=torch.zeros(2, 3, dtype=torch.int32), seq_lens=torch.ones(2, dtype=torch.int32),
    )  # fmt: skip
    if changed.get("q", good["q"]).dtype != torch.bfloat16 and "kv_cache" not in changed:
        changed = {**changed, "kv_cache": good["kv_cache"].to(changed["q"].dtype)}
    arguments = {**good, **changed}
    first = [arguments.pop(name) for name in good]
    mla_decode(*first, softmax_scale=1.0, **arguments)  # the reference does
    with k2kernels.emulated(), pytest.raises(k2kernels.UnsupportedError, match=message):
        mla_decode(*first, softmax_scale=1.0, **arguments)


# ---- the plan: a pure function of numbers


H100, A100, RTX4090 = Chip(90, 132, 232448), Chip(80, 108, 166912), Chip(89, 128, 101376)


def plan(chip, batch, heads, queries=1, *, tokens=None, capacity=8192, page_size=64, split=0, quantized=False):
    tokens = batch * queries if tokens is None else tokens
    found = _emu.mla_decode_plan_of(
        chip, batch, tokens, heads, queries, capacity, page_size, split, quantized, not quantized
    )
    names = ("tile_rows", "stages", "teams", "team_size", "split_blocks", "partials", "kernel")
    return {name: getattr(found, name) for name in names}


@pytest.mark.parametrize("heads, tile", [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (128, 64)])
def test_plan_takes_the_smallest_tile_that_holds_the_rows(heads, tile):
    assert plan(A100, 4, heads)["tile_rows"] == tile


@pytest.mark.parametrize("chip", [H100, A100, RTX4090])
@pytest.mark.parametrize("rows, team", [(64, 1), (128, 2), (192, 3), (640, 10)])
def test_plan_fills_the_gpu(rows, team, chip):
    got = plan(chip, 1, 64, rows // 64)
    assert got["team_size"] == team
    assert chip.multiprocessors - team < got["teams"] * team <= chip.multiprocessors
    assert got["partials"] == 2 * got["teams"] * team


def test_plan_gives_the_ring_what_shared_memory_there_is():
    assert [plan(chip, 1, 64)["stages"] for chip in (A100, RTX4090)] == [4, 2]
    assert [plan(chip, 1, 64, quantized=True)["stages"] for chip in (A100, RTX4090)] == [4, 2]


def test_plan_bounds_the_partial_results_of_fixed_splits():
    assert plan(H100, 8, 64, capacity=8192, split=8192)["partials"] == 0
    assert plan(H100, 8, 64, capacity=8192, split=1000) == {
        **plan(H100, 8, 64), "split_blocks": 16, "partials": 8 * 8
    }  # fmt: skip
    assert plan(H100, 8, 64, 2, capacity=8192, split=1024)["partials"] == 8 * 8 * 2
    # Ragged: 20 tokens of 64 rows can be no more than 20 tiles, plus one unfinished per sequence.
    assert plan(H100, 8, 64, 0, tokens=20, capacity=8192, split=4096)["partials"] >= 20 * 2


# ---- merge_attention_states


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 3, 512), (2, 100), (7, 1), (3, 0), (0, 8)])
def test_merge(shape, dtype, arch, seed):
    a, b = (guarded(torch.randn(shape).to(dtype)) for _ in range(2))
    lse_a, lse_b = torch.randn(shape[:-1]), torch.randn(shape[:-1]) * 3
    for lse, rows, place in ((lse_a, a, 0), (lse_b, b, 1)):
        if len(lse) > 1:
            lse[place], rows[place] = -math.inf, math.nan
    before = k2kernels.launch_count("merge_attention_states")
    with k2kernels.emulated(arch, seed=seed):
        out, lse = merge_attention_states(a, guarded(lse_a), b, guarded(lse_b))
    assert k2kernels.launch_count("merge_attention_states") - before == (1 if lse.numel() else 0)
    want = merge_attention_states(a.double(), lse_a.double(), b.double(), lse_b.double())
    check_close(out, want[0], budget=torch.finfo(dtype).eps / 2 * want[0].abs() + 1e-6, name="out")
    check_close(lse, want[1], budget=1e-6, name="lse")


def test_merge_of_large_lse_and_of_nothing():
    nothing, nan = torch.full((1,), -math.inf), torch.full((1, 4), math.nan)
    with k2kernels.emulated():
        out, lse = merge_attention_states(nan, nothing, nan, nothing)
        assert (out == 0).all() and (lse == -math.inf).all()
        out, lse = merge_attention_states(
            torch.tensor([[0.0]]), torch.tensor([1e4]), torch.tensor([[1.0]]), torch.tensor([1e4 + 1])
        )
    torch.testing.assert_close(out, torch.tensor([[1 / (1 + math.exp(-1))]]))
    torch.testing.assert_close(lse, torch.tensor([1e4 + 1 + math.log1p(math.exp(-1))]))
