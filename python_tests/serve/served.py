"""A server in this process, and ways to ask it."""

import http.client
import importlib
import json
import socket
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import openai
import torch
import uvicorn

from k2kernels.engine import Engine
from k2kernels.model import K2Model
from k2kernels.serve.app import Server
from k2kernels.text.chat import load_chat
from k2kernels.text.tokenizer import load_tokenizer

TESTS, NAME = Path(__file__).parents[1], "tiny"
sys.path[:0] = [str(TESTS / "model"), str(TESTS / "text")]
tiny, kimi_files = map(importlib.import_module, ("tiny", "kimi_files"))


def write(path):
    """A checkpoint in the directory `path`, whose vocabulary is that of the tokenizer; <|im_end|> ends a text."""
    first = kimi_files.write(path)
    torch.manual_seed(0)
    size, end = first + len(kimi_files.KIMI_TOKENS), first + kimi_files.KIMI_TOKENS.index("<|im_end|>")
    tiny.model(num_hidden_layers=1, vocab_size=size, eos_token_id=end).save_pretrained(path)


class Running:
    """A server in a thread of this process."""

    def __init__(self, directory, **options):
        tokenizer = load_tokenizer(directory)
        self.engine = Engine(K2Model.from_pretrained(directory, progress=False), cache_tokens=4096).start()
        self.server = Server(self.engine, tokenizer, load_chat(directory, tokenizer), NAME, **options)
        config = uvicorn.Config(self.server.app, port=0, lifespan="off", log_level="critical")
        self.http = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.http.run)
        self.thread.start()
        until(lambda: self.http.started)
        self.url = f"http://127.0.0.1:{self.http.servers[0].sockets[0].getsockname()[1]}"
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key=options.get("api_key", "none"), max_retries=0)

    def idle(self):
        """Waits until nothing runs; then every page must be free or found by key, and none held."""
        stats = self.engine.stats
        until(lambda: not (self.server.open or stats()["running"] or stats()["waiting"]))
        self.engine.check()
        assert stats()["pages_held"] == 0

    def close(self):
        self.client.close()
        self.http.should_exit = True
        self.thread.join(30)
        self.engine.close()
        assert not self.thread.is_alive()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "time-out"
        time.sleep(0.005)


def stalled(url, path="/v1/completions"):
    """A connection with the head of a request, and the first byte of its body."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=20)
    head = "content-type: application/json\r\ncontent-length: 99"
    connection.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n{{".encode())
    return connection


def received(connection):
    """All that comes until the server closes the connection."""
    with connection, connection.makefile("rb") as stream:
        return stream.read().decode()


def post(url, path, body, **headers):
    """Status, object and headers, without a client that checks the request."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    try:
        connection.request(
            "POST" if body is not None else "GET", path, data, {"content-type": "application/json"} | headers
        )
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()
