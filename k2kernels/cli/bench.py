"""Run the benchmarks of a source checkout (pytest-benchmark): all, or those of one op."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import k2kernels


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("op", nargs="?", metavar="OP", help="mla_decode, fp8_gemm ... (default: all)")


def run(options: argparse.Namespace) -> int:
    folder = Path(k2kernels.__file__).parent.parent / "bench"
    files = sorted(folder.glob("bench_*.py"))
    if not files:
        raise ValueError("the benchmarks are in the source checkout (bench/), which an installed package lacks")
    names = [file.stem.removeprefix("bench_") for file in files]
    if options.op is not None:
        if options.op not in names:
            raise ValueError(f"OP must be one of {', '.join(names)}, got {options.op!r}")
        files = [folder / f"bench_{options.op}.py"]
    arguments = ["--benchmark-only", "--benchmark-columns=median,iqr,rounds", "--benchmark-sort=name", "-q"]
    return subprocess.run([sys.executable, "-m", "pytest", *arguments, *map(str, files)], cwd=folder.parent).returncode
