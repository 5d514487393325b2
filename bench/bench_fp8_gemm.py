"""FP8 GEMMs against torch.matmul on unquantised operands, at sizes of a CPU."""

import pytest
import torch

from k2kernels.ops.fp8_gemm import fp8_gemm, grouped_fp8_gemm, grouped_fp8_wgrad
from k2kernels.ops.quant import quantize_1x128, quantize_128x128

SHAPES = {  # M, N, K
    "tiny": (512, 256, 128),
    "k2 q_a + kv_a, 1 token": (1, 2112, 7168),
    "k2 kv_b, 64 tokens": (64, 2048, 512),  # 8 of 64 heads
}
GROUPED = {  # G, rows of each group, N, K
    "tiny": (8, 256, 256, 64),
    "k2, narrow": (48, 8, 128, 256),
}
PEERS = {"torch float32": torch.float32, "torch bfloat16": torch.bfloat16}


@pytest.mark.benchmark(group="fp8_gemm")
@pytest.mark.parametrize("who", ["k2kernels", *PEERS])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_gemm(benchmark, shape, who):
    torch.manual_seed(0)
    m, n, k = SHAPES[shape]
    x, w = torch.randn(m, k), torch.randn(n, k)
    if who == "k2kernels":
        benchmark(fp8_gemm, *quantize_1x128(x), *quantize_128x128(w))
    else:
        benchmark(torch.matmul, x.to(PEERS[who]), w.to(PEERS[who]).T)


@pytest.mark.benchmark(group="grouped_fp8_gemm")
@pytest.mark.parametrize("who", ["contiguous", "masked", *PEERS])
@pytest.mark.parametrize("shape", GROUPED)
def test_grouped_fp8_gemm(benchmark, shape, who):
    torch.manual_seed(0)
    groups, rows, n, k = GROUPED[shape]
    x, w = torch.randn(groups, rows, k), torch.randn(groups, n, k)
    weights = quantize_128x128(w)
    if who == "contiguous":
        offsets = torch.arange(groups + 1, dtype=torch.int32) * rows
        benchmark(grouped_fp8_gemm, *quantize_1x128(x.flatten(0, 1)), *weights, offsets=offsets)
    elif who == "masked":
        masked_m = torch.full((groups,), rows, dtype=torch.int32)
        benchmark(grouped_fp8_gemm, *quantize_1x128(x), *weights, masked_m=masked_m)
    else:
        benchmark(torch.bmm, x.to(PEERS[who]), w.to(PEERS[who]).mT)


@pytest.mark.benchmark(group="grouped_fp8_wgrad")
@pytest.mark.parametrize("who", ["k2kernels", *PEERS])
def test_grouped_fp8_wgrad(benchmark, who):
    torch.manual_seed(0)
    groups, rows, n, k = 8, 256, 256, 64
    dy, x = torch.randn(groups, rows, n), torch.randn(groups, rows, k)
    if who == "k2kernels":
        operands = [t for y in (dy, x) for t in quantize_1x128(y.flatten(0, 1), transpose=True)]
        offsets = torch.arange(groups + 1, dtype=torch.int32) * rows
        benchmark(grouped_fp8_wgrad, *operands, offsets=offsets, counts=offsets.diff())
    else:
        benchmark(torch.bmm, dy.to(PEERS[who]).mT, x.to(PEERS[who]))
