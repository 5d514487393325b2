"""The public functions and classes of `k2kernels`, which imports this file when one of them is first named."""

# ruff: noqa: F401
from k2kernels._backend import PeerTimeout, UnsupportedError, backend, emulated, launch_count
from k2kernels._info import info
from k2kernels.functional.fp8_linear import fp8_linear, grouped_fp8_linear
from k2kernels.functional.linear_log_probs import LogProbs, linear_log_probs
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
