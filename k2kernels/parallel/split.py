"""The distribution of experts over ranks."""

from __future__ import annotations

import torch
from torch import Tensor


class Split:
    """E experts over W ranks, in order; if E is not a multiple of W, the first ranks have one more (384 over 5: 77, 77,
    77, 77, 76).

    Attributes: num_experts, world_size, rank; first_expert and num_local_experts of this rank.
    """

    def __init__(self, num_experts: int, world_size: int, rank: int):
        self.num_experts = num_experts
        self.world_size = world_size
        self.rank = rank
        self.first_expert, end = self.bounds(rank)
        self.num_local_experts = end - self.first_expert

    def bounds(self, rank: int) -> tuple[int, int]:
        """The first expert of a rank, and the one after its last."""
        each, more = divmod(self.num_experts, self.world_size)
        return rank * each + min(rank, more), (rank + 1) * each + min(rank + 1, more)


class Places:
    """Maps experts to the part that has them and their number within it.

    Args:
        num_experts: E.
        parts: the first expert of each part, and the one after its last.
    """

    def __init__(self, num_experts: int, parts: list[tuple[int, int]]):
        self.parts = len(parts)
        part = torch.full((num_experts + 1,), self.parts, dtype=torch.int64)
        number = torch.zeros_like(part)
        for i, (first, end) in enumerate(parts):
            part[first:end] = i
            number[first:end] = torch.arange(end - first)
        self._tables = {torch.device("cpu"): (part, number)}

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Parts and numbers of experts; the part of -1, and of an expert in no part, is the number of parts."""
        part, number = self._tables[torch.device("cpu")]
        if indices.device not in self._tables:
            self._tables[indices.device] = part.to(indices.device), number.to(indices.device)
        part, number = self._tables[indices.device]
        return part[indices], number[indices]  # -1 is the last entry


def in_range(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Indices as int64, with -1 for those out of range; and int64 [3]: whether there is one, and the token and value of
    the first."""
    indices = indices.long()
    bad = (indices < -1) | (indices >= num_experts)
    if bad.numel() == 0:
        return indices, indices.new_zeros(3)
    first = bad.flatten().int().argmax()
    value = indices.take(first)  # [first] would be read by the host
    return indices.masked_fill(bad, -1), torch.stack([bad.any().long(), first // indices.shape[1], value])
