"""compressed-tensors' `quantization_config`: which 4-bit weights are served, and the entry that we write.

The files decide which modules are packed (see `packed`); the configuration must be of a kind that is served.

Source: compressed-tensors 0.20 (`quantization/quant_args.py`, `quant_scheme.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from k2kernels._backend import UnsupportedError

METHOD = "compressed-tensors"
FORMATS = {"pack-quantized": "int4", "mxfp4-pack-quantized": "mxfp4"}  # kinds of `k2kernels.ops.w4_gemm`
MIXED = "mixed-precision"  # each group has a format of its own
GROUP_SIZES = {"int4": (32, 64, 128), "mxfp4": (32,)}
# What Kimi-K2-Thinking and later leave in BF16: all but the routed experts. The router is no linear layer there.
_IGNORED = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
]


class Scheme(NamedTuple):
    """How weights of a group of modules are stored."""

    kind: str  # "int4" or "mxfp4"
    group_size: int  # neighbours along K that share a scale


def schemes(quantization: Mapping[str, Any]) -> set[Scheme]:
    """Those of a quantization_config's groups.

    Raises:
        UnsupportedError: names the first entry that is not served.
    """
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _refuse("config_groups", "an object with one group or more", groups)
    for key, what in (
        ("kv_cache_scheme", "a quantised cache"),
        ("sparsity_config", "sparse weights"),
        ("transform_config", "weights that were rotated"),
    ):
        value = quantization.get(key)
        dense = isinstance(value, Mapping) and value.get("format") == "dense"
        if value and not dense:
            _refuse(key, f"null or empty ({what} cannot be served)", value)
    return {_scheme(f"config_groups.{name}", group, quantization.get("format")) for name, group in groups.items()}


def _scheme(where: str, group: Any, format: Any) -> Scheme:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        _refuse(where, "an object with `weights`", group)
    format = group.get("format") or format
    if format == "nvfp4-pack-quantized":
        _refuse(f"format of {where}", f"one of {', '.join(FORMATS)}; NVFP4 is not served", format)
    if not isinstance(format, str) or format not in FORMATS:
        _refuse(f"format of {where}", f"one of {', '.join(FORMATS)}", format)
    kind, weights = FORMATS[format], group["weights"]
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            _refuse(f"{where}.{key}", "null: activations stay in bfloat16", group[key])
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size in (None, 0, -1) else "group")
    for key, value, wanted in (
        ("num_bits", weights.get("num_bits"), (4,)),
        ("type", weights.get("type", "int"), ("int",) if kind == "int4" else ("float",)),
        ("symmetric", weights.get("symmetric", True), (True,)),
        ("strategy", strategy, ("group",)),
        ("group_size", size, GROUP_SIZES[kind]),
        ("dynamic", weights.get("dynamic", False), (False,)),
        ("actorder", weights.get("actorder"), (None, "weight", "static")),  # which change nothing in the files
        ("scale_dtype", weights.get("scale_dtype"), (None, "torch.uint8") if kind == "mxfp4" else (None, _BF16)),
    ):
        if value not in wanted or type(value) not in {type(one) for one in wanted}:
            why = {"symmetric": " (zero points)", "actorder": " (g_idx)"}.get(key, "")
            _refuse(f"{where}.weights.{key}{why}", " or ".join(map(repr, wanted)), value)
    return Scheme(kind, size)


_BF16 = "torch.bfloat16"


def quantization_config(kind: str) -> dict[str, Any]:
    """The entry for a model whose routed experts are of a kind."""
    weights: dict[str, Any] = {
        "num_bits": 4,
        "type": "int" if kind == "int4" else "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
        "actorder": None,
    }
    if kind == "mxfp4":
        weights["scale_dtype"] = "torch.uint8"
    format = next(format for format, of in FORMATS.items() if of == kind)
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": format,
    }
    return {
        "quant_method": METHOD,
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(_IGNORED),
        "kv_cache_scheme": None,
    }


def _refuse(name: str, wanted: str, got: Any) -> NoReturn:
    raise UnsupportedError(f"K2Config: quantization_config.{name} must be {wanted}, got {got!r}")
