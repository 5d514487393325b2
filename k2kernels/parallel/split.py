"""Which experts are where."""

from __future__ import annotations

import torch
from torch import Tensor


class Split:
    """E experts over W ranks, in order; where W does not divide E the first ranks have one more (384 over 5: 77, 77,
    77, 77, 76).

    Attributes: num_experts, world_size, rank; first_expert and num_local_experts of this rank.
    """

    def __init__(self, num_experts: int, world_size: int, rank: int):
        self.num_experts = num_experts
        self.world_size = world_size
        self.rank = rank
        self.first_expert, end = self.bounds(rank)
        self.num_local_experts = end - self.first_expert
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def bounds(self, rank: int) -> tuple[int, int]:
        """The first expert of a rank, and the one after its last."""
        each, more = divmod(self.num_experts, self.world_size)
        return rank * each + min(rank, more), (rank + 1) * each + min(rank + 1, more)

    def places(self, indices: Tensor, live: list[int]) -> tuple[Tensor, Tensor]:
        """Of each expert the position in `live` of its rank, len(live) for none and for -1; and its number there."""
        key = (indices.device, *live)
        if key not in self._tables:
            position = torch.full((self.num_experts + 1,), len(live), dtype=torch.int64)
            number = torch.zeros_like(position)
            for i, rank in enumerate(live):
                first, end = self.bounds(rank)
                position[first:end] = i
                number[first:end] = torch.arange(end - first)
            self._tables[key] = position.to(indices.device), number.to(indices.device)
        position, number = self._tables[key]
        return position[indices], number[indices]  # -1 is the last entry


def in_range(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Indices as int64, with -1 for those that name no expert; and the first of these: int64 [3], whether there is
    one, its token and the number."""
    indices = indices.long()
    bad = (indices < -1) | (indices >= num_experts)
    if bad.numel() == 0:
        return indices, indices.new_zeros(3)
    first = bad.flatten().int().argmax()
    value = indices.flatten()[first]
    return indices.masked_fill(bad, -1), torch.stack([bad.any().long(), first // indices.shape[1], value])
