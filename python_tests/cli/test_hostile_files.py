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
    refused(model, capsys, *(COMMANDS if name == "config.json" else ("info", "generate")), message=name)


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
