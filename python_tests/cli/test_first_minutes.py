"""What people type first: flags that are judged before weights are read, what they name in place of a checkpoint's
directory, chat, and where a text ends."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from k2kernels.cli import main
from k2kernels.model import K2Config, K2Model
from k2kernels.text.tokenizer import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
import tiny

NAMES = ["<|im_user|>", "<|im_middle|>", "<|im_end|>", "<|im_assistant|>", "<|im_system|>", "<bos>"]


def tokenizer(post_processor=True):
    """Of bytes, with Kimi's markers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: 256 - len(NAMES)]
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(NAMES[:1])
    made.add_tokens(NAMES[1:])  # named in text, but not special: as DeepSeek's markers
    if post_processor:
        bos = made.token_to_id("<bos>")
        made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("first") / "model"
    tiny.model("kimi").save_pretrained(path)
    tokenizer(False).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def without_weights(model, tmp_path):
    """Whatever reads weights fails."""
    return shutil.copytree(model, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--temperature -1", "--temperature must be 0 or more, got -1.0"),
        ("--temperature nan", "--temperature must be finite"),
        ("--top-p 0", "--top-p must be above 0 and at most 1, got 0.0"),
        ("--top-k 0", "--top-k must be an int >= 1, got 0"),
        ("--max-new-tokens 0", "--max-new-tokens must be an int >= 1, got 0"),
        ("--max-new-tokens 600", "--prompt and --max-new-tokens must be at most 512 tokens together, got 601"),
        ("--cache-dtype int8", "--cache-dtype must be one of 'auto', 'fp8', got 'int8'"),
        ("--cache-dtype fp8", "--cache-dtype must be 'auto' for 48 latent"),
        ("--seed -1", "--seed must be an int >= 0"),
        ("--prefill-chunk 0", "--prefill-chunk must be an int >= 1"),
        ("--speculative", "--speculative must be False for a model without MTP layers"),
        ("--device abacus", "device must be one of this machine"),
        ("--file none.txt", "No such file"),
    ],
)
def test_flags_are_judged_before_weights_are_read(flags, message, without_weights, capsys):
    assert main(["generate", str(without_weights), "--prompt", "x", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and "safetensors" not in error


def named(model, tmp_path):
    """What is named in place of a directory, and what the message must hold."""
    lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "Kimi-K2-Q4.gguf").write_bytes(b"GGUF" + bytes(100))
    pointers = shutil.copytree(model, tmp_path / "pointers")
    (pointers / "model.safetensors").write_text(lfs)
    pickled = tmp_path / "pickled"
    shutil.copytree(model, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    (pickled / "pytorch_model.bin").write_bytes(b"")
    return {
        "moonshotai/Kimi-K2-Instruct": "hf download moonshotai/Kimi-K2-Instruct --local-dir Kimi-K2-Instruct",
        str(gguf / "Kimi-K2-Q4.gguf"): "GGUF is not read, get the safetensors files: hf download",
        str(gguf): "GGUF is not read",
        str(model / "model.safetensors"): f"got a file; give its directory: {model}",
        str(pointers): f"git -C {pointers} lfs pull",
        str(pickled): "pickled weights are not read, convert them: python -c ",
        "~/no/such/place": "must be a directory with a checkpoint, got no such one",
    }


def test_what_is_no_directory_is_answered_with_a_command(model, tmp_path, capsys):
    for name, message in named(model, tmp_path).items():
        with pytest.raises((ValueError, OSError)) as error:
            K2Model.from_pretrained(name, progress=False)
        assert message in str(error.value), name
        if not Path(name, "tokenizer.json").exists() and "gguf" not in name:
            assert main(["generate", name, "--prompt", "x"]) == 2
            assert message in capsys.readouterr().err, name


def test_home_is_expanded(model, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(model.parent))
    assert main(["generate", "~/model", "--prompt", "x", "--max-new-tokens", "1", "--dtype", "bfloat16"]) == 0
    assert K2Model.from_pretrained("~/model", dtype="bfloat16", progress=False).dtype == torch.bfloat16


def test_bos_as_the_tokenizer_says(tmp_path):
    bos = tokenizer().token_to_id("<bos>")
    for post_processor, config, want in (
        (True, {}, [bos]),
        (True, {"add_bos_token": False}, []),
        (False, {}, []),
        (False, {"add_bos_token": True, "bos_token": {"content": "<bos>"}}, [bos]),
        (False, {"add_bos_token": True, "bos_token": "<bos>"}, [bos]),
    ):
        tokenizer(post_processor).save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_tokenizer(tmp_path).bos == want, (post_processor, config)


def test_bos_reaches_the_model(model, tmp_path, monkeypatch, capsys):
    path = shutil.copytree(model, tmp_path / "model")
    tokenizer().save(str(path / "tokenizer.json"))
    bos, seen = tokenizer().token_to_id("<bos>"), []
    monkeypatch.setattr(K2Model, "generate", lambda self, ids, **_: seen.append(ids.tolist()) or ids)
    for flags in ([], ["--no-bos"]):
        assert main(["generate", str(path), "--prompt", "ab", *flags]) == 0
    assert main(["generate", str(path), "--prompt", "<bos>ab"]) == 0
    assert seen[0] == [[bos, *seen[1][0]]] == seen[2] and len(seen[1][0]) == 2


def test_chat_asks_in_turns(model, monkeypatch, capsys):
    made, seen = load_tokenizer(model), []
    monkeypatch.setattr(K2Model, "generate", lambda self, ids, **given: seen.append((ids, given)) or ids)
    assert main(["generate", str(model), "--chat", "--prompt", "hi<|im_end|>"]) == 0
    ids, given = seen[0]
    asked = made.decode(ids[0].tolist())
    assert asked.endswith("<|im_user|>user<|im_middle|>hi<|im_end|><|im_end|><|im_assistant|>assistant<|im_middle|>")
    end = made.encode("<|im_end|>")[0]
    assert (ids[0] == end).sum() == asked.count("<|im_end|>") - 1 and given["eos_token_ids"] == [end]


def spoken(monkeypatch, ids):
    """The model says `ids` whatever it is asked."""

    def generate(self, input_ids, *, on_token, **_):
        for token in ids:
            on_token(torch.full((len(input_ids),), token))
        return input_ids

    monkeypatch.setattr(K2Model, "generate", generate)


def test_a_text_ends_before_a_stop_text(model, monkeypatch, capsys):
    made = load_tokenizer(model)
    spoken(monkeypatch, made.encode("one tw\u00f6 END three"))
    ask = ["generate", str(model), "--prompt", "END"]
    for flags, want in (
        ([], "ENDone twö END three\n"),
        (["--stop", "END"], "ENDone twö \n"),  # not the one of the prompt
        (["--stop", "three four", "--stop", "e t"], "ENDon\n"),
        (["--stop", "ö E"], "ENDone tw\n"),
        (["--stop", "threes"], "ENDone twö END three\n"),
        (["--prompt", "x", "--stop", " END"], "ENDone twö\n\nxone twö\n"),
    ):
        assert main([*ask, *flags]) == 0
        assert capsys.readouterr().out == want, flags
    assert main([*ask, "--stop", ""]) == 2


def test_chat_prints_the_answer(model, monkeypatch, capsys):
    made = load_tokenizer(model)
    spoken(monkeypatch, made.encode("Hello<|im_end|>and more"))
    assert main(["generate", str(model), "--chat", "--prompt", "hi"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "Hello\n" and "[6 tokens" in printed.err


def test_a_prompt_from_the_standard_input(model, monkeypatch, capsys):
    class Input:
        buffer = io.BytesIO("\ufeffof a pipe\nin two lines".encode())

    monkeypatch.setattr(sys, "stdin", Input)
    assert main(["generate", str(model), "--file", "-", "--max-new-tokens", "1", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("of a pipe\nin two lines")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", str(model), "--file", "-"]) == 2


def test_drafts_are_greedy(tmp_path, capsys):
    path = tmp_path / "mtp"
    tiny.model("kimi", num_nextn_predict_layers=1).save_pretrained(path)
    tokenizer(False).save(str(path / "tokenizer.json"))
    texts = []
    for flags in (["--speculative"], ["--temperature", "0"]):
        assert main(["generate", str(path), "--prompt", "abc", "--max-new-tokens", "9", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["generate", str(path), "--prompt", "abc", "--speculative", "--temperature", "0.5"]) == 2


def test_tiny_temperatures_are_greedy(model):
    loaded, ids = K2Model.from_pretrained(model, progress=False), torch.tensor([[1, 2, 3]])
    greedy = loaded.generate(ids, max_new_tokens=4)
    for temperature in (1e-40, 1e-300):
        assert torch.equal(loaded.generate(ids, max_new_tokens=4, temperature=temperature, seed=0), greedy)


def test_nulls_that_transformers_allows(model):
    values = json.loads((model / "config.json").read_text())
    nulls = ("n_group", "topk_group", "num_nextn_predict_layers", "moe_layer_freq", "aux_loss_alpha", "seq_aux")
    nulls += ("tie_word_embeddings", "norm_topk_prob", "rope_interleave", "attention_dropout", "hidden_act")
    got = K2Config.from_dict({**values, **dict.fromkeys(nulls)})
    assert not got.norm_topk_prob and not got.rope_interleave
    assert got == K2Config.from_dict({**values, "norm_topk_prob": False, "rope_interleave": False, "aux_loss_alpha": 0})
    with pytest.warns(UserWarning, match=r"attention_dropout=0\.1 is not applied"):
        K2Config.from_dict({**values, "attention_dropout": 0.1})


def test_a_warning_is_one_line_once(model, tmp_path, capsys):
    path = shutil.copytree(model, tmp_path / "dropout")
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "attention_dropout": 0.1}))
    assert main(["generate", str(path), "--prompt", "x", "--max-new-tokens", "1"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("k2kernels: config.json: attention_dropout=0.1 is not applied\n[1 tokens"), error
    assert "Warning" not in error


def test_a_single_file_that_hides_an_index_is_named(model, tmp_path, capsys):
    path = shutil.copytree(model, tmp_path / "stale")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors")
    assert main(["generate", str(path), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert "1 missing: model.norm.weight; model.safetensors was read, not the shards of" in error
    (path / "model.safetensors.index.json").unlink()
    assert main(["generate", str(path), "--prompt", "x"]) == 2
    assert "was read" not in capsys.readouterr().err


def test_the_decoder_of_kimi_vl(model, tmp_path):
    path = shutil.copytree(model, tmp_path / "vl")
    text = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"model_type": "kimi_vl", "text_config": text}))
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(path / "model.safetensors").items()}
    tensors |= {"vision_tower.x": torch.ones(2), "multi_modal_projector.linear_1.weight": torch.ones(2)}
    save_file(tensors, path / "model.safetensors")
    ids = torch.tensor([[1, 2, 3]])
    want = K2Model.from_pretrained(model, progress=False)(ids)
    assert torch.equal(K2Model.from_pretrained(path, progress=False)(ids), want)


def test_info_of_what_is_not_run(model, tmp_path, capsys):
    """Sizes need no weights of a known kind, and are those of the family."""
    assert main(["info", str(model)]) == 0
    want = capsys.readouterr().out
    values = json.loads((model / "config.json").read_text())
    for changes, note in (
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ""),
        ({"model_type": "deepseek_v32"}, "the indexer of its sparse attention is not counted"),
        ({"model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax"}, "but not run"),
        ({"model_type": "kimi_vl", "text_config": {**values, "quantization_config": {"quant_method": "gptq"}}}, ""),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
        assert main(["info", str(tmp_path)]) == main(["info", str(tmp_path / "config.json")]) == 0
        printed = capsys.readouterr()
        assert printed.out == want * 2 and note in printed.err, changes


def test_info_of_another_family(tmp_path, capsys):
    """Its files are counted; without them there is nothing to say but why."""
    for kind, why in (("kimi_linear", "linear attention"), ("llama", "model_type must be one of")):
        for values in ({"model_type": kind}, {"model_type": "kimi_k25", "text_config": {"model_type": kind}}):
            (tmp_path / "config.json").write_text(json.dumps(values))
            (tmp_path / "model.safetensors").unlink(missing_ok=True)
            assert main(["info", str(tmp_path)]) == 2 and why in capsys.readouterr().err
            save_file({"a": torch.ones(3, 5), "b": torch.ones(7, dtype=torch.uint8)}, tmp_path / "model.safetensors")
            assert main(["info", str(tmp_path)]) == 0
            printed = capsys.readouterr()
            size = (tmp_path / "model.safetensors").stat().st_size / 1e6
            assert f"1 files, {size:.1f} MB, 2 tensors\n  F32      15 numbers in 1 tensors\n" in printed.out
            assert "U8       7 numbers" in printed.out and why in printed.err
            assert main(["info", str(tmp_path), "--gpus", "8", "--gpu", "h200"]) == 2  # no plan
            capsys.readouterr()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_in_shells(shell, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert end.value.code == 0 and "--keep-quantized" in script and "--scale-rule" in script
