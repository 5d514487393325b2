"""What a model costs in memory: weights, cache per token, what fits on how many GPUs. Arithmetic, no measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from k2kernels.model.config import K2Config
from k2kernels.reference.mla_cache import LATENT, ROPE, ROW_BYTES

GPU_GB = (80, 141)  # A100 / H100, H200; in units of 10^9 bytes
GPU_COUNTS = (1, 2, 4, 8, 16, 32)
USABLE = 0.9  # the rest is left to activations and buffers; an assumption


class Fit(NamedTuple):
    """Tokens of cache that remain beside the weights; below 0 if the weights alone do not fit."""

    gpus: int
    gpu_gb: int
    weights: str  # bf16 or fp8
    tokens_bf16: int
    tokens_fp8: int | None  # None where the FP8 cache does not serve the sizes

    @property
    def fits(self) -> bool:
        return self.tokens_bf16 >= 0


@dataclass(frozen=True)
class Capacity:
    """Bytes are exact for the weights alone (MTP layers left out) and for the cache's rows."""

    total_parameters: int
    active_parameters: int
    weights_bf16: int
    weights_fp8: int
    cache_bf16: int  # bytes per token, all layers
    cache_fp8: int | None
    cache_expanded: int  # bytes per token, if keys and values of every head were kept in BF16
    fits: list[Fit]

    def format(self) -> str:
        """A table to print."""

        def per_token(size: int | None) -> str:
            return "not served" if size is None else f"{size:,} bytes"

        lines = [
            f"parameters            {self.total_parameters:,} ({_short(self.total_parameters)})",
            f"  used by a token     {self.active_parameters:,} ({_short(self.active_parameters)})",
            f"weights in BF16       {_gb(self.weights_bf16)}",
            f"weights in FP8        {_gb(self.weights_fp8)}",
            f"cache per token BF16  {per_token(self.cache_bf16)}",
            f"cache per token FP8   {per_token(self.cache_fp8)}",
            f"  expanded K and V    {per_token(self.cache_expanded)} "
            f"({self.cache_expanded / self.cache_bf16:.1f} times the latent)",
            "",
            f"Tokens of BF16 cache beside the weights, on {USABLE:.0%} of the memory (an estimate: weights and cache",
            "spread evenly over the GPUs; if each keeps the whole cache, as in tensor parallelism, divide by their",
            "number; -: the weights do not fit):",
            "",
            "GPUs" + "".join(f"{f'{gb} GB, {kind}':>14}" for gb in GPU_GB for kind in ("BF16", "FP8")),
        ]
        for gpus in GPU_COUNTS:
            cells = [_tokens(fit) for fit in self.fits if fit.gpus == gpus]
            lines.append(f"{gpus:>4}" + "".join(f"{cell:>14}" for cell in cells))
        return "\n".join(lines)


def capacity(config: K2Config) -> Capacity:
    """The memory that a model of `config` takes. Needs no weights."""
    total, active = config.parameter_counts()
    weights = {"bf16": 0, "fp8": 0}
    for count, shape, kind in config.tensors():
        size = count * math.prod(shape)
        weights["bf16"] += size * (4 if kind == "float32" else 2)
        if kind == "quantised":
            weights["fp8"] += size + 4 * count * math.prod(-(-n // 128) for n in shape)
        else:
            weights["fp8"] += size * (4 if kind == "float32" else 2)
    layers, rank, rope = config.num_hidden_layers, config.kv_lora_rank, config.qk_rope_head_dim
    cache_bf16 = layers * config.latent_dim * 2
    cache_fp8 = layers * ROW_BYTES if (rank, rope) == (LATENT, ROPE) else None
    expanded = layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * 2
    fits = []
    for gb in GPU_GB:
        for gpus in GPU_COUNTS:
            for kind, size in weights.items():
                free = math.floor(gpus * gb * 10**9 * USABLE) - size
                fits.append(Fit(gpus, gb, kind, free // cache_bf16, None if cache_fp8 is None else free // cache_fp8))
    return Capacity(total, active, weights["bf16"], weights["fp8"], cache_bf16, cache_fp8, expanded, fits)


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _short(number: int) -> str:
    return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:,.2f} M"


def _tokens(fit: Fit) -> str:
    return f"{fit.tokens_bf16:,}" if fit.fits else "-"
