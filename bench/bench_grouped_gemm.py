"""The grouped matrix product of unquantised experts and its gradients against a loop of torch.mm, at sizes of a CPU.

On a GPU: one of eight ranks' share of Kimi-K2, where `bench_moe.py` measures the product as steps of a layer too.
"""

import pytest
import torch

from k2kernels.ops.grouped_gemm import grouped_gemm
from k2kernels.testing.bench import Case
from k2kernels.testing.inputs import KIMI_K2

SHAPES = {"8 experts of 512 rows": (8, 512, 256, 64), "384 experts of 10 rows": (384, 10, 128, 256)}  # G, rows, N, K


def make(groups, rows, n, k, device="cpu", dtype=torch.float32):
    """a, b, offsets and counts of equal groups."""
    offsets = torch.arange(groups + 1, dtype=torch.int32, device=device) * rows
    a = torch.randn(groups * rows, k, device=device).to(dtype)
    b = torch.empty(groups, n, k, device=device, dtype=dtype).normal_(std=k**-0.5)
    return a, b, offsets, offsets.diff()


def ours(a, b, offsets, counts):
    return grouped_gemm(a, b, offsets=offsets, counts=counts)


def torch_mm(a, b, offsets, counts):
    return torch.cat([rows @ weight.T for rows, weight in zip(a.split(counts.tolist()), b)])


@pytest.mark.benchmark(group="grouped_gemm with backward")
@pytest.mark.parametrize("who", [ours, torch_mm], ids=["k2kernels", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(benchmark, shape, who):
    torch.manual_seed(0)
    a, b, *groups = make(*SHAPES[shape])
    leaves = a.requires_grad_(), b.requires_grad_()
    benchmark(lambda: torch.autograd.grad(who(*leaves, *groups).sum(), leaves))


def gpu_case(rows: int) -> Case:
    """gate and up of 48 experts with `rows` tokens each."""
    groups, n, k = KIMI_K2.experts // 8, 2 * KIMI_K2.expert_intermediate, KIMI_K2.hidden
    return Case(
        "grouped_gemm",
        f"{groups} groups of {rows} rows",
        2 * groups * (n * k + rows * (n + k)),
        lambda device: make(groups, rows, n, k, device, torch.bfloat16),
        {"k2kernels": ours, "torch": lambda a, b, offsets, counts: torch._grouped_mm(a, b.mT, offs=offsets[1:])},
        flops=2 * groups * rows * n * k,
        dtype="bf16",
    )


def gpu_cases() -> list[Case]:
    """A decoding step and a prefill."""
    return [gpu_case(16), gpu_case(1024)]
