"""4-bit checkpoints: loaded, kept packed, saved and converted as compressed-tensors and transformers read them."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("compressed_tensors", reason="the oracle of 4-bit files")
import compressed_tensors_oracle as oracle
import tiny
from checkpoints import FP8_CONFIG, assert_same, read, write
from test_checkpoint import MEASURE
from w4_checkpoints import EXPERT, PREFIX, SIZES, Made

import k2kernels
from k2kernels import UnsupportedError
from k2kernels.cli import main
from k2kernels.model import K2Config, K2Model, capacity, checkpoint, compressed_tensors, moe, packed
from k2kernels.model.convert import convert
from k2kernels.ops.w4_gemm.gradient import pack_masters

KINDS = ["int4", "mxfp4"]
of_each_kind = pytest.mark.parametrize("kind", KINDS)
WEIGHT = "model.layers.1.mlp.experts.2.up_proj.weight"
IDS = torch.tensor([[3, 141, 59, 26, 53, 58, 97, 93], [2, 71, 82, 81, 82, 84, 59, 4]])


def load(path, **options):
    return K2Model.from_pretrained(path, progress=False, **options)


def plain_state(model, path):
    """The model's weights by the names of files."""
    model.save_pretrained(path)
    return read(path)


@of_each_kind
@pytest.mark.parametrize("kimi", [True, False], ids=["amax/7", "amax/7.5"])
def test_dequantised_weights_are_both_oracles(tmp_path, kind, kimi):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    made = Made(tmp_path, kind, kimi=kimi, shards=3)
    ours = load(made.path)
    assert ours.config.quantization_config is None and ours.config.dtype == "bfloat16"
    assert_same(plain_state(ours, tmp_path / "ours"), made.exact)
    single = Made(tmp_path / "single", kind, kimi=kimi)
    theirs = AutoModelForCausalLM.from_pretrained(
        single.path, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "theirs")
    found = read(tmp_path / "theirs")
    assert_same({name: found[name].to(single.exact[name].dtype) for name in single.exact}, single.exact)
    wide = load(made.path, dtype=torch.float32)
    assert_same(
        plain_state(wide, tmp_path / "wide"),
        {name: x.float() for name, x in made.exact.items()},
    )


@of_each_kind
@pytest.mark.parametrize("nested, shards", [(False, 1), (False, 3), (True, 1), (True, 3)])
def test_kept_packed(tmp_path, kind, nested, shards):
    """In the forms of K2-Thinking and K2.5: logits and tokens are those of dequantised weights."""
    made = Made(tmp_path, kind, nested=nested, shards=shards)
    kept, plain = load(made.path, keep_quantized=True), load(made.path)
    experts = kept.model.layers[1].mlp.experts
    assert experts.w4 == kind and experts.gate_up_proj.dtype == torch.uint8
    assert experts.gate_up_proj.shape == (4, 3, 2, 2304 if kind == "int4" else 2176)
    assert experts.down_proj.shape[:3] == (4, 2, 2) and not experts.down_proj.requires_grad
    with torch.no_grad():
        assert torch.equal(kept(IDS), plain(IDS))
    assert torch.equal(kept.generate(IDS, max_new_tokens=6), plain.generate(IDS, max_new_tokens=6))
    kept.save_pretrained(tmp_path / "back")
    assert_same(read(tmp_path / "back"), made.tensors)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"] == made.entry and config["model_type"] == "deepseek_v3"
    again = load(tmp_path / "back", keep_quantized=True)
    assert_same(again.state_dict(), kept.state_dict())


def test_kept_weights_are_what_pack_w4_makes(tmp_path):
    made = Made(tmp_path, "int4")
    experts = load(made.path, keep_quantized=True).model.layers[2].mlp.experts
    name = "model.layers.2.mlp.experts.3."
    for projection, target in (("gate_proj up_proj", experts.gate_up_proj[3]), ("down_proj", experts.down_proj[3])):
        codes, scales = (
            torch.cat([made.tensors[f"{name}{one}.weight_{end}"] for one in projection.split()])
            for end in ("packed", "scale")
        )
        want = k2kernels.pack_w4(codes, scales, gated=" " in projection).data
        assert torch.equal(target, want)
    gate_up, down = experts.weights()
    assert gate_up.shape == (4, 192, 128) and gate_up.gated and down.shape == (4, 128, 96) and not down.gated


@pytest.mark.parametrize("group_size", [64, 128])
def test_larger_groups_are_served_by_repeated_scales(tmp_path, monkeypatch, group_size):
    monkeypatch.setitem(SIZES, "moe_intermediate_size", 128)
    made = Made(tmp_path, "int4", group_size=group_size)
    kept, plain = load(made.path, keep_quantized=True), load(made.path)
    assert_same(plain_state(plain, tmp_path / "ours"), made.exact)
    with torch.no_grad():
        assert torch.equal(kept(IDS), plain(IDS))
    kept.save_pretrained(tmp_path / "back")
    assert_same(read(tmp_path / "back"), made.tensors)


def test_into_a_model_that_is_there(tmp_path):
    """`load_pretrained`: dequantised into plain experts, packed into packed ones of the same kind."""
    made = Made(tmp_path, "int4")
    want = load(made.path, keep_quantized=True)
    plain = K2Model(replace(want.config, quantization_config=None)).to(torch.bfloat16)
    plain.load_pretrained(made.path, progress=False)
    assert_same(plain.state_dict(), load(made.path).state_dict())
    for kind in KINDS:
        packed = K2Model(want.config).to(torch.bfloat16)
        for layer in packed.model.layers[1:]:
            layer.mlp.experts.use_w4(kind)
        if kind == "int4":
            packed.load_pretrained(made.path, progress=False)
            assert_same(packed.state_dict(), want.state_dict())
        else:
            with pytest.raises(ValueError, match=r"experts must be mxfp4 like the model's, got .*down_proj.* \(int4\)"):
                packed.load_pretrained(made.path, progress=False)
    with pytest.raises(ValueError, match=r"of the wrong dtype: .* \(wanted packed 4-bit codes, got BF16"):
        packed.load_pretrained(tmp_path / "plain", progress=False)


def test_what_a_kept_model_cannot_do(tmp_path):
    made = Made(tmp_path, "int4")
    with pytest.raises(
        ValueError, match=r"keep_quantized of 4-bit weights must go with dtype torch.bfloat16, .*float32"
    ):
        load(made.path, keep_quantized=True, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"use_fp8: .* got 4-bit codes; load it with keep_quantized=False"):
        load(made.path, keep_fp8=True).use_fp8()
    with pytest.raises(TypeError, match="keep_quantized must be True or False, got 'yes'"):
        load(made.path, keep_quantized="yes")
    large = made.rewrite(lambda t, c: renamed(t, WEIGHT, "_scale", lambda x: x.index_fill(0, torch.tensor([5]), -0.5)))
    with pytest.raises(ValueError, match=r"numbers below 0.5 in magnitude, to be kept, got 4 others \(-0.5\)"):
        load(large, keep_quantized=True)
    load(large)
    with pytest.raises(ValueError, match="keep_quantized must go with a block-FP8 or 4-bit checkpoint"):
        load(tmp_path / "plain", keep_quantized=True)


K3_NAMES = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def as_in_k3(tensors, config):
    """Experts, router and shared experts of Kimi-K3's names; only routed experts have w1, w2 and w3."""
    for name in [name for name in tensors if ".mlp.experts." in name or ".mlp.gate." in name or ".shared_" in name]:
        new = name.replace(".mlp.", K3_NAMES[".mlp."])
        for ours, theirs in K3_NAMES.items():
            new = new.replace(ours, theirs) if ".experts." in new else new
        tensors[new] = tensors.pop(name)


def test_names_of_kimi_k3(tmp_path):
    """In a model of this architecture they are read, and written under its own; `convert` keeps them."""
    made = Made(tmp_path, "mxfp4", nested=True)
    want, plain = load(made.path, keep_quantized=True), load(made.path)
    path = made.rewrite(as_in_k3)
    assert f"{PREFIX}model.layers.1.block_sparse_moe.experts.3.w2.weight_packed" in read(path)
    kept = load(path, keep_quantized=True)
    assert_same(kept.state_dict(), want.state_dict())
    kept.save_pretrained(tmp_path / "back")
    assert_same(read(tmp_path / "back"), made.tensors)
    convert(path, tmp_path / "bf16", "bf16", progress=False)
    assert f"{PREFIX}model.layers.1.block_sparse_moe.experts.3.w2.weight" in read(tmp_path / "bf16")
    assert_same(load(tmp_path / "bf16").state_dict(), plain.state_dict())
    convert(tmp_path / "bf16", tmp_path / "again", "mxfp4", progress=False)
    assert_same(read(tmp_path / "again"), read(path))
    name = f"{PREFIX}{WEIGHT.removesuffix('weight')}weight_scale"
    both = made.rewrite(lambda t, c: (as_in_k3(t, c), t.update({name: torch.zeros(96, 4, dtype=torch.uint8)})))
    with pytest.raises(ValueError, match=r"tensors must be there once, got others for .*w3\.weight_scale"):
        load(both)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("model.layers.1.mlp.experts.gate_up_proj_blocks", torch.zeros(4, 192, 4, 16, dtype=torch.uint8), "gpt-oss"),
        ("model.layers.1.mlp.experts.down_proj_scales", torch.zeros(4, 128, 3, dtype=torch.uint8), "gpt-oss"),
        ("model.layers.1.ffn.experts.0.w1.weight", torch.zeros(96, 64, dtype=torch.int8), "DeepSeek-V4"),
        ("model.layers.1.ffn.experts.0.w1.scale", torch.ones(96, 4).to(torch.float8_e8m0fnu), "DeepSeek-V4"),
    ],
)
def test_codes_of_other_models(tmp_path, name, tensor, message):
    """The message names what was found, and what is served."""
    path = Made(tmp_path, "mxfp4").rewrite(lambda t, c: t.update({name: tensor}))
    for call in (load, lambda path: convert(path, tmp_path / "out", "bf16", progress=False)):
        with pytest.raises(
            UnsupportedError, match=rf"{message} are not served, got {name}; served are .*weight_packed"
        ):
            call(path)
    assert not (tmp_path / "out").exists()


# ---- conversion -------------------------------------------------------------------------------------------------


@of_each_kind
@pytest.mark.parametrize("nested", [False, True])
def test_to_bf16_and_back(tmp_path, kind, nested):
    made = Made(tmp_path, kind, nested=nested, shards=2)
    convert(made.path, tmp_path / "bf16", "bf16", progress=False)
    prefix = PREFIX if nested else ""
    found = {n.removeprefix(prefix): x for n, x in read(tmp_path / "bf16").items() if not n.startswith("vision")}
    assert_same(found, made.exact)
    assert "quantization_config" not in (tmp_path / "bf16" / "config.json").read_text()
    assert_same(load(tmp_path / "bf16").state_dict(), load(made.path).state_dict())
    convert(tmp_path / "bf16", tmp_path / "back", kind, progress=False)
    assert_same(read(tmp_path / "back"), made.stored)
    kept = load(tmp_path / "back", keep_quantized=True)
    assert_same(kept.state_dict(), load(made.path, keep_quantized=True).state_dict())


@pytest.mark.parametrize("to, options", [("int4", {}), ("int4", dict(q_min=-8)), ("mxfp4", dict(scale_rule="floor"))])
def test_what_is_written_is_read_by_compressed_tensors(tmp_path, to, options):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    made = Made(tmp_path, "int4")
    convert(tmp_path / "plain", tmp_path / "out", to, progress=False, **options)
    written, quantizer = (
        read(tmp_path / "out"),
        dict(int4=k2kernels.quantize_int4_group32, mxfp4=k2kernels.quantize_mxfp4),
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "theirs")
    found = read(tmp_path / "theirs")
    for name, weight in read(tmp_path / "plain").items():
        if EXPERT.fullmatch(name):
            codes, scales = quantizer[to](weight, **options)
            assert torch.equal(written[name + "_packed"], codes) and torch.equal(written[name + "_scale"], scales)
            weight = k2kernels.dequantize_w4(codes, scales)
            parts = {
                end: written[f"{name}_{end}"] for end in ("packed", "scale", "shape") if f"{name}_{end}" in written
            }
            assert torch.equal(oracle.decompress({f"weight_{end}": x for end, x in parts.items()}, to), weight)
        assert torch.equal(found[name].to(weight.dtype), weight), name
    assert set(made.tensors) == set(written) or to == "mxfp4"


def test_between_kinds(tmp_path):
    """What is quantised is dequantised first; FP8 and 4-bit experts become one another."""
    made = Made(tmp_path, "int4")
    convert(made.path, tmp_path / "fp8", "fp8", progress=False)
    convert(made.path, tmp_path / "bf16", "bf16", progress=False)
    convert(tmp_path / "bf16", tmp_path / "fp8 of bf16", "fp8", progress=False)
    assert_same(read(tmp_path / "fp8"), read(tmp_path / "fp8 of bf16"))
    convert(tmp_path / "fp8", tmp_path / "mxfp4", "mxfp4", progress=False)
    convert(tmp_path / "fp8", tmp_path / "bf16 of fp8", "bf16", progress=False)
    convert(tmp_path / "bf16 of fp8", tmp_path / "want", "mxfp4", progress=False)
    assert_same(read(tmp_path / "mxfp4"), read(tmp_path / "want"))
    convert(made.path, tmp_path / "other", "mxfp4", progress=False)
    load(tmp_path / "other", keep_quantized=True).generate(IDS, max_new_tokens=2)


def test_command(tmp_path, capsys):
    made = Made(tmp_path, "int4")
    assert main(["convert", str(made.path), str(tmp_path / "a"), "--to", "bf16"]) == 0
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "int4", "--q-min", "-8"]) == 0
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "c"), "--to", "mxfp4", "--scale-rule", "floor"]) == 0
    assert main(["info", str(made.path)]) == 0
    capsys.readouterr()
    for arguments, message in (
        ((tmp_path / "b", "int4"), "experts of another kind to become int4, got .*which is int4 already"),
        ((tmp_path / "a", "mxfp4", "--q-min", "-8"), "q_min must be -7, or -8 with to='int4', got -8 with to='mxfp4'"),
        ((tmp_path / "a", "int4", "--scale-rule", "floor"), "scale_rule must be 'even', or 'floor' with to='mxfp4'"),
    ):
        source, to, *options = arguments
        assert main(["convert", str(source), str(tmp_path / "new"), "--to", to, *options]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_convert_refuses_odd_k(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "moe_intermediate_size", 64)
    Made(tmp_path, "int4")
    tensors, config = read(tmp_path / "plain"), json.loads((tmp_path / "plain" / "config.json").read_text())
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    tensors[name] = tensors[name][:, :40].contiguous()
    write(tmp_path / "odd", tensors, config)
    with pytest.raises(ValueError, match=r"K of a weight must be a multiple of 32 .*down_proj\.weight \[128, 40\]"):
        convert(tmp_path / "odd", tmp_path / "out", "int4", progress=False)
    tensors[name] = torch.full((128, 64), torch.nan).bfloat16()
    write(tmp_path / "odd", tensors, config)
    with pytest.raises(ValueError, match=r"down_proj\.weight in .* must hold finite numbers, got NaN or infinity"):
        convert(tmp_path / "odd", tmp_path / "out", "int4", progress=False)
    assert not (tmp_path / "out").exists()


# ---- export -----------------------------------------------------------------------------------------------------


def contents(path):
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    return {**files, "config.json": json.loads(files["config.json"])}


def test_export_in_shards_of_another_dtype(tmp_path):
    """Of a float32 model: experts are quantised from float32, all else is rounded, as `convert` does it."""
    model = tiny.model("kimi", **SIZES)
    model.save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "want", "mxfp4", progress=False)
    model.save_pretrained(tmp_path / "out", format="mxfp4", max_shard_size=100_000)
    assert len(list((tmp_path / "out").iterdir())) > 4
    assert_same(read(tmp_path / "out"), read(tmp_path / "want"))
    entry = json.loads((tmp_path / "out" / "config.json").read_text())
    assert entry["quantization_config"] == compressed_tensors.quantization_config("mxfp4")
    assert entry["torch_dtype"] == "bfloat16" and model.config.dtype == "float32"
    model.save_pretrained(tmp_path / "exact", format="int4")
    for layer in model.model.layers[1:]:
        layer.mlp.experts.compute_dtype = torch.bfloat16  # as `parallelize` sets it
    model.save_pretrained(tmp_path / "rounded", format="int4")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half", format="int4")
    exact, rounded, half = (read(tmp_path / name) for name in ("exact", "rounded", "half"))
    assert_same(rounded, half)
    assert not torch.equal(exact[WEIGHT + "_packed"], half[WEIGHT + "_packed"])


def test_what_cannot_be_exported(tmp_path):
    def refused(model, message, format="int4"):
        with pytest.raises(ValueError, match=f"^save_pretrained: {message}"):
            model.save_pretrained(tmp_path / "out", format=format)

    model = tiny.model("kimi", **SIZES)
    refused(model, "format must be None or one of int4, mxfp4, got 'fp8'; save without, and convert", "fp8")
    model.model.layers[1].mlp.experts.down_proj.data[3, 5, 7] = torch.nan
    refused(model, r"model.layers.1.mlp.experts.down_proj must be finite, got NaN or infinity")
    refused(tiny.model("kimi"), r"the columns of .*down_proj must be a multiple of 32 to become int4, got 40")
    refused(tiny.model("kimi", first_k_dense_replace=4), "a model that becomes int4 must be one with routed experts")
    kept = load(Made(tmp_path, "int4").path, keep_quantized=True)
    refused(kept, "weights must be in high precision to become int4, got codes in .*; load .* keep_quantized=False")
    assert not (tmp_path / "out").exists()


# ---- training ---------------------------------------------------------------------------------------------------


@of_each_kind
def test_training_forward_is_the_served_one(tmp_path, kind):
    """After some steps of training: exported, loaded again, the same logits to the bit."""
    Made(tmp_path, kind)
    model = load(tmp_path / "plain").train().use_w4(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert model.model.layers[1].mlp.experts.gate_up_proj.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    with torch.no_grad():
        trained = model.eval()(IDS)
    model.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "served", kind, progress=False)
    model.save_pretrained(tmp_path / "exported", format=kind)
    assert contents(tmp_path / "exported") == contents(tmp_path / "served")
    served = load(tmp_path / "exported", keep_quantized=True)
    with torch.no_grad():
        assert torch.equal(served(IDS), trained)
        assert not torch.equal(model.use_w4(None)(IDS), trained)
    with pytest.raises(ValueError, match="use_w4: experts must be in high precision, got codes"):
        served.use_w4()
    with pytest.raises(ValueError, match="use_w4: kind must be None or one of int4, mxfp4, got 'int8'"):
        model.use_w4("int8")


def test_micro_batches_share_one_packing(tmp_path, monkeypatch):
    """With `pack_once` the bits are the same; weights are packed once in a step, and after any change that counts."""
    Made(tmp_path, "int4")
    packs = []
    monkeypatch.setattr(moe, "pack_masters", lambda *args: packs.append(args) or pack_masters(*args))
    found = []
    for once in (True, False):
        model = load(tmp_path / "plain").train().use_w4("int4", pack_once=once)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            for ids in IDS.split(1):
                model(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found.append(({n: p.clone() for n, p in model.named_parameters()}, model(IDS), model(IDS)))
        if once:
            assert len(packs) == 3 * 2 * 2  # times, layers with experts, and weights of each
            with torch.no_grad():
                model.model.layers[1].mlp.experts.down_proj.mul_(2)
                model(IDS), copy.deepcopy(model)(IDS)
            assert len(packs) == 3 * 2 * 2 + 1 + 2 * 2
    assert len(packs) == 3 * 2 * 2 + 1 + 2 * 2
    assert_same(*(state for state, _, _ in found))
    assert all(torch.equal(logits, found[0][1]) for _, *both in found for logits in both)


@of_each_kind
def test_what_stands_around_packed_experts_can_be_trained(tmp_path, kind):
    made = Made(tmp_path, kind)
    kept, plain = load(made.path, keep_quantized=True).train(), load(made.path).train()
    for model in (kept, plain):
        torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    found, want = ({n: p.grad for n, p in model.named_parameters() if ".experts." not in n} for model in (kept, plain))
    assert_same(found, want)
    assert found["model.embed_tokens.weight"].abs().max() > 0


# ---- what is refused --------------------------------------------------------------------------------------------


SHARED = "model.layers.1.mlp.shared_experts.down_proj.weight"


def renamed(tensors, name, end, change):
    tensors[name + end] = change(tensors[name + end])


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "kind, change, error, message",
    [
        ("int4", lambda t, c: t.pop(WEIGHT + "_scale"), ValueError, r"up_proj\.weight_scale is missing \(for "),
        ("int4", lambda t, c: t.pop(WEIGHT + "_packed"), ValueError, r"weight_scale \(without .*weight_packed\)"),
        ("int4", lambda t, c: [t.pop(WEIGHT + e) for e in ("_packed", "_scale", "_shape")], ValueError, "1 missing"),
        ("int4", lambda t, c: renamed(t, WEIGHT, "_packed", lambda x: x.view(torch.uint8)), ValueError,
         r"weight_packed \(wanted I32 for int4, got U8\)"),
        ("int4", lambda t, c: renamed(t, WEIGHT, "_packed", lambda x: x.long()), ValueError, "wanted I32 .* got I64"),
        ("mxfp4", lambda t, c: renamed(t, WEIGHT, "_packed", lambda x: x.view(torch.int32)), ValueError,
         "wanted U8 or I8 for mxfp4, got I32"),
        ("int4", lambda t, c: renamed(t, WEIGHT, "_scale", lambda x: x.half()), ValueError, "wanted BF16, got F16"),
        ("mxfp4", lambda t, c: renamed(t, WEIGHT, "_scale", lambda x: x.float()), ValueError, "wanted U8 or F8_E8M0"),
        ("int4", lambda t, c: renamed(t, WEIGHT, "_scale", lambda x: x[:, :3].contiguous()), ValueError,
         r"weight_scale \(wanted \[96, 4\] for groups of \[32\], got \[96, 3\]\)"),
        ("int4", lambda t, c: renamed(t, WEIGHT, "_scale", lambda x: x.index_fill(0, torch.tensor([5]), torch.inf)),
         ValueError, r"weight_scale must hold (finite numbers|.* below 0.5 .*), got 4 others \(inf\)"),
        ("mxfp4", lambda t, c: renamed(t, WEIGHT, "_scale", lambda x: x.index_fill(1, torch.tensor([0]), 255)),
         ValueError, r"weight_scale must hold .* 255, got 96 others \(255\)|bytes of at most 128.* 96 others"),
        ("int4", lambda t, c: renamed(t, WEIGHT, "_shape", lambda x: torch.tensor([128, 96])), ValueError,
         r"weight_shape must be \[96, 128\] like the codes, got \[128, 96\]"),
        ("int4", lambda t, c: renamed(t, WEIGHT, "_shape", lambda x: x.float()), ValueError, r"wanted I64 \[2\], got"),
        ("int4", lambda t, c: renamed(t, WEIGHT, "_packed", lambda x: x[:, :15].contiguous()), ValueError,
         "wanted a K that is a multiple of 32, got 120"),
        ("int4", lambda t, c: t.update({WEIGHT: torch.zeros(96, 128)}), ValueError, "a weight is packed or not"),
        ("int4", lambda t, c: t.update({WEIGHT + "_zero_point": torch.zeros(12, 4, dtype=torch.int32)}),
         UnsupportedError, r"asymmetric weights \(zero points\) are not served, got .*zero_point"),
        ("int4", lambda t, c: t.update({WEIGHT + "_g_idx": torch.zeros(128, dtype=torch.int32)}), UnsupportedError,
         r"\(g_idx\) are not served"),
        ("mxfp4", lambda t, c: t.update({WEIGHT + "_global_scale": torch.ones(1)}), UnsupportedError, "NVFP4 weights"),
        ("int4", lambda t, c: c.pop("quantization_config"), ValueError,
         r"config.json must have a quantization_config of compressed-tensors, as the files hold packed weights"),
        ("int4", lambda t, c: c.update(quantization_config=FP8_CONFIG), ValueError,
         "quantization_config of compressed-tensors, .* got 'fp8'"),
        ("int4", lambda t, c: c.update(quantization_config=compressed_tensors.quantization_config("mxfp4")), ValueError,
         "wanted U8 or I8 for mxfp4, got I32"),
        ("int4", lambda t, c: c.update(moe_intermediate_size=64), ValueError,
         r"of the wrong shape: .* \(wanted \[64, 128\], got \[96, 128\]\)"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path, kind, change, error, message, keep):
    path = Made(tmp_path, kind).rewrite(change)
    with pytest.raises(error, match=message):
        load(path, keep_quantized=keep)
    with pytest.raises((error, ValueError)):
        if "missing" not in message and "shape:" not in message:
            convert(path, tmp_path / "out", "bf16", progress=False)
        raise ValueError
    assert not (tmp_path / "out").exists()


def test_scales_above_2_load_dequantised_only(tmp_path):
    made = Made(tmp_path, "mxfp4")
    path = made.rewrite(lambda t, c: renamed(t, WEIGHT, "_scale", lambda x: x.clone().fill_(129)))
    assert load(path).model.layers[1].mlp.experts.gate_up_proj[2, 96:].abs().max() == 24
    with pytest.raises(ValueError, match=r"bytes of at most 128, a scale of 2, to be kept, got 384 others \(129\)"):
        load(path, keep_quantized=True)


def test_other_modules_packed_load_dequantised_only(tmp_path):
    """As the files say, whichever module it is."""
    made = Made(tmp_path, "int4")

    def pack(tensors, config):
        packed = oracle.compress(tensors.pop(SHARED), "int4")
        made.exact[SHARED] = oracle.decompress(packed, "int4")
        tensors.update({SHARED.removesuffix("weight") + end: x for end, x in packed.items()})

    path = made.rewrite(pack)
    assert_same(plain_state(load(path), tmp_path / "ours"), made.exact)
    with pytest.raises(UnsupportedError, match=r"needs the routed experts alone to be packed, got .*shared_experts"):
        load(path, keep_quantized=True)


def test_a_layer_of_plain_experts_stays_plain(tmp_path):
    """And one of which some experts are packed, some not, can be loaded dequantised."""
    made = Made(tmp_path, "int4")

    def unpack(only):
        def change(tensors, config):
            for name in [name for name in made.exact if EXPERT.fullmatch(name) and only in name]:
                for end in ("_packed", "_scale", "_shape"):
                    tensors.pop(name + end)
                tensors[name] = made.exact[name]

        return change

    want = plain_state(load(made.path), tmp_path / "a")
    path = made.rewrite(unpack("layers.1."))
    kept = load(path, keep_quantized=True)
    assert kept.model.layers[1].mlp.experts.w4 is None and kept.model.layers[2].mlp.experts.w4 == "int4"
    with torch.no_grad():
        assert torch.equal(kept(IDS), load(path)(IDS))
    kept.save_pretrained(tmp_path / "back")
    assert_same(read(tmp_path / "back"), read(path))
    path = made.rewrite(unpack("layers.1.mlp.experts.0."))
    assert_same(plain_state(load(path), tmp_path / "b"), want)
    with pytest.raises(UnsupportedError, match="experts of one kind in a layer, got int4 and others in"):
        load(path, keep_quantized=True)


INT4, MXFP4 = (compressed_tensors.quantization_config(kind) for kind in KINDS)


def with_weights(entry=INT4, **changes):
    group = entry["config_groups"]["group_0"]
    return {**entry, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **changes}}}}


def with_group(entry=INT4, **changes):
    return {**entry, "config_groups": {"group_0": {**entry["config_groups"]["group_0"], **changes}}}


@pytest.mark.parametrize(
    "entry, message",
    [
        (with_weights(num_bits=8), "weights.num_bits must be 4, got 8"),
        (with_weights(type="float"), "weights.type must be 'int', got 'float'"),
        (with_weights(MXFP4, type="int"), "weights.type must be 'float', got 'int'"),
        (with_weights(symmetric=False), r"weights.symmetric \(zero points\) must be True, got False"),
        (with_weights(strategy="channel", group_size=None), "weights.strategy must be 'group', got 'channel'"),
        (with_weights(strategy=None, group_size=-1), "weights.strategy must be 'group', got 'tensor'"),
        (with_weights(group_size=16), "weights.group_size must be 32 or 64 or 128, got 16"),
        (with_weights(MXFP4, group_size=64), "weights.group_size must be 32, got 64"),
        (
            with_weights(actorder="group"),
            r"weights.actorder \(g_idx\) must be None or 'weight' or 'static', got 'group'",
        ),
        (with_weights(dynamic=True), "weights.dynamic must be False, got True"),
        (
            with_weights(MXFP4, scale_dtype="torch.float8_e4m3fn"),
            "weights.scale_dtype must be None or 'torch.uint8', got",
        ),
        (with_group(input_activations={"num_bits": 8}), "input_activations must be null: activations stay in bfloat16"),
        (with_group(output_activations={"num_bits": 8}), "output_activations must be null"),
        (with_group(format="nvfp4-pack-quantized"), "NVFP4 is not served, got 'nvfp4-pack-quantized'"),
        (with_group(format="float-quantized"), "format of config_groups.group_0 must be one of pack-quantized, mxfp4"),
        (with_group({**INT4, "format": "marlin-24"}, format=None), "must be one of .*, got 'marlin-24'"),
        (with_group({**INT4, "format": "mixed-precision"}, format=None), "must be one of .*, got 'mixed-precision'"),
        (with_group(weights=None), "config_groups.group_0 must be an object with `weights`"),
        ({**INT4, "config_groups": {}}, "config_groups must be an object with one group or more"),
        ({**INT4, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme must be null or empty"),
        ({**INT4, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config must be null or empty"),
        ({**INT4, "transform_config": {"R1": {}}}, r"transform_config must be .*\(weights that were rotated"),
        ({**INT4, "quant_method": "mxfp4"}, "must be 'fp8' or 'compressed-tensors', got 'mxfp4'"),
    ],
)
def test_configurations_that_are_not_served(entry, message):
    for values in (
        {"model_type": "kimi_k2", "quantization_config": entry},
        {"model_type": "kimi_k25", "text_config": {"quantization_config": entry}},
    ):
        with pytest.raises(UnsupportedError, match=rf"^K2Config: quantization_config\..*{message}"):
            K2Config.from_dict(values)


def test_configurations_that_are_served(tmp_path):
    for kind in KINDS:
        entry = Made(tmp_path / kind, kind).entry
        assert {scheme.kind for scheme in compressed_tensors.schemes(entry)} == {kind}
        config = K2Config.from_dict({"model_type": "kimi_k2", "quantization_config": entry})
        assert config.quantization_config == entry and config.weight_block_size is None
    for entry in (
        with_weights(actorder="static", group_size=128),
        with_group({**MXFP4, "format": "mixed-precision", "sparsity_config": {"format": "dense"}}),
        {**INT4, "config_groups": {**INT4["config_groups"], "group_1": MXFP4["config_groups"]["group_0"]}},
    ):
        assert K2Config.from_dict({"model_type": "kimi_k2", "quantization_config": entry}).quantization_config == entry


# ---- memory -----------------------------------------------------------------------------------------------------


@of_each_kind
def test_weights_that_do_not_fit(tmp_path, monkeypatch, kind):
    """Of a device that holds the packed model and not the dequantised one."""
    path = Made(tmp_path, kind).path
    sizes = {
        keep: sum(t.nbytes for t in load(path, keep_quantized=keep).state_dict().values()) for keep in (True, False)
    }
    asked = []
    monkeypatch.setattr(checkpoint, "device_bytes", lambda device: asked.append(device.type) or sizes[True])
    load(path, keep_quantized=True)
    message = (
        rf"{path}: weights must fit into the {sizes[True] / 1e6:.1f} MB of 'cpu', got {sizes[False] / 1e6:.1f} MB in "
        rf"bfloat16; load with keep_quantized=True \(--keep-quantized\), as the files have them: \d\.\d MB in all"
    )
    with monkeypatch.context() as patch, pytest.raises(MemoryError, match=message):
        patch.setattr(checkpoint, "_load", None)  # not reached
        load(path)
    with pytest.raises(MemoryError, match=r"got \d\.\d MB in float32"):
        load(path, dtype=torch.float32)
    monkeypatch.setattr(checkpoint, "device_bytes", lambda device: sizes[True] - 1)
    with pytest.raises(MemoryError, match=r"in bfloat16; divide the experts among more GPUs \(mesh, torchrun\)"):
        load(path, keep_quantized=True)
    with pytest.raises(MemoryError, match="or convert the checkpoint: k2kernels convert"):
        load(tmp_path / "plain")
    assert set(asked) == {"cpu"}
    monkeypatch.setattr(checkpoint, "device_bytes", lambda device: sizes[False])
    load(path)


def test_the_memory_of_this_machine(monkeypatch):
    here = capacity.device_bytes(torch.device("cpu"))
    assert here is None or 10**8 < here < 10**15
    assert capacity.device_bytes(torch.device("meta")) is None
    read_text = Path.read_text
    limits = {"/sys/fs/cgroup/memory.max": "max", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000"}
    limits["/proc/meminfo"] = "MemTotal: 5 kB\nSwapTotal:  2 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path: limits.get(str(path)) or read_text(path))
    assert capacity.device_bytes(torch.device("cpu")) == 1_000_000 + 2048


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="the peak of a process is read from Linux's /proc"
)
def test_peak_memory(tmp_path):
    """Loading packed needs less than the checkpoint and its largest tensor, 67 MB: experts are packed one by one.

    Of 430 MB in 5 shards, among which the tensors of an expert are spread, 340 MB are experts.
    """
    sizes = dict(vocab_size=32768, hidden_size=1024, num_hidden_layers=4, q_lora_rank=256, kv_lora_rank=512)
    config = K2Config(
        **sizes,
        num_attention_heads=8,
        intermediate_size=2048,
        moe_intermediate_size=1024,
        first_k_dense_replace=1,
        n_routed_experts=64,
        n_group=1,
        topk_group=1,
        quantization_config=INT4,
    )
    with torch.device("meta"):
        model = K2Model(config)
    tensors = {}
    for name, stack in model.state_dict().items():
        for piece, like in checkpoint.pieces(name, stack):
            if EXPERT.fullmatch(piece):
                n, k = like.shape
                codes = torch.randint(-(2**31), 2**31, (n, k // 8)).int()
                scales = torch.full((n, k // 32), 2.0**-8).bfloat16()
                tensors |= dict(packed.file_tensors(piece, codes, scales))
            else:
                tensors[piece] = torch.full(like.shape, 2.0**-8).bfloat16()
    write(tmp_path / "big", tensors, config.to_dict(), shards=5)
    total, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    del tensors
    small = Made(tmp_path, "int4").path
    measure = MEASURE.replace("progress=False", "progress=False, keep_quantized=True")
    try:
        run = subprocess.run(
            [sys.executable, "-c", measure, tmp_path / "big", small], capture_output=True, text=True, check=True
        )
    finally:
        shutil.rmtree(tmp_path / "big")
    peak, held = map(int, run.stdout.split())
    assert total > 400_000_000 and abs(held - total) < 1_000_000
    assert total * 0.95 < peak < total + largest, f"{peak / 1e6:.0f} MB for {total / 1e6:.0f} + {largest / 1e6:.0f} MB"
