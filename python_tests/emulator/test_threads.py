"""Emulated launches in several threads of a process, with faults in some of them and interrupts in between."""

import contextvars
import functools
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import k2kernels as k
from k2kernels import _backend

# A process of its own: what goes wrong ends the process.
BEGIN = """
import ctypes, faulthandler, mmap, os, signal, sys, threading, time, warnings
import numpy as np
import torch
import k2kernels as k
from k2kernels.ops._launch import launch, why_not_emulated

def caught():
    return [line for line in open("/proc/self/status") if line.startswith("SigCgt")]

def handled():  # which of the signals of faults have a handler
    mask = int(caught()[0].split()[1], 16)
    return [n for n in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL) if mask >> n - 1 & 1]

x = torch.randn(8, 256)
want = k.quantize_1x128(x)
warnings.simplefilter("ignore")  # of memory that is not writable
page = np.frombuffer(mmap.mmap(-1, 2**16, prot=mmap.PROT_READ), np.float32)
closed = torch.from_numpy(page)[:1024].view(8, 128)  # kernels must not write there
assert why_not_emulated() is None
errors = []

def good(times, arch="sm_80"):
    for seed in range(times):
        with k.emulated(arch, seed=seed % 4):
            got = k.quantize_1x128(x)
        if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want)):
            errors.append("another result")

def fault(times):
    for seed in range(times):
        with k.emulated("sm_80", seed=seed % 4):
            try:
                launch("swiglu", x, closed)
            except RuntimeError as error:
                if "access outside every allocation" not in str(error):
                    errors.append(error)
            else:
                errors.append("no error")

def run(*threads):
    threads = [threading.Thread(target=f, args=a) for f, *a in threads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[:3]
"""


def process(script: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *options, "-c", BEGIN + script]
    here = Path(__file__).parent
    return subprocess.run(command, capture_output=True, text=True, cwd=here, timeout=300)


def test_faults_beside_launches_of_other_threads():
    """Each is the error of its own launch, and the handlers afterwards are those from before."""
    done = process("""
before = handled()
for _ in range(3):
    run((good, 30), (fault, 30), (good, 30, "sm_90a"), (fault, 30))
assert handled() == before == [], (handled(), before)
good(2)
print("ended")
""")
    assert done.returncode == 0 and "ended" in done.stdout, (done.returncode, done.stderr)


def test_a_fault_that_is_not_a_kernels_reaches_the_handler_from_before():
    done = process("faulthandler.enable(); run((good, 30), (good, 30), (fault, 30)); ctypes.string_at(0)")
    assert done.returncode == -11 and "Fatal Python error: Segmentation fault" in done.stderr, done
    during = "threading.Thread(target=good, args=(10**9,), daemon=True).start(); time.sleep(0.3); ctypes.string_at(0)"
    done = process(during)
    assert done.returncode == -11 and done.stderr == "", done


def test_two_copies_of_the_emulator_in_a_process():
    """The library of the test kernels has handlers of its own; each copy's faults find their launch."""
    done = process("""
from emulated_kernels import EmulatorError, run as run_test_kernel

def other(times):
    a, b, c = np.zeros((70, 64), np.uint16), np.zeros((40, 64), np.uint16), np.zeros((70, 40), np.float32)
    for seed in range(times):
        try:
            run_test_kernel("gemm_mma", a, b, c, 70, 40, 64, seed=seed % 4, bug=5)
        except EmulatorError as error:
            if "access beyond a global allocation" not in str(error):
                errors.append(error)
        else:
            errors.append("no error")

for _ in range(3):
    run((good, 20), (fault, 20), (other, 10))
good(1)
print("ended", handled())
""")
    assert done.returncode == 0 and "ended" in done.stdout, (done.returncode, done.stderr)


def test_interrupts_during_launches_and_faults():
    """Ctrl-C waits for the end of the main thread's kernel; threads are not disturbed, and later launches are right."""
    done = process("""
faulthandler.dump_traceback_later(240, exit=True)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored

def interrupt(taken):  # again after 5 s: Python drops one that arrives in a destructor or in the callback of a weakref
    os.kill(os.getpid(), signal.SIGINT)
    while not taken.wait(5):
        os.kill(os.getpid(), signal.SIGINT)

threads = [threading.Thread(target=f, args=(a,)) for f, a in ((good, 60), (fault, 60))]
for thread in threads:
    thread.start()
interrupted = 0
for i in range(20):
    taken = threading.Event()
    timer = threading.Timer(0.002 * i, interrupt, (taken,))
    try:
        timer.start()
        while True:
            good(1)
            fault(1)
    except KeyboardInterrupt:
        interrupted += 1
    taken.set()
    timer.join()
for thread in threads:
    thread.join()
good(3)
assert not errors, errors[:3]
assert interrupted == 20 and handled() == [], (interrupted, handled())
print("ended")
""")
    assert done.returncode == 0 and "ended" in done.stdout, (done.returncode, done.stderr)


def modes_in_threads(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_the_mode_is_that_of_a_context():
    """Threads begin without it; a copied context, as asyncio.to_thread makes one, carries it."""
    with k.emulated("sm_90a", seed=3):
        assert modes_in_threads(_backend.mode) == _backend.Mode()
        assert modes_in_threads(functools.partial(contextvars.copy_context().run, _backend.mode)).arch == "sm_90a"
    assert _backend.mode() == _backend.Mode()


def test_a_mode_may_be_entered_again_and_is_left_where_it_was_entered():
    mode = k.emulated("sm_90a")
    for _ in range(2):
        with mode, k.backend("reference"), mode:
            assert _backend.mode().arch == "sm_90a"
        assert _backend.mode() == _backend.Mode()

    @mode
    def decorated():
        return _backend.mode().arch

    assert decorated() == decorated() == "sm_90a"
    with mode:

        def leave():
            with pytest.raises(RuntimeError, match="must be left in the thread, or the task, that entered it"):
                mode.__exit__(None, None, None)

        modes_in_threads(leave)
        assert _backend.mode().arch == "sm_90a"
    assert _backend.mode() == _backend.Mode()
