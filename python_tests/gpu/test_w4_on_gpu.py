"""Products with 4-bit weights on a GPU, at sizes of Kimi-K2: the bits of the kernels that they replace. `make gpu`."""

import pytest
import torch

import k2kernels as k
from k2kernels.ops.grouped_gemm import grouped_gemm
from k2kernels.testing.inputs import KIMI_K2

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HIDDEN, WIDTH = KIMI_K2.hidden, KIMI_K2.expert_intermediate
QUANTIZERS = {"int4": k.quantize_int4_group32, "mxfp4": k.quantize_mxfp4}
COUNTS = {
    "decode": [1, 0, 3, 16, 0, 7, 17, 2],
    "prefill": [65, 0, 257, 1, 64, 130, 63, 9],
    "one row": [0, 0, 0, 1, 0, 0, 0, 0],
}


def places(counts, apart=3):
    """offsets and counts of groups with rows of no group between them; which rows are real."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count + apart)
    real = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts)])
    return tuple(torch.tensor(x, dtype=torch.int32, device="cuda") for x in (starts, counts)), real.cuda()


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("swiglu", [False, True], ids=["down", "gate and up"])
@pytest.mark.parametrize("case", COUNTS)
def test_bits_of_grouped_gemm(case, swiglu, kind):
    """Where grouped_gemm has a kernel with another order of sums, compare with check_close instead."""
    n, depth = (2 * WIDTH, HIDDEN) if swiglu else (HIDDEN, WIDTH)
    (offsets, counts), real = places(COUNTS[case])
    a = torch.full((int(offsets[-1]), depth), float("nan"), dtype=torch.bfloat16, device="cuda")
    a[real] = torch.randn(len(real), depth, device="cuda").bfloat16()
    codes, scales = QUANTIZERS[kind](torch.randn(len(counts), n, depth, device="cuda").mul_(depth**-0.5))
    w = k.pack_w4(codes, scales, gated=swiglu)
    want = grouped_gemm(a, k.dequantize_w4(codes, scales), offsets=offsets, counts=counts)[real]
    want = k.swiglu(want) if swiglu else want
    before = k.launch_count("grouped_w4_gemm")
    for expected in (1, 10**6):  # the tile of 16 tokens and that of 64
        got = k.grouped_w4_gemm(a, w, offsets=offsets, counts=counts, swiglu=swiglu, expected=expected)[real]
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    assert k.launch_count("grouped_w4_gemm") == before + 2


@pytest.mark.parametrize("kind", [*QUANTIZERS, "int4_wide"])
def test_every_code_by_many_scales(kind):
    """Subnormal numbers among them: products with rows of the identity are the weights."""
    n = 4096
    raw = torch.randint(256, (1, n, 32), dtype=torch.uint8)
    if kind != "mxfp4":
        codes = raw.view(torch.int32)
        below = 0x3F00 if kind == "int4" else 0x7E00  # bits of 0.5; of a number whose multiples are finite
        scales = torch.randint(below, (1, n, 2), dtype=torch.int16).view(torch.bfloat16)
    else:
        codes, scales = raw, torch.randint(129, (1, n, 2), dtype=torch.uint8)
    want = k.dequantize_w4(codes, scales)[0]
    identity = torch.eye(64, dtype=torch.bfloat16, device="cuda")
    offsets, counts = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 64], [64]))
    w = k.pack_w4(codes.cuda(), scales.cuda())
    assert w.kind == kind
    got = k.grouped_w4_gemm(identity, w, offsets=offsets, counts=counts)
    assert torch.equal(got.mT.cpu(), want)
