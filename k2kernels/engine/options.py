"""The checks of options that need the configuration alone: the command line makes them before it loads."""

from __future__ import annotations

from typing import Any

from k2kernels.engine.cache import PAGE_SIZE
from k2kernels.model.config import K2Config
from k2kernels.ops._check import Arguments
from k2kernels.reference.mla_cache import LATENT, ROPE

FLOAT32 = (2 - 2**-23) * 2.0**127  # the largest number of the type that logits are computed in


def check_float32(args: Arguments, name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless `value` is a number that float32 can hold."""
    try:
        held = abs(args.number(name, value)) <= FLOAT32
    except OverflowError:  # of an int
        held = False
    args.require(held, name, f"within +-{FLOAT32:.8g}, which float32 can hold", repr(value)[:60])


def check_options(
    args: Arguments,
    config: K2Config,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    speculative: bool,
    mtp_layers: int,
    cache_dtype: str,
    prefill_chunk: int | None,
) -> None:
    """Raises TypeError or ValueError for an option that `generate` does not take; `args` words the messages."""
    args.integer("max_new_tokens", max_new_tokens, 1)
    check_sampling(args, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if prefill_chunk is not None:
        args.integer("prefill_chunk", prefill_chunk, 1, remedy="or None for whole prompts")
    _check_model_options(args, config, speculative, mtp_layers, cache_dtype)
    if speculative:
        args.require(temperature == 0, "temperature", "0 with speculative=True (greedy)", temperature)


def check_engine(
    args: Arguments,
    config: K2Config,
    *,
    cache_tokens: int,
    max_batch_tokens: int | None,
    speculative: bool,
    mtp_layers: int,
    cache_dtype: str,
) -> None:
    """Raises TypeError or ValueError for an option that `Engine` does not take; `args` words the messages."""
    _check_model_options(args, config, speculative, mtp_layers, cache_dtype)
    args.integer("cache_tokens", cache_tokens, PAGE_SIZE)
    if max_batch_tokens is not None:
        args.integer("max_batch_tokens", max_batch_tokens, 1 + mtp_layers if speculative else 1)


def check_sampling(
    args: Arguments, *, temperature: float, top_k: int | None = None, top_p: float | None, seed: int | None
) -> None:
    """Raises TypeError or ValueError for how tokens are to be drawn."""
    check_float32(args, "temperature", temperature)
    args.require(temperature >= 0, "temperature", "0 or more", temperature)
    if top_k is not None:
        args.integer("top_k", top_k, 1)
    if top_p is not None:
        args.number("top_p", top_p)
        args.require(0 < top_p <= 1, "top_p", "above 0 and at most 1", top_p)
    if seed is not None:
        args.integer("seed", seed, 0)


def _check_model_options(
    args: Arguments, config: K2Config, speculative: bool, mtp_layers: int, cache_dtype: str
) -> None:
    args.choice("cache_dtype", cache_dtype, ("auto", "fp8"))
    dims = config.kv_lora_rank, config.qk_rope_head_dim
    wanted = f"'auto' for {dims[0]} latent and {dims[1]} rope dimensions ('fp8' has {LATENT} and {ROPE})"
    args.require(cache_dtype == "auto" or dims == (LATENT, ROPE), "cache_dtype", wanted, repr(cache_dtype))
    if args.boolean("speculative", speculative):
        args.require(mtp_layers > 0, "speculative", "False for a model without MTP layers", speculative)


def check_length(args: Arguments, config: K2Config, longest: int, max_new_tokens: int) -> None:
    """Raises ValueError where a prompt of `longest` tokens and the new ones exceed the model's context."""
    total, limit = longest + max_new_tokens, config.max_position_embeddings
    args.require(total <= limit, "prompt and max_new_tokens", f"at most {limit} tokens together", total)
