"""MuonClip on a real model: what the clip is for, and what a step costs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from k2kernels.model import K2Config, K2Model
from k2kernels.optim import MuonClip, QKClip

HALF, BATCH, VOCABULARY = 16, 8, 32
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    first_k_dense_replace=2,
    intermediate_size=128,
    num_attention_heads=4,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    max_position_embeddings=2 * HALF,
    initializer_range=0.05,
    dtype="float32",
)


def train(clip, steps=400):
    """A 2-layer model learns to repeat random text. Returns the largest logit of each step, and the mean last loss."""
    torch.manual_seed(0)
    model = K2Model(K2Config(**SMALL)).train()
    optimizer = MuonClip(model, 2e-2, weight_decay=0.0, adamw=dict(lr=3e-3), qk_clip=clip)
    peaks, losses = [], []
    for _ in range(steps):
        half = torch.randint(VOCABULARY, (BATCH, HALF))
        ids = torch.cat([half, half], dim=1)
        logits = model(ids)[:, HALF:-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, HALF + 1 :].flatten())
        loss.backward()
        peaks.append(max(float(s.max()) for s in model.max_logits().values()))
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        model.reset_max_logits()
    return peaks, sum(losses[-50:]) / 50


def test_the_clip_holds_the_logits_that_explode_without_it():
    """Without clip the logits run away (to about 200), with it they stay at the threshold; both runs learn."""
    threshold = 30.0
    free, free_loss = train(None)
    held, held_loss = train(QKClip(threshold))
    assert free[-1] > 5 * held[-1], f"without clip {free[-1]:.1f}, with clip {held[-1]:.1f}"
    assert max(held) < 1.3 * threshold
    assert free_loss < 0.1 and held_loss < 0.1, f"loss without clip {free_loss:.4f}, with clip {held_loss:.4f}"
    # The clip had something to do, and ended where it should.
    assert held[-1] > 0.8 * threshold


@pytest.mark.parametrize("q_lora_rank", [32, None])
def test_hot_heads_of_a_model_come_down_to_the_threshold(q_lora_rank):
    """The rows that are scaled are those the model makes its logits of."""
    model = K2Model(K2Config(**{**SMALL, "q_lora_rank": q_lora_rank, "initializer_range": 0.3})).train()
    ids = torch.randint(VOCABULARY, (BATCH, 2 * HALF))
    model(ids)
    before = model.max_logits()[0]
    threshold = float(before.median())
    optimizer = MuonClip(model, 0.0, weight_decay=0.0, qk_clip=QKClip(threshold))
    optimizer.step()
    model(ids)
    torch.testing.assert_close(model.max_logits()[0], before.clamp(max=threshold), rtol=1e-4, atol=0)
    assert sorted(optimizer.last_clip) == [0, 1]


def test_routes_of_a_model_with_experts_and_mtp():
    sizes = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1)
    config = {**SMALL, **sizes, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}
    model = K2Model(K2Config(**config))
    optimizer = MuonClip(model, 0.1, qk_clip=QKClip())
    table = {row.name: row for row in optimizer.routing_table()}
    assert list(table) == [name for name, _ in model.named_parameters()]
    assert sorted(target.layer for target in optimizer._clipper.targets) == [0, 1, 2]
    adamw = {name for name, row in table.items() if row.method == "adamw"}
    assert adamw == {n for n, p in model.named_parameters() if p.ndim == 1} | {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    for layer in (1, 2):
        mlp = f"model.layers.{layer}.mlp."
        assert table[mlp + "gate.weight"].reason == "router"
        assert table[mlp + "experts.gate_up_proj"].reason == "stacked matrices, rows cut 2x16"
        assert table[mlp + "shared_experts.gate_up_proj.weight"].reason == "matrix, rows cut 2x16"
        down = f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"
        assert table[down].reason == "matrix, rows cut 16+8"


def test_a_step_of_the_tiny_model_does_less_than_that_of_torch_muon():
    """All parameters of "tiny" against torch's loop over its matrices alone: counted; bench/bench_optim.py times it.

    Stacks of matrices are multiplied together, so a step asks PyTorch for few products; the rows that belong to
    different heads or projections are cut apart, so the products are smaller, too.
    """
    model = K2Model(K2Config.preset("tiny")).float()
    ours = MuonClip(model, 1e-3)
    matrices = [nn.Parameter(m.detach().clone()) for p in ours.param_groups[0]["params"] for m in _matrices(p)]
    theirs = torch.optim.Muon(matrices, 1e-3, adjust_lr_fn="match_rms_adamw")
    for p in (*model.parameters(), *matrices):
        p.grad = torch.randn_like(p)
    (flops, calls, products), (their_flops, their_calls, their_products) = map(_work, (ours, theirs))
    assert 0 < flops < their_flops
    assert calls < their_calls / 2 and products < their_products / 5


def _work(optimizer):
    """FLOPs of a step's matrix products, its calls of PyTorch's functions, and those among them that are products."""
    optimizer.step()  # makes the state
    with torch.profiler.profile(with_flops=True) as profile:
        optimizer.step()
    events = profile.events()
    products = [e for e in events if e.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")]
    return sum(e.flops for e in products), len(events), len(products)


def _matrices(p):
    return p if p.ndim == 3 else [p]
