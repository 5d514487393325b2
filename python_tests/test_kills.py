"""kill -9 at random times, a few of each here; `make kills` does 30."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("K2K_KILLS", "4"))
SCRIPT = Path(__file__).with_name("kill_checks.py")


@pytest.mark.parametrize(
    "what, kills",
    [("save", KILLS), ("exchange", 60), ("convert", KILLS), ("resume", 60), ("train", KILLS if KILLS > 4 else 2)],
)
def test_nothing_is_lost_and_the_next_run_works(what, kills, tmp_path):
    command = [sys.executable, str(SCRIPT), what, str(kills), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "whole", done.stdout + done.stderr
