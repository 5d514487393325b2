"""Print parameters, cache bytes per token and what fits where, of a preset or a checkpoint.

With --gpus and --gpu: which kinds of weights (BF16, FP8, INT4, MXFP4) fit there, and what is left for the cache. With
--train or --serve too: which layouts over these GPUs fit, and what each rank holds. Of a checkpoint of another family,
what its files hold.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", metavar="DIR|PRESET", help="kimi-k2, kimi-k2-thinking, deepseek-v3 ..., or a directory"
    )
    command.add_argument("--gpus", type=int, metavar="N", help="plan for N GPUs")
    command.add_argument("--gpu", metavar="NAME|GB", help="h100, h200, b200, a100-80, 4090 ..., or its memory in GB")
    mode = command.add_mutually_exclusive_group()
    mode.add_argument("--train", dest="mode", action="store_const", const="train", help="plan a training run")
    mode.add_argument("--serve", dest="mode", action="store_const", const="serve", help="plan generation")
    command.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages (default 1)")
    command.add_argument("--ep", type=int, metavar="N", help="show the layout with experts over N ranks")
    command.add_argument(
        "--sharding", metavar="HOW", help="show this one: replicated, optimizer, dense-fsdp or fsdp (training)"
    )
    command.add_argument("--tokens", type=int, metavar="N", help="of a rank in one pass (4096; 512 with --serve)")
    command.add_argument("--cache-tokens", type=int, metavar="N", help="of a rank, with --serve (default 131072)")
    command.add_argument("--fp8", action="store_true", help="train with FP8 products, or serve weights kept in FP8")
    command.add_argument("--w4", choices=("int4", "mxfp4"), help="routed experts kept in 4 bits, with --serve")
    command.add_argument("--fp8-cache", action="store_true", help="rows of the cache in FP8, with --serve")
    command.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="one NVLink domain (default 8)")


def run(options: argparse.Namespace) -> int:
    from k2kernels.model.capacity import capacity

    counted_alone = options.gpus is None and options.gpu is None and options.mode is None
    if counted_alone and (held := _other_family(options.model)):
        print(held)
        return 0
    config = _config(options.model)
    if counted_alone:
        print(capacity(config).format())
        return 0
    for name, value in (("--gpus", options.gpus), ("--gpu", options.gpu)):
        if value is None:
            raise ValueError(f"info: {name} must be given for a plan, got none; see k2kernels info --help")
    from k2kernels.parallel.planner import Workload, gpu_bytes, plan
    from k2kernels.parallel.planner_table import table

    if options.mode is None:
        print(capacity(config).format_on(options.gpus, gpu_bytes(options.gpu, "info")))
        return 0
    serve = options.mode == "serve"
    workload = Workload(
        mode=options.mode,
        tokens=(512 if serve else 4096) if options.tokens is None else options.tokens,
        fp8=options.fp8,
        cache_tokens=(131072 if options.cache_tokens is None else options.cache_tokens) if serve else 0,
        fp8_cache=options.fp8_cache,
        gpus_per_node=options.gpus_per_node,
        w4=options.w4,
    )
    print(
        table(
            plan(config, options.gpus, options.gpu, workload, pp=options.pp, ep=options.ep, sharding=options.sharding)
        )
    )
    return 0


def _config(name: str) -> Any:
    """The sizes of a preset or a checkpoint, whatever kind of weights it has."""
    from k2kernels.model.config import CONVERTED_TYPES, K2Config, read_config_file, text_part

    if not Path(name).expanduser().exists() and "/" not in name:
        return K2Config.preset(name)
    values = read_config_file(name)
    kind = values.get("model_type")
    if kind in CONVERTED_TYPES:
        left_out = CONVERTED_TYPES[kind] and f"; {CONVERTED_TYPES[kind]} is not counted"
        print(f"{kind} is counted and converted, but not run by this package{left_out}", file=sys.stderr)
        values = {**values, "model_type": "deepseek_v3", "topk_method": "noaux_tc"}
    return K2Config.from_dict({**text_part(values)[0], "quantization_config": None})


def _other_family(name: str) -> str | None:
    """What the files of a checkpoint of another family hold, from their headers; None where it is of this one."""
    from k2kernels._backend import UnsupportedError
    from k2kernels.model.capacity import gb
    from k2kernels.model.config import CONVERTED_TYPES, read_config_file, text_part
    from k2kernels.model.shards import scan

    if not Path(name).expanduser().is_dir():
        return None
    values = read_config_file(name)
    try:
        if values.get("model_type") not in CONVERTED_TYPES:
            text_part(values)
        return None
    except (ValueError, UnsupportedError) as error:
        try:
            tensors = list(scan(name).values())
        except FileNotFoundError:
            return None
        print(f"{error}; its files hold:", file=sys.stderr)
    files = {info.file for info in tensors}
    lines = [f"{len(files):,} files, {gb(sum(file.stat().st_size for file in files))}, {len(tensors):,} tensors"]
    for dtype in sorted({info.dtype for info in tensors}):
        sizes = [math.prod(info.shape) for info in tensors if info.dtype == dtype]
        lines.append(f"  {dtype:<8} {sum(sizes):,} numbers in {len(sizes):,} tensors")
    return "\n".join(lines)
