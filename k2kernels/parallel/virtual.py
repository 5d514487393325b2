"""Several ranks in one process: a test double of expert parallelism, and the one rank of transport "virtual"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k2kernels.ops._check import Arguments
from k2kernels.ops._constants import constants
from k2kernels.ops.exchange import Rank
from k2kernels.ops.moe import Dispatched
from k2kernels.parallel.checks import check_combine, check_dispatch, check_sizes
from k2kernels.parallel.exchange import DispatchOptions, ExchangeHandle, Sizes
from k2kernels.parallel.ranks import BLOCKS, Ranks, layout_of


class VirtualRanks:
    """W ranks in one process, for tests: `ExpertParallel` for all ranks at once.

    Their buffers are on one device, and the kernels are those of ranks of an NVLink domain. In `k2kernels.emulated()`
    the kernels of all ranks run concurrently, in the adversarial order of its seed; on a GPU all ranks send, then all
    wait; on CPU tensors otherwise plain PyTorch does the same.

    Args:
        world_size: W.
        num_experts, hidden, top_k, max_tokens: as in `ExpertParallel`.
        row_dtype: the widest dtype of rows.
        device: where the buffers are.
        step_timeout: seconds; in the emulator, a tenth of a second of its own clock.

    Attributes: splits[r]: first_expert and num_local_experts of rank r; degraded.
    """

    def __init__(
        self,
        world_size: int,
        *,
        num_experts: int,
        hidden: int,
        top_k: int,
        max_tokens: int,
        row_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        step_timeout: float = 10.0,
        blocks: int = BLOCKS,
    ):
        args = Arguments("VirtualRanks")
        args.integer("world_size", world_size, 1, constants.EXCHANGE_MOST_RANKS)
        sizes = Sizes(num_experts, hidden, top_k, max_tokens, row_dtype)
        check_sizes(args, sizes, world_size)
        args.integer("max_tokens", max_tokens, 0, constants.EXCHANGE_MOST_TOKENS)
        args.integer("blocks", blocks, 1)
        self.world_size = world_size
        layout = layout_of(world_size, sizes)
        buffers = [self._allocate(layout.bytes, device) for _ in range(world_size)]
        peers = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.int64, device=device)
        members = [Rank(layout, rank, buffers[rank], peers, buffers, blocks) for rank in range(world_size)]
        self.group = Ranks(layout, members, sizes)
        self.group.timeout = int(step_timeout * 1e9)
        self.splits = self.group.splits

    def _allocate(self, size: int, device: str | torch.device) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=device)

    @property
    def degraded(self) -> bool:
        """Whether a rank is masked."""
        return bool(self.group.masked)

    def dispatch(
        self,
        x: list[Tensor],
        indices: list[Tensor],
        weights: list[Tensor],
        **options: Any,
    ) -> list[Dispatched]:
        """Each rank's `ExpertParallel.dispatch`, with its options; lists have one entry for each rank."""
        chosen = DispatchOptions(**options)
        check_dispatch(self.group, x, indices, weights, chosen)
        return self.group.dispatch(x, indices, weights, chosen)

    def combine(
        self,
        y: list[Tensor],
        handles: list[ExchangeHandle],
        *,
        shared: list[Tensor] | None = None,
        residual: list[Tensor] | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Each rank's `ExpertParallel.combine`."""
        shared, residual = ([None] * self.world_size if terms is None else terms for terms in (shared, residual))
        check_combine(self.group, y, handles, shared, residual, out_dtype)
        out_dtype = next(t for t in y if t is not None).dtype if out_dtype is None else out_dtype
        return self.group.combine(y, handles, shared, residual, out_dtype)

    def withhold(self, rank: int) -> None:
        """Stops running this rank, as if it had died."""
        self.group.withheld |= {rank}

    def mask(self, rank: int) -> None:
        """Continues without this rank."""
        self.group.mask(rank)
