"""The commands: output and error messages."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from k2kernels.cli import main
from k2kernels.train.data import read_text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run of three steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    text = out.with_name("text.txt")
    text.write_text(read_text([])[:60_000])
    arguments = ["--steps", "3", "--batch-size", "2", "--length", "32", "--threads", "1", "--text", str(text)]
    assert main(["train", "--out", str(out), *arguments]) == 0
    return out


def test_train_leaves_what_it_promises(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "loss.png",
        "max_logits.png",
        "history.jsonl",
        "checkpoints",
    }


def test_generate_continues_the_prompt(checkpoint, capsys):
    arguments = ["generate", str(checkpoint), "--prompt", "The with statement", "--max-new-tokens", "5"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert first.out.startswith("The with statement") and "[5 tokens" in first.err
    assert main(arguments) == 0
    assert capsys.readouterr().out == first.out  # the seed is fixed


@pytest.fixture(scope="module")
def of_torchrun(checkpoint):
    """README's `torchrun` command, with another directory: the arguments of `k2kernels`, and how to start it."""
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    command = shlex.split(re.search(r"^torchrun .*k2kernels generate .*$", readme, re.MULTILINE)[0])
    assert command[:5] == ["torchrun", "--nproc-per-node", "2", "-m", "k2kernels"]
    command[command.index("out/demo")] = str(checkpoint)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])

    def start(more):
        arguments = [sys.executable, "-m", "torch.distributed.run", *command[1:], *more]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=180, env=environment)

    return command[5:], start


def test_torchrun_prints_the_text_of_one_process(of_torchrun, tmp_path, capsys):
    """More prompts than processes, of other lengths; and one prompt for two processes."""
    arguments, start = of_torchrun
    (tmp_path / "more.txt").write_text("An import statement\n\nx\n", encoding="utf-8")
    more = ["--prompts-file", str(tmp_path / "more.txt"), "--max-new-tokens", "12", "--prefill-chunk", "3"]
    assert main([*arguments, *more]) == 0
    want = capsys.readouterr()
    done = start(more)
    assert done.returncode == 0, done.stderr
    assert done.stdout == want.out and "[48 tokens" in done.stderr
    texts = ["The with", "A class is", "An import statement", "x"]
    assert [done.stdout.find(text) for text in texts] == sorted(done.stdout.find(text) for text in texts)
    for text in texts:  # the text of each prompt alone
        one = [*arguments[:4], "--prompt", text, *more[2:]]
        assert main(one) == 0
        assert capsys.readouterr().out.strip() in done.stdout


def test_an_error_ends_all_processes_of_torchrun(of_torchrun):
    _, start = of_torchrun
    done = start(["--ep", "3"])
    assert done.returncode != 0
    assert "k2kernels generate: ep must divide the 2 processes" in done.stderr
    assert "ValueError" not in done.stderr  # a message, no traceback


def test_convert_and_info(checkpoint, tmp_path, capsys):
    assert main(["convert", str(checkpoint), str(tmp_path / "fp8"), "--to", "fp8"]) == 0
    assert main(["generate", str(tmp_path / "fp8"), "--prompt", "The", "--max-new-tokens", "2"]) == 0
    assert main(["info", str(checkpoint)]) == 0
    assert main(["info", "kimi-k2"]) == 0
    assert "1,026,408,232,448" in capsys.readouterr().out


def test_bad_input_ends_with_a_message_and_exit_code_2(checkpoint, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    out = str(tmp_path / "new")
    cases = {
        ("train", "--out", out, "--text", str(tmp_path / "empty.txt")): "must hold text, got an empty file",
        ("train", "--out", out, "--text", str(tmp_path / "short.txt")): "must hold at least 20000 bytes in all, got 9",
        ("train", "--out", out, "--text", str(tmp_path / "binary")): "must be UTF-8 text, got byte 0x80",
        ("train", "--out", out, "--text", str(tmp_path / "none.txt")): "No such file",
        ("train", "--out", out, "--optimizer", "sgd"): "--optimizer must be one of muonclip, muon, adamw, got 'sgd'",
        ("train", "--out", out, "--steps", "0"): "--steps must be at least 1, got 0",
        ("train", "--out", out, "--length", "100000"): "--length must be at most",
        ("train", "--out", out, "--config", "kimi-k9"): "kimi-k9",
        ("train", "--out", out, "--config", "kimi-k2"): "must fit into this machine's",
        ("train", "--out", out, "--lr", "nan"): "--lr must be positive, got nan",
        ("train", "--out", out, "--seed", "-1"): "--seed must be from 0 to 2147483647, got -1",
        ("train", "--out", out, "--seed", str(10**11)): "--seed must be from 0 to 2147483647, got 100000000000",
        ("train", "--out", out, "--fim-rate", "1.5"): "--fim-rate must be above 0 and at most 1",
        ("train", "--out", out, "--threads", str(10**11)): "--threads must be from 1 to 1024, got 100000000000",
        ("train", "--out", ""): "--out must name a directory, got an empty name",
        ("train", "--out", str(tmp_path / "binary"), "--steps", "1"): "must be a directory, got a file",
        ("train", "--out", str(checkpoint)): "holds a run already",
        ("train", "--out", str(checkpoint), "--resume", "--seed", "5"): "seed was 0, is 5",
        ("generate", str(tmp_path / "none"), "--prompt", "x"): "must be a directory",
        ("generate", str(tmp_path), "--prompt", "x"): "tokenizer.json",
        ("generate", str(checkpoint), "--prompt", ""): "--prompt must hold text",
        ("generate", str(checkpoint), "--prompt", "\udcff"): "--prompt must be UTF-8 text",
        ("generate", str(checkpoint)): "--prompt, --file or --prompts-file must give a prompt",
        ("generate", str(checkpoint), "--prompts-file", str(tmp_path / "binary")): "--prompts-file must be UTF-8 text",
        ("generate", str(checkpoint), "--prompt", "x", "--device", "abacus"): "device must be one of this machine",
        ("generate", str(checkpoint), "--prompt", "x", "--ep", "2"): "ep must be 1 in one process, got 2",
        (
            "generate",
            str(checkpoint),
            "--prompt",
            "x",
            "--device",
            "gpu",
        ): "device must be one of this machine, got 'gpu'",
        (
            "generate",
            str(checkpoint),
            "--prompt",
            "x",
            "--device",
            "meta",
        ): "must be one that holds data, got 'meta'",
        ("generate", str(checkpoint), "--prompt", "x", "--seed", "-1"): "seed must be an int >= 0, got -1",
        ("generate", str(checkpoint), "--prompt", "x", "--max-new-tokens", "100000"): "at most 512 tokens together",
        ("generate", str(checkpoint), "--prompt", "x", "--cache-dtype", "int4"): "--cache-dtype must be one of",
        (
            "generate",
            str(checkpoint),
            "--prompt",
            "x",
            "--prefill-chunk",
            "0",
        ): "--prefill-chunk must be an int >= 1, got 0",
        ("info", "kimi-k9"): "kimi-k9",
        ("info", str(tmp_path)): "config.json",
        ("convert", str(tmp_path / "none"), out, "--to", "bf16"): "none",
        ("bench", "nothing"): "OP must be one of",
    }
    for arguments, message in cases.items():
        assert main(arguments) == 2, arguments
        printed = capsys.readouterr()
        error = printed.err
        assert printed.out == ""
        assert message in error and f"k2kernels {arguments[0]}: " in error, (arguments, error)
        assert error.count(f"{arguments[0]}: ") == 1, error
    assert not (tmp_path / "new").exists()


def test_no_traceback_from_the_shell(tmp_path):
    command = [sys.executable, "-m", "k2kernels", "info", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""


def test_usage_is_that_of_the_command(capsys):
    for arguments in (["info", "a", "b"], ["info", "a", "--nonsense"], ["info", "a", "--nonsense", "doctor"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("usage: k2kernels info ") and "error: unrecognized arguments: " in error
    with pytest.raises(SystemExit) as end:
        main(["-V"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("k2kernels ")


def test_a_missing_package_is_named(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["generate", str(checkpoint), "--prompt", "x"]) == 2
    assert "k2kernels[cli]" in capsys.readouterr().err
