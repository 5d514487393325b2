"""A GPU later than Hopper runs the portable kernels, with the bits of Ada: nothing takes it for a Hopper."""

import pytest
import torch

import k2kernels


def _mla_decode():
    q, cache = torch.randn(1, 2, 16, 576).bfloat16(), torch.randn(3, 64, 576).bfloat16()
    table, lengths = torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([150], dtype=torch.int32)
    return k2kernels.mla_decode(q, cache, table, lengths, softmax_scale=0.1, split=64)[:2]


def _fp8_gemm():
    operands = *k2kernels.quantize_1x128(torch.randn(40, 384)), *k2kernels.quantize_128x128(torch.randn(200, 384))
    return (k2kernels.fp8_gemm(*operands),)


def _newton_schulz():
    return (k2kernels.newton_schulz(torch.randn(2, 130, 260), steps=2),)


@pytest.mark.parametrize("op", [_mla_decode, _fp8_gemm, _newton_schulz], ids=lambda op: op.__name__[1:])
def test_portable_kernels_serve_it(op):
    results = []
    for arch in ("sm_89", "sm_120"):
        torch.manual_seed(0)
        before = k2kernels.launch_count(op.__name__[1:])
        with k2kernels.emulated(arch):
            results.append(op())
        assert k2kernels.launch_count(op.__name__[1:]) > before
    for ada, newer in zip(*results):
        assert torch.equal(ada, newer)
