import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from k2kernels.ops import mla_prefill as module
from k2kernels.ops.mla_prefill import mla_prefill
from k2kernels.testing.compare import check_close, check_op


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def naive(q, k, v, lengths_q, lengths_k, scale, causal):
    """One sequence, one head, one query at a time."""
    outs, lses, peaks = [], [], []
    start_q = start_k = 0
    for s_q, s_k in zip(lengths_q, lengths_k):
        for i in range(s_q):
            seen = min(max(s_k - s_q + i + 1, 0), s_k) if causal else s_k
            keys, values = k[start_k : start_k + seen], v[start_k : start_k + seen]
            logits = torch.einsum("hd,khd->hk", q[start_q + i], keys) * scale
            if seen == 0:
                outs.append(v.new_zeros(v.shape[1:]) + 0 * q[start_q + i, :, :1])
                lses.append(torch.full_like(logits.sum(-1), -math.inf))
                peaks.append(torch.full_like(logits.sum(-1), -math.inf))
            else:
                outs.append(torch.einsum("hk,khd->hd", torch.softmax(logits, -1), values))
                lses.append(torch.logsumexp(logits, -1))
                peaks.append(logits.max(-1).values)
        start_q, start_k = start_q + s_q, start_k + s_k
    if not outs:
        return q[..., :1].expand(-1, -1, v.shape[-1]), q[..., 0], q[..., 0]
    return torch.stack(outs), torch.stack(lses), torch.stack(peaks)


def inputs(lengths_q, lengths_k, heads, dim, value_dim, dtype=torch.float64):
    q = torch.randn(sum(lengths_q), heads, dim, dtype=dtype)
    k = torch.randn(sum(lengths_k), heads, dim, dtype=dtype)
    v = torch.randn(sum(lengths_k), heads, value_dim, dtype=dtype)
    return q, k, v


LENGTHS = [
    ([5], [5]),
    ([4, 4, 4], [4, 4, 4]),  # equal: no padding
    ([3, 3], [7, 7]),  # a chunk after a context
    ([5, 5], [3, 3]),  # more queries than keys: rows that see nothing
    ([1, 7, 3], [1, 7, 3]),
    ([2, 0, 5, 1], [9, 4, 0, 1]),
    ([3, 2], [0, 0]),
    ([0, 0], [3, 2]),
    ([], []),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths_q, lengths_k", LENGTHS, ids=str)
def test_equals_naive_in_float64_with_gradients(lengths_q, lengths_k, causal):
    q, k, v = inputs(lengths_q, lengths_k, 3, 6, 4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = mla_prefill(
        q, k, v,
        cu_seqlens_q=cumulative(lengths_q), cu_seqlens_k=cumulative(lengths_k),
        softmax_scale=0.3, causal=causal, return_max_logits=True,
    )  # fmt: skip
    out, lse, peak = naive(q, k, v, lengths_q, lengths_k, 0.3, causal)
    check_close(got.out, out, budget=1e-14, name="out")
    check_close(got.lse, lse, budget=1e-13, name="lse")
    check_close(got.max_logits, peak, budget=1e-14, name="max_logits")
    assert not got.max_logits.requires_grad

    # A row that sees nothing has no gradient, whatever arrives for its lse (of logaddexp(-inf, -inf), for one: NaN).
    weights, row_weights, finite = torch.randn_like(out), torch.randn_like(lse), lse.isfinite()
    want = torch.autograd.grad((out * weights).sum() + (lse * row_weights)[finite].sum(), leaves, allow_unused=True)
    grads = torch.autograd.grad([got.out, got.lse], leaves, [weights, torch.where(finite, row_weights, math.nan)])
    for name, grad, exact, leaf in zip("qkv", grads, want, leaves):
        check_close(grad, torch.zeros_like(leaf) if exact is None else exact, budget=1e-13, name=f"grad_{name}")


@pytest.mark.parametrize("causal", [True, False])
def test_tokens_that_no_sequence_owns(causal):
    lengths_q, lengths_k = [2, 0, 3], [4, 1, 3]
    q, k, v = inputs(lengths_q, lengths_k, 3, 6, 4)
    padded = [torch.cat([x, torch.full_like(x[:2], math.nan)]).requires_grad_() for x in (q, k, v)]
    cu = dict(cu_seqlens_q=cumulative(lengths_q), cu_seqlens_k=cumulative(lengths_k))
    options = dict(**cu, softmax_scale=0.3, causal=causal, return_max_logits=True)
    got = mla_prefill(*padded, **options)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want = mla_prefill(*leaves, **options)
    for x, y, fill in zip(got, want, (0, -math.inf, -math.inf)):
        assert torch.equal(x[:-2], y) and (x[-2:] == fill).all()
    weights = torch.randn_like(got.out)
    grads = torch.autograd.grad(got.out, padded, weights)
    for x, y in zip(grads, torch.autograd.grad(want.out, leaves, weights[:-2])):
        assert torch.equal(x[:-2], y) and (x[-2:] == 0).all()


@pytest.mark.parametrize("lengths", [[4, 4], [2, 5]], ids=str)
def test_gradcheck(lengths):
    q, k, v = (x.requires_grad_() for x in inputs(lengths, lengths, 2, 4, 3))
    cu = cumulative(lengths)

    def call(q, k, v):
        return mla_prefill(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=0.5)[:2]

    assert torch.autograd.gradcheck(call, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[40, 40], [33, 70]], ids=str)
def test_error_is_that_of_torch_attention_in_the_same_precision(lengths, dtype):
    q, k, v = inputs(lengths, lengths, 4, 192, 128, dtype)
    cu, scale = cumulative(lengths), 192**-0.5

    def attention(q, k, v):
        parts = [x.split(lengths) for x in (q, k, v)]
        return torch.cat(
            [
                F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in sequence), is_causal=True, scale=scale)
                for sequence in zip(*parts)
            ],
            dim=1,
        ).transpose(0, 1)

    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = mla_prefill(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=scale)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact, same = attention(*exact_leaves), attention(*leaves)
    check_close(got.out, exact, same_precision=same, max_cos_diff=5e-6, name="out")
    assert got.out.dtype == dtype and got.lse.dtype == torch.float32
    grad = torch.randn_like(got.out)
    grads = torch.autograd.grad(got.out, leaves, grad)
    exact_grads = torch.autograd.grad(exact, exact_leaves, grad.double())
    same_grads = torch.autograd.grad(same, leaves, grad)
    for name, *three in zip("qkv", grads, exact_grads, same_grads):
        check_close(three[0], three[1], same_precision=three[2], max_cos_diff=1e-5, name=f"grad_{name}")


def test_large_logits_stay_finite_and_exact():
    lengths = [17, 17]
    q, k, v = inputs(lengths, lengths, 2, 32, 8, torch.float32)
    q = q * 2000  # logits about 1e4: exp() of them overflows unless the maximum is taken off first
    cu = cumulative(lengths)
    got = mla_prefill(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=1.0, return_max_logits=True)
    out, lse, peak = naive(q.double(), k.double(), v.double(), lengths, lengths, 1.0, True)
    assert peak.max() > 1e4
    check_close(got.lse, lse, budget=lse.abs() * 1e-6, name="lse")
    check_close(got.max_logits, peak, budget=peak.abs() * 1e-6, name="max_logits")
    check_close(got.out, out, budget=2e-2, max_cos_diff=1e-5, name="out")


def test_padding_of_one_sequence_never_sees_another():
    lengths = [3, 6]
    q, k, v = inputs(lengths, lengths, 2, 4, 4)
    cu = cumulative(lengths)
    for x in (q, k, v):
        x[3:] = math.nan
    got = mla_prefill(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=1.0, return_max_logits=True)
    for x in got:
        assert x[:3].isfinite().all() and x[3:].isnan().all()


def test_strided_and_foreign_inputs():
    q, k, v = inputs([4, 4], [4, 4], 3, 6, 4, torch.float32)
    cu = cumulative([4, 4])
    want = mla_prefill(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=1.0)
    kv = torch.cat([k, v], dim=-1)  # as the expansion of the latent leaves them
    got = mla_prefill(q.transpose(0, 1).contiguous().transpose(0, 1), kv[..., :6], kv[..., 6:],
                      cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=1.0)  # fmt: skip
    torch.testing.assert_close(got.out, want.out, rtol=0, atol=0)
    got = mla_prefill(q.numpy(), k.numpy(), v.numpy(), cu_seqlens_q=cu.numpy(), cu_seqlens_k=cu.numpy(),
                      softmax_scale=np.float32(1.0))  # fmt: skip
    torch.testing.assert_close(got.out, want.out, rtol=0, atol=0)
    assert got.max_logits is None


@pytest.mark.parametrize("return_max_logits", [True, False])
@pytest.mark.parametrize("lengths", [[4, 4], [3, 5]], ids=str)
def test_registration(lengths, return_max_logits):
    q, k, v = (x.requires_grad_() for x in inputs(lengths, lengths, 2, 6, 4, torch.float32))
    cu = cumulative(lengths)
    check_op(
        module._mla_prefill,
        (q, k, v, cu, cu, 0.5, True, return_max_logits),
        differentiable=True,
        compiled=lambda: mla_prefill(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=0.5, return_max_logits=return_max_logits
        ),
    )


def test_compiled_gradients_equal_eager_ones():
    q, k, v = (x.requires_grad_() for x in inputs([4, 4], [4, 4], 2, 6, 4, torch.float32))
    cu = cumulative([4, 4])

    def loss(q, k, v):
        return mla_prefill(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=0.5).out.square().sum()

    want = torch.autograd.grad(loss(q, k, v), (q, k, v))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(q, k, v), (q, k, v))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_meta_tensors():
    q, k, v = (x.to("meta") for x in inputs([8], [8], 2, 6, 4, torch.bfloat16))
    cu = torch.empty(2, dtype=torch.int32, device="meta")
    got = mla_prefill(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=1.0, return_max_logits=True)
    assert got.out.shape == (8, 2, 4) and got.out.dtype == torch.bfloat16
    assert got.lse.shape == got.max_logits.shape == (8, 2) and got.lse.dtype == torch.float32


CU = torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (dict(k=torch.zeros(4, 2, 5)), ValueError, r"k must be \[Tk=4, H=2, Dqk=6\] float32, got \[4, 2, 5\] float32"),
        (dict(v=torch.zeros(3, 2, 4)), ValueError, r"v must be \[Tk=4, H=2, Dv\] float32, got \[3, 2, 4\]"),
        (dict(q=torch.zeros(4, 2, 6, dtype=torch.int8)), TypeError, r"q must be .* got \[4, 2, 6\] int8"),
        (dict(k=torch.zeros(4, 2, 6).half()), TypeError, r"k must be .* float32, got \[4, 2, 6\] float16"),
        (dict(cu_seqlens_q=CU.long()), TypeError, r"cu_seqlens_q must be \[B\+1\] int32, got \[2\] int64"),
        (dict(cu_seqlens_k=CU[:1]), ValueError, r"cu_seqlens_k must be \[B\+1=2\] int32, got \[1\]"),
        (
            dict(cu_seqlens_q=CU[:0], cu_seqlens_k=CU[:0]),
            ValueError,
            r"cu_seqlens_q must be of length B \+ 1, got \[0\]",
        ),
        (dict(cu_seqlens_k=CU + 1), ValueError, r"cu_seqlens_k must rise from 0 to at most 4 .*, got \[1, 5\]"),
        (dict(cu_seqlens_q=-CU), ValueError, r"cu_seqlens_q must rise from 0 to at most 4 .*, got \[0, -4\]"),
        (
            dict(cu_seqlens_q=torch.tensor([0, 5, 4], dtype=torch.int32), cu_seqlens_k=CU[[0, 1, 1]]),
            ValueError,
            r"cu_seqlens_q must rise from 0 to at most 4 .*, got \[0, 5, 4\]",
        ),
        (dict(softmax_scale=math.nan), ValueError, r"softmax_scale must be positive and finite, got nan"),
        (dict(softmax_scale=torch.tensor(1.0)), TypeError, r"softmax_scale must be a number, got Tensor"),
        (dict(q=[[1.0]]), TypeError, r"q must be a tensor .*, got list"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments(changed, error, message):
    good = dict(
        q=torch.zeros(4, 2, 6), k=torch.zeros(4, 2, 6), v=torch.zeros(4, 2, 4), cu_seqlens_q=CU, cu_seqlens_k=CU,
        softmax_scale=1.0,
    )  # fmt: skip
    arguments = {**good, **changed}
    with pytest.raises(error, match="mla_prefill: " + message):
        mla_prefill(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
