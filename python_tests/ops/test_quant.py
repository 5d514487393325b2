import pytest
import torch
import torch.nn.functional as F

import k2kernels
from k2kernels.ops import quant
from k2kernels.testing.compare import check_close, check_op


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_swiglu_is_silu_gate_times_up(dtype):
    gate_up = torch.randn(5, 3, 64).to(dtype)
    exact = gate_up.double()
    want = F.silu(exact[..., :32]) * exact[..., 32:]
    check_close(k2kernels.swiglu(gate_up), want, same_precision=F.silu(gate_up[..., :32]) * gate_up[..., 32:])


def test_swiglu_gradient():
    gate_up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(k2kernels.swiglu, gate_up)


def test_swiglu_registration():
    gate_up = torch.randn(4, 16, requires_grad=True)
    check_op(quant._swiglu, (gate_up,), differentiable=True, compiled=lambda: k2kernels.swiglu(gate_up))


def test_swiglu_bad_arguments():
    with pytest.raises(ValueError, match=r"swiglu: gate_up must be even in its last axis, got \[2, 3\]"):
        k2kernels.swiglu(torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"swiglu: gate_up must be .* float32 or .*, got \[4\] int64"):
        k2kernels.swiglu(torch.arange(4))
