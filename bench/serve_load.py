"""Load on `k2kernels serve`: 64 clients, clients that go away, kill -9, SIGTERM. `make serve-load`.

    python bench/serve_load.py [--seconds 60] [--clients 64] [--out FILE]

Serves a model of random weights, a few layers of the "tiny" preset, in a process of its own, and asks it by OpenAI's
client. What must hold is asserted: no error, no page held at the end, exit code 0 after SIGTERM with all answers in
flight complete, and a server that starts on the same directory after kill -9. Prints one line of results, and appends
it to --out. The server and the clients share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from k2kernels.model import K2Config, K2Model

NAME, CHAT = "random", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
SYSTEM = {"role": "system", "content": "You are a manual of a language. " * 8}  # shared, and more than a page


def checkpoint(path: Path) -> None:
    """Random weights, and a tokenizer of bytes."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(CHAT)
    given = K2Config.preset("tiny").to_dict()
    config = K2Config.from_dict(
        {**given, "vocab_size": len(alphabet), "eos_token_id": None, "num_nextn_predict_layers": 0}
    )
    K2Model(config).save_pretrained(path)


class Server:
    def __init__(self, path: Path):
        command = [sys.executable, "-m", "k2kernels", "serve", str(path), "--port", "0", "--name", NAME]
        command += ["--cache-tokens", "65536", "--max-queue", "512"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"at (http://\S+)/v1", line):
                self.url = found[1]
                return
        raise AssertionError("the server did not start")

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=120)

    def end(self, sign: int) -> int:
        self.process.send_signal(sign)
        return self.process.wait(60)


def request(text: str, **options) -> dict:
    return dict(model=NAME, messages=[SYSTEM, {"role": "user", "content": text}], max_tokens=24) | options


async def metrics(client: openai.AsyncOpenAI) -> dict[str, float]:
    text = await client.get("/../metrics", cast_to=str)
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name.removeprefix("k2kernels_"): float(value) for name, value in lines}


async def idle(client: openai.AsyncOpenAI) -> float:
    """Seconds until nothing runs and waits; no page may be held then."""
    started = time.perf_counter()
    while True:
        now = await metrics(client)
        if not (now["running"] or now["waiting"]):
            assert now["pages_held"] == 0, now
            return time.perf_counter() - started
        assert time.perf_counter() - started < 60, now
        await asyncio.sleep(0.02)


async def load(client: openai.AsyncOpenAI, clients: int, seconds: float) -> dict:
    """Streaming clients, each with one request at a time."""
    end, whole, first, tokens = time.perf_counter() + seconds, [], [], 0

    async def one(number: int) -> None:
        nonlocal tokens
        draws = random.Random(number)
        while time.perf_counter() < end:
            started, seen = time.perf_counter(), False
            asked = request(f"Explain {draws.random()}", stream=True, stream_options={"include_usage": True})
            async for chunk in await client.chat.completions.create(**asked):
                if not seen and chunk.choices and chunk.choices[0].delta.content:
                    first.append(time.perf_counter() - started)
                    seen = True
                if chunk.usage:
                    tokens += chunk.usage.completion_tokens
            whole.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*map(one, range(clients)))  # an error of one ends the run
    took = time.perf_counter() - started
    assert tokens == 24 * len(whole)
    return dict(
        requests=len(whole),
        tokens_per_second=round(tokens / took, 1),
        first_token_seconds={"p50": at(first, 0.5), "p99": at(first, 0.99)},
        answer_seconds={"p50": at(whole, 0.5), "p99": at(whole, 0.99)},
    )


def at(values: list[float], share: float) -> float:
    return round(sorted(values)[int(share * (len(values) - 1))], 3)


async def vanish(client: openai.AsyncOpenAI, count: int) -> None:
    """Clients that leave: after some chunks, before the first, or while they wait for a whole answer."""

    async def one(number: int) -> None:
        answer = await client.chat.completions.create(**request("x", max_tokens=200, stream=number % 2 == 0))
        async for _ in answer:
            pass

    async def leave(number: int) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(one(number), 0.05 * (1 + number % 7))

    await asyncio.gather(*map(leave, range(count)))


async def fly(client: openai.AsyncOpenAI) -> list[asyncio.Task]:
    """Eight requests that run."""
    asked = request("x", max_tokens=150)
    tasks = [asyncio.create_task(client.chat.completions.create(**asked)) for _ in range(8)]
    while (await metrics(client))["running"] < 8:
        assert not any(task.done() for task in tasks), tasks
        await asyncio.sleep(0.01)
    return tasks


async def measure(options: argparse.Namespace, path: Path) -> dict:
    server = Server(path)
    client = server.client()
    line = dict(clients=options.clients, seconds=options.seconds)
    line |= await load(client, options.clients, options.seconds)
    await idle(client)
    before = await metrics(client)
    await vanish(client, options.clients)
    line["idle_after_vanished_seconds"] = round(await idle(client), 3)
    assert line["idle_after_vanished_seconds"] < 5, line  # an answer takes much longer
    after = await metrics(client)
    gone = 'requests_total{outcome="gone"}'
    line["vanished"] = int(after.get(gone, 0) - before.get(gone, 0))
    assert line["vanished"] >= options.clients // 2, line  # the others left before the server saw their requests
    line["prefix_hits"] = int(after["prefix_hits_total"])

    flying = await fly(client)
    started = time.perf_counter()
    code = await asyncio.to_thread(server.end, signal.SIGTERM)
    answers = await asyncio.gather(*flying)
    assert code == 0 and all(answer.usage.completion_tokens == 150 for answer in answers), code
    line["sigterm_seconds"] = round(time.perf_counter() - started, 3)

    server = Server(path)
    client = server.client()
    flying = await fly(client)
    files = sorted(os.listdir(path))
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    failed = await asyncio.gather(*flying, return_exceptions=True)
    assert all(isinstance(error, openai.APIConnectionError) for error in failed) and files == sorted(os.listdir(path))
    server = Server(path)  # on the same directory
    answer = await server.client().chat.completions.create(**request("x"))
    assert answer.usage.completion_tokens == 24 and server.end(signal.SIGTERM) == 0
    return line | dict(errors=0, pages_held=0, killed_and_started_again=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder))
        line = asyncio.run(measure(options, Path(folder)))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    line |= dict(
        device=f"CPU, {os.cpu_count()} cores for server and clients, {cpu()}",
        date=time.strftime("%Y-%m-%d"),
        commit=commit,
        torch=torch.__version__,
        openai=openai.__version__,
        command="make serve-load",
    )
    print(json.dumps(line))
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def cpu() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
