"""Newton-Schulz against the same quintic in plain PyTorch and torch.optim.Muon's own, at sizes of a CPU."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from k2kernels.ops.newton_schulz import newton_schulz, newton_schulz_grouped

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
    """Five quintic steps as everybody writes them: batched, standard iteration, in x's dtype."""
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
