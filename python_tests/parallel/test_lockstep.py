"""Generation over ranks that share experts: the tokens of one process, whoever ends first."""

import pytest
import tiny
import torch
from ranks import run

from k2kernels.engine.lockstep import Lockstep
from k2kernels.model.moe import Moe
from k2kernels.ops.moe import moe_combine, moe_dispatch

CHECKS = [("ep 2", name) for name in ("tokens", "speculative", "replayed", "errors", "on_token", "parts")]
CHECKS += [("ep 4", "tokens"), ("dp 2, ep 2", "speculative"), ("dp 2, ep 2", "errors")]
FAULTS = ("fails_between_passes", "fails_in_a_pass", "does_not_come")
RUNS = [("lockstep", 2), ("lockstep", 4), *((fault, 2) for fault in FAULTS)]


@pytest.fixture(scope="module")
def found():
    return run([(f"serve_scenarios.{scenario}", world) for scenario, world in RUNS])


@pytest.mark.parametrize("mesh, check", CHECKS)
def test_lockstep(found, mesh, check):
    for rank, results in enumerate(found[f"serve_scenarios.lockstep/{2 if mesh == 'ep 2' else 4}"]):
        assert isinstance(results, dict), f"rank {rank} {results}"
        result = results.get(f"{mesh}: {check}", "not run: an earlier check failed")
        assert result is None, f"rank {rank}: {result}"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_does_not_go_on_is_named(found, fault):
    first, second = found[f"serve_scenarios.{fault}/2"]
    assert first["seen"] == ("no error" if fault == "does_not_come" else "MemoryError: no memory left")
    assert second["seen"].startswith("PeerTimeout: ExpertParallel: rank 1 timed out in "), second
    assert "rank 0 late, although alive" in second["seen"] and second["seconds"] < 6, second


class Scripted:
    """An exchange of one rank that says it is one of two, of which the other runs `others` passes in all."""

    world_size = 2

    def __init__(self, experts, others):
        self.experts, self.others, self.calls, self.passes = experts, others, [], 0

    def any_rank(self, flag):
        self.passes += 1
        self.calls.append(0)
        return flag or self.passes <= self.others

    def agree(self, caller, error, **same):
        if error is not None:
            raise error

    def dispatch(self, x, indices, weights, **options):
        self.calls[-1] += 1
        return moe_dispatch(x, indices, weights, num_experts=self.experts, **options)

    combine = staticmethod(moe_combine)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
def test_all_passes_have_the_same_exchanges(speculative, chunk):
    """Prompts, chunks, decoding, and passes of other ranks alone."""
    model = tiny.model(num_nextn_predict_layers=2)
    exchange = Scripted(8, others=12)
    for layer in model.modules():
        if isinstance(layer, Moe):
            layer.exchange = exchange
    ids = torch.arange(20).view(2, 10)
    model.generate(ids, max_new_tokens=4, eos_token_ids=[], prefill_chunk=chunk, speculative=speculative)
    layers = 3 + (2 if speculative else 0)
    assert exchange.calls == [layers] * 12 + [0]


def test_one_process_needs_no_agreement():
    model = tiny.model(num_hidden_layers=2)
    ranks, order = Lockstep(model), []

    def passes():
        order.append("before")
        yield
        order.append("a pass")

    assert not ranks.several
    ranks.run(passes(), 0)
    assert order == ["before", "a pass"]
    with pytest.raises(ValueError, match="input_ids must be"):
        model.generate(torch.zeros(0, 4, dtype=torch.int64), max_new_tokens=2)
