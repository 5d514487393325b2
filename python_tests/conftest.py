"""Fixtures of every test: a seed of its own, one thread, poisoned memory, and with K2K_SANITIZE sanitized kernels."""

import os
import sys
import zlib
from pathlib import Path

import pytest
import torch

if os.environ.get("K2K_SANITIZE"):
    sys.path.insert(0, str(Path(__file__).parent / "emulator"))
    from emulated_kernels import emulated_module

    import k2kernels

    k2kernels._emu = sys.modules["k2kernels._emu"] = emulated_module()


@pytest.fixture(autouse=True)
def _seed_and_thread(request):
    """A seed made from the test's name: alone or in the suite it sees the same numbers. And one thread: the sizes are
    small, and threads that wait for each other cost more than they save."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poisoned_memory(request):
    """New memory is NaN, or the largest integer: what reads a workspace or a result before it is written computes
    nonsense or leaves its arrays, where the emulator stops it. On a GPU PyTorch's
    deterministic mode would change what is tested."""
    poison = request.node.get_closest_marker("gpu") is None
    torch.use_deterministic_algorithms(poison, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
