"""Newton-Schulz against the same quintic in plain PyTorch and torch.optim.Muon's own: at sizes of a CPU, and
Kimi-K2's on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from k2kernels.ops.newton_schulz import newton_schulz, newton_schulz_grouped
from k2kernels.reference.newton_schulz import on_gram_matrix
from k2kernels.testing.bench import Case

QUINTIC = (3.4445, -4.7750, 2.0315)
SHAPES = {  # B, m, n
    "tiny experts, gate and up": (48, 64, 128),
    "tiny o": (4, 128, 128),
    "q_b of one K2 head": (8, 192, 1536),
}
OURS = {
    "k2kernels float32": dict(iterate_dtype=torch.float32),
    "k2kernels float32, standard": dict(iterate_dtype=torch.float32, algorithm="standard"),
    "k2kernels float16": dict(),
}


def plain(x):
    """Five quintic steps of the standard iteration, batched, in x's dtype."""
    a, b, c = QUINTIC
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


@pytest.mark.benchmark(group="newton_schulz")
@pytest.mark.parametrize("who", [*OURS, "torch bmm float32", "torch bmm bfloat16", "torch.optim.Muon's"])
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz(benchmark, shape, who):
    torch.manual_seed(0)
    x = torch.randn(SHAPES[shape])
    if who in OURS:
        benchmark(newton_schulz, x, **OURS[who])
    elif who == "torch.optim.Muon's":
        benchmark(lambda: [_zeropower_via_newtonschulz(m, QUINTIC, 5, 1e-7) for m in x])
    else:
        benchmark(plain, x.bfloat16() if "bfloat16" in who else x)


@pytest.mark.benchmark(group="newton_schulz_grouped")
@pytest.mark.parametrize("who", ["grouped", "one by one"])
def test_newton_schulz_grouped(benchmark, who):
    torch.manual_seed(0)
    xs = [torch.randn(shape) for shape in SHAPES.values()]
    if who == "grouped":
        benchmark(newton_schulz_grouped, xs, iterate_dtype=torch.float32)
    else:
        benchmark(lambda: [newton_schulz(m, iterate_dtype=torch.float32) for x in xs for m in x])


# On a GPU

GPU_LISTS = {  # (B, m, n) of each tensor
    "216+1 of Kimi-K2": [(216, 2048, 7168), (1, 7168, 18432)],  # the mock of Dao-AILab/gram-newton-schulz
    "32x[2048x2048]": [(32, 2048, 2048)],
    "16x[2048x7168]": [(16, 2048, 7168)],
    "1x[7168x8192]": [(1, 7168, 8192)],  # o_proj
    "64x[192x1536]": [(64, 192, 1536)],  # the heads of q_b
    "128x[128x512]": [(128, 128, 512)],  # of kv_b, keys and values
    "64x[7168x128]": [(64, 7168, 128)],  # of o
    # As many as a small vision network has, of 14 shapes.
    "126 small": [(1, 16 << i % 4, (16 << i % 4) * (1, 2, 4, 9, 9, 1, 3)[i % 7]) for i in range(126)],
}


def gpu_cases() -> list[Case]:
    return [case(name, shapes) for name, shapes in GPU_LISTS.items()]


def flops(m: int, n: int, steps: int = 5) -> int:
    """FLOPs of one matrix with the algorithm of "auto": one triangle of symmetric results, one restart."""
    short, long = sorted((m, n))
    square, rectangle = short**3, 2 * short**2 * long  # a triangle of products of squares; X times a square
    if not on_gram_matrix("auto", m, n):
        return steps * (rectangle // 2 + square + rectangle)
    return 2 * (rectangle // 2 + rectangle) + (steps + (steps - 2) + 2 * (steps - 2)) * square


def case(name: str, shapes: Sequence[tuple[int, int, int]]) -> Case:
    elements = sum(batch * m * n for batch, m, n in shapes)

    def make(device: torch.device) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)

    def one_by_one(*xs):
        return [_zeropower_via_newtonschulz(m, QUINTIC, 5, 1e-7) for x in xs for m in x]

    bodies = {"k2kernels": lambda *xs: newton_schulz_grouped(xs), "torch bmm": lambda *xs: [plain(x) for x in xs]}
    if elements < 1e9:  # more takes a third of a second for each call
        bodies["standard"] = lambda *xs: newton_schulz_grouped(xs, algorithm="standard")
        bodies["torch.optim"] = one_by_one
    if importlib.util.find_spec("triton") and len(shapes) == 1:  # seconds for each shape
        bodies["torch.compile"] = torch.compile(plain, dynamic=False)
    return Case(
        op="newton_schulz",
        shape=name,
        bytes=4 * elements,  # bfloat16, read and written
        flops=sum(batch * flops(m, n) for batch, m, n in shapes),
        make=make,
        bodies=bodies,
    )
