"""Instructions of the emulator, descriptors and tensor maps against CuTe's numbers: fixtures/README.md."""

import csv
import ctypes
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from emulated_kernels import EmulatorError, run
from test_kernels import BF16, E4M3, FP16, encode

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = {BF16: "bf16", FP16: "f16", E4M3: "e4m3"}
BASE = 0x400  # where shared memory begins, there and in the emulator


@cache
def fixture(file):
    entries = json.loads((FIXTURES / file).read_text())
    return {name: entries[entry] if isinstance(entry, str) else entry for name, entry in entries.items()}


def fragment(name):
    """Rows and columns [threads, values]."""
    f = fixture("fragments.json")[name]
    return (np.array(f[key]).reshape(f["threads"], f["values"]) for key in ("row", "column"))


def accumulators(n):
    rows, columns = fragment("wgmma.m64n64.C(m;n)")
    value = np.arange(n // 2)
    return rows[:, value % 32], columns[:, value % 32] + 64 * (value // 32)


@cache
def descriptors():
    with open(FIXTURES / "descriptors.csv") as lines:
        rows = list(csv.DictReader(lines))
    return {(r["form"], int(r["mn_tile"]), int(r["k_tile"])): r for r in rows}


def integers(seed, *shape):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)  # products and sums are exact


def tile_bytes(form, codes):
    """The tile in shared memory, with the codes [mn, k] of its elements, as CuTe lays them out."""
    f = fixture("operands.json")[form]
    assert codes.shape == (f["mn"], f["k"]) and codes.itemsize == f["element_bytes"]
    places = np.array(f["chunks"])
    each = 16 // codes.itemsize
    if f["chunk_runs_along"] == "k":
        chunks = codes.reshape(f["mn"], -1, each)
    else:
        chunks = codes.reshape(-1, each, f["k"]).swapaxes(1, 2)
    tile = np.zeros((places.max() + 1, 16), np.uint8)
    tile[places.ravel()] = np.ascontiguousarray(chunks).view(np.uint8).reshape(-1, 16)
    return tile.ravel()


# ---- wgmma: operands in shared memory


@dataclass
class Side:
    """An operand as a kernel describes it: bytes for matrix_descriptor and descriptor_step."""

    form: str
    mn_major: bool = False
    swizzle: int = 128
    leading: int = 0
    stride: int = 1024
    tile_step: int = 0  # from one tile of M or N to the next
    k_step: int = 32  # inside 128 bytes of K; MN-major: everywhere
    box_step: int = 0  # from one 128 bytes of K to the next
    steps: tuple = ()  # if given, these along K

    def step(self, tile, k):
        if self.steps:
            return self.steps[k]
        boxes = k // 4 if self.box_step else 0
        return tile * self.tile_step + boxes * self.box_step + (k - 4 * boxes) * self.k_step


def box_k(form, **more):
    return Side(form, box_step=8192, **more)


def from_cute(form, swizzle, mn_major=False):
    """A mode without a kernel: strides and steps as CuTe has them."""
    cute = [descriptors()[form, 0, k] for k in range(4)]
    leading, stride, first = (int(cute[0][key]) for key in ("leading_bytes", "stride_bytes", "start"))
    return Side(form, mn_major, swizzle, leading, stride, steps=tuple(int(d["start"]) - first for d in cute))


V = {"mn_major": True, "leading": 8192, "k_step": 2048}
PAIRS = {
    "mla scores": (BF16, 64, box_k("mla.q.A"), box_k("mla.k.B")),
    "mla values": (BF16, 256, Side("mla.p.A"), Side("mla.v.B", **V)),
    **{
        f"fp8 {form}": (E4M3, n, Side("fp8.A.256", tile_step=8192), Side(form, tile_step=n * 128))
        for form, n in [("fp8.B.256n256", 256), ("fp8.B.256n128", 128)]
        + [(f"fp8.B.{n}", n) for n in (192, 64, 32, 16, 8)]
    },
    "newton_schulz K": (BF16, 128, Side("ns.K.A", tile_step=8192), Side("ns.K.B")),
    "newton_schulz MN": (BF16, 128, Side("ns.MN.A", tile_step=8192, **V), Side("ns.MN.B", **V)),
}


def pairs_without_a_kernel():
    for swizzle in (0, 32, 64, 128):
        k, k8 = (from_cute(f"{form}.{swizzle}", swizzle) for form in ("other.K", "other8.K"))
        mn, mn21, mna = (from_cute(f"other.{form}.{swizzle}", swizzle, True) for form in ("MN", "MN21", "MNA"))
        yield f"bf16 K {swizzle}", (BF16, 64, k, k)
        yield f"e4m3 K {swizzle}", (E4M3, 64, k8, k8)
        yield f"bf16 MN {swizzle}", (BF16, 64, mna, mn)
        yield f"bf16 MN21 {swizzle}", (BF16, 64, mna, mn21)


ALL_PAIRS = {**PAIRS, **dict(pairs_without_a_kernel())}


def multiply(kind, n, a, b, seed=0):
    """Of all tiles and steps: [(tile of A, tile of B, step)], where A and B begin, D, the exact D, the descriptors."""
    sizes = [fixture("operands.json")[side.form] for side in (a, b)]
    matrices = [integers(seed + i, f["mn"], f["k"]) for i, f in enumerate(sizes)]
    image, starts = np.zeros(160 * 1024, np.uint8), []
    for side, matrix in zip((a, b), matrices):
        starts.append(0 if not starts else 80 * 1024)
        tile = tile_bytes(side.form, encode(matrix, kind))
        image[starts[-1] : starts[-1] + tile.size] = tile
    depth = 16 if kind != E4M3 else 32
    products = [
        (i, j, k)
        for i in range(sizes[0]["mn"] // 64)
        for j in range(sizes[1]["mn"] // n)
        for k in range(sizes[0]["k"] // depth)
    ]
    operands = [
        [start, side.swizzle, side.leading, side.stride, side.step(tile, k)]
        for i, j, k in products
        for side, start, tile in ((a, starts[0], i), (b, starts[1], j))
    ]
    d = np.full((len(products), 128, n // 2), np.nan, np.float32)
    words = np.zeros((len(products), 2), np.uint64)
    run(
        "wgmma_products", image, np.zeros((128, 4), np.uint32), np.array(operands, np.int32), d, words,
        len(products), kind, n, a.mn_major, b.mn_major, 0,
    )  # fmt: skip
    rows, columns = accumulators(n)
    result = np.full((len(products), 64, n), np.nan, np.float32)
    result[:, rows, columns] = d
    exact = [
        matrices[0][i * 64 :][:64, k * depth :][:, :depth] @ matrices[1][j * n :][:n, k * depth :][:, :depth].T
        for i, j, k in products
    ]
    return products, starts, result, np.array(exact), words


def fields(word):
    word = int(word)
    return {
        "start": (word & 0x3FFF) * 16,
        "leading": (word >> 16 & 0x3FFF) * 16,
        "stride": (word >> 32 & 0x3FFF) * 16,
        "base": word >> 49 & 7,
        "mode": word >> 62,
    }


@pytest.mark.parametrize("pair", ALL_PAIRS)
def test_wgmma_reads_what_cute_laid_out_by_descriptors_that_are_cutes(pair):
    kind, n, a, b = ALL_PAIRS[pair]
    products, starts, result, exact, words = multiply(kind, n, a, b)
    assert (result == exact).all()
    for (i, j, k), both in zip(products, words):
        for side, start, tile, word in zip((a, b), starts, (i, j), both):
            cute = fields(int(descriptors()[side.form, tile, k]["descriptor"], 16))
            origin = int(descriptors()[side.form, 0, 0]["start"])
            ours = fields(word)
            assert ours.pop("start") - start - BASE == cute.pop("start") - origin
            if (side.swizzle and not side.mn_major and pair in PAIRS) or side.form == "ns.MN.A":
                # K-major with a swizzle, or 64 rows MN-major: there is no second such distance. CuTe puts 1 or 0.
                assert cute.pop("leading") in (0, 16)
                ours.pop("leading")
            if n == 8 and side is b:
                assert cute.pop("stride") == 0  # one group of 8 rows
                ours.pop("stride")
            assert ours == cute


WRONG = {
    "swizzle": (Side("mla.p.A", swizzle=64), Side("mla.v.B", **V)),
    "stride of A": (Side("mla.p.A", stride=512), Side("mla.v.B", **V)),
    "step of A": (Side("mla.p.A", k_step=64), Side("mla.v.B", **V)),
    "leading of B": (Side("mla.p.A"), Side("mla.v.B", **{**V, "leading": 4096})),
    "stride of B": (Side("mla.p.A"), Side("mla.v.B", stride=2048, **V)),
    "step of B": (Side("mla.p.A"), Side("mla.v.B", **{**V, "k_step": 1024})),
    "leading and stride exchanged": (Side("mla.p.A"), Side("mla.v.B", **{**V, "leading": 1024}, stride=8192)),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_layout_of_an_operand_is_caught(what):
    try:
        _, _, result, exact, _ = multiply(BF16, 256, *WRONG[what])
    except EmulatorError:
        return
    assert (result != exact).any()


# ---- fragments in registers


def words_of(codes, name, words):
    """32-bit words [threads, words] of a fragment of the matrix of codes."""
    rows, columns = fragment(name)
    return np.ascontiguousarray(codes[rows, columns]).view(np.uint32).reshape(-1, words)


def wgmma_from_registers(kind, a_layout):
    depth = 32 if kind == E4M3 else 16
    form = "other8.K.128" if kind == E4M3 else "other.K.128"
    a, b = integers(0, 64, depth), integers(1, 64, 4 * depth)
    image = np.zeros(160 * 1024, np.uint8)
    tile = tile_bytes(form, encode(b, kind))
    image[: tile.size] = tile
    d = np.full((1, 128, 32), np.nan, np.float32)
    operands = np.array([[0, 128, 0, 1024, 0]] * 2, np.int32)
    fragments = words_of(encode(a, kind), a_layout, 4)
    run("wgmma_products", image, fragments, operands, d, np.zeros(2, np.uint64), 1, kind, 64, 0, 0, 1)
    result = np.empty((64, 64), np.float32)
    result[accumulators(64)] = d[0]
    return result, a @ b[:, :depth].T


@pytest.mark.parametrize("kind", [BF16, FP16, E4M3])
def test_wgmma_takes_a_from_registers(kind):
    result, exact = wgmma_from_registers(kind, f"wgmma.rs.k{32 if kind == E4M3 else 16}.{NAMES[kind]}.A(m;k)")
    assert (result == exact).all()


def mma(kind, a_layout=None):
    depth = 32 if kind == E4M3 else 16
    name = f"m16n8k{depth}.{NAMES[kind]}"
    a, b = integers(2, 16, depth), integers(3, 8, depth)
    d = np.full((32, 4), np.nan, np.float32)
    a_words = words_of(encode(a, kind), a_layout or f"{name}.A(m;k)", 4)
    run("mma_once", a_words, words_of(encode(b, kind), f"{name}.B(n;k)", 2), d, kind)
    result = np.empty((16, 8), np.float32)
    result[tuple(fragment(f"{name}.C(m;n)"))] = d
    return result, a @ b.T


@pytest.mark.parametrize("kind", [BF16, FP16, E4M3])
def test_mma(kind):
    result, exact = mma(kind)
    assert (result == exact).all()


def test_wrong_fragment_is_caught(monkeypatch):
    """Rows of A exchanged between the two halves of each word's neighbours, or lanes between warps."""
    entries = fixture("fragments.json")
    for name, check in [
        ("m16n8k16.bf16.A(m;k)", lambda: mma(BF16)),
        ("m16n8k16.bf16.B(n;k)", lambda: mma(BF16)),
        ("m16n8k16.bf16.C(m;n)", lambda: mma(BF16)),
        ("wgmma.m64n64.C(m;n)", lambda: wgmma_from_registers(BF16, "wgmma.rs.k16.bf16.A(m;k)")),
        ("wgmma.rs.k16.bf16.A(m;k)", lambda: wgmma_from_registers(BF16, "wgmma.rs.k16.bf16.A(m;k)")),
    ]:
        entry = entries[name]
        values = entry["values"]
        moved = {key: entry[key][values:] + entry[key][:values] for key in ("row", "column")}  # the next lane's
        with monkeypatch.context() as patch:
            patch.setitem(entries, name, {**entry, **moved})
            result, exact = check()
            assert (result != exact).any(), name


# ---- ldmatrix, stmatrix


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("instruction", ["ldmatrix", "stmatrix"])
def test_matrices(instruction, count, transposed):
    entries = fixture("fragments.json")
    name = f"{instruction}.x{count}" + (".trans" if transposed else "")
    in_memory, in_registers = (
        np.array(entries[f"{name}.{side}"]["element"]).reshape(32, -1)
        for side in (("src", "dst") if instruction == "ldmatrix" else ("dst", "src"))
    )
    elements = 1000 + np.arange(64 * count, dtype=np.uint16)
    # CuTe speaks of all lanes' addresses; the first 8 for each matrix count.
    rows = in_memory[: 8 * count]
    memory = np.full((32, 8), 0xFFFF, np.uint16)
    registers = np.full((32, 2 * count), 0xFFFF, np.uint16)
    if instruction == "ldmatrix":
        memory[: 8 * count] = elements[rows]
    else:
        registers[:] = elements[in_registers]
    words = registers.view(np.uint32)
    run("matrices_once", memory, words, count, transposed, int(instruction == "stmatrix"))
    if instruction == "ldmatrix":
        assert (words.view(np.uint16) == elements[in_registers]).all()
    else:
        assert (memory[: 8 * count] == elements[rows]).all() and (memory[8 * count :] == 0xFFFF).all()


# ---- TMA


@pytest.mark.parametrize("rows", [64, 16])
@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_tma_swizzles_as_cute_does(swizzle, rows):
    x, tile = np.arange(4096, dtype=np.uint16).reshape(64, 64), np.zeros(8192, np.uint8)
    run("tma_boxes", x, tile, swizzle, rows)
    assert (tile == tile_bytes(f"other.K.{swizzle}", x)).all()
    wrong = {32: 64, 64: 128, 128: 32}[swizzle]
    assert (tile != tile_bytes(f"other.K.{wrong}", x)).any()


DRIVER_TYPES = {9: BF16, 0: E4M3}  # CU_TENSOR_MAP_DATA_TYPE_...
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # CU_TENSOR_MAP_SWIZZLE_...


def tensor_map(type, sizes, stride_bytes, box, swizzle):
    class Fields(ctypes.Structure):  # csrc/emulator/tensor_map.h
        _fields_ = (
            ("mark", ctypes.c_uint32), ("type", ctypes.c_uint8), ("rank", ctypes.c_uint8),
            ("swizzle_bytes", ctypes.c_uint16), ("base", ctypes.c_uint64), ("stride_bytes", ctypes.c_uint64 * 4),
            ("sizes", ctypes.c_uint64 * 5), ("box", ctypes.c_uint16 * 5),
        )  # fmt: skip

    map, base = np.zeros(128, np.uint8), np.zeros(16, np.uint8)
    run("tensor_map", map, base, np.array([*sizes, *stride_bytes, *box], np.uint64), type, len(sizes), swizzle)
    return Fields.from_buffer_copy(map)


@pytest.mark.parametrize("name", fixture("tensor_maps.json"))
def test_tensor_maps_of_the_emulator(name):
    cute = fixture("tensor_maps.json")[name]
    rank = cute["rank"]
    type, swizzle = DRIVER_TYPES[cute["type"]], SWIZZLES[cute["swizzle"]]
    ours = tensor_map(type, cute["sizes"], cute["stride_bytes"], cute["box"], swizzle)
    assert (ours.rank, ours.type, ours.swizzle_bytes) == (rank, type, swizzle)
    assert list(ours.sizes)[:rank] == cute["sizes"] and list(ours.box)[:rank] == cute["box"]
    assert list(ours.stride_bytes)[: rank - 1] == cute["stride_bytes"]


def test_a_size_of_two_to_the_32_is_kept():
    """The largest size that the driver takes; truncated to 32 bits it would be 0."""
    assert tensor_map(E4M3, [1 << 32, 16], [1 << 32], [128, 16], 128).sizes[0] == 1 << 32
