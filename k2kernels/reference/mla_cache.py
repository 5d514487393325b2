"""The paged cache of latent rows: the definitions of writing and reading it.

A cache is [pages, page_size, D] floats, a row being [latent | rope], or [pages, page_size, 656] bytes. The 656 bytes of
a row, the layout of FlashMLA and vLLM: 512 e4m3 codes of the latent, 4 float32 scales (one per 128 codes), 64 bfloat16
of the rope part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.reference.quant import dequantize, quantize_1x128

LATENT = 512
ROPE = 64
ROW_BYTES = LATENT + LATENT // 128 * 4 + ROPE * 2
_SCALES = slice(LATENT, LATENT + LATENT // 128 * 4)
_ROPE = slice(_SCALES.stop, ROW_BYTES)


def mla_append(kv: Tensor, kv_cache: Tensor, block_table: Tensor, positions: Tensor, power_of_two: bool) -> None:
    """Writes row t of kv [T, D] at positions[t] of the sequence t // (T // B); position -1 writes nothing."""
    wanted = positions >= 0
    sequence = token_sequences(block_table, positions)
    rows = pack(kv[wanted], power_of_two) if kv_cache.dtype == torch.uint8 else kv[wanted].to(kv_cache.dtype)
    kv_cache[_locate(kv_cache, block_table, sequence[wanted], positions[wanted])] = rows


def mla_gather(kv_cache: Tensor, block_table: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [T, D] at positions[t] of the sequence t // (T // B); position -1 gives zeros."""
    return read_rows(kv_cache, block_table, token_sequences(block_table, positions), positions, positions >= 0, dtype)


def token_sequences(block_table: Tensor, positions: Tensor) -> Tensor:
    """Which row of block_table [B, max_pages] each of T tokens belongs to: T // B tokens per row, in order."""
    sequences = block_table.shape[0]
    tokens = positions.shape[0] // max(1, sequences)
    return torch.arange(sequences, device=positions.device).repeat_interleave(tokens)


def read_rows(
    kv_cache: Tensor, block_table: Tensor, sequence: Tensor, position: Tensor, wanted: Tensor, dtype: torch.dtype
) -> Tensor:
    """Rows [..., D] of the tokens `position` [...] of `sequence` [...], dequantised; zeros where not `wanted` [...].

    Neither the block table nor the cache is read where a token is not wanted.
    """
    rows = unpack(kv_cache[_locate(kv_cache, block_table, sequence[wanted], position[wanted])], dtype)
    result = rows.new_zeros(*wanted.shape, rows.shape[-1])
    result[wanted] = rows
    return result


def pack(kv: Tensor, power_of_two: bool) -> Tensor:
    """Rows [..., 576] of floats as rows [..., 656] of bytes."""
    codes, scales = quantize_1x128(kv[..., :LATENT], power_of_two)
    rope = kv[..., LATENT:].to(torch.bfloat16).contiguous()
    return torch.cat([part.view(torch.uint8) for part in (codes, scales, rope)], dim=-1)


def unpack(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Cache rows as floats: bytes [..., 656] are dequantised to [..., 576], float rows are converted."""
    if rows.dtype != torch.uint8:
        return rows.to(dtype)
    codes, scales = rows[..., :LATENT].view(torch.float8_e4m3fn), rows[..., _SCALES].view(torch.float32)
    latent = dequantize(codes, scales, 1, 128, dtype)
    return torch.cat([latent, rows[..., _ROPE].view(torch.bfloat16).to(dtype)], dim=-1)


def _locate(kv_cache: Tensor, block_table: Tensor, sequence: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Page and slot of the tokens `position` [T] of `sequence` [T]."""
    page_size = kv_cache.shape[1]
    position = position.long()
    return block_table[sequence, position // page_size].long(), position % page_size
