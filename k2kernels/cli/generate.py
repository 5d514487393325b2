"""Generate text from a checkpoint through the paged latent cache.

A prompt is continued without changes but for the BOS token that the tokenizer asks for. With --chat it is a user's
turn, in the markers of the checkpoint's chat template, and the answer alone is printed. One prompt is printed as it
grows, several at the end, in their order. Under torchrun each process reads its own experts and all other weights, and
continues its share of the prompts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="directory with config.json, *.safetensors and a tokenizer")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--prompts-file", metavar="FILE", help="more prompts, one on each line of a UTF-8 file")
    add("--file", metavar="FILE", help="one more prompt, the whole of a UTF-8 file; -: of the standard input")
    add("--chat", action="store_true", help="each prompt is a user's turn; print the answer")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add("--no-bos", action="store_true", help="no BOS token, whatever the tokenizer says")
    add("--max-new-tokens", type=int, default=128)
    add("--temperature", type=float, help="0: greedy (default: 0.7; 0 with --speculative)")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--seed", type=int, default=0)
    add(
        "--speculative", action="store_true", help="draft with the MTP layers (DeepSeek-V3); the text is the greedy one"
    )
    add("--device", default="cpu", help="cpu, cuda, ...; under torchrun cuda is a GPU for each process")
    add("--dtype", choices=DTYPES, help="of the weights (default: the checkpoint's)")
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
    texts = _texts(options)
    if not all(options.stop):
        raise ValueError("--stop must hold text, got an empty one")
    import torch

    from k2kernels.cli.flags import Flags
    from k2kernels.engine.options import check_length
    from k2kernels.model import K2Config, K2Model
    from k2kernels.model.folder import check_pointers, checkpoint_folder
    from k2kernels.parallel import expert_parallel
    from k2kernels.parallel.launch import launched
    from k2kernels.text.chat import load_chat
    from k2kernels.text.tokenizer import load_tokenizer

    path = checkpoint_folder(options.checkpoint)
    check_pointers(path, ("tokenizer.json", "tiktoken.model"))
    tokenizer = load_tokenizer(path)
    config = K2Config.from_pretrained(path)
    chosen = _chosen(options, config)
    stops = config.eos_token_ids
    if options.chat:
        chat = load_chat(path, tokenizer)
        prompts = [chat.encode([{"role": "user", "content": text}]) for text in texts]
        stops = list(dict.fromkeys([*stops, *chat.ends]))
    else:
        prompts = [tokenizer.encode(text) for text in texts]
        bos = [] if options.no_bos else tokenizer.bos
        prompts = [ids if ids[: len(bos)] == bos else bos + ids for ids in prompts]
    if not all(prompts):
        raise ValueError("--prompt must hold text, got an empty one")
    for ids in prompts:
        check_length(Flags("generate"), config, len(ids), options.max_new_tokens)

    with launched(ep=options.ep, device=options.device) as here:
        model = K2Model.from_pretrained(
            path,
            dtype=options.dtype,
            device=str(here.device),
            keep_quantized=options.keep_quantized,
            mesh=here.mesh,
            progress=here.first,
        )
        shares = [prompts[rank :: here.world_size] for rank in range(here.world_size)]
        if here.mesh is not None:
            most = max(_tokens_of_a_pass(share, options.prefill_chunk) for share in shares)
            expert_parallel(model, here.mesh, max_tokens=most)
        mine = shares[here.rank]
        width = max(map(len, mine), default=1)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in mine]).view(len(mine), width)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in mine], dtype=torch.int64).view(len(mine), width)
        shown = here.first and len(prompts) == 1
        rows = [_Row(tokenizer, text, stops, options, shown) for text in texts[here.rank :: here.world_size]]
        watch = _Watch(rows)
        started = time.perf_counter()
        try:
            model.generate(
                ids.to(here.device),
                **chosen,
                eos_token_ids=stops,
                attention_mask=mask.to(here.device),
                on_token=watch.add,
            )
        except _AllEnded:
            pass
        ended = time.perf_counter()
        of_ranks = here.gather([(row.finish(), row.count) for row in rows])
    if not here.first:
        return 0
    done = [of_ranks[i % here.world_size][i // here.world_size] for i in range(len(prompts))]
    if not shown:
        print("\n\n".join(text for text, _ in done), end="")
    print()
    count, c = sum(count for _, count in done), model.config
    latent = c.kv_lora_rank + c.qk_rope_head_dim
    expanded = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    first = watch.first or ended
    rest = (count - len(done)) / max(ended - first, 1e-9) if count > len(done) else 0
    print(
        f"[{count} tokens; the first after {first - started:.1f} s, then {rest:.0f} tokens/s; cached per token and "
        f"layer: {latent} numbers instead of {expanded} of keys and values]",
        file=sys.stderr,
    )
    return 0


def _chosen(options: argparse.Namespace, config: Any) -> dict[str, Any]:
    """The options for `K2Model.generate`, checked before any weight is read."""
    from k2kernels.cli.flags import Flags
    from k2kernels.engine.options import check_options

    names = ("max_new_tokens", "top_k", "top_p", "seed", "speculative", "cache_dtype", "prefill_chunk")
    chosen = {name: getattr(options, name) for name in names}
    default = 0.0 if options.speculative else 0.7
    chosen["temperature"] = default if options.temperature is None else options.temperature
    check_options(Flags("generate"), config, **chosen, mtp_layers=config.num_nextn_predict_layers)
    return chosen


def _texts(options: argparse.Namespace) -> list[str]:
    """The prompts, at least one."""
    texts = list(options.prompt)
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of the command line that Python could not decode
            raise ValueError("--prompt must be UTF-8 text, got other bytes") from None
    if options.prompts_file is not None:
        lines = _read("--prompts-file", options.prompts_file).splitlines()
        texts += [line for line in lines if line]
    if options.file is not None:
        texts.append(_read("--file", options.file))
    if not texts:
        raise ValueError("--prompt, --file or --prompts-file must give a prompt, got none")
    return texts


def _read(flag: str, name: str) -> str:
    if name == "-" and flag == "--file":
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--file must name a file under torchrun, whose processes share one standard input, got -")
        raw = sys.stdin.buffer.read()
    else:
        raw = Path(name).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{flag} must be UTF-8 text, got other bytes in {name}") from None


def _tokens_of_a_pass(prompts: list[list[int]], chunk: int | None) -> int:
    """The most tokens of a pass over these prompts, a row each, or over the next token of each."""
    longest = max(map(len, prompts), default=0)
    return len(prompts) * (longest if chunk is None else min(max(chunk, 1), longest))


class _AllEnded(Exception):
    """Every row has a text at which it is to end."""


class _Watch:
    """Passes new tokens to their rows, and ends `generate` when all of them have ended."""

    def __init__(self, rows: list[_Row]):
        self.rows, self.first = rows, None

    def add(self, column: Any) -> None:
        self.first = self.first or time.perf_counter()
        for row, token in zip(self.rows, column.tolist()):
            row.add(token)
        if self.rows and all(row.ended for row in self.rows):
            raise _AllEnded


class _Row:
    """A prompt and what follows it, up to a stop id or text; of --chat, the answer alone. Printed if `shown`."""

    def __init__(self, tokenizer: Any, prompt: str, ends: list[int], options: argparse.Namespace, shown: bool):
        from k2kernels.text.stream import TextStream

        self.stream, self.ends, self.shown = TextStream(tokenizer, options.stop), ends, shown
        self.answer, self.prompt = options.chat, "" if options.chat else prompt
        self.text, self.count, self.ended = "", 0, False

    def add(self, token: int) -> None:
        if self.ended:
            return
        if not self.count:
            self._say(self.prompt)
        self.count += 1
        self.ended = token in self.ends
        if not (self.ended and self.answer):
            self._say(self.stream.add(token))
        self.ended |= self.stream.stopped is not None

    def finish(self) -> str:
        self._say(self.stream.finish())
        return self.text

    def _say(self, text: str) -> None:
        self.text += text
        if self.shown:
            print(text, end="", flush=True)
