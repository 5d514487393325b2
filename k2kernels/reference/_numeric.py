"""The precision that references compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where it is float64 already."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in the `wide_dtype` of its dtype."""
    return x.to(wide_dtype(x.dtype))
