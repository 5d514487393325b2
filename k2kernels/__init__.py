"""k2kernels: kernels, a thin model and the MuonClip optimizer for the Kimi-K2 / DeepSeek-V3 family.

The ops are registered with PyTorch's dispatcher at once where torch has been imported before, so that
`import torch, k2kernels` is all that `torch.ops.k2kernels` and exported programs need. Where it has not, torch is
imported when a name of this package is first used: the help of the command line does without.
"""

import importlib
import sys
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


if "torch" in sys.modules:
    importlib.import_module("k2kernels._api")
