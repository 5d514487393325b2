"""Two micro-batches of a pass, on a stream each. Run by `make gpu`."""

import copy

import pytest
import torch

from k2kernels.model import K2Config, K2Model
from k2kernels.parallel import expert_parallel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_streams_change_no_value():
    """Outputs and statistics to the bit those of passes one after the other, ten times; gradients up to the order of
    their sums."""
    torch.manual_seed(0)
    one = K2Model(K2Config.preset("tiny")).train().cuda()
    two = copy.deepcopy(one)
    expert_parallel(two, None, max_tokens=2 * 64, micro_batches=2)
    sequences, length, steps = 4, 64, 10
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, one.config.vocab_size, (sequences, length), generator=generator).cuda()
        wanted = [one(part, return_hidden=True)[1] for part in ids.split(sequences // 2)]
        _, hidden = two(ids, return_hidden=True)
        assert torch.equal(hidden, torch.cat(wanted)), f"step {step}"
        for one_or_two in ([*wanted], [hidden]):
            sum(h.float().square().sum() for h in one_or_two).backward()
    for (name, got), want in zip(two.named_parameters(), one.parameters()):
        assert (got.grad is None) == (want.grad is None), name
        if got.grad is not None:  # float32 sums over all tokens, in another order
            worst = float((got.grad.float() - want.grad.float()).abs().max())
            bound = torch.finfo(got.dtype).eps * sequences * length * steps * float(want.grad.float().norm())
            assert worst <= bound, f"{name}: {worst} apart, at most {bound}"
    for got, want in ((two.max_logits(), one.max_logits()), (two.expert_load(), one.expert_load())):
        assert all(torch.equal(got[layer], want[layer]) for layer in want)
