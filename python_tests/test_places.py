"""Tensors that do not begin where memory of their own would: contiguous, but 1, 2 or 4 elements into another tensor."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import k2kernels as k
from k2kernels._backend import ARCHS
from k2kernels.ops._launch import rows_on_16_bytes

BF16 = torch.bfloat16


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def moved(x, places: int):
    """A contiguous tensor of the same contents that begins `places` elements behind an address of new memory."""
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(moved(part, places) for part in x))
    if isinstance(x, list):
        return [moved(part, places) for part in x]
    if not isinstance(x, Tensor):
        return x
    room = torch.zeros(x.numel() + places, dtype=x.dtype)
    view = room[places:].view(x.shape)
    view.view(-1).view(torch.uint8).copy_(x.reshape(-1).view(torch.uint8))
    assert view.is_contiguous() and view.data_ptr() == room.data_ptr() + places * x.itemsize
    return view


def calls() -> dict[str, Callable]:
    """Public op -> its arguments; the cache of a decode is not moved, as kernels refuse it (a test of its own)."""
    x, gate_up = torch.randn(6, 256, dtype=BF16), torch.randn(6, 256, dtype=BF16)
    a, a_scales = k.quantize_1x128(x)
    b, b_scales = k.quantize_128x128(torch.randn(2, 256, 256))
    tokens, token_scales = k.quantize_1x128(torch.randn(16, 256))
    rows = dict(offsets=ints(0, 3, 6), counts=ints(3, 2))
    table = ints(0, 1, 2, 3).view(2, 2)
    cache, quantised = torch.randn(4, 16, 576).to(BF16), torch.zeros(4, 16, 656, dtype=torch.uint8)
    k.mla_append(torch.randn(32, 576).to(BF16), quantised, table[:1], torch.arange(32, dtype=torch.int32))
    k.mla_append(torch.randn(32, 576).to(BF16), quantised, table[1:], torch.arange(32, dtype=torch.int32))
    decode = dict(q=torch.randn(2, 1, 16, 576).to(BF16), block_table=table, seq_lens=ints(5, 20), softmax_scale=0.1)
    prefill = dict(
        q=torch.randn(5, 2, 192).to(BF16), k=torch.randn(6, 2, 128).to(BF16), v=torch.randn(6, 2, 128).to(BF16),
        k_rope=torch.randn(6, 64).to(BF16), cu_seqlens_q=ints(0, 2, 5), cu_seqlens_k=ints(0, 2, 6), softmax_scale=0.1,
    )  # fmt: skip
    logits = torch.randn(6, 8)
    routing = k.moe_route(logits, top_k=2)
    sent = k.moe_dispatch(x, routing.indices, routing.weights, num_experts=8)
    dense = dict(a=a, a_scales=a_scales, b=b[0], b_scales=b_scales[0])
    groups = dict(a=a, a_scales=a_scales, b=b, b_scales=b_scales, expected_m=3, **rows)
    int4, mxfp4 = k.quantize_int4_group32(torch.randn(2, 80, 256) / 8), k.quantize_mxfp4(torch.randn(48, 256))
    return {
        "mla_decode": dict(decode, kv_cache=cache, out=torch.empty(2, 1, 16, 512, dtype=BF16)),
        "mla_decode of 656 bytes": dict(decode, kv_cache=quantised),
        "mla_append": dict(
            kv=torch.randn(2, 576).to(BF16), kv_cache=cache.clone(), block_table=table, positions=ints(3, 4)
        ),
        "mla_gather": dict(kv_cache=cache, block_table=table, positions=ints(3, 4), dtype=BF16),
        "mla_prefill": prefill,
        "mla_prefill_piece": dict(prefill, diagonal=ints(0, 1), state=None, last=True),
        "merge_attention_states": dict(
            out_a=torch.randn(2, 64).to(BF16), lse_a=torch.randn(2), out_b=torch.randn(2, 64).to(BF16),
            lse_b=torch.randn(2),
        ),
        "quantize_1x128": dict(x=x, **rows),
        "quantize_128x128": dict(w=x),
        "rms_norm_quantize": dict(x=x, weight=torch.randn(256).to(BF16), eps=1e-6),
        "dequantize": dict(data=a, scales=a_scales, block=(1, 128)),
        "swiglu": dict(gate_up=gate_up),
        "swiglu_quantize": dict(gate_up=gate_up, weights=torch.rand(6), **rows),
        "fp8_gemm": dict(
            dense, bias=torch.randn(256), accumulate=torch.randn(6, 256), out_dtype=torch.float32,
            row_weights=torch.randn(6), out=torch.empty(6, 256),
        ),
        "grouped_fp8_gemm": dict(groups, row_weights=torch.randn(6), out=torch.zeros(6, 256, dtype=BF16)),
        "fp8_gemm_swiglu": dict(dense, weights=torch.rand(6)),
        "grouped_fp8_gemm_swiglu": dict(groups, weights=torch.rand(6)),
        "grouped_fp8_wgrad": dict(
            a=tokens, a_scales=token_scales, b=tokens, b_scales=token_scales, offsets=ints(0, 128, 256),
            counts=ints(100, 128), accumulate=torch.zeros(2, 16, 16),
        ),
        "grouped_w4_gemm": dict(
            a=x, w4=k.pack_w4(*int4, gated=True), swiglu=True, out=torch.zeros(6, 40, dtype=BF16), **rows
        ),
        "w4_gemm": dict(a=x, w4=k.pack_w4(*mxfp4)),
        "moe_mlp": dict(
            x=x, routing=routing, gate_up=torch.randn(8, 128, 256).to(BF16),
            down=torch.randn(8, 256, 64).to(BF16),
        ),
        "moe_route": dict(logits=logits, bias=torch.zeros(8), top_k=2, n_group=2, topk_group=1),
        "moe_sequence_loss": dict(
            logits=logits, indices=routing.indices, top_k=2, alpha=0.1, cu_seqlens=ints(0, 2, 6)
        ),
        "moe_update_bias": dict(bias=torch.zeros(8), counts=routing.counts, rate=0.1),
        "moe_dispatch": dict(x=x, indices=routing.indices, weights=routing.weights, num_experts=8, alignment=4),
        "moe_dispatch in FP8": dict(
            x=x, indices=routing.indices, weights=routing.weights, num_experts=8, alignment=4, quantize=True
        ),
        "moe_combine": dict(y=sent.data, handle=sent.handle, shared=x, residual=x),
        "newton_schulz": dict(x=torch.randn(2, 24, 40).to(BF16), steps=2),
        "newton_schulz_grouped": dict(xs=[torch.randn(24, 40).to(BF16), torch.randn(32, 16)], steps=2),
    }  # fmt: skip


UNMOVED = {"mla_decode": ("kv_cache",), "mla_decode of 656 bytes": ("kv_cache",)}
NAMES = list(calls())


def results(op: str, arguments: dict) -> list[Tensor]:
    """What it returns and writes, without the rows of groups' padding, which are not specified."""
    found = getattr(k, op.partition(" ")[0])(**arguments)
    tensors, todo = [], [found, arguments.get("kv_cache"), arguments.get("out")]
    while todo:
        part = todo.pop(0)
        if isinstance(part, (tuple, list)):
            todo = [*part, *todo]
        elif isinstance(part, Tensor):
            tensors.append(part)
    if "counts" in arguments and "wgrad" not in op:
        tensors = [t[:5] for t in tensors]
    return tensors


@pytest.mark.parametrize("op", NAMES)
def test_any_place_gives_the_same_bits(op):
    arguments, stay = calls()[op], UNMOVED.get(op, ())
    for arch in ARCHS:
        with k.emulated(arch):
            want = results(op, {name: moved(value, 0) for name, value in arguments.items()})
            for places in (1, 2, 4):
                got = results(op, {n: moved(value, 0 if n in stay else places) for n, value in arguments.items()})
                assert len(got) == len(want)
                for a, b in zip(got, want):
                    same = torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))
                    assert a.dtype == b.dtype and same, (op, arch, places)


def test_every_public_op_is_among_them():
    composed = {"fp8_linear", "grouped_fp8_linear", "grouped_w4_linear"}  # of quantisation and a product
    formats = {"dequantize_w4", "linear_log_probs", "pack_w4", "unpack_w4", "W4"}  # without kernels
    formats |= {"quantize_int4_group32", "quantize_mxfp4", "fake_quantize_int4", "fake_quantize_mxfp4"}
    no_ops = {"Dispatched", "LogProbs", "MlaOutput", "PeerTimeout", "Routing", "UnsupportedError"}
    no_ops |= {"backend", "emulated", "info"}
    assert {name.partition(" ")[0] for name in NAMES} == set(k.__all__) - composed - formats - no_ops - {"launch_count"}


@pytest.mark.parametrize("op", UNMOVED)
def test_a_cache_that_begins_elsewhere_is_refused(op):
    arguments = calls()[op]
    for places in (1, 2, 4):
        arguments["kv_cache"] = moved(arguments["kv_cache"], places)
        for arch in ARCHS:
            with k.emulated(arch), pytest.raises(k.UnsupportedError, match="rows of kv_cache must begin at multiples"):
                results(op, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float8_e4m3fn])
def test_a_copy_is_made_only_where_it_must_be(dtype):
    x = torch.randn(3, 4, 64).to(dtype)
    for good in (x, x[1:], x[..., :37], x.transpose(0, 1), x[1:, 2:, 16:], x.expand(3, 4, 64), x[:1, :1]):
        assert rows_on_16_bytes(good) is good
    shared = x[:, :1].expand(3, 4, 64)
    assert rows_on_16_bytes(shared) is shared
    odd = torch.randn(3, 4, 33).to(dtype)  # rows that are no multiple of 16 bytes
    for bad in (moved(x, 1), moved(x, 2), x.mT, x[..., 1:], x[..., ::2], odd):
        copy = rows_on_16_bytes(bad)
        assert copy.stride(-1) == 1 and copy.data_ptr() % 16 == 0 and copy.shape == bad.shape
        assert all(stride * x.itemsize % 16 == 0 for stride in copy.stride()[:-1])
        assert torch.equal(copy.float(), bad.float())
    copy = rows_on_16_bytes(shared, distinct=True)
    assert 0 not in copy.stride() and torch.equal(copy.float(), shared.float())


@pytest.mark.parametrize("op", ["quantize_1x128", "rms_norm_quantize", "swiglu", "swiglu_quantize", "mla_prefill"])
def test_freed_storage_is_a_message(op):
    """As fully_shard frees parameters; a kernel would get a null pointer."""
    arguments = calls()[op]
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name not in ("offsets", "counts", "cu_seqlens_q", "cu_seqlens_k"):
            freed = value.clone()
            freed.untyped_storage().resize_(0)
            with k.emulated("sm_80"), pytest.raises(ValueError, match="a tensor without memory: its storage was freed"):
                results(op, {**arguments, name: freed})
