"""The conformance kernels of csrc/conformance: inputs, and the outputs that the PTX manual prescribes.

Formulas here are written from the manual, not from the emulator: numpy on whole fragments, tiles and tensors. All
inputs and outputs are 32-bit words; products have small integers, so sums are exact on any tensor core.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

RECORDED = Path(__file__).parent / "recorded"  # <gpu>.npz, by record.py
UNTOUCHED = 0xA5A5A5A5


@dataclass(frozen=True)
class Case:
    """A kernel's input, and the output before and after it; where bits may differ, a predicate instead."""

    input: np.ndarray
    before: np.ndarray
    after: np.ndarray
    within_bounds: Callable[[np.ndarray], bool] | None = None

    def holds(self, output: np.ndarray) -> bool:
        return self.within_bounds(output) if self.within_bounds else np.array_equal(output, self.after)


MAKERS: dict[str, Callable[[np.random.Generator], Case]] = {}


def case(name: str) -> Case:
    return MAKERS[name](np.random.default_rng(zlib.crc32(name.encode())))


def conformance(*names):
    def add(maker):
        for name in names or [maker.__name__]:
            MAKERS[name] = maker
        return maker

    return add


def words(*arrays) -> np.ndarray:
    """The bytes of arrays, one after the other, as 32-bit words."""
    return np.concatenate([np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays]).view(np.uint32)


def written(input, *after) -> Case:
    """A kernel that writes all of its output."""
    after = words(*after)
    return Case(words(input), np.full_like(after, UNTOUCHED), after)


def random_words(rng, *shape):
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def row(value, threads=32):
    return np.full(threads, value, np.uint32)


LANE = np.arange(32)

# ---- warps


@conformance()
def votes(rng):
    value = random_words(rng, 32) & 0xFFFFFFFB | 2  # mixed, all ones, all zeros
    rows = []
    for bit in range(3):
        predicate = value >> bit & 1
        ballot = sum(int(p) << lane for lane, p in enumerate(predicate))
        rows += [row(ballot), row(ballot != 0), row(ballot == 0xFFFFFFFF)]
    for bits in (0, 1, 3, 0xFFFFFFFF):
        equal = (value & bits)[:, None] == (value & bits)
        rows.append((equal << LANE).sum(-1).astype(np.uint32))
    return written(value, *rows)


@conformance()
def shuffles(rng):
    value = random_words(rng, 32)
    rows = [value[(LANE * 7 + 3) % 32], row(value[5])]
    for n in (1, 2, 4, 8, 16, 31):
        up, down = np.where(LANE >= n, LANE - n, LANE), np.where(LANE + n < 32, LANE + n, LANE)
        rows += [value[LANE ^ n], value[up], value[down], ~value[LANE ^ n], value[LANE ^ n]]
    return written(value, *rows)


@conformance()
def redux(rng):
    value = random_words(rng, 32)
    results = [value.sum(dtype=np.uint32), value.min(), value.max()]
    signed = value.view(np.int32)
    results += [value.sum(dtype=np.uint32), *np.array([signed.min(), signed.max()]).view(np.uint32)]
    return written(value, *map(row, results))


@conformance()
def barriers(rng):
    value = random_words(rng, 32)
    second = value[::-1] + np.uint32(1)
    third = second[LANE ^ 1] + np.uint32(1)
    warp = np.repeat(np.arange(3, dtype=np.uint32), 32)
    return written(value, np.tile(third[LANE ^ 2], 3) + warp, np.tile(LANE, 3).astype(np.uint32), warp)


@conformance()
def time(rng):
    return written(row(0), row(1))


@conformance()
def elect(rng):
    return written(row(0), row(1, 64))


# ---- loads, stores, atomics


@conformance()
def vectors(rng):
    value = random_words(rng, 2 * (32 + 64 + 128))
    return written(value, value, value[-128:])


@conformance()
def flags(rng):
    value = random_words(rng, 64)
    raised = np.full((2, 8), UNTOUCHED, np.uint32)
    raised[:, 0], raised[:, 4], raised[:, 5] = 1, 1, 2
    return written(value, value, value, value, value, raised)


@conformance()
def atomics(rng):
    value = rng.integers(0, 1000, 64, dtype=np.uint32)
    total = value.sum(dtype=np.uint32)
    counters = np.zeros(32, np.uint32)
    counters[:6] = total, np.float32(total).view(np.uint32), total, total, total, 77
    counters[6:12] = counters[:6]
    counters[12:14] = value.max(), value.max() - 100
    shown = np.array([0, 5, 12, 30, 30, 35, 35], np.uint32)
    return written(value, counters, shown, shown)


@conformance()
def add_vector(rng):
    value = rng.integers(-99, 100, (32, 4)).astype(np.float32)
    return written(value, value[::2].sum(0), value[1::2].sum(0))


# ---- asynchronous copies, mbarriers


@conformance()
def cp_async(rng):
    tiles = [random_words(rng, 32, width) for width in (1, 2, 4)]
    valid = (LANE % 2 == 0)[:, None]
    partial = np.where(np.arange(16) < LANE[:, None] // 2, tiles[2].view(np.uint8), np.uint8(0)).view(np.uint32)
    return written(words(*tiles), *(np.where(valid, tile, np.uint32(0)) for tile in tiles), partial)


@conformance()
def mbarrier(rng):
    value = random_words(rng, 32)
    # The phase under way is arrivals / 3; of the other parity is the one that has ended.
    answers = [[arrived // 3 % 2 != parity for parity in (0, 1)] for arrived in range(7)]
    return written(value, np.array(answers, np.uint32), value[::-1])


@conformance()
def transaction(rng):
    value = random_words(rng, 32)
    return written(value, np.array([[0, 1]] * 4 + [[1, 0]], np.uint32), value)


# ---- fragments
# Lane 4 g + t holds word t of row g of an 8-row matrix of 16 bytes a row.


def fragment(matrix):
    """8 rows of 4 words, as the registers of a warp."""
    return np.ascontiguousarray(matrix).view(np.uint32).reshape(32)


def matrices(halves):
    """The four matrices at the kernels' addresses: row r of matrix m is row 5 (8 m + r) mod 32 of the tile."""
    return halves[LANE * 5 % 32].reshape(4, 8, 8)


@conformance()
def ldmatrix(rng):
    tile = random_words(rng, 32, 4)
    stored = matrices(tile.view(np.uint16))
    plain = [fragment(matrix) for matrix in stored]
    transposed = [fragment(matrix.T) for matrix in stored]
    rows = [r for registers in (plain, transposed) for count in (1, 2, 4) for r in registers[:count]]
    return written(tile, *rows)


@conformance()
def stmatrix(rng):
    registers = random_words(rng, 4, 32)
    tiles = []
    for transposed in (False, True):
        for count in (1, 2, 4):
            tile = np.zeros((32, 8), np.uint16)
            for m in range(count):
                matrix = registers[m].view(np.uint16).reshape(8, 8)
                tile[np.arange(8 * m, 8 * m + 8) * 5 % 32] = matrix.T if transposed else matrix
            tiles.append(tile)
    return written(registers, *tiles)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}


def encode(x, kind):
    """Rows of numbers as rows of bytes."""
    return torch.from_numpy(x.astype(np.float32)).to(DTYPES[kind]).view(torch.uint8).numpy()


def a_fragments(rows):
    """16 rows of 32 bytes as the four registers of A: 8 rows, the next 8; then the second 16 bytes of both."""
    return np.stack([fragment(rows[r : r + 8, b : b + 16]) for b in (0, 16) for r in (0, 8)])


def accumulators(d):
    """[16, 8 J] as the registers [4 J, 32] of a warp: d[4 j + 2 h + e] is D[g + 8 h][8 j + 2 t + e]."""
    parts = d.reshape(2, 8, -1, 4, 2)  # h, g, j, t, e
    return parts.transpose(2, 0, 4, 1, 3).reshape(-1, 32).astype(np.float32)


def mma(rng, kind):
    depth = 32 if kind == "e4m3" else 16
    a, b, c = rng.integers(-4, 5, (16, depth)), rng.integers(-4, 5, (8, depth)), rng.integers(-99, 100, (16, 8))
    bytes_b = encode(b, kind)
    b_registers = [fragment(bytes_b[:, at : at + 16]) for at in (0, 16)]
    return written(words(a_fragments(encode(a, kind)), *b_registers, accumulators(c)), accumulators(c + a @ b.T))


# ---- conversions


@conformance()
def convert(rng):
    x = (rng.standard_normal(256) * 2.0 ** rng.integers(-30, 30, 256)).astype(np.float32)
    x[:64] = rng.integers(-500, 500, 64) + rng.choice([0, 0.5], 64)  # ties of e4m3
    x[64:96] = (1 + (2 * np.arange(32) + 1) / 256) * 2.0 ** rng.integers(-9, 9, 32)  # ties of bf16
    x[96:128] = (1 + (2 * np.arange(32) + 1) / 2048) * 2.0 ** rng.integers(-20, 9, 32)  # ties of fp16
    x[128:144] = [0, -0.0, np.inf, -np.inf, np.nan, 448, 464, 465, -1e9, 65504, 65520, 65519, 1e30, 2**-9, 2**-10, 3e38]
    bits = x.view(np.uint32)
    low = bits & 0xFFFF
    bits[(low & 0x7C00 == 0x7C00) & (low & 0x3FF != 0)] &= 0xFFFFFBFF  # no NaN of fp16 there, whose bits may differ
    value = torch.from_numpy(x)

    def to(dtype):
        return np.where(np.isnan(x), 0x7FFF, value.to(dtype).view(torch.int16).numpy().view(np.uint16)).astype(
            np.uint32
        )

    codes = value.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    codes = np.where(np.isnan(x), 0x7F, codes).astype(np.uint32)
    bf16, fp16 = to(torch.bfloat16), to(torch.float16)
    every_code = np.arange(256, dtype=np.uint8)
    decoded = torch.from_numpy(every_code).view(torch.float8_e4m3fn).float().numpy().view(np.uint32).copy()
    decoded[[0x7F, 0xFF]] = 0x7FFFFFFF
    return written(
        bits,
        bf16,
        fp16,
        bf16 | np.roll(bf16, -1) << 16,
        fp16 | np.roll(fp16, -1) << 16,
        sum(np.roll(codes, -i) << 8 * i for i in range(4)).astype(np.uint32),
        bits & 0xFFFF0000,
        (bits & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32),
        decoded,
    )


@conformance()
def packed(rng):
    half = rng.integers(0, 2**16, (3, 512), dtype=np.uint32)  # any bits
    near = rng.integers(0x3E00, 0x4200, (3, 384), dtype=np.uint32) | rng.integers(0, 2, (3, 384), dtype=np.uint32) << 15
    half[:, :384] = near  # sums that cancel and round
    half[2, 128:256] ^= rng.integers(0, 80, 128, dtype=np.uint32) << 7  # far apart: what is left behind decides
    half[0, 256:320] = rng.integers(1, 128, 64)  # subnormal, times any
    half[1, 256:320] = rng.integers(0x3F00, 0x4500, 64)
    half[2, 256:320] = rng.integers(0, 128, 64)
    # A tie of the product, of whose sides a far smaller addend chooses one: 1.0078125 * 1.5 +- 2^-120 and so on.
    half[0, 320:352], half[1, 320:352] = 0x3F81 + 2 * np.arange(32), 0x3FC0
    half[2, 320:352] = np.where(np.arange(32) % 2, 0x0380, 0x8380)
    # As w4_gemm decodes: a number of 8 bits times 2^-133, by a large factor, less 2^-126 times that.
    half[0, 384:448], half[1, 384:448] = rng.integers(0, 256, 64), rng.integers(0x3F80, 0x7F80, 64)
    half[2, 384:448] = half[1, 384:448] - 0x3F00 | 0x8000
    special = np.array([0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x3F80, 0xBF80, 0x7F7F], dtype=np.uint32)
    half[0, 448:], half[1, 448:] = np.tile(special, 8), np.repeat(special, 8)
    half[2, 448:] = rng.choice(special, 64)

    def value(bits):
        return np.float64(np.array(bits << 16, dtype=np.uint32).view(np.float32))

    def rounded(exact, negative_zero):
        """The bits of the bf16 next to a fraction, half to even."""
        if exact == 0:
            return 0x8000 * negative_zero
        magnitude = abs(exact)
        exponent = max(math.frexp(magnitude)[1] - 1, -126)
        steps = round(magnitude / Fraction(2) ** (exponent - 7))  # half to even
        bits = min(((exponent + 126) << 7) + steps, 0x7F80)
        return bits | 0x8000 * (exact < 0)

    def fma(a, b, c):
        x, y, z = value(a), value(b), value(c)
        with np.errstate(all="ignore"):
            special = x * y + z  # a product is exact
        if not np.isfinite([x, y, z]).all():
            return 0x7FFF if np.isnan(special) else int(np.float32(special).view(np.uint32)) >> 16
        return rounded(Fraction(x) * Fraction(y) + Fraction(z), bool(np.signbit(special)))

    def pairs(bits):
        return (bits[..., 0::2] | bits[..., 1::2] << 16).astype(np.uint32)

    sums = np.array([fma(*one) for one in half.T], dtype=np.uint32)
    products = np.array([fma(a, b, np.uint32(0x8000)) for a, b in half[:2].T], dtype=np.uint32)
    a, b, c = words = pairs(half)
    of_both = np.stack([a, b], 1).view(np.uint8).reshape(256, 8)
    permuted = [
        np.ascontiguousarray(of_both[:, list(order)]).view(np.uint32)
        for order in (
            (0, 1, 2, 3),
            (4, 5, 6, 7),
            (4, 0, 4, 0),
            (2, 3, 2, 3),
            (5, 2, 3, 6),
            (0, 1, 0, 1),
            (2, 3, 2, 3),  # low_twice, high_twice
        )
    ]
    return written(words, pairs(sums), pairs(products), *permuted, a & b | c, a)


@conformance()
def approximate(rng):
    x = rng.uniform(0.01, 20, 256).astype(np.float32) * rng.choice([-1, 1], 256).astype(np.float32)
    exact = np.stack([np.exp2(x.astype(np.float64)), 1 / x.astype(np.float64), np.abs(x.astype(np.float64)) ** -0.5])
    bounds = 2.0 ** np.array([[-22.0], [-23.0], [-22.9]])  # the manual's: 2 units in the last place, 1, 2^-22.9

    def within_bounds(output):
        return bool((np.abs(output.view(np.float32).reshape(3, 256) / exact - 1) <= bounds).all())

    made = written(x, exact.astype(np.float32))
    return Case(made.input, made.before, made.after, within_bounds)


# ---- TMA. The tensors and boxes of csrc/conformance/launch_sm90.cu, outermost dimension first: the sizes with their
# padding, the sizes, the box, where the boxes start.

BYTES_2D = {0: 64, 32: 32, 64: 64, 128: 128}  # of the inner box, by swizzle


def geometry(rank, swizzle):
    if rank == 1:
        return np.float32, (1000,), (1000,), (64,), [(100,), (-12,), (980,)]
    if rank == 2:
        return np.uint16, (20, 168), (20, 160), (16, BYTES_2D[swizzle] // 2), [(2, 64), (-3, -8), (12, 130)]
    return np.uint32, (5, 7, 28), (5, 6, 25), (3, 4, 8), [(1, 1, 9), (-1, -1, -3), (3, 4, 20)]


def swizzled(address, swizzle):
    """The swizzled address of a byte: bits 4 to 6, as many as the mode has, are XORed with bits 7 to 9."""
    return address ^ (address >> 7 & (swizzle // 16 - 1 if swizzle else 0)) << 4


def as_tile(values, swizzle):
    """A box's elements as laid out in shared memory."""
    plain = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    tile = np.empty_like(plain)
    tile[swizzled(np.arange(plain.size), swizzle)] = plain
    return tile


def visit_box(sizes, box, first):
    """The part of a box inside the tensor: slices of the tensor, slices of the box."""
    begin = [max(f, 0) for f in first]
    end = [min(f + b, s) for f, b, s in zip(first, box, sizes)]
    inside = tuple(slice(b, e) for b, e in zip(begin, end))
    return inside, tuple(slice(b - f, e - f) for b, e, f in zip(begin, end, first))


def random_tensor(rng, dtype, shape):
    if dtype == np.uint16:  # bf16
        return encode(rng.integers(-99, 100, shape), "bf16").view(np.uint16)
    if dtype == np.uint32:
        return random_words(rng, *shape)
    return rng.integers(-99, 100, shape).astype(np.float32)


def loaded_tiles(rng, rank, swizzle):
    dtype, padded, sizes, box, starts = geometry(rank, swizzle)
    tensor = random_tensor(rng, dtype, padded)
    tiles = []
    for first in starts:
        inside, part = visit_box(sizes, box, first)
        values = np.zeros(box, dtype)
        values[part] = tensor[inside]
        tiles.append(as_tile(values, swizzle))
    return tensor, tiles


def tma_load(rng, rank, swizzle):
    tensor, tiles = loaded_tiles(rng, rank, swizzle)
    return written(tensor, *tiles)


def tma_multicast(rng, rank, swizzle):
    tensor, (first, second, third) = loaded_tiles(rng, rank, swizzle)
    return written(tensor, first, second, first, first, second, third)


def tma_store(rng, rank, swizzle, add=False):
    dtype, padded, sizes, box, starts = geometry(rank, swizzle)
    before, values = random_tensor(rng, dtype, padded), random_tensor(rng, dtype, box)
    after = before.copy()
    for first in starts:
        inside, part = visit_box(sizes, box, first)
        after[inside] = plus(after[inside], values[part]) if add else values[part]
    return Case(words(as_tile(values, swizzle)), words(before), words(after))


def plus(a, b):
    if a.dtype != np.uint16:
        return a + b
    a, b = ((x.astype(np.uint32) << 16).view(np.float32) for x in (a, b))
    return encode(a + b, "bf16").view(np.uint16)


def tma_reduce_add(rng, rank, swizzle):
    return tma_store(rng, rank, swizzle, add=True)


@conformance()
def bulk(rng):
    values, sums = rng.integers(-99, 100, (2, 64)).astype(np.float32)
    return Case(words(values), words(row(UNTOUCHED, 64), sums), words(values, sums + 2 * values))


@conformance()
def cluster(rng):
    own, shared = random_words(rng, 4, 32), random_words(rng, 32)
    rows = []
    for rank in range(4):
        after, before = own[(rank + 1) % 4], own[rank - 1]
        rows += [row(rank), row(4), after, before, own[2] if rank == 2 else shared, after + np.uint32(1)]
    return written(words(own, shared), *rows)


@conformance()
def store_async(rng):
    value = random_words(rng, 4, 32)
    return written(value, *(value[rank - 1] + np.uint32(i) for rank in range(4) for i in range(7)))


@conformance()
def registers(rng):
    value = random_words(rng, 384)
    return written(value, value[:128] + np.uint32(1), value[128:] + np.uint32(2))


@conformance()
def dependent(rng):
    value = random_words(rng, 32)
    return written(value, value + np.uint32(1), value[::-1] + np.uint32(2))


# ---- wgmma: operands of two steps of K, 64 bytes a row


def k_major_bytes(rows, swizzle):
    """Rows of 64 bytes as laid out: rows as wide as the swizzle, tile after tile; unswizzled, columns of 16 bytes."""
    count = len(rows)
    r, c = np.mgrid[:count, :64]
    if swizzle == 0:
        address = c // 16 * (16 * count) + r * 16 + c % 16
    else:
        width = max(swizzle, 32)
        address = c // width * (count * width) + r * width + c % width
    return place(rows, swizzled(address, swizzle), count * 128)


def mn_major_bytes(rows, swizzle):
    """16-bit elements [MN, 32]: columns of 32 k, each as wide as the swizzle; without, 8 x 8 matrices, k fastest."""
    elements = np.ascontiguousarray(rows).view(np.uint16)
    count = len(elements)
    i, k = np.mgrid[:count, :32]
    if swizzle == 0:
        address = i // 8 * 512 + k // 8 * 128 + k % 8 * 16 + i % 8 * 2
    else:
        wide = swizzle // 2  # elements
        address = i // wide * (32 * swizzle) + k * swizzle + i % wide * 2
    address = swizzled(address, swizzle)
    both = np.stack([address, address + 1], -1)
    return place(elements.reshape(count, 32, 1).view(np.uint8), both, count * 128)


def place(values, addresses, size):
    image = np.full(size, 0x5A, np.uint8)  # of any of the types an ordinary number
    image[addresses.reshape(-1)] = values.reshape(-1)
    return image


def wgmma(rng, kind, n, swizzle=128, major_a="k", major_b="k"):
    depth = 64 if kind == "e4m3" else 32
    a, b = rng.integers(-4, 5, (64, depth)), rng.integers(-4, 5, (n, depth))
    layouts = {"k": k_major_bytes, "mn": mn_major_bytes}
    bytes_a, bytes_b = encode(a, kind), encode(b, kind)
    warps = [slice(16 * w, 16 * w + 16) for w in range(4)]
    fragments = [
        np.concatenate([a_fragments(bytes_a[rows, at : at + 32]) for rows in warps], 1) for at in (0, 32)
    ]  # [step][register][thread]
    d = a @ b.T
    rows = np.concatenate([accumulators(d[rows]) for rows in warps], 1)
    input = words(layouts[major_a](bytes_a, swizzle), layouts[major_b](bytes_b, swizzle), *fragments)
    return written(input, *([rows, rows] if major_a == "k" else [rows]))


# ---- the kernels that are one with other parameters


def also(name, maker, *parameters):
    MAKERS[name] = lambda rng: maker(rng, *parameters)


for kind in DTYPES:
    also(f"mma_{kind}", mma, kind)
    for n in (8, 16, 24, 32, 64, 96, 128, 160, 192, 256):
        also(f"wgmma_{kind}_n{n}", wgmma, kind, n)
    for swizzle in (0, 32, 64, 128):
        for a, b in [("k", "k")] if kind == "e4m3" else [("k", "k"), ("mn", "k"), ("k", "mn"), ("mn", "mn")]:
            also(f"wgmma_{kind}_swizzle{swizzle}_{a}_{b}", wgmma, kind, 64, swizzle, a, b)
for swizzle in (0, 32, 64, 128):
    also(f"tma_load_2d_swizzle{swizzle}", tma_load, 2, swizzle)
    also(f"tma_store_2d_swizzle{swizzle}", tma_store, 2, swizzle)
for maker, of_rank_2, of_rank_3 in [(tma_load, None, 32), (tma_store, None, 32)] + [
    (maker, 128, 0) for maker in (tma_multicast, tma_reduce_add)
]:
    also(f"{maker.__name__}_1d", maker, 1, 0)
    if of_rank_2 is not None:
        also(f"{maker.__name__}_2d", maker, 2, of_rank_2)
    also(f"{maker.__name__}_3d", maker, 3, of_rank_3)


def run_on_gpu(name: str, made: Case) -> np.ndarray:
    """The kernel's output on the current CUDA device."""
    from k2kernels import _C

    device = torch.device("cuda", torch.cuda.current_device())
    input, output = (torch.from_numpy(x.view(np.int32).copy()).to(device) for x in (made.input, made.before))
    _C.conformance(name, input.data_ptr(), output.data_ptr(), device.index)
    return output.cpu().numpy().view(np.uint32)
