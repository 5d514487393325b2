"""Attention over a paged cache of latent rows (decoding): the public functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments, check_cu_seqlens
from k2kernels.ops._launch import chip, launch, module, rows_begin_on_16_bytes, rows_on_16_bytes
from k2kernels.ops._register import declare
from k2kernels.ops.mla_cache import LATENT, ROW_BYTES, check_cache, check_pages
from k2kernels.reference import mla_decode as reference
from k2kernels.reference._numeric import wide_dtype
from k2kernels.reference.mla_cache import ROPE


class MlaOutput(NamedTuple):
    """What an attention op returns."""

    out: Tensor  # in the dtype of the queries
    lse: Tensor  # natural logarithm of the sum of exponentials, float32; -inf where a row sees no key
    max_logits: Tensor | None  # largest scaled, masked logit, float32; None without return_max_logits


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None = None,
    causal: bool = True,
    head_dim_v: int = 512,
    split: int | str = "auto",
    out: Tensor | None = None,
    return_max_logits: bool = False,
) -> MlaOutput:
    """Multi-head latent attention in the absorbed form: all heads read the same cached rows [latent | rope].

    out = softmax(softmax_scale * q row^T) latent, over the rows of the sequence that the query sees.

    Args:
        q: [B, s_q, H, D], or [T, H, D] with `cu_seqlens_q`; bfloat16, float16, float32 or float64; D = 576 for Kimi-K2
            (512 latent and 64 rope).
        kv_cache: [pages, page_size, D] in q's dtype, or uint8 [pages, page_size, 656] for D = 576 (see `mla_append`);
            any page size, any strides.
        block_table: int32 [B, max_pages], the pages of each sequence. Entries beyond a sequence's length are not read,
            nor are cache rows beyond it.
        seq_lens: int32 [B], rows in the cache, *including* those of the new tokens that q belongs to.
        softmax_scale: factor of the logits.
        cu_seqlens_q: int32 [B + 1]; sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1]. Queries behind
            the last sequence, as in a batch padded for a CUDA graph, belong to none.
        causal: query i of s_q sees the rows < seq_len - s_q + i + 1; otherwise all rows of its sequence.
        head_dim_v: size of the latent, which is the first part of a row.
        split: tokens of a sequence that are processed as a unit; the results of units are merged. An int fixes it: the
            bits of a sequence's result then do not depend on the other sequences of the batch. "auto" chooses by the
            batch.
        out: where to write the result, like the returned `out`, any strides.
        return_max_logits: also return the largest logit of each row.

    Returns:
        out like q with head_dim_v in the last axis; lse like q without it, the natural logarithm of the sum of
        exponentials; max_logits, the maximum of the scaled, masked logits in that shape, or None. lse and max_logits
        are float32 (float64 for float64). A row that sees no key, or belongs to no sequence, has out 0, lse -inf and
        max_logits -inf.
        Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and, on a CPU, for seq_lens, cu_seqlens_q or pages out of range.

    Source: DeepSeek-V2 (2024) for the absorbed form; the arguments follow FlashMLA's flash_mla_with_kvcache
    (flash_mla/flash_mla_interface.py), whose empty rows have lse +inf instead.
    """
    args = Arguments("mla_decode")
    q = args.tensor("q", q, ("B", "s_q", "H", "D") if cu_seqlens_q is None else ("T", "H", "D"), FLOATS)
    size = q.shape[-1]
    kv_cache = check_cache(args, kv_cache, (q.dtype, torch.uint8), size)
    block_table = args.tensor("block_table", block_table, ("B", "max_pages"), torch.int32)
    seq_lens = args.tensor("seq_lens", seq_lens, ("B",), torch.int32)
    cu_seqlens_q = args.optional("cu_seqlens_q", cu_seqlens_q, (seq_lens.shape[0] + 1,), torch.int32)
    softmax_scale = args.number("softmax_scale", softmax_scale, positive=True)
    args.integer("head_dim_v", head_dim_v, 1, size, remedy="it is the latent part of q's last axis")
    if kv_cache.dtype == torch.uint8:
        args.require(head_dim_v == LATENT, "head_dim_v", f"{LATENT} for a cache of {ROW_BYTES}-byte rows", head_dim_v)
    split = reference.AUTO if split == "auto" else args.integer("split", split, 1, remedy="or 'auto'")
    args.boolean("causal", causal)
    args.boolean("return_max_logits", return_max_logits)
    request = (
        q, kv_cache, block_table, seq_lens, softmax_scale, cu_seqlens_q, causal, head_dim_v, split, return_max_logits,
    )  # fmt: skip
    if out is None:
        out, lse, max_logits = _mla_decode(*request)
    else:
        out = args.tensor("out", out, (*q.shape[:-1], head_dim_v), q.dtype)
        args.no_gradient(q=q, kv_cache=kv_cache, out=out)
        args.writable("out", out)
        lse, max_logits = _mla_decode.out(*request, out)
    return MlaOutput(out, lse, max_logits if return_max_logits else None)


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each of them.

    Args:
        out_a, out_b: [..., D], results of the same queries; bfloat16, float16, float32 or float64.
        lse_a, lse_b: [...], their natural log-sum-exps, float32 (float64 for float64); -inf: saw no key, in which case
            the contents of out do not matter.

    Returns:
        (out, lse) as `mla_decode` returns them; 0 and -inf where neither saw a key. Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes and shapes.
    """
    args = Arguments("merge_attention_states")
    out_a = args.tensor("out_a", out_a, ("...", "D"), FLOATS)
    row_dtype = wide_dtype(out_a.dtype)
    lse_a = args.tensor("lse_a", lse_a, out_a.shape[:-1], row_dtype)
    out_b = args.tensor("out_b", out_b, out_a.shape, out_a.dtype)
    lse_b = args.tensor("lse_b", lse_b, out_a.shape[:-1], row_dtype)
    return _merge_attention_states(out_a, lse_a, out_b, lse_b)


def _validate(q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor | None) -> None:
    pages, page_size = kv_cache.shape[:2]
    capacity = block_table.shape[1] * page_size
    if (wrong := seq_lens[(seq_lens < 0) | (seq_lens.long() > capacity)]).numel():
        raise ValueError(
            f"mla_decode: seq_lens must be in [0, {capacity}] (max_pages * page_size), got {int(wrong[0])}"
        )
    if cu_seqlens_q is not None:
        check_cu_seqlens("mla_decode", "cu_seqlens_q", cu_seqlens_q, q.shape[0], padded=True)
    first_token = torch.arange(block_table.shape[1]) * page_size
    check_pages("mla_decode", block_table, first_token < seq_lens.unsqueeze(-1), pages)


def _unserved(q: Tensor, kv_cache: Tensor, head_dim_v: int) -> str | None:
    """Why the kernels do not serve these arguments."""
    quantized = kv_cache.dtype == torch.uint8
    if q.dtype not in ((torch.bfloat16,) if quantized else (torch.bfloat16, torch.float16)):
        what = "bfloat16 q for 656-byte rows" if quantized else "bfloat16 and float16"
        return f"kernels take {what}, not {q.dtype}"
    if (q.shape[-1], head_dim_v) != (LATENT + ROPE, LATENT):
        return f"kernels take {LATENT} latent and {ROPE} rope dims, not {head_dim_v} and {q.shape[-1] - head_dim_v}"
    if kv_cache.stride(-1) != 1:
        return f"kv_cache must have stride 1 in its last axis, got {kv_cache.stride(-1)}"
    if not rows_begin_on_16_bytes(kv_cache):
        return "the rows of kv_cache must begin at multiples of 16 bytes"
    return None


def _outputs(
    q: Tensor, head_dim_v: int, return_max_logits: bool, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    *rows, _ = q.shape
    out = q.new_empty(*rows, head_dim_v) if out is None else out
    dtype = wide_dtype(q.dtype)
    max_logits = q.new_empty(*rows, dtype=dtype) if return_max_logits else q.new_empty(0, dtype=dtype)
    return out, q.new_empty(*rows, dtype=dtype), max_logits


def _rows(x: Tensor) -> Tensor:
    """x [B, s_q, H, D] or [T, H, D] as the kernels take it: contiguous, or [T, H, D]; copied only if it must be."""
    if x.is_contiguous() and rows_begin_on_16_bytes(x):
        return x
    return rows_on_16_bytes(x.flatten(0, 1) if x.ndim == 4 else x)


def _launch(
    out: Tensor,
    lse: Tensor,
    max_logits: Tensor,
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    softmax_scale: float,
    causal: bool,
    split: int,
) -> None:
    if q.numel() == 0:
        return
    rows = _rows(q)
    block_table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    seq_lens = seq_lens.contiguous()
    cu_seqlens_q = None if cu_seqlens_q is None else cu_seqlens_q.contiguous()
    plan = module(q.device).mla_decode_plan(chip(q.device), q, kv_cache, block_table, cu_seqlens_q, split)
    if plan.kernel == "sm90" and not rows.is_contiguous():
        token, head, _ = rows.stride()
        if head <= 0 or token != rows.shape[1] * head:  # its tensor map has one stride from row to row
            rows = rows.contiguous()
    workspace = q.new_empty(plan.workspace_floats(q), dtype=torch.float32)
    target = _rows(out)
    launch(
        "mla_decode", rows, kv_cache, block_table, seq_lens, cu_seqlens_q, softmax_scale, causal, target, lse,
        max_logits, workspace, plan,
    )  # fmt: skip
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))


def _merge_outputs(out_a: Tensor, lse_a: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(*out_a.shape), lse_a.new_empty(lse_a.shape)


def _launch_merge(out: Tensor, lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    launch("merge_attention_states", *(x.contiguous() for x in (out_a, lse_a, out_b, lse_b)), out, lse)


_mla_decode = declare(
    reference.mla_decode, outputs=_outputs, launch=_launch, unserved=_unserved, validate=_validate, out=()
)
_merge_attention_states = declare(
    reference.merge_attention_states,
    outputs=_merge_outputs,
    launch=_launch_merge,
    unserved=lambda out_a: "no kernel computes in float64" if out_a.dtype == torch.float64 else None,
)
