"""What the ranks do in `ranks.py`. Each function is called as (rank, number of ranks, a folder of their own)."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from rank_checks import CHECKS, EXPERTS, TOP_K, make, make_batch, one_rank, part, same, through

from k2kernels import PeerTimeout


def join(rank, world, folder):
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)


def checks(rank, world, folder):
    """All checks, until one fails: check -> None, or what went wrong."""
    join(rank, world, folder)
    found = {}
    for name, check in CHECKS.items():
        try:
            check(rank, world)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
            break
    return found


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
    ep = make(step_timeout=4.0)
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
    assert sent.handle.degraded and ep.degraded and bool(dropped[starts[rank] : starts[rank + 1]].any())
    return dict(seen=seen, masked_in=time.monotonic() - begin)


def silent(rank, world, folder):
    """Rank 2 is alive, but does not come to the third call in time."""
    join(rank, world, folder)
    ep = make(step_timeout=1.5)
    layer_calls(ep, rank, 2)
    if rank == 2:
        time.sleep(5)
        return fault(lambda: layer_calls(ep, rank, 1))
    return fault(lambda: layer_calls(ep, rank, 1))


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
