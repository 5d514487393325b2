"""Rotary position embedding with YaRN, in the layout that transformers gives the family's checkpoints.

Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from k2kernels.model.config import K2Config
from k2kernels.model.linear import Float32Buffers


class Rope(Float32Buffers):
    """Angles of the rotary embedding: `rope(positions)` gives cosines and sines, each float32 [N, rope_dim / 2]."""

    def __init__(self, config: K2Config):
        super().__init__()
        self.config = config
        frequency = torch.empty(config.qk_rope_head_dim // 2, dtype=torch.float32)
        self.register_buffer("inverse_frequency", frequency, persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        config = self.config
        frequency = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
        self.inverse_frequency.copy_(frequency)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[:, None].float() * self.inverse_frequency
        factor = self.config.rope_attention_factor
        return angle.cos() * factor, angle.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """Rotates pairs of the last axis by the angles of their token.

    Args:
        x: [N, R] (a key shared by the heads) or [N, H, R].
        cos, sin: float32 [N, R/2]. The rotation is computed in float32 (float64 stays) and rounded once.
        interleaved: pairs are (0,1), (2,3) ... as in K2's and DeepSeek-V3's weights; else (0,R/2), (1,R/2+1) ...

    Returns:
        x's shape and dtype, all first members of the pairs before all second ones, for either value of `interleaved`.
        Queries, keys and cached rotary keys share that order, so their products do not depend on it.
    """
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def inverse_frequencies(dim: int, theta: float, scaling: dict[str, Any] | None) -> Tensor:
    """Radians per position of each pair, float32 [dim / 2]; `scaling` is K2Config.rope_scaling.

    YaRN keeps the frequencies that turn more than `beta_fast` times within the original context, divides those that
    turn less than `beta_slow` times by `factor`, and blends linearly in between. Kimi-K2 has beta_fast = beta_slow = 1,
    which leaves a step.
    """
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is None:
        return frequency

    def pair_that_turns(times: float) -> float:
        wavelengths = scaling["original_max_position_embeddings"] / (2 * math.pi * times)
        return dim * math.log(wavelengths) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling["beta_fast"]), pair_that_turns(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    slowed = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequency / scaling["factor"] * slowed + frequency * (1 - slowed)
