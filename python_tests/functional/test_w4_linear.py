"""Training for 4-bit weights: the forward pass is the served product, gradients are straight-through."""

import pytest
import torch
from w4_cases import QUANTIZERS

import k2kernels
from k2kernels import (
    dequantize_w4,
    fake_quantize_int4,
    fake_quantize_mxfp4,
    grouped_w4_gemm,
    grouped_w4_linear,
    moe_mlp,
    pack_w4,
)
from k2kernels.ops.grouped_gemm import grouped_gemm
from k2kernels.ops.moe import moe_route
from k2kernels.ops.w4_gemm import gradient
from k2kernels.reference import _w4_training as w4_training

of_each_kind = pytest.mark.parametrize("kind", QUANTIZERS)
GROUPS = dict(offsets=torch.tensor([0, 3, 3, 10], dtype=torch.int32), counts=torch.tensor([3, 0, 6], dtype=torch.int32))
REAL = [0, 1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fake, kind", [(fake_quantize_int4, "int4"), (fake_quantize_mxfp4, "mxfp4")])
def test_fake_quantisation(fake, kind, dtype):
    w = torch.randn(2, 8, 64).to(dtype).requires_grad_()
    out = fake(w)
    assert out.dtype == torch.bfloat16 and torch.equal(out, dequantize_w4(*QUANTIZERS[kind](w)))
    grad = torch.randn(2, 8, 64).bfloat16()
    (d_w,) = torch.autograd.grad(out, w, grad)
    assert d_w.dtype == dtype and torch.equal(d_w, grad.to(dtype))
    if kind == "mxfp4" or dtype == torch.bfloat16:  # of float32 weights, amax / 7 is no quotient of a bfloat16
        assert torch.equal(fake(out.detach()), out)  # what was quantised stays


@of_each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_is_the_served_product(kind, dtype):
    x, w = torch.randn(10, 96).bfloat16().requires_grad_(), (torch.randn(3, 40, 96) / 8).to(dtype).requires_grad_()
    out = grouped_w4_linear(x, w, **GROUPS, kind=kind)
    codes = QUANTIZERS[kind](w)
    assert torch.equal(out, grouped_w4_gemm(x.detach(), pack_w4(*codes), **GROUPS))

    grad = torch.randn(10, 40).bfloat16()
    d_x, d_w = torch.autograd.grad(out, [x, w], grad)
    weights = dequantize_w4(*codes).requires_grad_()
    want_x, want_w = torch.autograd.grad(grouped_gemm(x, weights, **GROUPS), [x, weights], grad)
    assert torch.equal(d_x[REAL], want_x[REAL]) and torch.equal(d_w, want_w.to(dtype)) and (d_w[1] == 0).all()


@of_each_kind
def test_layer_trains_as_it_is_served(kind):
    torch.manual_seed(0)
    x, logits = torch.randn(20, 64).bfloat16(), torch.randn(20, 4)
    weights = torch.randn(4, 192, 64) / 8, torch.randn(4, 64, 96) / 8
    masters = [w.bfloat16().requires_grad_() for w in weights]
    x.requires_grad_()
    out = moe_mlp(x, moe_route(logits, top_k=2), *masters, w4=kind)
    codes = [QUANTIZERS[kind](w) for w in masters]
    packed = pack_w4(*codes[0], gated=True), pack_w4(*codes[1])
    with torch.no_grad():
        assert torch.equal(out, moe_mlp(x, moe_route(logits, top_k=2), *packed))
    plain = [dequantize_w4(*pair).requires_grad_() for pair in codes]
    want = torch.autograd.grad(moe_mlp(x, moe_route(logits, top_k=2), *plain).sum(), [x, *plain])
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), [x, *masters]), want))


@of_each_kind
@pytest.mark.parametrize("swiglu", [False, True])
def test_gradient_of_a_kernel_takes_few_experts_at_a_time(kind, swiglu, monkeypatch):
    """The bits of the kernels with the dequantised weights, in groups of one expert, of two and of all."""
    x, grad = torch.randn(10, 96).bfloat16().requires_grad_(), torch.randn(10, 40 // (1 + swiglu)).bfloat16()
    codes = QUANTIZERS[kind](torch.randn(3, 40, 96) / 8)
    seen, dequantize = [], gradient.dequantize_w4
    monkeypatch.setattr(gradient, "dequantize_w4", lambda *args: seen.append(dequantize(*args)) or seen[-1])
    with k2kernels.emulated("sm_80"):
        product = grouped_gemm(x, dequantize_w4(*codes), **GROUPS)
        (want,) = torch.autograd.grad(k2kernels.swiglu(product) if swiglu else product, x, grad)
        for experts, launches in ((1, 3), (2, 2), (8, 1)):
            monkeypatch.setattr(gradient, "SCRATCH", experts * 40 * 96 + 7)
            out = grouped_w4_gemm(x, pack_w4(*codes, gated=swiglu), **GROUPS, swiglu=swiglu)
            before = k2kernels.launch_count("grouped_gemm_dgrad"), k2kernels.launch_count("grouped_gemm")
            (got,) = torch.autograd.grad(out, x, grad)
            after = k2kernels.launch_count("grouped_gemm_dgrad"), k2kernels.launch_count("grouped_gemm")
            assert [b - a for a, b in zip(before, after)] == [launches, launches * swiglu]
            assert torch.equal(got[REAL], want[REAL])
    assert len(seen) == 3 * 3 * (1 + swiglu) and all(weight.shape == (40, 96) for weight in seen)


@of_each_kind
def test_masters_packed_before(kind):
    x, w = torch.randn(10, 96).bfloat16(), torch.randn(3, 40, 96) / 8
    packed = gradient.pack_masters(w, kind)
    assert packed[1:] == (kind, (3, 40, 96), False) and torch.equal(packed.data, pack_w4(*QUANTIZERS[kind](w)).data)
    want = grouped_w4_linear(x, w, **GROUPS, kind=kind)
    assert torch.equal(grouped_w4_linear(x, w, **GROUPS, kind=kind, packed=packed), want)
    other = "mxfp4" if kind == "int4" else "int4"
    for wrong in (gradient.pack_masters(w, other), packed._replace(gated=True), gradient.pack_masters(w[:2], kind)):
        with pytest.raises(ValueError, match=rf"packed must be of kind {kind}, shape \[3, 40, 96\], not gated, got"):
            grouped_w4_linear(x, w, **GROUPS, kind=kind, packed=wrong)
    if kind == "mxfp4":  # where the host does not look: a scale above 2 is infinite for a kernel
        scales = torch.zeros_like(packed.data)
        w4_training.w4_pack_masters_into(scales, w * 800, kind)
        assert int(scales[..., 2048:].max()) == 255


def test_bad_inputs():
    x, w = torch.randn(10, 96).bfloat16(), torch.randn(3, 40, 96) / 8
    for call, error, message in (
        (lambda: grouped_w4_linear(x.float(), w, **GROUPS), TypeError, "x must be .* bfloat16, got .* float32"),
        (
            lambda: grouped_w4_linear(x[:, :40], w[..., :40], **GROUPS),
            ValueError,
            "w must be of a K that is a multiple",
        ),
        (lambda: grouped_w4_linear(x, w, **GROUPS, kind="int8"), ValueError, "kind must be one of 'int4', 'mxfp4'"),
        (lambda: grouped_w4_linear(x, w * torch.nan, **GROUPS), ValueError, "w must be finite"),
        (lambda: grouped_w4_linear(x, w * 800, **GROUPS, kind="mxfp4"), ValueError, "at most 128, a scale of 2 .* got"),
        (
            lambda: grouped_w4_linear(x, w * 100, **GROUPS),
            ValueError,
            r"^grouped_w4_linear: the scales of w must be below 0\.5 in magnitude \(weights below 3\.49\), got .*; "
            "kind='mxfp4' takes weights below 14; or divide w",
        ),
        (
            lambda: moe_mlp(x, moe_route(torch.randn(10, 3), top_k=2), w, w, w4_packed=(w, w)),
            ValueError,
            "w4_packed must be None without w4",
        ),
        (lambda: layer(w4="fp4"), ValueError, "w4 must be one of 'int4', 'mxfp4', got 'fp4'"),
        (lambda: layer(w4="int4", fp8=True), ValueError, "w4 must be None with fp8=True, got 'int4'"),
    ):
        with pytest.raises(error, match=message):
            call()
    for kind, most in dict(int4=3.49, mxfp4=13.99).items():  # what the messages say of weights
        grouped_w4_linear(x, w.clamp(-0.1, 0.1).index_fill(2, torch.tensor([5]), most), **GROUPS, kind=kind)


def layer(**options):
    x = torch.randn(5, 64).bfloat16()
    weights = torch.randn(4, 64, 64).bfloat16(), torch.randn(4, 64, 32).bfloat16()
    return moe_mlp(x, moe_route(torch.randn(5, 4), top_k=2), *weights, **options)


def test_names():
    assert k2kernels.grouped_w4_linear is grouped_w4_linear
