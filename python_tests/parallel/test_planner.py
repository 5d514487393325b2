"""Plans against real models and shards, and against numbers computed by hand."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_footprint import FusedNorm, Kept, config, held
from torch import nn

from k2kernels.cli.main import main
from k2kernels.model import K2Config, K2Model
from k2kernels.optim import MuonClip
from k2kernels.parallel import footprint, pipeline, planner
from k2kernels.parallel.planner import GPUS, SHARDINGS, RankGrid, Workload, hold, plan
from k2kernels.parallel.planner_table import table
from k2kernels.parallel.split import Split

K2 = K2Config.preset("kimi-k2")
GB = 10**9


def sizes(items) -> dict[str, int]:
    return {item.name: item.bytes for item in items}


def test_one_rank_holds_what_a_model_allocates(monkeypatch):
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x, self.weight, self.eps))
    model = K2Model(config()).bfloat16().train()
    optimizer = MuonClip(model, 1e-3)
    ids = torch.arange(70) % 64
    with Kept(model) as kept:
        loss = F.cross_entropy(model(ids[None])[0], ids)
    loss.backward()
    optimizer.step()
    holding = hold(model.config, RankGrid(1, 1, 1), Workload(tokens=70), footprint.weights(model.config))
    got = sizes(holding.without)
    assert got["weights"] == held([*model.parameters(), *model.buffers()])
    assert got["gradients"] == held(p.grad for p in model.parameters())
    assert got["optimizer state"] == sum(held(state.values()) for state in optimizer.state.values())
    # Ids and targets are one tensor here, which is counted twice.
    assert got["activations"] + got["head"] == kept.bytes + 8 * 70
    assert all(item.counted for item in holding.without if item.name != "working memory")


@pytest.mark.parametrize("ranks, ep", [(2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4)])
def test_shards_are_those_of_fully_shard(ranks, ep):
    """Rank 0 of torch's FSDP2, which has the largest part of every parameter; experts that ep leaves to this rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    every = footprint.weights(config())
    for sharding in ("dense-fsdp", "fsdp"):
        layout = RankGrid(1, ranks // ep, ep, sharding)
        model = K2Model(config()).bfloat16()
        experts = [layer.mlp.experts for layer in model.model.layers[1:]]
        for module in experts:
            for name, weight in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(weight[: Split(8, ep, 0).num_local_experts].detach().clone()))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        try:
            apart = {p for module in experts for p in module.parameters()}
            if sharding == "fsdp" and layout.edp > 1:
                mesh = init_device_mesh("cpu", (layout.edp, ep), mesh_dim_names=("edp", "ep"))["edp"]
                for module in experts:
                    fully_shard(module, mesh=mesh)
            dense = init_device_mesh("cpu", (ranks,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=dense, ignored_params=apart)
            fully_shard(model, mesh=dense, ignored_params=apart)
            local = {
                name: tuple((p.to_local() if hasattr(p, "to_local") else p).shape)
                for name, p in model.named_parameters()
            }
        finally:
            dist.destroy_process_group()
        want = {w.name: w.shape for w in planner.stage_weights(config(), layout, 0, every) if w.method}
        assert want == local


def test_experts_fewer_than_groups_are_cut_along_their_rows():
    experts = next(w for w in footprint.weights(K2) if w.name.endswith("experts.gate_up_proj"))
    assert planner.local_shape(experts, RankGrid(1, 2, 128, "fsdp")) == (2, 4096, 7168)
    assert planner.local_shape(experts, RankGrid(1, 16, 128, "fsdp")) == (3, 256, 7168)
    assert planner.local_shape(experts, RankGrid(1, 16, 128, "dense-fsdp")) == (3, 4096, 7168)


@pytest.mark.parametrize("pp", [1, 3, 16, 61])
def test_stages_have_every_weight_once(pp):
    every = footprint.weights(K2)
    stages = [planner.stage_weights(K2, RankGrid(pp, 1, 1), stage, every) for stage in range(pp)]
    names = [w.name for stage in stages for w in stage]
    assert sorted(names) == sorted(w.name for w in every)
    assert "model.embed_tokens.weight" in names[: len(stages[0])] and "lm_head.weight" in names[-len(stages[-1]) :]
    layers, last = pipeline.costs(K2)
    assert [planner.stage_layers(K2, pp, stage) for stage in range(pp)] == pipeline.split_layers(layers, pp, last)
    mtp = K2Config.preset("deepseek-v3")
    assert planner.stage_layers(mtp, 16, 15)[-1] == 61 and planner.stage_layers(mtp, 1, 0) == range(62)


def test_serving_kimi_k2():
    """FP8: 14.2 GB and a share of 1,014.9 GB of experts; the fullest rank leaves room for the cache from 16 on."""
    made = plan(K2, 16, "h200", Workload("serve", tokens=512, fp8=True))
    assert made.fitting == [RankGrid(1, 1, 16)] and made.chosen.layout.ep == 16
    weights = sizes(made.chosen.items)["weights"]
    codes = 60 * 24 * 3 * (7168 * 2048 + 4 * 56 * 16)  # of 24 experts in each of 60 layers
    assert weights - codes == pytest.approx(14.2 * GB, rel=0.01) and weights == pytest.approx(77.7 * GB, rel=0.001)
    assert sizes(made.chosen.items)["decoded kv_b_proj"] == 61 * 16384 * 512 * 2
    room = made.cache_room(made.chosen)
    filled = plan(K2, 16, "h200", Workload("serve", tokens=512, fp8=True, cache_tokens=room // 64 * 64)).chosen
    assert filled.total <= made.usable < filled.total + 65 * 70_272 + 4 * room // 64
    assert not plan(K2, 8, "h200", Workload("serve", tokens=512, fp8=True)).fitting


@pytest.mark.parametrize("kind, experts", [("int4", 18), ("mxfp4", 17)])
def test_serving_kimi_k2_thinking_in_4_bits(kind, experts):
    """One node of H200 holds it with experts over 8 ranks: 48 experts of 60 layers, and all else in bfloat16."""
    model = K2Config.preset("kimi-k2-thinking")
    made = plan(model, 8, "h200", Workload("serve", tokens=512, w4=kind))
    assert made.fitting == [RankGrid(1, 1, 8)]
    of_experts = 60 * 48 * 3 * 7168 * 2048 * experts // 32  # bytes for 32 weights
    rest = 2 * (K2.parameter_counts()[0] - 60 * 384 * 3 * 7168 * 2048)
    weights = sizes(made.chosen.items)["weights"]
    assert weights == pytest.approx(of_experts + rest, rel=1e-4)
    assert made.cache_room(made.chosen) > 262_144  # a sequence of the longest context on each rank
    assert not plan(model, 4, "h200", Workload("serve", tokens=512, w4=kind)).fitting
    assert not plan(model, 8, "h100", Workload("serve", tokens=512, w4=kind)).fitting
    assert plan(model, 16, "h100", Workload("serve", tokens=512, w4=kind)).fitting


def test_training_kimi_k2():
    made = plan(K2, 16, "h200")
    assert made.fitting == [] and planner.fewest_gpus(made) == 128
    assert plan(K2, 128, "h200").fitting and not plan(K2, 64, "h200").fitting
    # Muon's 12 bytes and AdamW's 16 an element; nothing of the model is smaller.
    whole = hold(K2, RankGrid(1, 1, 1), Workload(), footprint.weights(K2))
    state = sum(sizes(whole.items)[name] for name in ("weights", "gradients", "optimizer state"))
    assert 12 * K2.parameter_counts()[0] < state < 12.03 * K2.parameter_counts()[0]
    half = hold(K2, RankGrid(1, 1, 1), Workload(momentum_itemsize=2), footprint.weights(K2))
    assert 10 * K2.parameter_counts()[0] < sum(
        sizes(half.items)[n] for n in ("weights", "gradients", "optimizer state")
    )


def test_a_stage_keeps_the_micro_batches_in_flight():
    every, workload = footprint.weights(K2), Workload()
    items = [planner._trained(K2, RankGrid(4, 1, 8), stage, workload, every, False) for stage in range(4)]
    first, last = sizes(items[0])["activations"], sizes(items[3])["activations"]
    p = footprint.Pass(4096, slots=40960, experts=48)
    of_first, of_last = (len(planner.stage_layers(K2, 4, stage)) for stage in (0, 3))
    assert (of_first, of_last) == (16, 13)
    layer, stem = footprint.layer_bytes(K2, 60, p), footprint.stem_bytes(K2, p)
    assert last == of_last * layer + stem
    dense = layer - footprint.layer_bytes(K2, 0, p)
    assert first == 4 * (of_first * layer - dense + stem)


def test_sharding_never_takes_more():
    every = footprint.weights(K2)
    for ep in (8, 32):
        items = [sizes(hold(K2, RankGrid(1, 8, ep, how), Workload(), every).items) for how in SHARDINGS]
        for name in ("weights", "gradients", "optimizer state"):
            held_bytes = [each[name] for each in items]
            assert held_bytes[0] >= held_bytes[2] >= held_bytes[3] and held_bytes[0] >= held_bytes[1]


@pytest.mark.parametrize("gpus_per_node, buffer", [(8, True), (4, False), (72, True)])
def test_buffers_are_those_of_a_node(gpus_per_node, buffer):
    workload = Workload("serve", tokens=128, fp8=True, gpus_per_node=gpus_per_node)
    items = sizes(plan(K2, 16, "b200", workload, ep=8).chosen.items)
    assert items.get("exchange buffers") == (footprint.buffer_bytes(K2, 8, 128) if buffer else None)


def test_sizes_of_gpus():
    assert plan(K2, 2, "141").gpu_bytes == plan(K2, 2, "H200").gpu_bytes == plan(K2, 2, "141GB").gpu_bytes == 141 * GB
    assert GPUS["a100-40"] == 40 and GPUS["4090"] == 24


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(gpu="h900"), r"plan: gpu must be one of a100-40, .*, or a size in GB, got 'h900'; "),
        (dict(gpu="-3"), r"plan: gpu must be one of"),
        (dict(gpus=0), r"plan: gpus must be an int >= 1, got 0"),
        (dict(gpus=10, pp=4), r"plan: gpus must be a multiple of pp=4, got 10; add or take away GPUs, or change pp"),
        (dict(pp=64, gpus=64), r"plan: pp must be at most 61, the layers, got 64"),
        (dict(ep=5), r"plan: ep must be a divisor of the 16 ranks of a stage, got 5; change ep, gpus or pp"),
        (dict(gpus=10, ep=5), r"plan: ep must be a divisor of the 384 experts, got 5; one of 1, 2"),
        (dict(sharding="zero"), r"plan: sharding must be one of 'replicated', .*, got 'zero'"),
        (dict(workload=Workload("serve"), pp=2), r"plan: pp must be 1 where a model is served, got 2; generation has"),
        (dict(workload=Workload("serve"), sharding="fsdp"), r"plan: sharding must be one of 'replicated', got 'fsdp'"),
        (dict(workload=Workload("serve", w4="int8")), r"plan: w4 must be one of 'int4', 'mxfp4', got 'int8'"),
        (dict(workload=Workload("serve", w4="int4", fp8=True)), r"plan: w4 must be None but where a model is served"),
        (dict(workload=Workload(w4="int4")), r"plan: w4 must be None but where a model is served with fp8=False"),
        (dict(workload=Workload("play")), r"plan: mode must be one of 'train', 'serve', got 'play'"),
        (dict(workload=Workload(tokens=0)), r"plan: tokens must be an int >= 1, got 0"),
        (dict(workload=Workload(load=0.5)), r"plan: load must be at least 1, the mean, got 0.5"),
        (dict(config=K2Config.preset("tiny"), workload=Workload("serve", fp8_cache=True)), r"plan: fp8_cache must be"),
        (dict(config=config(dict(tie_word_embeddings=True)), pp=2), r"plan: pp must be 1 where head and embedding"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"config": K2, "gpus": 16, "gpu": "h200", **changes})


def test_table():
    for gpus, workload, options in (
        (16, Workload("serve", tokens=512, fp8=True, cache_tokens=131072), {}),
        (16, Workload(), {}),
        (128, Workload(fp8=True), dict(pp=4)),
        (1, Workload("serve"), {}),
    ):
        made = plan(K2 if gpus > 1 else K2Config.preset("moonlight-16b-a3b"), gpus, "h200", workload, **options)
        text = table(made)
        assert max(map(len, text.splitlines())) <= 120
        assert text.count("*") == 1 + sum(
            (h.total <= made.usable) + (workload.mode == "train" and h.total_without <= made.usable)
            for h in made.holdings
        )
        total = next(line for line in text.splitlines() if line.startswith("  all "))
        assert total.split()[1] == f"{made.chosen.total / GB:,.1f}" and "estimate" in total
        for item in made.chosen.items:
            line = next(line for line in text.splitlines() if line.startswith(f"  {item.name} "))
            assert ("counted" in line) == item.counted and ("estimate" in line) != item.counted
    assert "No layout fits. Of powers of two, 128 would." in table(plan(K2, 16, "h200"))


def test_command(capsys):
    assert main(["info", "kimi-k2", "--gpus", "16", "--gpu", "h200", "--serve", "--fp8"]) == 0
    printed = capsys.readouterr().out
    assert "88.2*" in printed and "131,072 tokens" in printed
    arguments = ["--gpus", "8", "--gpu", "h200", "--serve", "--w4", "int4"]
    assert main(["info", "kimi-k2-thinking", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "serving, bfloat16, experts in INT4;" in printed and "dispatch sends 66.2 KB in bfloat16" in printed
    assert main(["info", "tiny", "--gpus", "8", "--gpu", "4090", "--train", "--pp", "2", "--ep", "2"]) == 0
    assert "pp 2, edp 2, ep 2, replicated" in capsys.readouterr().out
    for arguments, message in {
        ("--gpus", "16"): "info: --gpu must be given for a plan, got none",
        ("--gpu", "h200", "--serve"): "info: --gpus must be given for a plan, got none",
        (
            "--gpus",
            "10",
            "--gpu",
            "h200",
            "--train",
            "--pp",
            "4",
        ): "info: plan: gpus must be a multiple of pp=4, got 10",
    }.items():
        assert main(["info", "kimi-k2", *arguments]) == 2
        assert message in capsys.readouterr().err
