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
        (lambda: grouped_w4_linear(x, w * 800, **GROUPS, kind="mxfp4"), ValueError, "at most 128, a scale of 2, got"),
        (lambda: grouped_w4_linear(x, w * 100, **GROUPS), ValueError, "scales must be below 0.5 in magnitude, got"),
        (lambda: layer(w4="fp4"), ValueError, "w4 must be one of 'int4', 'mxfp4', got 'fp4'"),
        (lambda: layer(w4="int4", fp8=True), ValueError, "w4 must be None with fp8=True, got 'int4'"),
    ):
        with pytest.raises(error, match=message):
            call()


def layer(**options):
    x = torch.randn(5, 64).bfloat16()
    weights = torch.randn(4, 64, 64).bfloat16(), torch.randn(4, 64, 32).bfloat16()
    return moe_mlp(x, moe_route(torch.randn(5, 4), top_k=2), *weights, **options)


def test_names():
    assert k2kernels.grouped_w4_linear is grouped_w4_linear
