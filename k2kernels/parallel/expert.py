"""Expert parallelism: dispatch and combine between the tokens of this rank and the experts of all ranks."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels._backend import UnsupportedError
from k2kernels.ops import moe
from k2kernels.ops._check import FLOATS, Arguments
from k2kernels.ops.moe import Dispatched, moe_combine, moe_dispatch
from k2kernels.ops.quant import QUANTIZABLE
from k2kernels.parallel import exchange
from k2kernels.parallel.buffers import (
    Ranks,
    VirtualRanks,
    check_combine,
    check_dispatch,
    check_options,
    check_rows_of,
    check_sizes,
)
from k2kernels.parallel.exchange import Options
from k2kernels.parallel.split import Split

if TYPE_CHECKING:  # a torch built without distributed serves the local transport too
    from torch.distributed import ProcessGroup

TRANSPORTS = ("auto", "local", "torch", "symmetric", "virtual")
ALONE = ("local", "virtual")  # one rank has all experts


class ExpertParallel:
    """The experts of a layer and how tokens reach them; `dispatch` and `combine` mean what the ops mean.

    With several ranks each brings its own tokens; what comes out has, bit for bit, what one rank with all tokens (those
    of rank 0, then of rank 1, ...) and all experts would compute, forward and backward. A rank has the experts from
    `first_expert` on; where the ranks do not divide the experts, the first ranks have one more.

    Args:
        group: the ranks that share the experts; None is this process alone, whatever torch.distributed knows.
        num_experts: E, over all ranks; at least one a rank.
        hidden: H.
        top_k: K.
        max_tokens: the largest T of any call; what a transport sizes its buffers by.
        transport: how rows travel between ranks. "local": they do not, every expert is here. "torch": by
            `all_to_all_single` of the group. "symmetric": GPUs of one host write into one another's buffers. "auto":
            for one rank "local"; for an NCCL group "symmetric", if a trial on all ranks succeeds; else "torch".
            "virtual": the kernels of "symmetric" for this rank alone, to try them anywhere; `VirtualRanks` has several.
        row_dtype: the widest rows that travel, by which "symmetric" sizes its buffers.
        ranks_per_node: with "torch", ranks of a node are next to one another in the group, so many a node, and a row
            goes to each node once, where it is handed on. 0: to every rank by itself. None: what host names say; 0 if
            they are not such. Bits are the same.
        init_timeout, step_timeout: seconds to wait for the other ranks when this is made, and in each call; by default
            K2K_PARALLEL_INIT_TIMEOUT (30) and K2K_PARALLEL_STEP_TIMEOUT (10) of the environment.

    Every rank of the group makes its objects, and calls `dispatch`, `combine` and their backward, in the same order.

    Raises:
        UnsupportedError: for a transport that is not served.
        ValueError: on every rank, when ranks differ in the arguments.
        PeerTimeout: when a rank does not come.

    Attributes: transport, rank, world_size, num_experts, and the experts of this rank: num_local_experts, from
    first_expert on; degraded: whether a rank is masked; overflow: pairs that this rank's experts dropped so far for
    lack of capacity, int64 [] on the device of the rows, or None before a call with `capacity`.

    One object may be used on several CUDA streams: a call waits on the device for the one before. Between graphs that
    are replayed on several streams the caller must see to that order, which must be the same on all ranks.
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
        row_dtype: torch.dtype = torch.bfloat16,
        ranks_per_node: int | None = None,
        init_timeout: float | None = None,
        step_timeout: float | None = None,
    ):
        args = Arguments("ExpertParallel")
        args.choice("transport", transport, TRANSPORTS)
        check_sizes(args, num_experts, hidden, top_k, max_tokens, row_dtype)
        self.group = group
        self.rank, self.world_size = (0, 1) if group is None else (group.rank(), group.size())
        self.num_experts = num_experts
        self.hidden = hidden
        self.top_k = top_k
        self.max_tokens = max_tokens
        args.require(
            num_experts >= self.world_size, "num_experts", f"at least the {self.world_size} ranks", num_experts
        )
        if ranks_per_node is not None:
            args.integer("ranks_per_node", ranks_per_node, 0)
            args.require(
                ranks_per_node == 0 or self.world_size % ranks_per_node == 0,
                "ranks_per_node",
                f"a divisor of the {self.world_size} ranks",
                ranks_per_node,
            )
        self._split = Split(num_experts, self.world_size, self.rank)
        self.first_expert, self.num_local_experts = self._split.first_expert, self._split.num_local_experts
        self._rows: exchange.Transport | None = None  # of "torch"
        self._ranks: Ranks | None = None  # of "symmetric" and "virtual"
        self._row_dtype = row_dtype
        self.overflow: Tensor | None = None
        self.transport = self._choose(transport)
        if self.transport in ALONE:
            return
        from k2kernels.parallel.peers import Peers, timeouts

        sizes = dict(num_experts=num_experts, hidden=hidden, top_k=top_k, max_tokens=max_tokens)
        config = dict(**sizes, transport=transport, row_dtype=str(row_dtype), ranks_per_node=ranks_per_node)
        self._peers = Peers(group, config, *timeouts(init_timeout, step_timeout))
        if self.transport == "symmetric":
            from k2kernels.parallel.symmetric import open_ranks

            opened = open_ranks(self._peers, row_dtype=row_dtype, **sizes)
            if isinstance(opened, Ranks):
                self._ranks = opened
                return
            if transport == "symmetric":
                raise UnsupportedError(f"ExpertParallel: transport 'symmetric' does not work here: {opened}")
            if self.rank == 0:
                warnings.warn(f"ExpertParallel: rows travel by 'torch', not 'symmetric': {opened}", stacklevel=2)
            self.transport = "torch"
        from k2kernels.parallel.torch_transport import TorchTransport

        if ranks_per_node is None:
            ranks_per_node = self._peers.ranks_per_node()
        if ranks_per_node in (1, self.world_size):  # every node a rank, or all ranks a node
            ranks_per_node = 0
        self._rows = TorchTransport(self._split, self._peers, ranks_per_node)

    def _choose(self, transport: str) -> str:
        """The transport to try."""
        if transport == "auto":
            if self.world_size == 1:
                return "local"
            return "symmetric" if torch.cuda.is_available() and _is_nccl(self.group) else "torch"
        if transport in ALONE and self.world_size > 1:
            raise UnsupportedError(
                f"ExpertParallel: transport {transport!r} has no way to the experts of a group of {self.world_size} "
                "ranks; use 'torch' (several ranks in one process: k2kernels.parallel.VirtualRanks)"
            )
        if transport not in ALONE and self.group is None:
            raise UnsupportedError(f"ExpertParallel: transport {transport!r} needs a group; pass group=")
        return transport

    def __deepcopy__(self, memo: dict) -> ExpertParallel:
        return self  # a copied model talks to the same ranks

    @property
    def degraded(self) -> bool:
        """Whether a rank is masked, so that results lack its experts."""
        return self.transport not in ALONE and bool(self._peers.masked)

    def mask(self, rank: int) -> None:
        """Goes on without `rank`, which died or hangs: nobody waits for it, and what its experts would add is missing.

        Every other rank calls it too; they agree through the group's store, and start over with the same call. What was
        dispatched before cannot be combined. `degraded`, also in the handle, says it from then on.
        """
        if self.transport in ALONE:
            raise ValueError("ExpertParallel.mask: there is no other rank")
        if self._ranks is None:
            from k2kernels.parallel.torch_transport import TorchTransport

            self._peers.mask(rank)
            self._rows = TorchTransport(self._split, self._peers)  # in one hop: a rail is interrupted
        else:
            from k2kernels.parallel.symmetric import mask

            mask(self._ranks, self._peers, rank)

    def check(self) -> None:
        """Raises what a kernel has reported since ("symmetric", "virtual"): every call looks, but none waits for it.

        Raises:
            PeerTimeout: a rank did not send; what came out since is NaN.
            ValueError: an index named no expert, and was taken for -1; or ranks made different calls.
        """
        if self._ranks is not None:
            self._ranks.check()

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
            x: [T, hidden], T up to max_tokens, and from rank to rank its own.
            indices: [T, top_k], of all num_experts experts.
            weights, alignment, quantize, power_of_two, scale_layout: as in `moe_dispatch`. The same on all ranks, but
                for the weights.
            capacity: slots for the rows that arrive here; as in `moe_dispatch`. None: as many as arrive, or, with
                "symmetric", could arrive.

        Returns:
            Dispatched: the rows that arrived for the experts of this rank; offsets and counts are over those experts.
            The handle is for `combine` of this object. Differentiable in x unless quantised, once.

        Raises:
            PeerTimeout: when a rank does not take part in time; with "symmetric" in a later call, or `check`.
            ValueError: for indices that are out of range, on every rank; with "symmetric" on theirs, later.
        """
        dispatched = self._dispatch(x, indices, weights, alignment, quantize, power_of_two, scale_layout, capacity)
        if capacity is not None:
            dropped = dispatched.handle.overflow
            if self.overflow is None:
                with torch.inference_mode(False):  # else it could not be added to outside
                    self.overflow = torch.zeros_like(dropped)
            self.overflow += dropped
        return dispatched

    def _dispatch(
        self,
        x: Tensor,
        indices: Tensor,
        weights: Tensor,
        alignment: int,
        quantize: bool,
        power_of_two: bool,
        scale_layout: str,
        capacity: int | None,
    ) -> Dispatched:
        args = Arguments("ExpertParallel.dispatch")
        x = args.tensor("x", x, ("T", self.hidden))
        indices = args.tensor("indices", indices, ("T", self.top_k))
        args.require(
            x.shape[0] <= self.max_tokens, "x", lambda: f"at most max_tokens={self.max_tokens} rows", x.shape[0]
        )
        if self.transport == "local":
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
        weights = args.tensor("weights", weights, ("T", self.top_k), FLOATS)
        options = Options(self.num_local_experts, alignment, quantize, power_of_two, scale_layout, capacity)
        if self.transport == "virtual":
            self._ranks = self._alone(x)
        if self._ranks is not None:
            check_dispatch(self._ranks, [x], [indices], [weights], self.max_tokens, options)
            return self._ranks.dispatch([x], [indices], [weights], options)[0]
        check_options(options)
        args.tensor("x", x, ("T", self.hidden), QUANTIZABLE if quantize else FLOATS)
        args.tensor("indices", indices, ("T", self.top_k), moe.INDICES)
        return exchange.dispatch(self._rows, x, indices, weights, options)

    def _alone(self, x: Tensor) -> Ranks:
        """The one rank of "virtual": its buffer is where the rows are, and as wide."""
        if (ranks := self._ranks) is not None and ranks.members[0].buffer.device == x.device:
            if x.element_size() <= ranks.row_dtype.itemsize:
                return ranks
        return VirtualRanks(
            1,
            num_experts=self.num_experts,
            hidden=self.hidden,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            row_dtype=max(self._row_dtype, x.dtype, key=lambda dtype: dtype.itemsize),
            device=x.device,
        ).group

    def combine(
        self,
        y: Tensor,
        handle: moe.Handle | exchange.Handle,
        *,
        shared: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Brings the experts' rows y back to their tokens and adds them up, as `moe_combine`."""
        if self.transport == "local":
            return moe_combine(y, handle, shared=shared, residual=residual, out_dtype=out_dtype)
        y, shared, residual = check_rows_of(y, handle, shared, residual, self.hidden, self.top_k)
        args = Arguments("ExpertParallel.combine")
        out_dtype = args.choice("out_dtype", y.dtype if out_dtype is None else out_dtype, FLOATS)
        if self._ranks is not None:
            check_combine(self._ranks, [y], [handle], [shared], [residual], out_dtype)
            return self._ranks.combine([y], [handle], [shared], [residual], out_dtype)[0]
        return exchange.combine(self._rows, y, handle, shared, residual, out_dtype)


def _is_nccl(group: ProcessGroup) -> bool:
    from torch.distributed import get_backend_config

    return "nccl" in str(get_backend_config(group))
