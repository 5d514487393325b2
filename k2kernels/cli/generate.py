"""Generate text from a checkpoint through the paged latent cache.

The prompt is continued without changes: include the markers that a chat model expects (<|im_user|> ...).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="directory with config.json, *.safetensors and a tokenizer")
    add("--prompt", required=True, metavar="TEXT")
    add("--max-new-tokens", type=int, default=128)
    add("--temperature", type=float, default=0.7, help="0: greedy")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--cache-dtype", default="auto", help="auto (the model's dtype) or fp8 (the 656-byte layout)")
    add("--prefill-chunk", type=int, metavar="N", help="take in N tokens of the prompt at a time: bounded memory")
    add(
        "--keep-quantized",
        "--keep-fp8",
        action="store_true",
        help="keep FP8 and 4-bit weights as they are, and multiply by them",
    )


def run(options: argparse.Namespace) -> int:
    from k2kernels.cli.tokenizer import load_tokenizer
    from k2kernels.model import K2Model

    path = Path(options.checkpoint)
    if not path.is_dir():
        raise ValueError(f"{path}: must be a directory with a checkpoint")
    tokenizer = load_tokenizer(path)
    try:
        options.prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that Python could not decode
        raise ValueError("--prompt must be UTF-8 text, got other bytes") from None
    prompt = tokenizer.encode(options.prompt)
    if not prompt:
        raise ValueError("--prompt must hold text, got an empty one")
    model = K2Model.from_pretrained(path, device=options.device, keep_quantized=options.keep_quantized)

    stream = _Stream(tokenizer, prompt)
    started = time.perf_counter()
    tokens = model.generate(
        torch.tensor([prompt], device=options.device),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        cache_dtype=options.cache_dtype,
        prefill_chunk=options.prefill_chunk,
        on_token=lambda new: stream.add(int(new[0])),
    )
    seconds = time.perf_counter() - started
    print()
    new = tokens.shape[1] - len(prompt)
    c = model.config
    latent = c.kv_lora_rank + c.qk_rope_head_dim
    expanded = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    print(
        f"[{new} tokens, {new / seconds:.0f} tokens/s; cached per token and layer: {latent} numbers "
        f"instead of {expanded} of keys and values]",
        file=sys.stderr,
    )
    return 0


class _Stream:
    """Prints prompt and text as soon as its bytes are complete; a character may need several tokens."""

    def __init__(self, tokenizer, prompt: list[int]):
        self.tokenizer, self.ids, self.shown = tokenizer, list(prompt), ""

    def add(self, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.startswith(self.shown) and not text.endswith("\ufffd"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text
