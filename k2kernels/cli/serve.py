"""Serve a checkpoint by OpenAI's endpoints: /v1/chat/completions, /v1/completions, /v1/models; /health, /metrics.

One model on one device; docs/serve.md has the fields. SIGTERM and Ctrl-C end the server after the answers that are
being made; new requests get status 503 meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

KEY = "K2KERNELS_API_KEY"


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="directory with config.json, *.safetensors and a tokenizer")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add("--keep-quantized", action="store_true", help="keep FP8 and 4-bit weights as they are, and multiply by them")
    add("--cache-tokens", type=int, metavar="N", help="of all requests together (default: what fits, at most 262144)")
    add("--cache-dtype", default="auto", help="auto (the model's dtype) or fp8 (the 656-byte layout)")
    add("--max-batch-tokens", type=int, metavar="N", help="of a pass (default: 256 on a CPU, 2048 on a GPU)")
    add("--speculative", action="store_true", help="draft with the MTP layers")


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_model_arguments(command)
    add = command.add_argument
    add("--host", default="127.0.0.1", help="another one than loopback needs an API key")
    add("--port", type=int, default=8000, help="0: any free one")
    add("--api-key", metavar="KEY", help=f"that clients send; better in the environment, {KEY}")
    add("--name", help="of the model in requests (default: that of the directory)")
    add("--max-queue", type=int, default=256, metavar="N", help="samples that may wait; more get status 429")
    add("--max-seconds", type=float, default=600.0, metavar="S", help="of a request")


def open_checkpoint(options: argparse.Namespace) -> tuple[Path, Any, Any]:
    """The directory, the configuration and the tokenizer, once the model's flags are found right."""
    from k2kernels.cli.flags import Flags
    from k2kernels.engine.cache import PAGE_SIZE
    from k2kernels.engine.options import check_engine
    from k2kernels.model import K2Config
    from k2kernels.model.capacity import existing_device
    from k2kernels.model.folder import check_pointers, checkpoint_folder
    from k2kernels.text.tokenizer import load_tokenizer

    flags = Flags(options.command)
    existing_device(options.device, flags)
    path = checkpoint_folder(options.checkpoint)
    check_pointers(path, ("tokenizer.json", "tiktoken.model"))
    tokenizer = load_tokenizer(path)
    config = K2Config.from_pretrained(path)
    check_engine(
        flags,
        config,
        cache_tokens=PAGE_SIZE if options.cache_tokens is None else options.cache_tokens,
        max_batch_tokens=options.max_batch_tokens,
        speculative=options.speculative,
        mtp_layers=config.num_nextn_predict_layers,
        cache_dtype=options.cache_dtype,
    )
    return path, config, tokenizer


def load(options: argparse.Namespace, path: Path) -> Any:
    """The engine."""
    from k2kernels.serve.load import load_engine

    names = ("device", "keep_quantized", "cache_tokens", "cache_dtype", "max_batch_tokens", "speculative")
    return load_engine(path, **{name: getattr(options, name) for name in names})


def run(options: argparse.Namespace) -> int:
    import ipaddress
    import socket

    key = options.api_key or os.environ.get(KEY)
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port must be from 0 to 65535, got {options.port}")
    for name, least in dict(max_queue=1, max_seconds=0).items():
        if not getattr(options, name) >= least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    addresses = {place[4][0] for place in socket.getaddrinfo(options.host, options.port)}
    if key is None and not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        raise ValueError(f"--host {options.host} can be reached from outside: set --api-key or {KEY}, got none")
    from k2kernels.serve.app import Server
    from k2kernels.serve.run import bind
    from k2kernels.serve.run import run as serve
    from k2kernels.text.chat import NoTemplate, load_chat

    with bind(options.host, options.port) as bound:
        path, _, tokenizer = open_checkpoint(options)
        try:
            chat = load_chat(path, tokenizer)
        except ValueError as error:
            why = f"no chat template in {path}" if isinstance(error, NoTemplate) else error
            print(f"{why}: /v1/completions is served, /v1/chat/completions is not", file=sys.stderr)
            chat = None
        engine = load(options, path)
        server = Server(
            engine,
            tokenizer,
            chat,
            options.name or path.resolve().name,
            api_key=key,
            max_waiting=options.max_queue,
            max_seconds=options.max_seconds,
        )
        with engine:
            return serve(server, bound)
