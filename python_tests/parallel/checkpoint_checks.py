"""Checkpoints of ranks, loaded on other meshes; saves that are killed."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
import traceback
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from rank_scenarios import join
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from k2kernels.optim import MuonClip, QKClip
from k2kernels.parallel import (
    Layout,
    Pipeline,
    checkpoint_info,
    load_checkpoint,
    make_mesh,
    parallelize,
    save_checkpoint,
)

SEQUENCES, LENGTH, STEPS = 4, 9, 2
EPS = torch.finfo(torch.float64).eps
KINDS = ("muonclip", "adamw")


class Run:
    """A model with its optimizer on this world's mesh; a step takes the same sequences on every mesh."""

    def __init__(self, world, *, pp=1, ep=1, kind="muonclip", seed=0, **options):
        torch.manual_seed(seed)
        whole = self.model = tiny.model("kimi", num_hidden_layers=2).double().train()
        self.layout, self.pipeline = None, None
        if world > 1:
            self.layout = Layout(make_mesh(pp=pp, ep=ep, device_type="cpu"))
            self.world, self.rank = world // pp, self.layout.group.rank()
            if pp > 1:
                sizes = dict(micro_batches=2, micro_batch=(SEQUENCES // self.world // 2, LENGTH))
                self.pipeline = Pipeline(whole.config, self.layout, **sizes)
                self.model = self.pipeline.model.double()
                self.model.load_whole(whole.state_dict())
            parallelize(self.model, self.layout, max_tokens=64, step_timeout=20.0, **{"fsdp": pp == 1, **options})
        if kind == "adamw":
            foreach = False if self.layout else None
            self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2, foreach=foreach)
        else:
            clip = QKClip(0.05, mode="smooth", smoothing=0.5)
            self.optimizer = MuonClip(self.model, 0.02, qk_clip=clip, mesh=self.layout)

    def step(self, number):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, 256, (SEQUENCES, LENGTH + 1), generator=generator)
        if self.layout is not None:
            ids = ids.chunk(self.world)[self.rank]
        if self.pipeline is not None:
            self.pipeline.step(ids[:, :-1], ids[:, 1:])
        else:
            logits = self.model(ids[:, :-1])
            cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        if self.layout is not None:
            self.layout.reduce_gradients(self.model)
            self.layout.reduce_statistics(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.reset_max_logits()
        self.model.update_router_bias(1e-3)

    def whole(self):
        """Everything that a checkpoint must hold, whole, by names."""
        state = self.optimizer.state_dict()
        names = {p: name for name, p in self.model.named_parameters()}
        flat = [names[p] for group in self.optimizer.param_groups for p in group["params"]]
        numbers = [i for group in state["param_groups"] for i in group["params"]]
        found = dict(self.model.state_dict())
        for number, name in zip(numbers, flat):
            for key, value in state["state"].get(number, {}).items():
                found[f"{name} {key}"] = torch.as_tensor(value)
        return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in found.items()}


def _folder(*names):
    return Path(os.environ["K2K_TEST_CHECKPOINTS"], *names)


def _join(rank, world, folder):
    if world > 1:
        join(rank, world, folder)


def save(rank, world, folder):
    """Four ranks, two of which share the experts: a checkpoint after two steps; one more step to compare with."""
    _join(rank, world, folder)
    for kind in KINDS:
        run = Run(world, ep=2, kind=kind)
        for number in range(STEPS):
            run.step(number)
        written = save_checkpoint(_folder(kind), run.model, run.optimizer, STEPS, extra={"note": [1, "two"]})
        assert written == _folder(kind, f"step_{STEPS}")
        saved = run.whole()
        run.step(STEPS)
        after = run.whole()
        if rank == 0:
            torch.save({"saved": saved, "after": after}, _folder(f"{kind}.pt"))
    return "saved"


def resume(rank, world, folder, kinds=KINDS):
    """The bits that were saved, and a further step that differs by rounding."""
    _join(rank, world, folder)
    for kind in kinds:
        want = torch.load(_folder(f"{kind}.pt"))
        ways = [dict(ep=1), dict(ep=1, fsdp=False), dict(ep=world)] if world > 1 else [{}]
        for way in ways:
            run = Run(world, kind=kind, seed=1, **way)
            assert load_checkpoint(_folder(kind), run.model, run.optimizer) == STEPS
            assert checkpoint_info(_folder(kind))["extra"] == {"note": [1, "two"]}
            got = run.whole()
            assert got.keys() == want["saved"].keys()
            for name, tensor in want["saved"].items():
                assert tensor.dtype == got[name].dtype and torch.equal(tensor, got[name]), f"{kind} {way}: {name}"
            run.step(STEPS)
            worst = max(
                float((got - want["after"][name]).abs().max() / (1 + want["after"][name].abs().max()))
                for name, got in run.whole().items()
                if got.is_floating_point()
            )
            assert worst < BOUND, f"{kind} {way}: {worst}"
    return "the same"


# Another order of sums changes gradients by a few units in the last place of float64 of the largest summand, here less
# than 100 of them. Newton-Schulz's five steps amplify by at most 3.4445^5 = 485 (its slope at zero), and momentum and
# weights are then of order 1: 100 * 485 * 2.2e-16 = 1.1e-11. AdamW divides by sqrt(v) of gradients that may be tiny,
# with eps 1e-8: a change of 100 * 2.2e-16 of 1 becomes at most 1e-2 * 2.2e-14 / 1e-8 = 2.2e-8 at lr 1e-2.
BOUND = 2.2e-8


def save_stages(rank, world, folder):
    """Two stages, and on four ranks two that share the experts in each."""
    _join(rank, world, folder)
    run = Run(world, pp=2, ep=world // 2)
    for number in range(STEPS):
        run.step(number)
    save_checkpoint(_folder("muonclip"), run.model, run.optimizer, STEPS, extra={"note": [1, "two"]})
    again = Run(world, pp=2, ep=world // 2, seed=1)
    assert load_checkpoint(_folder("muonclip"), again.model, again.optimizer) == STEPS
    saved = run.whole()
    for name, tensor in again.whole().items():
        assert torch.equal(tensor, saved[name]), name
    run.step(STEPS)
    parts = [None] * world
    dist.all_gather_object(parts, (saved, run.whole()))
    if rank == 0:
        whole = {key: {k: v for part in parts for k, v in part[i].items()} for i, key in enumerate(("saved", "after"))}
        torch.save(whole, _folder("muonclip.pt"))
    return "saved"


def resume_stages(rank, world, folder):
    """One process has what the stages had."""
    return resume(rank, world, folder, kinds=("muonclip",))


def refused(rank, world, folder):
    """Other models, other optimizers, no checkpoint, damaged files: by name, on every rank."""
    import pytest

    _join(rank, world, folder)
    run = Run(world)
    save_checkpoint(_folder("small"), run.model, run.optimizer, 1)
    with pytest.raises(FileNotFoundError, match="must be a directory of save_checkpoint"):
        load_checkpoint(_folder("nothing"), run.model)
    assert checkpoint_info(_folder("nothing")) is None
    other = tiny.model("kimi", num_hidden_layers=2, hidden_size=48)
    with pytest.raises(ValueError, match=r"must be of the same model, but .*\[256, 96\] in it, \[256, 48\] in the mo"):
        load_checkpoint(_folder("small"), other)
    deeper = tiny.model("kimi", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"layers\.2.* is not in it"):
        load_checkpoint(_folder("small"), deeper)
    with pytest.raises(ValueError, match=r"must have the 2 parameter groups of .*, got 1"):
        load_checkpoint(_folder("small"), run.model, torch.optim.AdamW(run.model.parameters(), foreach=False))
    with pytest.raises(ValueError, match="parameters must be the model's, got one of shape"):
        save_checkpoint(_folder("other"), run.model, torch.optim.AdamW(other.parameters()), 1)
    assert checkpoint_info(_folder("other")) is None
    if world > 1:
        dist.barrier()
    if rank == 0:
        for path in _folder("small", "step_1").glob("*.distcp"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if world > 1:
        dist.barrier()
    with pytest.raises(ValueError, match="step_1 cannot be read"):
        load_checkpoint(_folder("small"), run.model, run.optimizer)
    return "refused"


def kept(rank, world, folder):
    """The last two stay; a step may be saved twice; what a killed save has left is removed by the next one."""
    _join(rank, world, folder)
    run, path = Run(world), _folder(f"kept{world}")
    for number in (1, 2, 2, 3):
        save_checkpoint(path, run.model, run.optimizer, number)
        if rank == 0:
            (path / "step_9").mkdir()
            (path / "step_9" / "__0_0.distcp").write_bytes(b"half")
        if world > 1:
            dist.barrier()
    save_checkpoint(path, run.model, None, 4)
    assert sorted(f.name for f in path.iterdir()) == ["latest", "step_3", "step_4"]
    assert load_checkpoint(path, run.model) == 4
    return "kept"


# ---- saves that are killed


KILLS = 30


class Filled:
    """A model and an optimizer whose every number says the step."""

    def __init__(self):
        self.model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)

    def fill(self, step):
        with torch.no_grad():
            for i, p in enumerate(self.model.parameters()):
                p.fill_(step + i / 10)
                self.optimizer.state[p]["momentum_buffer"] = torch.full_like(p, step - i / 10)

    def check(self, step):
        want = Filled()
        want.fill(step)
        for p, q in zip(self.model.parameters(), want.model.parameters()):
            assert torch.equal(p, q)
            assert torch.equal(self.optimizer.state[p]["momentum_buffer"], want.optimizer.state[q]["momentum_buffer"])


def _save_for_ever(rank, world, folder, path, step):
    """A rank that saves step after step, until it is killed or another rank is."""
    try:
        torch.manual_seed(0)
        _join(rank, world, folder)
        filled = Filled()
        while True:
            filled.fill(step)
            save_checkpoint(path, filled.model, filled.optimizer, step)
            step += 1
    except (OSError, RuntimeError):  # the other rank is gone
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def kill_saves(rank, world, folder):
    """SIGKILL at 30 times, of one process, of both of two, or of one of two: the newest whole checkpoint loads."""
    path, draws, newest, ends = _folder("killed"), random.Random(0), 0, []
    filled = Filled()
    filled.fill(0)
    save_checkpoint(path, filled.model, filled.optimizer, 0)
    for attempt in range(KILLS):
        world = 1 + attempt % 2
        with tempfile.TemporaryDirectory() as store:
            pids = []
            for r in range(world):
                pid = os.fork()
                if pid == 0:
                    _save_for_ever(r, world, store, path, newest + 1)
                pids.append(pid)
            deadline = time.monotonic() + 20
            while _step_of(path) == newest and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(draws.uniform(0.0, 0.15))
            victims = pids if attempt % 4 != 3 else [draws.choice(pids)]
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            for pid in pids:
                left = _wait(pid, 20)
                assert left == (-signal.SIGKILL if pid in victims else 0), f"attempt {attempt}: ended with {left}"
        again = Filled()
        step = load_checkpoint(path, again.model, again.optimizer)
        again.check(step)
        assert step > newest
        newest = step
        ends.append(len(list(path.glob("step_*"))))
    assert 3 in ends, "no kill has come in the middle of a save"
    return "whole"


def _step_of(path):
    return int((path / "latest").read_text().strip().removeprefix("step_").partition(".")[0])


def _wait(pid, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (ended := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "past the deadline"
