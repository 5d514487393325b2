"""Print parameters, cache bytes per token and what fits where, of a preset or a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", metavar="DIR|PRESET", help="kimi-k2, deepseek-v3, moonlight-16b-a3b, tiny, or a directory"
    )


def run(options: argparse.Namespace) -> int:
    from k2kernels.model.capacity import capacity
    from k2kernels.model.config import K2Config

    is_path = Path(options.model).exists()
    config = K2Config.from_pretrained(options.model) if is_path else K2Config.preset(options.model)
    print(capacity(config).format())
    return 0
