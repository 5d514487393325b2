"""`k2kernels serve` and `k2kernels chat`: what they refuse, and a conversation."""

import builtins
import contextlib
import dataclasses
import os
import re
import shutil
import signal
import socket
import threading

import openai
import pytest
import torch
from served import NAME, post, received, stalled, until

from k2kernels.cli import main
from k2kernels.model import K2Config
from k2kernels.model.capacity import capacity
from k2kernels.serve import load, run
from k2kernels.text.stream import TextStream


@pytest.fixture
def unread(monkeypatch):
    """Whatever reads weights fails."""
    monkeypatch.setattr(load.K2Model, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))


def test_a_model_beyond_the_device_is_refused_before_its_weights_are_read(directory, unread, monkeypatch, capsys):
    monkeypatch.setattr(load, "device_bytes", lambda device: 100_000)
    for command in ("serve", "chat"):
        arguments = ["--port", "0"] if command == "serve" else []
        assert main([command, str(directory), *arguments]) == 2
        error = capsys.readouterr().err
        assert "needs 0." in error and "has 0.1 MB (90% of the memory of 'cpu')" in error, error
        assert f"vllm serve {directory} --attention-backend K2KERNELS_MLA --tensor-parallel-size 2" in error


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_devices_of_another_machine(command, directory, unread, capsys):
    arguments = [command, str(directory)] + ["--port", "0"] * (command == "serve")
    for device in ["abacus", "gpu", "meta"] + ["cuda"] * (not torch.cuda.is_available()):
        assert main([*arguments, "--device", device]) == 2
        assert f"k2kernels {command}: --device must be one " in (error := capsys.readouterr().err), error
        assert f"got '{device}'" in error


@pytest.mark.parametrize(
    "commands, flags, message",
    [
        ("serve chat", "--max-batch-tokens 0", "--max-batch-tokens must be an int >= 1, got 0"),
        ("serve chat", "--cache-tokens 10", "--cache-tokens must be an int >= 64, got 10"),
        ("serve chat", "--cache-dtype int8", "--cache-dtype must be one of 'auto', 'fp8', got 'int8'"),
        ("serve chat", "--cache-dtype fp8", "--cache-dtype must be 'auto' for 48 latent and 16 rope dimensions"),
        ("serve chat", "--speculative", "--speculative must be False for a model without MTP layers"),
        ("chat", "--top-p 0", "--top-p must be above 0 and at most 1, got 0.0"),
        ("chat", "--temperature nan", "--temperature must be finite, got nan"),
        ("chat", "--seed -1", "--seed must be an int >= 0, got -1"),
        ("chat", "--max-new-tokens 0", "--max-new-tokens must be an int in 1 .. 511, got 0"),
    ],
)
def test_flags_are_judged_before_weights_are_read(commands, flags, message, directory, unread, capsys):
    for command in commands.split():
        port = ["--port", "0"] if command == "serve" else []
        assert main([command, str(directory), *port, *flags.split()]) == 2
        assert capsys.readouterr().err.startswith(f"k2kernels {command}: {message}")


def test_a_chat_without_turns_is_refused_before_weights_are_read(directory, tmp_path, unread, capsys):
    plain = shutil.copytree(directory, tmp_path / "plain")
    (plain / "tokenizer_config.json").unlink()
    assert main(["chat", str(plain)]) == 2
    assert "must hold chat_template.jinja" in capsys.readouterr().err


def test_what_fits(tmp_path):
    def fit(preset, gigabytes, tokens=None, device="cuda", cache="auto"):
        config = K2Config.preset(preset)
        return load.fit(tmp_path, config, int(gigabytes * 1e9), device, False, tokens, cache)

    assert fit("moonlight-16b-a3b", 80) == load.MOST_CACHE_TOKENS
    assert 64 < fit("moonlight-16b-a3b", 37) < 60_000
    assert fit("moonlight-16b-a3b", 80, tokens=128) == 128
    with pytest.raises(MemoryError, match=r"tensor-parallel-size 2$"):
        fit("moonlight-16b-a3b", 24)
    with pytest.raises(MemoryError, match=r"needs 2,06\d.*64 GPUs of 80.0 GB(.|\n)*size 64$"):
        fit("kimi-k2", 64, device="cpu")
    with pytest.raises(MemoryError):
        fit("tiny", 0.5, tokens=10**8)


def test_weights_that_fit_as_the_files_hold_them(tmp_path):
    """A folder of FP8 is 1/4 of what its weights take in float32; beyond that, vLLM reads the files as they are."""
    config = K2Config.preset("tiny")
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = dataclasses.replace(config, dtype="float32", quantization_config=fp8)
    plain = capacity(config).weights_bf16 * 2
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(plain // 4)
    cache = 64 * capacity(config).cache_bf16 * 2

    def fit(memory, keep=False):
        return load.fit(tmp_path, config, int(memory), "cuda", keep, 64, "auto")

    assert fit((plain + cache) * 1.2) == fit(plain / 2 + cache, True) == 64
    with pytest.raises(MemoryError, match="fits with --keep-quantized") as error:
        fit(plain / 2 + cache)
    assert "vllm" not in str(error.value)
    for keep in (False, True):
        with pytest.raises(MemoryError, match=r"tensor-parallel-size 2$") as error:
            fit(plain / 5 + cache, keep)
        assert "--keep-quantized" not in str(error.value)


def test_addresses_that_are_refused(directory, capsys, monkeypatch):
    monkeypatch.delenv("K2KERNELS_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = {
            ("--host", "0.0.0.0"): "--host 0.0.0.0 can be reached from outside: set --api-key or K2KERNELS_API_KEY",
            ("--port", str(taken.getsockname()[1])): "in use",
            ("--port", "70000"): "--port must be from 0 to 65535, got 70000",
            ("--max-queue", "0"): "--max-queue must be at least 1, got 0",
            ("--max-seconds", "nan"): "--max-seconds must be at least 0, got nan",
        }
        for arguments, message in cases.items():
            assert main(["serve", str(directory), *arguments]) == 2
            assert message in capsys.readouterr().err
    assert main(["serve", str(directory / "none"), "--port", "0"]) == 2
    assert "must be a directory" in capsys.readouterr().err


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_ends_after_the_answers_in_flight_and_twice_at_once(signals, directory, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, ask = f"http://127.0.0.1:{port}", {"messages": [{"role": "user", "content": "x"}], "model": NAME}
    seen = []

    def health():
        with contextlib.suppress(OSError):
            return post(url, "/health", None)[0]

    def client():
        chunks = []
        try:
            until(lambda: health() == 200)
            with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as asked:
                answer = asked.chat.completions.create(**ask, max_tokens=240, logit_bias={"266": -100}, stream=True)
                chunks.append(next(answer))
                waiting = stalled(url) if signals == 1 else None  # whose body never comes
                assert health() == 200  # asked after it, so that its head is here
                os.kill(os.getpid(), signal.SIGTERM)
                until(lambda: health() == 503)
                if signals == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    seen.append(post(url, "/v1/chat/completions", ask))
                    assert "shutting down" in received(waiting)
                with contextlib.suppress(Exception):  # a second signal cuts the connection
                    chunks.extend(answer)
            seen.append(chunks)
        finally:
            if not seen:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=client)
    thread.start()
    code = main(["serve", str(directory), "--port", str(port), "--cache-tokens", "1024", "--max-seconds", "60"])
    thread.join()
    *refused, chunks = seen
    ended = chunks[-1].choices[0].finish_reason
    if signals == 1:
        ((status, text, answered),) = refused
        assert status == 503 and "shutting down" in text and answered["retry-after"] == "1"
        assert code == 0 and ended == "length" and len(chunks) > 120
    else:
        assert code == 1 and ended is None
    assert health() is None
    assert f"serving 'tiny' at {url}/v1" in capsys.readouterr().err


def test_a_model_without_turns(directory, tmp_path, monkeypatch, capsys):
    """Its server says so as a fact, on stderr; a template that cannot be read is named."""
    shutil.copytree(directory, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer_config.json").unlink()
    monkeypatch.setattr(run, "run", lambda server, bound: 3)
    start = ["serve", str(tmp_path / "bare"), "--port", "0", "--cache-tokens", "64"]
    assert main(start) == 3
    out, err = capsys.readouterr()
    ending = ": /v1/completions is served, /v1/chat/completions is not\n"
    assert err.endswith(f"no chat template in {tmp_path / 'bare'}{ending}") and "/v1" not in out
    (tmp_path / "bare" / "chat_template.jinja").write_text("{% if %}")
    assert main(start) == 3
    assert re.search(f"chat_template.jinja: must be a Jinja template: .*{ending}$", capsys.readouterr().err)


def test_a_conversation(directory, monkeypatch, capsys):
    """The history grows, /reset empties it, Ctrl-C stops one answer."""
    asked, lines = [], iter(["he said", "and 123?", "", "/reset", "he said", "stop this", "/reset", "he said"])
    encode = load.Engine.submit
    interrupt = False

    def line(prompt):
        nonlocal interrupt
        text = next(lines, None)
        if text is None:
            raise EOFError
        interrupt = text == "stop this"
        return text

    def submit(engine, ids, **options):
        asked.append(list(ids))
        return encode(engine, ids, **options)

    def add(stream, token, add=TextStream.add):
        if interrupt:
            raise KeyboardInterrupt
        return add(stream, token)

    monkeypatch.setattr(builtins, "input", line)
    monkeypatch.setattr(load.Engine, "submit", submit)
    monkeypatch.setattr(TextStream, "add", add)
    arguments = ["--temperature", "0", "--max-new-tokens", "6", "--system", "Be brief.", "--cache-tokens", "512"]
    assert main(["chat", str(directory), *arguments]) == 0
    assert asked[0] == asked[2] == asked[4]
    assert len(asked[1]) > len(asked[0]) and asked[1][: len(asked[0])] == asked[0]
    assert len(asked[3]) > len(asked[2])
    out = capsys.readouterr().out
    assert out.count("\n") >= 6 and not torch.is_inference_mode_enabled()


def test_a_conversation_beyond_the_context(directory, monkeypatch, capsys):
    lines = iter(["x" * 600, "/exit"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    assert main(["chat", str(directory), "--cache-tokens", "512"]) == 0
    assert "at most 512 tokens together" in capsys.readouterr().err
