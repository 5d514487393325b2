"""Attention over the paged latent cache, at sizes of a CPU, in float32.

The peer is torch's scaled_dot_product_attention on the same rows laid out contiguously: it is spared the pages.
"""

import pytest
import torch
import torch.nn.functional as F

from k2kernels.ops.mla_decode import merge_attention_states, mla_decode
from k2kernels.testing.inputs import KIMI_K2, poisoned_cache

SHAPES = {  # B, s_q, cached tokens, H, latent, rope
    "tiny": (8, 1, 256, 4, 32, 16),
    "k2": (1, 1, 1024, KIMI_K2.heads, KIMI_K2.latent, KIMI_K2.rope),
    "k2, two tokens": (2, 2, 512, KIMI_K2.heads, KIMI_K2.latent, KIMI_K2.rope),
}


def make(shape):
    batch, s_q, length, heads, latent, rope = SHAPES[shape]
    torch.manual_seed(0)
    return torch.randn(batch, s_q, heads, latent + rope), torch.randn(batch, length, latent + rope), latent


def torch_sdpa(q, rows, latent):
    """All heads share the keys, so that the heads of a token are so many queries of one head."""
    s_q, heads, length = q.shape[1], q.shape[2], rows.shape[1]
    border = torch.arange(length - s_q + 1, length + 1).repeat_interleave(heads)
    keys = rows.unsqueeze(1)
    return F.scaled_dot_product_attention(
        q.flatten(1, 2).unsqueeze(1),
        keys,
        keys[..., :latent],
        attn_mask=torch.arange(length) < border.unsqueeze(-1),
        scale=KIMI_K2.softmax_scale,
    )


@pytest.mark.benchmark(group="mla_decode")
@pytest.mark.parametrize("who", ["split auto", "split 256", "656-byte cache", "torch sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_mla_decode(benchmark, shape, who):
    q, rows, latent = make(shape)
    if who == "torch sdpa":
        benchmark(torch_sdpa, q, rows, latent)
        return
    quantize = who == "656-byte cache"
    if quantize and latent != 512:
        pytest.skip("the 656-byte row holds 512 + 64 elements")
    benchmark(
        mla_decode,
        q,
        *poisoned_cache(list(rows), 64, quantize=quantize),
        softmax_scale=KIMI_K2.softmax_scale,
        head_dim_v=latent,
        split=256 if who == "split 256" else "auto",
    )


@pytest.mark.benchmark(group="merge_attention_states")
def test_merge(benchmark):
    torch.manual_seed(0)
    state = (torch.randn(8, 64, 512), torch.randn(8, 64))
    benchmark(merge_attention_states, *state, *state)
