"""k2kernels: kernels, a thin model and the MuonClip optimizer for the Kimi-K2 / DeepSeek-V3 family."""

import importlib
from types import ModuleType

from k2kernels._backend import PeerTimeout, UnsupportedError, backend, emulated, launch_count
from k2kernels._info import info
from k2kernels.functional.fp8_linear import fp8_linear, grouped_fp8_linear
from k2kernels.functional.moe_mlp import moe_mlp
from k2kernels.functional.w4_linear import fake_quantize_int4, fake_quantize_mxfp4, grouped_w4_linear
from k2kernels.ops.fp8_gemm import (
    fp8_gemm,
    fp8_gemm_swiglu,
    grouped_fp8_gemm,
    grouped_fp8_gemm_swiglu,
    grouped_fp8_wgrad,
)
from k2kernels.ops.mla_cache import mla_append, mla_gather
from k2kernels.ops.mla_decode import MlaOutput, merge_attention_states, mla_decode
from k2kernels.ops.mla_prefill import mla_prefill, mla_prefill_piece
from k2kernels.ops.moe import (
    Dispatched,
    Routing,
    moe_combine,
    moe_dispatch,
    moe_route,
    moe_sequence_loss,
    moe_update_bias,
)
from k2kernels.ops.newton_schulz import newton_schulz, newton_schulz_grouped
from k2kernels.ops.quant import dequantize, quantize_1x128, quantize_128x128, rms_norm_quantize, swiglu, swiglu_quantize
from k2kernels.ops.w4_gemm import (
    W4,
    dequantize_w4,
    grouped_w4_gemm,
    pack_w4,
    quantize_int4_group32,
    quantize_mxfp4,
    unpack_w4,
    w4_gemm,
)

__version__ = "0.1.0"

__all__ = [
    "W4",
    "Dispatched",
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


def __getattr__(name: str) -> ModuleType:
    """Imports a part of the package when it is first named: `k2kernels.model.K2Model`."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f"k2kernels.{name}")
    raise AttributeError(f"module 'k2kernels' has no attribute {name!r}")
