import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import k2kernels
from k2kernels import _emu
from k2kernels.ops import quant
from k2kernels.ops.quant import dequantize, quantize_1x128, quantize_128x128, rms_norm_quantize, swiglu_quantize
from k2kernels.testing.compare import check_close, check_op, check_rms_norm_quantize
from k2kernels.testing.inputs import exact_rms_rows, guarded, guarded_memory

E4M3 = torch.float8_e4m3fn

# Every test that takes `body` runs with the reference and with the kernels, in several schedules of their threads.
BODIES = {
    "reference": contextlib.nullcontext,
    "round robin": lambda: k2kernels.emulated("sm_80", seed=0),
    "depth first": lambda: k2kernels.emulated("sm_90a", seed=1),
    "random 2": lambda: k2kernels.emulated("sm_80", seed=2),
    "random 3": lambda: k2kernels.emulated("sm_90a", seed=3),
}


@pytest.fixture(params=BODIES)
def body(request):
    with BODIES[request.param]():
        before = k2kernels.launch_count()
        yield
        params = request.node.callspec.params
        runs = request.param != "reference" and 0 not in params.get("shape", ())  # nothing runs for nothing
        assert (k2kernels.launch_count() > before) == runs


with_kernels = pytest.mark.usefixtures("body")


def e4m3_value(code):
    """The number an e4m3 code stands for, by the format's own words: sign, 4 bits of exponent, 3 of mantissa."""
    exponent, mantissa = code >> 3 & 0xF, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    magnitude = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -magnitude if code & 0x80 else magnitude


VALUES = np.array([e4m3_value(code) for code in range(0x7F)])  # the finite codes without sign, ascending


def quantize_group(x, power_of_two=False):
    """Codes and scale of one group by the rules, in NumPy: nearest value by search instead of a cast."""
    x = x.float().numpy().astype(np.float32)
    finite = np.isfinite(x)
    scale = np.float32(np.max(np.abs(x[finite]), initial=0)) / np.float32(448)
    scale = max(scale, np.float32(2.0**-126))
    if power_of_two:
        fraction, exponent = np.frexp(scale)
        scale = np.float32(np.ldexp(1.0, exponent - 1 if fraction == 0.5 else exponent))
    ratio = (np.where(finite, x, np.float32(0)) / scale).astype(np.float32)
    magnitude = np.abs(ratio).astype(np.float64)
    middles = (VALUES[:-1] + VALUES[1:]) / 2
    code = np.searchsorted(middles, magnitude, side="left")
    tie = (code < len(middles)) & (magnitude == middles[np.minimum(code, len(middles) - 1)])
    code = code + (tie & (code % 2 == 1))  # ties to even
    code = np.where(np.signbit(ratio), code | 0x80, code)
    return torch.from_numpy(np.where(finite, code, 0x7F).astype(np.uint8)), float(scale)


def assert_blocks(x, data, scales, rows, columns, power_of_two=False):
    """data and scales are bit for bit what the rules give for every block of the matrix x."""
    assert data.dtype == E4M3 and scales.dtype == torch.float32
    assert data.shape == x.shape and data.is_contiguous()
    assert scales.shape == (-(-x.shape[0] // rows), -(-x.shape[1] // columns))
    codes = data.view(torch.uint8)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(rows * i, rows * (i + 1)), slice(columns * j, columns * (j + 1))
            code, scale = quantize_group(x[block], power_of_two)
            assert float(scales[i, j]) == scale, (i, j)
            assert torch.equal(codes[block], code), (i, j)


def hard_rows(dtype):
    """Rows of 200: the ends of the range, denormals, NaN, infinities, and amax at and beside 448 * 2**n."""
    spread = torch.randn(12, 200) * torch.exp2(torch.randint(-130, 120, (12, 1)))
    wide = torch.randn(8, 200) * torch.exp2(torch.randint(-20, 4, (8, 200)))
    bits = torch.randint(-(2**31), 2**31, (8, 200)).int().view(torch.float32)  # any float32, NaN included
    tiny = torch.randint(0, 5, (2, 200)).int().view(torch.float32)  # multiples of 2**-149
    zero = torch.zeros(2, 200)
    ends = torch.randn(6, 200).clamp(-3, 3)
    ends[:, 0] = torch.tensor([448.0, -448.0, 448 * 2.0**-12, 448 + 2.0**-15, 448 - 2.0**-15, 2.0**8])
    poisoned = torch.randn(4, 200)
    poisoned[:, [3, 190]] = torch.tensor([math.nan, math.inf, -math.inf, -math.nan]).unsqueeze(-1)
    alone = torch.full((1, 200), math.inf)
    return torch.cat([spread, wide, bits, tiny, zero, -zero, ends, poisoned, alone]).to(dtype)


@with_kernels
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_1x128_bit_for_bit(dtype, power_of_two):
    x = hard_rows(dtype)
    assert_blocks(x, *quantize_1x128(x, power_of_two=power_of_two), 1, 128, power_of_two)


@with_kernels
def test_every_code_and_every_middle_between_codes_rounds_to_even():
    values = torch.from_numpy(np.concatenate([VALUES, (VALUES[:-1] + VALUES[1:]) / 2])).float()
    beside = torch.cat([values, values.nextafter(torch.tensor(0.0)), values.nextafter(torch.tensor(1e9))]).clamp(
        max=448
    )
    x = torch.cat([torch.full((len(beside), 1), 448.0), torch.stack([beside, -beside], 1)], 1)  # scale 1
    assert_blocks(x, *quantize_1x128(x), 1, 128)


@with_kernels
def test_zeros_have_zero_codes_and_a_finite_scale():
    data, scales = quantize_1x128(torch.zeros(2, 128))
    assert data.view(torch.uint8).eq(0).all() and scales.eq(2.0**-126).all()
    assert quantize_128x128(torch.zeros(130, 3))[1].eq(2.0**-126).all()


@with_kernels
def test_non_finite_elements_leave_the_others_alone():
    x = torch.randn(3, 256)
    clean, clean_scales = quantize_1x128(torch.where(torch.arange(256) == 5, 0, x))
    x[:, 5] = torch.tensor([math.nan, math.inf, -math.inf])
    data, scales = quantize_1x128(x)
    assert torch.equal(scales, clean_scales)
    assert data.view(torch.uint8)[:, 5].tolist() == [0x7F] * 3
    others = torch.arange(256) != 5
    assert torch.equal(data.view(torch.uint8)[:, others], clean.view(torch.uint8)[:, others])


@with_kernels
def test_power_of_two_scales_round_up_and_keep_exact_powers():
    amax = torch.tensor([448.0, 448 * 2.0**-7, 449.0, 447.0, 300.0, 448.0 + 2.0**-14, 1e-30])
    scales = quantize_1x128(amax[:, None], power_of_two=True)[1][:, 0].tolist()
    assert scales[:6] == [1, 2.0**-7, 2, 1, 1, 2]
    assert scales[6] == 2.0 ** math.ceil(math.log2(1e-30 / 448))


@with_kernels
@pytest.mark.parametrize("shape", [(5, 200), (8, 128), (1, 300), (0, 256), (3, 5, 300), (2, 4, 0)])
@pytest.mark.parametrize("transpose", [False, True])
def test_column_layout_holds_the_same_scales(shape, transpose):
    x = torch.randn(shape)
    data, scales = quantize_1x128(x, transpose=transpose)
    column_data, column = quantize_1x128(x, transpose=transpose, scale_layout="column")
    assert scales.is_contiguous() and torch.equal(column, scales)
    assert torch.equal(column_data.view(torch.uint8), data.view(torch.uint8))
    if not transpose and 0 not in shape:
        normed = [rms_norm_quantize(x, x.flatten(0, -2)[0], scale_layout=layout) for layout in ("row", "column")]
        assert torch.equal(normed[0][1], normed[1][1]) and normed[1][1].stride() == column.stride()
        assert torch.equal(normed[0][0].view(torch.uint8), normed[1][0].view(torch.uint8))
    rows, blocks = scales.shape[-2:]
    stored_rows = -(-rows // 4) * 4
    if scales.numel():
        assert column.stride()[-2:] == (1, stored_rows)
        assert column.stride()[:-2] == (blocks * stored_rows,) * (len(shape) - 2)
        # Whole columns lie in memory, so that a kernel may load 16 bytes anywhere.
        assert column.untyped_storage().nbytes() == 4 * math.prod(shape[:-2]) * blocks * stored_rows


@with_kernels
@pytest.mark.parametrize("shape", [(300, 200), (128, 64), (1, 5), (3, 130, 70), (2, 0, 4)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_transpose_is_the_quantised_transpose(shape, power_of_two):
    x = torch.randn(shape).bfloat16()
    data, scales = quantize_1x128(x, transpose=True, power_of_two=power_of_two)
    want, want_scales = quantize_1x128(x.transpose(-1, -2).contiguous(), power_of_two=power_of_two)
    assert data.is_contiguous() and torch.equal(data.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(scales, want_scales)


@with_kernels
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(128, 128), (576, 200), (64, 300), (192, 1), (1, 129), (0, 3), (3, 0)])
def test_quantize_128x128_bit_for_bit(shape, power_of_two):
    w = torch.randn(shape) * torch.exp2(torch.randint(-3, 3, shape))
    assert_blocks(w, *quantize_128x128(w, power_of_two=power_of_two), 128, 128, power_of_two)


@with_kernels
def test_stacked_weights_are_quantised_one_by_one():
    w = torch.randn(3, 192, 130).bfloat16()
    data, scales = quantize_128x128(w)
    for expert in range(3):
        one, one_scales = quantize_128x128(w[expert])
        assert torch.equal(data[expert].view(torch.uint8), one.view(torch.uint8))
        assert torch.equal(scales[expert], one_scales)


NORMED = [(9, 200), (5, 7168), (3, 1536), (17, 512), (2, 3, 2100), (2, 8192), (4, 33), (1, 1)]


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", NORMED)
def test_rms_norm_quantize_is_bit_for_bit_the_norms_but_for_its_inverse(shape, dtype):
    # eps is most of some rows' divisor, and nothing in that of others.
    x = (torch.randn(shape) * torch.logspace(-4, 2, shape[-2])[:, None]).to(dtype)
    weight = (torch.randn(shape[-1]) + 1).to(dtype)
    for options in (dict(eps=1e-6), dict(eps=0.25, power_of_two=True)):
        check_rms_norm_quantize(*rms_norm_quantize(x, weight, **options), x, weight, **options)


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [200, 512, 1536, 7168])
def test_rms_norm_quantize_is_the_models_norm_and_quantize_1x128(columns, dtype):
    x, norm = exact_rms_rows(11, columns).to(dtype), torch.nn.RMSNorm(columns, 0.0, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    weight = norm.weight.detach()
    got = rms_norm_quantize(x, weight, eps=0.0)
    normed = (x.double() / x.double().square().mean(-1, keepdim=True).sqrt() * weight.double()).float().to(dtype)
    with torch.no_grad():
        assert torch.equal(norm(x), normed)
    assert_blocks(normed, *got, 1, 128)
    for same in (torch.cat([x, x.new_full((11, 3), math.nan)], 1)[:, :columns], x.T.contiguous().T, x[:, None]):
        data, scales = rms_norm_quantize(same, weight, eps=0.0)
        assert torch.equal(data.view(torch.uint8).flatten(0, -2), got[0].view(torch.uint8))
        assert torch.equal(scales.flatten(0, -2), got[1])
    ones = (x.double() / x.double().square().mean(-1, keepdim=True).sqrt()).to(dtype)
    data, scales = rms_norm_quantize(ones, weight, eps=3.0, power_of_two=True)
    assert_blocks((ones.double() / 2 * weight.double()).float().to(dtype), data, scales, 1, 128, power_of_two=True)


@with_kernels
def test_rms_norm_quantize_of_a_row_does_not_depend_on_the_others():
    for columns in (512, 1000, 3000):
        x, weight = torch.randn(13, columns), torch.randn(columns)
        data, scales = rms_norm_quantize(x, weight)
        for row in (0, 6, 12):
            alone, alone_scales = rms_norm_quantize(x[row : row + 1], weight)
            assert torch.equal(alone.view(torch.uint8)[0], data.view(torch.uint8)[row])
            assert torch.equal(alone_scales[0], scales[row])


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_quantize_of_zeros_infinities_and_nan(dtype):
    x = exact_rms_rows(5, 300).to(dtype)
    x[0], x[1, 7], x[2, 200] = 0, math.inf, math.nan
    x[3] *= 1e30  # the sum of squares overflows; in float16 the elements do
    weight = torch.ones(300, dtype=dtype)
    data, scales = rms_norm_quantize(x, weight, eps=0.0)
    codes = data.view(torch.uint8)
    assert codes[[0, 2]].eq(0x7F).all() and scales[[0, 2]].eq(2.0**-126).all()  # 0 / 0, and x / NaN
    assert scales[[1, 3]].eq(2.0**-126).all()  # x / infinity: zeros with x's signs, but for infinity / infinity
    assert torch.equal(codes[[1, 3]], torch.where(x[[1, 3]].isinf(), 0x7F, torch.signbit(x[[1, 3]]) * 0x80))
    weight[[5, 250]] = torch.tensor([math.inf, math.nan], dtype=dtype)
    other, other_scales = rms_norm_quantize(x, weight, eps=0.0)
    assert other.view(torch.uint8)[4, [5, 250]].eq(0x7F).all()
    finite = weight.isfinite()
    clean, clean_scales = rms_norm_quantize(x, torch.where(finite, weight, 0), eps=0.0)
    assert torch.equal(other.view(torch.uint8)[4, finite], clean.view(torch.uint8)[4, finite])
    assert torch.equal(other_scales[4], clean_scales[4])
    assert rms_norm_quantize(x, weight, eps=1.0)[0].view(torch.uint8)[0, finite].eq(0).all()


def test_rms_norm_quantize_of_longer_rows_is_the_references():
    x, weight = exact_rms_rows(2, 8193), torch.randn(8193)
    check_rms_norm_quantize(*rms_norm_quantize(x, weight, eps=0.0), x, weight, eps=0.0)
    with k2kernels.emulated(), pytest.raises(k2kernels.UnsupportedError, match="at most 8192 columns, got 8193"):
        rms_norm_quantize(x, weight)
    with pytest.raises(RuntimeError, match="at most 8192 columns, got 8193"):  # the two limits are one
        _emu.rms_norm_quantize(x, torch.empty(8193), 0.0, False, torch.empty(1, 8193), torch.empty(1, 65))


def test_more_normed_rows_than_blocks():
    # A block goes on to further rows, with the sums of two warps a row in the other place.
    x, weight = exact_rms_rows(16500, 520).bfloat16(), torch.randn(520).bfloat16()
    want = rms_norm_quantize(x, weight, eps=0.0)
    with k2kernels.emulated(seed=2):
        got = rms_norm_quantize(x, weight, eps=0.0)
    assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(got[1], want[1])


def every_code():
    """All codes with six scales, and their exact products."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).expand(3, 256)
    scales = torch.tensor([[1.0, 2.0**-7], [0.3, 1.7], [1e-3, 2.0**-20]])
    values = torch.tensor([e4m3_value(code) for code in range(256)], dtype=torch.float64)
    return codes, scales, values * scales.double().repeat_interleave(128, dim=1)


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_every_code(dtype):
    codes, scales, exact = every_code()
    got = dequantize(codes, scales, dtype=dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got, exact.float().to(dtype), rtol=0, atol=0, equal_nan=True)


def test_dequantize_to_float64_is_exact_and_the_references():
    codes, scales, exact = every_code()
    got = dequantize(codes, scales, dtype=torch.float64)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)
    with k2kernels.emulated(), pytest.raises(k2kernels.UnsupportedError, match="no kernel computes in float64"):
        dequantize(codes, scales, dtype=torch.float64)


@with_kernels
@pytest.mark.parametrize("shape", [(192, 256), (576, 200), (2, 136, 72), (5, 1, 129)])
@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
def test_dequantize_takes_the_block_as_given(shape, block):
    data = torch.randn(shape).to(E4M3)
    *leading, rows, columns = shape
    scales = torch.rand(*leading, -(-rows // block[0]), -(-columns // 128)) + 0.5
    row_block, column_block = torch.arange(rows) // block[0], torch.arange(columns) // 128
    want = (data.double() * scales[..., row_block, :][..., column_block].double()).float()
    assert torch.equal(dequantize(data, scales, block=block), want)
    assert torch.equal(dequantize(data, scales.mT.contiguous().mT, block=list(block)), want)
    assert torch.equal(dequantize(data.mT.contiguous().mT, scales, block=block), want)


@with_kernels
def test_a_round_trip_is_within_half_a_step():
    x = torch.randn(40, 300, dtype=torch.float32)
    data, scales = quantize_1x128(x)
    error = (dequantize(data, scales).double() - x.double()).abs()
    scale = scales.double().repeat_interleave(128, 1)[:, :300]
    assert (error <= torch.maximum(x.double().abs() * 2.0**-4, scale * 2.0**-10) * (1 + 1e-6)).all()


@pytest.mark.parametrize("shape", [(1100, 1, 1100), (8200, 1, 1)])
def test_more_tiles_than_blocks(shape):
    # A block goes on to further columns and rows; the grid of a small input has a block for each tile.
    x = torch.randn(shape).bfloat16()
    want = quantize_1x128(x)
    with k2kernels.emulated(seed=2):
        got = quantize_1x128(x)
    assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("shape", [(1100, 1, 130)])
def test_more_tiles_than_blocks_transposed(shape):
    x = torch.randn(shape).bfloat16()
    want = quantize_1x128(x, transpose=True)
    with k2kernels.emulated(seed=2):
        got = quantize_1x128(x, transpose=True)
    assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(got[1], want[1])


OFFSETS = torch.tensor([0, 128, 128, 256, 384], dtype=torch.int32)
COUNTS = torch.tensor([100, 0, 128, 1], dtype=torch.int32)
REAL = torch.zeros(400, dtype=torch.bool)
for _start, _count in zip(OFFSETS.tolist(), COUNTS.tolist()):
    REAL[_start : _start + _count] = True


@with_kernels
@pytest.mark.parametrize("transpose", [False, True])
def test_padding_rows_are_not_quantised(transpose):
    x = torch.where(REAL[:, None], torch.randn(400, 130), math.nan)
    data, scales = quantize_1x128(x, transpose=transpose, offsets=OFFSETS, counts=COUNTS)
    want, want_scales = quantize_1x128(torch.where(REAL[:, None], x, 0), transpose=transpose)
    rows = slice(None) if transpose else REAL
    assert torch.equal(data.view(torch.uint8)[rows], want.view(torch.uint8)[rows])
    assert torch.equal(scales[rows], want_scales[rows])


@with_kernels
def test_groups_without_counts_fill_the_offsets():
    x = torch.where(torch.arange(400)[:, None] < 384, torch.randn(400, 130), math.nan)
    data, scales = quantize_1x128(x, transpose=True, offsets=OFFSETS)
    want, want_scales = quantize_1x128(x.nan_to_num(), transpose=True)
    assert torch.equal(data.view(torch.uint8), want.view(torch.uint8)) and torch.equal(scales, want_scales)


@with_kernels
def test_masked_groups():
    counts = torch.tensor([0, 5, 2], dtype=torch.int32)
    real = torch.arange(5) < counts[:, None]
    x = torch.where(real[..., None], torch.randn(3, 5, 130), math.nan)
    data, scales = quantize_1x128(x, counts=counts)
    want, want_scales = quantize_1x128(x[real])
    assert torch.equal(data.view(torch.uint8)[real], want.view(torch.uint8)) and torch.equal(scales[real], want_scales)
    data, scales = quantize_1x128(x, transpose=True, counts=counts)
    want, want_scales = quantize_1x128(x.nan_to_num(), transpose=True)
    assert torch.equal(data.view(torch.uint8), want.view(torch.uint8)) and torch.equal(scales, want_scales)


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_swiglu_is_silu_gate_times_up(dtype):
    gate_up = torch.randn(5, 3, 64).to(dtype)
    exact = gate_up.double()
    want = F.silu(exact[..., :32]) * exact[..., 32:]
    check_close(k2kernels.swiglu(gate_up), want, same_precision=F.silu(gate_up[..., :32]) * gate_up[..., 32:])


def test_swiglu_gradient():
    gate_up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(k2kernels.swiglu, gate_up)


def swiglu_gradient(grad, gate_up):
    """The gradient in float64, and what float32 may lose of it: some roundings of terms that partly cancel."""
    grad, gate, up = grad.double(), *gate_up.double().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    want = torch.cat([grad * up * (sigmoid + gate * sigmoid * (1 - sigmoid)), grad * gate * sigmoid], dim=-1)
    lost = torch.cat([grad * up * sigmoid * (1 + gate.abs()), want[..., gate.shape[-1] :]], dim=-1).abs()
    # Units of 2**-23: sigmoid 3 (exp 2, sum and quotient a half each), 1 - sigmoid as much, the products 1.5.
    return want, 8 * 2.0**-23 * lost + torch.finfo(torch.float32).tiny


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3, 64), (9, 640), (1, 3), (33,), (0, 16), (4, 0)])
def test_swiglu_gradient_rounds_once(shape, dtype):
    gate_up = (torch.randn(*shape[:-1], 2 * shape[-1]) * 4).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    before = {op: k2kernels.launch_count(op) for op in ("swiglu", "swiglu_backward")}
    k2kernels.swiglu(gate_up).backward(grad)
    ran = {op: k2kernels.launch_count(op) - count for op, count in before.items()}
    assert ran["swiglu_backward"] == ran["swiglu"]  # which runs where `body` says
    want, lost = swiglu_gradient(grad, gate_up.detach())
    info = torch.finfo(dtype)
    assert gate_up.grad.dtype == dtype
    check_close(gate_up.grad, want, budget=lost + info.eps / 2 * want.abs() + info.tiny * info.eps)


@with_kernels
def test_swiglu_gradient_of_strided_inputs_and_at_the_ends_of_the_range():
    gate_up = torch.randn(6, 96).bfloat16()
    grad = torch.randn(6, 48).bfloat16()
    want = quant._swiglu_backward(grad, gate_up)
    wide = torch.full((6, 130), math.nan, dtype=torch.bfloat16)
    wide[:, 1:97] = gate_up
    for same in (gate_up.T.contiguous().T, wide[:, 1:97]):
        assert torch.equal(quant._swiglu_backward(grad, same), want)
    for same in (grad.T.contiguous().T, torch.cat([grad, grad.new_full((6, 16), math.nan)], 1)[:, :48]):
        assert torch.equal(quant._swiglu_backward(same, gate_up), want)
    assert torch.equal(
        quant._swiglu_backward(grad[:1, :1].expand(6, 48), gate_up),
        quant._swiglu_backward(grad[:1, :1].repeat(6, 48), gate_up),
    )
    gate = torch.tensor([-math.inf, -3e38, -200.0, -100.0, 0.0, 100.0, 3e38, math.inf, math.nan])
    ends = torch.cat([gate, torch.ones(9)])[None]
    with k2kernels.backend("reference"):
        want = quant._swiglu_backward(torch.ones(1, 9), ends)
    torch.testing.assert_close(quant._swiglu_backward(torch.ones(1, 9), ends), want, equal_nan=True)


@with_kernels
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_swiglu_quantize_rounds_once(dtype, weighted, power_of_two):
    gate_up = torch.randn(64, 2 * 200).to(dtype)
    weights = torch.rand(64) if weighted else None
    data, scales = swiglu_quantize(gate_up, weights=weights, power_of_two=power_of_two)
    gate, up = gate_up.double().chunk(2, dim=-1)
    hidden = gate / (1 + torch.exp(-gate)) * up * (1 if weights is None else weights[:, None].double())
    want, want_scales = quantize_1x128(hidden.float(), power_of_two=power_of_two)
    torch.testing.assert_close(scales, want_scales, rtol=1e-6, atol=0)
    steps = (data.view(torch.uint8).int() - want.view(torch.uint8).int()).abs()
    assert steps.max() <= 1
    # The last bit of exp moves few codes; a rounding to bfloat16 in between would move some percent of them.
    assert steps.float().mean() < 1e-3


@with_kernels
def test_swiglu_quantize_layouts_and_groups():
    gate_up = torch.where(REAL[:, None], torch.randn(400, 2 * 136), math.nan).bfloat16()
    weights = torch.where(REAL, torch.rand(400), math.nan)
    want, want_scales = swiglu_quantize(gate_up[REAL], weights=weights[REAL])
    for layout in ("row", "column"):
        data, scales = swiglu_quantize(gate_up, weights=weights, scale_layout=layout, offsets=OFFSETS, counts=COUNTS)
        assert scales.stride() == ((2, 1) if layout == "row" else (1, 400))
        assert torch.equal(data.view(torch.uint8)[REAL], want.view(torch.uint8))
        assert torch.equal(scales[REAL], want_scales)
    real = REAL.view(4, 100)
    counts = torch.tensor([100, 28, 50, 0], dtype=torch.int32)
    real = torch.arange(100) < counts[:, None]
    masked = torch.where(real[..., None], torch.randn(4, 100, 2 * 136), math.inf)
    data, scales = swiglu_quantize(masked, counts=counts)
    want, want_scales = swiglu_quantize(masked[real])
    assert torch.equal(data.view(torch.uint8)[real], want.view(torch.uint8)) and torch.equal(scales[real], want_scales)


COUNT = torch.tensor([5, 0, 8], dtype=torch.int32)
HALF = torch.bfloat16
# A call, and the bytes of elements that must come in and go out; scales and group sizes are not counted.
MOVED = {
    "rows": (lambda: quantize_1x128(torch.randn(24, 1024, dtype=HALF)), 24 * 1024 * 2, 24 * 1024),
    "rows of float32": (lambda: quantize_1x128(torch.randn(24, 640)), 24 * 640 * 4, 24 * 640),
    "transposed": (lambda: quantize_1x128(torch.randn(256, 192, dtype=HALF), transpose=True), 256 * 192 * 2, 256 * 192),
    "blocks": (lambda: quantize_128x128(torch.randn(192, 384, dtype=HALF)), 192 * 384 * 2, 192 * 384),
    "groups": (lambda: quantize_1x128(torch.randn(3, 8, 256, dtype=HALF), counts=COUNT), 13 * 256 * 2, 13 * 256),
    "swiglu": (lambda: k2kernels.swiglu(torch.randn(24, 512, dtype=HALF)), 24 * 512 * 2, 24 * 256 * 2),
    "swiglu_quantize": (
        lambda: swiglu_quantize(torch.randn(3, 8, 512, dtype=HALF), counts=COUNT),
        13 * 512 * 2,
        13 * 256,
    ),
    "swiglu_backward": (
        lambda: quant._swiglu_backward(torch.randn(24, 256, dtype=HALF), torch.randn(24, 512, dtype=HALF)),
        24 * 768 * 2,
        24 * 512 * 2,
    ),
    # The weight once a row of a block, from L1.
    "rms_norm_quantize": (
        lambda: rms_norm_quantize(torch.randn(5, 7168, dtype=HALF), torch.randn(7168, dtype=HALF)),
        5 * 2 * 7168 * 2,
        5 * 7168,
    ),
    "dequantize": (
        lambda: dequantize(torch.zeros(24, 512).to(E4M3), torch.ones(24, 4), dtype=HALF),
        24 * 512,
        24 * 1024,
    ),
}


@pytest.mark.parametrize("case", MOVED)
def test_kernels_move_each_byte_once_in_vectors(case):
    call, loaded, stored = MOVED[case]
    with k2kernels.emulated():
        before = _emu.counters()
        call()
        after = _emu.counters()
    assert after["bytes_loaded"] - before["bytes_loaded"] == loaded
    assert after["bytes_stored"] - before["bytes_stored"] == stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 200), (1, 6), (3, 130, 70), (9, 1024)])
def test_kernels_stay_within_their_inputs(shape, dtype):
    x = guarded(torch.randn(shape).to(dtype))
    with k2kernels.emulated(seed=1):
        for data, scales in (quantize_1x128(x), quantize_1x128(x, transpose=True), quantize_128x128(x)):
            block = (1, 128) if scales.shape[-2] == data.shape[-2] else (128, 128)
            dequantize(guarded(data), guarded(scales), block=block)
        swiglu_quantize(x)
        k2kernels.swiglu(x)
        rms_norm_quantize(x, guarded(x.flatten(0, -2)[0]))
        quant._swiglu_backward(guarded(x[..., : x.shape[-1] // 2]), x)


def test_guarded_memory_faults_when_a_kernel_leaves_it():
    x = guarded_memory(4096, claimed=8192).view(torch.float32).view(4, 512)
    with k2kernels.emulated(), pytest.raises(_emu.EmulatorError, match=r"access beyond a global allocation.* block"):
        quantize_1x128(x)


X = torch.linspace(-3, 5, 6 * 200).view(6, 200)
GROUPS = (torch.tensor([0, 3, 6], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32))
REGISTERED = {
    "quantize_1x128": (quant._quantize_1x128, (X, False, "row", False, None, None)),
    "quantize_1x128 column": (quant._quantize_1x128, (X, True, "column", False, None, None)),
    "quantize_1x128 transpose": (quant._quantize_1x128, (X.bfloat16(), False, "column", True, *GROUPS)),
    "quantize_128x128": (quant._quantize_128x128, (X.view(2, 3, 200), True)),
    "rms_norm_quantize": (quant._rms_norm_quantize, (X, X[0], 1e-6, True, "column")),
    "swiglu_backward": (quant._swiglu_backward, (X[:, :100].bfloat16(), X.bfloat16())),
    "dequantize 1x128": (quant._dequantize, (X.to(E4M3), X[:, :2], 1, 128, torch.bfloat16)),
    "dequantize 128x128": (quant._dequantize, (X.to(E4M3), X[:1, :2], 128, 128, torch.float64)),
    "swiglu_quantize": (quant._swiglu_quantize, (X, X[:, 0], False, "column", *GROUPS)),
}


@pytest.mark.parametrize("case", REGISTERED)
def test_registration(case):
    check_op(*REGISTERED[case])


def test_swiglu_registration():
    gate_up = torch.randn(4, 16, requires_grad=True)
    check_op(quant._swiglu, (gate_up,), differentiable=True, compiled=lambda: k2kernels.swiglu(gate_up))


def chain(x, gate_up):
    data, scales = quantize_1x128(x, scale_layout="column")
    transposed = quantize_1x128(x, transpose=True, offsets=GROUPS[0])
    weight = quantize_128x128(x, power_of_two=True)
    return (
        dequantize(data, scales, dtype=torch.bfloat16),
        dequantize(*transposed),
        dequantize(*weight, block=(128, 128)),
        dequantize(*swiglu_quantize(gate_up, weights=x[:, 0])),
        dequantize(*rms_norm_quantize(x, x[0], scale_layout="column")),
    )


def test_compiles_as_one_graph():
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager", dynamic=True)
    for args in [(X, X.bfloat16()), (X[:, :131], X[:, :6].bfloat16())]:
        for got, want in zip(compiled(*args), chain(*args)):
            assert got.dtype == want.dtype and torch.equal(got, want)


def test_meta_tensors():
    x = torch.empty(3, 300, 400, device="meta")
    data, scales = quantize_1x128(x, scale_layout="column")
    assert data.shape == (3, 300, 400) and scales.stride() == (4 * 300, 1, 300)
    assert [t.shape for t in quantize_1x128(x, transpose=True)] == [(3, 400, 300), (3, 400, 3)]
    assert [t.shape for t in quantize_128x128(x)] == [(3, 300, 400), (3, 3, 4)]
    assert dequantize(data, scales, dtype=torch.float16).dtype == torch.float16
    assert [t.shape for t in swiglu_quantize(x)] == [(3, 300, 200), (3, 300, 2)]
    data, scales = rms_norm_quantize(x, torch.empty(400, device="meta"), scale_layout="column")
    assert data.shape == (3, 300, 400) and scales.stride() == (4 * 300, 1, 300)


@with_kernels
def test_numpy_arrays_and_strided_views():
    x = torch.randn(20, 300)
    want, want_scales = quantize_1x128(x)
    for same in (x.numpy(), torch.cat([x, x], 1)[:, :300], x.T.contiguous().T):
        data, scales = quantize_1x128(same)
        assert torch.equal(data.view(torch.uint8), want.view(torch.uint8)) and torch.equal(scales, want_scales)


def test_no_backward():
    x = torch.randn(2, 128, requires_grad=True)
    with pytest.raises(RuntimeError, match="quantize_1x128: this op has no backward"):
        quantize_1x128(x)[1].sum().backward()
    with pytest.raises(RuntimeError, match="rms_norm_quantize: this op has no backward"):
        rms_norm_quantize(x, x[0])[1].sum().backward()


INTS = torch.tensor([0, 1, 2], dtype=torch.int32)
BAD = {
    "vector": (lambda: quantize_1x128(X[0]), ValueError, r"quantize_1x128: x must be \[\.\.\., M, K\] .*, got \[200\]"),
    "float64": (lambda: quantize_1x128(X.double()), TypeError, "x must be .* bfloat16 or float16 or float32, got .*64"),
    "list": (lambda: quantize_128x128([1.0]), TypeError, "quantize_128x128: w must be a tensor .* got list"),
    "layout": (
        lambda: quantize_1x128(X, scale_layout="col"),
        ValueError,
        "scale_layout must be one of 'row', 'column'",
    ),
    "data": (lambda: dequantize(X, X), TypeError, "dequantize: data must be .* float8_e4m3fn, got .* float32"),
    "block": (lambda: dequantize(X.to(E4M3), X, block=(96, 128)), ValueError, "block must be one of"),
    "block int": (lambda: dequantize(X.to(E4M3), X, block=128), ValueError, "block must be one of"),
    "dtype": (lambda: dequantize(X.to(E4M3), X[:, :2], dtype=torch.int8), ValueError, "dtype must be one of"),
    "scales": (
        lambda: dequantize(X.to(E4M3), X[:, :3]),
        ValueError,
        r"scales must be \[6, 2\] float32, got \[6, 3\] float32; one per 1x128 of data",
    ),
    "norm weight": (
        lambda: rms_norm_quantize(X, X[0, :5]),
        ValueError,
        r"rms_norm_quantize: weight must be \[K=200\] float32, got \[5\] float32; one factor per column",
    ),
    "norm dtype": (
        lambda: rms_norm_quantize(X, X[0].bfloat16()),
        TypeError,
        "weight must be .* float32, got .*bfloat16",
    ),
    "norm vector": (lambda: rms_norm_quantize(X[0], X[0]), ValueError, r"x must be \[\.\.\., M, K\]"),
    "norm of nothing": (
        lambda: rms_norm_quantize(X[:, :0], X[0, :0]),
        ValueError,
        "x must be at least one column wide",
    ),
    "norm eps": (lambda: rms_norm_quantize(X, X[0], eps=-1e-6), ValueError, "eps must be at least 0, got -1e-06"),
    "odd": (lambda: swiglu_quantize(X[:, :3]), ValueError, "gate_up must be even in its last axis"),
    "weights": (lambda: swiglu_quantize(X, weights=X[0]), ValueError, r"weights must be \[6\] float32, got \[200\]"),
    "offsets 3-D": (lambda: quantize_1x128(X[None], offsets=INTS), ValueError, "x must be a matrix where offsets"),
    "offsets none": (lambda: quantize_1x128(X, offsets=INTS[:0]), ValueError, r"offsets must be \[G\+1\]"),
    "counts 2-D": (lambda: swiglu_quantize(X, counts=INTS), ValueError, "gate_up must be .* counts come without"),
    "counts size": (lambda: quantize_1x128(X, offsets=INTS, counts=INTS), ValueError, r"counts must be \[2\] int32"),
    "offsets long": (
        lambda: quantize_1x128(X, offsets=INTS.long()),
        TypeError,
        "offsets must be .* int32, got .*int64",
    ),
    "offsets range": (lambda: quantize_1x128(X, offsets=INTS * 4), ValueError, "offsets must rise within 0 .. 6"),
    "offsets fall": (lambda: quantize_1x128(X, offsets=2 - INTS), ValueError, "offsets must rise within 0 .. 6"),
    "offsets negative": (lambda: swiglu_quantize(X, offsets=INTS - 1), ValueError, "offsets must rise within 0 .. 6"),
    "counts fit": (
        lambda: swiglu_quantize(X, offsets=INTS, counts=INTS[:2] * 2),
        ValueError,
        r"swiglu_quantize: counts must fit between the offsets, at most \[1, 1\], got \[0, 2\]",
    ),
    "counts negative": (lambda: quantize_1x128(X, offsets=INTS, counts=-INTS[:2]), ValueError, "counts must fit"),
    "counts mask": (
        lambda: swiglu_quantize(X.view(3, 2, 200), counts=INTS * 2),
        ValueError,
        "swiglu_quantize: counts must be within 0 .. 2",
    ),
    "swiglu odd": (
        lambda: k2kernels.swiglu(torch.randn(2, 3)),
        ValueError,
        r"swiglu: gate_up must be even in its last axis, got \[2, 3\]",
    ),
    "swiglu dtype": (
        lambda: k2kernels.swiglu(torch.arange(4)),
        TypeError,
        r"swiglu: gate_up must be .* float32 or .*, got \[4\] int64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
