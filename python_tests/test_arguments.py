"""Every argument of every public op, one at a time, given something absurd: always a message that names it."""

import pytest
import torch

import k2kernels as k


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


X = torch.randn(6, 256)
A, A_SCALES = k.quantize_1x128(X)
B, B_SCALES = k.quantize_128x128(torch.randn(2, 200, 256))
TOKENS, TOKEN_SCALES = k.quantize_1x128(torch.randn(5, 256))
CACHE, TABLE = torch.zeros(4, 16, 576), ints(0, 1, 2, 3).view(2, 2)
LOGITS = torch.randn(6, 8)
ROUTING = k.moe_route(LOGITS, top_k=2)
DISPATCHED = k.moe_dispatch(X, ROUTING.indices, ROUTING.weights, num_experts=8)
ROWS = dict(offsets=ints(0, 3, 6), counts=ints(3, 2))
CODES, SCALES = k.quantize_int4_group32(torch.randn(2, 40, 256) / 8)
W4, GATED = k.pack_w4(CODES[0], SCALES[0]), k.pack_w4(CODES, SCALES, gated=True)

# op -> the arguments of a good call, optional ones included
CALLS = {
    "mla_decode": dict(
        q=torch.randn(2, 1, 3, 576), kv_cache=CACHE, block_table=TABLE, seq_lens=ints(5, 20), softmax_scale=0.1,
        causal=True, head_dim_v=512, split=16, out=torch.empty(2, 1, 3, 512), return_max_logits=False,
    ),
    "linear_log_probs": dict(
        hidden=X, weight=torch.randn(9, 256), targets=ints(0, 1, 2, 3, 4, 8), temperature=1.0, entropy=False
    ),
    "mla_append": dict(
        kv=torch.randn(2, 576), kv_cache=CACHE.clone(), block_table=TABLE, positions=ints(3, 4), power_of_two=False
    ),
    "mla_gather": dict(kv_cache=CACHE, block_table=TABLE, positions=ints(3, 4), dtype=torch.float32),
    "mla_prefill": dict(
        q=torch.randn(5, 2, 24), k=torch.randn(6, 2, 24), v=torch.randn(6, 2, 16), cu_seqlens_q=ints(0, 2, 5),
        cu_seqlens_k=ints(0, 2, 6), softmax_scale=0.1, causal=True, return_max_logits=True,
    ),
    "merge_attention_states": dict(
        out_a=torch.randn(2, 3), lse_a=torch.randn(2), out_b=torch.randn(2, 3), lse_b=torch.randn(2)
    ),
    "quantize_1x128": dict(x=X, power_of_two=False, scale_layout="row", transpose=False, **ROWS),
    "quantize_128x128": dict(w=X, power_of_two=False),
    "rms_norm_quantize": dict(x=X, weight=torch.randn(256), eps=1e-6, power_of_two=False, scale_layout="row"),
    "dequantize": dict(data=A, scales=A_SCALES, block=(1, 128), dtype=torch.float32),
    "swiglu": dict(gate_up=X),
    "swiglu_quantize": dict(gate_up=X, weights=torch.rand(6), power_of_two=False, scale_layout="row", **ROWS),
    "fp8_gemm": dict(
        a=A, a_scales=A_SCALES, b=B[0], b_scales=B_SCALES[0], out_dtype=torch.float32, bias=torch.randn(200),
        accumulate=torch.randn(6, 200), b_row_offset=3, batch_invariant=True, row_weights=torch.randn(6),
        out=torch.empty(6, 200),
    ),
    "grouped_fp8_gemm": dict(
        a=A, a_scales=A_SCALES, b=B, b_scales=B_SCALES, expected_m=3, b_row_offset=3, batch_invariant=False,
        row_weights=torch.randn(6), out_dtype=torch.float32, out=torch.empty(6, 200), **ROWS,
    ),
    "fp8_gemm_swiglu": dict(
        a=A, a_scales=A_SCALES, b=B[0], b_scales=B_SCALES[0], weights=torch.rand(6), power_of_two=True,
        scale_layout="row",
    ),
    "grouped_fp8_gemm_swiglu": dict(
        a=A, a_scales=A_SCALES, b=B, b_scales=B_SCALES, expected_m=3, weights=torch.rand(6), power_of_two=False,
        scale_layout="column", **ROWS,
    ),
    "grouped_fp8_wgrad": dict(
        a=TOKENS, a_scales=TOKEN_SCALES, b=TOKENS, b_scales=TOKEN_SCALES, offsets=ints(0, 128, 256),
        counts=ints(100, 128), out_dtype=torch.float32, accumulate=torch.zeros(2, 5, 5),
    ),
    "quantize_int4_group32": dict(w=X, q_min=-8),
    "quantize_mxfp4": dict(w=X, scale_rule="floor"),
    "dequantize_w4": dict(codes=CODES, scales=SCALES, dtype=torch.float32),
    "pack_w4": dict(codes=CODES, scales=SCALES, gated=True, out=GATED.data.clone()),
    "unpack_w4": dict(w4=GATED),
    "grouped_w4_gemm": dict(
        a=X.bfloat16(), w4=GATED, swiglu=True, batch_invariant=False, expected=3,
        out=torch.empty(6, 20, dtype=torch.bfloat16), **ROWS,
    ),
    "w4_gemm": dict(
        a=X.bfloat16(), w4=W4, swiglu=False, batch_invariant=True, out=torch.empty(6, 40, dtype=torch.bfloat16)
    ),
    "moe_route": dict(
        logits=LOGITS, bias=torch.zeros(8), top_k=2, n_group=2, topk_group=1, score="sigmoid", normalize=True, scale=1.0
    ),
    "moe_sequence_loss": dict(
        logits=LOGITS, indices=ROUTING.indices, top_k=2, alpha=0.1, cu_seqlens=ints(0, 2, 6), score="sigmoid"
    ),
    "moe_update_bias": dict(bias=torch.zeros(8), counts=ROUTING.counts, rate=0.1, mode="sign"),
    "moe_dispatch": dict(
        x=X, indices=ROUTING.indices, weights=ROUTING.weights, num_experts=8, alignment=4, quantize=True,
        power_of_two=False, scale_layout="row", capacity=64,
    ),
    "moe_combine": dict(y=DISPATCHED.data, handle=DISPATCHED.handle, shared=X, residual=X, out_dtype=torch.float32),
    "newton_schulz": dict(x=X, steps=5, schedule="quintic", algorithm="auto", iterate_dtype=torch.float32),
}  # fmt: skip
WRITTEN = [("mla_append", "kv_cache"), ("mla_decode", "out"), ("fp8_gemm", "out"), ("grouped_fp8_gemm", "out")]
WRITTEN += [("grouped_w4_gemm", "out"), ("w4_gemm", "out"), ("pack_w4", "out")]
BIG, FRACTION = 10**30, 1.5
ABSURD = ("7", float("nan"), BIG, FRACTION, object(), [], torch.int64, X.to_sparse(), X.to(torch.complex64))
OPTIONS = [(op, name) for op, arguments in CALLS.items() for name in arguments]


@pytest.mark.parametrize("op, name", OPTIONS, ids=map("-".join, OPTIONS))
def test_an_absurd_argument_is_named(op, name):
    function, arguments = getattr(k, op), CALLS[op]
    function(**arguments)  # good as it is
    for absurd in ABSURD:
        if isinstance(arguments[name], float) and (absurd is BIG or absurd is FRACTION):
            continue  # good here
        with pytest.raises((TypeError, ValueError), match=rf"^{op}: {name}\b.* must be .*got "):
            function(**{**arguments, name: absurd})


@pytest.mark.parametrize("op, name", WRITTEN, ids=map("-".join, WRITTEN))
def test_what_is_written_has_memory_for_each_element(op, name):
    arguments = CALLS[op]
    one = arguments[name][:1].clone()
    with pytest.raises(ValueError, match=rf"^{op}: {name} must be a tensor with memory .* call .contiguous"):
        getattr(k, op)(**{**arguments, name: one.expand(arguments[name].shape)})


@pytest.mark.parametrize("op", ["fp8_gemm", "grouped_fp8_gemm"])
def test_writing_into_out_refuses_scales_that_want_a_gradient(op):
    """Else `out` would silently join the scales' graph and be refused by every later call."""
    for name in ("a_scales", "b_scales", "row_weights"):
        scales = CALLS[op][name].clone().requires_grad_()
        with pytest.raises(ValueError, match=rf"^{op}: {name} must be a tensor that needs no gradient"):
            getattr(k, op)(**{**CALLS[op], name: scales})
    assert not CALLS[op]["out"].requires_grad
