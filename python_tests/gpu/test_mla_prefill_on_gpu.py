"""mla_prefill on a GPU: lengths around its tiles, Kimi-K2's sizes, bits. Run by `make gpu`."""

import pytest
import torch
import torch.nn.functional as F

import k2kernels as k
from k2kernels.ops import mla_prefill as prefill
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import KIMI_K2

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NOPE, ROPE, VALUE, SCALE = KIMI_K2.nope, KIMI_K2.rope, KIMI_K2.value, KIMI_K2.softmax_scale
LENGTHS = [0, 1, 63, 64, 65, 127, 128, 129, 191, 300, 1000]
OTHER_LENGTHS = [7, 1, 100, 64, 0, 190, 128, 60, 191, 300, 1500]


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)


def make(lengths_q, lengths_k, heads, dtype=torch.bfloat16, scale_q=1.0):
    """q, keys and values side by side, k_rope, cu_seqlens of queries and keys."""
    queries, keys = sum(lengths_q), sum(lengths_k)

    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    q, kv = normal(queries, heads, NOPE + ROPE) * scale_q, normal(keys, heads, NOPE + VALUE)
    return q.to(dtype), kv.to(dtype), normal(keys, ROPE).to(dtype), cumulative(lengths_q), cumulative(lengths_k)


def attend(q, kv, k_rope, cu_q, cu_k, causal=True):
    before = k.launch_count("mla_prefill")
    got = k.mla_prefill(
        q, kv, None, k_rope=k_rope, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, softmax_scale=SCALE, causal=causal,
        return_max_logits=True,
    )  # fmt: skip
    assert k.launch_count("mla_prefill") > before, "the reference ran instead of the kernel"
    return got


def with_gradients(inputs, grads=None, causal=True):
    """The results, random gradients of out and lse, and those of q, kv and k_rope."""
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    got = attend(*leaves, *inputs[3:], causal=causal)
    if grads is None:
        grads = torch.randn_like(got.out), torch.randn_like(got.lse)
    return got, grads, torch.autograd.grad([got.out, got.lse], leaves, grads)


def by_formula(inputs, grads, causal, dtype):
    """The same in `dtype`, sequence by sequence; of bfloat16 and float16 with each product rounded."""
    q, kv, k_rope, cu_q, cu_k = inputs
    leaves = [x.to(dtype).requires_grad_() for x in (q, kv, k_rope)]
    outs, lses, peaks = [], [], []
    for b in range(len(cu_q) - 1):
        (q0, q1), (k0, k1) = cu_q[b : b + 2].tolist(), cu_k[b : b + 2].tolist()
        keys, values = leaves[1][k0:k1].split([NOPE, VALUE], dim=-1)
        rope = leaves[2][k0:k1, None].expand(-1, keys.shape[1], -1)
        logits = torch.einsum("qhd,khd->hqk", leaves[0][q0:q1], torch.cat([keys, rope], -1)) * SCALE
        logits = logits if dtype == torch.float64 else logits.float()
        if causal:
            rows = torch.arange(q1 - q0, device="cuda")[:, None] + (k1 - k0) - (q1 - q0)
            logits = logits.masked_fill(torch.arange(k1 - k0, device="cuda") > rows, -torch.inf)
        seen = (logits > -torch.inf).any(-1) if k1 > k0 else logits.new_zeros(logits.shape[:2], dtype=torch.bool)
        safe = torch.where(seen[..., None], logits, 0)
        p = torch.where(seen[..., None], safe.softmax(-1), 0)
        outs.append(torch.einsum("hqk,khd->qhd", p.to(dtype), values))
        none = torch.full_like(seen, -torch.inf, dtype=logits.dtype)
        lses.append(torch.where(seen, safe.logsumexp(-1), none).T if k1 > k0 else none.T)
        peaks.append((logits.amax(-1) if k1 > k0 else none).T)
    out, lse, peak = (torch.cat(x) for x in (outs, lses, peaks))
    finite = lse.isfinite()
    of = torch.autograd.grad((out * grads[0].to(dtype)).sum() + (lse * grads[1])[finite].sum(), leaves)
    return out.detach(), lse.detach(), peak.detach(), of


def check(inputs, causal=True):
    got, grads, of_inputs = with_gradients(inputs, causal=causal)
    out, lse, peak, want = by_formula(inputs, grads, causal, torch.float64)
    same_out, _, _, same = by_formula(inputs, grads, causal, inputs[0].dtype)
    check_close(got.out, out, same_precision=same_out, max_cos_diff=1e-5, name="out")
    for name, found, exact, steps in (("lse", got.lse, lse, 8.01), ("max_logits", got.max_logits, peak, 2.01)):
        finite = exact.abs().masked_fill(exact.isinf(), 0)
        check_close(found, exact, budget=1e-6 + steps / 65536 * finite, name=name)
    for name, *three in zip(("q", "kv", "k_rope"), of_inputs, want, same):
        check_close(three[0], three[1], same_precision=three[2], max_cos_diff=2e-5, name=f"grad_{name}")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lengths_around_tiles(dtype, causal):
    check(make(LENGTHS, OTHER_LENGTHS, 5, dtype), causal)


@pytest.fixture
def portable_kernels(monkeypatch):
    """Those of sm_80, on any GPU."""
    own = prefill.chip
    monkeypatch.setattr(prefill, "chip", lambda device: own(device)._replace(capability=80))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_portable_kernels(dtype, portable_kernels):
    check(make(LENGTHS, OTHER_LENGTHS, 5, dtype))
    check(make([1500], [1500], 8, dtype))


def test_heads_before_tokens_and_concatenated_keys():
    """Strides of heads larger than those of tokens; keys with a rope part of each head's own."""
    q, kv, k_rope, cu_q, cu_k = make([300, 70], [300, 200], 8)
    want = attend(q, kv, k_rope, cu_q, cu_k)
    q, kv = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, kv))
    assert all(torch.equal(x, y) for x, y in zip(attend(q, kv, k_rope, cu_q, cu_k), want))
    keys, values = kv.split([NOPE, VALUE], dim=-1)
    joined = torch.cat([keys, k_rope[:, None].expand(-1, 8, -1)], dim=-1)
    got = k.mla_prefill(
        q, joined, values, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, softmax_scale=SCALE, return_max_logits=True
    )
    assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.parametrize("lengths_q, lengths_k", [([2048], [2048]), ([100, 900], [1500, 900])], ids=str)
def test_kimi_k2(lengths_q, lengths_k):
    check(make(lengths_q, lengths_k, 8))


def test_eight_thousand_tokens_and_64_heads():
    """64 heads, where float64 would be too large: rows of the last 64 queries alone, in float64."""
    inputs = make([8192], [8192], KIMI_K2.heads)
    got = attend(*inputs)
    q, kv, k_rope, _, cu_k = inputs
    last = q[-64:], kv, k_rope, cumulative([64]), cu_k
    again = attend(*last)
    assert all(torch.equal(x[-64:], y) for x, y in zip(got, again))  # the bits of a chunk after a context
    keys, values = kv[:, :4].double().split([NOPE, VALUE], dim=-1)
    logits = torch.einsum("qhd,khd->hqk", q[-64:, :4].double(), F.pad(keys, (0, ROPE)))
    logits += torch.einsum("qhd,kd->hqk", q[-64:, :4, NOPE:].double(), k_rope.double())
    rows = torch.arange(8192 - 64, 8192, device="cuda")[:, None]
    logits = (logits * SCALE).masked_fill(torch.arange(8192, device="cuda") > rows, -torch.inf)
    exact = torch.einsum("hqk,khd->qhd", logits.softmax(-1), values)
    check_close(again.out[:, :4], exact, budget=(2.01 / 128 * exact.abs()).clamp(min=8e-4), name="out")
    check_close(again.lse[:, :4], logits.logsumexp(-1).T, budget=1e-3, name="lse")


def test_repeats_have_equal_bits():
    inputs = make([3000, 70, 1000], [3000, 200, 1000], 16, scale_q=3.0)
    want, grads, of_want = with_gradients(inputs)
    for _ in range(20):
        got, _, of_got = with_gradients(inputs, grads)
        assert all(torch.equal(x, y) for x, y in zip((*got, *of_got), (*want, *of_want)))


def test_a_sequence_alone_has_the_bits_of_the_batch():
    lengths = [700, 3, 2000, 129]
    q, kv, k_rope, cu, _ = make(lengths, lengths, 8, scale_q=3.0)
    want, grads, of_want = with_gradients((q, kv, k_rope, cu, cu))
    for begin, n in zip(cu.tolist(), lengths):
        rows = slice(begin, begin + n)
        alone = q[rows], kv[rows], k_rope[rows], cumulative([n]), cumulative([n])
        got, _, of_got = with_gradients(alone, [g[rows] for g in grads])
        assert all(torch.equal(x, y[rows]) for x, y in zip((*got, *of_got), (*want, *of_want)))


def test_pieces_have_the_bits_of_one_call():
    q, kv, k_rope, cu_q, cu_k = make([500], [5000], 8, scale_q=3.0)
    want, state = attend(q, kv, k_rope, cu_q, cu_k), None
    for begin in range(0, 5000, 1024):
        rows = slice(begin, min(begin + 1024, 5000))
        state = k.mla_prefill_piece(
            state, q, kv[rows], None, k_rope=k_rope[rows], cu_seqlens_q=cu_q,
            cu_seqlens_k=cumulative([rows.stop - begin]), softmax_scale=SCALE, return_max_logits=True,
            diagonal=torch.tensor([4500 - begin], dtype=torch.int32, device="cuda"), last=rows.stop == 5000,
        )  # fmt: skip
    assert all(torch.equal(x, y) for x, y in zip(state, want))


def test_memory_of_the_backward_is_linear():
    """cuDNN's deterministic backward takes 2 bytes x heads x tokens^2 beside: 64 GiB here."""
    tokens = 16384
    inputs = make([tokens], [tokens], 128)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    got = attend(*leaves, *inputs[3:])
    grad = torch.randn_like(got.out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(got.out, leaves, grad)
    torch.cuda.synchronize()
    gradients = 2 * tokens * (128 * (192 + 256) + 64)
    workspace = 4 * tokens * 128 * (2 + 64) + 4 * tokens * 128  # lse2, delta, parts of rope; zeros for the lse
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * (gradients + workspace)
