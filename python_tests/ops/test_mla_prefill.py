import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from k2kernels.ops import mla_prefill as module
from k2kernels.ops.mla_prefill import mla_prefill, mla_prefill_piece
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


# How keys and values are given, for 6 dims of a key (2 of them rope) and 4 of a value.
FORMS = {
    "whole keys": lambda k, v: dict(k=k, v=v),
    "k_rope": lambda k, v: dict(k=k[..., :4], v=v, k_rope=k[:, 0, 4:]),
    "k_rope, k and v side by side": lambda k, v: dict(k=torch.cat([k[..., :4], v], -1), v=None, k_rope=k[:, 0, 4:]),
}


def whole(k, v, k_rope=None):
    """Keys [Tk, H, D] and values of any form."""
    if v is None:
        k, v = k.split([4, k.shape[-1] - 4], dim=-1)
    return k if k_rope is None else torch.cat([k, k_rope[:, None].expand(-1, k.shape[1], -1)], dim=-1), v


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths_q, lengths_k", LENGTHS, ids=str)
def test_equals_naive_in_float64_with_gradients(lengths_q, lengths_k, causal, form):
    q, k, v = inputs(lengths_q, lengths_k, 3, 6, 4)
    keys = FORMS[form](k, v)
    leaves = [x.requires_grad_() for x in (q, *keys.values()) if x is not None]
    got = mla_prefill(
        q, **keys,
        cu_seqlens_q=cumulative(lengths_q), cu_seqlens_k=cumulative(lengths_k),
        softmax_scale=0.3, causal=causal, return_max_logits=True,
    )  # fmt: skip
    out, lse, peak = naive(q, *whole(**keys), lengths_q, lengths_k, 0.3, causal)
    check_close(got.out, out, budget=1e-14, name="out")
    check_close(got.lse, lse, budget=1e-13, name="lse")
    check_close(got.max_logits, peak, budget=1e-14, name="max_logits")
    assert not got.max_logits.requires_grad

    # A row that sees nothing has no gradient, whatever arrives for its lse (of logaddexp(-inf, -inf), for one: NaN).
    weights, row_weights, finite = torch.randn_like(out), torch.randn_like(lse), lse.isfinite()
    want = torch.autograd.grad((out * weights).sum() + (lse * row_weights)[finite].sum(), leaves, allow_unused=True)
    grads = torch.autograd.grad([got.out, got.lse], leaves, [weights, torch.where(finite, row_weights, math.nan)])
    for grad, exact, leaf in zip(grads, want, leaves):
        check_close(grad, torch.zeros_like(leaf) if exact is None else exact, budget=1e-13, name=str(grad.shape))


def test_gradients_of_views_of_one_tensor_are_views_of_one():
    q, k, v = inputs([5, 3], [5, 3], 2, 6, 4)
    k_rope, cu = k[:, 0, 4:].contiguous(), cumulative([5, 3])
    options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=0.3)
    kv = torch.cat([k[..., :4], v], dim=-1)
    views = [x.requires_grad_() for x in (kv[..., :4].detach(), kv[..., 4:].detach())]
    out = mla_prefill(q, *views, k_rope=k_rope, **options).out
    grad_k, grad_v = torch.autograd.grad(out.square().sum(), views)
    assert grad_k.untyped_storage().data_ptr() == grad_v.untyped_storage().data_ptr()
    assert grad_k.stride() == grad_v.stride() == (16, 8, 1) and grad_v.storage_offset() == 4
    apart = [x.clone().contiguous().detach().requires_grad_() for x in views]
    want = torch.autograd.grad(mla_prefill(q, *apart, k_rope=k_rope, **options).out.square().sum(), apart)
    assert torch.equal(grad_k, want[0]) and torch.equal(grad_v, want[1])


def test_gradients_through_the_merge_of_two_halves():
    """Each half's lse weighs its output, so that the gradient of lse matters."""
    lengths = [7]
    q, k, v = (x.requires_grad_() for x in inputs(lengths, lengths, 2, 6, 4))
    cu, options = cumulative(lengths), dict(softmax_scale=0.3, causal=False)
    whole = mla_prefill(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, **options)
    halves = [
        mla_prefill(q, k[rows], v[rows], cu_seqlens_q=cu, cu_seqlens_k=cumulative([n]), **options)
        for rows, n in ((slice(0, 3), 3), (slice(3, 7), 4))
    ]
    lse = torch.logaddexp(halves[0].lse, halves[1].lse)
    merged = sum(half.out * (half.lse - lse).exp()[..., None] for half in halves)
    check_close(merged, whole.out, budget=1e-13, name="out")
    grads = torch.randn_like(merged), torch.randn_like(lse)
    want = torch.autograd.grad([whole.out, whole.lse], (q, k, v), grads)
    for name, got, exact in zip("qkv", torch.autograd.grad([merged, lse], (q, k, v), grads), want):
        check_close(got, exact, budget=1e-13, name=f"grad_{name}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", [[4], [1, 3, 8], []], ids=str)
def test_pieces_of_the_keys_give_the_result_of_all(cuts, form):
    lengths_q, lengths_k = [2, 9, 3, 0], [9, 9, 0, 5]  # a chunk behind a context; a prompt; rows without keys
    q, k, v = inputs(lengths_q, lengths_k, 3, 6, 4)
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    options = dict(softmax_scale=0.3, return_max_logits=True)
    want = mla_prefill(q, k[..., :], v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    if form != "whole keys":
        k[..., 4:] = k[:, :1, 4:]
        want = mla_prefill(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    state, first = None, 0
    for end in [*cuts, max(lengths_k)]:
        rows = [range(begin + min(first, n), begin + min(end, n)) for begin, n in zip(cu_k.tolist(), lengths_k)]
        index = torch.tensor([i for some in rows for i in some], dtype=torch.int64)
        positions = torch.tensor([n_k - n_q for n_q, n_k in zip(lengths_q, lengths_k)])
        state = mla_prefill_piece(
            state, q, **FORMS[form](k[index], v[index]), cu_seqlens_q=cu_q,
            cu_seqlens_k=cumulative([len(some) for some in rows]), diagonal=(positions - first).int(),
            last=end == max(lengths_k), **options,
        )  # fmt: skip
        first = end
    for got, exact in zip(state, want):
        check_close(got, exact, budget=1e-13, name=str(got.shape))


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("return_max_logits", [True, False])
@pytest.mark.parametrize("lengths", [[4, 4], [3, 5]], ids=str)
def test_registration(lengths, return_max_logits, form):
    q, k, v = inputs(lengths, lengths, 2, 6, 4, torch.float32)
    keys = {name: None if x is None else x.requires_grad_() for name, x in FORMS[form](k, v).items()}
    cu = cumulative(lengths)
    check_op(
        module._mla_prefill,
        (q.requires_grad_(), keys["k"], keys["v"], keys.get("k_rope"), cu, cu, 0.5, True, return_max_logits),
        differentiable=True,
        compiled=lambda: mla_prefill(
            q, **keys, cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=0.5, return_max_logits=return_max_logits
        ),
    )


@pytest.mark.parametrize("first, last", [(True, False), (False, False), (False, True), (True, True)])
def test_registration_of_pieces(first, last):
    q, k, v = inputs([4, 4], [4, 4], 2, 6, 4, torch.float32)
    cu, diagonal = cumulative([4, 4]), torch.tensor([2, 0], dtype=torch.int32)
    options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, diagonal=diagonal, softmax_scale=0.5)
    state = mla_prefill_piece(None, q, k, v, **options, last=False)
    arguments = (state, q, k, v, None, cu, cu, diagonal, 0.5, first, last, True)
    check_op(module._mla_prefill_piece, arguments, differentiable=False)


def test_compiled_gradients_equal_eager_ones():
    q, k, v = inputs([4, 4], [4, 4], 2, 6, 4, torch.float32)
    k_rope, kv = k[:, 0, 4:].clone().requires_grad_(), torch.cat([k[..., :4], v], dim=-1).requires_grad_()
    leaves = [x.requires_grad_() for x in (q, k, v, k_rope, kv)]
    cu = cumulative([4, 4])

    def loss(q, k, v, k_rope, kv):
        options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=0.5)
        views = kv.split([4, 4], dim=-1)
        parts = (
            mla_prefill(q, k, v, **options),
            mla_prefill(q, *views, k_rope=k_rope, **options),
            mla_prefill(q, kv, None, k_rope=k_rope, **options),
        )
        return sum(part.out.square().sum() for part in parts)

    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_gradients_of_views_can_be_traced(tracing):
    q, k, v = inputs([4, 4], [4, 4], 2, 6, 4, torch.float32)
    kv, cu = torch.cat([k[..., :4], v], dim=-1), cumulative([4, 4])

    def gradients(q, kv, k_rope, cu):
        leaves = [x.detach().requires_grad_() for x in (q, kv, k_rope)]
        views = leaves[1].split([4, 4], dim=-1)
        options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=0.5)
        return torch.autograd.grad(mla_prefill(leaves[0], *views, k_rope=leaves[2], **options).out.sum(), leaves)

    arguments = q, kv, k[:, 0, 4:].clone(), cu
    traced = torch.fx.experimental.proxy_tensor.make_fx(gradients, tracing_mode=tracing)(*arguments)
    torch.testing.assert_close(traced(*arguments), gradients(*arguments), rtol=0, atol=0)


def test_states_of_pieces_are_refused_where_they_are_no_result_of_a_piece():
    q, k, v = inputs([4], [4], 2, 6, 4, torch.float32)
    cu = cumulative([4])
    options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, diagonal=cu[:1], softmax_scale=0.5, last=True)
    state = mla_prefill_piece(None, q, k, v, **{**options, "last": False})
    for bad in (
        state.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([state.new_zeros(1), state.flatten()])[1:],
    ):
        with pytest.raises(ValueError, match="state must be the tensor that the call before returned"):
            mla_prefill_piece(bad.view(state.shape) if bad.dim() == 1 else bad, q, k, v, **options)
    with pytest.raises(ValueError, match="state must be a tensor that needs no gradient"):
        mla_prefill_piece(state.requires_grad_(), q, k, v, **options)


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
        (
            dict(k_rope=torch.zeros(4, 2)),
            ValueError,
            r"k must be \[Tk=4, H=2, 4\] float32, got \[4, 2, 6\] float32; k_rope holds the rest of q's dims",
        ),
        (dict(k_rope=torch.zeros(3, 2), k=torch.zeros(4, 2, 4)), ValueError, r"k must be \[Tk=3, H=2, 4\]"),
        (dict(k_rope=torch.zeros(4, 7)), ValueError, r"k_rope must be \[Tk, R\] with R at most q's 6, got \[4, 7\]"),
        (dict(v=None), ValueError, r"v must be a tensor where k_rope is None, got None"),
        (
            dict(v=None, k_rope=torch.zeros(4, 2), k=torch.zeros(4, 2, 4)),
            ValueError,
            r"k must be \[Tk, H, more than 4\] without v, which it holds, got \[4, 2, 4\]",
        ),
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
