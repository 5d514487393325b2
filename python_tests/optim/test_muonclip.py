import copy

import latent
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import k2kernels
from k2kernels.optim import Muon, MuonClip, QKClip

CLIP = QKClip(threshold=0.05, smoothing=0.9)  # low: the small model is clipped at every step


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        latent.backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def small(*shapes, **named):
    """A module of parameters by name; dots in names are written as __."""
    module = nn.Module()
    for name, shape in named.items():
        *path, last = name.split("__")
        at = module
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.register_parameter(last, nn.Parameter(torch.randn(shape)))
    return module


def routes(model, **options):
    return {row.name: row for row in MuonClip(model, 0.1, qk_clip=None, **options).routing_table()}


def test_routing_table_names_every_parameter():
    model = latent.Model()
    table = MuonClip(model, 0.1).routing_table()
    assert [(row.name, row.shape) for row in table] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    methods = {row.name: (row.method, row.reason) for row in table}
    attention, mlp = "layers.0.self_attn.", "layers.1.mlp."
    assert methods["embed_tokens.weight"] == ("adamw", "embedding")
    assert methods["lm_head.weight"] == ("adamw", "output head")
    assert methods["layers.0.norm.bias"] == ("adamw", "vector")
    assert methods[mlp + "down_proj.bias"] == ("adamw", "vector")
    assert methods[attention + "q_b_proj.weight"] == ("muon", "matrix")
    assert methods[attention + "kv_a_proj_with_mqa.weight"] == ("muon", "matrix, rows cut 6+2")
    assert methods[mlp + "gate_up_proj.weight"] == ("muon", "matrix, rows cut 2x10")


def test_routing_by_name_shape_and_module():
    model = small(
        model__layers__0__mlp__gate__weight=(8, 6),
        model__layers__0__mlp__gate__bias=(8,),
        model__layers__0__mlp__experts__gate_up_proj=(8, 10, 6),
        model__layers__0__mlp__experts__down_proj=(8, 6, 5),
        model__layers__2__eh_proj__weight=(6, 12),
        model__layers__2__shared_head__head__weight=(20, 6),
        transformer__wte__weight=(20, 6),
        score__weight=(1, 6),
        embedder__weight=(6, 6),
        patch__weight=(6, 3, 2, 2),
    )
    model.position = nn.Embedding(5, 6)
    model.conv = nn.Conv1d(4, 6, 3)
    got = {name: (row.method, row.reason) for name, row in routes(model).items()}
    assert got == {
        "model.layers.0.mlp.gate.weight": ("muon", "router"),
        "model.layers.0.mlp.gate.bias": ("adamw", "vector"),
        "model.layers.0.mlp.experts.gate_up_proj": ("muon", "stacked matrices, rows cut 2x5"),
        "model.layers.0.mlp.experts.down_proj": ("muon", "stacked matrices"),
        "model.layers.2.eh_proj.weight": ("muon", "matrix"),
        "model.layers.2.shared_head.head.weight": ("adamw", "output head"),
        "transformer.wte.weight": ("adamw", "embedding"),
        "score.weight": ("adamw", "single row or column"),
        "embedder.weight": ("muon", "matrix"),
        "patch.weight": ("adamw", "more than three axes"),
        "position.weight": ("adamw", "embedding"),
        "conv.weight": ("adamw", "convolution"),
        "conv.bias": ("adamw", "convolution"),
    }
    assert routes(model, router="adamw")["model.layers.0.mlp.gate.weight"].method == "adamw"


@pytest.mark.parametrize(
    "reason, names",
    [
        ("bias", ["encoder.block.0.SelfAttention.relative_attention_bias.weight", "mlp.experts.gate_up_proj_bias",
                  "self_attn.pos_bias_u"]),
        ("embedding", ["emb.weight", "tok_emb.weight", "embedding.word_embeddings.weight", "embed_out.weight"]),
        ("table", ["attn.relative_position_bias_table", "scale_shift_table", "attn.rel_pos_h", "query_tokens"]),
        ("output head", ["output_layer.weight", "output.weight", "lm_head.weight", "score.weight", "v_head.weight",
                         "final_logits.weight", "to_logits.weight", "unembedding.weight", "classifier.out_proj.weight",
                         "decoder.output_projection.weight"]),
        ("norm", ["self_attn.q_norm.weight", "layers.0.input_layernorm.weight", "ln_1.weight", "norm2.weight"]),
        ("adapter", ["q_proj.lora_A.default.weight", "q_proj.lora_B.weight", "q_proj.lora_a.weight", "fc.lora_A",
                     "wte.lora_embedding_A.default", "fc.lokr_w1", "fc.hada_w1_a"]),
        ("decay", ["mixer.A_log", "blocks.0.att.time_decay", "blocks.0.att.time_maa_w1", "ss2d.A_logs"]),
        ("convolution", ["q_conv1d.weight", "mixer.short_conv.weight"]),
        ("matrix", ["attn_output.weight", "output.dense.weight", "self_attn.o_proj.weight", "shared_experts.up.weight",
                    "headed.weight", "indexer.weights.weight", "x_proj.weight", "dt_proj.weight", "time_proj.weight",
                    "q_lora_down.weight", "normalizer.weight", "conv_in_proj.weight", "token_mixer.weight"]),
    ],
)  # fmt: skip
def test_names_of_published_models(reason, names):
    """Of matrices [12, 8] known by name alone: what no hidden matrix is goes to AdamW."""
    named = [(name, nn.Parameter(torch.randn(12, 8))) for name in names]
    table = MuonClip(named, 0.1, qk_clip=None).routing_table()
    method = "muon" if reason == "matrix" else "adamw"
    # "wte.lora_embedding_A" is of both kinds.
    assert {row.name: row[2:] for row in table if "wte" not in row.name} == {
        name: (method, reason) for name in names if "wte" not in name
    }
    assert {row.method for row in table} == {method}


def test_bags_of_embeddings_are_embeddings():
    model = nn.ModuleDict(dict(features=nn.EmbeddingBag(12, 8)))
    assert routes(model)["features.weight"][2:] == ("adamw", "embedding")


def test_shards_are_refused_by_name():
    """FSDP2's DTensors on one rank; the marks of FSDP1's parameters, which have one axis whatever they are."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        model = latent.Model()
        for layer in model.layers:
            fully_shard(layer["self_attn"], mesh=init_device_mesh("cpu", (1,)))
        message = r": layers.0.self_attn.q_a_proj.weight must be a whole parameter, got a shard .*Distributed"
        for clip in (None, QKClip()):
            with pytest.raises(ValueError, match="MuonClip" + message):
                MuonClip(model, 0.1, qk_clip=clip)
        sharded = [(name, p) for name, p in model.named_parameters() if name.startswith("layers") and p.ndim == 2]
        with pytest.raises(ValueError, match="Muon" + message):
            Muon(sharded, 0.1)
    finally:
        dist.destroy_process_group()
    for mark in ("_is_flat_param", "_fsdp_flattened"):
        model = latent.Model()
        setattr(model.layers[1]["mlp"].gate_up_proj.weight, mark, True)
        with pytest.raises(ValueError, match=r"MuonClip: layers.1.mlp.gate_up_proj.weight must be a whole parameter"):
            MuonClip(model, 0.1)


def test_rules_come_first_and_unmatched_ones_fail():
    model = latent.Model()
    rules = {"layers.1.*q_a*": "adamw", "lm_head*": "muon", "*.q_a_proj*": "muon"}
    table = {row.name: row for row in MuonClip(model, 0.1, rules=rules).routing_table()}
    assert table["layers.1.self_attn.q_a_proj.weight"][2:] == ("adamw", "rule 'layers.1.*q_a*'")
    assert table["layers.0.self_attn.q_a_proj.weight"].method == "muon"
    assert table["lm_head.weight"].method == "muon"
    with pytest.raises(ValueError, match=r"rules match no parameter: '.*w13.*', 'head'; names are those of"):
        MuonClip(model, 0.1, rules={"*w13*": "muon", "lm_head*": "adamw", "head": "adamw"})
    with pytest.raises(ValueError, match=r"rule 'lm_head.' must be 'muon' or 'adamw', got 'sgd'"):
        MuonClip(model, 0.1, rules={"lm_head*": "sgd"})
    with pytest.raises(ValueError, match=r"rule '.norm.' sends layers.0.norm.weight to Muon, .* got \[12\]"):
        MuonClip(model, 0.1, rules={"*norm*": "muon"})


def test_everything_is_updated_by_its_method():
    model = latent.Model()
    twin = latent.clone(model)
    options = dict(lr=0.003, betas=(0.8, 0.9), weight_decay=0.05)
    optimizer = MuonClip(model, 0.02, weight_decay=0.2, adamw=options, qk_clip=None)
    methods = {row.name: row for row in optimizer.routing_table()}
    named = dict(twin.named_parameters())
    uncut = [p for n, p in named.items() if methods[n].method == "muon" and "cut" not in methods[n].reason]
    rest = [p for n, p in named.items() if methods[n].method == "adamw"]
    muon, adamw = Muon(uncut, 0.02, weight_decay=0.2), torch.optim.AdamW(rest, 0.003, (0.8, 0.9), weight_decay=0.05)
    for step in range(5):
        latent.backward(model, step)
        for (_, p), q in zip(model.named_parameters(), named.values()):
            q.grad = p.grad.clone()
        for o in (optimizer, muon, adamw):
            o.step()
            o.zero_grad()
    for name, p in model.named_parameters():
        if "cut" not in methods[name].reason:
            torch.testing.assert_close(p, named[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_adamw_is_that_of_torch(dtype, tolerance):
    model = small(a=(6, 4), b=(5,), c=(2, 3, 4)).to(dtype)
    theirs = [nn.Parameter(p.detach().clone().double()) for p in model.parameters()]
    ours = MuonClip(model, 0.1, rules={"*": "adamw"}, adamw=dict(lr=0.01, eps=1e-6, weight_decay=0.3), qk_clip=None)
    adamw = torch.optim.AdamW(theirs, 0.01, (0.9, 0.95), eps=1e-6, weight_decay=0.3)
    for step in range(6):
        for i, (p, q) in enumerate(zip(model.parameters(), theirs)):
            # One parameter joins late: its bias correction counts its own steps.
            p.grad = torch.randn_like(p) if step >= 3 * (i == 1) else None
            q.grad = None if p.grad is None else p.grad.double()
        ours.step()
        adamw.step()
    for p, q in zip(model.parameters(), theirs):
        torch.testing.assert_close(p.double(), q, rtol=tolerance, atol=tolerance)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(ours.state[p]["exp_avg"].dtype == wanted for p in model.parameters())


def test_adamw_of_half_precision_rounds_once():
    wide, half = small(a=(6, 4)), small(a=(6, 4))
    half.a.data = half.a.data.bfloat16()
    wide.a.data = half.a.data.float()
    half.a.grad = torch.randn(6, 4).bfloat16()
    wide.a.grad = half.a.grad.float()
    before = half.a.grad.clone()
    for model in (wide, half):
        MuonClip(model, 0.01, rules={"*": "adamw"}, qk_clip=None).step()
    assert torch.equal(half.a, wide.a.bfloat16()) and torch.equal(half.a.grad, before)


@pytest.mark.parametrize(
    "shape, spec, sizes",
    [
        ((12, 5), "gate_up", [6, 6]),
        ((12, 5), [3, 2, 7], [3, 2, 7]),
        ((12, 5), 4, [3, 3, 3, 3]),
        ((12, 5), None, [12]),
        ((3, 12, 5), "gate_up", [6, 6]),
        ((3, 12, 5), [2, 10], [2, 10]),
    ],
)
def test_a_fused_matrix_is_updated_like_its_blocks_apart(shape, spec, sizes):
    fused = small(fused=shape)
    apart = [nn.Parameter(block.detach().clone()) for block in fused.fused.split(sizes, dim=-2)]
    optimizer = MuonClip(fused, 0.1, splits={"fus*": spec}, qk_clip=None)
    singles = Muon(apart, 0.1)
    for _ in range(3):
        fused.fused.grad = torch.randn(shape)
        for p, g in zip(apart, fused.fused.grad.split(sizes, dim=-2)):
            p.grad = g.clone()
        optimizer.step()
        singles.step()
    torch.testing.assert_close(fused.fused, torch.cat(list(apart), dim=-2), rtol=0, atol=1e-6)


def test_heads_are_cut_by_what_the_model_tells():
    model = latent.Model()
    splits = {"*.q_b_proj*": "heads", "*.kv_b_proj*": "heads", "*gate_up*": None}
    table = {row.name: row.reason for row in MuonClip(model, 0.1, splits=splits).routing_table()}
    assert table["layers.0.self_attn.q_b_proj.weight"] == "matrix, rows cut 3x6"
    assert table["layers.1.self_attn.kv_b_proj.weight"] == "matrix, rows cut 3x8"
    assert table["layers.0.mlp.gate_up_proj.weight"] == "matrix"


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"*w13*": 2, "*q_b*": 3}, "splits match no parameter: '.*w13.*'; names are"),
        ({"*q_b_proj*": 5}, "the 18 rows of layers.0.self_attn.q_b_proj.weight do not divide into 5 equal blocks"),
        ({"*q_b_proj*": [6, 6]}, r"block sizes of .*q_b_proj.weight must add up to 18, got \[6, 6\]"),
        ({"*q_b_proj*": "rows"}, "must be 'gate_up', 'heads', a number of blocks, a list of sizes or None, got 'rows'"),
        ({"*q_a_proj*": "heads"}, "the heads of layers.0.self_attn.q_a_proj.weight are not known"),
        ({"lm_head*": 2}, r"matches lm_head.weight, which goes to AdamW \(output head\)"),
    ],
)
def test_bad_splits(splits, message):
    with pytest.raises(ValueError, match=message):
        MuonClip(latent.Model(), 0.1, splits=splits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resume_is_exact_to_the_bit(dtype, tmp_path):
    def make(model):
        clip = QKClip(threshold=lambda step: 0.05 * 0.99**step, smoothing=0.9)
        optimizer = MuonClip(model, 0.02, qk_clip=clip)
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=10)

    def run(model, optimizer, schedule, first, steps):
        for step in range(first, first + steps):
            train(model, optimizer, 1, step)
            schedule.step()

    model = latent.Model().to(dtype)
    optimizer, schedule = make(model)
    run(model, optimizer, schedule, 0, 4)
    assert any((report.gamma < 1).any() for report in optimizer.last_clip.values())
    saved = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict())
    torch.save(saved, tmp_path / "state.pt")
    run(model, optimizer, schedule, 4, 4)

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = latent.Model().to(dtype)
    other.load_state_dict(saved["model"])
    resumed, again = make(other)
    resumed.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["schedule"])
    run(other, resumed, again, 4, 4)
    assert resumed.param_groups[0]["step"] == 8
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(p, q), name
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert value.dtype == resumed.state[q][key].dtype and torch.equal(value, resumed.state[q][key]), key
    assert all(torch.equal(optimizer.last_clip[i].gamma, resumed.last_clip[i].gamma) for i in optimizer.last_clip)


def test_a_state_dict_that_does_not_fit_is_refused():
    model = latent.Model()
    optimizer = MuonClip(model, 0.02, qk_clip=CLIP)
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    MuonClip(latent.Model(), 0.02, qk_clip=CLIP).load_state_dict(state)
    for options, message in [
        (dict(rules={"lm_head*": "muon"}), "number of parameters of group 0 must be 15, got 14"),
        (dict(rules={"lm_head*": "muon", "*1*q_a_proj*": "adamw"}), "parameter names of group 0 must be"),
        (dict(qk_clip=None), r"state of layers.0.self_attn.q_b_proj.weight must be \['momentum_buffer'\], got"),
        (dict(qk_clip=QKClip()), r"state of layers.0.self_attn.q_b_proj.weight must be \['momentum_buffer'\], got"),
    ]:
        with pytest.raises(ValueError, match="MuonClip.load_state_dict: " + message):
            MuonClip(latent.Model(), 0.02, **{"qk_clip": CLIP, **options}).load_state_dict(state)
    for group, key in ((0, "step"), (1, "betas")):
        lacking = copy.deepcopy(state)
        del lacking["param_groups"][group][key]
        with pytest.raises(ValueError, match=f"MuonClip.load_state_dict: options of group {group} must be .*'{key}'"):
            MuonClip(latent.Model(), 0.02, qk_clip=CLIP).load_state_dict(lacking)
    with pytest.raises(ValueError, match=r"MuonClip.load_state_dict: number of parameter groups must be 2, got 1"):
        optimizer.load_state_dict(Muon(model.lm_head.parameters(), 0.1).state_dict())
    adamw = MuonClip(model, 0.1, rules={"*": "adamw"})
    state = adamw.state_dict()
    state["param_groups"][1]["method"] = "muon"
    with pytest.raises(ValueError, match="method of group 1 must be adamw, got muon"):
        adamw.load_state_dict(state)


def test_smoothing_may_be_turned_on_at_a_resume():
    model = latent.Model()
    optimizer = MuonClip(model, 0.02, qk_clip=QKClip(threshold=0.05))
    train(model, optimizer, 1)
    other = latent.clone(model)
    resumed = MuonClip(other, 0.02, qk_clip=CLIP)
    resumed.load_state_dict(optimizer.state_dict())
    train(other, resumed, 1)
    assert "clip_average" in resumed.state[other.layers[0]["self_attn"].q_b_proj.weight]


def test_schedulers_scale_both_groups():
    optimizer = MuonClip(latent.Model(), 0.2, adamw=dict(lr=0.01))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert [g["method"] for g in optimizer.param_groups] == ["muon", "adamw"]
    optimizer.step()
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.005]
    torch.optim.lr_scheduler.OneCycleLR(MuonClip(latent.Model(), 0.2), 0.1, total_steps=10, cycle_momentum=False)


def test_adamw_takes_the_common_options_by_default():
    optimizer = MuonClip(latent.Model(), 0.2, weight_decay=0.3)
    rest = {k: v for k, v in optimizer.param_groups[1].items() if k not in ("params", "param_names")}
    assert rest == dict(method="adamw", lr=0.2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    model = latent.Model()
    optimizer = MuonClip(model, 0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.arange(5)).square().mean()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_gradients_that_are_none_and_parameters_that_are_frozen():
    model = latent.Model()
    model.embed_tokens.weight.requires_grad_(False)
    optimizer = MuonClip(model, 0.1)
    latent.backward(model)
    model.layers[0]["norm"].bias.grad = None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == ["embed_tokens.weight", "layers.0.norm.bias"]
    assert not optimizer.state[model.layers[0]["norm"].bias]


def test_both_methods_see_gradients_without_the_scale_of_a_scaler():
    model = latent.Model()
    twin = latent.clone(model)
    optimizer, plain = MuonClip(model, 0.02), MuonClip(twin, 0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        latent.backward(model, step)
        latent.backward(twin, step)
        for p in model.parameters():
            p.grad *= 1024.0
        scaler.scale(torch.zeros(()))  # a scaler knows its scale only once a loss has been scaled
        scaler.step(optimizer)
        scaler.update()
        plain.step()
        optimizer.zero_grad()
        plain.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


def test_groups_can_be_added():
    model = latent.Model()
    optimizer = MuonClip(model, 0.1)
    extra = nn.Parameter(torch.randn(4, 6))
    before = extra.detach().clone()
    optimizer.add_param_group(dict(params=[("extra", extra)], method="muon", lr=0.5))
    assert optimizer.param_groups[2]["lr"] == 0.5 and optimizer.param_groups[2]["momentum"] == 0.95
    extra.grad = torch.randn(4, 6)
    optimizer.step()
    assert not torch.equal(extra, before)
    with pytest.raises(ValueError, match="add_param_group: method must be 'muon' or 'adamw', got None"):
        optimizer.add_param_group(dict(params=[("more", nn.Parameter(torch.randn(4, 6)))]))


def test_sparse_gradients_are_refused_before_anything_changes():
    model = latent.Model()
    model.embed_tokens.sparse = True
    optimizer = MuonClip(model, 0.1)
    latent.backward(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(TypeError, match=r"MuonClip: gradients must be dense, got torch.sparse_coo for \[16, 12\]"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_copy_of_model_and_optimizer_goes_the_same_way():
    model = latent.Model()
    optimizer = MuonClip(model, 0.02, qk_clip=CLIP)
    train(model, optimizer, 2)
    twin, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, first=2)
    train(twin, other, 2, first=2)
    assert all(torch.equal(p, q) and p is not q for p, q in zip(model.parameters(), twin.parameters()))


def test_it_is_deterministic():
    model = latent.Model()
    twin = latent.clone(model)
    for m in (model, twin):
        train(m, MuonClip(m, 0.02, qk_clip=CLIP), 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(process_group=object()), k2kernels.UnsupportedError, "process_group must be None; k2kernels.parallel"),
        (dict(adamw=dict(learning_rate=1.0)), ValueError, r"adamw takes lr, betas, .* got \['learning_rate'\]"),
        (dict(adamw=dict(lr=-1.0)), ValueError, r"adamw's lr must be finite and at least 0, got -1.0"),
        (dict(adamw=dict(eps="small")), TypeError, r"adamw's eps must be a number, got 'small'"),
        (dict(adamw=dict(betas=(0.9, 1.0))), ValueError, r"each of adamw's betas must be in \[0, 1\), got 1.0"),
        (dict(adamw=dict(betas=(0.9,))), ValueError, r"adamw's betas must be two numbers, got \(0.9,\)"),
        (dict(adamw=3e-3), TypeError, "adamw must be a dict or None, got 0.003"),
        (dict(qk_clip=100.0), TypeError, r"qk_clip must be a QKClip or None, got 100.0; write QKClip\(threshold"),
        (dict(splits=["*"]), TypeError, r"splits must be a dict from patterns of names, or None, got \['\*'\]"),
        (dict(rules="muon"), TypeError, "rules must be a dict from patterns of names, or None, got 'muon'"),
        (dict(momentum=-0.1), ValueError, r"MuonClip: momentum must be in \[0, 1\), got -0.1"),
        (dict(router="sgd"), ValueError, "rule 'router' must be 'muon' or 'adamw', got 'sgd'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        MuonClip(latent.Model(), 0.1, **options)


def test_bad_parameters():
    with pytest.raises(TypeError, match=r"MuonClip: parameters must be a module or \(name, parameter\) pairs"):
        MuonClip(latent.Model().parameters(), 0.1)
    p = nn.Parameter(torch.randn(2, 2))
    with pytest.raises(ValueError, match="parameter names must be unique"):
        MuonClip([("a", p), ("a", nn.Parameter(torch.randn(2, 2)))], 0.1)
    with pytest.raises(TypeError, match="complex parameters are not supported"):
        MuonClip([("bias", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))], 0.1, qk_clip=None)
