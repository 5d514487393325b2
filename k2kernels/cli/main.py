"""Arguments of the command line, and how it fails: a message on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from k2kernels import __version__
from k2kernels._backend import UnsupportedError
from k2kernels.cli import bench, chat, convert, doctor, generate, info, serve, train

COMMANDS = {
    "doctor": doctor,
    "train": train,
    "generate": generate,
    "serve": serve,
    "chat": chat,
    "convert": convert,
    "info": info,
    "bench": bench,
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="k2kernels", description="The Kimi-K2 / DeepSeek-V3 family on CPU and GPU.")
    top.add_argument("-V", "--version", action="version", version=f"k2kernels {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        summary = module.__doc__.strip().splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(parser=command)
    _add_completion(top, commands.choices.values())
    return top


def _add_completion(top: argparse.ArgumentParser, commands: Iterable[argparse.ArgumentParser]) -> None:
    """`k2kernels --print-completion bash`, where shtab is installed."""
    try:
        import shtab
    except ImportError:
        return
    shtab.add_argument_to(top, ["--print-completion"], help="print what completes arguments in this shell")
    for command in commands:
        for action in command._actions:
            kinds = str(action.metavar or "").split("|")
            if "FILE" in kinds:
                action.complete = shtab.FILE
            elif {"DIR", "SRC", "DST"} & set(kinds):
                action.complete = shtab.DIRECTORY


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for bad input, 130 after an interrupt."""
    options, unknown = parser().parse_known_args(argv)
    if unknown:  # with the usage of the command, where argparse would print that of all
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    with warnings.catch_warnings():
        warnings.showwarning = _one_line(warnings.showwarning)
        return _run(options)


def _one_line(otherwise: Callable) -> Callable:
    """`warnings.showwarning` that prints what this package warns of as one line, once; `otherwise` shows the others."""
    package, said = str(Path(__file__).parents[1]), set()

    def show(message: Warning | str, category: type, filename: str, *rest: Any, **options: Any) -> None:
        if not filename.startswith(package):
            otherwise(message, category, filename, *rest, **options)
        elif str(message) not in said:
            said.add(str(message))
            print(f"k2kernels: {message}", file=sys.stderr)

    return show


def _run(options: argparse.Namespace) -> int:
    try:
        return COMMANDS[options.command].run(options) or 0
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("k2kernels"):
            raise
        extra = "serve" if options.command in ("serve", "chat") else "cli"
        message = (
            f"needs the package {error.name!r}; pip install 'k2kernels[{extra}]' brings all that the commands need"
        )
    except (ValueError, TypeError, UnsupportedError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):  # `k2kernels ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        message = str(error) or type(error).__name__
    except RuntimeError as error:  # PyTorch has no classes of its own for these
        if "probability tensor contains" in str(error):
            message = "the model's logits are NaN or infinite; weights or numbers in config.json are damaged"
        elif "memory" in str(error):
            message = str(error).splitlines()[0]
        else:
            raise
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    message = message.removeprefix(f"{options.command}: ")  # functions of the same name begin with it too
    print(f"k2kernels {options.command}: {message}", file=sys.stderr)
    return 2
