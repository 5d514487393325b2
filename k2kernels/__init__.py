"""k2kernels: kernels, a thin model and the MuonClip optimizer for the Kimi-K2 / DeepSeek-V3 family.

PyTorch is imported, and the ops are registered with its dispatcher, when a name of this package is first used. A
program that calls `torch.ops.k2kernels` alone, as exported ones do, uses one before: `from k2kernels import backend`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2kernels._api import *

__version__ = "0.1.0"

__all__ = [
    "W4",
    "Dispatched",
    "LogProbs",
    "MlaOutput",
    "PeerTimeout",
    "Routing",
    "UnsupportedError",
    "backend",
    "dequantize",
    "dequantize_w4",
    "emulated",
    "fake_quantize_int4",
    "fake_quantize_mxfp4",
    "fp8_gemm",
    "fp8_gemm_swiglu",
    "fp8_linear",
    "grouped_fp8_gemm",
    "grouped_fp8_gemm_swiglu",
    "grouped_fp8_linear",
    "grouped_fp8_wgrad",
    "grouped_w4_gemm",
    "grouped_w4_linear",
    "info",
    "launch_count",
    "linear_log_probs",
    "merge_attention_states",
    "mla_append",
    "mla_decode",
    "mla_gather",
    "mla_prefill",
    "mla_prefill_piece",
    "moe_combine",
    "moe_dispatch",
    "moe_mlp",
    "moe_route",
    "moe_sequence_loss",
    "moe_update_bias",
    "newton_schulz",
    "newton_schulz_grouped",
    "pack_w4",
    "quantize_1x128",
    "quantize_128x128",
    "quantize_int4_group32",
    "quantize_mxfp4",
    "rms_norm_quantize",
    "swiglu",
    "swiglu_quantize",
    "unpack_w4",
    "w4_gemm",
]

_SUBPACKAGES = ("engine", "integrations", "model", "optim", "parallel", "testing", "train")


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"k2kernels.{name}")
    if name in __all__:
        value = globals()[name] = getattr(importlib.import_module("k2kernels._api"), name)
        return value
    raise AttributeError(f"module 'k2kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__, *_SUBPACKAGES]
