"""FlashMLA's two decoding functions, implemented by `mla_decode`.

    from k2kernels.integrations.flash_mla import flash_mla_with_kvcache, get_mla_metadata

replaces `from flash_mla import ...`. Both generations of calls are supported: the older one, whose metadata is two
int32 tensors (FlashMLA until 2025), and the newer one, whose metadata is a FlashMLASchedMeta and None.

No plan is needed: the kernel of `mla_decode` computes its schedule from the lengths on the device. The metadata that
`get_mla_metadata` returns is therefore empty. Unlike FlashMLA's, it may be reused for other lengths and shapes, and
need not be recomputed before a CUDA graph is replayed.

Beyond FlashMLA's dense decoding: any GPU that has the kernels, CPU tensors, pages of any size, and the 656-byte cache.

Source: names, argument order, layouts and defaults are those of FlashMLA (deepseek-ai/FlashMLA,
flash_mla/flash_mla_interface.py, at commits c2067be, 472477e and 9241ae3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k2kernels._backend import UnsupportedError
from k2kernels.ops._check import FLOATS, Arguments
from k2kernels.ops.mla_decode import mla_decode

METADATA_COLUMNS = 8  # int32 of FlashMLA's TileSchedulerMetaDataSize
BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn)  # dtypes in which FlashMLA takes a cache of 656-byte rows


@dataclass
class FlashMLASchedMeta:
    """Metadata of the newer generation: FlashMLA's fields, which stay as they are here."""

    have_initialized: bool = False
    config: Any = None
    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None


def get_mla_metadata(
    cache_seqlens: Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int = 1,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    num_heads_per_head_k: int | None = None,
) -> tuple[Tensor, Tensor] | tuple[FlashMLASchedMeta, None]:
    """Stand-ins for FlashMLA's metadata, to be handed to `flash_mla_with_kvcache`; no work is planned.

    Args:
        cache_seqlens: int32 [B] for the older generation; None for the newer one, which takes no arguments.
        num_q_tokens_per_head_k: s_q * H / num_heads_k; not used. `num_heads_per_head_k` is its first name.
        num_heads_k: must be 1.
        num_heads_q, is_fp8_kvcache: not used.
        topk: must be None.

    Returns:
        (FlashMLASchedMeta(), None); with cache_seqlens (tile_scheduler_metadata int32 [1, 8], all zeros, num_splits
        int32 [B+1], counting one split per sequence), on its device. Nothing waits for the device.

    Raises:
        TypeError, ValueError: cache_seqlens is no int32 [B].
        UnsupportedError: for several key heads or `topk` (sparse attention).
    """
    op = "get_mla_metadata"
    _require_none(op, "topk", topk, "leave it out: attention is dense here")
    if num_heads_k != 1:
        raise _unsupported(op, "num_heads_k", "1", num_heads_k, "all heads share one latent row")
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    cache_seqlens = Arguments(op).tensor("cache_seqlens", cache_seqlens, ("B",), torch.int32)
    metadata = torch.zeros(1, METADATA_COLUMNS, dtype=torch.int32, device=cache_seqlens.device)
    return metadata, torch.arange(len(cache_seqlens) + 1, dtype=torch.int32, device=cache_seqlens.device)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | Tensor,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention over a paged latent cache, as FlashMLA's function of this name.

    Args:
        q: [B, s_q, H, D]; what `mla_decode` takes. Its kernels take D = 576, bfloat16 or float16.
        k_cache: [pages, page_size, 1, D] in q's dtype; with `is_fp8_kvcache` [pages, page_size, 1, 656] of uint8, int8
            or float8_e4m3fn: the 656-byte rows of `mla_append`.
        block_table: int32 [B, max_pages].
        cache_seqlens: int32 [B], the new tokens included.
        head_dim_v: 512 for Kimi-K2 and DeepSeek-V3.
        tile_scheduler_metadata, num_splits: what `get_mla_metadata` returned, of either generation. They are not read.
        softmax_scale: 1 / sqrt(D) by default. (K2's and V3's own is 1 / sqrt(192), times YaRN's factor.)
        causal: query i of s_q sees the keys < cache_seqlens - s_q + i + 1; otherwise all of them.
        indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length: must be None.

    Returns:
        out [B, s_q, H, head_dim_v] in q's dtype; lse float32 [B, H, s_q], natural logarithm, contiguous. A row that
        sees no key has out 0 and lse +inf, where `mla_decode` has -inf.

    Raises:
        TypeError, ValueError: as `mla_decode`; for metadata that is not of one generation.
        UnsupportedError: for sparse attention, attention sinks, or several key heads.
    """
    op = "flash_mla_with_kvcache"
    for name, value in (("indices", indices), ("topk_length", topk_length)):
        _require_none(op, name, value, "attention is dense here: pass block_table and cache_seqlens")
    for name, value in (
        ("extra_k_cache", extra_k_cache),
        ("extra_indices_in_kvcache", extra_indices_in_kvcache),
        ("extra_topk_length", extra_topk_length),
    ):
        _require_none(op, name, value, "attend to each cache by itself and join the results: merge_attention_states")
    _require_none(op, "attn_sink", attn_sink, "scale the result by sigmoid(lse - attn_sink) yourself")
    args = Arguments(op)
    _check_metadata(args, tile_scheduler_metadata, num_splits)
    args.boolean("is_fp8_kvcache", is_fp8_kvcache)
    q = args.tensor("q", q, ("B", "s_q", "H", "D"), FLOATS)
    remedy = "pass is_fp8_kvcache=True for 656-byte rows" if not is_fp8_kvcache else "pass is_fp8_kvcache=False"
    k_cache = args.tensor(
        "k_cache", k_cache, ("pages", "page_size", "num_heads_k", "row"), BYTES if is_fp8_kvcache else q.dtype,
        remedy=remedy,
    )  # fmt: skip
    if k_cache.shape[2] != 1:
        got = f"num_heads_k={k_cache.shape[2]}"
        raise _unsupported(op, "k_cache", "of num_heads_k=1", got, "call it once for each key head and its queries")
    block_table = args.tensor("block_table", block_table, ("B", "max_pages"), torch.int32)
    cache_seqlens = args.tensor("cache_seqlens", cache_seqlens, ("B",), torch.int32)
    out, lse, _ = mla_decode(
        q,
        (k_cache.view(torch.uint8) if is_fp8_kvcache else k_cache).squeeze(2),
        block_table,
        cache_seqlens,
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        head_dim_v=head_dim_v,
    )
    lse = lse.transpose(1, 2).contiguous()
    return out, lse.masked_fill_(lse == -torch.inf, torch.inf)


def _check_metadata(args: Arguments, metadata: Any, num_splits: Any) -> None:
    """Checks that both are of one generation; their contents are not used."""
    if isinstance(metadata, Tensor) and isinstance(num_splits, Tensor):
        args.require(metadata.dtype == torch.int32, "tile_scheduler_metadata", "int32", metadata.dtype)
        args.require(num_splits.dtype == torch.int32, "num_splits", "int32", num_splits.dtype)
    elif not (isinstance(metadata, FlashMLASchedMeta) and num_splits is None):
        got = f"{type(metadata).__name__} and {type(num_splits).__name__}"
        raise TypeError(
            f"{args.op}: tile_scheduler_metadata and num_splits must be two int32 tensors, or a FlashMLASchedMeta and "
            f"None, got {got}; pass what get_mla_metadata returned"
        )


def _require_none(op: str, name: str, value: Any, remedy: str) -> None:
    if value is not None:
        got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise _unsupported(op, name, "None", got, remedy)


def _unsupported(op: str, name: str, wanted: str, got: Any, remedy: str) -> UnsupportedError:
    return UnsupportedError(f"{op}: {name} must be {wanted}, got {got}; {remedy}")
