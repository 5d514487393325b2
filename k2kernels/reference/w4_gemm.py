"""4-bit weights and their products in plain PyTorch: the definitions.

Codes and scales are those of compressed-tensors' files; K runs along the contiguous axis, 32 neighbours share a scale:

    kind     codes                                 scales
    int4     int32 [..., N, K/8], q + 8            bfloat16 [..., N, K/32]
    mxfp4    uint8 [..., N, K/2], E2M1             uint8 [..., N, K/32], E8M0: 2**(byte - 127), 255 is NaN

In the bytes of both the code of an even k is the low nibble. The weight is w = bfloat16(q * s), rounded once.

The packed bytes, uint8 [..., ceil(N/64), ceil(K/64), C], are in the order of a kernel's reads: csrc/w4_gemm/README.md.
INT4 with scales that "int4" cannot hold packed is the packed kind "int4_wide", which has the scales as they are.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from k2kernels.reference.quant import swiglu as _swiglu

GROUP = 32  # neighbours along K that share a scale
CHUNK = 64  # rows and columns of the weights in a chunk of the packed bytes
CODE_BYTES = 2048  # of a chunk
SCALE_BYTES = {"int4": 2, "mxfp4": 1}
INT4_OFFSET = 8  # of a stored code
# Packed scales are multiples of those of the files, with which a kernel multiplies fields of a word as they are.
INT4_SCALES_BELOW = 0.5  # in magnitude: 2**129 * scale is packed, in bfloat16
INT4_WIDE = "int4_wide"
LARGEST_E8M0 = 128  # that can be packed: a scale of 2
PACKED_E8M0 = 126  # is added to a packed scale, so that it is the exponent field of the bfloat16 2**126 * scale
EMPTY_SCALE = 2.0**-7  # of a group of zeros, as in compressed-tensors

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def quantize_int4_group32(w: Tensor, q_min: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of w [..., N, K]; computed in float32, scales rounded to bfloat16 before the division."""
    groups = w.float().contiguous().unflatten(-1, (-1, GROUP))
    amax = groups.abs().amax(-1)
    # Divided by a tensor: by a Python number, PyTorch multiplies with the rounded reciprocal on a GPU.
    scales = (amax / torch.full_like(amax, (7 - q_min) / 2)).bfloat16()
    scales = torch.where(scales == 0, EMPTY_SCALE, scales)
    q = (groups / scales.float()[..., None]).round_().clamp_(q_min, 7)
    nibbles = q.to(torch.int8).flatten(-2) + INT4_OFFSET
    return _in_bytes(nibbles.view(torch.uint8)).view(torch.int32), scales


def quantize_mxfp4(w: Tensor, scale_rule: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of w [..., N, K]; every step is exact in float32 but the rounding to codes."""
    groups = w.float().contiguous().unflatten(-1, (-1, GROUP))
    amax = groups.abs().amax(-1)
    carry = 1 << 21 if scale_rule == "even" else 0  # a quarter of the mantissa's range: from 1.75 on it carries
    exponents = ((amax.view(torch.int32) + carry) >> 23) - 2  # of 4, the largest power of two among the codes
    scales = exponents.clamp_(min=0).to(torch.uint8)
    magnitudes = groups.abs() / powers_of_two(scales)[..., None]
    nibbles = torch.zeros_like(magnitudes, dtype=torch.uint8)
    for i, (low, high) in enumerate(itertools.pairwise(_E2M1)):  # halfway: to the code whose mantissa bit is 0
        middle = (low + high) / 2
        nibbles += magnitudes > middle if i % 2 == 0 else magnitudes >= middle
    nibbles += groups.signbit().to(torch.uint8) * 8
    return _in_bytes(nibbles.flatten(-2)), scales


def dequantize_w4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q * s as [..., N, K] in `dtype`, rounded once; the product is exact in float32."""
    nibbles = _nibbles(codes)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    if codes.dtype == torch.int32:
        q, s = nibbles.view(torch.int8) - INT4_OFFSET, scales
    else:
        values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=exact, device=codes.device)
        q, s = values[nibbles.int()], powers_of_two(scales)
    groups = q.to(exact).unflatten(-1, (-1, GROUP))
    return groups.mul_(s.to(exact)[..., None]).flatten(-2).to(dtype)


def powers_of_two(scales: Tensor) -> Tensor:
    """The values of E8M0 bytes in float32; 255 is NaN."""
    bits = scales.int()
    # A subnormal for byte 0. By bits, as a device's power function need not be exact.
    bits = torch.where(bits == 0, 1 << 22, torch.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.view(torch.float32)


def packed_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the packed bytes of weights of `shape` (..., N, K)."""
    *leading, n, k = shape
    tiles = -(-n // CHUNK), -(-k // CHUNK)
    return (*leading, *tiles, CODE_BYTES + CHUNK * CHUNK // GROUP * SCALE_BYTES[kind.removesuffix("_wide")])


def pack_into(data: Tensor, codes: Tensor, scales: Tensor, kind: str, gated: bool) -> None:
    """Packs the codes and scales of one matrix [N, K] into its uint8 [ceil(N/64), ceil(K/64), C]."""
    if kind != "mxfp4":
        if kind != INT4_WIDE:
            scales = (scales.float() * 2.0**64 * 2.0**65).bfloat16()
        zero, scales = INT4_OFFSET * 0x11111111 - 2**32, scales.view(torch.uint8).unflatten(-1, (-1, 2))
    else:
        zero, scales = 0, (scales + PACKED_E8M0)[..., None]
    even, odd = codes.contiguous().view(torch.int32).unflatten(-1, (-1, 2, 2)).unbind(-1)
    low = even & 0x0F0F0F0F | (odd & 0x0F0F0F0F) << 4
    high = (even >> 4) & 0x0F0F0F0F | odd & (0xF0F0F0F0 - 2**32)
    words = torch.cat([low, high], -1)  # [N, K/32, 4]
    for part, x, fill in ((data[..., :CODE_BYTES], words, zero), (data[..., CODE_BYTES:], scales, 0)):
        chunks = _chunks(x, fill, gated).view(torch.uint8)
        chunks = chunks.index_select(1, _places(chunks.shape[1], x.device))
        if x is words and kind == "mxfp4":
            chunks = _moved(chunks.view(torch.int32), _MXFP4_MOVES).view(torch.uint8)
        part.copy_(chunks.view(part.shape))


def unpack(data: Tensor, kind: str, n: int, k: int, gated: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of one matrix [N, K] from its packed bytes."""
    coded, parts = data[..., :CODE_BYTES], []
    if kind == "mxfp4":
        back = [(mask << by if by > 0 else mask >> -by, -by) for mask, by in _MXFP4_MOVES]
        coded = _moved(coded.contiguous().view(torch.int32), back).view(torch.uint8)
    for part in (coded, data[..., CODE_BYTES:]):
        back = _places(part.shape[-1], data.device).argsort()
        chunks = part.flatten(0, 1).index_select(1, back)
        parts.append(_rows(chunks.view(*part.shape[:2], CHUNK, 2, -1), n, k, gated))
    low, high = parts[0].view(torch.int32).unflatten(-1, (2, 2)).unbind(-2)  # [N, K/32, 2]
    even = low & 0x0F0F0F0F | (high & 0x0F0F0F0F) << 4
    odd = (low >> 4) & 0x0F0F0F0F | high & (0xF0F0F0F0 - 2**32)
    codes, scales = torch.stack([even, odd], -1).view(n, k // 8), parts[1].flatten(1)
    if kind == "mxfp4":
        return codes.view(torch.uint8), scales - PACKED_E8M0
    scales = scales.view(torch.bfloat16)
    return codes, scales if kind == INT4_WIDE else (scales.float() * 2.0**-64 * 2.0**-65).bfloat16()


def grouped_w4_gemm(
    a: Tensor,
    data: Tensor,
    offsets: Tensor,
    counts: Tensor,
    kind: str,
    n: int,
    k: int,
    swiglu: bool,
    batch_invariant: bool,
    expected: int | None,
) -> Tensor:
    """[S, N]: `grouped_gemm` with the dequantised weights, or [S, N/2], their `swiglu`; zeros in pad rows."""
    out = a.new_zeros((a.shape[0], n // 2 if swiglu else n))
    grouped_w4_gemm_out(out, a, data, offsets, counts, kind, n, k, swiglu, batch_invariant, expected)
    return out


def grouped_w4_gemm_out(
    out: Tensor,
    a: Tensor,
    data: Tensor,
    offsets: Tensor,
    counts: Tensor,
    kind: str,
    n: int,
    k: int,
    swiglu: bool,
    batch_invariant: bool,
    expected: int | None,
) -> None:
    """`grouped_w4_gemm` into `out`, whose rows of no group stay as they are. One expert at a time is dequantised."""
    for expert, (start, count) in enumerate(zip(offsets.tolist(), counts.tolist())):
        if count:
            weight = dequantize_w4(*unpack(data[expert], kind, n, k, swiglu), a.dtype)
            product = torch.mm(a[start : start + count], weight.t())
            out[start : start + count] = _swiglu(product) if swiglu else product


def _nibbles(codes: Tensor) -> Tensor:
    """The 4-bit codes, uint8 [..., K]."""
    packed = codes.contiguous().view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _in_bytes(nibbles: Tensor) -> Tensor:
    """uint8 [..., K/2] of uint8 [..., K]: the code of an even k is the low nibble."""
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


# The bits of a word of MXFP4 codes that a left shift (negative: right) takes to their packed places.
_MXFP4_MOVES = [
    (0x80778077, 0),  # magnitudes of pairs 0 and 1, sign of pair 3
    (0x00880088, 6),  # signs of pairs 0 and 1
    (0x17001700, 2),  # magnitude of pair 2, the last bit of pair 3
    (0x60006000, -6),  # the other bits of its magnitude
    (0x00000800, 8),  # signs of pair 2, into the other's half
    (0x08000000, -24),
]


def _moved(words: Tensor, moves: list[tuple[int, int]]) -> Tensor:
    """int32 words of the bits under the masks, each shifted."""
    moved = torch.zeros_like(words)
    for mask, by in moves:
        target = mask << by if by > 0 else mask >> -by
        target -= (target >> 31) << 32  # as int32
        moved |= (words << by if by > 0 else words >> -by) & target
    return moved


# A chunk of 64 rows and two groups of 32 along K. In the order of rows, a group is the words (0, 1), (2, 3) of their
# low nibbles and those of their high ones, where words 0 to 3 hold the codes; byte t of them has k = 8 i + 2 t + j of
# word i. The packed order is that of `_places`.


def _places(size: int, device: torch.device) -> Tensor:
    """For each byte of the packed codes (2,048) or scales of a chunk, where it is in the order of rows."""
    order = torch.arange(size, device=device)
    if size == CODE_BYTES:
        return order.view(4, 2, 8, 2, 4, 4).permute(0, 2, 5, 1, 3, 4).flatten()  # rows (b, r, g), group, word, t
    return order.view(4, 2, 8, 2, -1).transpose(1, 2).flatten()  # rows (b, r, g), group, bytes of a scale


def _chunks(x: Tensor, fill: int, gated: bool) -> Tensor:
    """[N, groups, elements of a group] as [chunks, elements of a chunk], padded with `fill`; rows in packed order."""
    n, groups, width = x.shape
    tiles = -(-n // CHUNK)
    halves = x.view(2, n // 2, groups, width) if gated else x[None]
    missing = tiles * CHUNK // len(halves) - halves.shape[1]
    if missing or groups % 2:
        halves = F.pad(halves, (0, 0, 0, groups % 2, 0, missing), value=fill)
    if gated:
        halves = halves.unflatten(1, (-1, 8)).transpose(0, 1)  # 8 rows of gate, 8 of up
    rows = halves.reshape(tiles, CHUNK, -1, 2 * width)
    return rows.transpose(1, 2).reshape(-1, CHUNK * 2 * width)


def _rows(chunks: Tensor, n: int, k: int, gated: bool) -> Tensor:
    """The inverse: [row tiles, column tiles, 64, 2, bytes of a group] as [N, groups, bytes of a group]."""
    rows = chunks.transpose(1, 2).flatten(0, 1).flatten(1, 2)
    if gated:
        rows = rows.view(-1, 2, 8, *rows.shape[1:]).transpose(0, 1).flatten(1, 2)[:, : n // 2].flatten(0, 1)
    return rows[:n, : k // GROUP].contiguous()
