"""Measures on a GPU the shapes that the benchmarks name in `gpu_cases()`, beside the peers found.

    python bench/gpu.py [OP ...] [--results bench/results/gpu.jsonl]

Appends one JSON line per figure, prints a table, and last draws the pictures for which there are lines (pictures.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pictures
import torch

from k2kernels.testing.bench import Case, measure, measure_ceilings, table

HERE = Path(__file__).parent


def cases(ops: list[str]) -> list[Case]:
    """What bench_<op>.py offers for a GPU; all ops if none is named."""
    found = []
    for path in sorted(HERE.glob("bench_*.py")):
        if ops and path.stem.removeprefix("bench_") not in ops:
            continue
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += module.gpu_cases() if hasattr(module, "gpu_cases") else []
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "gpu.jsonl")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA device here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = measure_ceilings(device)
    rates = ", ".join(f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in ceilings.matmul.items())
    print(
        f"{torch.cuda.get_device_name(device)}: copy {ceilings.copy / 1e9:.0f} GB/s, matrix product {rates}", flush=True
    )
    lines = []
    with open(options.results, "a") as file:
        for line in measure(cases(options.ops), ceilings, device):
            file.write(json.dumps(dataclasses.asdict(line)) + "\n")
            file.flush()  # a run that is cut off keeps what it measured
            lines.append(line)
    print(table(lines))
    if importlib.util.find_spec("matplotlib"):
        for path in pictures.draw(options.results, HERE.parent / "docs"):
            print(f"drawn: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
