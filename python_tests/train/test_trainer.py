"""A resumed run repeats the curve of an uninterrupted one, whatever stopped it, and nothing is lost."""

import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from k2kernels.cli import main
from k2kernels.model import K2Model
from k2kernels.parallel import checkpoint_info
from k2kernels.parallel.checkpoint import replace_file
from k2kernels.parallel.launch import Launched
from k2kernels.train.data import read_text
from k2kernels.train.trainer import CHECKPOINTS, HISTORY_FILE, Trainer, TrainOptions, only_run

for folder in ("model", "text"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
import kimi_files  # noqa: E402
import tiny  # noqa: E402

SIZES = dict(steps=12, batch_size=2, length=32)
FLAGS = ["--steps", "12", "--batch-size", "2", "--length", "32", "--threads", "1", "--save-every", "4"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text([])[:60_000])
    return str(path)


@pytest.fixture
def options(text):
    return TrainOptions(text=(text,), **SIZES)


def curve(out):
    rows = [json.loads(line) for line in (out / HISTORY_FILE).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    for _ in Trainer(TrainOptions(text=(text,), **SIZES), out).run():
        pass
    return curve(out)


def test_the_run_learns(uninterrupted):
    assert len(uninterrupted) == 12
    assert uninterrupted[-1]["loss"] < uninterrupted[0]["loss"] - 0.3
    assert uninterrupted[-1]["valid"] is not None


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_other_optimizers_learn(optimizer, options, tmp_path):
    rows = list(Trainer(dataclasses.replace(options, optimizer=optimizer), tmp_path).run())
    assert rows[-1].loss < rows[0].loss - 0.3 and rows[-1].clipped_heads == 0


def test_fp8_products_learn_and_are_part_of_a_run(uninterrupted, options, tmp_path):
    rows = list(Trainer(dataclasses.replace(options, fp8=True), tmp_path).run())
    assert rows[-1].loss < rows[0].loss - 0.3 and rows[0].loss != uninterrupted[0]["loss"]
    assert abs(rows[-1].loss - uninterrupted[-1]["loss"]) < 0.05
    with pytest.raises(ValueError, match=r"--resume: the run in .* had other options: fp8 was True, is False"):
        Trainer(options, tmp_path, resume=True)


def test_a_run_may_be_prolonged(uninterrupted, options, tmp_path):
    """The steps that are done stay; the rates of the others are those of the longer run. A shorter run is refused."""
    for _ in Trainer(dataclasses.replace(options, steps=3), tmp_path).run():
        pass
    done = curve(tmp_path)
    longer = Trainer(options, tmp_path, resume=True)
    rows = list(longer.run())
    assert curve(tmp_path)[:3] == done and [row.step for row in rows] == list(range(4, 13))
    assert longer._lr_factor(11) == 1 / 6 and rows[-1].loss < done[0]["loss"] - 0.3
    with pytest.raises(ValueError, match=r"had other options: steps was 12, is 5"):
        Trainer(dataclasses.replace(options, steps=5), tmp_path, resume=True)


def test_a_run_from_a_checkpoint(options, text, tmp_path, capsys):
    """It begins where the other ended, with its tokens; on the way back it is a checkpoint like any other."""
    first = Trainer(dataclasses.replace(options, steps=8), tmp_path / "first")
    for _ in first.run():
        pass
    first.finish()
    (tmp_path / "first" / "chat_template.jinja").write_text("{{ messages }}")
    second = Trainer(
        dataclasses.replace(options, steps=2, start=str(tmp_path / "first"), lr=1e-9, adamw_lr=1e-9),
        tmp_path / "second",
    )
    assert second.tokenizer.to_str() == first.tokenizer.to_str()
    rows = list(second.run())
    assert abs(rows[-1].valid - first.history[-1].valid) < 0.01
    second.finish()
    assert (tmp_path / "second" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert K2Model.from_pretrained(tmp_path / "second", progress=False).config == second.model.config
    command = ["train", "--out", str(tmp_path / "third"), "--text", text, "--steps", "1"]
    for more, message in (
        (["--from", str(tmp_path)], "config.json"),
        (["--from", "owner/name"], "hf download owner/name"),
        (["--from", str(tmp_path / "first"), "--config", "kimi-k2"], "--config must be left out with --from"),
        (["--device", "cuda:77"], "--device must be one of this machine, got 'cuda:77'"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "second" / "tokenizer.json").read_text() == (tmp_path / "first" / "tokenizer.json").read_text()
    (tmp_path / "first" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"must hold tokenizer\.json or tiktoken\.model, got neither"):
        Trainer(dataclasses.replace(options, start=str(tmp_path / "first")), tmp_path / "third")


def test_a_run_from_a_checkpoint_with_a_tokenizer_of_kimi(options, tmp_path, capsys):
    start, out = tmp_path / "kimi", tmp_path / "out"
    start.mkdir()
    first = kimi_files.write(start)
    size = first + len(kimi_files.KIMI_TOKENS)
    tiny.model(num_hidden_layers=1, vocab_size=size).save_pretrained(start)
    marked = tmp_path / "text.txt"
    marked.write_text(Path(options.text[0]).read_text()[:30_000] + "<|im_end|>")  # the name of a token stays text
    options = dataclasses.replace(options, text=(str(marked),), steps=1, start=str(start))
    trainer = Trainer(options, out)
    assert int(trainer.corpus.train.max()) < first
    for _ in trainer.run():
        pass
    trainer.finish()
    for name in ("tiktoken.model", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (start / name).read_bytes()
    assert not (out / "tokenizer.json").exists()
    assert main(["generate", str(out), "--prompt", "he sells 123 shells", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("he sells 123 shells")
    with pytest.raises(ValueError, match=r"--fim-rate needs a tokenizer with <\|fim_prefix\|>"):
        Trainer(dataclasses.replace(options, fim_rate=0.5), tmp_path / "other")
    tiny.model(num_hidden_layers=1, vocab_size=first).save_pretrained(start)
    with pytest.raises(ValueError, match=rf"tiktoken\.model must have ids below {first}, got {size - 1}"):
        Trainer(options, tmp_path / "other")


def test_a_text_of_few_words_makes_a_smaller_vocabulary(tmp_path):
    (tmp_path / "text").write_text("one two three four\n" * 2000)
    trainer = Trainer(TrainOptions(text=(str(tmp_path / "text"),), **SIZES), tmp_path / "out")
    assert trainer.model.config.vocab_size == trainer.tokenizer.get_vocab_size() < 1024


def test_four_bit_experts_learn_and_are_served_as_trained(text, tmp_path, monkeypatch, capsys):
    trainers, finish = [], Trainer.finish
    monkeypatch.setattr(Trainer, "validate", lambda trainer: 3.0)
    monkeypatch.setattr(Trainer, "finish", lambda trainer: (trainers.append(trainer), finish(trainer)))
    flags = ["--steps", "4", "--batch-size", "2", "--length", "32", "--w4", "int4"]
    assert main(["train", "--text", text, "--out", str(tmp_path), *flags]) == 0
    assert "M parameters, muonclip, bfloat16, INT4 experts, " in capsys.readouterr().out
    (trainer,) = trainers
    assert trainer.history[-1].loss < trainer.history[0].loss
    served = K2Model.from_pretrained(tmp_path, keep_quantized=True, progress=False)
    experts = served.model.layers[1].mlp.experts
    assert experts.w4 == "int4" and experts.down_proj.dtype == torch.uint8
    ids = torch.arange(64).view(2, 32) * 13
    with torch.no_grad():
        trained = trainer.model.eval()(ids)
        assert torch.equal(served(ids), trained)
        assert not torch.equal(trainer.model.use_w4(None)(ids), trained)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(w4="int8"), "--w4 must be one of int4, mxfp4, got 'int8'"),
        (dict(dtype="float16"), "--dtype must be one of float32, bfloat16, got 'float16'"),
        (dict(w4="int4", dtype="float32"), "--dtype must be bfloat16 with --w4, .*, got 'float32'"),
        (dict(w4="int4", fp8=True), "--w4 and --fp8 are two ways .*: give one of them"),
        (dict(w4="int4", optimizer="adamw"), r"--optimizer must be muonclip or muon, .* \(--w4\), got 'adamw'"),
        (dict(dtype="bfloat16", optimizer="adamw"), r"--optimizer .* \(--dtype bfloat16\), got 'adamw'"),
    ],
)
def test_what_does_not_go_with_four_bits(changes, message, options):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(options, **changes)


def test_resume_repeats_the_curve_bit_for_bit(uninterrupted, options, tmp_path):
    first = Trainer(options, tmp_path, save_every=5)
    for row in first.run():
        if row.step == 7:  # gone after the save at step 5
            break
    second = Trainer(options, tmp_path, resume=True)
    assert second.step == 5
    for _ in second.run():
        pass
    assert curve(tmp_path) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_resume_after_a_signal(number, uninterrupted, text, tmp_path):
    command = [sys.executable, "-m", "k2kernels", "train", "--out", str(tmp_path / "run"), "--text", text, *FLAGS]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / CHECKPOINTS / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    if process.returncode != 0:  # 0: it was done before the signal came
        assert process.returncode == (-number if number == signal.SIGKILL else 130), error
        assert "Traceback" not in error
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert curve(tmp_path / "run") == uninterrupted


def test_a_failing_save_keeps_the_former_one(options, tmp_path, monkeypatch):
    trainer = Trainer(options, tmp_path, save_every=1)
    run = trainer.run()
    next(run)
    before = checkpoint_info(tmp_path / CHECKPOINTS)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        next(run)
    monkeypatch.undo()
    assert checkpoint_info(tmp_path / CHECKPOINTS) == before
    assert Trainer(options, tmp_path, resume=True).step == 1


def test_a_file_system_that_refuses_ends_with_a_message(text, tmp_path):
    """No file may exceed a megabyte, which the weights do, as on a full disk."""
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "k2kernels", "train", "--text", text, "--out", str(out), *FLAGS],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(
        r"step_4 cannot be written \(.*File too large.*\); the checkpoint before is unchanged", done.stderr
    )
    assert checkpoint_info(out / CHECKPOINTS) is None


def test_a_damaged_checkpoint_is_reported(options, tmp_path):
    folder = tmp_path / CHECKPOINTS / "step_3"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"not a state")
    (tmp_path / CHECKPOINTS / "latest").write_text("step_3")
    with pytest.raises(ValueError, match=r"cannot be read .*; remove .* to start over"):
        Trainer(options, tmp_path, resume=True)


# ---- two runs, and what a kill leaves


def test_a_second_run_in_the_same_directory_is_refused(options, tmp_path, text, capsys):
    out = tmp_path / "run"
    with only_run(out):
        for more in ([], ["--resume"]):
            assert main(["train", "--out", str(out), "--text", text, *FLAGS, *more]) == 2
            assert f"--out {out}: another run is at work in this directory" in capsys.readouterr().err
        assert list(out.iterdir()) == []
    assert not out.exists()  # made by the lock, and empty
    with only_run(out):
        for _ in Trainer(options, out).run():
            pass
    assert out.exists()


def test_every_rank_hears_of_the_other_run(tmp_path):
    class Second(Launched):
        def gather(self, value):
            assert value is None  # only rank 0 locks
            return ["--out: another run", None]

    with (
        pytest.raises(BlockingIOError, match="another run"),
        only_run(tmp_path, Second(1, 2, torch.device("cpu"), None)),
    ):
        pass
    with only_run(tmp_path):
        pass


def test_one_file_written_by_two_processes_is_whole_at_any_time(tmp_path):
    path, size = tmp_path / "file", 200_000
    writers = []
    for letter in (b"a", b"b"):
        pid = os.fork()
        if pid == 0:
            try:
                end = time.monotonic() + 1.5
                while time.monotonic() < end:
                    replace_file(path, lambda file, letter=letter: [file.write(letter * (size // 4)) for _ in range(4)])
            except BaseException:
                os._exit(1)
            os._exit(0)
        writers.append(pid)
    deadline = time.monotonic() + 30
    reads, codes = 0, []
    while len(codes) < 2 and time.monotonic() < deadline:
        if path.exists():
            assert path.read_bytes() in (b"a" * size, b"b" * size)
            reads += 1
        for pid in writers[:]:
            if (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes.append(os.waitstatus_to_exitcode(ended[1]))
                writers.remove(pid)
    assert codes == [0, 0] and reads > 10
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_history_is_that_of_the_checkpoint(uninterrupted, options, tmp_path):
    """A kill between the two leaves the history behind; --resume writes it even where no step remains."""
    for _ in Trainer(options, tmp_path).run():
        pass
    lines = (tmp_path / HISTORY_FILE).read_text().splitlines(keepends=True)
    (tmp_path / HISTORY_FILE).write_text("".join(lines[:8]))
    assert list(Trainer(options, tmp_path, resume=True).run()) == []
    assert curve(tmp_path) == uninterrupted
