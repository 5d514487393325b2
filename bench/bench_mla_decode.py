"""Attention over the paged latent cache: at sizes of a CPU in float32, and Kimi-K2's on a GPU.

PyTorch's peers get the rows of a sequence contiguously, without pages.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from k2kernels.ops.mla_decode import merge_attention_states, mla_decode
from k2kernels.testing.bench import Case
from k2kernels.testing.inputs import KIMI_K2, poisoned_cache

PAGE_SIZE = 64
LATENT, ROW = KIMI_K2.latent, KIMI_K2.cache_row
ROW_BYTES = {"bf16": 2 * ROW, "656": 656}  # of the cache

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
    """All heads share the keys: the heads of a token become queries of one head."""
    s_q, heads, length = q.shape[1], q.shape[2], rows.shape[1]
    border = torch.arange(length - s_q + 1, length + 1, device=q.device).repeat_interleave(heads)
    keys = rows.unsqueeze(1)
    return F.scaled_dot_product_attention(
        q.flatten(1, 2).unsqueeze(1),
        keys,
        keys[..., :latent],
        attn_mask=None if s_q == 1 else torch.arange(length, device=q.device) < border.unsqueeze(-1),
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


# On a GPU


def gpu_cases() -> list[Case]:
    """Kimi-K2's 64 heads over batches and lengths, then 16 (a quarter of them, on four GPUs) and 128 (DeepSeek-V3)."""
    cases = [
        case(batch, length * 1024, s_q, KIMI_K2.heads, cache)
        for s_q in (1, 2)
        for cache in ROW_BYTES
        for batch in (1, 8, 32, 128)
        for length in (1, 4, 8, 32)
    ]
    cases += [
        case(batch, length * 1024, 1, heads, cache)
        for heads in (16, 128)
        for cache in ROW_BYTES
        for batch in (1, 32, 128)
        for length in (1, 8)
    ]
    rows = 128 * KIMI_K2.heads

    def states(device: torch.device) -> tuple[torch.Tensor, ...]:
        out, lse = (torch.randn(2, rows, *size, device=device) for size in ((LATENT,), ()))
        return out[0].bfloat16(), lse[0], out[1].bfloat16(), lse[1]

    moved = 3 * rows * (2 * LATENT + 4)
    merge = Case("merge_attention_states", f"{rows} rows", moved, states, {"k2kernels": merge_attention_states})
    return [*cases, merge]


def case(batch: int, length: int, s_q: int, heads: int, cache: str) -> Case:
    """`batch` sequences of `length` cached tokens, the s_q new ones included; `cache` is "bf16" or "656"."""
    pages = length // PAGE_SIZE
    per_sequence = length * ROW_BYTES[cache] + 4 * pages + 4 + s_q * heads * (2 * ROW + 2 * LATENT + 4)
    seen = sum(range(length - s_q + 1, length + 1))  # causal: keys of all queries together

    def make(device: torch.device) -> tuple[torch.Tensor, ...]:
        q = torch.randn(batch, s_q, heads, ROW, device=device, dtype=torch.bfloat16)
        order = torch.Generator().manual_seed(0)  # of pages, the same in all sets: FlashInfer plans for it
        table = torch.randperm(batch * pages, generator=order, dtype=torch.int32).view(batch, pages).to(device)
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        return q, random_cache(batch * pages, cache, device), table, lengths

    return Case(
        op="mla_decode",
        shape=f"{batch}x{length // 1024}k q{s_q} h{heads} {cache}",
        bytes=batch * per_sequence,
        flops=2 * batch * heads * (ROW + LATENT) * seen,
        make=make,
        bodies=bodies(batch, length, s_q, heads, cache),
    )


def random_cache(pages: int, cache: str, device: torch.device) -> torch.Tensor:
    def normal(width: int) -> torch.Tensor:
        return torch.randn(pages, PAGE_SIZE, width, device=device, dtype=torch.bfloat16)

    if cache == "bf16":
        return normal(ROW)
    rows = torch.empty(pages, PAGE_SIZE, ROW_BYTES[cache], dtype=torch.uint8, device=device)
    rows[..., :LATENT] = normal(LATENT).to(torch.float8_e4m3fn).view(torch.uint8)
    rows[..., LATENT : LATENT + 16] = torch.ones(4, device=device).view(torch.uint8)
    rows[..., LATENT + 16 :] = normal(KIMI_K2.rope).view(torch.uint8)
    return rows


def bodies(batch: int, length: int, s_q: int, heads: int, cache: str) -> dict[str, Callable]:
    """Ours, and the peers that this machine has for such a cache."""

    def ours(q, rows, table, lengths, split="auto"):
        return mla_decode(q, rows, table, lengths, softmax_scale=KIMI_K2.softmax_scale, split=split)

    found = {"k2kernels": ours}
    if s_q == 1 and heads == KIMI_K2.heads:
        found["split 512"] = functools.partial(ours, split=512)  # batch-invariant
    if cache == "656":
        return found  # no peer serves these rows without indices
    if importlib.util.find_spec("flash_mla"):
        found["FlashMLA"] = flash_mla_body()
    if importlib.util.find_spec("flashinfer"):
        found["FlashInfer"] = flashinfer_body()
    found["torch sdpa"] = lambda q, rows, *_: torch_sdpa(q, rows.view(batch, length, ROW), LATENT)
    if importlib.util.find_spec("triton") and (s_q, heads, length) == (1, KIMI_K2.heads, 8192):  # seconds for each
        compiled = torch.compile(formula, dynamic=False)
        found["torch.compile"] = lambda q, rows, *_: compiled(q, rows.view(batch, length, ROW))
    return found


def formula(q: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one token, in plain PyTorch operations."""
    logits = (q.squeeze(1) @ rows.mT).float() * KIMI_K2.softmax_scale
    return logits.softmax(-1).to(q.dtype) @ rows[..., :LATENT], logits.logsumexp(-1)


def flash_mla_body() -> Callable:
    """FlashMLA of either generation; its metadata, made once per step of a model, is not in the time."""
    import flash_mla

    metadata: list = []

    def run(q, rows, table, lengths):
        if not metadata:
            metadata.extend(flash_mla.get_mla_metadata(lengths, q.shape[1] * q.shape[2], 1))
        scale = KIMI_K2.softmax_scale
        return flash_mla.flash_mla_with_kvcache(
            q, rows.unsqueeze(2), table, lengths, LATENT, *metadata, softmax_scale=scale, causal=True
        )

    return run


def flashinfer_body() -> Callable:
    """FlashInfer's wrapper; its plan, made on the host once per step of a model, is not in the time."""
    import flashinfer

    wrappers: list = []

    def run(q, rows, table, lengths):
        batch, s_q, heads, _ = q.shape
        if not wrappers:
            wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(
                torch.empty(128 << 20, dtype=torch.int8, device=q.device)
            )
            starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
            wrapper.plan(
                starts * s_q, starts * table.shape[1], table.flatten(), lengths, heads, LATENT, KIMI_K2.rope, PAGE_SIZE,
                s_q > 1, KIMI_K2.softmax_scale, q.dtype, rows.dtype,
            )  # fmt: skip
            wrappers.append(wrapper)
        q = q.flatten(0, 1)
        return wrappers[0].run(q[..., :LATENT], q[..., LATENT:], rows[..., :LATENT], rows[..., LATENT:])

    return run
