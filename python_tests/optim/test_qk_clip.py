import warnings

import latent
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from k2kernels.optim import ClipTarget, MuonClip, QKClip

NO_UPDATE = dict(lr=0.0, weight_decay=0.0)  # what is left of a step is the clip


def logits(model, x):
    """Logits [layer, H, N, N], shared rope keys and values of every layer on the same input."""
    found = [layer["self_attn"].heads(x) for layer in model.layers]
    return [torch.stack(parts) for parts in zip(*found)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_logits_of_a_hot_head_scale_by_gamma_and_nothing_else_changes(alpha):
    model = latent.Model().double()
    optimizer = MuonClip(model, **NO_UPDATE, qk_clip=QKClip(threshold=100.0, alpha=alpha))
    x = torch.randn(7, latent.HIDDEN, dtype=torch.float64)
    before, k_rope, value = logits(model, x)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.set_max_logits([250.0, 99.0, 100.0], [-5.0, -torch.inf, 400.0])
    optimizer.step()
    after, k_rope_after, value_after = logits(model, x)

    gamma = torch.ones(2, 3, 1, 1, dtype=torch.float64)
    gamma[0, 0], gamma[1, 2] = 100 / 250, 100 / 400
    torch.testing.assert_close(after, before * gamma, rtol=1e-12, atol=1e-14)
    calm = gamma.flatten(1) == 1
    assert torch.equal(after[calm], before[calm])
    assert torch.equal(k_rope_after, k_rope) and torch.equal(value_after, value)
    for name, p in model.named_parameters():
        if not name.endswith(("q_b_proj.weight", "kv_b_proj.weight")):
            assert torch.equal(p, weights[name]), name
    # How gamma is shared, row by row.
    query = model.layers[0]["self_attn"].q_b_proj.weight / weights["layers.0.self_attn.q_b_proj.weight"]
    want = torch.tensor([0.4**alpha] * latent.NOPE + [0.4] * latent.ROPE, dtype=torch.float64)
    torch.testing.assert_close(
        query[: len(want)].detach(), want[:, None].expand(-1, query.shape[1]), rtol=1e-12, atol=0
    )

    for layer, report in optimizer.last_clip.items():
        torch.testing.assert_close(report.gamma, gamma[layer].flatten(), rtol=1e-15, atol=0)
    assert optimizer.last_clip[0].max_logit.tolist() == [250.0, 99.0, 100.0]
    assert all((s == -torch.inf).all() for s in model.max_logits().values())


def test_negative_and_non_finite_maxima():
    model = latent.Model()
    optimizer = MuonClip(model, **NO_UPDATE, qk_clip=QKClip(threshold=100.0))
    weights = [layer["self_attn"].q_b_proj.weight.detach().clone() for layer in model.layers]
    model.set_max_logits([-5.0, 250.0, torch.nan], [torch.inf, -250.0, -torch.inf])
    with pytest.warns(UserWarning, match=r"largest logit of layer \d, heads \[\d\], is not finite"):
        optimizer.step()
    first, second = optimizer.last_clip[0], optimizer.last_clip[1]
    assert first.gamma.tolist() == [1.0, 0.4, 1.0] and second.gamma.tolist() == [1.0, 1.0, 1.0]
    assert first.non_finite.tolist() == [False, False, True] and second.non_finite.tolist() == [True, False, False]
    rows = latent.NOPE + latent.ROPE
    new = [layer["self_attn"].q_b_proj.weight for layer in model.layers]
    assert torch.equal(new[1], weights[1])
    assert torch.equal(new[0][:rows], weights[0][:rows]) and torch.equal(new[0][2 * rows :], weights[0][2 * rows :])
    assert not torch.equal(new[0][rows : 2 * rows], weights[0][rows : 2 * rows])
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_clip_follows_the_update_and_its_weight_decay():
    model = latent.Model()
    twin = latent.clone(model)
    latent.backward(model)
    latent.backward(twin)
    clipped = MuonClip(model, 0.1, weight_decay=0.5, qk_clip=QKClip(threshold=100.0))
    plain = MuonClip(twin, 0.1, weight_decay=0.5, qk_clip=None)
    model.set_max_logits([200.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    clipped.step()
    plain.step()
    got, updated = (m.layers[0]["self_attn"].q_b_proj.weight for m in (model, twin))
    rope = slice(latent.NOPE, latent.NOPE + latent.ROPE)
    torch.testing.assert_close(got[: latent.NOPE], updated[: latent.NOPE] * 0.5**0.5, rtol=1e-6, atol=0)
    assert torch.equal(got[rope], updated[rope] * 0.5)
    assert torch.equal(got[rope.stop :], updated[rope.stop :])


def test_maxima_are_those_of_all_micro_batches_and_of_training_only():
    model = latent.Model()
    optimizer = MuonClip(model, 0.01, qk_clip=QKClip(threshold=1e-3))
    peaks = []
    for seed in range(3):
        latent.backward(model, seed)
        peaks.append({i: s.clone() for i, s in model.max_logits().items()})
    model.eval()
    with torch.no_grad():
        model.layers[0]["self_attn"](1e3 * torch.randn(4, latent.HIDDEN))
    optimizer.step()
    for layer in (0, 1):
        assert torch.equal(optimizer.last_clip[layer].max_logit, peaks[-1][layer])
        assert (peaks[-1][layer] >= peaks[0][layer]).all()


def walk(clip, start, growth=1.0, steps=200):
    """The largest logit of one head from step to step, when it is only clipped and grows by a factor."""
    s, path = start, []
    average = None if clip.mode == "exact" else torch.ones(1, dtype=torch.float64)
    for step in range(steps):
        gamma, average = clip.gamma(torch.tensor([s], dtype=torch.float64), average, step)
        s = s * growth * float(gamma)
        path.append(s)
    return path


def test_smoothing_against_sequences_worked_by_hand():
    # e = .9 + .1 * .5; then gamma_hat = 100/190 and e = .9 * .95 + .1 * .526316 = .907632
    literal = walk(QKClip(100.0, smoothing=0.9, mode="smooth_literal"), 200.0)
    assert literal[:2] == pytest.approx([190.0, 172.45])
    # It goes on shrinking below the threshold.
    assert literal[-1] == pytest.approx(23.6, abs=0.1)
    assert walk(QKClip(100.0, smoothing=0.9, mode="smooth_literal"), 1000.0, steps=200)[-1] == pytest.approx(
        2.4, abs=0.1
    )

    safe = walk(QKClip(100.0, smoothing=0.9), 200.0)
    assert safe[:2] == pytest.approx([190.0, 172.45])
    assert safe[4] > 100 and safe[5:] == pytest.approx([100.0] * 195)
    # Beyond twice the threshold at once, and never below it.
    assert walk(QKClip(100.0, smoothing=0.9), 201.0)[0] == pytest.approx(100.0)
    for start in (101.0, 150.0, 199.0, 1000.0):
        assert min(walk(QKClip(100.0, smoothing=0.9), start)) >= 100 - 1e-9
    assert max(walk(QKClip(100.0, smoothing=0.9), 90.0, growth=1.02)) < 110

    assert walk(QKClip(100.0), 250.0)[:3] == pytest.approx([100.0] * 3)
    assert walk(QKClip(100.0, smoothing=0.9), 80.0)[-1] == 80.0


def test_average_ignores_what_was_not_seen():
    clip = QKClip(100.0, smoothing=0.9, mode="smooth_literal")
    average = torch.full((4,), 0.5, dtype=torch.float64)
    gamma, new = clip.gamma(torch.tensor([-torch.inf, torch.nan, torch.inf, 50.0]), average, 0)
    assert gamma[:3].tolist() == [1.0, 1.0, 1.0] and new[:3].tolist() == [0.5, 0.5, 0.5]
    assert new[3] == pytest.approx(0.55) and gamma[3] == new[3]


def test_average_is_kept_per_layer_and_head():
    model = latent.Model()
    optimizer = MuonClip(model, **NO_UPDATE, qk_clip=QKClip(100.0, smoothing=0.9))
    for _ in range(2):
        model.set_max_logits([200.0, 100.0, 160.0], [50.0, 125.0, 50.0])
        optimizer.step()
    got = [optimizer.state[layer["self_attn"].q_b_proj.weight]["clip_average"] for layer in model.layers]
    want = torch.tensor([[0.5, 1.0, 0.625], [1.0, 0.8, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(got), 0.81 + 0.19 * want, rtol=1e-12, atol=0)


def test_threshold_schedule_counts_steps_from_zero():
    model, seen = latent.Model(), []

    def threshold(step):
        seen.append(step)
        return 100.0 - 10 * step

    optimizer = MuonClip(model, **NO_UPDATE, qk_clip=QKClip(threshold=threshold))
    gammas = []
    for _ in range(3):
        model.set_max_logits([100.0] * 3, [100.0] * 3)
        optimizer.step()
        gammas.append(float(optimizer.last_clip[0].gamma[0]))
    assert gammas == [1.0, 0.9, 0.8]
    assert sorted(set(seen)) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"threshold must be positive and finite, got -1.0 at step 3"):
        optimizer._clipper.clip.threshold = lambda step: -1.0
        optimizer.step()


class SharedKeys(nn.Module):
    """Grouped-query attention: 4 query heads of size 6, 2 key heads, biases on both."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(10, 24)
        self.k_proj = nn.Linear(10, 12)

    def logits(self, x):
        q, k = self.q_proj(x).view(-1, 4, 6), self.k_proj(x).view(-1, 2, 6).repeat_interleave(2, dim=1)
        return torch.einsum("ihd,jhd->hij", q, k)


def test_heads_that_share_keys_are_clipped_by_their_queries_alone():
    model = SharedKeys().double()
    x = torch.randn(5, 10, dtype=torch.float64)
    before, keys = model.logits(x), model.k_proj.weight.detach().clone()
    maxima = {"layer": torch.tensor([50.0, 300.0, 100.0, 30.0])}
    resets = []
    target = dict(layer="layer", query=["q_proj.weight", "q_proj.bias"], key=None, num_heads=4, nope_dim=6)
    clip = QKClip(100.0, targets=[target], max_logits=lambda: maxima, reset_max_logits=lambda: resets.append(1))
    optimizer = MuonClip(model.named_parameters(), **NO_UPDATE, qk_clip=clip)
    optimizer.step()
    after = model.logits(x)
    torch.testing.assert_close(after[1], before[1] / 3, rtol=1e-12, atol=1e-14)
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert torch.equal(model.k_proj.weight, keys)
    assert resets == [1]


def test_plain_multi_head_attention_shares_gamma_between_query_and_key():
    model = nn.ModuleDict(dict(q=nn.Linear(8, 6, bias=False), k=nn.Linear(8, 6, bias=False))).double()
    x = torch.randn(5, 8, dtype=torch.float64)

    def logits():
        return torch.einsum("ihd,jhd->hij", model["q"](x).view(-1, 2, 3), model["k"](x).view(-1, 2, 3))

    before = logits()
    target = ClipTarget(0, model["q"].weight, model["k"].weight, num_heads=2, nope_dim=3)
    maxima = torch.tensor([400.0, 1.0])
    clip = QKClip(100.0, targets=[target], max_logits=lambda: {0: maxima}, reset_max_logits=maxima.zero_)
    MuonClip(model, **NO_UPDATE, qk_clip=clip).step()
    torch.testing.assert_close(logits(), before * torch.tensor([0.25, 1.0])[:, None, None], rtol=1e-12, atol=1e-14)


def test_half_precision_weights_are_scaled_and_rounded_once():
    model = latent.Model().bfloat16()
    weight = model.layers[0]["self_attn"].q_b_proj.weight
    before = weight.detach().clone()
    model.set_max_logits([300.0, 1.0, 1.0], [1.0] * 3)
    MuonClip(model, **NO_UPDATE, qk_clip=QKClip(100.0)).step()
    want = (before[: latent.NOPE].double() * 3**-0.5).bfloat16()
    torch.testing.assert_close(weight[: latent.NOPE], want, rtol=2**-8, atol=0)
    assert torch.equal(weight[latent.NOPE + latent.ROPE :], before[latent.NOPE + latent.ROPE :])


def test_maxima_that_nobody_forgets_are_refused():
    """They would be clipped again at each step."""
    model = SharedKeys()
    target = ClipTarget(0, "q_proj.weight", None, num_heads=4, nope_dim=6)
    maxima = {0: torch.full((4,), 300.0)}
    with pytest.raises(ValueError, match=r"must come with reset_max_logits=.*pass reset_max_logits=lambda: None"):
        MuonClip(model, **NO_UPDATE, qk_clip=QKClip(targets=[target], max_logits=lambda: maxima))


def test_a_model_forgets_its_maxima_also_where_others_are_taken():
    """As the largest of several ranks are, which are made of the model's."""
    model = latent.Model()
    optimizer = MuonClip(model, **NO_UPDATE, qk_clip=QKClip(100.0, max_logits=model.max_logits))
    weight = model.layers[0]["self_attn"].q_b_proj.weight
    model.set_max_logits([200.0] * 3, [1.0] * 3)
    optimizer.step()
    after = weight.detach().clone()
    for _ in range(2):
        optimizer.step()
    assert torch.equal(weight, after) and model.max_logits()[0].tolist() == [-torch.inf] * 3


def test_maxima_of_one_rank_of_several_are_refused():
    """Also when the ranks are joined after the optimizer is made. Two ranks: parallel/test_clipped_copies.py."""
    model = latent.Model()
    before = MuonClip(model, 0.1)
    single = MuonClip(model, 0.1, qk_clip=QKClip())
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        message = r"must be those of all 2 ranks, .* pass QKClip\(max_logits=f\) .* or qk_clip=None"
        for clip in (dict(), dict(qk_clip=QKClip())):
            with pytest.raises(ValueError, match=message):
                MuonClip(model, 0.1, **clip)
        for optimizer in (before, single):
            with pytest.raises(ValueError, match=message):
                optimizer.step()
        MuonClip(model, 0.1, qk_clip=None).step()
        MuonClip(model, 0.1, qk_clip=QKClip(max_logits=model.max_logits)).step()
    finally:
        dist.destroy_process_group()
    before.step()


def test_frozen_layers_are_not_clipped():
    model = latent.Model()
    model.layers[0]["self_attn"].q_b_proj.weight.requires_grad_(False)
    before = [layer["self_attn"].kv_b_proj.weight.detach().clone() for layer in model.layers]
    model.set_max_logits([300.0] * 3, [300.0] * 3)
    optimizer = MuonClip(model, **NO_UPDATE, qk_clip=QKClip(100.0))
    optimizer.step()
    assert list(optimizer.last_clip) == [1]
    assert torch.equal(model.layers[0]["self_attn"].kv_b_proj.weight, before[0])
    assert not torch.equal(model.layers[1]["self_attn"].kv_b_proj.weight, before[1])


def test_without_clip_the_tracker_is_left_to_its_owner():
    model = latent.Model()
    model.set_max_logits([300.0] * 3, [300.0] * 3)
    optimizer = MuonClip(model, **NO_UPDATE, qk_clip=None)
    optimizer.step()
    assert optimizer.last_clip == {} and model.max_logits()[0].tolist() == [300.0] * 3


def test_a_step_skipped_by_the_scaler_leaves_no_trace():
    model = latent.Model()
    optimizer = MuonClip(model, 0.1, qk_clip=QKClip(100.0, smoothing=0.9))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    latent.backward(model)
    model.lm_head.weight.grad[0, 0] = torch.inf
    model.set_max_logits([300.0, torch.nan, 0.0], [0.0] * 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not optimizer.state and optimizer.param_groups[0]["step"] == 0
    # The maxima of the skipped batch are forgotten: the next step clips by its own.
    optimizer.zero_grad()
    latent.backward(model)
    peak = {i: s.clone() for i, s in model.max_logits().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
    assert all(torch.equal(optimizer.last_clip[i].max_logit, peak[i]) for i in peak)


def test_a_loop_that_skips_by_itself_resets_the_maxima():
    model = latent.Model()
    optimizer = MuonClip(model, 0.1, qk_clip=QKClip(100.0))
    model.set_max_logits([300.0] * 3, [300.0] * 3)
    optimizer.zero_grad()  # between forward and backward in many loops, so it must not reset
    assert model.max_logits()[0].tolist() == [300.0] * 3
    optimizer.reset_max_logits()
    assert model.max_logits()[0].tolist() == [-torch.inf] * 3


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(threshold=0.0), "threshold must be positive and finite, got 0.0"),
        (dict(threshold=float("inf")), "threshold must be positive and finite, got inf"),
        (dict(threshold="hot"), "threshold must be positive and finite, got 'hot'"),
        (dict(alpha=None), r"alpha must be in \[0, 1\], got None"),
        (dict(smoothing="0.9"), r"smoothing must be in \[0, 1\), got '0.9'"),
        (dict(alpha=1.5), r"alpha must be in \[0, 1\], got 1.5"),
        (dict(smoothing=1.0), r"smoothing must be in \[0, 1\), got 1.0"),
        (dict(mode="ema"), "mode must be one of .*, got 'ema'"),
        (dict(mode="exact", smoothing=0.9), "mode 'exact' does not smooth"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match="QKClip: " + message):
        QKClip(**options)


def test_modes_by_default():
    assert (QKClip().mode, QKClip().smoothing) == ("exact", None)
    assert QKClip(smoothing=0.8).mode == "smooth"
    assert QKClip(mode="smooth_literal").smoothing == 0.9


def test_models_that_cannot_be_clipped():
    plain = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(ValueError, match=r"the model has no attention with qk_clip_spec\(\); give QKClip\(targets"):
        MuonClip(plain, 0.1, qk_clip=QKClip())
    with pytest.warns(UserWarning, match=r"no attention with qk_clip_spec\(\).*; nothing is clipped now"):
        MuonClip(plain, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MuonClip(plain, 0.1, qk_clip=None)
        MuonClip(latent.Model(), 0.1)
    with pytest.raises(ValueError, match=r"the model has no max_logits\(\)"):
        MuonClip(latent.Attention(), 0.1, qk_clip=QKClip())
    with pytest.raises(ValueError, match=r"has no attention"):
        MuonClip(latent.Model().named_parameters(), 0.1, qk_clip=QKClip())


def test_targets_that_do_not_fit():
    model = SharedKeys()

    def make(**changes):
        target = dict(layer=0, query="q_proj.weight", key=None, num_heads=4, nope_dim=6) | changes
        clip = QKClip(targets=[target], max_logits=lambda: {0: torch.ones(3)}, reset_max_logits=lambda: None)
        return MuonClip(model, **NO_UPDATE, qk_clip=clip)

    with pytest.raises(ValueError, match=r"query of layer 0 must be a parameter of this optimizer, .*got 'q.weight'"):
        make(query="q.weight")
    with pytest.raises(ValueError, match=r"key of layer 0 must be a parameter of this optimizer, .*got another tensor"):
        make(key=torch.zeros(24, 10))
    with pytest.raises(ValueError, match=r"query of layer 0 must have 20 rows, got \[24, 10\] \(q_proj.weight\)"):
        make(nope_dim=5)
    with pytest.raises(ValueError, match="query of layer 0 must be a parameter, got None"):
        make(query=None)
    before = model.q_proj.weight.detach().clone()
    with pytest.raises(ValueError, match=r"max_logits\(\) must give \[4\] for layer 0, got \[3\]"):
        make().step()
    with pytest.raises(ValueError, match=r"must give \[4\] for layer 1, got nothing; it has the layers \[0\]"):
        make(layer=1).step()
    assert torch.equal(model.q_proj.weight, before)
