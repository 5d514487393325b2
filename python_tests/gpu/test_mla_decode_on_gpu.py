"""mla_decode and generation on a GPU, at the sizes of FlashMLA's tests and of Kimi-K2. Run by `make gpu`."""

import random
import warnings

import pytest
import torch

import k2kernels as k
from k2kernels.engine import replay
from k2kernels.engine.replay import CudaRecorder
from k2kernels.model import K2Config, K2Model
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import BAD_PAGES, KIMI_K2, poisoned_cache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
SCALE = 576**-0.5


def values(*shape, dtype):
    return (torch.randn(*shape, device=DEVICE) / 10).clamp(-1, 1).to(dtype)


def make(seq_lens, s_q, heads, *, quantize=False, dtype=torch.bfloat16, page_size=64, strided=False):
    """q, the rows of each sequence, and the cache that holds them among poison."""
    rows = [values(n, 576, dtype=dtype) for n in seq_lens]
    with torch.device(DEVICE):
        cache = poisoned_cache(rows, page_size, quantize=quantize, strided=strided)
    if quantize:
        where = [torch.arange(len(row), device=DEVICE) for row in rows]
        rows = [
            k.mla_gather(cache.kv_cache, cache.block_table[b : b + 1], positions)  # in bfloat16, as kernels take them
            for b, positions in enumerate(where)
        ]
    return values(len(rows), s_q, heads, 576, dtype=dtype), rows, cache


def attention(q, rows, causal):
    """out, lse and max_logits in float64, sequence by sequence."""
    s_q, results = q.shape[1], []
    for queries, kv in zip(q.double(), rows):
        kv = kv.double()
        logits = queries @ kv.T * SCALE  # [s_q, H, keys]
        if causal:
            border = len(kv) - s_q + 1 + torch.arange(s_q, device=DEVICE)
            logits.masked_fill_(torch.arange(len(kv), device=DEVICE) >= border[:, None, None], -torch.inf)
        lse = logits.logsumexp(-1)
        probabilities = (logits - lse.clamp(min=-1e300)[..., None]).exp()
        highest = logits.amax(-1) if len(kv) else torch.full_like(lse, -torch.inf)
        results.append((probabilities @ kv[:, :512], lse, highest))
    return [torch.stack(part) for part in zip(*results)]


def decode(q, cache, causal=True, **options):
    before = k.launch_count("mla_decode")
    got = k.mla_decode(q, *cache, softmax_scale=SCALE, causal=causal, return_max_logits=True, **options)
    assert k.launch_count("mla_decode") > before, "the reference ran instead of the kernel"
    return got


def check(got, exact):
    """FlashMLA's bounds, with room neither for a wrong row nor for a NaN."""
    out, lse, highest = exact
    budget = (2.01 / 128 * out.abs()).clamp(min=8e-4)
    check_close(got.out.double(), out, budget=budget, max_cos_diff=5e-6, name="out")
    for name, one, steps in (("lse", lse, 8.01), ("max_logits", highest, 2.01)):
        finite = one.abs().masked_fill(one.isinf(), 0)
        check_close(getattr(got, name), one, budget=1e-6 + steps / 65536 * finite, name=name)


def lengths(batch, mean, varlen, least):
    return [max(int(random.normalvariate(mean, mean / 2)), least) if varlen else mean for _ in range(batch)]


@pytest.mark.parametrize("heads", [1, 3, 9, 63, 64, 126, 128])
@pytest.mark.parametrize("s_k", [20, 140, 4096])
@pytest.mark.parametrize("quantize", [False, True], ids=["bf16", "656"])
def test_grid_of_flash_mla(quantize, s_k, heads):
    random.seed(heads * s_k)
    for batch in (1, 2, 6, 64):
        for s_q in (1, 2, 4):
            for varlen, causal in (
                [(True, True)] if quantize else [(v, c) for v in (False, True) for c in (False, True)]
            ):
                q, rows, cache = make(lengths(batch, s_k, varlen, s_q), s_q, heads, quantize=quantize)
                check(decode(q, cache, causal), attention(q, rows, causal))


@pytest.mark.parametrize("page_size", [1, 16, 32, 48, 128])
@pytest.mark.parametrize("heads, s_q", [(16, 1), (64, 1), (64, 2), (40, 3)])
@pytest.mark.parametrize("strided", [False, True])
def test_pages(strided, heads, s_q, page_size):
    random.seed(page_size)
    q, rows, cache = make(lengths(20, 1000, True, 0), s_q, heads, page_size=page_size, strided=strided)
    for split in ("auto", 200):
        check(decode(q, cache, split=split), attention(q, rows, True))


@pytest.mark.parametrize("heads", [9, 64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sequences_without_keys(dtype, causal, heads):
    random.seed(heads)
    seq_lens = [n if random.random() < 0.5 else 0 for n in lengths(128, 4096, True, 2)]
    q, rows, cache = make(seq_lens, 2, heads, dtype=dtype)
    check(decode(q, cache, causal), attention(q, rows, causal))


@pytest.mark.parametrize("split", ["auto", 512])
@pytest.mark.parametrize("quantize", [False, True], ids=["bf16", "656"])
def test_graph_replay_with_other_lengths_and_fewer_sequences(quantize, split):
    """The cache is full; lengths and pages are what changes under the graph."""
    capacity = 2048
    q, rows, cache = make([capacity] * 16, 2, KIMI_K2.heads, quantize=quantize)
    table, seq_lens = cache.block_table.clone(), cache.seq_lens.clone()
    decode(q, (cache.kv_cache, table, seq_lens), split=split)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode(q, (cache.kv_cache, table, seq_lens), split=split)
    random.seed(0)
    for count in (16, 16, 5, 1, 16):  # what is left of the batch has length 0
        now = [random.randint(2, capacity) for _ in range(count)] + [0] * (16 - count)
        seq_lens.copy_(torch.tensor(now, dtype=torch.int32))
        table.copy_(cache.block_table)
        for b, length in enumerate(now):
            table[b, -(-length // 64) :] = BAD_PAGES[b % len(BAD_PAGES)]
        for result in got:
            result.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        check(got, attention(q, [row[:n] for row, n in zip(rows, now)], True))
        eager = decode(q, (cache.kv_cache, table, seq_lens), split=split)
        assert all(torch.equal(x, y) for x, y in zip(got, eager))


@pytest.mark.parametrize("split", ["auto", 256])
@pytest.mark.parametrize("quantize", [False, True], ids=["bf16", "656"])
def test_same_bits_every_time(quantize, split):
    random.seed(1)
    q, _, cache = make(lengths(37, 3000, True, 2), 2, KIMI_K2.heads, quantize=quantize)
    first = decode(q, cache, split=split)
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(decode(q, cache, split=split), first))


@pytest.mark.parametrize("quantize", [False, True], ids=["bf16", "656"])
def test_fixed_split_makes_bits_independent_of_the_batch(quantize):
    random.seed(2)
    seq_lens = [1, 511, 512, 513, 9000, *lengths(123, 2000, True, 2)]
    q, _, cache = make(seq_lens, 2, KIMI_K2.heads, quantize=quantize)
    whole = decode(q, cache, split=512)
    for rows in ([0], [1], [3], [4], [40], [4, 1], [127, 4, 2], list(range(60, 124))):
        index = torch.tensor(rows, device=DEVICE)
        some = decode(q[index], (cache.kv_cache, cache.block_table[index], cache.seq_lens[index]), split=512)
        assert all(torch.equal(x, y[index]) for x, y in zip(some, whole))


@pytest.mark.parametrize("quantize", [False, True], ids=["bf16", "656"])
def test_cache_of_more_than_two_to_the_31_elements(quantize):
    q, rows, small = make([130, 70], 1, KIMI_K2.heads, quantize=quantize)
    used = small.kv_cache.shape[0]
    pages = 2**31 // (64 * small.kv_cache.shape[2]) + 2 * used
    needed = pages * small.kv_cache[0].numel() * small.kv_cache.element_size()
    if torch.cuda.mem_get_info()[0] < 1.2 * needed:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of free GPU memory")
    cache = torch.empty(pages, *small.kv_cache.shape[1:], dtype=small.kv_cache.dtype, device=DEVICE)
    cache[-used:] = small.kv_cache
    first = cache.shape[0] - used
    table = torch.where((small.block_table >= 0) & (small.block_table < used), small.block_table + first, -1)
    assert cache[first].storage_offset() > 2**31
    check(decode(q, (cache, table.int(), small.seq_lens)), attention(q, rows, True))


# The model


def model(**changes):
    """Kimi-K2's latent row under few and narrow layers."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=512, hidden_size=256, num_hidden_layers=4, num_attention_heads=16, max_position_embeddings=4096,
        q_lora_rank=128, kv_lora_rank=512, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64,
        intermediate_size=512, moe_intermediate_size=256, n_routed_experts=8, num_experts_per_tok=2,
        n_shared_experts=1, first_k_dense_replace=9, n_group=1, topk_group=1, initializer_range=0.1, dtype="bfloat16",
    )  # fmt: skip
    return K2Model(K2Config(**{**sizes, **changes})).bfloat16().to(DEVICE).eval()


@pytest.fixture
def recordings(monkeypatch):
    """How many functions went into each graph."""
    sizes, record = [], CudaRecorder.record
    monkeypatch.setattr(CudaRecorder, "record", lambda self, runs: sizes.append(len(runs)) or record(self, runs))
    return sizes


@pytest.mark.parametrize("drafts", [0, 1])
@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
def test_generation_replays_one_graph(cache_dtype, drafts, recordings):
    """Without experts the whole pass is one graph; the tokens are those of single launches, as rows end too."""
    made = model(num_nextn_predict_layers=drafts)
    prompt = torch.randint(0, 512, (5, 100), device=DEVICE)
    options = dict(max_new_tokens=150, cache_dtype=cache_dtype, speculative=drafts > 0)
    free = made.generate(prompt, eos_token_ids=[], cuda_graphs=False, **options)
    assert not recordings
    for stops in ([], [int(free[0, 120]), int(free[1, 160]), int(free[2, 200])]):
        want = made.generate(prompt, eos_token_ids=stops, cuda_graphs=False, **options)
        before = k.launch_count("mla_decode")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "generate")
            got = made.generate(prompt, eos_token_ids=stops, **options)
        assert k.launch_count("mla_decode") > before
        assert torch.equal(got, want)
    assert recordings and set(recordings) == {10}  # embedding, two halves of four layers, head


def generate_both_ways(made):
    """Tokens without and with CUDA graphs, and what warnings said."""
    prompt = torch.randint(0, 512, (3, 70), device=DEVICE)
    want = made.generate(prompt, max_new_tokens=40, eos_token_ids=[], cuda_graphs=False)
    replay._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = made.generate(prompt, max_new_tokens=40, eos_token_ids=[])
    assert torch.equal(got, want)
    return [str(warning.message) for warning in caught]


def test_generation_with_experts_replays_one_graph(recordings):
    said = generate_both_ways(model(first_k_dense_replace=1))
    assert recordings and set(recordings) == {10}
    assert not any("wait for the device" in message for message in said)


def test_generation_with_experts_in_float32_says_what_it_launches(recordings):
    said = generate_both_ways(model(first_k_dense_replace=1).float())
    assert sum(recordings) >= 7  # all but three layers of experts
    assert any("wait for the device" in message for message in said)
