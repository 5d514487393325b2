"""What a model costs in memory: weights, cache per token, what fits on how many GPUs. Arithmetic, no measurement."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from k2kernels.model.config import K2Config
from k2kernels.ops._check import Arguments
from k2kernels.reference import w4_gemm
from k2kernels.reference.mla_cache import LATENT, ROPE, ROW_BYTES

GPU_GB = (80, 141)  # A100 / H100, H200; in units of 10^9 bytes
GPU_COUNTS = (1, 2, 4, 8, 16, 32)
KINDS = {"bf16": "BF16", "fp8": "FP8", "int4": "INT4", "mxfp4": "MXFP4"}  # of weights
USABLE = 0.9  # the rest is left to activations and buffers; an assumption


class Fit(NamedTuple):
    """Tokens of cache that remain beside the weights; below 0 if the weights alone do not fit."""

    gpus: int
    gpu_gb: int
    weights: str  # bf16, fp8, int4 or mxfp4: of 4 bits are the routed experts alone, the rest being bf16
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
    weights_int4: int  # routed experts as pack_w4 packs them
    weights_mxfp4: int
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
            f"weights in BF16       {gb(self.weights_bf16)}",
            f"weights in FP8        {gb(self.weights_fp8)}",
            f"  experts in INT4     {gb(self.weights_int4)} (the rest in BF16)",
            f"  experts in MXFP4    {gb(self.weights_mxfp4)}",
            f"cache per token BF16  {per_token(self.cache_bf16)}",
            f"cache per token FP8   {per_token(self.cache_fp8)}",
            f"  expanded K and V    {per_token(self.cache_expanded)} "
            f"({self.cache_expanded / self.cache_bf16:.1f} times the latent)",
            "",
            f"Tokens of BF16 cache beside the weights, on {USABLE:.0%} of the memory (an estimate: weights and cache",
            "spread evenly over the GPUs; if each keeps the whole cache, as in tensor parallelism, divide by their",
            "number; -: the weights do not fit):",
            "",
            "GPUs" + "".join(f"{f'{gb} GB, {name}':>14}" for gb in GPU_GB for name in KINDS.values()),
        ]
        for gpus in GPU_COUNTS:
            cells = [_tokens(fit) for fit in self.fits if fit.gpus == gpus]
            lines.append(f"{gpus:>4}" + "".join(f"{cell:>14}" for cell in cells))
        return "\n".join(lines)

    def format_on(self, gpus: int, gpu_bytes: int) -> str:
        """Which kinds of weights fit on `gpus` GPUs of `gpu_bytes`, and what is left for the cache; to print.

        Raises:
            ValueError: fewer than one GPU.
        """
        Arguments("info").integer("gpus", gpus, 1)
        usable = math.floor(gpus * gpu_bytes * USABLE)
        lines = [
            f"{gpus} GPUs of {gpu_bytes / 1e9:g} GB, of which {USABLE:.0%} may be filled: {gb(usable)}",
            "",
            f"{'weights':<24}{'size':>12}{'left':>18}{'tokens, BF16':>16}{'tokens, FP8':>16}",
        ]
        for kind, name in KINDS.items():
            size = getattr(self, f"weights_{kind}")
            free = usable - size
            tokens = ((free // row if row and free >= 0 else None) for row in (self.cache_bf16, self.cache_fp8))
            left = gb(free) if free >= 0 else f"short {gb(-free)}"
            cells = "".join(f"{'-' if cell is None else f'{cell:,}':>16}" for cell in tokens)
            lines.append(f"{name:<24}{gb(size):>12}{left:>18}{cells}")
        return "\n".join(
            [
                *lines,
                "",
                "left: for the cache, in tokens of all GPUs together (divide by their number if each keeps the whole",
                "cache), activations and buffers. INT4, MXFP4: of the routed experts, all else in BF16. An estimate;",
                "--serve shows what each rank of a layout holds.",
            ]
        )


def capacity(config: K2Config) -> Capacity:
    """The memory that a model of `config` takes. Needs no weights."""
    total, active = config.parameter_counts()
    weights = dict.fromkeys(KINDS, 0)
    for count, shape, kind in config.tensors():
        size = count * math.prod(shape)
        plain = size * (4 if kind == "float32" else 2)
        weights["bf16"] += plain
        if kind in ("quantised", "expert"):
            weights["fp8"] += size + 4 * count * math.prod(-(-n // 128) for n in shape)
        else:
            weights["fp8"] += plain
        for w4 in w4_gemm.SCALE_BYTES if kind != "expert" else ():
            weights[w4] += plain
    experts = sum(map(config.is_moe_layer, range(config.num_hidden_layers))) * config.n_routed_experts
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    for w4 in w4_gemm.SCALE_BYTES:
        for shape in ((2 * intermediate, hidden), (hidden, intermediate)):
            weights[w4] += experts * math.prod(w4_gemm.packed_shape(w4, shape))
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
    return Capacity(total, active, *(weights[kind] for kind in KINDS), cache_bf16, cache_fp8, expanded, fits)


def existing_device(device: torch.device | str, args: Arguments | None = None) -> torch.device:
    """The device to load to; ValueError, in the words of `args`, if this machine lacks it, or it holds no data."""
    args = args or Arguments("from_pretrained")
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # an unknown name; a device without a driver
        reason = str(error).splitlines()[0]
        args.require(False, "device", "one of this machine", f"{device!r} ({reason})")
    args.require(found.type != "meta", "device", "one that holds data", f"{device!r}; K2Model(config) needs no files")
    return found


def device_bytes(device: torch.device) -> int | None:
    """The memory of a GPU, or of this machine with its swap space and within its container; None if not known.

    All of it, whether in use or not: what is more cannot be held.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    swap = 0
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        swap = sum(1024 * int(line.split()[1]) for line in lines if line.startswith("SwapTotal:"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups, v2 and v1
        with contextlib.suppress(OSError, ValueError):
            size = min(size, int(Path("/sys/fs/cgroup", limit).read_text()))
    return size + swap


def gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _short(number: int) -> str:
    return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:,.2f} M"


def _tokens(fit: Fit) -> str:
    return f"{fit.tokens_bf16:,}" if fit.fits else "-"
