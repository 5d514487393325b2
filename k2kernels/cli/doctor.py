"""Show versions, devices, what was compiled, and which implementation each op would use, and why."""

from __future__ import annotations

import argparse
import json
import sys


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="the same, for programs")


def run(options: argparse.Namespace) -> int:
    from k2kernels._info import info

    facts = info()
    if options.json:
        json.dump(facts, sys.stdout, indent=2)
        print()
        return _code(facts)
    torch, extension = facts["torch"], facts["extension"]
    print(f"k2kernels  {facts['version']} on Python {facts['python']}, {facts['platform']}")
    print(f"torch      {torch['version']}, CUDA {torch['cuda'] or 'none'}, {torch['threads']} CPU threads")
    if "error" in extension:
        print(f"extension  missing: {extension['error']}")
    else:
        archs = ", ".join(extension["cuda_archs"]) or "no CUDA kernels"
        print(f"extension  {extension['build_type']}, compiler {extension['compiler']}, {archs}")
        print(f"           self-check (all 256 e4m3 codes): {extension['self_check']}")
    emulator = facts["emulator"]
    print(f"emulator   {'missing: ' + emulator['error'] if 'error' in emulator else 'built'}")
    if (gpus := facts["conformance"]) is not None:
        print(f"           conformance: {'recorded on ' + ', '.join(gpus) if gpus else 'not recorded on a GPU yet'}")
    print(f"nvcc       {facts['nvcc'] or 'not found (needed only to compile CUDA kernels)'}")
    for device in facts["devices"]:
        code = f"runs {device['code']}" if device["code"] else "no kernel is compiled for it"
        print(f"device     {device['name']}, {device['capability']}, {device['memory'] / 2**30:.0f} GiB: {code}")
    if not facts["devices"]:
        print("device     CPU only")
    print("packages   " + ", ".join(f"{name} {version or '-'}" for name, version in facts["packages"].items()))
    print("\nop                                CPU        CUDA       why")
    for name, served in facts["ops"].items():
        print(f"{name:<33} {served['cpu']:<10} {served['cuda']:<10} {served['why']}")
    _print_kernels(facts["kernels"])
    _print_plans(facts["fp8_gemm"], here=bool(facts["devices"]))
    return _code(facts)


def _print_kernels(kernels: list[dict]) -> None:
    names = [kernel["kernel"].replace("k2k::", "") for kernel in kernels]
    width = max(map(len, names), default=0)
    if kernels:
        print(f"\n{'kernel':<{width}} arch    registers  shared  stack  spilled (bytes; shared: of a block)")
    for name, kernel in zip(names, kernels):
        asked = kernel["dynamic_shared_bytes"]
        shared = "?" if asked is None else kernel["shared_bytes"] + asked
        columns = "{arch:<7} {registers:>9}  {shared:>6}  {stack_bytes:>5}  {spill_bytes:>7}"
        print(f"{name:<{width}} {columns.format(shared=shared, **kernel)}")


def _print_plans(facts: dict, here: bool) -> None:
    """What serves Kimi-K2's linear layers, a table for each device."""
    pinned = facts["pinned"]
    if "error" in facts:
        print(f"\nfp8_gemm   no GEMM will start: {facts['error']}")
    elif pinned is not None:
        print(f"\nfp8_gemm   {_plan(pinned)} serves every size: K2KERNELS_FP8_GEMM pins it")
    for device in dict.fromkeys(row["device"] for row in facts["plans"]):
        rows = [row for row in facts["plans"] if row["device"] == device]
        where = device if here else f"{device}, of which none is here"
        print(f"\nfp8_gemm on {where}: tile, /a or /b which two blocks share, x2 .. parts of K")
        table = [["linear layer (N, K)", *(f"M={m}" for m in rows[0]["of_rows"])]]
        table += [["{linear} ({n}, {k})".format(**row), *map(_plan, row["of_rows"].values())] for row in rows]
        widths = [max(map(len, column)) for column in zip(*table)]
        for row in table:
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())


def _plan(plan: dict) -> str:
    share = f" /{plan['share']}" if plan["share"] else ""
    split = f" x{plan['split']}" if plan["split"] > 1 else ""
    return plan["kernel"] + share + split


def _code(facts: dict) -> int:
    checks = (facts[module].get("self_check", "") for module in ("extension", "emulator"))
    return 1 if any(check.startswith("FAILED") for check in checks) else 0
