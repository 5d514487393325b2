"""Quantisers and SwiGLU against PyTorch's nearest equivalents, at sizes of a CPU."""

import pytest
import torch
import torch.nn.functional as F

from k2kernels.ops.quant import dequantize, quantize_1x128, quantize_128x128, swiglu, swiglu_quantize

SHAPES = {  # rows, columns
    "tiny": (2048, 128),
    "k2 token": (64, 7168),
    "k2 expert": (512, 2048),
}


@pytest.fixture(params=SHAPES)
def x(request):
    torch.manual_seed(0)
    return torch.randn(SHAPES[request.param]).bfloat16()


QUANTIZERS = {
    "1x128": quantize_1x128,
    "1x128 column": lambda x: quantize_1x128(x, scale_layout="column"),
    "1x128 power of two": lambda x: quantize_1x128(x, power_of_two=True),
    "1x128 transpose": lambda x: quantize_1x128(x, transpose=True),
    "128x128": quantize_128x128,
    "torch, one scale": lambda x: (x / (x.abs().amax() / 448)).to(torch.float8_e4m3fn),
}


@pytest.mark.benchmark(group="quantize")
@pytest.mark.parametrize("who", QUANTIZERS)
def test_quantize(benchmark, x, who):
    benchmark(QUANTIZERS[who], x)


@pytest.mark.benchmark(group="dequantize")
@pytest.mark.parametrize("who", ["k2kernels", "torch, one scale"])
def test_dequantize(benchmark, x, who):
    data, scales = quantize_128x128(x)
    if who == "k2kernels":
        benchmark(dequantize, data, scales, block=(128, 128), dtype=torch.bfloat16)
    else:
        benchmark(lambda: data.to(torch.bfloat16) * 0.5)


@pytest.mark.benchmark(group="swiglu")
@pytest.mark.parametrize("who", ["k2kernels", "torch"])
def test_swiglu(benchmark, x, who):
    if who == "k2kernels":
        benchmark(swiglu, x)
    else:
        gate, up = x.chunk(2, dim=-1)
        benchmark(lambda: F.silu(gate) * up)


@pytest.mark.benchmark(group="swiglu_quantize")
@pytest.mark.parametrize("who", ["one op", "two ops"])
def test_swiglu_quantize(benchmark, x, who):
    if who == "one op":
        benchmark(swiglu_quantize, x)
    else:
        benchmark(lambda: quantize_1x128(swiglu(x)))
