"""Chat with a checkpoint in the terminal.

/reset forgets the conversation, Ctrl-C stops an answer, Ctrl-D or /exit ends. The model is one that was trained for
turns: its directory has a chat template, or a tokenizer with the tokens of Kimi-K2's.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from k2kernels.cli.serve import add_model_arguments, load, open_checkpoint


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_model_arguments(command)
    add = command.add_argument
    add("--system", metavar="TEXT", help="the system's message")
    add("--max-new-tokens", type=int, metavar="N", help="of an answer (default: what the context has room for)")
    add("--temperature", type=float, default=0.7, help="0: greedy")
    add("--top-p", type=float)
    add("--seed", type=int)


def run(options: argparse.Namespace) -> int:
    from k2kernels.cli.flags import Flags
    from k2kernels.engine import Sampling
    from k2kernels.engine.options import check_sampling
    from k2kernels.text.chat import load_chat
    from k2kernels.text.stream import TextStream

    flags, drawing = Flags("chat"), {name: getattr(options, name) for name in ("temperature", "top_p", "seed")}
    check_sampling(flags, **drawing)
    path, config, tokenizer = open_checkpoint(options)
    if options.max_new_tokens is not None:
        flags.integer("max_new_tokens", options.max_new_tokens, 1, config.max_position_embeddings - 1)
    chat = load_chat(path, tokenizer)
    stops = {*config.eos_token_ids, *chat.ends}
    sampling = Sampling(max_new_tokens=options.max_new_tokens, **drawing, eos_token_ids=stops)
    engine = load(options, path)
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    history = list(system)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited

    with engine:
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                print()
                return 0
            if text in ("/exit", "/quit"):
                return 0
            if text == "/reset":
                history = list(system)
            if not text or text == "/reset":
                continue
            asked = [*history, {"role": "user", "content": text}]
            try:
                request = engine.submit(chat.encode(asked), sampling=sampling)
            except ValueError as error:  # such as a conversation beyond the context
                print(f"{error}; /reset begins anew", file=sys.stderr)
                continue
            stream, answer = TextStream(tokenizer), ""
            try:
                for token in request:
                    new = "" if token in request.stops else stream.add(token)
                    print(new, end="", flush=True)
                    answer += new
            except KeyboardInterrupt:
                request.cancel()
            except RuntimeError as error:
                raise ValueError(str(error)) from None
            rest = stream.finish()
            print(rest)
            history = [*asked, {"role": "assistant", "content": answer + rest}]
