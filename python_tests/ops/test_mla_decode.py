import math

import numpy as np
import pytest
import torch
from decode_cases import cumulative, dequantised_rows, e4m3, make, naive

from k2kernels.ops import mla_decode as module
from k2kernels.ops.mla_cache import mla_gather
from k2kernels.ops.mla_decode import MlaOutput, merge_attention_states, mla_decode
from k2kernels.ops.mla_prefill import mla_prefill
from k2kernels.testing.compare import check_close, check_op
from k2kernels.testing.inputs import KIMI_K2, poisoned_cache

SEQ_LENS = [0, 1, 63, 64, 65, 127, 129]


def check(got, want, shape, *, budget):
    for name, x, y in zip(MlaOutput._fields, got, want):
        check_close(x, y.reshape(x.shape), budget=budget, name=name)
    assert got.lse.shape == got.max_logits.shape == shape


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
@pytest.mark.parametrize("heads", [1, 3, 8, 16, 63, 64, 128])
@pytest.mark.parametrize("s_q", [1, 2, 3, 4])
def test_equals_naive_in_float64(s_q, heads, page_size, causal):
    queries, rows, cache = make(SEQ_LENS, [s_q] * 7, heads, 16, 8, page_size, strided=page_size in (16, 64))
    got = mla_decode(
        torch.stack(queries), *cache, softmax_scale=0.2, causal=causal, head_dim_v=16, return_max_logits=True
    )
    check(got, naive(queries, rows, 0.2, causal, 16), (7, s_q, heads), budget=1e-13)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_lens", [[0, 1, 2, 3, 5, 8, 4], [3, 0, 0, 0, 0, 0, 0], [1] * 7], ids=str)
@pytest.mark.parametrize("split", ["auto", 64])
def test_ragged_queries_equal_naive_in_float64(split, q_lens, causal):
    queries, rows, cache = make(SEQ_LENS, q_lens, 3, 16, 8, 16)
    got = mla_decode(
        torch.cat(queries), *cache, cu_seqlens_q=cumulative(q_lens),
        softmax_scale=0.2, causal=causal, head_dim_v=16, split=split, return_max_logits=True,
    )  # fmt: skip
    check(got, naive(queries, rows, 0.2, causal, 16), (sum(q_lens), 3), budget=1e-13)


@pytest.mark.parametrize("split", ["auto", 64])
@pytest.mark.parametrize("q_lens", [[2, 1, 0, 3, 0, 0, 1], [0] * 7], ids=str)
def test_queries_that_no_sequence_owns(q_lens, split):
    queries, rows, cache = make(SEQ_LENS, q_lens, 3, 16, 8, 16)
    q = torch.cat([*queries, torch.full((4, 3, 24), math.nan, dtype=torch.float64)])
    out = torch.full((len(q), 3, 16), math.nan, dtype=torch.float64)
    for given in (None, out):
        got = mla_decode(
            q, *cache, cu_seqlens_q=cumulative(q_lens), softmax_scale=0.2, head_dim_v=16, split=split, out=given,
            return_max_logits=True,
        )  # fmt: skip
        owned = sum(q_lens)
        if owned:
            check(MlaOutput(*(x[:owned] for x in got)), naive(queries, rows, 0.2, True, 16), (owned, 3), budget=1e-13)
        assert (got.out[owned:] == 0).all()
        assert (got.lse[owned:] == -math.inf).all() and (got.max_logits[owned:] == -math.inf).all()


TILED = [2500, 1030]  # more than the reference takes at a time when the split is free


@pytest.mark.parametrize(
    "seq_lens, split",
    [(SEQ_LENS, 1), (SEQ_LENS, 7), (SEQ_LENS, 64), (SEQ_LENS, 4096), (TILED, 100), (TILED, 4096)],
    ids=str,
)
def test_split_changes_only_the_rounding(seq_lens, split):
    queries, rows, cache = make(seq_lens, [2] * len(seq_lens), 2, 16, 8, 64)
    want = naive(queries, rows, 0.2, True, 16)
    for choice in ("auto", split):
        got = mla_decode(
            torch.stack(queries), *cache, softmax_scale=0.2, head_dim_v=16, split=choice, return_max_logits=True
        )
        check(got, want, (len(seq_lens), 2, 2), budget=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kimi_k2_sizes_lose_no_more_than_torch_in_the_same_precision(dtype):
    queries, rows, cache = make([129, 64], [2, 2], KIMI_K2.heads, KIMI_K2.latent, KIMI_K2.rope, 64, dtype)
    scale = KIMI_K2.softmax_scale
    got = mla_decode(torch.stack(queries), *cache, softmax_scale=scale, return_max_logits=True)
    exact = naive([q.double() for q in queries], [r.double() for r in rows], scale, True, 512)
    same = naive(queries, rows, scale, True, 512)
    check_close(got.out.flatten(0, 1), exact[0], same_precision=same[0], max_cos_diff=5e-6, name="out")
    check_close(got.lse.flatten(0, 1), exact[1], budget=1e-6 + 8.01 / 65536 * exact[1].abs(), name="lse")
    check_close(got.max_logits.flatten(0, 1), exact[2], budget=1e-6 + 2.01 / 65536 * exact[2].abs(), name="max_logits")
    assert got.out.dtype == dtype and got.lse.dtype == got.max_logits.dtype == torch.float32


def test_large_logits():
    queries, rows, cache = make([129, 70], [2, 2], 4, 16, 8, 16, torch.float32, scale_q=1000.0)
    want = naive([q.double() for q in queries], [r.double() for r in rows], 1.0, True, 16)
    assert want[2].max() > 1e4
    for split in ("auto", 16):
        out, lse, peak = mla_decode(
            torch.stack(queries), *cache, softmax_scale=1.0, head_dim_v=16, split=split, return_max_logits=True
        )
        check_close(peak.flatten(0, 1), want[2], budget=1e-6 * want[2].abs(), name="max_logits")
        check_close(lse.flatten(0, 1), want[1], budget=1e-6 * want[1].abs(), name="lse")
        check_close(out.flatten(0, 1), want[0], budget=1e-2, max_cos_diff=1e-6, name="out")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("q_lens", [[1] * 5, [4] * 5, [1, 3, 0, 8, 2]], ids=str)
def test_fixed_split_makes_bits_independent_of_the_batch(q_lens, threads):
    seq_lens = [300, 65, 8, 513, 129]
    queries, _, cache = make(seq_lens, q_lens, 8, 512, 64, 64, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # on several threads, a batched matrix product rounds by the size of its batch
    try:
        whole = mla_decode(torch.cat(queries), *cache, cu_seqlens_q=cumulative(q_lens), softmax_scale=0.05, split=256)
        for b, q in enumerate(queries):
            alone = mla_decode(
                q[None], cache.kv_cache, cache.block_table[b : b + 1], cache.seq_lens[b : b + 1],
                softmax_scale=0.05, split=256,
            )  # fmt: skip
            place = slice(sum(q_lens[:b]), sum(q_lens[: b + 1]))
            assert torch.equal(alone.out[0], whole.out[place]) and torch.equal(alone.lse[0], whole.lse[place])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantized_cache_equals_attention_over_its_dequantised_rows(power_of_two):
    seq_lens, scale = [0, 1, 65, 129], KIMI_K2.softmax_scale
    queries, _, cache = make(
        seq_lens, [2] * 4, 16, 512, 64, 64, torch.bfloat16, quantize=True, power_of_two=power_of_two, strided=True
    )
    got = mla_decode(torch.stack(queries), *cache, softmax_scale=scale, return_max_logits=True)
    rows = [dequantised_rows(cache, b) for b in range(4)]
    exact = naive([q.double() for q in queries], rows, scale, True, 512)
    same = naive(queries, [r.bfloat16() for r in rows], scale, True, 512)
    check_close(got.out.flatten(0, 1), exact[0], same_precision=same[0], max_cos_diff=5e-6, name="out")
    check_close(got.lse.flatten(0, 1), exact[1], budget=1e-6 + 8.01 / 65536 * exact[1].abs(), name="lse")
    # In float64, the product of code and scale is not rounded at all.
    got = mla_decode(torch.stack(queries).double(), *cache, softmax_scale=scale, return_max_logits=True)
    check(got, exact, (4, 2, 16), budget=1e-12)


@pytest.mark.parametrize("scale", [0.0123456789, 2.0**-5, 7.7])
def test_quantized_cache_holds_every_e4m3_code(scale):
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)  # without the two NaN
    row = torch.zeros(1, 1, 656, dtype=torch.uint8)
    latents = torch.cat([codes, codes.flip(0), codes[:4]])
    row[0, 0, :512] = latents
    row[0, 0, 512:528] = torch.tensor([scale] * 4, dtype=torch.float32).view(torch.uint8)
    # A single key has probability 1: the result is the latent itself.
    got = mla_decode(
        torch.randn(1, 1, 2, 576, dtype=torch.float64), row,
        torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), softmax_scale=1.0,
    )  # fmt: skip
    want = torch.tensor([e4m3(int(c)) for c in latents], dtype=torch.float64) * float(np.float32(scale))
    torch.testing.assert_close(got.out[0, 0], want.expand(2, -1), rtol=0, atol=0)


def test_absorbed_form_equals_expanded_keys_and_values():
    heads, nope, rope, latent, value = 4, 12, 6, 24, 10
    q_lens, seq_lens = [3, 1, 5], [40, 17, 5]
    w_uk, w_uv = torch.randn(heads, nope, latent).double(), torch.randn(heads, value, latent).double()
    queries = [torch.randn(n, heads, nope + rope, dtype=torch.float64) for n in q_lens]
    rows = [torch.randn(n, latent + rope, dtype=torch.float64) for n in seq_lens]
    scale = (nope + rope) ** -0.5

    kv = torch.cat(rows)
    c, k_rope = kv[:, None, :latent], kv[:, None, latent:].expand(-1, heads, -1)
    k = torch.cat([torch.einsum("hnl,tal->thn", w_uk, c), k_rope], dim=-1)
    v = torch.einsum("hvl,tal->thv", w_uv, c)
    want = mla_prefill(
        torch.cat(queries), k, v, cu_seqlens_q=cumulative(q_lens), cu_seqlens_k=cumulative(seq_lens),
        softmax_scale=scale, return_max_logits=True,
    )  # fmt: skip

    q = torch.cat(queries)
    absorbed = torch.cat([torch.einsum("thn,hnl->thl", q[..., :nope], w_uk), q[..., nope:]], dim=-1)
    got = mla_decode(
        absorbed, *poisoned_cache(rows, 16), cu_seqlens_q=cumulative(q_lens), softmax_scale=scale, head_dim_v=latent,
        return_max_logits=True,
    )  # fmt: skip
    check_close(torch.einsum("thl,hvl->thv", got.out, w_uv), want.out, budget=1e-12, name="out")
    check_close(got.lse, want.lse, budget=1e-12, name="lse")
    check_close(got.max_logits, want.max_logits, budget=1e-12, name="max_logits")


@pytest.mark.parametrize("quantize", [False, True])
def test_out_is_written_in_place_and_nothing_beside_it(quantize):
    queries, _, cache = make(SEQ_LENS, [2] * 7, 3, 512, 64, 16, torch.float32, quantize=quantize)
    q = torch.stack(queries)
    want = mla_decode(q, *cache, softmax_scale=0.1, return_max_logits=True)
    around = torch.full((7, 2, 5, 600), 123.0)
    out = around[:, :, 1:4, 50:562]
    got = mla_decode(q, *cache, softmax_scale=0.1, out=out, return_max_logits=True)
    assert got.out is out
    for x, y in zip(got, want):
        assert torch.equal(x, y)
    out.fill_(123.0)
    assert (around == 123.0).all()


def test_offsets_beyond_two_to_the_31():
    # Pages 2**31 + 4096 bytes apart; the memory between them is never touched, so the system need not provide it.
    stride = 2**31 + 4096
    cache = torch.empty(stride + 656 * 4, dtype=torch.uint8).as_strided((2, 4, 656), (stride, 656, 1))
    _, _, small = make([7], [1], 1, 512, 64, 4, torch.float32, quantize=True, spare_pages=0)
    cache.copy_(small.kv_cache)
    q = torch.randn(1, 1, 2, 576)
    want = mla_decode(q, *small, softmax_scale=0.1)
    got = mla_decode(q, cache, small.block_table, small.seq_lens, softmax_scale=0.1)
    assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)
    positions = torch.arange(7)
    assert torch.equal(
        mla_gather(cache, small.block_table, positions), mla_gather(small.kv_cache, small.block_table, positions)
    )


@pytest.mark.parametrize("batch, s_q, pages, max_pages", [(0, 1, 4, 2), (3, 0, 4, 2), (2, 1, 0, 0), (2, 2, 0, 3)])
@pytest.mark.parametrize("split", ["auto", 8])
def test_nothing_to_do(batch, s_q, pages, max_pages, split):
    got = mla_decode(
        torch.randn(batch, s_q, 2, 6), torch.full((pages, 4, 6), math.nan),
        torch.full((batch, max_pages), -7, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32),
        softmax_scale=1.0, head_dim_v=4, split=split, return_max_logits=True,
    )  # fmt: skip
    assert got.out.shape == (batch, s_q, 2, 4) and (got.out == 0).all()
    for rows in got[1:]:
        assert rows.shape == (batch, s_q, 2) and (rows == -math.inf).all()


def test_foreign_arrays():
    queries, _, cache = make([5, 9], [1, 1], 3, 4, 2, 4, torch.float32)
    q = torch.stack(queries)
    want = mla_decode(q, *cache, softmax_scale=0.5, head_dim_v=4)
    got = mla_decode(q.numpy(), *(x.numpy() for x in cache), softmax_scale=0.5, head_dim_v=4)
    assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)
    assert want.max_logits is None and got.max_logits is None
    out = np.zeros((2, 1, 3, 4), dtype=np.float32)
    mla_decode(q, *cache, softmax_scale=0.5, head_dim_v=4, out=out)
    assert np.array_equal(out, want.out.numpy())


@pytest.mark.parametrize("split, return_max_logits", [("auto", True), (4, False)])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("quantize", [False, True])
def test_registration(quantize, ragged, split, return_max_logits):
    queries, _, cache = make([5, 9], [2, 2], 2, 512, 64, 4, torch.float32, quantize=quantize)
    q = torch.cat(queries) if ragged else torch.stack(queries)
    cu = cumulative([2, 2]) if ragged else None
    request = (q, *cache, 0.1, cu, True, 512, 0 if split == "auto" else split, return_max_logits)
    check_op(
        module._mla_decode,
        request,
        compiled=lambda: mla_decode(
            q, *cache, cu_seqlens_q=cu, softmax_scale=0.1, split=split, return_max_logits=return_max_logits
        ),
    )
    check_op(module._mla_decode.out, (*request, torch.zeros(*q.shape[:-1], 512)))


def test_compiled_with_out():
    queries, _, cache = make([5, 9], [1, 1], 3, 4, 2, 4, torch.float32)
    q, out = torch.stack(queries), torch.zeros(2, 1, 3, 4)

    def step():
        return mla_decode(q, *cache, softmax_scale=0.5, head_dim_v=4, out=out).out * 2

    want = step()
    out.zero_()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")()
    assert torch.equal(got, want) and torch.equal(out * 2, want)


def test_meta_tensors():
    q = torch.empty(3, 2, 64, 576, dtype=torch.bfloat16, device="meta")
    cache = torch.empty(7, 64, 656, dtype=torch.uint8, device="meta")
    table, lens = (torch.empty(*shape, dtype=torch.int32, device="meta") for shape in ((3, 4), (3,)))
    got = mla_decode(q, cache, table, lens, softmax_scale=0.1, return_max_logits=True)
    assert got.out.shape == (3, 2, 64, 512) and got.out.dtype == torch.bfloat16
    assert got.lse.shape == got.max_logits.shape == (3, 2, 64) and got.lse.dtype == torch.float32


def test_differentiating_raises():
    queries, _, cache = make([5], [1], 2, 4, 2, 4, torch.float32)
    q = torch.stack(queries).requires_grad_()
    with pytest.raises(RuntimeError, match="mla_decode: this op has no backward"):
        mla_decode(q, *cache, softmax_scale=1.0, head_dim_v=4).out.sum().backward()
    with pytest.raises(ValueError, match="mla_decode: q must be a tensor that needs no gradient"):
        mla_decode(q, *cache, softmax_scale=1.0, head_dim_v=4, out=torch.zeros(1, 1, 2, 4))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (dict(q=torch.zeros(2, 3, 6)), ValueError, r"q must be \[B, s_q, H, D\] .*, got \[2, 3, 6\] float32"),
        (dict(cu_seqlens_q=int32(0, 1, 2)), ValueError, r"q must be \[T, H, D\] .*, got \[2, 1, 3, 6\]"),
        (dict(kv_cache=torch.zeros(4, 2, 5)), ValueError, r"kv_cache must be \[pages, page_size, 6\], got \[4, 2, 5\]"),
        (dict(kv_cache=torch.zeros(4, 2, 6).half()), TypeError, r"kv_cache must be .* float32 or uint8, got .*16"),
        (dict(kv_cache=torch.zeros(4, 2, 656, dtype=torch.uint8)), ValueError,
         r"kv_cache must be floats for rows of 6 elements, got uint8; the 656-byte layout holds rows of 576"),
        (dict(q=torch.zeros(2, 1, 3, 576), kv_cache=torch.zeros(4, 2, 655, dtype=torch.uint8)), ValueError,
         r"kv_cache must be \[pages, page_size, 656\], got \[4, 2, 655\]"),
        (dict(q=torch.zeros(2, 1, 3, 576), kv_cache=torch.zeros(4, 2, 656, dtype=torch.uint8)), ValueError,
         r"head_dim_v must be 512 for a cache of 656-byte rows, got 4"),
        (dict(kv_cache=torch.zeros(4, 0, 6)), ValueError, r"kv_cache must be of page_size >= 1, got \[4, 0, 6\]"),
        (dict(block_table=torch.zeros(2, 3)), TypeError, r"block_table must be .* int32, got \[2, 3\] float32"),
        (dict(block_table=int32([0, 1, 2])), ValueError, r"block_table must be \[B=2, max_pages\] int32, got \[1, 3\]"),
        (dict(seq_lens=int32(1)), ValueError, r"seq_lens must be \[B=2\] int32, got \[1\]"),
        (dict(seq_lens=int32(1, -1)), ValueError, r"seq_lens must be in \[0, 6\] .*, got -1"),
        (dict(seq_lens=int32(7, 1)), ValueError, r"seq_lens must be in \[0, 6\] .*, got 7"),
        (dict(block_table=int32([0, 4, 0], [1, 1, 1])), ValueError,
         r"block_table must be in \[0, 4\) .*, got 4 at \[0, 1\]"),
        (dict(block_table=int32([0, 1, 0], [-1, 1, 1])), ValueError, r"block_table .*, got -1 at \[1, 0\]"),
        (dict(q=torch.zeros(2, 3, 6), cu_seqlens_q=int32(0, 1, 3)), ValueError,
         r"cu_seqlens_q must rise from 0 to at most 2 .*, got \[0, 1, 3\]"),
        (dict(q=torch.zeros(2, 3, 6), cu_seqlens_q=int32(0, 2)), ValueError,
         r"cu_seqlens_q must be \[3\] int32, got \[2\]"),
        (dict(softmax_scale=0.0), ValueError, r"softmax_scale must be positive and finite, got 0.0"),
        (dict(softmax_scale="1"), TypeError, r"softmax_scale must be a number, got str"),
        (dict(head_dim_v=7), ValueError, r"head_dim_v must be an int in 1 .. 6, got 7"),
        (dict(head_dim_v=4.0), ValueError, r"head_dim_v must be an int in 1 .. 6, got 4.0"),
        (dict(split=0), ValueError, r"split must be an int >= 1, got 0; or 'auto'"),
        (dict(split="fixed"), ValueError, r"split must be an int >= 1, got 'fixed'; or 'auto'"),
        (dict(out=torch.zeros(2, 1, 3, 6)), ValueError, r"out must be \[2, 1, 3, 4\] float32, got \[2, 1, 3, 6\]"),
        (dict(out=torch.zeros(2, 1, 3, 4).half()), TypeError, r"out must be .* float32, got .* float16"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_bad_arguments(changed, error, message):
    good = dict(
        q=torch.zeros(2, 1, 3, 6), kv_cache=torch.zeros(4, 2, 6), block_table=int32([0, 1, 9], [2, 3, 9]),
        seq_lens=int32(3, 1), softmax_scale=1.0, head_dim_v=4,
    )  # fmt: skip
    arguments = {**good, **changed}
    first = [arguments.pop(name) for name in ("q", "kv_cache", "block_table", "seq_lens")]
    with pytest.raises(error, match="mla_decode: " + message):
        mla_decode(*first, **arguments)


@pytest.mark.parametrize("cut", [0, 1, 20, 39, 40])
def test_merge_of_two_parts_is_the_whole(cut):
    queries, rows, _ = make([40], [3], 4, 16, 8, 16)
    whole = naive(queries, rows, 0.3, False, 16)
    parts = [naive(queries, [part], 0.3, False, 16) for part in (rows[0][:cut], rows[0][cut:])]
    out, lse = merge_attention_states(parts[0][0], parts[0][1], parts[1][0], parts[1][1])
    check_close(out, whole[0], budget=1e-14, name="out")
    check_close(lse, whole[1], budget=1e-14, name="lse")


def test_merge_of_states_that_saw_nothing():
    nan, some = torch.full((3, 2, 4), math.nan), torch.randn(3, 2, 4)
    nothing, lse = torch.full((3, 2), -math.inf), torch.randn(3, 2)
    for arguments, want in (
        ((nan, nothing, nan, nothing), (torch.zeros(3, 2, 4), nothing)),
        ((nan, nothing, some, lse), (some, lse)),
        ((some, lse, nan, nothing), (some, lse)),
    ):
        for x, y in zip(merge_attention_states(*arguments), want):
            assert torch.equal(x, y)


def test_merge_of_large_lse():
    # exp(1e4) is infinite, and so close together both states count.
    out, lse = merge_attention_states(
        torch.tensor([0.0]), torch.tensor(1e4), torch.tensor([1.0]), torch.tensor(1e4 + 1)
    )
    torch.testing.assert_close(out, torch.tensor([1 / (1 + math.exp(-1))]))
    torch.testing.assert_close(lse, torch.tensor(1e4 + 1 + math.log1p(math.exp(-1))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_rounds_once(dtype):
    a, b = torch.randn(5, 3, 8).to(dtype), torch.randn(5, 3, 8).to(dtype)
    lse_a, lse_b = torch.randn(5, 3), torch.randn(5, 3)
    out, lse = merge_attention_states(a, lse_a, b, lse_b)
    weight = torch.sigmoid(lse_a.double() - lse_b.double()).unsqueeze(-1)
    exact = a.double() * weight + b.double() * (1 - weight)
    check_close(out, exact, budget=torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6, name="out")
    check_close(lse, torch.logaddexp(lse_a.double(), lse_b.double()), budget=1e-6, name="lse")
    assert out.dtype == dtype and lse.dtype == torch.float32


def test_merge_registration_and_bad_arguments():
    arguments = (torch.randn(5, 8), torch.randn(5), torch.randn(5, 8), torch.randn(5))
    check_op(module._merge_attention_states, arguments, compiled=lambda: merge_attention_states(*arguments))
    with pytest.raises(ValueError, match=r"merge_attention_states: lse_a must be \[5\] float32, got \[8\]"):
        merge_attention_states(arguments[0], torch.randn(8), *arguments[2:])
    with pytest.raises(TypeError, match=r"merge_attention_states: lse_b must be \[5\] float32, got \[5\] bfloat16"):
        merge_attention_states(*arguments[:3], arguments[3].bfloat16())
