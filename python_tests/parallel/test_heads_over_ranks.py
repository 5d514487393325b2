"""The numbers of docs/scale.md on attention's heads over ranks: counted from the modules and the cache."""

from pathlib import Path

import torch

from k2kernels.engine.cache import LatentCache
from k2kernels.model import K2Config
from k2kernels.model.attention import LatentAttention

TEXT = Path(__file__).parents[2].joinpath("docs/scale.md").read_text()


def test_what_dividing_the_heads_saves():
    config = K2Config.preset("kimi-k2")
    layers, ranks = config.num_hidden_layers, 8
    with torch.device("meta"):
        attention = LatentAttention(config, 0)
    by_head = sum(
        p.numel() for n, p in attention.named_parameters() if n.split(".")[0] in ("q_b_proj", "kv_b_proj", "o_proj")
    )
    shared = sum(p.numel() for p in attention.parameters() if p.dim() == 2) - by_head
    whole, divided = layers * (by_head + shared), layers * (by_head / ranks + shared)
    cache = {
        kind: LatentCache(
            config, layers=layers, rows=1, max_tokens=64, device="meta", dtype=torch.bfloat16, cache_dtype=kind
        )
        for kind in ("auto", "fp8")
    }
    bf16, fp8 = (cache[kind].bytes_per_token for kind in ("auto", "fp8"))
    saved = whole - divided  # bytes in FP8
    all_reduce = 2 * (ranks - 1) * config.hidden_size * 2  # of all ranks, for a token and layer in bfloat16
    combine = config.num_experts_per_tok * config.hidden_size * 2 * (ranks - 1) // ranks
    for text in (
        f"{by_head / 1e6:.1f} M of {(by_head + shared) / 1e6:.1f} M weights",
        f"{whole / 1e9:.2f} GB | {divided / 1e9:.2f} GB",
        f"{2 * whole / 1e9:.2f} GB | {2 * divided / 1e9:.2f} GB",
        f"{bf16:,} bytes / 8 | {bf16:,} bytes",
        f"{fp8:,} bytes / 8 | {fp8:,} bytes",
        f"{all_reduce:,} bytes",
        f"{combine:,}",
        f"{saved / (bf16 * (ranks - 1) / ranks):,.0f} tokens",
        f"{2 * saved / (bf16 * (ranks - 1) / ranks):,.0f}",
    ):
        assert text in TEXT, text
