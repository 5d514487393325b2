"""`rope_scaling` and `quantization_config` of config.json: each in one form, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from k2kernels._backend import UnsupportedError
from k2kernels.model import compressed_tensors
from k2kernels.ops._check import Arguments

check = Arguments("K2Config")
LEAST, MOST = 1e-30, 1e30  # of numbers that are no sizes
# The largest sizes, far above every model's: a damaged file must not make loops and tensors without end. The products
# of several stay below 2**63 bytes.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**22,
    "num_hidden_layers": 10_000,
    "num_nextn_predict_layers": 1_000,
    "num_attention_heads": 2**16,
    "q_lora_rank": 2**22,
    "kv_lora_rank": 2**22,
    "qk_nope_head_dim": 2**16,
    "qk_rope_head_dim": 2**16,
    "v_head_dim": 2**16,
    "intermediate_size": 2**24,
    "moe_intermediate_size": 2**22,
    "n_routed_experts": 2**14,
    "n_shared_experts": 2**10,
}
LARGEST_OTHER = 2**31 - 1

_ROPE_KEYS = {
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
}


def rope_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from either style; a file with both must have the same values in both."""
    found: dict[str, Any] = {}
    for style in ("rope_parameters", "rope_scaling"):
        rope = values.get(style)
        if rope is None:
            continue
        check.require(isinstance(rope, Mapping), style, "an object or null", repr(rope))
        scaling = normalise_rope(rope)
        if "rope_scaling" in found and found["rope_scaling"] != scaling:
            raise ValueError(f"K2Config: rope_scaling must agree with rope_parameters, got {scaling} and {found}")
        found["rope_scaling"] = scaling
        if rope.get("rope_theta") is not None:
            found["rope_theta"] = rope["rope_theta"]
    theta = values.get("rope_theta")
    if theta is not None and found.setdefault("rope_theta", theta) != theta:
        raise ValueError(
            f"K2Config: rope_theta must agree with the one in rope_parameters, got {theta} and {found['rope_theta']}"
        )
    return found


def normalise_rope(rope: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """None for plain RoPE; else YaRN's parameters with the defaults filled in (transformers' ones)."""
    if rope is None:
        return None
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedError(f"K2Config: partial_rotary_factor must be 1, got {rope['partial_rotary_factor']}")
    if kind == "default":
        return None
    if kind != "yarn":
        raise UnsupportedError(f"K2Config: rope_scaling must be of type 'yarn' or 'default', got {kind!r}")
    unknown = set(rope) - _ROPE_KEYS - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    check.require(not unknown, "rope_scaling", "made of " + ", ".join(sorted(_ROPE_KEYS)), sorted(unknown))
    for key in ("factor", "original_max_position_embeddings"):
        check.require(rope.get(key) is not None, "rope_scaling", f"given with {key!r} for yarn", dict(rope))

    def value(key: str, default: float) -> float:
        got = rope.get(key)
        return default if got is None else got

    result = {
        "rope_type": "yarn",
        "factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": value("beta_fast", 32.0),
        "beta_slow": value("beta_slow", 1.0),
        "mscale": value("mscale", 1.0),
        "mscale_all_dim": value("mscale_all_dim", 0.0),
        "attention_factor": rope.get("attention_factor"),
        "truncate": value("truncate", True),
    }
    for key in ("beta_fast", "beta_slow"):
        check_number(f"rope_scaling.{key}", result[key], positive=True)
    for key in ("mscale", "mscale_all_dim"):
        check_number(f"rope_scaling.{key}", result[key])
    if result["attention_factor"] is not None:
        check_number("rope_scaling.attention_factor", result["attention_factor"], positive=True)
    check_number("rope_scaling.factor", result["factor"])
    check.require(result["factor"] >= 1, "rope_scaling.factor", "1 or more", result["factor"])
    check_size("rope_scaling.original_max_position_embeddings", result["original_max_position_embeddings"], 1)
    check.require(
        isinstance(result["truncate"], bool), "rope_scaling.truncate", "true or false", repr(result["truncate"])
    )
    return result


def normalise_quantization(quantization: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """None, block FP8 as DeepSeek writes it, or 4-bit weights as compressed-tensors writes them."""
    if quantization is None:
        return None
    check.require(isinstance(quantization, Mapping), "quantization_config", "an object or null", repr(quantization))
    method = quantization.get("quant_method")
    if method == compressed_tensors.METHOD:
        compressed_tensors.schemes(quantization)
        return dict(quantization)
    if method != "fp8":
        raise UnsupportedError(
            f"K2Config: quantization_config.quant_method must be 'fp8' or '{compressed_tensors.METHOD}', got {method!r}"
        )
    if quantization.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise UnsupportedError(f"K2Config: quantization_config.fmt must be 'e4m3', got {quantization['fmt']!r}")
    block = quantization.get("weight_block_size")
    if block is None:
        raise UnsupportedError(
            "K2Config: quantization_config.weight_block_size must be given, e.g. [128, 128]; FP8 with one scale per "
            "tensor or per row is not supported"
        )
    good = isinstance(block, (list, tuple)) and len(block) == 2 and all(is_int(b) and 0 < b < 2**31 for b in block)
    check.require(good, "quantization_config.weight_block_size", "two positive integers", block)
    return {**quantization, "weight_block_size": list(block)}


def is_int(value: Any) -> bool:
    """Whether `value` is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(name: str, value: Any, positive: bool = False) -> None:
    """Raises ValueError unless `value`, of a JSON file, is a number that float32 computes with."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (LEAST <= value <= MOST or (value == 0 and not positive)):
        return
    wanted = "a finite number above 0" if positive else "a finite number of 0 or more"
    if number and 0 < value < math.inf:
        wanted += f", from {LEAST} to {MOST}"
    check.require(False, name, wanted, _brief(value))


def check_size(name: str, value: Any, low: int) -> None:
    """Raises ValueError unless `value` is an int of at least `low` and no more than any model may have."""
    most = LARGEST.get(name, LARGEST_OTHER)
    if not (is_int(value) and low <= value <= most):
        too_large = is_int(value) and value > most
        check.require(False, name, f"an int in {low} .. {most}" if too_large else f"an int >= {low}", _brief(value))


def _brief(value: Any) -> str:
    if is_int(value) and abs(value) >= 10**40:  # Python refuses to print the largest
        return f"an int of {value.bit_length()} bits"
    return repr(value)
