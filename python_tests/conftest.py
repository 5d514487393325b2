"""What holds for every test: its own seed, one thread, and with K2K_SANITIZE sanitized kernels in the emulator."""

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
