"""Hopper's kernels of mla_prefill in the emulator: tiles, tails, and what their bits do not depend on. What all kernels
must do is in test_mla_prefill_kernel.py."""

import math

import pytest
import torch
import torch.nn.functional as F

import k2kernels
from k2kernels import _emu
from k2kernels.ops import _launch
from k2kernels.ops import mla_prefill as module
from k2kernels.ops._launch import EMULATED_CHIPS, Chip
from k2kernels.ops.mla_prefill import MlaOutput, mla_prefill, mla_prefill_piece
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import KIMI_K2, guarded

SEEDS = range(4)  # round robin, depth first, two random schedules
H = 2
SCALE = KIMI_K2.softmax_scale
# Logits are float32 sums of 192 products of normals: partial sums are at most about 192, and a few of their roundings
# (2**-24) do not cancel.
LOGIT_ERROR = 4 * 2.0**-24 * 192 * SCALE
BF16, FP16 = torch.bfloat16, torch.float16

# Around multiples of a warpgroup's 64 rows and a block's 128 keys; one sequence with more queries than keys, one with
# fewer, one without keys, one without queries.
LENGTHS_Q = [0, 1, 63, 64, 65, 127, 128, 129, 191, 70, 3, 9, 0]
LENGTHS_K = [0, 1, 63, 64, 65, 127, 128, 129, 191, 65, 260, 0, 5]


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make(lengths_q, lengths_k, dtype=BF16, spread=1.0):
    """q [Tq, H, 192], kv [Tk, H, 256], k_rope [Tk, 64], and the sequences; logits have the standard deviation
    `spread`."""
    q = torch.randn(sum(lengths_q), H, 192) * spread
    kv, k_rope = torch.randn(sum(lengths_k), H, 256), torch.randn(sum(lengths_k), 64)
    return [x.to(dtype) for x in (q, kv, k_rope)], {"cu_seqlens_q": cumulative(lengths_q), "cu_seqlens_k": cumulative(lengths_k)}


def run(tensors, cu, *, seed=0, **options):
    """The result of Hopper's kernel; it is asserted that this is what runs."""
    q, kv, k_rope = tensors
    plan = _emu.mla_prefill_plan(EMULATED_CHIPS["sm_90a"], q, kv, kv[..., 128:], k_rope)
    assert plan.kernel == "sm90"
    options = {"softmax_scale": SCALE, "return_max_logits": True, **options}
    before = k2kernels.launch_count("mla_prefill")
    with k2kernels.emulated("sm_90a", seed=seed):
        got = mla_prefill(q, kv, None, k_rope=k_rope, **cu, **options)
    assert k2kernels.launch_count("mla_prefill") - before == 1
    return got


def attention(tensors, lengths_q, lengths_k, causal):
    """torch's, sequence by sequence, in the precision of the tensors: out, lse and the largest logits."""
    q, kv, k_rope = tensors
    outs, lses, peaks = [], [], []
    k = torch.cat([kv[..., :128], k_rope[:, None].expand(-1, H, -1)], -1)
    starts = zip(cumulative(lengths_q), cumulative(lengths_k), lengths_q, lengths_k)
    for first_q, first_k, s_q, s_k in starts:
        one_q = q[first_q : first_q + s_q].transpose(0, 1)
        one_k, one_v = (x[first_k : first_k + s_k].transpose(0, 1) for x in (k, kv[..., 128:]))
        sees = torch.ones(s_q, s_k, dtype=torch.bool)
        sees = sees.tril(s_k - s_q) if causal else sees
        logits = (one_q @ one_k.mT * SCALE).masked_fill(~sees, -math.inf)
        empty = ~sees.any(-1)
        out = F.scaled_dot_product_attention(one_q, one_k, one_v, attn_mask=sees, scale=SCALE) if s_k else one_q * 0
        outs.append(out[..., :128].masked_fill(empty[:, None], 0).transpose(0, 1))
        lses.append(logits.logsumexp(-1).transpose(0, 1))
        peaks.append(torch.cat([logits, logits.new_full((H, s_q, 1), -math.inf)], -1).amax(-1).transpose(0, 1))
    return MlaOutput(*(torch.cat(x) for x in (outs, lses, peaks)))


def check(got, tensors, lengths_q, lengths_k, causal, spread=1.0):
    exact = attention([x.double() for x in tensors], lengths_q, lengths_k, causal)
    same = attention(tensors, lengths_q, lengths_k, causal)
    check_close(got.out, exact.out, same_precision=same.out, max_cos_diff=5e-6, name="out")
    for name, x, y in (("lse", got.lse, exact.lse), ("max_logits", got.max_logits, exact.max_logits)):
        check_close(x, y, budget=spread * LOGIT_ERROR + 4 * 2.0**-24 * y.abs(), name=name)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def rows(got, first, end):
    return MlaOutput(*(x[first:end] for x in got))


# ---- forward


@pytest.mark.parametrize(
    "causal, dtype, spread, seed",
    [(True, BF16, 1, 0), (False, BF16, 1, 1), (True, FP16, 8, 2), (False, FP16, 8, 3)],
)
def test_equals_attention(causal, dtype, spread, seed):
    torch.manual_seed(seed)
    tensors, cu = make(LENGTHS_Q, LENGTHS_K, dtype, spread)
    got = run(tensors, cu, seed=seed, causal=causal)
    check(got, tensors, LENGTHS_Q, LENGTHS_K, causal, spread)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_must_not_be_read_or_written(seed):
    # Every other sequence, the columns between heads and the tokens behind the last sequence are NaN.
    torch.manual_seed(seed)
    lengths_q, lengths_k = [70, 5, 130, 64], [190, 3, 130, 100]
    tensors, cu = make(lengths_q, lengths_k)
    clean = run(tensors, cu, causal=False)
    poisoned = []
    for x, lengths in zip(tensors, (lengths_q, lengths_k, lengths_k)):
        storage = x.new_full((len(x) + 131, *x.shape[1:-1], x.shape[-1] + 8), math.nan)
        view = storage[..., : x.shape[-1]]
        view[: len(x)] = x
        view[sum(lengths[:1]) : sum(lengths[:2])] = view[sum(lengths[:3]) : sum(lengths)] = math.nan
        poisoned.append(guarded(storage)[..., : x.shape[-1]])
    tokens = len(poisoned[0])
    out = guarded(torch.full((tokens, H, 128), 7.0, dtype=BF16))
    lse, peaks = (guarded(torch.full((tokens, H), 7.0)) for _ in range(2))
    q, kv, k_rope = poisoned
    with k2kernels.emulated("sm_90a", seed=seed):
        module._launch(out, lse, peaks, q, kv, None, k_rope, *map(guarded, cu.values()), SCALE, False)
    got = MlaOutput(out, lse, peaks)
    for first, s_q in ((0, 70), (75, 130)):
        assert same(rows(got, first, first + s_q), rows(clean, first, first + s_q))
    for x, fill in zip(got, (0, -math.inf, -math.inf)):
        assert x[70:75].isnan().all() and x[205:269].isnan().all() and x[269:].eq(fill).all()


def test_bits_depend_on_the_row_and_its_keys_alone(monkeypatch):
    torch.manual_seed(0)
    lengths = [200, 37, 0, 300]
    (q, kv, k_rope), cu = make(lengths, lengths, spread=3)
    whole = run((q, kv, k_rope), cu)
    # Other schedules, other numbers of SMs.
    for seed, multiprocessors in ((1, 1), (2, 3), (3, 2)):
        monkeypatch.setitem(_launch.EMULATED_CHIPS, "sm_90a", Chip(90, multiprocessors, 232448))
        assert same(run((q, kv, k_rope), cu, seed=seed), whole)
    # The last sequence alone: all of it, and its last queries, at other places of a tile.
    begin = sum(lengths[:3])
    for queries in (300, 173, 64, 1):
        alone = {"cu_seqlens_q": cumulative([queries]), "cu_seqlens_k": cumulative([300])}
        got = run((q[-queries:], kv[begin:], k_rope[begin:]), alone)
        assert same(got, rows(whole, len(q) - queries, len(q)))
    # Keys with a rope part of their own; keys and values apart.
    keys = torch.cat([kv[..., :128], k_rope[:, None].expand(-1, H, -1)], -1)
    values = kv[..., 128:].contiguous()
    before = k2kernels.launch_count("mla_prefill")
    with k2kernels.emulated("sm_90a"):
        options = {**cu, "softmax_scale": SCALE, "return_max_logits": True}
        assert same(mla_prefill(q, keys, values, **options), whole)
        assert same(mla_prefill(q, kv[..., :128], values, k_rope=k_rope, **options), whole)
    assert k2kernels.launch_count("mla_prefill") - before == 2


@pytest.mark.parametrize("pieces", [[128, 172], [256, 44], [128, 128, 44]], ids=str)
def test_keys_in_pieces_have_the_bits_of_one_call(pieces):
    # Two sequences, the second with a context of 100 keys before its queries; its keys end with the first piece.
    torch.manual_seed(0)
    lengths_q, lengths_k = [300, 28], [300, 128]
    (q, kv, k_rope), cu = make(lengths_q, lengths_k, spread=3)
    whole = run((q, kv, k_rope), cu)
    state, begin = None, 0
    for i, size in enumerate(pieces):
        second = [300 + begin, 300 + min(begin + size, 128)] if begin < 128 else [300, 300]
        chosen = torch.cat([torch.arange(begin, begin + size), torch.arange(*second)])
        state = one_piece(
            state, q, kv[chosen], k_rope[chosen], [300, 28], [size, second[1] - second[0]],
            [-begin, 100 - begin], i == len(pieces) - 1, seed=i,
        )  # fmt: skip
        begin += size
    assert same(state, whole)


def one_piece(state, q, kv, k_rope, lengths_q, lengths_k, diagonal, last, seed):
    cu = {"cu_seqlens_q": cumulative(lengths_q), "cu_seqlens_k": cumulative(lengths_k)}
    before = k2kernels.launch_count("mla_prefill_piece")
    with k2kernels.emulated("sm_90a", seed=seed):
        got = mla_prefill_piece(
            state, q, kv, None, k_rope=k_rope, **cu, diagonal=torch.tensor(diagonal, dtype=torch.int32),
            softmax_scale=SCALE, last=last, return_max_logits=True,
        )  # fmt: skip
    assert k2kernels.launch_count("mla_prefill_piece") - before == 1
    return got
