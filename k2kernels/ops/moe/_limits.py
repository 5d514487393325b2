"""What the kernels of this package take, and how tensors come to them."""

from __future__ import annotations

import torch
from torch import Tensor


def no_float64(**tensors: Tensor | None) -> str | None:
    """Names the first of `tensors` in float64, which no kernel computes in."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} must be float32, bfloat16 or float16 for the kernels, got float64"
    return None


def too_many(name: str, got: int, most: int) -> str | None:
    """Says that `name` exceeds what the kernels take, if it does."""
    return f"{name} must be at most {most} for the kernels, got {got}" if got > most else None


def float32(x: Tensor | None) -> Tensor | None:
    """Contiguous, in float32: mostly as it is."""
    return x if x is None else (x if x.dtype == torch.float32 else x.float()).contiguous()


def check_indices(op: str, indices: Tensor, num_experts: int) -> None:
    """Raises ValueError for an index that names no expert; for `validate` of an op."""
    if indices.numel() == 0:
        return
    low, high = (int(i) for i in indices.aminmax())
    if low < -1 or high >= num_experts:
        raise ValueError(
            f"{op}: indices must be from -1 (none) to E-1={num_experts - 1}, got {low if low < -1 else high}"
        )
