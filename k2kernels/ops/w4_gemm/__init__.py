"""4-bit weights of experts: their formats, the packed form that kernels read, and products with them.

E experts (groups), N rows and K columns of a weight; 32 neighbours along K share a scale.

- `formats`: quantize_int4_group32, quantize_mxfp4, dequantize_w4; codes and scales are those of the files.
- `packed`: W4, pack_w4, unpack_w4.
- `product`: grouped_w4_gemm, w4_gemm.
- `gradient`: what training adds, without checks: pack_masters, grouped_w4_gemm_dgrad.
"""

from k2kernels.ops.w4_gemm.formats import dequantize_w4, quantize_int4_group32, quantize_mxfp4
from k2kernels.ops.w4_gemm.packed import KINDS, W4, empty_w4, pack_w4, unpack_w4
from k2kernels.ops.w4_gemm.product import grouped_w4_gemm, w4_gemm

__all__ = [
    "KINDS",
    "W4",
    "dequantize_w4",
    "empty_w4",
    "grouped_w4_gemm",
    "pack_w4",
    "quantize_int4_group32",
    "quantize_mxfp4",
    "unpack_w4",
    "w4_gemm",
]
