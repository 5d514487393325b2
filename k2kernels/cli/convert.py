"""Convert a checkpoint between bf16, block FP8 and 4-bit experts (INT4, MXFP4), on a CPU, one shard at a time.

A conversion that was interrupted goes on behind its whole shards when it is called again with the same arguments.
"""

from __future__ import annotations

import argparse


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SRC", help="directory of the checkpoint")
    command.add_argument("destination", metavar="DST", help="new directory")
    command.add_argument("--to", required=True, choices=("bf16", "fp8", "int4", "mxfp4"))
    command.add_argument(
        "--scale-fmt", choices=("ue8m0",), help="with --to fp8: scales are powers of two, as in DeepSeek-V3.1"
    )
    command.add_argument(
        "--q-min",
        type=int,
        choices=(-7, -8),
        default=-7,
        help="with --to int4: -7 (Kimi's grid), or -8 (amax / 7.5)",
    )
    command.add_argument(
        "--scale-rule", choices=("even", "floor"), default="even", help="with --to mxfp4: how scales are rounded"
    )


def run(options: argparse.Namespace) -> int:
    from k2kernels.model.convert import convert

    convert(
        options.source,
        options.destination,
        to=options.to,
        progress=True,
        scale_fmt=options.scale_fmt,
        q_min=options.q_min,
        scale_rule=options.scale_rule,
    )
    print(f"wrote {options.destination}")
    return 0
