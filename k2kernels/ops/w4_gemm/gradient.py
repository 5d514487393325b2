"""4-bit weights in training: ops without checks, for compositions and for the backward pass of products.

Each is one op, so that a compiled graph has one node for the experts of a layer, not some for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.ops._check import Arguments
from k2kernels.ops._register import declare
from k2kernels.ops.grouped_gemm import _launching
from k2kernels.ops.quant import _swiglu_backward
from k2kernels.ops.w4_gemm.packed import W4
from k2kernels.reference import _w4_training as reference
from k2kernels.reference.w4_gemm import (
    INT4_SCALES_BELOW,
    LARGEST_E8M0,
    dequantize_w4,
    packed_shape,
    quantize_int4_group32,
    quantize_mxfp4,
    unpack,
)

SCRATCH = 1 << 28  # elements of weights that are dequantised at a time, of 2 bytes: 9 experts of Kimi-K2's gate and up


def pack_masters(w: Tensor, kind: str) -> W4:
    """`pack_w4(*quantize_int4_group32(w))` or MXFP4's of w [G, N, K], one expert at a time. The host does not wait.

    Raises:
        ValueError: on a CPU, for NaN or infinity in w, for INT4 scales of 0.5 and more and MXFP4 scales of more than
            2. On a GPU, such weights multiply as NaN or infinity.
    """
    return W4(_w4_pack_masters(w.detach(), kind), kind, tuple(w.shape), False)


def _check_masters(w: Tensor, kind: str) -> None:
    args = Arguments("grouped_w4_linear")  # the public function that comes here
    remedy = "divide w by a power of two, and multiply the result by it"
    remedy = remedy if kind == "mxfp4" else f"kind='mxfp4' takes weights below 14; or {remedy}"
    for weight in w:
        args.require(weight.isfinite().all(), "w", "finite", "NaN or infinity")
        largest = weight.abs().amax().expand(1, 32)
        if kind == "mxfp4":
            most, limit = int(quantize_mxfp4(largest, "even")[1]), LARGEST_E8M0 + 1
            wanted = f"E8M0 bytes of at most {LARGEST_E8M0}, a scale of 2 (weights below 14)"
        else:
            most, limit = float(quantize_int4_group32(largest, -7)[1]), INT4_SCALES_BELOW
            wanted = f"below {limit} in magnitude (weights below 3.49)"
        args.require(most < limit, "the scales of w", wanted, most, remedy)


def _launch_pack(data: Tensor, w: Tensor, kind: str) -> None:
    reference.w4_pack_masters_into(data, w, kind)  # by PyTorch's kernels, on any device


_w4_pack_masters = declare(
    reference.w4_pack_masters,
    outputs=lambda w, kind: w.new_empty(packed_shape(kind, w.shape), dtype=torch.uint8),
    launch=_launch_pack,
    validate=_check_masters,
)


def _launch_dgrad(
    d_a: Tensor,
    grad: Tensor,
    a: Tensor | None,
    data: Tensor,
    offsets: Tensor,
    counts: Tensor,
    kind: str,
    n: int,
    k: int,
    expected: int | None,
) -> None:
    experts, rows = data.shape[0], grad.shape[0] if expected is None else expected
    step = max(1, SCRATCH // (n * k))
    weights = grad.new_empty((min(step, experts), n, k))

    def multiply(function: str, x: Tensor, into: Tensor) -> None:
        """Some experts after the others; each writes its own rows."""
        for first in range(0, experts, step):
            some = data[first : first + step]
            for place, one in zip(weights, some):
                place.copy_(dequantize_w4(*unpack(one, kind, n, k, a is not None), grad.dtype))
            groups = offsets[first : first + len(some) + 1], counts[first : first + len(some)]
            _launching(function)(into, x, weights[: len(some)], *groups, -(-rows * len(some) // experts))

    if a is not None:
        product = grad.new_empty((grad.shape[0], n))
        multiply("grouped_gemm", a, product)
        grad = _swiglu_backward.kernel(grad, product)
    multiply("grouped_gemm_dgrad", grad, d_a)


grouped_w4_gemm_dgrad = declare(
    reference.grouped_w4_gemm_dgrad,
    outputs=lambda grad, k: grad.new_empty((grad.shape[0], k)),
    launch=_launch_dgrad,
)
