"""Measures on a GPU the shapes of the benchmarks' `gpu_cases()`, of ours and the peers found, and the launch path.

    python bench/gpu.py [OP ...] [--results bench/results/gpu.jsonl]

Appends one JSON line per figure, prints a table, and draws the plots for which there are results (pictures.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import pictures
import torch

from k2kernels.testing.bench import measure, measure_ceilings, measure_host, table

HERE = Path(__file__).parent


def modules(ops: list[str]) -> dict[str, ModuleType]:
    """<op> -> bench_<op>.py, for all ops if none is named."""
    found = {}
    for path in sorted(HERE.glob("bench_*.py")):
        op = path.stem.removeprefix("bench_")
        if not ops or op in ops:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            found[op] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found[op])
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
    found = modules(options.ops)
    cases = [case for module in found.values() if hasattr(module, "gpu_cases") for case in module.gpu_cases()]
    calls = found["launch"].calls(device) if "launch" in found else {}
    lines, host = [], []
    with open(options.results, "a") as file:
        for line in itertools.chain(measure_host(calls, device), measure(cases, ceilings, device)):
            file.write(json.dumps(dataclasses.asdict(line)) + "\n")
            file.flush()  # an interrupted run keeps its results
            (host if line.who == "host" else lines).append(line)
    if host:
        print("launch path: " + ", ".join(f"{line.op} {line.us:.1f} us" for line in host))
    print(table(lines))
    if importlib.util.find_spec("matplotlib"):
        for path in pictures.draw(options.results, HERE.parent / "docs"):
            print(f"drawn: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
