"""Dispatch and combine over ranks of one process against the same on one rank, at sizes of a CPU.

What several GPUs take depends on their links; `csrc/exchange/README.md` says what is sent.
"""

import pytest
import torch

from k2kernels.ops.moe import moe_combine, moe_dispatch
from k2kernels.parallel import VirtualRanks

TOKENS, EXPERTS, TOP_K, HIDDEN = 256, 64, 6, 256


@pytest.mark.benchmark(group="dispatch + combine of 256 tokens")
@pytest.mark.parametrize("world", [1, 2, 8])
def test_dispatch_combine(benchmark, world):
    torch.manual_seed(0)
    x, weights = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K)
    indices = torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices.int()
    if world == 1:

        def run():
            sent = moe_dispatch(x, indices, weights, num_experts=EXPERTS)
            return moe_combine(sent.data, sent.handle)
    else:
        sizes = dict(num_experts=EXPERTS, hidden=HIDDEN, top_k=TOP_K, max_tokens=TOKENS // world)
        ranks = VirtualRanks(world, row_dtype=torch.float32, **sizes)
        parts = [list(t.chunk(world)) for t in (x, indices, weights)]

        def run():
            sent = ranks.dispatch(*parts)
            return ranks.combine([one.data for one in sent], [one.handle for one in sent])

    with torch.no_grad():
        benchmark(run)
