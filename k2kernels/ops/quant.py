"""Block quantisation to e4m3, and SwiGLU: the public functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments
from k2kernels.ops._register import register
from k2kernels.reference import quant as reference


def swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU: silu(gate) * up.

    Args:
        gate_up: [..., 2I], gate in the first half of the last axis; float32, bfloat16, float16 or float64.

    Returns:
        [..., I] in gate_up's dtype, computed in float32 (float64 for float64) and rounded once. Differentiable.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    args = Arguments("swiglu")
    gate_up = args.tensor("gate_up", gate_up, ("...", "2I"), FLOATS)
    args.require(gate_up.shape[-1] % 2 == 0, "gate_up", "even in its last axis", list(gate_up.shape))
    return _swiglu(gate_up)


def _swiglu_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _swiglu_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _swiglu_grad(ctx: Any, grad: Tensor) -> Tensor:
    return _swiglu_backward(grad, *ctx.saved_tensors)


_swiglu = register(
    "swiglu(Tensor gate_up) -> Tensor",
    reference=reference.swiglu,
    fake=_swiglu_fake,
    setup_context=_swiglu_setup,
    backward=_swiglu_grad,
)
_swiglu_backward = register(
    "swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor",
    reference=reference.swiglu_backward,
    fake=lambda grad, gate_up: gate_up.new_empty(gate_up.shape),
)
