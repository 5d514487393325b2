"""Expert parallelism: dispatch and combine between the tokens of this rank and the experts of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels._backend import UnsupportedError
from k2kernels.ops._check import Arguments
from k2kernels.ops.moe import Dispatched, Handle, moe_combine, moe_dispatch

if TYPE_CHECKING:  # a torch built without distributed serves the local transport too
    from torch.distributed import ProcessGroup

TRANSPORTS = ("auto", "local", "torch", "symmetric", "virtual")
SERVED = "served is 'local': all experts on this rank (group=None, or a group of one rank)"


class ExpertParallel:
    """The experts of a layer and how tokens reach them; `dispatch` and `combine` mean what the ops mean.

    Args:
        group: the ranks that share the experts; None is this process alone, whatever torch.distributed knows.
        num_experts: E, over all ranks.
        hidden: H.
        top_k: K.
        max_tokens: the largest T of any call; what a transport sizes its buffers by.
        transport: how rows travel between ranks. "local": they do not, every expert is here. "auto" picks the best
            transport that is served.

    Raises:
        UnsupportedError: for a transport that is not served, or for a group of several ranks.

    Attributes: transport, rank, world_size, num_experts, and the experts of this rank: num_local_experts, from
    first_expert on.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        num_experts: int,
        hidden: int,
        top_k: int,
        max_tokens: int,
        transport: str = "auto",
    ):
        args = Arguments("ExpertParallel")
        args.choice("transport", transport, TRANSPORTS)
        args.require(num_experts >= 1, "num_experts", "at least 1", num_experts)
        args.require(hidden >= 1, "hidden", "at least 1", hidden)
        args.require(top_k >= 1, "top_k", "at least 1", top_k)
        args.require(max_tokens >= 0, "max_tokens", "at least 0", max_tokens)
        if transport not in ("auto", "local"):
            raise UnsupportedError(f"ExpertParallel: transport {transport!r} is not served; {SERVED}")
        self.world_size = 1 if group is None else group.size()
        if self.world_size > 1:
            raise UnsupportedError(f"ExpertParallel: a group of {self.world_size} ranks is not served; {SERVED}")
        self.group = group
        self.rank = 0
        self.transport = "local"
        self.num_experts = self.num_local_experts = num_experts
        self.first_expert = 0
        self.hidden = hidden
        self.top_k = top_k
        self.max_tokens = max_tokens

    def dispatch(
        self,
        x: Tensor,
        indices: Tensor,
        weights: Tensor,
        *,
        alignment: int = 1,
        quantize: bool = False,
        power_of_two: bool = False,
        scale_layout: str = "row",
        capacity: int | None = None,
    ) -> Dispatched:
        """Sends each token of this rank to its experts, as `moe_dispatch`.

        Args:
            x: [T, hidden], T up to max_tokens.
            indices: [T, top_k], of all num_experts experts.
            weights, alignment, quantize, power_of_two, scale_layout, capacity: as in `moe_dispatch`.

        Returns:
            Dispatched: the rows that arrived for the experts of this rank; offsets and counts are over those experts.
        """
        args = Arguments("ExpertParallel.dispatch")
        x = args.tensor("x", x, ("T", self.hidden))
        indices = args.tensor("indices", indices, ("T", self.top_k))
        args.require(
            x.shape[0] <= self.max_tokens, "x", lambda: f"at most max_tokens={self.max_tokens} rows", x.shape[0]
        )
        return moe_dispatch(
            x,
            indices,
            weights,
            num_experts=self.num_experts,
            alignment=alignment,
            quantize=quantize,
            power_of_two=power_of_two,
            scale_layout=scale_layout,
            capacity=capacity,
        )

    def combine(
        self,
        y: Tensor,
        handle: Handle,
        *,
        shared: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Brings the experts' rows y back to their tokens and adds them up, as `moe_combine`."""
        return moe_combine(y, handle, shared=shared, residual=residual, out_dtype=out_dtype)
