"""Every public op compiles into one graph that serves several sizes: nothing in it reads a number on the host."""

import pytest
import torch

import k2kernels as k

CACHE = torch.zeros(8, 16, 576)
TABLE = torch.arange(16, dtype=torch.int32).view(8, 2) % 8
WEIGHT = k.quantize_128x128(torch.randn(192, 256))


def _moe(x, gate_up, down):
    return k.moe_mlp(x, k.moe_route(x[:, :8], top_k=2), gate_up, down)


def _prefill(q, v, ends):
    return k.mla_prefill(q, q, v, cu_seqlens_q=ends, cu_seqlens_k=ends, softmax_scale=0.1)


def _grouped(data, scales, offsets):
    return k.grouped_fp8_gemm(data, scales, WEIGHT[0][None], WEIGHT[1][None], offsets=offsets)


def _out(data, scales, out):
    return k.fp8_gemm(data, scales, *WEIGHT, out=out.mT) * 1


def _ends(n):
    return torch.tensor([0, n], dtype=torch.int32)


# name -> (function, its arguments for n rows)
CASES = {
    "quantize_1x128": (k.quantize_1x128, lambda n: (torch.randn(n, 256),)),
    "quantize_128x128": (k.quantize_128x128, lambda n: (torch.randn(n, 256),)),
    "rms_norm_quantize": (lambda x: k.rms_norm_quantize(x, torch.ones(256)), lambda n: (torch.randn(n, 256),)),
    "swiglu": (k.swiglu, lambda n: (torch.randn(n, 8),)),
    "swiglu_quantize": (k.swiglu_quantize, lambda n: (torch.randn(n, 256),)),
    "fp8_gemm": (lambda a, s: k.fp8_gemm(a, s, *WEIGHT), lambda n: k.quantize_1x128(torch.randn(n, 256))),
    "fp8_gemm out": (_out, lambda n: (*k.quantize_1x128(torch.randn(n, 256)), torch.zeros(192, n).bfloat16())),
    "fp8_gemm_swiglu": (lambda a, s: k.fp8_gemm_swiglu(a, s, *WEIGHT), lambda n: k.quantize_1x128(torch.randn(n, 256))),
    "grouped_fp8_gemm": (_grouped, lambda n: (*k.quantize_1x128(torch.randn(n, 256)), _ends(n))),
    "mla_append": (
        lambda kv, table, positions: k.mla_append(kv, CACHE.clone(), table, positions),
        lambda n: (torch.randn(n, 576), TABLE[: n // 2], torch.arange(n)),
    ),
    "mla_gather": (
        lambda table, positions: k.mla_gather(CACHE, table, positions),
        lambda n: (TABLE[: n // 2], torch.arange(n)),
    ),
    "mla_decode": (
        lambda q, table, lens: k.mla_decode(q, CACHE, table, lens, softmax_scale=0.1),
        lambda n: (torch.randn(n, 1, 4, 576), TABLE[:n], torch.arange(1, n + 1, dtype=torch.int32)),
    ),
    "mla_prefill": (_prefill, lambda n: (torch.randn(n, 2, 24), torch.randn(n, 2, 16), _ends(n))),
    "merge_attention_states": (
        lambda out, lse: k.merge_attention_states(out, lse, out, lse),
        lambda n: (torch.randn(n, 2, 8), torch.randn(n, 2)),
    ),
    "moe_mlp": (_moe, lambda n: (torch.randn(n, 16), torch.randn(8, 32, 16), torch.randn(8, 16, 16))),
    "newton_schulz": (k.newton_schulz, lambda n: (torch.randn(n, n + 3),)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_several_sizes(name):
    function, arguments = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 6, 8):
        inputs = arguments(n)
        torch.testing.assert_close(compiled(*inputs), function(*inputs), rtol=0, atol=0)
