"""Pipelines of 2 and 4 processes, against one process with all tokens; how layers are divided; what is refused."""

import itertools
import re

import pytest
import tiny
import torch
from ranks import run
from test_sharded_muon import tolerance
from torch.distributed.pipelining._backward import stage_backward, stage_backward_input, stage_backward_weight
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from k2kernels.model import K2Config, K2Model
from k2kernels.model.stage import K2Stage, K2Stages
from k2kernels.parallel.pipeline import costs, split_layers, stages_of_rank

SCENARIOS = [("schedules", 2), ("experts", 4), ("halves", 4), ("mtp", 2), ("fsdp", 4)]


@pytest.fixture(scope="module")
def found():
    names = [*SCENARIOS, ("checkpoints", 2), ("refused", 2), ("overflow", 2), ("page", 2)]
    results = run([(f"pipeline_scenarios.{name}", world) for name, world in names])
    return {name.partition(".")[2].partition("/")[0]: result for name, result in results.items()}


@pytest.mark.parametrize("scenario, world", SCENARIOS)
def test_a_pipeline_is_one_process(found, scenario, world):
    """Losses, gradients, statistics in each of three steps; weights after them."""
    clips = {}
    assert len(found[scenario]) == world
    for rank, results in enumerate(found[scenario]):
        assert isinstance(results, dict), f"rank {rank}: {results}"
        for schedule, seen in results.items():
            assert seen["moved"] > 1e-2, f"rank {rank}, {schedule}: {seen}"
            assert seen["worst"] < tolerance(seen["longest"]) < 1e-9, f"rank {rank}, {schedule}: {seen}"
            clips[schedule] = clips.get(schedule, 0) + seen["clips"]
    assert all(clips.values()), clips


def test_a_checkpoint_goes_on_in_other_stages(found):
    for rank, seen in enumerate(found["checkpoints"]):
        assert isinstance(seen, dict) and seen["worst"] < tolerance(seen["longest"]), f"rank {rank}: {seen}"


def test_all_stages_skip_the_same_steps(found):
    for rank, seen in enumerate(found["overflow"]):
        assert isinstance(seen, dict), f"rank {rank}: {seen}"
        assert seen.pop("nothing") == [False, True], f"rank {rank}"
        assert seen.pop("flat") == [rank == 0, rank == 1]  # on one stage only, where the mesh has no others
        assert len(seen) == 4 and all(case == [True, False] for case in seen.values()), f"rank {rank}: {seen}"


MESSAGES = {
    "schedule": "ValueError: Pipeline: schedule must be one of",
    "each": "ValueError: Pipeline: each must be 2 for this schedule, got 3",
    "each of 1F1B": "ValueError: Pipeline: each must be 1 for this schedule, got 2",
    "each of interleaved": "ValueError: Pipeline: each must be 2 or more for this schedule, got 1",
    "layers": "ValueError: Pipeline: each must be such that pp .* each is at most the 4 layers, got 3 with pp=2",
    "tied": "ValueError: K2Stage: tie_word_embeddings must be False",
    "no pp": "ValueError: Pipeline: the mesh must have a dimension 'pp'",
    "tokens": r"ValueError: Pipeline.step: input_ids must be \[.*8, .*7\]",
    "target": "ValueError: Pipeline.step: targets as input_ids: input_ids must be 0 to 255",
    "generate": "UnsupportedError: generate: the model must be whole",
    "save": "UnsupportedError: save_pretrained: the model must be whole",
    "dtype": "ValueError: Pipeline: a stage must give torch.float32",
    "forward": "UnsupportedError: K2Stages: call its stages",
    "checkpointed": "UnsupportedError: Pipeline: with ZBVZeroBubble no layer may be checkpointed",
}


def test_messages(found):
    for rank, results in enumerate(found["refused"]):
        assert isinstance(results, dict), f"rank {rank}: {results}"
        assert results.keys() == MESSAGES.keys()
        for case, message in results.items():
            assert re.match(MESSAGES[case], message), f"rank {rank}, {case}: {message}"


def test_the_page(found):
    losses, others = found["page"]
    assert losses == others and len(losses) == 3 and losses[2] < losses[0]


# ---- without ranks


@pytest.mark.parametrize("fp8", [False, True])
def test_gradients_of_weights_computed_later_have_the_same_bits(fp8):
    """As zero-bubble schedules compute them, through every autograd function of the model."""
    torch.manual_seed(0)
    stage = K2Stage(tiny.config("kimi"), range(1, 3))  # attention, experts
    tiny.fill(stage)
    stage.train().use_fp8(fp8)
    x, grad = torch.randn(2, 2, 7, 96)
    x.requires_grad_()
    dx, *_ = stage_backward(stage(x), grad, [x])
    want = {name: p.grad for name, p in stage.named_parameters()}
    stage.zero_grad()
    x.grad = None
    later, groups = stage_backward_input([stage(x)], [grad], [x], stage.parameters())
    assert all(p.grad is None for p in stage.parameters())
    stage_backward_weight(stage.parameters(), groups)
    assert torch.equal(later[0], dx)
    assert all(torch.equal(p.grad, want[name]) for name, p in stage.named_parameters())


def test_stages_are_the_model():
    """One after the other they compute what the whole model does, and several as one have the names of these."""
    whole = tiny.model("kimi", num_nextn_predict_layers=1)
    stages = [K2Stage(whole.config, layers).eval() for layers in (range(0, 1), range(1, 3), range(3, 4))]
    names = [name for stage in stages for name in stage.state_dict()]
    assert sorted(names) == sorted(whole.state_dict())
    for stage in stages:
        stage.load_whole(whole.state_dict())
    ids = torch.randint(0, 256, (2, 9))
    between = stages[1](*stages[0](ids))
    logits, more = stages[2](*between)
    want, hidden = whole(ids, return_hidden=True)
    assert torch.equal(logits, want) and torch.equal(more, whole.mtp_logits(ids, hidden)[0])
    both = K2Stages([stages[2], stages[0]])
    assert list(both.max_logits()) == [0, 3, 4] and list(both.expert_load()) == [3, 4]
    assert sorted(both.state_dict()) == sorted([*stages[0].state_dict(), *stages[2].state_dict()])
    assert both.to(torch.bfloat16) is both and stages[2].lm_head.weight.dtype == torch.bfloat16
    with torch.device("meta"):
        empty = K2Stage(whole.config, range(1, 2))
    assert empty.device.type == "meta" and not torch.isnan(empty.to_empty(device="cpu").rope.inverse_frequency).any()


def test_division_is_the_best_one():
    """Against every way to cut, with costs of all kinds."""
    generator = torch.Generator().manual_seed(0)
    for layers, stages, last in [(6, 3, 0.0), (7, 3, 5.0), (7, 4, 2.0), (5, 5, 1.0), (6, 1, 0.0)]:
        amounts = torch.randint(1, 5, (layers,), generator=generator).double().tolist()

        def totals(parts, amounts=amounts, layers=layers, last=last):
            return [sum(amounts[i] for i in part) + (last if part.stop == layers else 0) for part in parts]

        best = min(
            (max(found), sum(t * t for t in found))
            for cut in itertools.combinations(range(1, layers), stages - 1)
            for found in [totals([range(a, b) for a, b in zip((0, *cut), (*cut, layers))])]
        )
        parts = split_layers(amounts, stages, last)
        assert [i for part in parts for i in part] == list(range(layers)) and len(parts) == stages and all(parts)
        assert (max(totals(parts)), sum(t * t for t in totals(parts))) == pytest.approx(best)
    with pytest.raises(ValueError, match="stages must be from 1 to the 3 layers, got 4"):
        split_layers([1.0] * 3, 4)


def test_costs_of_kimi_k2():
    """Matrices that a token passes, counted in the model itself; 16 stages."""
    config = K2Config.preset("kimi-k2")
    with torch.device("meta"):
        model = K2Model(config)
    found, length = costs(config), 4096
    scores = length / 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    for layer, cost in zip(model.model.layers, found.layers):
        used = scores
        for p in layer.parameters():
            if p.dim() > 1:
                used += p.numel() * (config.num_experts_per_tok / len(p) if p.dim() == 3 else 1)
        assert cost == pytest.approx(used)
    assert found.last == model.lm_head.weight.numel()
    assert [len(part) for part in split_layers(found.layers, 16, found.last)] == [4] * 15 + [1]
    v3 = K2Config.preset("deepseek-v3")
    mtp = costs(v3).layers[-1] + 2 * v3.hidden_size**2
    assert costs(v3).last == pytest.approx(2 * v3.vocab_size * v3.hidden_size + mtp * v3.num_nextn_predict_layers)


@pytest.mark.parametrize("style, each", [("loop", 1), ("loop", 2), ("loop", 3), ("v", 2)])
def test_stages_are_where_torch_looks_for_them(style, each):
    want = generate_stage_to_rank_mapping(4, 4 * each, style=style)
    assert {stage: rank for rank in range(4) for stage in stages_of_rank(rank, 4, each, style)} == want
