"""Buffers of an NVLink domain, by torch.distributed._symmetric_memory, and a trial whether they work.

All that depends on processes is here; it results in addresses. Everything else is shared with `VirtualRanks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from k2kernels._backend import PeerTimeout
from k2kernels.ops import _launch
from k2kernels.ops._constants import constants
from k2kernels.ops.exchange import Call, Rank
from k2kernels.parallel.exchange import Sizes
from k2kernels.parallel.peers import Peers
from k2kernels.parallel.ranks import BLOCKS, Ranks, layout_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def rendezvous(group: ProcessGroup, size: int) -> tuple[Tensor, list[int], Any]:
    """This rank's buffer, uint8 [size] of zeros; the addresses of all ranks' buffers as mapped here; and a handle that
    keeps them mapped."""
    from torch.distributed import _symmetric_memory

    buffer = _symmetric_memory.empty(size, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
    handle = _symmetric_memory.rendezvous(buffer, group)
    # A segment may hold several buffers; `buffer_ptrs` are the addresses of segments.
    offset = getattr(handle, "offset", 0)  # older versions of torch have one segment per buffer
    addresses = [address + offset for address in handle.buffer_ptrs]
    if addresses[group.rank()] != buffer.data_ptr():
        raise RuntimeError(
            f"symmetric memory gives {addresses[group.rank()]:#x} for this rank's buffer at {buffer.data_ptr():#x}"
        )
    return buffer.zero_(), addresses, handle


def why_not_here(world_size: int, max_tokens: int) -> str:
    """Why this rank cannot have such a buffer; "" if there is no known reason."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if reason := _launch.why_not_cuda(torch.cuda.current_device()):
        return reason
    for name, value, most in (
        ("ranks", world_size, constants.EXCHANGE_MOST_RANKS),
        ("tokens a rank", max_tokens, constants.EXCHANGE_MOST_TOKENS),
    ):
        if value > most:
            return f"{value} {name}; the kernels take up to {most}"
    return ""


def open_ranks(peers: Peers, sizes: Sizes, blocks: int = BLOCKS) -> Ranks | str:
    """This process's rank with its buffer, after a trial; or the reason why there is none. All ranks agree on which.

    A rank that cannot take part reports so through the group's store: the others then do not wait in the rendezvous.
    """
    world = peers.world_size
    if reason := peers.first_reason("symmetric", why_not_here(world, sizes.max_tokens)):
        return reason
    hosts = set(peers.hosts())
    if len(hosts) > 1:
        return f"{len(hosts)} hosts; the ranks must be of one NVLink domain"
    layout = layout_of(world, sizes)
    reason, ranks = "", None
    try:
        buffer, addresses, handle = rendezvous(peers.group, layout.bytes)
        table = torch.tensor(addresses, dtype=torch.int64, device=buffer.device)
        ranks = Ranks(layout, [Rank(layout, peers.rank, buffer, table, None, blocks)], sizes)
        ranks.keep = handle
    except (RuntimeError, ImportError) as error:
        reason = f"the rendezvous failed: {str(error).splitlines()[0]}"
    if reason := peers.first_reason("rendezvous", reason):
        return reason
    ranks.timeout = int(peers.init_timeout * 1e9)
    reason = peers.first_reason("probe", why_not_working(ranks, peers))
    if reason:
        return reason
    # All ranks must have finished reading before this clears, and none may send before all have cleared.
    ranks.members[0].reset(ranks.members[0].live)
    _wait_for_device(ranks)
    peers.exchange("cleared", "")
    ranks.timeout = int(peers.step_timeout * 1e9)
    return ranks


def why_not_working(ranks: Ranks, peers: Peers) -> str:
    """Every rank writes a row to every other one by the kernels, and checks those that arrive: drivers have reported
    peer access that did not work. Returns a reason, or ""."""
    member, split = ranks.members[0], ranks.splits[0]
    layout, device = ranks.layout, ranks.members[0].buffer.device
    for first in range(0, layout.world, max(layout.most_tokens, 1)):
        there = range(first, min(first + layout.most_tokens, layout.world))  # one token each
        x = torch.full((len(there), ranks.sizes.hidden), peers.rank + 1, dtype=ranks.sizes.row_dtype, device=device)
        indices = torch.full((len(there), layout.top_k), -1, dtype=torch.int32, device=device)
        for token, rank in enumerate(there):
            indices[token, 0] = split.bounds(rank)[0]
        try:
            rows, experts = ranks.run([0], [_probe(member, x, indices)])[0]
            _wait_for_device(ranks)
            ranks.check()
        except (PeerTimeout, ValueError) as error:  # no flag, or a wrong one
            return f"writes do not arrive: {error}"
        if peers.rank in there:  # then a token of each rank has arrived
            token = there.index(peers.rank)
            rows = rows.view(layout.world, layout.most_tokens, -1)[:, token]
            experts = experts.view(layout.world, layout.most_tokens, -1)[:, token, 0]
            wrong = (rows != torch.arange(1, layout.world + 1, device=device)[:, None]).any(1) | (experts != 0)
            if wrong.any():
                return f"writes of rank {int(wrong.nonzero()[0])} to rank {peers.rank} are lost or wrong"
    return ""


def _probe(member: Rank, x: Tensor, indices: Tensor) -> Any:
    member.scatter([x], indices, Call("probe", x.dtype))
    yield
    experts, _ = member.scatter_wait()
    yield
    return member.arrived(0, x.shape[1], x.dtype).copy(), experts


def _wait_for_device(ranks: Ranks) -> None:
    if ranks.members[0].buffer.is_cuda:
        torch.cuda.synchronize(ranks.members[0].buffer.device)


def mask(ranks: Ranks, peers: Peers, rank: int) -> None:
    """Drops exchanges in flight and continues without `rank`; all other ranks must call it."""
    _wait_for_device(ranks)  # kernels end by themselves, at the latest at their timeout
    peers.mask(rank, new_group=False)
    ranks.mask(rank)
    _wait_for_device(ranks)
    peers.exchange(f"cleared without {rank}", "")
