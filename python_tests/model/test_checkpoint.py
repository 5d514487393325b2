"""Loading and saving: against transformers, against block FP8 written by hand, and with all that can be wrong."""

import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from checkpoints import ALIGNED, FP8_CONFIG, PARTIAL, assert_same, dequantize, fp8_checkpoint, read, write
from safetensors.torch import load_file, save_file

from k2kernels import UnsupportedError
from k2kernels.model import K2Config, K2Model, checkpoint, shards
from k2kernels.model.checkpoint import save_pretrained

LAYER = "model.layers.1."


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def theirs(transformers, config, **changes):
    """A random transformers model of the same configuration."""
    made = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config.from_dict({**config.to_dict(), **changes}))
    tiny.fill(made)
    return made.eval()


def as_ours(state):
    """transformers' state dict under this library's names: gate and up of the dense layers fused."""
    fused = {}
    for name, tensor in state.items():
        if name.endswith("mlp.gate_proj.weight") or name.endswith("shared_experts.gate_proj.weight"):
            up = state[name.replace("gate_proj", "up_proj")]
            fused[name.replace("gate_proj", "gate_up_proj")] = torch.cat([tensor, up])
        elif not name.endswith(("up_proj.weight",)):
            fused[name] = tensor
    return fused


def load(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return K2Model.from_pretrained(path, progress=False, **options)


@pytest.fixture
def plain(tmp_path):
    """A small float32 checkpoint as (directory, tensors, config.json), made without the saver."""
    model = tiny.model("kimi", num_hidden_layers=2, hidden_size=32, q_lora_rank=16, vocab_size=64)
    save_pretrained(model, tmp_path / "made")
    tensors, config = read(tmp_path / "made"), json.loads((tmp_path / "made" / "config.json").read_text())
    shutil.rmtree(tmp_path / "made")
    write(tmp_path / "plain", tensors, config, shards=3)
    return tmp_path / "plain", tensors, config


# ---- transformers reads ours, we read theirs -------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["5GB", "200KB"])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_loads_what_transformers_saved(tmp_path, transformers, name, shard_size):
    model = theirs(transformers, tiny.config(name))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "5GB")
    loaded = load(tmp_path)
    assert_same(loaded.state_dict(), as_ours(model.state_dict()))
    assert not loaded.training
    assert loaded.config == tiny.config(name)


@pytest.mark.parametrize("shard_size", [5_000_000_000, 100_000])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_transformers_loads_what_we_saved(tmp_path, transformers, name, shard_size):
    model = tiny.model(name)
    save_pretrained(model, tmp_path / "new", max_shard_size=shard_size)
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(report.values()), report
    assert back.dtype == torch.float32
    assert_same(as_ours(back.state_dict()), model.state_dict())
    assert_same(load(tmp_path / "new").state_dict(), model.state_dict())


def test_names_on_disk(tmp_path):
    """Every name of a two-layer model, written down."""
    tiny.model("kimi", num_hidden_layers=2, n_routed_experts=2, num_experts_per_tok=1).save_pretrained(tmp_path)
    attention = "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj".split()
    mlp = ["gate_proj", "up_proj", "down_proj"]
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in ("model.layers.0.", LAYER):
        expected |= {f"{layer}self_attn.{part}.weight" for part in attention}
        expected |= {f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight"}
    expected |= {f"model.layers.0.mlp.{part}.weight" for part in mlp}
    for group in ("experts.0", "experts.1", "shared_experts"):
        expected |= {f"{LAYER}mlp.{group}.{part}.weight" for part in mlp}
    expected |= {f"{LAYER}mlp.gate.weight", f"{LAYER}mlp.gate.e_score_correction_bias"}
    assert set(read(tmp_path)) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_shards_and_index(tmp_path):
    model = tiny.model("kimi")
    save_pretrained(model, tmp_path, max_shard_size=150_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 5 and [f.name for f in files] == [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 150_000
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(tensors)
        assert file.stat().st_mode & 0o777 == (tmp_path / "config.json").stat().st_mode & 0o777
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())


def test_tied_embedding(tmp_path, transformers):
    config = tiny.config("kimi", tie_word_embeddings=True)
    model = theirs(transformers, config)
    model.save_pretrained(tmp_path / "theirs")
    assert "lm_head.weight" not in read(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    loaded.save_pretrained(tmp_path / "ours")
    assert set(read(tmp_path / "ours")) == set(read(tmp_path / "theirs"))
    # Files that hold the head all the same are read too.
    write(tmp_path / "both", {**read(tmp_path / "ours"), "lm_head.weight": loaded.lm_head.weight}, config.to_dict())
    assert_same(load(tmp_path / "both").state_dict(), loaded.state_dict())


def test_one_step_of_training_after_loading(tmp_path):
    """Nothing is left on the meta device, and loaded weights train."""
    tiny.model("kimi").save_pretrained(tmp_path)
    model = load(tmp_path).train()
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.device.type == "cpu" for t in tensors) and all(p.requires_grad for p in model.parameters())
    saved = model.state_dict()
    unsaved = {name: buffer for name, buffer in tiny.model("kimi").named_buffers() if name not in saved}
    assert len(unsaved) > 5
    assert_same({name: buffer for name, buffer in model.named_buffers() if name not in saved}, unsaved)
    model(torch.randint(0, 256, (2, 8))).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(logits.isfinite().all() for logits in model.max_logits().values())


# ---- dtypes and places -----------------------------------------------------------------------------------------------


def test_dtype(tmp_path):
    model = tiny.model("kimi")
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float64):
        loaded = load(tmp_path, dtype=dtype)
        assert loaded.config.dtype == str(dtype).removeprefix("torch.")
        for name, tensor in model.state_dict().items():
            wanted = tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)
            assert loaded.state_dict()[name].dtype == wanted.dtype and torch.equal(loaded.state_dict()[name], wanted)
    with pytest.raises(TypeError, match=r"dtype must be a float dtype or None, got torch\.int8"):
        load(tmp_path, dtype=torch.int8)
    for device in ("gpu", "cpu:x", 5.0) + (() if torch.cuda.is_available() else ("cuda",)):
        with pytest.raises(
            ValueError, match=rf"from_pretrained: device must be one of this machine, got {device!r} \("
        ):
            load(tmp_path, device=device)
    with pytest.raises(ValueError, match="device must be one that holds data, got 'meta'"):
        load(tmp_path, device="meta")


def test_default_dtype(tmp_path, plain):
    """config.json decides; without a word from it, the embedding."""
    _, tensors, config = plain
    del config["dtype"], config["torch_dtype"]
    write(tmp_path / "silent", {n: t.half() for n, t in tensors.items()}, config)
    assert load(tmp_path / "silent").lm_head.weight.dtype == torch.float16
    for key in ("dtype", "torch_dtype"):
        write(tmp_path / key, tensors, {**config, key: "bfloat16"})
        assert load(tmp_path / key).lm_head.weight.dtype == torch.bfloat16


def test_bfloat16_saved_and_read_back(tmp_path):
    model = tiny.model("kimi").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(load(tmp_path).state_dict(), model.state_dict())


def test_config_follows_the_weights(tmp_path):
    """A configuration read from an FP8 checkpoint does not make a float model's files FP8."""
    tiny.model("kimi", quantization_config=FP8_CONFIG, dtype="bfloat16").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == config["torch_dtype"] == "float32"


def test_bars_are_drawn_on_a_terminal_alone(tmp_path, monkeypatch, capfd):
    model = tiny.model("kimi")
    model.save_pretrained(tmp_path, progress=True)
    K2Model.from_pretrained(tmp_path, progress=True)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load(tmp_path)
    assert capfd.readouterr().err == ""
    model.save_pretrained(tmp_path, progress=True)
    K2Model.from_pretrained(tmp_path, progress=True)
    error = capfd.readouterr().err
    assert "saving: 100%" in error and "loading: 100%" in error


# ---- what files hold besides the weights -----------------------------------------------------------------------------


def test_leftovers_are_ignored(tmp_path, plain):
    _, tensors, config = plain
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    write(tmp_path / "old", {**tensors, **extra}, config)
    assert len(load(tmp_path / "old").state_dict()) > 10


def test_decoder_of_a_multimodal_model(tmp_path, plain):
    path, tensors, config = plain
    wrapped = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    wrapped |= {"vision_tower.patch_embed.weight": torch.ones(3), "mm_projector.linear.weight": torch.ones(3)}
    outer = {"model_type": "kimi_k25", "text_config": {**config, "model_type": "kimi_k2"}, "vision_config": {}}
    write(tmp_path / "wrapped", wrapped, outer, shards=2)
    assert_same(load(tmp_path / "wrapped").state_dict(), load(path).state_dict())
    write(tmp_path / "odd", {**wrapped, "audio_tower.weight": torch.ones(3)}, outer)
    with pytest.raises(ValueError, match=r"1 unexpected: audio_tower\.weight"):
        load(tmp_path / "odd")


class TestMtp:
    """MTP layers follow config.json's num_nextn_predict_layers."""

    @pytest.fixture
    def made(self, tmp_path):
        model = tiny.model("deepseek", num_nextn_predict_layers=1, num_hidden_layers=3)
        model.save_pretrained(tmp_path / "made")
        config = json.loads((tmp_path / "made" / "config.json").read_text())
        return model, read(tmp_path / "made"), config

    def test_with(self, tmp_path, made):
        model, tensors, config = made
        names = {n.removeprefix("model.layers.3.") for n in tensors if n.startswith("model.layers.3.")}
        assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} < names
        assert not {"embed_tokens.weight", "shared_head.head.weight"} & names
        copies = {
            "model.layers.3.embed_tokens.weight": tensors["model.embed_tokens.weight"],
            "model.layers.3.shared_head.head.weight": tensors["lm_head.weight"],
        }
        for extra in ({}, {name: tensor.clone() for name, tensor in copies.items()}):
            write(tmp_path / "with", {**tensors, **extra}, config)
            assert_same(load(tmp_path / "with").state_dict(), model.state_dict())

    def test_left_out_when_config_says_none(self, tmp_path, made):
        model, tensors, config = made
        write(tmp_path / "x", tensors, {**config, "num_nextn_predict_layers": 0})
        with pytest.warns(UserWarning, match=r"MTP layers \[3\] are left out.*num_nextn_predict_layers=0"):
            loaded = K2Model.from_pretrained(tmp_path / "x", progress=False)
        main = {name: t for name, t in model.state_dict().items() if not name.startswith("model.layers.3.")}
        assert_same(loaded.state_dict(), main)

    def test_config_says_one_but_files_hold_none(self, tmp_path, transformers):
        """transformers writes such checkpoints: its default is one layer, which its model does not have."""
        model = theirs(transformers, tiny.config("deepseek"), num_nextn_predict_layers=1)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
        with pytest.warns(UserWarning, match="the files hold no MTP layer"):
            loaded = K2Model.from_pretrained(tmp_path, progress=False)
        assert loaded.config.num_nextn_predict_layers == 0
        assert_same(loaded.state_dict(), as_ours(model.state_dict()))

    def test_incomplete(self, tmp_path, made):
        _, tensors, config = made
        del tensors["model.layers.3.eh_proj.weight"], tensors["model.layers.3.self_attn.o_proj.weight"]
        write(tmp_path / "x", tensors, config)
        with pytest.raises(
            ValueError,
            match=r"2 missing: model\.layers\.3\.self_attn\.o_proj\.weight, model\.layers\.3\.eh_proj\.weight",
        ):
            load(tmp_path / "x")

    def test_too_many_layers_are_no_mtp_layers(self, tmp_path, plain):
        _, tensors, config = plain
        write(tmp_path / "x", tensors, {**config, "num_hidden_layers": 1})
        with pytest.raises(ValueError, match=r"unexpected: model\.layers\.1\."):
            load(tmp_path / "x")


# ---- block FP8 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "at_once"), [(1, 1 << 22), (3, 1000)])
def test_fp8_is_dequantised(tmp_path, monkeypatch, shards, at_once):
    monkeypatch.setattr(checkpoint, "ELEMENTS_AT_ONCE", at_once)  # 1000: a row of blocks at a time
    path, tensors = fp8_checkpoint(tmp_path, PARTIAL, shards)
    shapes = {tuple(t.shape) for t in tensors.values() if t.dtype == torch.float8_e4m3fn}
    assert any(r % 128 and c % 128 for r, c in shapes) and max(r for r, _ in shapes) > 256
    # The hand-written loop lets the saver's pieces be compared name by name.
    loaded = load(path, dtype=torch.float64)
    assert loaded.config.quantization_config is None
    loaded.save_pretrained(tmp_path / "back")
    expected = dequantize(tensors)
    back = read(tmp_path / "back")
    assert set(back) == set(expected)
    for name in expected:
        assert torch.equal(back[name].double(), expected[name].double()), name
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_fp8_of_k2_sizes(tmp_path):
    """kv_a_proj of 576 rows and q_a_proj of 192 (scales of 5 and 2 rows), the sizes at which others go wrong."""
    sizes = dict(hidden_size=256, kv_lora_rank=512, qk_rope_head_dim=64, q_lora_rank=192, num_hidden_layers=1)
    path, tensors = fp8_checkpoint(tmp_path, sizes)
    attention = "model.layers.0.self_attn."
    assert tensors[attention + "kv_a_proj_with_mqa.weight"].shape == (576, 256)
    assert tensors[attention + "kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 2)
    assert tensors[attention + "q_a_proj.weight_scale_inv"].shape == (2, 2)
    state, expected = load(path, dtype=torch.float64).state_dict(), dequantize(tensors)
    for name in ("kv_a_proj_with_mqa", "q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"):
        assert torch.equal(state[f"{attention}{name}.weight"], expected[f"{attention}{name}.weight"]), name


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_fp8_against_torch_distributed(tmp_path):
    """PyTorch's own reader of such files, tensor by tensor."""
    storage = pytest.importorskip("torch.distributed.checkpoint.quantized_hf_storage")
    path, tensors = fp8_checkpoint(tmp_path, PARTIAL, shards=3)
    by_shard = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    codes = [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]
    # It wants a weight and its scale in one file.
    together = {name: by_shard[name.removesuffix("_scale_inv")] for name in by_shard}
    for file in set(together.values()):
        save_file({n: tensors[n] for n, where in together.items() if where == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": together}))
    reader = storage.QuantizedHuggingFaceStorageReader(str(path), target_dtype=torch.float32, block_size=128)
    state = {name: torch.empty(tensors[name].shape) for name in codes}
    torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)
    load(path, dtype=torch.float32).save_pretrained(tmp_path / "back")
    back = read(tmp_path / "back")
    assert len(codes) > 30
    for name in codes:
        assert torch.equal(back[name], state[name]), name


def test_scales_of_powers_of_two(tmp_path):
    """DeepSeek-V3.1's `scale_fmt: ue8m0`: float32 numbers as ever; the 8-bit dtype of the same name is read too."""
    path, tensors = fp8_checkpoint(tmp_path, PARTIAL)
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        tensors[name] = tensors[name].log2().ceil().exp2()
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    write(tmp_path / "wide", tensors, config)
    narrow = {n: t.to(torch.float8_e8m0fnu) if n.endswith("_scale_inv") else t for n, t in tensors.items()}
    write(tmp_path / "narrow", narrow, config)
    wide = load(tmp_path / "wide", dtype=torch.float64).state_dict()
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(wide[name], dequantize(tensors)[name])
    assert_same(load(tmp_path / "narrow", dtype=torch.float64).state_dict(), wide)


def test_some_weights_left_unquantised(tmp_path):
    path, tensors = fp8_checkpoint(tmp_path, ALIGNED)
    plain = dequantize(tensors, torch.float32)
    for name in [n for n in tensors if "kv_b_proj" in n]:
        tensors.pop(name)
    tensors |= {n: t for n, t in plain.items() if "kv_b_proj" in n}
    config = json.loads((path / "config.json").read_text())
    write(tmp_path / "mixed", tensors, config)
    assert_same(
        load(tmp_path / "mixed", dtype=torch.float32).state_dict(), load(path, dtype=torch.float32).state_dict()
    )
    kept = load(tmp_path / "mixed", keep_fp8=True)
    assert kept.model.layers[0].self_attn.kv_b_proj.weight.dtype == torch.float32
    assert kept.model.layers[0].self_attn.o_proj.weight.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("shards", [1, 3])
def test_keep_fp8(tmp_path, shards):
    path, tensors = fp8_checkpoint(tmp_path, ALIGNED, shards)
    model = load(path, keep_fp8=True)
    assert model.config.weight_block_size == (128, 128)
    experts = model.model.layers[1].mlp.experts
    assert experts.gate_up_proj.dtype == experts.down_proj.dtype == torch.float8_e4m3fn
    assert experts.gate_up_proj_scale_inv.shape == (8, 2, 2) and experts.down_proj_scale_inv.shape == (8, 2, 1)
    assert not experts.gate_up_proj.requires_grad
    linears = [name for name, module in model.named_modules() if type(module).__name__ == "Fp8Linear"]
    assert len(linears) == 2 * 5 + 2 + 2 and "lm_head" not in linears
    model.save_pretrained(tmp_path / "back")
    assert_same(read(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"] == FP8_CONFIG
    assert_same(load(tmp_path / "back", keep_fp8=True).state_dict(), model.state_dict())


def test_keep_fp8_computes_nearly_the_same(tmp_path):
    path, _ = fp8_checkpoint(tmp_path, ALIGNED)
    ids = torch.randint(0, 256, (2, 12))
    with torch.no_grad():
        kept, wide = load(path, keep_fp8=True)(ids), load(path)(ids)
    # Activations are rounded to 3 bits of mantissa on the way; routing may flip for a token.
    similarity = torch.nn.functional.cosine_similarity(kept, wide, dim=-1)
    assert similarity.median() > 0.98, similarity


@pytest.mark.parametrize(
    ("sizes", "changes", "error", "message"),
    [
        (
            PARTIAL,
            {},
            UnsupportedError,
            "moe_intermediate_size to be a multiple of 128.*got 160; load without keep_quantized",
        ),
        (
            {**ALIGNED, "intermediate_size": 336},
            {},
            UnsupportedError,
            "intermediate_size to be a multiple of 128.*got 336; load without keep_quantized",
        ),
        (
            ALIGNED,
            {"quantization_config": {**FP8_CONFIG, "weight_block_size": [64, 64]}},
            UnsupportedError,
            r"weight_block_size \[128, 128\], got \[64, 64\]; load without keep_quantized",
        ),
        (
            ALIGNED,
            {"quantization_config": {**FP8_CONFIG, "scale_fmt": "ue5m3"}},
            UnsupportedError,
            "scale_fmt 'ue8m0' or none, got 'ue5m3'; load without keep_quantized",
        ),
        (
            ALIGNED,
            {"quantization_config": None},
            ValueError,
            "keep_quantized must go with a block-FP8 or 4-bit checkpoint.*convert",
        ),
    ],
)
def test_keep_fp8_refused(tmp_path, sizes, changes, error, message):
    path, _ = fp8_checkpoint(tmp_path, sizes, **changes)
    with pytest.raises(error, match=message):
        load(path, keep_fp8=True)


def test_block_size_is_the_configs(tmp_path):
    """Blocks of 64: read from config.json, never guessed from the shapes."""
    path, tensors = fp8_checkpoint(tmp_path, ALIGNED)
    name = "model.layers.0.self_attn.o_proj.weight"
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    scales = {n: t.repeat_interleave(2, 0).repeat_interleave(2, 1) for n, t in tensors.items() if "_scale_inv" in n}
    scales = {
        n: t[
            : -(-tensors[n[: -len("_scale_inv")]].shape[0] // 64), : -(-tensors[n[: -len("_scale_inv")]].shape[1] // 64)
        ]
        for n, t in scales.items()
    }
    write(tmp_path / "small", {**tensors, **scales}, config)
    assert torch.equal(load(tmp_path / "small", dtype=torch.float64).state_dict()[name], dequantize(tensors)[name])


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def _drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def _set(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("lm_head.weight"), r"1 missing: lm_head\.weight"),
        (_drop(LAYER + "mlp.gate.e_score_correction_bias"), "1 missing: .*e_score_correction_bias"),
        (
            _drop(LAYER + "mlp.experts.3.up_proj.weight", LAYER + "mlp.experts.5.down_proj.weight"),
            r"2 missing: .*experts\.3\.up_proj\.weight, .*experts\.5\.down_proj\.weight",
        ),
        (_set("model.layers.2.input_layernorm.weight", torch.ones(32)), r"1 unexpected: model\.layers\.2\.input"),
        (_set(LAYER + "mlp.experts.8.up_proj.weight", torch.ones(40, 32)), r"1 unexpected: .*experts\.8\.up_proj"),
        (_set("lm_head.bias", torch.ones(64)), r"1 unexpected: lm_head\.bias"),
        (_set("model.layers.0.self_attn.o_proj.weight_scale_inv", torch.ones(1, 1)), "1 unexpected: .*_scale_inv"),
        (
            _set(LAYER + "mlp.experts.2.gate_proj.weight", torch.ones(41, 32)),
            r"wrong shape: .*experts\.2\.gate_proj\.weight \(wanted \[40, 32\], got \[41, 32\]\)",
        ),
        (_set("lm_head.weight", torch.ones(32, 64)), r"lm_head\.weight \(wanted \[64, 32\], got \[32, 64\]\)"),
        (
            _set("model.norm.weight", torch.ones(32, dtype=torch.int32)),
            r"model\.norm\.weight \(wanted a float, got I32\)",
        ),
        (
            _set("lm_head.weight", torch.ones(64, 32).to(torch.float8_e5m2)),
            r"lm_head\.weight \(wanted a float, got F8_E5M2\)",
        ),
        (
            _set("lm_head.weight", torch.ones(64, 32).to(torch.float8_e4m3fn)),
            r"lm_head\.weight \(F8_E4M3, but config\.json has no quantization_config",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, plain, change, message):
    _, tensors, config = plain
    change(tensors)
    write(tmp_path / "bad", tensors, config, shards=2)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad")


def test_all_faults_in_one_message_and_long_lists_cut(tmp_path, plain):
    _, tensors, config = plain
    for name in [n for n in tensors if ".experts." in n]:
        del tensors[name]
    tensors["surplus"] = torch.ones(1)
    write(tmp_path / "bad", tensors, config)
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "bad")
    text = str(caught.value)
    assert "24 missing" in text and "and 14 more" in text and "1 unexpected: surplus" in text and "bad" in text


O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def _poison(name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _drop(O_PROJ + "_scale_inv"),
            r"1 missing: .*o_proj\.weight_scale_inv \(for .*o_proj\.weight, which is F8_E4M3\)",
        ),
        (
            _set(O_PROJ + "_scale_inv", torch.ones(2, 3)),
            r"o_proj\.weight_scale_inv \(wanted \[2, 1\], got \[2, 3\]\)",
        ),
        (_set(O_PROJ + "_scale_inv", torch.ones(2, 1, dtype=torch.int32)), r"_scale_inv \(wanted a float, got I32\)"),
        (_poison(O_PROJ + "_scale_inv", torch.nan), r"o_proj\.weight_scale_inv must hold finite numbers.*got 1 others"),
        (_poison(O_PROJ + "_scale_inv", torch.inf), r"o_proj\.weight_scale_inv must hold finite numbers"),
        (_poison(O_PROJ + "_scale_inv", -1.0), r"o_proj\.weight_scale_inv must hold finite numbers of 0 or more"),
        (_poison(O_PROJ, torch.nan), r"o_proj\.weight must hold numbers, got 1 NaN codes in model"),
    ],
)
@pytest.mark.parametrize("keep_fp8", [False, True])
def test_bad_fp8(tmp_path, change, message, keep_fp8):
    path, tensors = fp8_checkpoint(tmp_path, ALIGNED)
    change(tensors)
    write(tmp_path / "bad", tensors, json.loads((path / "config.json").read_text()))
    if keep_fp8 and "for " in message:
        message = "1 missing: .*o_proj"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad", keep_fp8=keep_fp8)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        LAYER + "mlp.gate.e_score_correction_bias",  # the expert would be chosen never, or always
        LAYER + "mlp.gate.weight",
        LAYER + "self_attn.kv_a_layernorm.weight",  # the logits would be NaN
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("keep_fp8", [False, True])
def test_a_router_or_norm_that_is_not_finite(tmp_path, fp8, name, value, keep_fp8):
    config, tensors = fp8
    tensors = {**tensors, name: tensors[name].clone()}
    _poison(name, value)(tensors)
    write(tmp_path / "bad", tensors, config)
    with pytest.raises(ValueError, match=rf"bad: {name} must hold finite numbers, got 1 others in model\.safetensors"):
        load(tmp_path / "bad", keep_fp8=keep_fp8)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """config.json and tensors of a checkpoint in FP8."""
    torch.manual_seed(0)
    path, tensors = fp8_checkpoint(tmp_path_factory.mktemp("fp8"), ALIGNED)
    return json.loads((path / "config.json").read_text()), tensors


def test_keep_fp8_with_a_half_quantised_expert(tmp_path):
    path, tensors = fp8_checkpoint(tmp_path, ALIGNED)
    name = LAYER + "mlp.experts.1.down_proj.weight"
    tensors[name] = dequantize(tensors, torch.float32)[name]
    tensors.pop(name + "_scale_inv")
    write(tmp_path / "bad", tensors, json.loads((path / "config.json").read_text()))
    with pytest.raises(ValueError, match=r"experts\.1\.down_proj\.weight \(wanted F8_E4M3, got F32; load without keep"):
        load(tmp_path / "bad", keep_fp8=True)


SHARD = "model-00002-of-00003.safetensors"


def test_missing_shard(plain):
    path, _, _ = plain
    (path / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 3 shards are missing: {SHARD}"):
        load(path)


@pytest.mark.parametrize("keep", [-10, 100, 5, 0])
def test_truncated_shard(plain, keep):
    path, _, _ = plain
    data = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(data[:keep])
    with pytest.raises(ValueError, match=f"{SHARD}: is truncated or no safetensors file"):
        load(path)


def test_index_that_points_elsewhere(plain):
    path, _, _ = plain
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    assert index["weight_map"]["lm_head.weight"] != SHARD
    right, index["weight_map"]["lm_head.weight"] = index["weight_map"]["lm_head.weight"], SHARD
    index["weight_map"]["nowhere.weight"] = SHARD
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError) as caught:
        load(path)
    assert f"lm_head.weight (listed in the index for {SHARD}, is in {right})" in str(caught.value)
    assert "nowhere.weight" in str(caught.value) and "is in none of the shards" in str(caught.value)


def test_index_decides_what_belongs_to_the_checkpoint(plain):
    path, _, _ = plain
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    expected = load(path).state_dict()
    save_file({**load_file(path / SHARD), "odd": torch.ones(1), "lm_head.weight": torch.ones(64, 32)}, path / SHARD)
    assert_same(load(path).state_dict(), expected)
    del index["weight_map"]["lm_head.weight"]
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        load(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_broken_index(plain, text):
    path, _, _ = plain
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: "):
        load(path)


def test_index_must_stay_in_its_directory(plain):
    path, _, _ = plain
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))
    with pytest.raises(ValueError, match="must name files of the same directory"):
        load(path)


def test_no_checkpoint(tmp_path, plain):
    with pytest.raises(FileNotFoundError, match=r"absent: must be a directory with a checkpoint, got no such"):
        load(tmp_path / "absent")
    path, _, _ = plain
    for file in path.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor"):
        load(path)


# ---- saving: all or nothing ------------------------------------------------------------------------------------------


def snapshot(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_save_replaces_a_checkpoint_and_nothing_else(tmp_path):
    save_pretrained(tiny.model("deepseek"), tmp_path, max_shard_size=100_000)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "state.pt").write_text("state")
    model = tiny.model("kimi")
    model.save_pretrained(tmp_path)
    names = {str(name) for name in snapshot(tmp_path)}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "optimizer/state.pt"}
    assert_same(load(tmp_path).state_dict(), model.state_dict())
    save_pretrained(model, tmp_path, max_shard_size=100_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(load(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("shard_size", [5_000_000_000, 50_000])
@pytest.mark.parametrize("existing", [False, True])
def test_full_disk(tmp_path, existing, shard_size):
    """A real refusal by the system: no file may grow beyond 60 kB."""
    path = tmp_path / "out"
    if existing:
        save_pretrained(tiny.model("kimi"), path, max_shard_size=shard_size)
        (path / "tokenizer.json").write_text("{}")
    before = snapshot(tmp_path)
    model = tiny.model("kimi", vocab_size=400)  # whose embedding, 153 kB, comes before the rest
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(
            OSError, match=r"cannot write the checkpoint .*out .*File too large.*is unchanged"
        ) as caught:
            save_pretrained(model, path, max_shard_size=shard_size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == 27
    assert snapshot(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == (["out"] if existing else [])


def test_failing_renames(tmp_path, monkeypatch):
    """Whichever of the renames at the end fails, the old checkpoint is whole again."""
    path, rename = tmp_path / "out", os.rename
    save_pretrained(tiny.model("kimi"), path, max_shard_size=300_000)
    (path / "tokenizer.json").write_text("{}")
    before, model = snapshot(tmp_path), tiny.model("kimi")
    for failing in range(100):
        calls = iter(range(1000))

        def fail(source, target, failing=failing, calls=calls):
            if next(calls) == failing:
                raise OSError(28, "No space left on device")
            rename(source, target)

        monkeypatch.setattr(os, "rename", fail)
        try:
            save_pretrained(model, path, max_shard_size=300_000)
            break
        except OSError as error:
            assert error.errno == 28 and "is unchanged" in str(error)
        finally:
            monkeypatch.undo()
        assert snapshot(tmp_path) == before
        assert not [p for p in path.iterdir() if p.is_dir()]
    assert failing > 10
    assert_same(load(path).state_dict(), model.state_dict())


def test_interrupted_while_writing(tmp_path, monkeypatch):
    """Ctrl-C counts as an error: nothing appears."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny.model("kimi").save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_save_to_a_file_or_from_meta(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file; give a directory"):
        tiny.model("kimi").save_pretrained(tmp_path / "file")
    with torch.device("meta"):
        empty = K2Model(K2Config.preset("kimi-k2"))
    with pytest.raises(ValueError, match=r"every weight must hold data.*embed_tokens.*on the meta device"):
        empty.save_pretrained(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import torch
from k2kernels.model import K2Model

def status(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field + ":"))
    return 1024 * int(line.split()[1])

K2Model.from_pretrained(sys.argv[2], progress=False)  # a small one: PyTorch imports parts of itself when first used
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
model = K2Model.from_pretrained(sys.argv[1], progress=False)
print(status("VmHWM") - before, sum(t.nbytes for t in model.state_dict().values()))
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="the peak of a process is read from Linux's /proc"
)
def test_peak_memory(tmp_path):
    """Loading needs less than the checkpoint and its largest tensor.

    Measured: the peak of the resident set, mapped pages of the files included, above what the process held after it
    loaded a small model. The checkpoint has 1 GB of random bfloat16 in 5 shards; a shard has 200 MB, the largest
    tensor 67 MB.
    """
    config = K2Config(
        vocab_size=32768,
        hidden_size=1024,
        num_hidden_layers=9,
        num_attention_heads=8,
        q_lora_rank=256,
        kv_lora_rank=512,
        intermediate_size=2048,
        moe_intermediate_size=512,
        first_k_dense_replace=1,
        n_routed_experts=32,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    )
    with torch.device("meta"):
        model = K2Model(config)
    shapes = {n: piece.shape for name, t in model.state_dict().items() for n, piece in checkpoint.pieces(name, t)}
    most = max(shape.numel() for shape in shapes.values())
    random = np.frombuffer(np.random.default_rng(0).bytes(2 * most), dtype=np.int16) & 0x3FFF  # finite, below 2
    random, path, tensors = torch.from_numpy(random).view(torch.bfloat16), tmp_path / "big", {}
    for name, shape in shapes.items():
        tensors[name] = random[: shape.numel()].clone().view(shape)
    write(path, tensors, config.to_dict(), shards=5)
    total, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    del tensors
    tiny.model("kimi").save_pretrained(tmp_path / "small")
    try:
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, path, tmp_path / "small"], capture_output=True, text=True, check=True
        )
    finally:
        shutil.rmtree(path)
    peak, held = map(int, run.stdout.split())
    assert total > 1_000_000_000 and abs(held - total) < 1_000_000  # the router's bias is float32
    assert total * 0.95 < peak < total + largest, f"{peak / 1e6:.0f} MB for {total / 1e6:.0f} + {largest / 1e6:.0f} MB"


def test_reads_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny.model("kimi")
    model.save_pretrained("here")
    assert_same(load(Path("here")).state_dict(), model.state_dict())
