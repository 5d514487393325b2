"""What the tests of moe's kernels share."""

import contextlib
import math

import pytest
import torch

import k2kernels
from k2kernels.ops.moe import moe_dispatch
from k2kernels.testing.inputs import expert_indices

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


SCHEDULES = [("sm_80", 0), ("sm_90a", 1), ("sm_80", 2), ("sm_90a", 3)]


CANARY = 0xAB


in_all_schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s[0]}-{s[1]}")


@contextlib.contextmanager
def kernels(schedule, launches=None):
    """The kernels in that schedule; they must have been launched, `launches` times."""
    before = k2kernels.launch_count()
    with k2kernels.emulated(schedule[0], seed=schedule[1]):
        yield
    launched = k2kernels.launch_count() - before
    assert launched == launches if launches is not None else launched > 0


def bits(x):
    return x.contiguous().view(torch.uint8)


def same(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(bits(got), bits(want))


def make_handle(tokens, experts, top_k, alignment=4, skew="some dropped", capacity=None):
    indices, weights = expert_indices(skew, tokens, top_k, experts), torch.randn(tokens, top_k)
    weights[indices < 0] = math.nan  # of no consequence
    return moe_dispatch(
        torch.zeros(tokens, 1), indices, weights, num_experts=experts, alignment=alignment, capacity=capacity
    ).handle


def rows_of(handle, hidden, dtype):
    """Rows of all slots; what is padding is NaN."""
    y = torch.randn(len(handle.token_of_slot), hidden).to(dtype)
    y[handle.token_of_slot < 0] = math.nan
    return y
