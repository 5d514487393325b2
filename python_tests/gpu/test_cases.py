"""The cases of `make gpu`, checked without a GPU."""

import pytest
import torch
from test_on_gpu import EACH

from k2kernels.ops._register import OPS


def test_every_op_with_a_kernel_is_run_on_other_streams_in_graphs_and_compiled():
    served = {name for name, op in OPS.items() if op.has_kernel}
    assert served - {"scale_rows"} == set(EACH)  # the example of CONTRIBUTING.md, where its tests ran before


@pytest.mark.parametrize("op", EACH)
def test_the_call_is_of_this_op(op):
    function, arguments = EACH[op]
    inputs = arguments()
    assert all(isinstance(t, torch.Tensor) for t in inputs)
    with torch.profiler.profile() as profile:
        function(*inputs)
    assert f"k2kernels::{op}" in {event.name for event in profile.events()}
