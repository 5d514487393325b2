"""`k2kernels train` under torchrun: the losses of one process, a killed process, and resuming on other processes."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k2kernels.parallel import checkpoint_info
from k2kernels.train.data import read_text
from k2kernels.train.trainer import CHECKPOINTS, HISTORY_FILE

ROOT = Path(__file__).parents[2]
STEPS = 8
FLAGS = ["--batch-size", "4", "--length", "32", "--threads", "1", "--save-every", "3", "--steps", str(STEPS)]
SECONDS = 240  # for a command, on a machine that is busy with other tests
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# Losses of runs that differ in the order of float32 sums. A gradient then differs by some units in the last place of
# its largest summand, Newton-Schulz amplifies that by at most 3.4445^5 = 485 where singular values are small, so an
# update differs by less than 485 * 10 * 2^-24 = 3e-4 of itself. A step here changes the loss by less than 0.1.
BOUND = STEPS * 0.1 * 3e-4


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text([])[:40_000])
    return str(path)


def command(processes, out, text, *more):
    start = [sys.executable, "-m"]
    if processes:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [*start, "k2kernels", "train", "--out", str(out), "--text", text, *FLAGS, *more]


def train(*arguments):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=SECONDS, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def rows(out):
    found = [json.loads(line) for line in (out / HISTORY_FILE).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found]


def assert_close(got, want):
    assert len(got) == len(want) == STEPS
    for a, b in zip(got, want):
        assert abs(a["loss"] - b["loss"]) < BOUND, (a, b)
        assert a["clipped_heads"] == b["clipped_heads"] and (a["valid"] is None) == (b["valid"] is None)
        if a["valid"] is not None:
            assert abs(a["valid"] - b["valid"]) < BOUND, (a, b)
        for layer, logit in b["max_logits"].items():
            assert math.isclose(a["max_logits"][layer], logit, rel_tol=0.05), (a, b)
    assert got[0]["expert_load"] == want[0]["expert_load"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text):
    out = tmp_path_factory.mktemp("alone")
    train(0, out, text)
    return rows(out)


@pytest.fixture(scope="module")
def experts_over_two(tmp_path_factory, text):
    """Two processes that share the experts, undisturbed."""
    out = tmp_path_factory.mktemp("ep")
    done = train(2, out, text, "--ep", "2")
    assert done.stdout.count("2 processes") == 1 and done.stdout.count("held-out text") == 1  # printed once
    return out


def test_two_processes_have_the_losses_of_one(alone, experts_over_two, text, tmp_path):
    assert alone[-1]["loss"] < alone[0]["loss"] - 0.1
    assert_close(rows(experts_over_two), alone)
    assert (experts_over_two / "model.safetensors").stat().st_size > 1e6
    train(2, tmp_path / "dp", text, "--checkpoint-activations")
    assert_close(rows(tmp_path / "dp"), alone)


def test_a_killed_process_ends_the_others_and_the_run_goes_on(alone, experts_over_two, text, tmp_path):
    """torchrun names the process. Two again repeat the curve bit for bit; one is close to it."""
    out = tmp_path / "run"
    run = subprocess.Popen(
        command(2, out, text, "--ep", "2"), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    deadline = time.monotonic() + SECONDS
    while not (out / CHECKPOINTS / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    workers = [pid for pid in children if "k2kernels" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    killed = time.monotonic()
    error = run.communicate(timeout=SECONDS)[1]
    assert run.returncode != 0 and time.monotonic() - killed < 60
    assert re.search(rf"rank\s*: \d+ .*\n\s*exitcode\s*: -9 \(pid: {workers[1]}\)", error), error[-3000:]
    left = checkpoint_info(out / CHECKPOINTS)["step"]
    assert left in (3, 6)
    train(2, out, text, "--ep", "2", "--resume")
    assert rows(out) == rows(experts_over_two)


def test_a_run_goes_on_with_other_processes(alone, text, tmp_path):
    """SIGTERM to torchrun ends all after the same step, which is saved; then one process, without torchrun."""
    out = tmp_path / "run"
    run = subprocess.Popen(command(2, out, text), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + SECONDS
    while not (out / CHECKPOINTS / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=SECONDS)
    step = checkpoint_info(out / CHECKPOINTS)["step"]
    assert 3 <= step <= STEPS and len(rows(out)) == step
    train(0, out, text, "--resume")
    assert_close(rows(out), alone)


def test_the_command_of_the_readme(tmp_path):
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("torchrun ")]
    (line,) = (line for line in lines if " train " in line)
    _torchrun, *arguments = shlex.split(line, comments=True)
    out = arguments[arguments.index("--out") + 1]
    start = [sys.executable, "-m", "torch.distributed.run", *arguments]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"config.json", "model.safetensors", "tokenizer.json", "loss.png"} <= {
        f.name for f in (tmp_path / out).iterdir()
    }


def test_bad_sizes_are_refused(text, tmp_path):
    bad = command(2, tmp_path, text, "--batch-size", "3")
    done = subprocess.run(bad, capture_output=True, text=True, timeout=SECONDS, env=ENVIRONMENT)
    assert done.returncode != 0
    assert "k2kernels train: --batch-size must be a multiple of the 2 processes, got 3" in done.stderr
