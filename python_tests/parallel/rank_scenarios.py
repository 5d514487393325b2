"""What the ranks do in `ranks.py`. Each function is called as (rank, number of ranks, a folder of their own)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import tiny
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as _symmetric_memory
from layout_checks import LAYOUT_CHECKS, OF_FILES
from rank_checks import (
    CHECKS,
    EXPERTS,
    SKEWS,
    TOP_K,
    make,
    make_batch,
    on_nodes,
    one_rank,
    part,
    same,
    same_rows,
    through,
)
from torch.nn.parallel import DistributedDataParallel

from k2kernels import PeerTimeout
from k2kernels.ops.exchange import Rank
from k2kernels.optim import MuonClip, QKClip
from k2kernels.parallel import ExpertParallel, symmetric


def join(rank, world, folder):
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)


def checks(rank, world, folder, names=tuple(CHECKS)):
    """All checks, until one fails: check -> None, or what went wrong."""
    join(rank, world, folder)
    found = {}
    for name in names:
        try:
            CHECKS[name](rank, world)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
            break
    return found


def checks_on_nodes(rank, world, folder):
    """All checks on nodes of two ranks; with more than two nodes, those of the rows' order alone."""
    on_nodes(world)
    few = ("check_bits", "check_a_token_goes_to_a_node_once")
    return checks(rank, world, folder, CHECKS if world == 4 else few)


def layout_steps(rank, world, folder, files=False):
    """Checks of models over ranks, each in a folder that the ranks share: check -> None, or what went wrong."""
    join(rank, world, folder)
    found = {}
    for name, check in LAYOUT_CHECKS.items():
        if (name in OF_FILES) != files:
            continue
        place = Path(folder, name)
        place.mkdir(exist_ok=True)
        try:
            check(rank, world, str(place))
            found[name] = None
        except BaseException:  # pytest's "did not raise" is no Exception
            found[name] = traceback.format_exc()
            break
    return found


def layout_files(rank, world, folder):
    """Those of checkpoints."""
    return layout_steps(rank, world, folder, files=True)


def clipped_copies(rank, world, folder):
    """Steps of MuonClip on copies of a model, each rank on its own tokens: which parameters differ at the end."""
    join(rank, world, folder)
    torch.manual_seed(0)
    model = tiny.model("kimi", num_hidden_layers=2).train()
    try:
        refused = MuonClip(model, 0.02)
    except ValueError as error:
        refused = str(error)

    def max_logits():
        maxima = model.max_logits()
        for s in maxima.values():
            dist.all_reduce(s, dist.ReduceOp.MAX)
        return maxima

    copies = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = MuonClip(model, 0.02, qk_clip=QKClip(0.5, max_logits=max_logits))
    clips = 0
    for step in range(2):
        for micro_batch in range(2):
            torch.manual_seed(100 * step + 10 * micro_batch + rank)
            ids = torch.randint(0, model.config.vocab_size, (1, 12))
            copies(ids).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        clips += sum(int((report.gamma < 1).sum()) for report in optimizer.last_clip.values())
    parted = []
    for name, p in model.named_parameters():
        first = p.detach().clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, p):
            parted.append(name)
    return dict(refused=refused, clips=clips, parted=parted)


# ---- faults: what each rank saw, as text, and after how many seconds


def layer_calls(ep, rank, calls):
    torch.manual_seed(rank)
    for _ in range(calls):
        x = torch.randn(4, 40, requires_grad=True)
        sent = ep.dispatch(x, torch.randint(0, EXPERTS, (4, TOP_K)), torch.randn(4, TOP_K))
        out = ep.combine(sent.data, sent.handle)
        out.sum().backward()
    return out


def fault(call):
    """Calls; what it raised and how long that took."""
    begin = time.monotonic()
    try:
        call()
    except Exception as error:
        what = dict(type=type(error).__name__, message=str(error), seconds=time.monotonic() - begin)
        if isinstance(error, PeerTimeout):
            what.update(phase=error.phase, ranks=list(error.ranks), epoch=error.epoch)
        return what
    return dict(type="none", seconds=time.monotonic() - begin)


def killed(rank, world, folder):
    """Rank 1 dies between two calls; the others then go on without it."""
    join(rank, world, folder)
    ep = make(step_timeout=2.0)
    layer_calls(ep, rank, 2)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    seen = [fault(lambda: layer_calls(ep, rank, 1)), fault(lambda: layer_calls(ep, rank, 1))]
    begin = time.monotonic()
    ep.mask(1)
    batch, starts = make_batch("uniform", world, seed=11)
    first, last = ep.first_expert, ep.first_expert + ep.num_local_experts - 1
    sent, got = through(ep.dispatch, ep.combine, first, last, part(batch, starts, rank))
    gone = range(*ep._split.bounds(1))
    dropped = sum(batch.indices == expert for expert in gone) > 0
    without = batch.indices.masked_fill(dropped, -1)
    without[starts[1] : starts[2]] = -1  # its tokens did not come
    _, want = one_rank(batch._replace(indices=without))
    for name in want:
        same(got[name], want[name][starts[rank] : starts[rank + 1]], name)
    assert sent.handle.degraded and ep.degraded and bool(dropped.any())
    return dict(seen=seen, masked_in=time.monotonic() - begin)


def killed_on_nodes(rank, world, folder):
    """The same with two ranks a node: of the others one shares its node, one its rail, and one neither."""
    on_nodes(world)
    return killed(rank, world, folder)


def silent(rank, world, folder):
    """Rank 2 is alive, but does not come to the third call in time."""
    join(rank, world, folder)
    ep = make(step_timeout=1.5)
    layer_calls(ep, rank, 2)
    if rank == 2:
        time.sleep(3)
        return fault(lambda: layer_calls(ep, rank, 1))
    return fault(lambda: layer_calls(ep, rank, 1))


def silent_on_nodes(rank, world, folder):
    """The same with two ranks a node: others are late too, because they wait for it."""
    on_nodes(world)
    return silent(rank, world, folder)


def stopped_in_backward(rank, world, folder):
    """Rank 0 stops (SIGSTOP) in a backward pass, while the others are in it."""
    join(rank, world, folder)
    ep = make(step_timeout=1.5)
    x = torch.randn(4, 40, requires_grad=True)
    sent = ep.dispatch(x, torch.randint(0, EXPERTS, (4, TOP_K)), torch.randn(4, TOP_K))
    out = ep.combine(sent.data, sent.handle)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    seen = fault(lambda: out.sum().backward())
    if rank == 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(Path(folder, "pid0").read_text()), signal.SIGKILL)
    return seen


def absent(rank, world, folder):
    """Rank 1 joins the group, but makes no ExpertParallel."""
    join(rank, world, folder)
    if rank == 1:
        time.sleep(2.5)
        return None
    return fault(lambda: make(init_timeout=1.0))


# ---- "symmetric", with files that all ranks map instead of a GPU's memory


class Segments:
    """torch.distributed._symmetric_memory, as far as it is used. As there, a buffer lies somewhere in a segment, with
    others before it, and `buffer_ptrs` are where the ranks' segments begin.

    Args:
        lose: this rank gets copies of the others' segments, so that its writes vanish.
        tells_offset: False as in a torch that has forgotten to.
    """

    OFFSET = 4096

    def __init__(self, folder, lose=None, tells_offset=True):
        self.folder, self.lose, self.tells_offset = folder, lose, tells_offset

    def empty(self, size, *, dtype, device):
        self.size, rank = size, dist.get_rank()
        self.mapped = [self._map(other, rank) for other in range(dist.get_world_size())]
        return self.mapped[rank][self.OFFSET :]

    def _map(self, other, rank):
        path = f"{self.folder}/buffer{other}" + (f"lost by {rank}" if self.lose == rank != other else "")
        return torch.from_file(path, shared=True, size=self.OFFSET + self.size, dtype=torch.uint8)

    def rendezvous(self, buffer, group):
        pointers = [segment.data_ptr() for segment in self.mapped]
        return SimpleNamespace(buffer_ptrs=pointers, offset=self.OFFSET if self.tells_offset else 0, keep=self.mapped)


def at(address, size):
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


@contextlib.contextmanager
def fake_gpus(folder, reason="", **options):
    """No device, so plain PyTorch carries the rows; it cannot wait, so that all meet between sending and waiting."""
    segments = Segments(folder, **options)

    def after_all(wait):
        def step(self, *args):
            dist.barrier()
            return wait(self, *args)

        return step

    def before(send):
        def step(self, *args):
            self.buffers = [at(address, self.layout.bytes) for address in self.peers.tolist()]
            return send(self, *args)

        return step

    with contextlib.ExitStack() as patches:
        for target, name, value in (
            (_symmetric_memory, "empty", segments.empty),
            (_symmetric_memory, "rendezvous", segments.rendezvous),
            (torch.cuda, "current_device", lambda: 0),
            (symmetric, "why_not_here", lambda world, max_tokens: reason),
            (Rank, "by_kernels", lambda self: False),
            (Rank, "scatter", before(Rank.scatter)),
            (Rank, "gather", before(Rank.gather)),
            (Rank, "scatter_wait", after_all(Rank.scatter_wait)),
            (Rank, "gather_wait", after_all(Rank.gather_wait)),
        ):
            patches.enter_context(mock.patch.object(target, name, value))
        yield


def symmetric_buffers(rank, world, folder):
    """Other processes' buffers through the table of addresses: the bits of one rank."""
    join(rank, world, folder)
    with fake_gpus(folder):
        ep = make(transport="symmetric", row_dtype=torch.float32)
        assert ep.transport == "symmetric" and not ep._ranks.members[0].state.any()
        first, last = ep.first_expert, ep.first_expert + ep.num_local_experts - 1
        for skew in SKEWS:
            batch, starts = make_batch(skew, world)
            want_sent, want = one_rank(batch, alignment=4)
            sent, got = through(ep.dispatch, ep.combine, first, last, part(batch, starts, rank), alignment=4)
            same_rows(ep, sent, want_sent)
            for name in want:
                same(got[name], want[name][starts[rank] : starts[rank + 1]], f"{skew}: {name}")
        ep.check()
    return "the same"


def symmetric_is_refused(rank, world, folder):
    """One rank's reason, writes that vanish, or addresses that are not the buffers' send all ranks to "torch"."""
    join(rank, world, folder)
    seen = []
    for options in (dict(reason="no luck" if rank == 1 else ""), dict(lose=2), dict(tells_offset=False)):
        with fake_gpus(folder, **options):
            seen.append(fault(lambda: make(transport="symmetric")))
            with mock.patch.object(ExpertParallel, "_choose", lambda self, transport: "symmetric"):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    seen.append(
                        dict(transport=make(transport="auto").transport, warned=[str(w.message) for w in caught])
                    )
    return seen
