"""Runs scenarios with several processes, joined by gloo: `run([("checks", 3), ...])` from a test.

One process imports everything once, then forks the ranks of each scenario, which write down what they found. Nothing
outlives its deadline.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).parent
DEADLINE = 60  # seconds for one scenario


def run(scenarios: list[tuple[str, int]]) -> dict[str, list]:
    """For each (scenario, number of ranks), as "scenario/ranks": what each rank returned, or how it ended.

    A scenario is a function of `rank_scenarios`, or of another file here: "file.function".
    """
    command = [sys.executable, str(HERE / "ranks.py"), json.dumps(scenarios)]
    paths = [str(HERE), str(HERE.parent / "model"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30 + DEADLINE * len(scenarios), env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _fork_ranks(scenario: str, world: int) -> list:
    file, _, function = scenario.rpartition(".")
    act = getattr(importlib.import_module(file or "rank_scenarios"), function)
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is poisoned, as in every test
                try:
                    result = act(rank, world, folder)
                except BaseException:
                    result = f"raised {traceback.format_exc()}"
                Path(folder, f"result{rank}").write_text(json.dumps(result))
                sys.stderr.flush()
                os._exit(0)
            pids.append(pid)
        ends, deadline = {}, time.monotonic() + DEADLINE
        while len(ends) < world:
            for rank, pid in enumerate(pids):
                if rank not in ends and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    ends[rank] = os.waitstatus_to_exitcode(ended[1])
            if time.monotonic() > deadline:
                for rank, pid in enumerate(pids):
                    if rank not in ends:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                        ends[rank] = "past the deadline"
            time.sleep(0.01)
        results = []
        for rank in range(world):
            path = Path(folder, f"result{rank}")
            results.append(json.loads(path.read_text()) if path.exists() else f"ended with {ends[rank]}")
        return results


def _main() -> None:
    import torch

    torch.set_num_threads(1)
    results = {}
    for scenario, world in json.loads(sys.argv[1]):
        results[f"{scenario}/{world}"] = _fork_ranks(scenario, world)
    print(json.dumps(results))


if __name__ == "__main__":
    _main()
