"""The other ranks of a group: agreement at the start, and detection of missing ranks when a call does not end.

A thread of each rank writes a heartbeat to the group's store several times per timeout: a counter, and the number and
name of its latest call. A rank whose call times out, or whose connection breaks, reads the heartbeats of the others: if
the counter does not change, the process is gone; if the call is an earlier one, the rank is late. It writes the result
to the store, so that all ranks report the same missing rank.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from k2kernels._backend import PeerTimeout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store, Work

INIT_TIMEOUT, STEP_TIMEOUT = 30.0, 10.0  # seconds
MESSAGE_BYTES = 4096  # of a rank's error and arguments, in `agree`
_made: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # number of Peers by group
_subgroups: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()  # by group and ranks


def timeouts(init: float | None, step: float | None) -> tuple[float, float]:
    """Seconds, from the arguments, the environment, or the defaults."""
    init = float(os.environ.get("K2K_PARALLEL_INIT_TIMEOUT", INIT_TIMEOUT)) if init is None else init
    step = float(os.environ.get("K2K_PARALLEL_STEP_TIMEOUT", STEP_TIMEOUT)) if step is None else step
    if not (init > 0 and step > 0):
        raise ValueError(f"ExpertParallel: timeouts must be more than 0 seconds, got {init} and {step}")
    return init, step


class Peers:
    """The ranks of `group` and the calls that this rank makes with them.

    Args:
        config: values that must be the same on all ranks, by name.
        init_timeout, step_timeout: seconds.

    Raises:
        PeerTimeout: a rank did not respond in time.
        ValueError: on all ranks, when configs differ.

    Attributes:
        group: the ranks that take part, `live`.
        masked: the others.
        epoch: number of dispatches.
    """

    def __init__(self, group: ProcessGroup, config: dict[str, Any], init_timeout: float, step_timeout: float):
        self.group = group
        self.rank, self.world_size = group.rank(), group.size()
        self.live = list(range(self.world_size))
        self.masked: frozenset[int] = frozenset()
        self.init_timeout, self.step_timeout = init_timeout, step_timeout
        self._global_ranks = dist.get_process_group_ranks(group)
        number = _made[group] = _made.get(group, 0) + 1
        self._store = dist.PrefixStore(f"k2kernels/experts/{number}", _get_process_group_store(group))
        self._failure: PeerTimeout | None = None
        self.epoch = 0
        self._phase = ""
        self._agree(config)
        self._heartbeat = _Heartbeat(self._store, self.rank, min(1.0, step_timeout / 8))
        weakref.finalize(self, self._heartbeat.stop)

    # ---- agreement

    def _agree(self, config: dict[str, Any]) -> None:
        configs = {rank: json.loads(text) for rank, text in self.exchange("config", json.dumps(config)).items()}
        for name in config:
            ranks_with: dict[Any, list[int]] = {}
            for rank, theirs in configs.items():
                ranks_with.setdefault(theirs.get(name), []).append(rank)
            if len(ranks_with) > 1:
                values = "; ".join(f"{value!r} on {_ranks(ranks)}" for value, ranks in ranks_with.items())
                raise ValueError(f"ExpertParallel: the ranks must agree on {name}, got {values}")

    def exchange(self, name: str, text: str) -> dict[int, str]:
        """Exchanges a text with every live rank through the store; returns all texts."""
        self._store.set(f"{name}/{self.rank}", text)
        deadline = time.monotonic() + self.init_timeout
        for rank in self.live:
            left = max(deadline - time.monotonic(), 0.001)
            with contextlib.suppress(RuntimeError):
                self._store.wait([f"{name}/{rank}"], timedelta(seconds=left))
        missing = tuple(rank for rank in self.live if not self._store.check([f"{name}/{rank}"]))
        if missing:
            raise PeerTimeout(
                f"ExpertParallel: {_ranks(missing)} did not respond within {self.init_timeout:g} s (phase {name!r}); "
                "every rank of the group must create its ExpertParallel, in the same order; or raise init_timeout",
                phase=name,
                ranks=missing,
            )
        return {rank: self._store.get(f"{name}/{rank}").decode() for rank in self.live}

    def hosts(self) -> list[str]:
        """The name of each live rank's host."""
        return list(self.exchange("host", socket.gethostname()).values())

    def ranks_per_node(self) -> int:
        """The ranks per host, if there are several hosts, each with equally many consecutive ranks; else 0."""
        hosts = self.hosts()
        runs = [len(list(run)) for _, run in itertools.groupby(hosts)]
        return runs[0] if len(set(runs)) == 1 and 1 < len(runs) == len(set(hosts)) else 0

    def first_reason(self, name: str, reason: str) -> str:
        """The first rank's reason against something, and the rank; the same on all ranks, "" if none has one."""
        for rank, theirs in self.exchange(name, reason).items():
            if theirs:
                return f"{theirs} (rank {rank})"
        return ""

    def compare(self, lines: dict[int, list[int]]) -> None:
        """Raises ValueError, on all ranks, unless all make the same call with indices in range.

        Args:
            lines: by rank: epoch, kind, whether an index is out of range, its token and value.
        """
        mine = lines[self.rank]
        for i, what in enumerate(("number of the call", "dtype, quantisation, capacity or grad mode")):
            if other := [rank for rank, line in lines.items() if line[i] != mine[i]]:
                raise ValueError(
                    f"ExpertParallel.dispatch: the ranks must make the same calls; {_ranks(other)} differ from "
                    f"{_ranks([self.rank])} in the {what}"
                )
        for rank, (_, _, is_bad, token, index) in lines.items():
            if is_bad:
                raise ValueError(
                    f"ExpertParallel.dispatch: indices must be from -1 (none) to E-1, got {index} for token {token} of "
                    f"rank {rank}; every rank raises this, and nothing was sent"
                )

    # ---- calls

    @contextlib.contextmanager
    def step(self, phase: str) -> Iterator[None]:
        """Wraps a call: its errors become PeerTimeout."""
        if self._failure is not None:
            raise PeerTimeout(
                f"{self._failure}; this ExpertParallel cannot continue: mask the rank, or make a new group",
                phase=self._failure.phase,
                ranks=self._failure.ranks,
                epoch=self._failure.epoch,
            )
        self._phase = phase
        self._heartbeat.text = f"{phase!r}, epoch {self.epoch}"
        self._heartbeat.calls += 1
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, PeerTimeout):
                raise
            raise self._fail(error) from error

    def largest(self, number: int, phase: str) -> int:
        """The largest number of all live ranks."""
        numbers = torch.tensor([number], dtype=torch.int64, device=self._device())
        with self.step(phase):
            work = dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._live_group(), async_op=True)
            self.wait(work, numbers.device)
        return int(numbers)

    def agree(self, caller: str, error: Exception | None, same: dict[str, str]) -> None:
        """Raises `error` here, and on live ranks without one what another has raised; or ValueError on all, when the
        texts of `same` differ."""
        mine = json.dumps([None if error is None else f"{type(error).__name__}: {error}"[:500], same])
        line = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        line[: len(mine)] = torch.frombuffer(bytearray(mine.encode()), dtype=torch.uint8)
        line = line.to(self._device())
        lines = line.new_empty(len(self.live), MESSAGE_BYTES)
        with self.step(f"{caller}, its arguments"):
            work = dist.all_gather(list(lines), line, group=self._live_group(), async_op=True)
            self.wait(work, line.device, max(self.init_timeout, self.step_timeout))
        if error is not None:
            raise error
        texts = [json.loads(bytes(line.tolist()).rstrip(b"\0")) for line in lines.cpu()]
        for rank, (theirs, _) in zip(self.live, texts):
            if theirs is not None:
                raise RuntimeError(f"{caller}: rank {rank} raised {theirs}")
        for name in same:
            values = {rank: theirs[name] for rank, (_, theirs) in zip(self.live, texts)}
            if len(set(values.values())) > 1:
                raise ValueError(f"{caller}: {name} must be the same on all ranks, got {values} by rank")

    def _live_group(self) -> ProcessGroup:
        """A group of the live ranks."""
        return self.group if self.group.size() == len(self.live) else self.subgroup(self.live)

    def _device(self) -> torch.device:
        """Where the group takes tensors."""
        cpu = "gloo" in str(dist.get_backend_config(self.group))
        return torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())

    def wait(self, work: Work, device: torch.device, seconds: float | None = None) -> None:
        """Waits for a call, at most `seconds`, or else `step_timeout`. On a GPU the stream waits, and the timeout is
        that of the group."""
        if device.type != "cpu":
            work.wait()
            return
        deadline = time.monotonic() + (self.step_timeout if seconds is None else seconds)
        while True:
            try:
                work.wait(timedelta(seconds=max(min(self._heartbeat.interval, deadline - time.monotonic()), 0.001)))
                return
            except RuntimeError as error:
                if work.is_completed():
                    raise
                if self._store.check(["culprit"]) or time.monotonic() >= deadline:
                    raise self._fail(error) from error

    def _fail(self, error: Exception) -> PeerTimeout:
        try:
            ranks, why = self._culprit()
        except RuntimeError:
            ranks, why = (), "the group's store does not answer either: the process that runs it may be gone"
        if self.rank in ranks:
            why = f"the others treat this rank as missing: {why}"
        text = re.sub(r"^\[\S*\] ", "", str(error).strip())  # without gloo's location
        cause = text.split(". ")[0].splitlines()[0]
        self._failure = PeerTimeout(
            f"ExpertParallel: rank {self.rank} timed out in {self._phase!r}, epoch {self.epoch}: {why} "
            f"(step_timeout {self.step_timeout:g} s; {cause})",
            phase=self._phase,
            ranks=ranks,
            epoch=self.epoch,
        )
        return self._failure

    def _culprit(self) -> tuple[tuple[int, ...], str]:
        """The missing ranks and the evidence: the result of another rank, or else from the heartbeats."""
        others = [rank for rank in self.live if rank != self.rank]
        before = self._heartbeats(others)
        until = time.monotonic() + 3 * self._heartbeat.interval
        while time.monotonic() < until and not self._store.check(["culprit"]):
            time.sleep(self._heartbeat.interval / 4)
        if not self._store.check(["culprit"]):
            after = self._heartbeats(others)
            gone = [rank for rank in others if after[rank][0] == before[rank][0]]
            least = min((after[rank][1] for rank in others), default=self._heartbeat.calls)
            late = [rank for rank in others if after[rank][1] == least < self._heartbeat.calls]  # others wait for these
            if gone:
                found = gone, f"{_ranks(gone)} without heartbeat: gone, or stopped"
            elif late:
                at = "; ".join(f"rank {rank} at {after[rank][2] or 'no call yet'}" for rank in late)
                found = late, f"{_ranks(late)} late, although alive ({at})"
            else:
                found = [], "all ranks are alive and at this call: their connections may be broken"
            self._store.compare_set("culprit", "", json.dumps(found))
        ranks, why = json.loads(self._store.get("culprit"))
        return tuple(ranks), why

    def _heartbeats(self, ranks: list[int]) -> dict[int, tuple[int, int, str]]:
        """The heartbeat of each: its counter, the number of calls begun, and the name of the latest."""
        found = {}
        for rank in ranks:
            key = f"alive/{rank}"
            count, calls, text = self._store.get(key).decode().split("|") if self._store.check([key]) else (0, 0, "")
            found[rank] = int(count), int(calls), text
        return found

    # ---- groups

    def subgroup(self, ranks: list[int]) -> ProcessGroup:
        """A group of some of the ranks; only these call this. It is made once per group."""
        made = _subgroups.setdefault(self.group, {})
        if tuple(ranks) not in made:
            made[tuple(ranks)] = self._new_group(ranks)
        return made[tuple(ranks)]

    def _new_group(self, ranks: list[int]) -> ProcessGroup:
        return dist.new_group(
            [self._global_ranks[rank] for rank in ranks],
            timeout=timedelta(seconds=self.init_timeout),
            backend=dist.get_backend(self.group),
            use_local_synchronization=True,  # without the other ranks
        )

    # ---- masks

    def mask(self, rank: int, *, new_group: bool = True) -> None:
        """Continues without `rank`. Every other live rank must call it too; they agree through the store."""
        if rank == self.rank or rank not in self.live:
            raise ValueError(
                f"ExpertParallel.mask: rank must be another rank that takes part, got {rank} of {self.live}"
            )
        self.live = [r for r in self.live if r != rank]
        self.masked |= {rank}
        name = f"mask/{len(self.masked)}"
        chosen = self.exchange(name, str(rank))
        if len(set(chosen.values())) > 1:
            raise ValueError(f"ExpertParallel.mask: the ranks must mask the same rank, got {chosen}")
        if new_group:
            self.group = self._new_group(self.live)
        self._failure = None
        self._heartbeat.calls = self.epoch = 0  # ranks may differ in the calls they have made
        if self.rank == self.live[0]:
            self._store.delete_key("culprit")
        self.exchange(f"{name}/done", "")


class _Heartbeat:
    """A thread that writes a counter, and the latest call, to the store."""

    def __init__(self, store: Store, rank: int, interval: float):
        self.interval = interval
        self.text, self.calls = "", 0
        self._store, self._key, self._count = store.clone(), f"alive/{rank}", 0
        self._end = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="k2kernels heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        self._count += 1
        self._store.set(self._key, f"{self._count}|{self.calls}|{self.text}")

    def _run(self) -> None:
        while not self._end.wait(self.interval):
            try:
                self._beat()
            except RuntimeError:  # the store is gone: calls that wait will raise
                return

    def stop(self) -> None:
        self._end.set()
        self._thread.join(timeout=1)


def _ranks(ranks: list[int] | tuple[int, ...]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
