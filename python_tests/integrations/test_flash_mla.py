"""FlashMLA's calls, as its README and its tests make them, against attention computed row by row in float64."""

import math

import pytest
import torch

import k2kernels
from k2kernels.integrations.flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata
from k2kernels.ops.mla_cache import mla_gather
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import poisoned_cache

SEQ_LENS = [70, 0, 1, 64, 130]


def attention(q, rows, scale, causal):
    """out [B, s_q, H, 512] and lse [B, H, s_q] in float64, by FlashMLA's conventions, of rows[b] [s_k, 576]."""
    batch, s_q, heads, _ = q.shape
    out, lse = torch.zeros(batch, s_q, heads, 512, dtype=torch.float64), torch.empty(batch, heads, s_q).double()
    for b in range(batch):
        for i in range(s_q):
            seen = max(len(rows[b]) - s_q + i + 1, 0) if causal else len(rows[b])
            keys = rows[b][:seen].double()
            for h in range(heads):
                logits = keys @ q[b, i, h].double() * scale
                lse[b, h, i] = torch.logsumexp(logits, 0) if seen else math.inf
                if seen:
                    out[b, i, h] = (logits - lse[b, h, i]).exp() @ keys[:, :512]
    return out, lse


def make(s_q, heads, *, quantize=False, dtype=torch.bfloat16):
    rows = [(torch.randn(n, 576) / 10).clamp(-1, 1).to(dtype) for n in SEQ_LENS]
    cache = poisoned_cache(rows, 64, quantize=quantize, power_of_two=True)
    if quantize:
        tables = zip(cache.block_table, SEQ_LENS)
        rows = [mla_gather(cache.kv_cache, t[None], torch.arange(n), dtype=torch.float32) for t, n in tables]
    return torch.randn(len(rows), s_q, heads, 576).to(dtype), rows, cache


def first_generation(q, cache):
    """The README's call: metadata of this batch, once for all layers."""
    s_q, heads = q.shape[1:3]
    metadata, num_splits = get_mla_metadata(cache.seq_lens, s_q * heads // 1, 1)
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert metadata.shape[1] == 8 and num_splits.shape == (len(q) + 1,)
    return metadata, num_splits


def second_generation(q, cache):
    metadata, num_splits = get_mla_metadata()
    assert isinstance(metadata, FlashMLASchedMeta) and num_splits is None
    return metadata, num_splits


GENERATIONS = [first_generation, second_generation]


def decode(q, cache, metadata, **options):
    k_cache = cache.kv_cache.unsqueeze(2)
    return flash_mla_with_kvcache(q, k_cache, cache.block_table, cache.seq_lens, 512, *metadata, **options)


def check(got, want):
    """The bounds of FlashMLA's own tests."""
    (out, lse), (exact, exact_lse) = got, want
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    budget = torch.maximum(torch.tensor(8e-4), 2.01 / 128 * exact.abs())
    check_close(out, exact, budget=budget, max_cos_diff=5e-6, name="out")
    check_close(lse, exact_lse, budget=1e-6 + 8.01 / 65536 * exact_lse.abs().nan_to_num(posinf=0), name="lse")


@pytest.mark.parametrize("metadata", GENERATIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s_q, heads", [(1, 3), (2, 5)])
def test_equals_attention(s_q, heads, causal, metadata):
    q, rows, cache = make(s_q, heads)
    got = decode(q, cache, metadata(q, cache), causal=causal)
    check(got, attention(q, rows, 576**-0.5, causal))


@pytest.mark.parametrize("metadata", GENERATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_fp8_cache(dtype, metadata):
    q, rows, cache = make(2, 3, quantize=True)
    cache = cache._replace(kv_cache=cache.kv_cache.view(dtype))
    got = decode(q, cache, metadata(q, cache), causal=True, is_fp8_kvcache=True, softmax_scale=0.1)
    check(got, attention(q, rows, 0.1, True))


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("metadata, seed", [(first_generation, 0), (second_generation, 2)])
def test_emulated_kernel(metadata, seed, quantize):
    q, rows, cache = make(2, 3, quantize=quantize)
    before = k2kernels.launch_count("mla_decode")
    with k2kernels.emulated("sm_80", seed=seed):
        got = decode(q, cache, metadata(q, cache), causal=True, is_fp8_kvcache=quantize)
    assert k2kernels.launch_count("mla_decode") > before
    check(got, attention(q, rows, 576**-0.5, True))


def test_not_causal_unless_asked():
    q, rows, cache = make(2, 2)
    check(decode(q, cache, get_mla_metadata()), attention(q, rows, 576**-0.5, False))


@pytest.mark.parametrize("arguments", [(torch.zeros(9, dtype=torch.int32), 64, 1), ()], ids=["first", "second"])
def test_metadata_may_be_reused_for_other_lengths(arguments):
    """In FlashMLA stale metadata is an error; here nothing is planned."""
    metadata = get_mla_metadata(*arguments)
    for s_q in (1, 2):
        q, rows, cache = make(s_q, 2)
        check(decode(q, cache, metadata, causal=True), attention(q, rows, 576**-0.5, True))


def test_metadata_calls_of_all_versions():
    lengths = torch.tensor([5, 7], dtype=torch.int32)
    for call in (
        lambda: get_mla_metadata(lengths, 64, 1),
        lambda: get_mla_metadata(lengths, num_heads_per_head_k=64, num_heads_k=1),
        lambda: get_mla_metadata(lengths, 128, 1, 64, True, None),
        lambda: get_mla_metadata(cache_seqlens=lengths, num_q_tokens_per_head_k=128, num_heads_k=1, num_heads_q=64),
    ):
        metadata, num_splits = call()
        assert metadata.shape == (1, 8) and num_splits.tolist() == [0, 1, 2]
    on_meta, _ = get_mla_metadata(lengths.to("meta"), 64, 1)
    assert on_meta.device.type == "meta"


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (dict(indices=torch.zeros(2, 1, 64)), k2kernels.UnsupportedError,
         r"indices must be None, got a tensor \[2, 1, 64\]; attention is dense here"),
        (dict(topk_length=torch.zeros(2)), k2kernels.UnsupportedError, r"topk_length must be None, got a tensor \[2\]"),
        (dict(attn_sink=torch.zeros(3)), k2kernels.UnsupportedError,
         r"attn_sink must be None, .*; scale the result by sigmoid\(lse - attn_sink\)"),
        (dict(extra_k_cache=torch.zeros(1)), k2kernels.UnsupportedError,
         r"extra_k_cache must be None, .*merge_attention_states"),
        (dict(extra_indices_in_kvcache=torch.zeros(1)), k2kernels.UnsupportedError, "extra_indices_in_kvcache must be"),
        (dict(extra_topk_length=torch.zeros(1)), k2kernels.UnsupportedError, "extra_topk_length must be None"),
        (dict(k_cache=torch.zeros(2, 64, 2, 576)), k2kernels.UnsupportedError,
         "k_cache must be of num_heads_k=1, got num_heads_k=2; call it once for each key head"),
        (dict(k_cache=torch.zeros(2, 64, 576)), ValueError,
         r"k_cache must be \[pages, page_size, num_heads_k, row\] float32, got \[2, 64, 576\] float32"),
        (dict(k_cache=torch.zeros(2, 64, 1, 656, dtype=torch.uint8)), TypeError,
         "k_cache must be .* float32, got .* uint8; pass is_fp8_kvcache=True for 656-byte rows"),
        (dict(is_fp8_kvcache=True), TypeError, "k_cache must be .* uint8 or int8 or .*; pass is_fp8_kvcache=False"),
        (dict(block_table=None), TypeError, "block_table must be a tensor"),
        (dict(cache_seqlens=torch.zeros(3, dtype=torch.int32)), ValueError, r"cache_seqlens must be \[B=2\] int32"),
        (dict(tile_scheduler_metadata=None), TypeError,
         ".* two int32 tensors, or a FlashMLASchedMeta and None, got NoneType and NoneType; pass what get_mla_"),
        (dict(num_splits=torch.zeros(3, dtype=torch.int32)), TypeError, ".* got FlashMLASchedMeta and Tensor"),
        (dict(tile_scheduler_metadata=torch.zeros(1, 8), num_splits=torch.zeros(3)), ValueError,
         "tile_scheduler_metadata must be int32, got torch.float32"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_what_is_refused(changed, error, message):
    good = dict(
        q=torch.zeros(2, 1, 3, 576), k_cache=torch.zeros(2, 64, 1, 576),
        block_table=torch.tensor([[0], [1]], dtype=torch.int32), cache_seqlens=torch.ones(2, dtype=torch.int32),
        head_dim_v=512, tile_scheduler_metadata=FlashMLASchedMeta(), num_splits=None,
    )  # fmt: skip
    flash_mla_with_kvcache(**good)
    with pytest.raises(error, match="flash_mla_with_kvcache: " + message):
        flash_mla_with_kvcache(**{**good, **changed})


def test_metadata_that_is_refused():
    lengths = torch.ones(2, dtype=torch.int32)
    with pytest.raises(k2kernels.UnsupportedError, match="get_mla_metadata: topk must be None, got 2048; leave it out"):
        get_mla_metadata(lengths, 64, 1, 64, True, 2048)
    with pytest.raises(k2kernels.UnsupportedError, match="get_mla_metadata: num_heads_k must be 1, got 8; all heads"):
        get_mla_metadata(lengths, 8, 8)
    with pytest.raises(TypeError, match=r"get_mla_metadata: cache_seqlens must be \[B\] int32, got \[2\] int64"):
        get_mla_metadata(lengths.long(), 64, 1)
