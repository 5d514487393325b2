"""Joining the processes of torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from k2kernels.parallel.launch import VARIABLES, launched

SCRIPT = """
import torch.distributed as dist
from k2kernels.parallel.launch import launched
with launched(ep=None) as here:
    assert dist.get_backend() == "gloo" and here.mesh.mesh_dim_names == ("pp", "dp", "ep")
    assert here.mesh.mesh.tolist() == [[[0, 1]]] and here.first == (here.rank == 0)
    assert here.gather(f"rank {here.rank}") == ["rank 0", "rank 1"]
assert not dist.is_initialized()
with launched(ep=1) as here:
    assert here.mesh.mesh.tolist() == [[[0], [1]]]
    if here.first:
        print("joined twice")
"""


def torchrun(arguments, ranks=2, **environment):
    """What `torchrun --nproc-per-node ranks arguments` prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *map(str, arguments)]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_processes_of_torchrun_join_and_leave(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = torchrun([tmp_path / "script.py"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "joined twice\n"


def test_one_process_needs_no_group(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with launched(ep=None) as here:
        assert (here.rank, here.world_size, here.mesh, here.device.type) == (0, 1, None, "cpu")
        assert here.first and here.gather("mine") == ["mine"]
    with pytest.raises(ValueError, match="ep must be 1 in one process, got 2; start several with torchrun"):
        with launched(ep=2):
            pass


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(ep=3), "ep must divide the 4 processes of a pipeline stage, got 3"),
        (dict(pp=2, ep=4), "ep must divide the 2 processes of a pipeline stage, got 4"),
        (dict(pp=3), "pp must divide the 4 processes, got 3"),
        (dict(device="meta"), "device must be 'cpu' or 'cuda' for several processes, got 'meta'"),
        (dict(device="cuda:1"), "device must be 'cpu' or 'cuda' for several processes, got 'cuda:1'"),
    ],
)
def test_bad_sizes_are_refused_before_anyone_waits(options, message, monkeypatch):
    for name, value in zip(VARIABLES, ("0", "4", "0", "localhost", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        with launched(**options):
            pass
