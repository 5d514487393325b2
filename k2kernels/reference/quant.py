"""Block quantisation to e4m3, and SwiGLU: the definitions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2I], gate first; computed in float32 (float64 stays), one rounding."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of `swiglu`: [..., I] and [..., 2I] give [..., 2I]."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    grad = grad.to(gate.dtype)
    sigmoid = torch.sigmoid(gate)
    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([d_gate, grad * gate * sigmoid], dim=-1).to(gate_up.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
