"""A checkpoint as an engine, if the device has room for it."""

from __future__ import annotations

from pathlib import Path

import torch

from k2kernels.engine import Engine
from k2kernels.engine.cache import PAGE_SIZE
from k2kernels.model import K2Config, K2Model
from k2kernels.model.capacity import USABLE, capacity, device_bytes, existing_device, gb

MOST_CACHE_TOKENS = 1 << 18  # unless more are asked for
GPU = 80 * 10**9  # the advice's, where the device is no GPU
MOST_GPUS = 64


def load_engine(
    path: Path,
    *,
    device: str = "cpu",
    keep_quantized: bool = False,
    cache_tokens: int | None = None,
    cache_dtype: str = "auto",
    max_batch_tokens: int | None = None,
    speculative: bool = False,
    progress: bool = True,
) -> Engine:
    """The model in the directory `path`, in an engine.

    Args:
        cache_tokens: None: as many as fit beside the weights, at most 262,144.
        The others: as in `K2Model.from_pretrained` and `Engine`.

    Raises:
        MemoryError: the weights and the cache, at least that of one context, are more than the device has room for;
            before any weight is read. It names --keep-quantized where that fits, or else a command of a server that
            divides the model.
        What those two raise.
    """
    config = K2Config.from_pretrained(path)
    memory = device_bytes(existing_device(device))
    cache_tokens = fit(path, config, memory, device, keep_quantized, cache_tokens, cache_dtype)
    model = K2Model.from_pretrained(path, device=device, keep_quantized=keep_quantized, progress=progress)
    return Engine(
        model,
        cache_tokens=cache_tokens,
        max_batch_tokens=max_batch_tokens,
        speculative=speculative,
        cache_dtype=cache_dtype,
    )


def fit(
    path: Path,
    config: K2Config,
    memory: int | None,
    device: str,
    keep_quantized: bool,
    cache_tokens: int | None,
    cache_dtype: str,
) -> int:
    """The tokens of the cache; MemoryError as in `load_engine`. An estimate: MTP layers are not counted."""
    sizes, width = capacity(config), getattr(torch, config.dtype).itemsize
    plain = sizes.weights_bf16 * width // 2
    stored = plain  # as the files hold the weights
    if config.quantization_config or keep_quantized:
        stored = sum(file.stat().st_size for file in path.glob("*.safetensors")) or plain
    weights = stored if keep_quantized else plain
    row = (sizes.cache_fp8 if cache_dtype == "fp8" else sizes.cache_bf16 * width // 2) or 0  # 0: Engine refuses it
    least = config.max_position_embeddings if cache_tokens is None else cache_tokens
    cache = least * row
    if memory is not None and weights + cache > memory * USABLE:
        needs = (
            f"{path}: needs {gb(weights + cache)} ({gb(weights)} of weights, {gb(cache)} of cache for {least:,} "
            f"tokens), has {gb(int(memory * USABLE))} (90% of the memory of {device!r}). "
        )
        if stored + cache <= memory * USABLE:
            raise MemoryError(
                f"{needs}It fits with --keep-quantized, which keeps the weights as the files hold them: {gb(stored)}"
            )
        gpu = memory if device.startswith("cuda") else GPU
        gpus = 2
        while gpus < MOST_GPUS and stored / gpus + cache > gpu * USABLE:  # each keeps the whole cache
            gpus *= 2
        raise MemoryError(
            f"{needs}A model beyond one device is served by vLLM with these kernels, here on {gpus} GPUs of "
            f"{gb(gpu)}:\n"
            f"    vllm serve {path} --attention-backend K2KERNELS_MLA --tensor-parallel-size {gpus}"
        )
    if cache_tokens is not None:
        return cache_tokens
    room = MOST_CACHE_TOKENS if memory is None or not row else int(memory * USABLE - weights) // row
    return max(min(room, MOST_CACHE_TOKENS), PAGE_SIZE)
