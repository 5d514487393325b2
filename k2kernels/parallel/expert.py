"""Expert parallelism: dispatch and combine between the tokens of this rank and the experts of all ranks."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from k2kernels._backend import UnsupportedError
from k2kernels.model.moe import recomputing
from k2kernels.ops._check import FLOATS, INDICES, Arguments
from k2kernels.ops.moe import Dispatched, DispatchHandle, moe_combine, moe_dispatch
from k2kernels.ops.quant import QUANTIZABLE
from k2kernels.parallel import exchange
from k2kernels.parallel.checks import check_combine, check_dispatch, check_options, check_rows_of, check_sizes
from k2kernels.parallel.exchange import DispatchOptions, ExchangeHandle, Sizes
from k2kernels.parallel.ranks import Ranks
from k2kernels.parallel.split import Split
from k2kernels.parallel.virtual import VirtualRanks

if TYPE_CHECKING:  # a torch built without distributed serves the local transport too
    from torch.distributed import ProcessGroup

TRANSPORTS = ("auto", "local", "torch", "symmetric", "virtual")
ALONE = ("local", "virtual")  # one rank has all experts


class ExpertParallel:
    """The experts of a layer over ranks; `dispatch` and `combine` have the meaning of `moe_dispatch` and `moe_combine`.

    Every rank has its own tokens. Results are bit-identical, forward and backward, to those of one rank with all tokens
    (those of rank 0, then of rank 1, ...) and all experts. A rank has `num_local_experts` experts, from `first_expert`
    on; if E is not a multiple of W, the first ranks have one more.

    Args:
        group: the ranks that share the experts; None: this process alone, even if torch.distributed is initialised.
        num_experts: E, over all ranks; at least one a rank.
        hidden: H.
        top_k: K.
        max_tokens: the largest T of any call; determines the size of buffers.
        transport: how rows are sent between ranks. "local": they are not, every expert is here. "torch": by
            `all_to_all_single` of the group. "symmetric": GPUs of one host write into one another's buffers. "auto":
            "local" for one rank; "symmetric" for an NCCL group, if a trial on all ranks succeeds; else "torch".
            "virtual": the kernels of "symmetric" for this rank alone; `VirtualRanks` has several ranks.
        row_dtype: the widest dtype of rows, which determines the size of the buffers of "symmetric".
        ranks_per_node: (transport "torch") number of consecutive ranks per node. Rows then cross to each node once and
            are forwarded there. 0 sends to every rank directly. None infers it from host names, or uses 0 if ranks of a
            host are not consecutive and equally many. Results are bit-identical either way.
        init_timeout, step_timeout: seconds to wait for the other ranks in the constructor, and in each call; by default
            K2K_PARALLEL_INIT_TIMEOUT (30) and K2K_PARALLEL_STEP_TIMEOUT (10) of the environment.

    Every rank of the group must create its objects, and call `dispatch`, `combine` and their backward, in the same
    order.

    Raises:
        UnsupportedError: the transport is not available here.
        ValueError: on every rank, when ranks differ in the arguments.
        PeerTimeout: a rank did not respond in time.

    Attributes: transport, rank, world_size, num_experts, first_expert, num_local_experts; degraded: whether a rank is
    masked; overflow: pairs that this rank's experts have dropped for lack of capacity, int64 [] on the device of the
    rows, or None before a call with `capacity`. Recomputation by activation checkpointing is not counted.

    One object may be used on several CUDA streams: each call waits on the device for the previous one. The caller must
    order graphs that are replayed on several streams, in the same order on all ranks.
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
        self.group = group
        self.rank, self.world_size = (0, 1) if group is None else (group.rank(), group.size())
        self._sizes = sizes = Sizes(num_experts, hidden, top_k, max_tokens, row_dtype)
        check_sizes(args, sizes, self.world_size)
        self.num_experts, self.hidden, self.top_k, self.max_tokens, _ = sizes
        if ranks_per_node is not None:
            fits = args.integer("ranks_per_node", ranks_per_node, 0) == 0 or self.world_size % ranks_per_node == 0
            args.require(fits, "ranks_per_node", f"a divisor of the {self.world_size} ranks", ranks_per_node)
        self._split = Split(num_experts, self.world_size, self.rank)
        self.first_expert, self.num_local_experts = self._split.first_expert, self._split.num_local_experts
        self._torch: exchange.Transport | None = None  # of "torch"
        self._ranks: Ranks | None = None  # of "symmetric" and "virtual"
        self.overflow: Tensor | None = None
        self.transport = self._choose(transport)
        if self.transport in ALONE:
            return
        from k2kernels.parallel.peers import Peers, timeouts

        config = sizes._asdict() | dict(row_dtype=str(row_dtype), transport=transport, ranks_per_node=ranks_per_node)
        self._peers = Peers(group, config, *timeouts(init_timeout, step_timeout))
        if self.transport == "symmetric":
            from k2kernels.parallel.symmetric import open_ranks

            opened = open_ranks(self._peers, sizes)
            if isinstance(opened, Ranks):
                self._ranks = opened
                return
            if transport == "symmetric":
                raise UnsupportedError(f"ExpertParallel: transport 'symmetric' does not work here: {opened}")
            if self.rank == 0:
                warnings.warn(f"ExpertParallel: transport is 'torch', not 'symmetric': {opened}", stacklevel=2)
            self.transport = "torch"
        from k2kernels.parallel.torch_transport import TorchTransport

        if ranks_per_node is None:
            ranks_per_node = self._peers.ranks_per_node()
        if ranks_per_node in (1, self.world_size):  # one rank per node, or one node
            ranks_per_node = 0
        self._torch = TorchTransport(self._split, self._peers, ranks_per_node)

    def _choose(self, transport: str) -> str:
        """The transport to try."""
        if transport == "auto":
            if self.world_size == 1:
                return "local"
            return "symmetric" if torch.cuda.is_available() and _is_nccl(self.group) else "torch"
        if transport in ALONE and self.world_size > 1:
            raise UnsupportedError(
                f"ExpertParallel: transport {transport!r} cannot reach the experts of a group of {self.world_size} "
                "ranks; use 'torch' (several ranks in one process: k2kernels.parallel.VirtualRanks)"
            )
        if transport not in ALONE and self.group is None:
            raise UnsupportedError(f"ExpertParallel: transport {transport!r} needs a group; pass group=")
        return transport

    def __deepcopy__(self, memo: dict) -> ExpertParallel:
        return self  # a copied model uses the same ranks

    @property
    def degraded(self) -> bool:
        """Whether a rank is masked, so that results lack its experts."""
        return self.transport not in ALONE and bool(self._peers.masked)

    def mask(self, rank: int) -> None:
        """Continues without `rank`, which died or hangs. Results lack the contributions of its experts.

        Every other rank must call it too: they agree through the group's store, and continue with the same call. Rows
        dispatched before cannot be combined. `degraded` is True afterwards, also in handles.
        """
        if self.transport in ALONE:
            raise ValueError("ExpertParallel.mask: rank must be another rank of the group, got a group of one")
        if self._ranks is None:
            from k2kernels.parallel.torch_transport import TorchTransport

            self._peers.mask(rank)
            self._torch = TorchTransport(self._split, self._peers)  # in one hop: a rail lacks a rank
        else:
            from k2kernels.parallel.symmetric import mask

            mask(self._ranks, self._peers, rank)

    def check(self) -> None:
        """Raises faults that kernels have reported ("symmetric", "virtual"). Every call checks too, without waiting.

        Raises:
            PeerTimeout: a rank did not send; results since then are NaN.
            ValueError: an index was out of range, and was treated as -1; or ranks made different calls.
        """
        if self._ranks is not None:
            self._ranks.check()

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. One small message; every rank calls it, and the host waits for it.

        Raises:
            PeerTimeout: a rank did not take part in time.
        """
        return flag if self.transport in ALONE else bool(self._peers.largest(int(flag), "which ranks go on"))

    def agree(self, caller: str, error: Exception | None, **same: Any) -> None:
        """Raises `error` here, and on ranks without one a RuntimeError that says what another rank raised.

        Args:
            same: values that must be the same on all ranks, by name.

        Raises:
            ValueError: on every rank, when they differ.
            PeerTimeout: a rank did not take part within the longer of init_timeout and step_timeout.
        """
        if self.transport in ALONE:
            if error is not None:
                raise error
            return
        self._peers.agree(caller, error, {name: repr(value)[:99] for name, value in same.items()})

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
            x: [T, hidden], T up to max_tokens; ranks may differ in T.
            indices: [T, top_k], of all num_experts experts.
            weights: [T, top_k]; as in `moe_dispatch`.
            alignment, quantize, power_of_two, scale_layout: as in `moe_dispatch`; the same on all ranks.
            capacity: slots for the rows that arrive here; as in `moe_dispatch`. None: as many as arrive, or, with
                "symmetric", as could arrive.

        Returns:
            Dispatched: the rows that arrived for the experts of this rank; offsets and counts are of those experts.
            The handle is for `combine` of this object. Differentiable once, in x, unless quantised.

        Raises:
            PeerTimeout: a rank did not take part in time; with "symmetric" in a later call, or `check`.
            ValueError: an index is out of range, on every rank; with "symmetric" on its own rank, in a later call.
        """
        options = DispatchOptions(alignment, quantize, power_of_two, scale_layout, capacity)
        dispatched = self._dispatch(x, indices, weights, options)
        if capacity is not None and not recomputing():
            dropped = dispatched.handle.overflow
            if self.overflow is None:
                with torch.inference_mode(False):  # an inference tensor could not be added to outside
                    self.overflow = torch.zeros_like(dropped)
            self.overflow += dropped
        return dispatched

    def _dispatch(self, x: Tensor, indices: Tensor, weights: Tensor, options: DispatchOptions) -> Dispatched:
        args = Arguments("ExpertParallel.dispatch")
        x = args.tensor("x", x, ("T", self.hidden))
        indices = args.tensor("indices", indices, ("T", self.top_k))
        args.require(
            x.shape[0] <= self.max_tokens, "x", lambda: f"at most max_tokens={self.max_tokens} rows", x.shape[0]
        )
        if self.transport == "local":
            return moe_dispatch(x, indices, weights, num_experts=self.num_experts, **options._asdict())
        weights = args.tensor("weights", weights, ("T", self.top_k), FLOATS)
        if self.transport == "virtual":
            self._ranks = self._alone(x)
        if self._ranks is not None:
            check_dispatch(self._ranks, [x], [indices], [weights], options)
            return self._ranks.dispatch([x], [indices], [weights], options)[0]
        check_options("ExpertParallel.dispatch", options)
        args.tensor("x", x, ("T", self.hidden), QUANTIZABLE if options.quantize else FLOATS)
        args.tensor("indices", indices, ("T", self.top_k), INDICES)
        return exchange.dispatch(self._torch, x, indices, weights, self.num_local_experts, options)

    def _alone(self, x: Tensor) -> Ranks:
        """The rank of "virtual", with a buffer on the device of the rows that is wide enough for them."""
        if (ranks := self._ranks) is not None and ranks.members[0].buffer.device == x.device:
            if x.element_size() <= ranks.sizes.row_dtype.itemsize:
                return ranks
        widest = max(self._sizes.row_dtype, x.dtype, key=lambda dtype: dtype.itemsize)
        return VirtualRanks(1, **self._sizes._replace(row_dtype=widest)._asdict(), device=x.device).group

    def combine(
        self,
        y: Tensor,
        handle: DispatchHandle | ExchangeHandle,
        *,
        shared: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Returns the rows y of the experts to their tokens and adds them up, as `moe_combine`."""
        if self.transport == "local":
            return moe_combine(y, handle, shared=shared, residual=residual, out_dtype=out_dtype)
        y, shared, residual = check_rows_of(y, handle, shared, residual, self.hidden, self.top_k)
        args = Arguments("ExpertParallel.combine")
        out_dtype = args.choice("out_dtype", y.dtype if out_dtype is None else out_dtype, FLOATS)
        if self._ranks is not None:
            check_combine(self._ranks, [y], [handle], [shared], [residual], out_dtype)
            return self._ranks.combine([y], [handle], [shared], [residual], out_dtype)[0]
        return exchange.combine(self._torch, y, handle, shared, residual, out_dtype)


def _is_nccl(group: ProcessGroup) -> bool:
    from torch.distributed import get_backend_config

    return "nccl" in str(get_backend_config(group))
