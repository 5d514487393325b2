"""What training adds to 4-bit weights: masters packed in one op, and gradients through packed weights.

Both go expert by expert: beside results and arguments, the memory is that of one expert in high precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.reference.quant import swiglu_backward
from k2kernels.reference.w4_gemm import (
    LARGEST_E8M0,
    dequantize_w4,
    pack_into,
    packed_shape,
    quantize_int4_group32,
    quantize_mxfp4,
    unpack,
)


def w4_pack_masters(w: Tensor, kind: str) -> Tensor:
    """The packed bytes of w [G, N, K] quantised to a kind. An INT4 scale of 0.5 and more becomes infinity, and
    an MXFP4 scale of more than 2."""
    data = w.new_empty(packed_shape(kind, w.shape), dtype=torch.uint8)
    w4_pack_masters_into(data, w, kind)
    return data


def w4_pack_masters_into(data: Tensor, w: Tensor, kind: str) -> None:
    """`w4_pack_masters` into `data`."""
    for place, weight in zip(data, w):
        codes, scales = quantize_int4_group32(weight, -7) if kind == "int4" else quantize_mxfp4(weight, "even")
        if kind == "mxfp4":
            scales.clamp_(max=LARGEST_E8M0 + 1)  # whose packed byte is the exponent of infinity
        pack_into(place, codes, scales, kind, False)


def grouped_w4_gemm_dgrad(
    grad: Tensor,
    a: Tensor | None,
    data: Tensor,
    offsets: Tensor,
    counts: Tensor,
    kind: str,
    n: int,
    k: int,
    expected: int | None,
) -> Tensor:
    """Gradient of `grouped_w4_gemm` with respect to its a, [S, K]; zeros in pad rows. With a, of the product with
    SwiGLU, which is computed again."""
    out = grad.new_zeros((grad.shape[0], k))
    for expert, (start, count) in enumerate(zip(offsets.tolist(), counts.tolist())):
        if count:
            rows = slice(start, start + count)
            weight = dequantize_w4(*unpack(data[expert], kind, n, k, a is not None), grad.dtype)
            d = grad[rows] if a is None else swiglu_backward(grad[rows], torch.mm(a[rows], weight.t()))
            torch.mm(d, weight, out=out[rows])
    return out
