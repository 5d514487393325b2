"""Generate text from a checkpoint through the paged latent cache.

A prompt is continued without changes: include the markers that a chat model expects (<|im_user|> ...). One prompt is
printed as it grows, several at the end, in their order. Under torchrun each process reads its own experts and all
other weights, and continues its share of the prompts.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="directory with config.json, *.safetensors and a tokenizer")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--prompts-file", metavar="FILE", help="more prompts, one on each line of a UTF-8 file")
    add("--max-new-tokens", type=int, default=128)
    add("--temperature", type=float, default=0.7, help="0: greedy")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu, cuda, ...; under torchrun cuda is a GPU for each process")
    add("--ep", type=int, metavar="N", help="processes that share the experts, under torchrun (default: all of them)")
    add("--cache-dtype", default="auto", help="auto (the model's dtype) or fp8 (the 656-byte layout)")
    add("--prefill-chunk", type=int, metavar="N", help="take in N tokens of the prompt at a time: bounded memory")
    add(
        "--keep-quantized",
        "--keep-fp8",
        action="store_true",
        help="keep FP8 and 4-bit weights as they are, and multiply by them",
    )


def run(options: argparse.Namespace) -> int:
    import torch

    from k2kernels.model import K2Model
    from k2kernels.parallel import expert_parallel
    from k2kernels.parallel.launch import launched
    from k2kernels.text.tokenizer import load_tokenizer

    path = Path(options.checkpoint)
    if not path.is_dir():
        raise ValueError(f"{path}: must be a directory with a checkpoint")
    tokenizer = load_tokenizer(path)
    prompts = [tokenizer.encode(text) for text in _texts(options)]
    if not all(prompts):
        raise ValueError("--prompt must hold text, got an empty one")

    with launched(ep=options.ep, device=options.device) as here:
        model = K2Model.from_pretrained(
            path, device=str(here.device), keep_quantized=options.keep_quantized, mesh=here.mesh, progress=here.first
        )
        shares = [prompts[rank :: here.world_size] for rank in range(here.world_size)]
        if here.mesh is not None:
            most = max(_tokens_of_a_pass(share, options.prefill_chunk) for share in shares)
            expert_parallel(model, here.mesh, max_tokens=most)
        mine = shares[here.rank]
        width = max(map(len, mine), default=1)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in mine]).view(len(mine), width)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in mine], dtype=torch.int64).view(len(mine), width)
        stream = _Stream(tokenizer, prompts[0]) if here.first and len(prompts) == 1 else None
        started = time.perf_counter()
        tokens = model.generate(
            ids.to(here.device),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            attention_mask=mask.to(here.device),
            cache_dtype=options.cache_dtype,
            prefill_chunk=options.prefill_chunk,
            on_token=None if stream is None else lambda new: stream.add(int(new[0])),
        )
        seconds = time.perf_counter() - started
        new = [_up_to_a_stop(row, model.config.eos_token_ids) for row in tokens[:, width:].tolist()]
        of_ranks = here.gather(new)
    if not here.first:
        return 0
    new = [of_ranks[i % here.world_size][i // here.world_size] for i in range(len(prompts))]
    if stream is None:
        print("\n\n".join(tokenizer.decode(prompt + tokens) for prompt, tokens in zip(prompts, new)), end="")
    print()
    count, c = sum(map(len, new)), model.config
    latent = c.kv_lora_rank + c.qk_rope_head_dim
    expanded = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    print(
        f"[{count} tokens, {count / seconds:.0f} tokens/s; cached per token and layer: {latent} numbers "
        f"instead of {expanded} of keys and values]",
        file=sys.stderr,
    )
    return 0


def _texts(options: argparse.Namespace) -> list[str]:
    """The prompts, at least one."""
    texts = list(options.prompt)
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of the command line that Python could not decode
            raise ValueError("--prompt must be UTF-8 text, got other bytes") from None
    if options.prompts_file is not None:
        try:
            lines = Path(options.prompts_file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"--prompts-file must be UTF-8 text, got other bytes in {options.prompts_file}") from None
        texts += [line for line in lines if line]
    if not texts:
        raise ValueError("--prompt or --prompts-file must give a prompt, got none")
    return texts


def _tokens_of_a_pass(prompts: list[list[int]], chunk: int | None) -> int:
    """The most tokens of a pass over these prompts, a row each, or over the next token of each."""
    longest = max(map(len, prompts), default=0)
    return len(prompts) * (longest if chunk is None else min(max(chunk, 1), longest))


def _up_to_a_stop(tokens: list[int], stops: list[int]) -> list[int]:
    """Without the padding behind a row's stop id."""
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]


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
