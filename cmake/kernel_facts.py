#!/usr/bin/env python3
"""Collects the messages of ptxas about each kernel, kept by nvcc_log.py, into one JSON file.

kernel_facts.py RESULT OBJECT...: a list of {kernel, arch, registers, shared_bytes, stack_bytes, spill_bytes}.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path


def facts(log: str) -> list[dict]:
    """The facts of one log: a line with a kernel's name and architecture precedes its facts."""
    found = []
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            found.append({"kernel": match[1], "arch": match[2], "registers": 0, "shared_bytes": 0})
            found[-1].update(stack_bytes=0, spill_bytes=0)
        elif not found or "Function properties for" in line:
            continue
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, match.groups())
            found[-1].update(stack_bytes=max(stack, found[-1]["stack_bytes"]))
            found[-1]["spill_bytes"] += stores + loads
        elif match := re.search(r"Used (\d+) registers", line):
            found[-1]["registers"] = int(match[1])
            if match := re.search(r"(\d+) bytes smem", line):
                found[-1]["shared_bytes"] = int(match[1])
    return found


def readable(names: list[str]) -> list[str]:
    """C++ names without their parameters, or the names as they are where no c++filt is installed."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool or not names:
        return names
    plain = subprocess.run([tool], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    return [re.sub(r"\(anonymous namespace\)::|^void |\((?!anonymous).*$", "", line) for line in plain.splitlines()]


if __name__ == "__main__":
    logs = [Path(f"{made}.ptxas") for made in sys.argv[2:]]
    kernels = [fact for log in logs for fact in facts(log.read_text())]
    for fact, name in zip(kernels, readable([fact["kernel"] for fact in kernels])):
        fact.update(kernel=name, symbol=fact["kernel"])
    Path(sys.argv[1]).write_text(json.dumps(sorted(kernels, key=lambda f: (f["kernel"], f["arch"])), indent=1) + "\n")
