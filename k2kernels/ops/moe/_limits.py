"""Limits of the kernels of this package, and conversions and checks that its ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def unserved(dtypes: dict[str, torch.dtype], sizes: dict[str, tuple[int, int]]) -> str | None:
    """Names the first of `dtypes` that is float64, or of `sizes` (size, limit) that is too large for the kernels."""
    for name, dtype in dtypes.items():
        if dtype == torch.float64:
            return f"{name} must be float32, bfloat16 or float16 for the kernels, got float64"
    for name, (size, most) in sizes.items():
        if size > most:
            return f"{name} must be at most {most} for the kernels, got {size}"
    return None


def float32(x: Tensor | None) -> Tensor | None:
    """x, contiguous and in float32; not copied where it is already."""
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
