"""Conversion between BF16 and block FP8: against the blocks written by hand, and loading what was converted."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from checkpoints import ALIGNED, FP8_CONFIG, PARTIAL, assert_same, dequantize, fp8_checkpoint, quantize, read, write

from k2kernels.cli.main import main
from k2kernels.model import K2Model, shards
from k2kernels.model import convert as module
from k2kernels.model.convert import convert


def config_of(path):
    return json.loads((path / "config.json").read_text())


def float_checkpoint(path, sizes=PARTIAL, dtype=torch.bfloat16, **changes):
    tiny.model("kimi", **sizes, **changes).to(dtype).save_pretrained(path)
    return read(path)


@pytest.mark.parametrize(("dtype", "at_once"), [(torch.bfloat16, 1000), (torch.float32, 1 << 22)])
def test_to_fp8(tmp_path, monkeypatch, dtype, at_once):
    """Codes and scales of every block, bit for bit; what DeepSeek leaves alone becomes BF16."""
    monkeypatch.setattr(module, "ELEMENTS_AT_ONCE", at_once)  # 1000: a row of blocks at a time
    source = float_checkpoint(tmp_path / "src", dtype=dtype)
    convert(tmp_path / "src", tmp_path / "dst", "fp8", progress=False)
    expected = quantize({name: tensor.float() for name, tensor in source.items()})
    for name, tensor in expected.items():
        if tensor.dtype == torch.float32 and name.endswith(".weight"):
            expected[name] = tensor.to(torch.bfloat16)
    assert_same(read(tmp_path / "dst"), expected)
    config = config_of(tmp_path / "dst")
    assert config["quantization_config"] == FP8_CONFIG and config["dtype"] == "bfloat16"
    changed = {key for key in config if config[key] != config_of(tmp_path / "src").get(key)}
    assert changed <= {"quantization_config", "dtype", "torch_dtype"}


def test_to_fp8_with_scales_of_powers_of_two(tmp_path):
    """DeepSeek-V3.1's: codes and scales bit for bit, and a config.json whose readers quantise activations alike."""
    tiny.model("kimi", **ALIGNED).to(torch.bfloat16).save_pretrained(tmp_path / "src")
    source = read(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", "fp8", progress=False, scale_fmt="ue8m0")
    expected = quantize({n: t.float() if n.endswith("_proj.weight") else t for n, t in source.items()}, True)
    assert_same(read(tmp_path / "dst"), expected)
    assert config_of(tmp_path / "dst")["quantization_config"] == {**FP8_CONFIG, "scale_fmt": "ue8m0"}
    kept = K2Model.from_pretrained(tmp_path / "dst", keep_fp8=True, progress=False)
    kept.save_pretrained(tmp_path / "again")
    assert_same(read(tmp_path / "again"), expected)
    assert config_of(tmp_path / "again")["quantization_config"]["scale_fmt"] == "ue8m0"
    assert main(["convert", str(tmp_path / "src"), str(tmp_path / "cli"), "--to", "fp8", "--scale-fmt", "ue8m0"]) == 0
    assert_same(read(tmp_path / "cli"), expected)


def test_what_stays_bf16(tmp_path):
    """The names that are not quantised, written down; MTP's projection among them."""
    tiny.model("deepseek", num_nextn_predict_layers=1, num_hidden_layers=3).to(torch.bfloat16).save_pretrained(
        tmp_path / "src"
    )
    convert(tmp_path / "src", tmp_path / "dst", "fp8", progress=False)
    tensors = read(tmp_path / "dst")
    kept = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.3.eh_proj.weight"}
    expected |= {f"model.layers.3.{norm}.weight" for norm in ("enorm", "hnorm", "shared_head.norm")}
    for layer in range(4):
        norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")
        expected |= {f"model.layers.{layer}.{norm}.weight" for norm in norms}
    expected |= {f"model.layers.{layer}.mlp.gate.weight" for layer in (2, 3)}
    assert kept == expected
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    biases = {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (2, 3)}
    assert biases == {name for name in wide if not name.endswith("_scale_inv")}
    assert len([n for n in tensors if n.endswith("_scale_inv")]) == 4 * 5 + 2 * 3 + 2 * (16 + 1) * 3


def test_full_rank_queries(tmp_path):
    tiny.model("moonlight").to(torch.bfloat16).save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", "fp8", progress=False)
    assert read(tmp_path / "dst")["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("shards", [1, 3])
def test_to_bf16(tmp_path, shards):
    path, tensors = fp8_checkpoint(tmp_path, PARTIAL, shards)
    convert(path, tmp_path / "dst", "bf16", progress=False)
    expected = {
        name: tensor if name.endswith("_bias") else tensor.to(torch.bfloat16)
        for name, tensor in dequantize(tensors, torch.float32).items()
    }
    assert_same(read(tmp_path / "dst"), expected)
    config = config_of(tmp_path / "dst")
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"


def test_there_and_back(tmp_path):
    """FP8 to BF16 to FP8: the same numbers; BF16 has room for 4 bits of a code times the scale, nearly."""
    path, tensors = fp8_checkpoint(tmp_path, ALIGNED)
    convert(path, tmp_path / "bf16", "bf16", progress=False)
    convert(tmp_path / "bf16", tmp_path / "again", "fp8", progress=False)
    first, second = dequantize(tensors), dequantize(read(tmp_path / "again"))
    for name in tensors:
        if tensors[name].dtype == torch.float8_e4m3fn:
            torch.testing.assert_close(second[name], first[name], rtol=2**-8, atol=0)


def test_fp32_to_bf16(tmp_path):
    source = float_checkpoint(tmp_path / "src", dtype=torch.float32)
    convert(tmp_path / "src", tmp_path / "dst", "bf16", progress=False)
    assert_same(
        read(tmp_path / "dst"),
        {name: t if name.endswith("_bias") else t.to(torch.bfloat16) for name, t in source.items()},
    )


def test_converted_models_load(tmp_path):
    model = tiny.model("kimi", **ALIGNED).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "fp8", "fp8", progress=False)
    convert(tmp_path / "fp8", tmp_path / "bf16", "bf16", progress=False)
    wide = K2Model.from_pretrained(tmp_path / "fp8", progress=False)
    assert_same(wide.state_dict(), K2Model.from_pretrained(tmp_path / "bf16", progress=False).state_dict())
    kept = K2Model.from_pretrained(tmp_path / "fp8", keep_fp8=True, progress=False)
    assert kept.model.layers[1].mlp.experts.down_proj.dtype == torch.float8_e4m3fn
    for name, weight in model.state_dict().items():
        weight = weight.float()
        # e4m3: half a step is 1/16 of the value, or 2^-10 of the scale below the smallest normal; then BF16.
        allowed = weight.abs() * (1 / 16 + 2**-8) + weight.abs().max() * 2**-10 / 448
        assert ((wide.state_dict()[name].float() - weight).abs() <= allowed).all(), name


def test_multimodal_file(tmp_path):
    tensors = float_checkpoint(tmp_path / "plain")
    config = config_of(tmp_path / "plain")
    wrapped = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    wrapped["vision_tower.proj.weight"] = torch.ones(3, 3, dtype=torch.bfloat16)
    write(tmp_path / "src", wrapped, {"model_type": "kimi_k25", "text_config": {**config, "model_type": "kimi_k2"}})
    convert(tmp_path / "src", tmp_path / "dst", "fp8", progress=False)
    convert(tmp_path / "plain", tmp_path / "plain-fp8", "fp8", progress=False)
    expected = {f"language_model.{name}": tensor for name, tensor in read(tmp_path / "plain-fp8").items()}
    assert_same(read(tmp_path / "dst"), {**expected, "vision_tower.proj.weight": wrapped["vision_tower.proj.weight"]})
    written = config_of(tmp_path / "dst")
    assert set(written) == {"model_type", "text_config"}
    assert written["text_config"]["quantization_config"] == FP8_CONFIG and written["text_config"]["dtype"] == "bfloat16"
    loaded = K2Model.from_pretrained(tmp_path / "dst", progress=False)
    assert_same(loaded.state_dict(), K2Model.from_pretrained(tmp_path / "plain-fp8", progress=False).state_dict())


def test_small_files_are_copied(tmp_path):
    float_checkpoint(tmp_path / "src")
    small = {"tokenizer.json": "{}", "tiktoken.model": "x", "chat_template.jinja": "{{ }}", "LICENSE.md": "MIT"}
    for name, text in {**small, "notes.bin": "no", "model.safetensors.index.json": "stale"}.items():
        (tmp_path / "src" / name).write_text(text)
    (tmp_path / "src" / "cache").mkdir()
    convert(tmp_path / "src", tmp_path / "dst", "fp8", progress=False)
    assert {p.name for p in (tmp_path / "dst").iterdir()} == {*small, "config.json", "model.safetensors"}
    assert all((tmp_path / "dst" / name).read_text() == text for name, text in small.items())


def test_shards_and_progress(tmp_path, monkeypatch, capfd):
    float_checkpoint(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "logged", "fp8")
    assert capfd.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    convert(tmp_path / "src", tmp_path / "one", "fp8")
    assert "converting to fp8: 100%" in capfd.readouterr().err
    convert(tmp_path / "src", tmp_path / "many", "fp8", progress=False, max_shard_size=200_000)
    assert capfd.readouterr().err == ""
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    assert_same(read(tmp_path / "many"), read(tmp_path / "one"))
    K2Model.from_pretrained(tmp_path / "many", progress=False)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_arguments(tmp_path):
    float_checkpoint(tmp_path / "src")
    with pytest.raises(ValueError, match="to must be 'bf16', 'fp8', 'int4' or 'mxfp4', got 'int8'"):
        convert(tmp_path / "src", tmp_path / "dst", "int8")
    for to, scale_fmt in (("fp8", "ue5m3"), ("bf16", "ue8m0")):
        with pytest.raises(
            ValueError, match=f"scale_fmt must be None, or 'ue8m0' .*, got '{scale_fmt}' with to='{to}'"
        ):
            convert(tmp_path / "src", tmp_path / "dst", to, scale_fmt=scale_fmt)
    with pytest.raises(ValueError, match="which is BF16 already"):
        convert(tmp_path / "src", tmp_path / "dst", "bf16")
    with pytest.raises(ValueError, match=r"dst must be a new or empty directory, got .*src"):
        convert(tmp_path / "src", tmp_path / "src", "fp8")
    with pytest.raises(FileNotFoundError, match=r"absent: must be a directory with a checkpoint, got no such one"):
        convert(tmp_path / "absent", tmp_path / "dst", "fp8")
    path, _ = fp8_checkpoint(tmp_path, PARTIAL)
    with pytest.raises(ValueError, match="which is FP8 already"):
        convert(path, tmp_path / "dst", "fp8")
    assert not (tmp_path / "dst").exists()
    (tmp_path / "dst").mkdir()
    convert(path, tmp_path / "dst", "bf16", progress=False)  # an empty directory will do


ROUTER_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
NAME = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME + "_scale_inv"), r"1 tensors: .*o_proj\.weight_scale_inv \(for "),
        (lambda t: t.pop(NAME), r"o_proj\.weight_scale_inv \(a scale without an FP8 weight\)"),
        (lambda t: t.update({NAME: t[NAME].float()}), r"o_proj\.weight_scale_inv \(a scale without an FP8 weight\)"),
        (lambda t: t.update({NAME + "_scale_inv": torch.ones(1, 1)}), r"\(wanted \[2, 1\], got \[1, 1\]\)"),
        (lambda t: t[NAME + "_scale_inv"].fill_(torch.nan), "must hold finite numbers of 0 or more, got 2 others"),
        (lambda t: t[NAME].fill_(torch.nan), r"o_proj\.weight must hold numbers, got 24576 NaN codes"),
        (lambda t: t.update({"odd": torch.ones(2, dtype=torch.int32)}), r"odd \(wanted a float, got I32\)"),
    ],
)
def test_damaged_fp8(tmp_path, change, message):
    path, tensors = fp8_checkpoint(tmp_path, PARTIAL)
    change(tensors)
    write(tmp_path / "bad", tensors, config_of(path))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "bad", tmp_path / "dst", "bf16", progress=False)
    assert not (tmp_path / "dst").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", [ROUTER_BIAS, "model.layers.0.input_layernorm.weight"])
def test_a_damaged_router_or_norm(tmp_path, name):
    tensors = float_checkpoint(tmp_path / "src")
    tensors[name][-1] = torch.nan
    write(tmp_path / "bad", tensors, config_of(tmp_path / "src"))
    with pytest.raises(ValueError, match=f"{name} must hold finite numbers, got 1 others in model.safetensors"):
        convert(tmp_path / "bad", tmp_path / "dst", "fp8", progress=False)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_have_no_scale(tmp_path, value):
    tensors = float_checkpoint(tmp_path / "src")
    tensors[NAME][-1, -1] = value
    write(tmp_path / "bad", tensors, config_of(tmp_path / "src"))
    with pytest.raises(ValueError, match=r"o_proj\.weight in .* must hold finite numbers"):
        convert(tmp_path / "bad", tmp_path / "dst", "fp8", progress=False)
    assert not (tmp_path / "dst").exists()


def test_full_disk(tmp_path, monkeypatch):
    float_checkpoint(tmp_path / "src")

    def full(_, file, **__):
        file.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*No space left"):
        convert(tmp_path / "src", tmp_path / "dst", "fp8", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


# ---- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
from k2kernels.model.convert import convert

def status(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field + ":"))
    return 1024 * int(line.split()[1])

source, small, target = sys.argv[1:]
convert(small, target + "-small", "fp8", progress=False)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
convert(source, target, "fp8", progress=False, max_shard_size=40_000_000)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="the peak of a process is read from Linux's /proc"
)
def test_peak_memory(tmp_path):
    """About one shard (40 MB) of a file of 111 MB: the peak of the resident set, mapped pages included.

    Besides the shard: a source tensor (4 MB), and copies of it in float32. The allocator gives back at once what was
    freed, so that the peak is what conversion needs and not what the allocator keeps.
    """
    sizes = dict(hidden_size=1024, intermediate_size=2048, moe_intermediate_size=1024, n_routed_experts=2)
    float_checkpoint(tmp_path / "src", sizes, num_hidden_layers=6)
    float_checkpoint(tmp_path / "small")
    total = (tmp_path / "src" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURE, *(tmp_path / name for name in ("src", "small", "dst"))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    peak = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert total > 110_000_000
    assert 40_000_000 < peak < 80_000_000, f"{peak / 1e6:.0f} MB"


def test_relatives_are_converted_though_not_computed(tmp_path):
    """DeepSeek-V3.2: the tensors of its indexer are dequantised like the others."""
    path, tensors = fp8_checkpoint(tmp_path, ALIGNED)
    extra = quantize({"model.layers.0.self_attn.q_proj.weight": torch.randn(128, 192)})
    extra = {name.replace("q_proj", "indexer.wq_b"): tensor for name, tensor in extra.items()}
    values = json.loads((path / "config.json").read_text())
    write(path, tensors | extra, {**values, "model_type": "deepseek_v32"})
    convert(path, tmp_path / "bf16", "bf16", progress=False)
    want = {name: tensor.bfloat16() for name, tensor in dequantize(tensors | extra, torch.float32).items()}
    got = read(tmp_path / "bf16")
    assert_same({n: t for n, t in got.items() if n.endswith(".weight")}, {n: want[n] for n in want if "bias" not in n})
    written = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert written["model_type"] == "deepseek_v32" and "quantization_config" not in written
