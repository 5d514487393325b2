"""4-bit weights as files hold them, codes and scales apart: the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments, short
from k2kernels.reference import w4_gemm as reference


def quantize_int4_group32(w: Tensor, *, q_min: int = -7) -> tuple[Tensor, Tensor]:
    """INT4 with a bfloat16 scale for 32 neighbours along K: w is about q * s, with q in q_min .. 7.

    s = bfloat16(amax / 7), or amax / 7.5 for q_min=-8; q = w / s, rounded half to even and clamped. Everything is
    computed in float32; the division is by the *rounded* scale, the one that a reader multiplies by. A group of zeros
    gets the scale 2**-7.

    Args:
        w: [..., N, K], K a multiple of 32; float32, bfloat16, float16 or float64 (rounded to float32 first).
        q_min: -7, the grid of Kimi-K2, with which quantising bfloat16 weights again changes nothing; or -8, that of
            compressed-tensors.

    Returns:
        codes int32 [..., N, K/8], q + 8, the code of k at bits 4 (k mod 8) of word k div 8; scales bfloat16
        [..., N, K/32]. Not differentiable.

    Raises:
        TypeError, ValueError: for dtype, shape and q_min, and, on a CPU, for NaN or infinity in w.

    Source: compressed-tensors' `pack-quantized`; the grid is that of Kimi-K2-Thinking.
    """
    args = Arguments("quantize_int4_group32")
    w = _weight(args, w)
    args.integer("q_min", q_min, -8, -7)
    return reference.quantize_int4_group32(w.detach(), q_min)


def quantize_mxfp4(w: Tensor, *, scale_rule: str = "even") -> tuple[Tensor, Tensor]:
    """MXFP4: E2M1 codes with an E8M0 scale, a power of two, for 32 neighbours along K.

    Codes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with a sign; w / s is rounded to the nearest, half to the even code, and
    saturates at 6.

    Args:
        w: [..., N, K], K a multiple of 32; float32, bfloat16, float16 or float64 (rounded to float32 first).
        scale_rule: the exponent of s is that of amax less 2. "even": of amax rounded up to the next power of two from
            1.75 times a power of two on, so that w / s is below 7 (compressed-tensors). "floor": of amax as it is (the
            OCP specification).

    Returns:
        codes uint8 [..., N, K/2], the even k in the low nibble; scales uint8 [..., N, K/32], 2**(byte - 127). Not
        differentiable.

    Raises:
        TypeError, ValueError: for dtype, shape and scale_rule, and, on a CPU, for NaN or infinity in w.

    Source: OCP Microscaling Formats 1.0; compressed-tensors' `mxfp4-pack-quantized`.
    """
    args = Arguments("quantize_mxfp4")
    w = _weight(args, w)
    args.choice("scale_rule", scale_rule, ("even", "floor"))
    return reference.quantize_mxfp4(w.detach(), scale_rule)


def dequantize_w4(codes: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """q * s, rounded once to `dtype`; float32 and float64 hold it exactly, bfloat16 does for MXFP4.

    Args:
        codes: int32 [..., N, K/8] or uint8 [..., N, K/2], as `quantize_int4_group32` and `quantize_mxfp4` make them.
        scales: bfloat16 or uint8 [..., N, K/32], likewise. Where one is NaN (E8M0: 255), so are the weights.
        dtype: bfloat16, the weights that all products use; or float32, float16, float64.

    Returns:
        [..., N, K] in `dtype`. Not differentiable.

    Raises:
        TypeError, ValueError: for dtypes and shapes.
    """
    args = Arguments("dequantize_w4")
    codes, scales, _ = check_codes(args, codes, scales)
    args.choice("dtype", dtype, FLOATS)
    return reference.dequantize_w4(codes, scales, dtype)


def check_codes(args: Arguments, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, str]:
    """The checked codes and scales of a call, and their kind."""
    codes = args.tensor("codes", codes, ("...", "N", "K/8 or K/2"), (torch.int32, torch.uint8))
    kind, in_code, scale_dtype = (
        ("int4", 8, torch.bfloat16) if codes.dtype == torch.int32 else ("mxfp4", 2, torch.uint8)
    )
    *leading, n, columns = codes.shape
    group = reference.GROUP
    wanted = f"of K / {in_code} columns for a K that is a multiple of {group}, in {short(codes.dtype)}"
    args.require(columns > 0 and columns * in_code % group == 0, "codes", wanted, codes.shape)
    args.require(n > 0, "codes", "of one row or more", codes.shape)
    scales = args.tensor("scales", scales, (*leading, n, columns * in_code // group), scale_dtype)
    args.no_gradient(scales=scales)
    return codes, scales, kind


def _weight(args: Arguments, w: Tensor) -> Tensor:
    w = args.tensor("w", w, ("...", "N", "K"), FLOATS)
    args.require(
        w.shape[-1] > 0 and w.shape[-1] % reference.GROUP == 0, "w", "of a K that is a multiple of 32", w.shape
    )
    single = w.float() if w.dtype == torch.float64 else w
    if w.device.type == "cpu" and not torch.compiler.is_compiling():
        wanted = "finite" if single is w else "finite in float32"
        args.require(bool(single.isfinite().all()), "w", wanted, lambda: _infinite(w))
    return single


def _infinite(w: Tensor) -> str:
    """What is too large for float32 in w, for a message."""
    return f"numbers up to {float(w.abs().max()):g}" if w.isfinite().all() else "NaN or infinity"
