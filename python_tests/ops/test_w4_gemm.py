"""4-bit weights: formats, the packed layout, and products by the reference."""

import json
import math
from pathlib import Path

import pytest
import torch
from w4_cases import E2M1, QUANTIZERS, packed_bytes, pair_places, random_w4, values

import k2kernels
from k2kernels import W4, dequantize_w4, grouped_w4_gemm, pack_w4, unpack_w4, w4_gemm
from k2kernels.ops.grouped_gemm import grouped_gemm
from k2kernels.ops.w4_gemm import empty_w4, product
from k2kernels.testing.compare import check_close, check_op

BF16 = torch.bfloat16
GOLDEN = json.loads((Path(__file__).parent / "w4_golden.json").read_text())
of_each_kind = pytest.mark.parametrize("kind", QUANTIZERS)


def bits(x):
    return x.contiguous().view(torch.uint8)


def same(x, y):
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y))


def ints(*x):
    return torch.tensor(x, dtype=torch.int32)


# ---- formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name):
    """Of one matrix of an expert, as compressed-tensors 0.20.0 wrote it and read it back (`make_w4_golden.py`)."""
    golden = GOLDEN[name]
    tensors = {
        key: torch.frombuffer(bytearray.fromhex(golden[key]), dtype=getattr(torch, dtype)).view(shape)
        for key, (dtype, shape) in golden["tensors"].items()
    }
    codes, scales = tensors["weight_packed"], tensors["weight_scale"]
    assert same(dequantize_w4(codes, scales), tensors["decompressed"])
    assert all(same(x, y) for x, y in zip(unpack_w4(pack_w4(codes, scales)), (codes, scales)))
    weight = tensors["weight"]
    if name == "int4":  # its division in bfloat16 chooses other codes here and there
        ours, our_scales = k2kernels.quantize_int4_group32(weight, q_min=-8)
        assert same(our_scales, scales)
        q = weight.float().unflatten(-1, (-1, 32)) / scales.float()[..., None]
        want = q.round().clamp(-8, 7).flatten(-2).int() + 8
        assert torch.equal(
            want, bits(ours).int().unsqueeze(-1).bitwise_right_shift(torch.tensor([0, 4])).flatten(-2) & 15
        )
        assert (dequantize_w4(ours, scales) != tensors["decompressed"]).float().mean() < 0.02
    else:
        assert all(same(x, y) for x, y in zip(k2kernels.quantize_mxfp4(weight), (codes, scales)))


@of_each_kind
def test_each_code_at_each_place(kind):
    """One code among zeros: nibbles are in the order of k, and each code is its value, signs included."""
    k = 64
    zero = 0x88 if kind == "int4" else 0
    codes = torch.full((16 * k, k // 2), zero, dtype=torch.uint8)
    want = torch.zeros(16 * k, k, dtype=torch.float64)
    for code in range(16):
        for column in range(k):
            row = code * k + column
            low, high = (code, zero & 15) if column % 2 == 0 else (zero & 15, code)
            codes[row, column // 2] = low | high << 4
            value = code - 8 if kind == "int4" else (-1.0 if code & 8 else 1.0) * E2M1[code & 7]
            want[row, column] = value
    if kind == "int4":
        codes, scales = codes.view(torch.int32), torch.full((16 * k, 2), 0.25, dtype=BF16)
    else:
        scales = torch.full((16 * k, 2), 125, dtype=torch.uint8)
    got = dequantize_w4(codes, scales, dtype=torch.float64)
    assert same(got, want / 4)
    assert torch.equal(got, values(codes, scales))


def test_int4_is_offset_by_8():
    """compressed-tensors packs -8 .. -1 as 0x76543210."""
    codes = torch.tensor([[0x76543210] * 4], dtype=torch.int32)
    got = dequantize_w4(codes, torch.ones(1, 1, dtype=BF16))
    assert got.tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1] * 4]


def test_int4_products_round_once():
    """All codes by all significands of scales, subnormal to large: bfloat16 of the exact product."""
    exponents = torch.tensor([1, 2, 60, 119, 126, 127, 200, 250])
    significands = torch.arange(128)
    bits_of_scales = torch.cat([(exponents[:, None] * 128 + significands).flatten(), torch.arange(1, 128)])
    scales = bits_of_scales.to(torch.int16).view(BF16)[:, None]  # one a row; the last are subnormal
    codes = torch.tensor([[0x76543210, 0xFEDCBA98 - 2**32] * 2], dtype=torch.int32).expand(len(scales), 4)
    exact = dequantize_w4(codes, scales, dtype=torch.float64)
    q = torch.arange(-8, 8).repeat(2).double()
    assert torch.equal(exact, scales.double() * q)
    for dtype in (torch.float32, BF16, torch.float16):
        assert same(dequantize_w4(codes, scales, dtype=dtype), exact.to(dtype))
    assert torch.equal(dequantize_w4(codes, scales, dtype=torch.float32).double(), exact)
    inexact = (exact.to(BF16).double() != exact)[: 128 * 6].unflatten(0, (6, 128)).any(0).sum(0)  # by code
    assert inexact.max() == 110 and inexact[8 - 7] == 110 and inexact[8 - 4] == 0


def test_mxfp4_products_are_exact():
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    for byte in (0, 1, 2, 100, 126, 127, 128, 252):
        scales = torch.full((256, 1), byte, dtype=torch.uint8)
        exact = values(codes, scales)
        for dtype in (torch.float64, torch.float32, BF16):
            assert torch.equal(dequantize_w4(codes, scales, dtype=dtype).double(), exact), byte
    nan = torch.full((256, 1), 255, dtype=torch.uint8)
    assert dequantize_w4(codes, nan).isnan().all()


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("q_min", [-7, -8])
def test_int4_quantises_to_the_nearest(q_min, dtype):
    w = (torch.randn(3, 40, 96) * torch.rand(3, 40, 1).exp2()).to(dtype)
    w[0, 0, :32] = 0
    codes, scales = k2kernels.quantize_int4_group32(w, q_min=q_min)
    assert codes.dtype == torch.int32 and codes.shape == (3, 40, 12)
    amax = w.float().unflatten(-1, (-1, 32)).abs().amax(-1)
    want = (amax.double() / (7 if q_min == -7 else 7.5)).float().to(BF16)
    want[amax == 0] = 2.0**-7
    assert same(scales, want)
    grid = torch.arange(q_min, 8).double()
    error = (w.double().unflatten(-1, (-1, 32))[..., None] - want.double()[..., None, None] * grid).abs().amin(-1)
    got = dequantize_w4(codes, scales, dtype=torch.float64).unflatten(-1, (-1, 32))
    assert ((got - w.double().unflatten(-1, (-1, 32))).abs() <= error * (1 + 1e-6)).all()
    lowest = (got / want.double()[..., None]).min()
    assert lowest == q_min
    assert (dequantize_w4(codes, scales)[0, 0, :32] == 0).all()


def test_kimis_grid_comes_back():
    """bfloat16(amax/7): quantising what was dequantised changes no bit; with amax/7.5 scales would move."""
    w = torch.randn(64, 512).bfloat16()
    first = k2kernels.quantize_int4_group32(w)
    again = k2kernels.quantize_int4_group32(dequantize_w4(*first))
    assert all(same(x, y) for x, y in zip(first, again))
    first = k2kernels.quantize_int4_group32(w, q_min=-8)
    again = k2kernels.quantize_int4_group32(dequantize_w4(*first), q_min=-8)
    assert not same(first[1], again[1])


def test_int4_divides_in_float32():
    """Dividing in bfloat16 moves about one code in 200."""
    w = torch.randn(256, 1024).bfloat16()
    codes, scales = k2kernels.quantize_int4_group32(w)
    got = dequantize_w4(codes, torch.ones_like(scales), dtype=torch.float32)
    s = scales.repeat_interleave(32, -1)
    assert torch.equal(got, (w.double() / s.double()).round().clamp(-7, 7).float())
    other = (w / s).float().round().clamp(-7, 7)
    assert 0.002 < (other != got).float().mean() < 0.01


@pytest.mark.parametrize("scale_rule", ["even", "floor"])
def test_mxfp4_quantises_to_the_nearest(scale_rule):
    w = torch.randn(2, 50, 96) * torch.randint(-20, 20, (2, 50, 1)).exp2()
    w[0, 0, :32] = 0
    w[0, 1, :32] = torch.tensor([1.75, 0.25, -0.75, 1.25, 0.1, -0.0, 3.4999, 2.5] * 4)
    codes, scales = k2kernels.quantize_mxfp4(w, scale_rule=scale_rule)
    assert codes.dtype == scales.dtype == torch.uint8 and codes.shape == (2, 50, 48)
    groups = w.double().unflatten(-1, (-1, 32))
    amax = groups.abs().amax(-1)
    mantissa, exponent = torch.frexp(amax)  # mantissa from 0.5 on
    exponent = exponent - 1 + ((mantissa >= 0.875) if scale_rule == "even" else 0)
    exponent[amax == 0] = -125
    assert torch.equal(scales.int(), (exponent - 2 + 127).int())
    got = dequantize_w4(codes, scales, dtype=torch.float64).unflatten(-1, (-1, 32))
    s = torch.exp2(exponent - 2.0).double()[..., None]
    grid = torch.tensor([*E2M1, *(-x for x in E2M1)]).double()
    error = (groups[..., None] - s[..., None] * grid).abs().amin(-1)
    assert torch.equal((got - groups).abs(), error)
    ratio = amax / s[..., 0]
    assert ratio.max() < (7 if scale_rule == "even" else 8) and ratio[amax > 0].min() >= (
        3.5 if scale_rule == "even" else 4
    )


def test_mxfp4_halves_go_to_the_even_code():
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.9])
    w = torch.cat([halves, -halves, torch.tensor([6.0] * 16)])[None]
    codes, scales = k2kernels.quantize_mxfp4(w, scale_rule="floor")
    assert scales.item() == 127
    want = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert dequantize_w4(codes, scales, dtype=torch.float32)[0, :16].tolist() == [*want, *(-x for x in want)]
    assert codes[0, 4].item() & 15 == 8  # -0.25 becomes -0


@pytest.mark.parametrize("scale_rule", ["even", "floor"])
def test_quantising_mxfp4_again_changes_no_weight(scale_rule):
    first = dequantize_w4(*k2kernels.quantize_mxfp4(torch.randn(64, 256), scale_rule=scale_rule))
    assert same(first, dequantize_w4(*k2kernels.quantize_mxfp4(first, scale_rule=scale_rule)))


@of_each_kind
def test_quantising_works_on_stacks_and_strides(kind):
    w = torch.randn(2, 3, 8, 64).bfloat16()
    codes, scales = QUANTIZERS[kind](w)
    turned = QUANTIZERS[kind](w.mT.contiguous().mT.requires_grad_())
    assert same(codes, turned[0]) and same(scales, turned[1]) and not turned[1].requires_grad
    one = QUANTIZERS[kind](w[1, 2])
    assert same(codes[1, 2], one[0]) and same(scales[1, 2], one[1])
    assert same(dequantize_w4(codes, scales)[1, 2], dequantize_w4(*one))


# ---- packed -----------------------------------------------------------------------------------------------------

SHAPES = [(64, 64), (128, 192), (48, 32), (8, 96), (72, 160), (2, 2880), (200, 64), (1, 32)]


@of_each_kind
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n, k", SHAPES)
def test_packed_bytes(n, k, gated, kind):
    if gated and n % 2:
        n += 1
    codes, scales = random_w4(kind, n, k)
    packed = pack_w4(codes, scales, gated=gated)
    assert packed.kind == kind and packed.shape == (n, k) and packed.gated is gated
    assert torch.equal(packed.data, packed_bytes(codes, scales, gated))
    back = unpack_w4(packed)
    assert same(back[0], codes) and same(back[1], scales)


@of_each_kind
@pytest.mark.parametrize("gated", [False, True])
def test_experts_are_packed_one_by_one(gated, kind):
    codes, scales = random_w4(kind, 3, 40, 96)
    packed = pack_w4(codes, scales, gated=gated)
    assert packed.shape == (3, 40, 96)
    stack = empty_w4((3, 40, 96), kind, gated=gated)
    stack.data.fill_(0xEE)
    for e in range(3):
        one = pack_w4(codes[e], scales[e], gated=gated)
        assert torch.equal(packed.data[e], one.data)
        pack_w4(codes[e].mT.contiguous().mT, scales[e], gated=gated, out=stack.data[e])
    assert torch.equal(stack.data, packed.data)
    pack_w4(codes[1:], scales[1:], gated=gated, out=stack.data[1:])
    assert all(same(x, y) for x, y in zip(unpack_w4(stack), (codes, scales)))
    none = pack_w4(codes[:0], scales[:0], gated=gated)
    assert none.shape == (0, 40, 96) and unpack_w4(none)[0].shape == codes[:0].shape


@pytest.mark.parametrize("gated", [False, True])
def test_int4_scales_of_all_sizes_have_a_packed_kind(gated):
    codes, scales = random_w4("int4", 2, 40, 96)
    plain = pack_w4(codes, scales, gated=gated)
    for one in (0.5, -torch.finfo(BF16).max, 3.0):
        larger = scales.clone()
        larger[1, 7, 2] = one
        wide = pack_w4(codes, larger, gated=gated)
        assert (plain.kind, wide.kind) == ("int4", "int4_wide") and wide.shape == plain.shape
        assert torch.equal(wide.data[..., :2048], plain.data[..., :2048])
        assert all(same(x, y) for x, y in zip(unpack_w4(wide), (codes, larger)))
        changed = (wide.data[..., 2048:].contiguous().view(BF16) * 2.0**64 * 2.0**65).bfloat16()
        assert (changed.view(torch.int16) != plain.data[..., 2048:].contiguous().view(torch.int16)).sum() == 1


@of_each_kind
def test_a_lane_holds_the_fragments_of_mma(kind):
    """A of m16n8k16 and m64k16: register i of lane 4 g + t is row g + 8 (i mod 2), k = 8 (i / 2) + 2 t + {0, 1}."""
    codes, scales = random_w4(kind, 64, 64)
    words = pack_w4(codes, scales).data[0, 0, :2048].contiguous().view(torch.int32).view(4, 32, 4).tolist()
    raw, places = bits(codes).tolist(), [pair_places(kind, i) for i in range(4)]
    assert sorted(place for pair in places for half in pair for place in half) == list(range(32))
    for block in range(4):
        for lane in range(32):
            g, t = divmod(lane, 4)
            for step in range(4):
                for i in range(4):
                    word = words[block][lane][2 * (i % 2) + step // 2]
                    pair = 2 * (step % 2) + i // 2
                    row, k = 16 * block + g + 8 * (i % 2), 16 * step + 8 * (i // 2) + 2 * t
                    byte = raw[row][k // 2]
                    found = [sum((word >> p & 1) << bit for bit, p in enumerate(x)) for x in places[pair]]
                    assert found == [byte & 15, byte >> 4]


def test_gate_and_up_are_accumulators_of_one_lane():
    """Rows g and g + 8 of a block: the same i of gate and of up."""
    i = 40
    w = torch.zeros(2 * i, 32)
    for row in range(2 * i):
        w[row] = (row + 1) / 256
    data = pack_w4(*k2kernels.quantize_int4_group32(w), gated=True).data[:, 0, 2048:].contiguous()
    scales = data.view(BF16).view(-1, 8, 2, 2)[..., 0].double() * 2.0**-129  # blocks, g, row g or g + 8
    found = (scales * 7 * 256).round().view(-1, 2)[:i]
    want = torch.stack([torch.arange(1, i + 1), torch.arange(i + 1, 2 * i + 1)], -1).double()
    assert (found - want).abs().max() <= 1


@of_each_kind
def test_shards_together_are_the_whole(kind):
    """Experts (EP), rows of down and of gate and up at multiples of 64 and 32, and K at multiples of 64 (TP)."""
    codes, scales = random_w4(kind, 4, 128, 256)
    whole, gated = pack_w4(codes, scales), pack_w4(codes, scales, gated=True)
    assert torch.equal(whole.data, torch.cat([pack_w4(codes[e], scales[e]).data for e in (slice(0, 3), slice(3, 4))]))
    rows = [pack_w4(codes[:, r], scales[:, r]).data for r in (slice(0, 64), slice(64, 128))]
    assert torch.equal(whole.data, torch.cat(rows, 1))
    in_code = 8 if kind == "int4" else 2
    columns = [pack_w4(codes[..., a // in_code : b // in_code], scales[..., a // 32 : b // 32]).data
               for a, b in ((0, 64), (64, 256))]  # fmt: skip
    assert torch.equal(whole.data, torch.cat(columns, 2))
    halves = []
    for i in (slice(0, 32), slice(32, 64)):
        both = [torch.cat([x[:, i], x[:, 64:][:, i]], 1) for x in (codes, scales)]
        halves.append(pack_w4(*both, gated=True).data)
    assert torch.equal(gated.data, torch.cat(halves, 1))


# ---- products ---------------------------------------------------------------------------------------------------


def groups_of(*counts, alignment=1, behind=0):
    aligned = [-(-count // alignment) * alignment for count in counts]
    offsets = ints(0, *torch.tensor(aligned).cumsum(0).tolist())
    return offsets, ints(*counts), int(offsets[-1]) + behind


def rows_of(offsets, counts, rows, k):
    """Rows of groups; NaN elsewhere."""
    a = torch.full((rows, k), math.nan, dtype=BF16)
    real = torch.zeros(rows, dtype=torch.bool)
    for start, count in zip(offsets.tolist(), counts.tolist()):
        a[start : start + count] = torch.randn(count, k).bfloat16()
        real[start : start + count] = True
    return a, real


CASES = [
    ((0, 1, 7, 8, 9), 1, 0, 48, 64),
    ((16, 17, 0, 64, 65), 8, 3, 96, 160),
    ((0, 0), 1, 4, 64, 32),
    ((257,), 1, 0, 36, 2880),
    ((1,) * 20, 4, 0, 64, 96),
]


@of_each_kind
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_those_with_the_dequantised(case, kind):
    counts, alignment, behind, n, k = case
    offsets, counts, rows = groups_of(*counts, alignment=alignment, behind=behind)
    a, real = rows_of(offsets, counts, rows, k)
    codes, scales = random_w4(kind, len(counts), n, k)
    weights = dequantize_w4(codes, scales)
    groups = dict(offsets=offsets, counts=counts)
    want = grouped_gemm(a, weights, **groups)
    got = grouped_w4_gemm(a, pack_w4(codes, scales), **groups, expected=3)
    assert same(got, want)
    exact = torch.cat(
        [a[s : s + c].double() @ w.double().T for s, c, w in zip(offsets.tolist(), counts.tolist(), weights)]
    )
    check_close(got[real], exact, same_precision=want[real])

    fused = grouped_w4_gemm(a, pack_w4(codes, scales, gated=True), **groups, swiglu=True, batch_invariant=True)
    assert same(fused[real], k2kernels.swiglu(got[real])) and fused.shape == (rows, n // 2)

    out = torch.full((rows, n + 4), 7.5, dtype=BF16)
    returned = grouped_w4_gemm(a, pack_w4(codes, scales), **groups, out=out[:, :n])
    assert returned.data_ptr() == out.data_ptr() and same(out[real][:, :n], want[real])
    assert (out[~real] == 7.5).all() and (out[:, n:] == 7.5).all()


@of_each_kind
def test_one_matrix(kind):
    codes, scales = random_w4(kind, 72, 96)
    a = torch.randn(5, 96).bfloat16()
    want = a @ dequantize_w4(codes, scales).T
    w, gated = pack_w4(codes, scales), pack_w4(codes, scales, gated=True)
    assert same(w4_gemm(a, w), want)
    assert same(w4_gemm(a, gated, swiglu=True), k2kernels.swiglu(want))
    out = torch.zeros(5, 72, dtype=BF16)
    assert w4_gemm(a, w, out=out) is out and same(out, want)
    assert w4_gemm(a[:0], w).shape == (0, 72)
    for row in range(5):
        assert same(
            w4_gemm(a[row : row + 1], w, batch_invariant=True), a[row : row + 1] @ dequantize_w4(codes, scales).T
        )


def test_one_expert_of_many_is_dequantised():
    """384 experts of which few have rows: the others are not touched (their scales are NaN here)."""
    codes, scales = random_w4("int4", 384, 32, 32)
    packed = pack_w4(codes, scales)
    packed.data[1:, ..., 2048:] = 0xFF
    offsets = torch.full((385,), 3, dtype=torch.int32)
    offsets[0] = 0
    counts = torch.zeros(384, dtype=torch.int32)
    counts[0] = 3
    got = grouped_w4_gemm(torch.randn(3, 32).bfloat16(), packed, offsets=offsets, counts=counts)
    assert got.isfinite().all()


def test_registered():
    a, offsets, counts = torch.randn(5, 64).bfloat16(), ints(0, 3, 5), ints(3, 2)
    codes, scales = random_w4("int4", 2, 32, 64)
    w = pack_w4(codes, scales, gated=True)
    call = lambda: grouped_w4_gemm(a, w, offsets=offsets, counts=counts, swiglu=True)  # noqa: E731
    operands = a, w.data, offsets, counts, "int4", 32, 64, True, False, None
    check_op(product._grouped_w4_gemm, operands, compiled=call)
    with k2kernels.emulated():
        check_op(product._grouped_w4_gemm, operands)


# ---- bad inputs -------------------------------------------------------------------------------------------------

CODES, SCALES = random_w4("int4", 2, 64, 64)
MX_CODES, MX_SCALES = random_w4("mxfp4", 2, 64, 64)
PACKED, GATED = pack_w4(CODES, SCALES), pack_w4(CODES, SCALES, gated=True)
MX_PACKED = pack_w4(MX_CODES, MX_SCALES)
A = torch.randn(5, 64).bfloat16()
HUGE = torch.full((4, 32), 1e300, dtype=torch.float64)
ROWS = dict(offsets=ints(0, 3, 5), counts=ints(3, 2))


def with_scale(value, scales=SCALES):
    bad = scales.clone()
    bad[1, 3, 0] = value
    return bad


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: pack_w4(CODES.long(), SCALES), TypeError, "codes must be .* int32 or uint8, got .* int64"),
        (lambda: pack_w4(bits(CODES), SCALES), TypeError, r"scales must be \[2, 64, 2\] uint8, got .* bfloat16"),
        (lambda: pack_w4(MX_CODES.view(torch.int32), MX_SCALES), TypeError, "scales must be .* bfloat16, got .* uint8"),
        (lambda: pack_w4(MX_CODES.view(torch.int8), MX_SCALES), TypeError, "codes must be .* got .* int8"),
        (lambda: pack_w4(CODES[..., :5], SCALES), ValueError, "codes must be of K / 8 columns for a K that is a mult"),
        (lambda: pack_w4(MX_CODES[..., :24], MX_SCALES), ValueError, "codes must be of K / 2 columns for a K that is"),
        (lambda: pack_w4(CODES[..., :0], SCALES), ValueError, "codes must be of K / 8 columns"),
        (lambda: pack_w4(CODES[:, :0], SCALES), ValueError, "codes must be of one row or more"),
        (lambda: pack_w4(CODES, SCALES.float()), TypeError, "scales must be .* bfloat16, got .* float32"),
        (lambda: pack_w4(CODES, SCALES[:, :32]), ValueError, r"scales must be \[2, 64, 2\] bfloat16, got \[2, 32, 2\]"),
        (lambda: pack_w4(CODES.to("meta"), SCALES.to("meta")), ValueError, "codes must be on a device that holds data"),
        (lambda: pack_w4(CODES, with_scale(math.nan)), ValueError, "scales must be finite, got nan"),
        (lambda: pack_w4(CODES, with_scale(-math.inf)), ValueError, "scales must be finite, got -inf"),
        (
            lambda: pack_w4(CODES, with_scale(-0.5), out=PACKED.data.clone()),
            ValueError,
            "scales must be below 0.5 in magnitude to be packed into out, got -0.5",
        ),
        (lambda: pack_w4(MX_CODES, with_scale(255, MX_SCALES)), ValueError, "scales must be .* got 255, which is NaN"),
        (lambda: pack_w4(MX_CODES, with_scale(129, MX_SCALES)), ValueError, "at most 128, a scale of 2, got 129"),
        (lambda: pack_w4(CODES, SCALES.clone().requires_grad_()), ValueError, "scales must be a tensor that needs no"),
        (lambda: pack_w4(CODES[:, :63], SCALES[:, :63], gated=True), ValueError, "codes must be of an even N"),
        (lambda: pack_w4(CODES, SCALES, gated=1), TypeError, "gated must be True or False"),
        (lambda: pack_w4(CODES[None], SCALES[None]), ValueError, r"codes must be \(E, N, K\) or \(N, K\)"),
        (lambda: pack_w4(CODES, SCALES, out=MX_PACKED.data), ValueError, r"out must be \[2, 1, 1, 2304\] uint8"),
        (lambda: pack_w4(CODES, SCALES, out=PACKED.data[:1].expand(2, 1, 1, 2304)), ValueError, "out .* memory"),
        (lambda: unpack_w4((CODES, SCALES)), TypeError, "w4 must be a W4 as pack_w4 makes it, got tuple"),
        (lambda: unpack_w4(PACKED._replace(kind="mxfp4")), ValueError, r"data of w4 must be \[2, 1, 1, 2176\] uint8"),
        (lambda: unpack_w4(PACKED._replace(kind="fp4")), ValueError, "the kind of w4 must be one of 'int4', 'mxfp4'"),
        (lambda: unpack_w4(PACKED._replace(shape=(2, 64, 128))), ValueError, r"data of w4 must be \[2, 1, 2, 2304\]"),
        (lambda: unpack_w4(PACKED._replace(shape=(2, 64, 33))), ValueError, "shape of w4 must be of a K that is a mul"),
        (lambda: unpack_w4(PACKED._replace(data=CODES)), TypeError, "the data of w4 must be .* uint8, got .* int32"),
        (lambda: grouped_w4_gemm(A.float(), PACKED, **ROWS), TypeError, "a must be .* bfloat16, got .* float32"),
        (lambda: grouped_w4_gemm(A.half(), PACKED, **ROWS), TypeError, "a must be .* bfloat16, got .* float16"),
        (lambda: grouped_w4_gemm(A[:, :32], PACKED, **ROWS), ValueError, "the K of w4 must be 32 like that of a"),
        (lambda: grouped_w4_gemm(A, GATED, **ROWS), ValueError, "w4 must be packed with gated=False for"),
        (
            lambda: grouped_w4_gemm(A, PACKED, **ROWS, swiglu=True),
            ValueError,
            r"w4 must be packed with gated=True for swiglu=True, got gated=False; pack it with pack_w4",
        ),
        (
            lambda: grouped_w4_gemm(A, W4(PACKED.data[0], "int4", (64, 64), False), **ROWS),
            ValueError,
            r"the shape of w4 must be \(G, N, K\), got \[64, 64\]",
        ),
        (lambda: w4_gemm(A, PACKED), ValueError, r"the shape of w4 must be \(N, K\), got \[2, 64, 64\]"),
        (
            lambda: grouped_w4_gemm(A, PACKED, offsets=ints(0, 5), counts=ints(3, 2)),
            ValueError,
            r"offsets must be \[3\] int32",
        ),
        (
            lambda: grouped_w4_gemm(A, PACKED, offsets=ints(0, 3, 9), counts=ints(3, 2)),
            ValueError,
            "offsets must rise within 0 .. 5",
        ),
        (
            lambda: grouped_w4_gemm(A, PACKED, offsets=ints(0, 3, 5), counts=ints(3, 3)),
            ValueError,
            "counts must fit between the offsets",
        ),
        (
            lambda: grouped_w4_gemm(A.clone().requires_grad_(), PACKED, **ROWS, out=torch.empty(5, 64, dtype=BF16)),
            ValueError,
            "a must be a tensor that needs no gradient",
        ),
        (
            lambda: grouped_w4_gemm(A, PACKED, **ROWS, out=torch.empty(5, 32, dtype=BF16)),
            ValueError,
            r"out must be \[5, 64\] bfloat16",
        ),
        (lambda: k2kernels.quantize_int4_group32(torch.randn(4, 80)), ValueError, "w must be of a K that is a"),
        (lambda: k2kernels.quantize_int4_group32(torch.randn(4, 32), q_min=-6), ValueError, "q_min must be an int"),
        (lambda: k2kernels.quantize_int4_group32(torch.full((4, 32), math.inf)), ValueError, "w must be finite, got"),
        (lambda: k2kernels.quantize_mxfp4(torch.randn(4, 16)), ValueError, "w must be of a K that is a multiple of 32"),
        (lambda: k2kernels.quantize_mxfp4(torch.ones(4, 32).int()), TypeError, "w must be .* got .* int32"),
        (lambda: k2kernels.quantize_mxfp4(torch.full((4, 32), math.nan)), ValueError, "w must be finite"),
        (lambda: k2kernels.quantize_int4_group32(HUGE), ValueError, r"w must be finite in float32, got .* to 1e\+300"),
        (lambda: k2kernels.quantize_mxfp4(HUGE), ValueError, r"w must be finite in float32, got numbers up to 1e\+300"),
        (lambda: k2kernels.quantize_mxfp4(torch.randn(4, 32), scale_rule="ceil"), ValueError, "one of 'even', 'floor'"),
        (lambda: dequantize_w4(CODES, SCALES, dtype=torch.int8), ValueError, "dtype must be one of torch.float32"),
        (lambda: dequantize_w4(CODES, MX_SCALES), TypeError, "scales must be .* bfloat16, got .* uint8"),
        (lambda: empty_w4((2, 64, 48), "int4"), ValueError, "shape must be of a K that is a multiple of 32"),
        (lambda: empty_w4((2, 64, 64), "int8"), ValueError, "kind must be one of 'int4', 'mxfp4'"),
    ],
)  # fmt: skip
def test_bad_inputs(call, error, message):
    with pytest.raises(error, match=message):
        call()
