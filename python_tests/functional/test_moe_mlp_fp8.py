"""`moe_mlp` with FP8 products on weights in high precision: nearly the result and the gradients of float64."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import k2kernels
from k2kernels.functional.moe_mlp import moe_mlp
from k2kernels.ops.moe import moe_route
from k2kernels.ops.quant import quantize_128x128

TOKENS, EXPERTS, HIDDEN, INTERMEDIATE = 40, 5, 136, 72


def noise(got, want):
    """In dB."""
    return 10 * math.log10(float((got.double() - want).square().sum() / want.square().sum()))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    x, logits = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, EXPERTS)
    logits[:, 3] = -torch.inf  # an expert without tokens
    gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5
    return x, logits, gate_up, down


def run(x, logits, gate_up, down, **options):
    return moe_mlp(x, moe_route(logits, top_k=2), gate_up, down, residual=x, **options)


def gradients(layer, dtype=torch.float32, **options):
    leaves = [t.to(dtype).requires_grad_() for t in layer]
    grad = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = run(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("body", [None, ("sm_80", 1), ("sm_90a", 2)], ids=str)
def test_result_and_gradients(layer, body):
    """In a chain of up to four products of operands rounded to e4m3, each with noise of -28.8 dB: less than -22 dB."""
    want = gradients(layer, torch.float64)
    results = {}
    for alignment in (1, 128):
        options = dict(fp8=True, power_of_two=True, alignment=alignment)
        before = k2kernels.launch_count("grouped_fp8_gemm"), k2kernels.launch_count("grouped_fp8_wgrad")
        if body is None:
            results[alignment] = gradients(layer, **options)
        else:
            with k2kernels.emulated(*body):
                results[alignment] = gradients(layer, **options)
        launched = k2kernels.launch_count("grouped_fp8_gemm"), k2kernels.launch_count("grouped_fp8_wgrad")
        assert [b - a for a, b in zip(before, launched)] == ([0, 0] if body is None else [4, 2])
        for name, got, exact in zip(("out", "x", "logits", "gate_up", "down"), results[alignment], want):
            real = exact.isfinite()  # the gradient of a logit of -inf is none
            assert noise(got[real], exact[real]) < -22, name
        assert results[alignment][3][3].eq(0).all() and results[alignment][4][3].eq(0).all()
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[128]))  # moved or dispatched: the same blocks


def test_checkpointing_repeats_the_gradients(layer):
    options = dict(fp8=True, power_of_two=True, alignment=128)
    leaves = [t.requires_grad_() for t in layer]
    want = torch.autograd.grad(run(*leaves, **options).square().sum(), leaves)
    out = checkpoint(lambda *args: run(*args, **options), *leaves, use_reentrant=False)
    assert all(torch.equal(g, w) for g, w in zip(torch.autograd.grad(out.square().sum(), leaves), want))


def test_weights_need_not_be_of_the_activations_dtype(layer):
    x, logits, gate_up, down = layer
    out = run(x.bfloat16(), logits, gate_up.requires_grad_(), down.bfloat16(), fp8=True)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and gate_up.grad.dtype == torch.float32


def test_refused(layer):
    x, logits, gate_up, down = layer
    with pytest.raises(TypeError, match="moe_mlp: fp8 must be True or False, got 1"):
        run(*layer, fp8=1)
    with pytest.raises(
        TypeError, match=r"moe_mlp: x must be .*bfloat16 or float16 or float32, got \[40, 136\] float64"
    ):
        run(*[t.double() for t in layer], fp8=True)
    codes = quantize_128x128(gate_up), quantize_128x128(down)
    with pytest.raises(ValueError, match=r"gate_up must be a tensor in high precision with fp8=True, got a pair"):
        run(x, logits, *codes, fp8=True)
    with pytest.raises(TypeError, match=r"moe_mlp: gate_up must be .* float32, got \[5, 144, 136\] float8_e4m3fn"):
        run(x, logits, codes[0][0], down, fp8=True)
