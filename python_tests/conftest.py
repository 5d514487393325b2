"""What holds for every test: its own seed, and one thread."""

import zlib

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed_and_thread(request):
    """A seed made from the test's name: alone or in the suite it sees the same numbers. And one thread: the sizes are
    small, and threads that wait for each other cost more than they save."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    torch.set_num_threads(1)
