"""Damaged and hostile files: `info`, `generate` and `convert` end with a message and exit code 2, soon."""

import base64
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from k2kernels.cli import main
from k2kernels.model.config import K2Config
from k2kernels.model.convert import convert
from k2kernels.model.normalise import LARGEST
from k2kernels.train.data import train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
import tiny

HUGE = (2**31, 10**15, 2**63, 10**40, 10**400)
SECONDS = 20  # of this process for a call; without bounds these take minutes and all memory


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model"
    tiny.model("kimi").save_pretrained(path)
    train_tokenizer("some text to learn from, and some more of it " * 50, 256).save(str(path / "tokenizer.json"))
    assert main(["generate", str(path), "--prompt", "some", "--max-new-tokens", "2"]) == 0
    return path


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


COMMANDS = {
    "info": lambda path: ["info", str(path)],
    "generate": lambda path: ["generate", str(path), "--prompt", "some", "--max-new-tokens", "2"],
    "convert": lambda path: ["convert", str(path), str(path.with_name("converted")), "--to", "fp8"],
}


def refused(path, capsys, *commands, message=""):
    """Each command ends with a message and exit code 2."""
    for command in commands:
        started = time.process_time()
        code = main(COMMANDS[command](path))
        error = capsys.readouterr().err
        assert code == 2 and f"k2kernels {command}: " in error and message in error, (command, code, error)
        assert time.process_time() - started < SECONDS
        assert not path.with_name("converted").exists()


def change(path, **values):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


SIZES = [
    field for field, kind in K2Config.__annotations__.items() if kind in ("int", "int | None") and "token" not in field
]


@pytest.mark.parametrize("field", SIZES)
def test_sizes_have_bounds(field, model, capsys):
    for value in HUGE:
        before = (model / "config.json").read_text()
        change_text(model, field, value)
        refused(model, capsys, *COMMANDS, message=field)
        (model / "config.json").write_text(before)


def change_text(path, field, value):
    """Python refuses to print the largest."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        change(path, **{field: value})
    finally:
        sys.set_int_max_str_digits(limit)


def test_the_largest_sizes_are_compared_with_the_files_first(model, capsys):
    """Within the bounds, but not what the files hold: the model is not built."""
    for field in ("num_hidden_layers", "n_routed_experts"):
        before = (model / "config.json").read_text()
        change(model, **{field: LARGEST[field]})
        refused(model, capsys, "generate", message="does not fit config.json: num_hidden_layers=")
        assert main(COMMANDS["info"](model)) == 0  # arithmetic
        (model / "config.json").write_text(before)


@pytest.mark.parametrize("field", ["routed_scaling_factor", "rope_theta", "rms_norm_eps", "aux_loss_alpha"])
def test_numbers_have_bounds(field, model, capsys):
    for value in (1e308, 10**40, 10**400, -1.0, torch.nan, 1e-320):
        before = (model / "config.json").read_text()
        change_text(model, field, value)
        refused(model, capsys, *COMMANDS, message=field)
        (model / "config.json").write_text(before)


@pytest.mark.parametrize(
    "key, value",
    [
        ("factor", 10**40), ("factor", 1e308), ("beta_fast", 1e-320), ("beta_slow", 1e-320), ("mscale", 1e308),
        ("mscale_all_dim", 10**300), ("attention_factor", 1e308), ("attention_factor", 10**400),
        ("original_max_position_embeddings", 10**40), ("original_max_position_embeddings", 2**63),
    ],
    ids=range(10),
)  # fmt: skip
def test_numbers_of_yarn_have_bounds(key, value, model, capsys):
    change_text(model, "rope_scaling", {**tiny.YARN_STEP, key: value})
    change_text(model, "rope_parameters", None)
    refused(model, capsys, *COMMANDS, message=key)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 50_000, "[1]", "\x00", '{"a": ' + "9" * 5000 + "}"])
def test_json_that_is_none(name, text, model, capsys):
    (model / name).write_text(text)
    refused(model, capsys, *(COMMANDS if name == "config.json" else ["generate"]), message=name)


def test_an_index_of_brackets(model, capsys):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map":' * 100_000)
    refused(model, capsys, "generate", "convert", message="must be a JSON object with a weight_map")


def test_a_text_config_of_a_plain_model_is_not_read(model, capsys):
    change(model, text_config="abc")
    assert main(COMMANDS["convert"](model)) == 0
    assert json.loads((model.with_name("converted") / "config.json").read_text())["text_config"] == "abc"


NAMES = ("lm_head.weight", "model.norm.weight", "layers.1.self_attn.kv_a_layernorm.weight", "")


@pytest.mark.parametrize(
    "name, value", [*((name, value) for name in NAMES for value in (torch.nan, torch.inf)), ("lm_head.weight", 3e38)]
)
def test_weights_that_are_no_numbers(name, value, model, capsys):
    tensors = load_file(model / "model.safetensors")
    for key, tensor in tensors.items():
        if key.endswith(name):
            tensor.fill_(value)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(model, capsys, "generate")


@pytest.mark.parametrize("name", ["mlp.gate.weight", "mlp.gate.e_score_correction_bias"])
def test_a_router_that_is_no_number(name, model, capsys):
    tensors = load_file(model / "model.safetensors")
    for key, tensor in tensors.items():
        if key.endswith(name):
            tensor.view(-1)[3] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(model, capsys, "generate", "convert", message="must hold finite numbers, got 1 others")


# ---- 4-bit weights


@pytest.fixture(scope="module")
def good_packed(good, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    tiny.model("kimi", moe_intermediate_size=64, num_hidden_layers=2).to(torch.bfloat16).save_pretrained(path / "plain")
    convert(path / "plain", path / "model", "int4", progress=False)
    shutil.copy(good / "tokenizer.json", path / "model")
    assert main(COMMANDS["generate"](path / "model")) == 0
    return path / "model"


WEIGHT = "model.layers.1.mlp.experts.3.down_proj.weight"
CODES, SCALES, SHAPE = WEIGHT + "_packed", WEIGHT + "_scale", WEIGHT + "_shape"


def replaced(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    "damage, message",
    [
        (replaced(CODES, lambda x: x[:-1]), r"down_proj.weight_scale (wanted [95, 2] for groups of [32], got [96, 2])"),
        (replaced(CODES, lambda x: x[:, :4]), "weight_scale (wanted [96, 1] for groups of [32], got [96, 2])"),
        (replaced(CODES, lambda x: x[:, :7]), "weight_packed (wanted a K that is a multiple of 32, got 56)"),
        (replaced(CODES, lambda x: x[0]), "weight_packed (wanted 2 axes, got [8])"),
        (replaced(CODES, lambda x: x[:0]), "weight_packed (wanted 2 axes, got [0, 8])"),
        (replaced(CODES, lambda x: x[None]), "weight_packed (wanted 2 axes, got [1, 96, 8])"),
        (replaced(CODES, lambda x: x.long()), "weight_packed (wanted I32 for int4, got I64)"),
        (replaced(CODES, lambda x: x.to(torch.int16)), "weight_packed (wanted I32 for int4, got I16)"),
        (replaced(SCALES, lambda x: x[0]), "weight_scale (wanted [96, 2] for groups of [32], got [2])"),
        (replaced(SCALES, lambda x: x.double()), "weight_scale (wanted BF16, got F64)"),
        (replaced(SCALES, lambda x: x * torch.nan), "experts.3.down_proj.weight_scale must hold "),
        (replaced(SHAPE, lambda x: x.flip(0)), "weight_shape must be [96, 64] like the codes, got [64, 96]"),
        (replaced(SHAPE, lambda x: -x), "weight_shape must be [96, 64] like the codes, got [-96, -64]"),
        (replaced(SHAPE, lambda x: x[[0, 1, 1]]), "weight_shape (wanted I64 [2], got I64 [3])"),
        (lambda t: t.pop(CODES), "weight_scale (without model.layers.1.mlp.experts.3.down_proj.weight_packed)"),
        (lambda t: t.pop(SCALES), "weight_scale is missing (for model.layers.1.mlp.experts.3.down_proj.weight_packed)"),
        (lambda t: t.update({WEIGHT: torch.zeros(96, 64)}), "a weight is packed or not"),
    ],
    ids=range(17),
)
def test_packed_weights(damage, message, good_packed, tmp_path, capsys):
    path = shutil.copytree(good_packed, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    damage(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, capsys, "generate", "convert", message=message)
    assert main([*COMMANDS["generate"](path), "--keep-quantized"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", [-1, 1000, 8])
def test_packed_files_that_are_cut(size, good_packed, tmp_path, capsys):
    path = shutil.copytree(good_packed, tmp_path / "model")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:size])
    refused(path, capsys, "generate", "convert", message="model.safetensors: is truncated or no safetensors file")


@pytest.mark.parametrize(
    "group, message",
    [
        ({"weights": {"num_bits": 4, "group_size": "32"}}, "weights.group_size must be 32 or 64 or 128, got '32'"),
        ({"weights": {"num_bits": 4, "group_size": 1e308}}, "weights.group_size must be 32 or 64 or 128, got 1e+308"),
        ({"weights": {"num_bits": True, "group_size": 32}}, "weights.num_bits must be 4, got True"),
        ({"weights": {"num_bits": [4], "group_size": 32}}, "weights.num_bits must be 4, got [4]"),
        ({"weights": {"num_bits": 4}}, "weights.strategy must be 'group', got 'tensor'"),
        ({"weights": [4]}, "must be an object with `weights`"),
        ({"weights": {}, "format": ["pack-quantized"]}, "must be one of pack-quantized, mxfp4-pack-quantized, got ["),
        ("INT4", "config_groups.a must be an object with `weights`, got 'INT4'"),
    ],
    ids=range(8),
)
def test_configurations_of_packed_weights(group, message, good_packed, tmp_path, capsys):
    path = shutil.copytree(good_packed, tmp_path / "model")
    entry = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": group}}
    change(path, quantization_config=entry)
    refused(path, capsys, "generate", "convert", message=message)  # info counts the sizes alone


# ---- tokenizers


def bpe(**changes):
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate("abemos ")}, "merges": []}, **changes,
    })  # fmt: skip


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read"),
        (bpe(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}), "cannot be used"),
        (
            bpe(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
            ),
            "",
        ),
    ],
)
def test_tokenizer_json(text, message, model, capfd):
    (model / "tokenizer.json").write_text(text)
    arguments = ["generate", str(model), "--prompt", "a" * 40 + "!", "--max-new-tokens", "1"]
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert "k2kernels generate: " in error and "tokenizer.json" in error and message in error


def test_padding_of_a_tokenizer_is_not_taken(model, capsys):
    """To 10^11 tokens the library would end the process."""
    padding = {
        "strategy": {"Fixed": 10**11}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "a",
    }  # fmt: skip
    (model / "tokenizer.json").write_text(bpe(padding=padding))
    assert main(COMMANDS["generate"](model)) == 0


BYTES = [bytes([i]) for i in range(256)]
GOOD = {token: rank for rank, token in enumerate(BYTES)}


def ranks(**changes):
    """The lines of a tiktoken.model; a change is a rank, or None for a line that is left out."""
    table = {**{f"t{i}": i for i in range(256)}, **changes}
    return b"\n".join(base64.b64encode(BYTES[int(k[1:])]) + f" {v}".encode() for k, v in table.items() if v is not None)


@pytest.mark.parametrize(
    "lines",
    [
        ranks(t3=-1), ranks(t3=2**32), ranks(t3=10**40), ranks(t3=4), ranks(t115=None), ranks(t255=None),
        ranks() + b"\nYQ== 256", ranks() + b"\n 256", ranks() + b"\n= 256", b"", b"\xff\xfe", ranks() + b"\nYWI= 300",
    ],
)  # fmt: skip
def test_tiktoken_ranks(lines, model, capsys):
    (model / "tokenizer.json").unlink()
    (model / "tiktoken.model").write_bytes(lines)
    refused(model, capsys, "generate", message="tiktoken.model: must hold")


ADDED = [
    '{"300": {"content": ""}}', '{"300": {}}', '{"300": {"content": 5}}', '{"300": "x"}', '{"x": {"content": "a"}}',
    '{"-3": {"content": "a"}}', '{"99999999999": {"content": "a"}}', "[]", "[1]", '"abc"', '{"5": {"content": "a"}}',
    '{"300": {"content": "\\ud800"}}',
]  # fmt: skip


@pytest.mark.parametrize(
    "text", [*(f'{{"added_tokens_decoder": {added}}}' for added in ADDED), "[]", "{", "[" * 100_000]
)
def test_added_tokens(text, model, capsys):
    (model / "tokenizer.json").unlink()
    (model / "tiktoken.model").write_bytes(ranks())
    (model / "tokenizer_config.json").write_text(text)
    refused(model, capsys, "generate", message="toke")


def test_a_path_that_is_not_utf8(model, capsys):
    path = model.rename(model.with_name("bad\udcff\udce9"))
    refused(path, capsys, "convert", message="paths in UTF-8 only")
