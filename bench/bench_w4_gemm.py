"""The grouped product with 4-bit weights against the one with their bfloat16, at sizes of a CPU; packing too.

On a GPU: one of eight ranks' share of Kimi-K2's gate and up, a decoding step and a prefill.
"""

import pytest
import torch

from k2kernels.ops.grouped_gemm import grouped_gemm
from k2kernels.ops.w4_gemm import (
    dequantize_w4,
    grouped_w4_gemm,
    pack_w4,
    quantize_int4_group32,
    quantize_mxfp4,
    unpack_w4,
)
from k2kernels.testing.bench import Case
from k2kernels.testing.inputs import KIMI_K2

QUANTIZERS = {"int4": quantize_int4_group32, "mxfp4": quantize_mxfp4}
BITS = {"int4": 4.5, "mxfp4": 4.25}  # of a weight, with its share of a scale


def make(groups, rows, n, k, kind, device="cpu"):
    """a, packed and bfloat16 weights, offsets and counts of equal groups."""
    offsets = torch.arange(groups + 1, dtype=torch.int32, device=device) * rows
    a = torch.randn(groups * rows, k, device=device).bfloat16()
    w = [QUANTIZERS[kind](torch.empty(n, k, device=device).normal_(std=k**-0.5)) for _ in range(groups)]
    codes, scales = (torch.stack(x) for x in zip(*w))
    return a, pack_w4(codes, scales), dequantize_w4(codes, scales), offsets, offsets.diff()


def ours(a, packed, weights, offsets, counts):
    return grouped_w4_gemm(a, packed, offsets=offsets, counts=counts)


def bfloat16(a, packed, weights, offsets, counts):
    return grouped_gemm(a, weights, offsets=offsets, counts=counts)


@pytest.mark.benchmark(group="w4_gemm")
@pytest.mark.parametrize("who", [ours, bfloat16], ids=["k2kernels", "k2kernels bf16"])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_product(benchmark, kind, who):
    torch.manual_seed(0)
    inputs = make(4, 16, 256, 256, kind)
    benchmark(lambda: who(*inputs))


@pytest.mark.benchmark(group="w4 packing")
@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("step", ["quantize", "pack", "unpack", "dequantize"])
def test_packing(benchmark, kind, step):
    w = torch.randn(2, 512, 1024).bfloat16()
    codes, scales = QUANTIZERS[kind](w)
    packed = pack_w4(codes, scales)
    steps = {
        "quantize": lambda: QUANTIZERS[kind](w),
        "pack": lambda: pack_w4(codes, scales),
        "unpack": lambda: unpack_w4(packed),
        "dequantize": lambda: dequantize_w4(codes, scales),
    }
    benchmark(steps[step])


def gpu_case(kind: str, rows: int) -> Case:
    """gate and up of 48 experts with `rows` tokens each."""
    groups, n, k = KIMI_K2.experts // 8, 2 * KIMI_K2.expert_intermediate, KIMI_K2.hidden
    return Case(
        "w4_gemm",
        f"{kind}, {groups} groups of {rows} rows",
        groups * (int(n * k * BITS[kind] / 8) + 2 * rows * (n + k)),
        lambda device: make(groups, rows, n, k, kind, device),
        {"k2kernels": ours, "k2kernels bf16": bfloat16},
        flops=2 * groups * rows * n * k,
        dtype="bf16",
    )


def gpu_cases() -> list[Case]:
    """A decoding step and a prefill of each kind."""
    return [gpu_case(kind, rows) for kind in QUANTIZERS for rows in (16, 1024)]
