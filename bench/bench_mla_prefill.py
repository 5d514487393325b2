"""Attention of whole sequences against torch's scaled_dot_product_attention, at sizes of a CPU, in float32."""

import pytest
import torch
import torch.nn.functional as F

from k2kernels.ops.mla_prefill import mla_prefill

SHAPES = {  # B, L, H, Dqk, Dv
    "tiny": (16, 128, 4, 48, 32),
    "k2, 8 of 64 heads": (1, 512, 8, 192, 128),
}


@pytest.fixture(params=SHAPES)
def inputs(request):
    batch, length, heads, dim, value_dim = SHAPES[request.param]
    torch.manual_seed(0)
    tokens = batch * length
    q, k, v = (torch.randn(tokens, heads, d, requires_grad=True) for d in (dim, dim, value_dim))
    return (q, k, v), torch.arange(0, tokens + 1, length, dtype=torch.int32), dim**-0.5


def ours(leaves, cu_seqlens, scale):
    return mla_prefill(*leaves, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, softmax_scale=scale).out


def torch_sdpa(leaves, cu_seqlens, scale):
    sequences = (x.unflatten(0, (len(cu_seqlens) - 1, -1)).transpose(1, 2) for x in leaves)
    out = F.scaled_dot_product_attention(*sequences, is_causal=True, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


WHO = {"k2kernels": ours, "torch sdpa": torch_sdpa}


@pytest.mark.benchmark(group="mla_prefill")
@pytest.mark.parametrize("who", WHO)
def test_forward(benchmark, inputs, who):
    with torch.no_grad():
        benchmark(WHO[who], *inputs)


@pytest.mark.benchmark(group="mla_prefill, forward and backward")
@pytest.mark.parametrize("who", WHO)
def test_forward_and_backward(benchmark, inputs, who):
    leaves = inputs[0]
    grad = torch.randn_like(WHO[who](*inputs))
    benchmark(lambda: torch.autograd.grad(WHO[who](*inputs), leaves, grad))
