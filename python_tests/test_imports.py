"""What is imported when: `import k2kernels` and the help of the commands do without PyTorch, the ops without Dynamo."""

import compileall
import os
import resource
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import contextlib, io, sys, time

def has(name):
    return name in sys.modules

import k2kernels
from k2kernels.cli import main
for arguments in (["--version"], ["--help"], ["generate", "--help"], ["train", "--help"], ["train", "--nonsense"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(arguments)
print(sorted(name for name in ("torch", "numpy", "tqdm") if has(name)))

started = time.process_time()
import torch
of_torch = time.process_time() - started
started = time.process_time()
k2kernels.mla_decode
print((time.process_time() - started) / of_torch)
k2kernels.model.K2Model, k2kernels.parallel, k2kernels.optim
print(has("torch._dynamo"))

del sys.modules["k2kernels"], sys.modules["k2kernels._api"]
import k2kernels  # with PyTorch there already
print(has("k2kernels._api"))
"""


def test_what_is_imported_when():
    root = Path(__file__).parents[1]
    compileall.compile_dir(root / "k2kernels", quiet=1)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    early, share, dynamo, ops = done.stdout.splitlines()
    assert early == "[]"
    assert dynamo == "False"
    assert ops == "True"
    assert float(share) < 0.25  # 0.05 to 0.1 where it was measured; Dynamo would be another 0.9


def test_the_version_takes_no_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "k2kernels", "--version"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.startswith("k2kernels ") and done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
