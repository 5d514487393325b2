"""4-bit weights in the order in which kernels read them: the public functions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from k2kernels.ops._check import Arguments
from k2kernels.ops.w4_gemm.formats import check_codes
from k2kernels.reference import w4_gemm as reference

KINDS = tuple(reference.SCALE_BYTES)  # "int4", "mxfp4"
PACKED_KINDS = (*KINDS, reference.INT4_WIDE)


class W4(NamedTuple):
    """Packed 4-bit weights. `packed_shape` and the README of csrc/w4_gemm have the layout."""

    data: Tensor  # uint8 [..., ceil(N/64), ceil(K/64), C]: codes and scales, C = 2304 (INT4) or 2176 (MXFP4)
    kind: str  # "int4", "mxfp4", or "int4_wide": INT4 with scales of 0.5 and more among them
    shape: tuple[int, ...]  # (E, N, K), or (N, K)
    gated: bool  # rows of gate (the first N/2) and up are interleaved by 8, for products with SwiGLU


def empty_w4(shape: tuple[int, ...], kind: str, *, gated: bool = False, device: str | torch.device | None = None) -> W4:
    """A W4 for weights of `shape`, (E, N, K) or (N, K), whose bytes are still to be packed: `pack_w4(..., out=)`.

    Raises:
        ValueError: for another kind, or sizes that are not served.
    """
    args = Arguments("empty_w4")
    args.choice("kind", kind, KINDS)
    args.boolean("gated", gated)
    shape = _served_shape(args, shape, gated)
    return W4(torch.empty(reference.packed_shape(kind, shape), dtype=torch.uint8, device=device), kind, shape, gated)


def pack_w4(codes: Tensor, scales: Tensor, *, gated: bool = False, out: Tensor | None = None) -> W4:
    """Packs codes and scales of weights for products. Nothing is rounded; `unpack_w4` is the exact inverse.

    One expert after the other is packed, on the device of the codes. It is a function for loading: it reads the values
    of the scales on the host. INT4 scales are below 0.5 in magnitude where weights are below 3.5; if not all are, the
    kind is "int4_wide", whose decoding takes more instructions, and which the portable kernel serves on every GPU.

    Args:
        codes, scales: int32 [E, N, K/8] with bfloat16 [E, N, K/32], or uint8 [E, N, K/2] with uint8 [E, N, K/32], as
            `quantize_int4_group32` and `quantize_mxfp4` make them; or of one matrix, without E.
        gated: the rows are those of gate, then those of up; the packed weights serve products with `swiglu=True`.
        out: uint8 [E, ceil(N/64), ceil(K/64), C] to pack into, such as a part of `empty_w4(...).data`, whose kind is
            "int4" or "mxfp4".

    Returns:
        W4, whose data is `out` if that is given.

    Raises:
        TypeError, ValueError: for dtypes, shapes and the meta device; for scales that have no packed form: NaN and
            infinity, E8M0 scales of more than 2 (bytes above 128), and with `out` those of INT4 of 0.5 and more in
            magnitude.
    """
    args = Arguments("pack_w4")
    args.boolean("gated", gated)
    codes, scales, kind = check_codes(args, codes, scales)
    args.require(
        not codes.is_meta, "codes", "on a device that holds data", "the meta device", "empty_w4 makes a W4 there"
    )
    *leading, n, columns = codes.shape
    shape = _served_shape(args, (*leading, n, columns * (8 if kind == "int4" else 2)), gated, "codes")
    if kind == "int4":
        below, wanted = reference.INT4_SCALES_BELOW, "below 0.5 in magnitude to be packed into out"
        if out is None and not (scales.abs() < below).all():
            kind, below, wanted = reference.INT4_WIDE, math.inf, "finite"
        bad = scales[~(scales.abs() < below)]
        args.require(bad.numel() == 0, "scales", wanted, lambda: bad[0].item())
    elif scales.numel():
        most = int(scales.max())
        wanted = f"E8M0 bytes of at most {reference.LARGEST_E8M0}, a scale of 2"
        args.require(most <= reference.LARGEST_E8M0, "scales", wanted, "255, which is NaN" if most == 255 else most)
    size = reference.packed_shape(kind, shape)
    if out is None:
        out = codes.new_empty(size, dtype=torch.uint8)
    else:
        out = args.tensor("out", out, size, torch.uint8)
        args.writable("out", out)
    for place in range(math.prod(leading)):
        i = (place,) if leading else ()
        reference.pack_into(out[i], codes[i], scales[i], kind, gated)
    return W4(out, kind, shape, gated)


def unpack_w4(w4: W4) -> tuple[Tensor, Tensor]:
    """The codes and scales that `pack_w4` was given, one expert after the other.

    Raises:
        TypeError, ValueError: for what is no W4.
    """
    args = Arguments("unpack_w4")
    w4 = check_w4(args, "w4", w4)
    *leading, n, k = w4.shape
    if not leading:
        return reference.unpack(w4.data, w4.kind, n, k, w4.gated)
    codes_dtype, in_code, scale_dtype = (
        (torch.uint8, 2, torch.uint8) if w4.kind == "mxfp4" else (torch.int32, 8, torch.bfloat16)
    )
    codes = w4.data.new_empty((*leading, n, k // in_code), dtype=codes_dtype)
    scales = w4.data.new_empty((*leading, n, k // reference.GROUP), dtype=scale_dtype)
    for expert, data in enumerate(w4.data):
        codes[expert], scales[expert] = reference.unpack(data, w4.kind, n, k, w4.gated)
    return codes, scales


def check_w4(args: Arguments, name: str, w: W4) -> W4:
    """`w`, a W4 whose fields agree."""
    if not isinstance(w, W4):
        raise TypeError(f"{args.op}: {name} must be a W4 as pack_w4 makes it, got {type(w).__name__}")
    args.choice(f"the kind of {name}", w.kind, PACKED_KINDS)
    args.boolean(f"gated of {name}", w.gated)
    shape = _served_shape(args, w.shape, w.gated, f"the shape of {name}")
    args.tensor(f"the data of {name}", w.data, reference.packed_shape(w.kind, shape), torch.uint8)
    return w


def _served_shape(args: Arguments, shape: tuple[int, ...], gated: bool, name: str = "shape") -> tuple[int, ...]:
    good = isinstance(shape, tuple) and len(shape) in (2, 3) and all(isinstance(size, int) for size in shape)
    wanted = "(E, N, K) or (N, K) with N and K above 0"
    args.require(good and min(shape[-2:]) > 0 and min(shape) >= 0, name, wanted, repr(shape))
    args.require(shape[-1] % reference.GROUP == 0, name, "of a K that is a multiple of 32", list(shape))
    args.require(not gated or shape[-2] % 2 == 0, name, "of an even N for gated weights", list(shape))
    return shape
