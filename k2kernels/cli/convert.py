"""Convert a checkpoint between bf16 and block FP8, on a CPU, one shard at a time."""

from __future__ import annotations

import argparse


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SRC", help="directory of the checkpoint")
    command.add_argument("destination", metavar="DST", help="new directory")
    command.add_argument("--to", required=True, choices=("bf16", "fp8"))
    command.add_argument(
        "--scale-fmt", choices=("ue8m0",), help="with --to fp8: scales are powers of two, as in DeepSeek-V3.1"
    )


def run(options: argparse.Namespace) -> int:
    from k2kernels.model.convert import convert

    convert(options.source, options.destination, to=options.to, progress=True, scale_fmt=options.scale_fmt)
    print(f"wrote {options.destination}")
    return 0
