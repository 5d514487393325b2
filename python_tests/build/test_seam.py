"""What crosses from Python to C++: tensors as themselves, through PyTorch's DLPack C exchange interface."""

import pytest
import torch

import k2kernels
from k2kernels import _emu


def swiglu(gate_up):
    hidden = torch.full((gate_up.shape[0], gate_up.shape[1] // 2), torch.nan, dtype=gate_up.dtype)
    _emu.configure(80, 0)
    assert _emu.swiglu(gate_up, hidden) == (1 if hidden.numel() else 0)
    return hidden


X = torch.randn(3, 32)
WIDE = torch.randn(3, 64)


@pytest.mark.parametrize(
    "x",
    [
        X,
        WIDE[:, :32],
        WIDE[1:, 32:],
        torch.nn.Parameter(X),
        X.clone().requires_grad_() * 2,
        X.bfloat16(),
        X.half(),
        torch.empty(0, 32),
    ],
    ids=["plain", "strided", "offset", "parameter", "in a graph", "bfloat16", "float16", "empty"],
)
def test_a_tensor_is_read_as_it_is(x):
    torch.testing.assert_close(swiglu(x), k2kernels.swiglu(x.detach()), rtol=1e-2, atol=1e-3)


def test_an_inference_tensor_is_read():
    with torch.inference_mode():
        x = X * 2
        torch.testing.assert_close(swiglu(x), k2kernels.swiglu(x))


@pytest.mark.parametrize("x", ["x", 3, None, [[1.0, 2.0]], torch.zeros(2, 32, device="meta")], ids=str)
def test_what_is_no_tensor_in_memory_is_refused(x):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _emu.swiglu(x, X)


def test_a_dtype_that_no_kernel_takes_is_refused():
    with pytest.raises(ValueError, match="no kernel takes a tensor of this dtype"):
        _emu.swiglu(X.double(), X.double())


def test_a_tensor_outlives_the_call_that_reads_it():
    """Sizes and strides are read in place: they belong to the tensor, which the call's arguments keep alive."""
    want = k2kernels.swiglu(X.clone())
    for _ in range(100):
        torch.testing.assert_close(swiglu(X.clone()), want)
