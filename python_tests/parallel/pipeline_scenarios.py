"""Pipelines on 2 and 4 ranks, against one process with all tokens. Each function runs on every rank of `ranks.py`."""

from __future__ import annotations

import copy
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_scenarios import join
from torch.distributed.tensor import DTensor

from k2kernels import optim
from k2kernels.model.moe import exchanges
from k2kernels.optim import QKClip
from k2kernels.parallel import (
    Layout,
    MuonClip,
    Pipeline,
    expert_parallel,
    load_checkpoint,
    make_mesh,
    parallelize,
    save_checkpoint,
)

MICRO_BATCHES, SEQUENCES, LENGTH = 4, 2, 7
STEPS = 3
TAU = 0.5
MTP_WEIGHT = 0.3
ALPHA = 0.1


def whole_model(**changes):
    torch.manual_seed(0)
    return tiny.model("kimi", **changes).double().train()


def tokens(step, pipelines):
    """For each pipeline: the tokens of a step and one more."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (pipelines, MICRO_BATCHES * SEQUENCES, LENGTH + 1), generator=generator)


def whole_loss(model, ids):
    """The loss of all tokens, in one pass."""
    x, y = ids[:, :-1], ids[:, 1:]
    logits, hidden = model(x, return_hidden=True)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    more = model.mtp_logits(x, hidden) if model.mtp_layers else []
    for k, logits in enumerate(more):
        loss = loss + MTP_WEIGHT / len(more) * F.cross_entropy(logits.flatten(0, 1), y[:, 1 + k :].flatten())
    return loss


class Expected:
    """What one process with the tokens of all pipelines has, in each of three steps and after them."""

    def __init__(self, pipelines, **changes):
        self.pipelines, self.whole = pipelines, whole_model(**changes)
        self.start, self.config = copy.deepcopy(self.whole), self.whole.config
        self.steps = []
        maxima: dict = {}
        clip = QKClip(TAU, max_logits=lambda: maxima, reset_max_logits=self.whole.reset_max_logits)
        optimizer = optim.MuonClip(self.whole, 0.02, qk_clip=clip)
        for step in range(STEPS):
            ids = tokens(step, pipelines)
            loss = whole_loss(self.whole, ids.flatten(0, 1))
            (loss + self.whole.sequence_loss(ALPHA)).backward()
            grads = {name: None if p.grad is None else p.grad.clone() for name, p in self.whole.named_parameters()}
            maxima.update(self.whole.max_logits())
            optimizer.step()
            optimizer.zero_grad()
            seen = dict(loss=loss.detach(), grads=grads, loads=self.whole.expert_load(), clips=optimizer.last_clip)
            self.steps.append(seen)
            self.whole.update_router_bias(1e-2)


class Run:
    """A pipeline over all ranks."""

    def __init__(self, expected, *, pp, ep=1, schedule="1F1B", each=None, fsdp=False, halves=False):
        self.expected, self.clips = expected, 0
        self.layout = Layout(make_mesh(pp=pp, ep=ep, device_type="cpu"))
        assert expected.pipelines == self.layout.world_size
        self.pipeline = Pipeline(
            expected.config,
            self.layout,
            micro_batches=MICRO_BATCHES,
            micro_batch=(SEQUENCES, LENGTH),
            schedule=schedule,
            each=each,
            mtp_weight=MTP_WEIGHT,
        )
        self.model = self.pipeline.model
        self.model.double().load_whole(expected.start.state_dict())
        options = dict(max_tokens=SEQUENCES * LENGTH, step_timeout=20.0)
        if fsdp:
            for stage in self.pipeline.stages:
                parallelize(stage, self.layout, **options)
        elif ep > 1:
            expert_parallel(self.model, self.layout, gradients="mean", micro_batches=1 + halves, **options)
            assert len(exchanges(self.model)) == 1 + halves
        self.model.use_sequence_loss(ALPHA)
        self.optimizer = MuonClip(self.model, 0.02, mesh=self.layout, qk_clip=QKClip(TAU))

    def steps(self):
        for step, want in enumerate(self.expected.steps):
            self.step(step, want)

    def step(self, step, want):
        model, layout, pipelines = self.model, self.layout, self.expected.pipelines
        ids = tokens(step, pipelines)[layout.group.rank()]
        loss = self.pipeline.step(ids[:, :-1], ids[:, 1:])
        layout.reduce_gradients(model)
        dist.all_reduce(loss, group=layout.group)
        close(loss / pipelines, want["loss"], "loss")
        for name, p in model.named_parameters():
            grad = want["grads"][name]
            assert (p.grad is None) == (grad is None), name
            if grad is not None:
                close(full(p.grad), grad, f"gradient of {name}")
        norm = layout.clip_grad_norm_(model.parameters(), 1e9)
        squares = sum(float(grad.square().sum()) for grad in want["grads"].values() if grad is not None)
        close(norm, torch.tensor(squares, dtype=torch.float64).sqrt(), "norm")
        layout.reduce_statistics(model)
        self.optimizer.step()
        assert set(self.optimizer.last_clip) == set(model.max_logits())
        for layer, got in self.optimizer.last_clip.items():
            clip = want["clips"][layer]
            close(got.max_logit.double(), clip.max_logit.double(), f"largest logits of {layer}", 2.0**-24)
            assert torch.equal(got.gamma < 1, clip.gamma < 1), f"layer {layer}: other heads were clipped"
            self.clips += int((clip.gamma < 1).sum())
        for layer, load in model.expert_load().items():
            assert torch.equal(load, want["loads"][layer]), f"layer {layer}: {load} tokens for {want['loads'][layer]}"
        model.update_router_bias(1e-2)
        self.optimizer.zero_grad()

    def finish(self):
        """How far weights are from those of one process. All stages have the names of the whole model, each once."""
        wanted, start = self.expected.whole.state_dict(), self.expected.start.state_dict()
        worst = moved = 0.0
        names = list(self.model.state_dict())
        for name, got in self.model.state_dict().items():
            want = wanted[name].double()
            worst = max(worst, float((full(got).double() - want).abs().max()))
            moved = max(moved, float((want - start[name].double()).abs().max()))
        every = [None] * self.layout.pp.size()
        dist.all_gather_object(every, names, group=self.layout.pp.get_group())
        assert sorted(name for some in every for name in some) == sorted(wanted), "names of the stages"
        self.layout.check_replicas(self.model)
        longest = max(max(p.shape) for p in wanted.values() if p.dim() > 1)
        return dict(worst=worst, moved=moved, clips=self.clips, longest=longest)


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def close(got, want, what, relative=0.0):
    """Equal up to 2^12 roundings of float64, relative to the norm of all: their sums over tokens, channels and layers
    have up to some thousand terms."""
    bound = max(2.0**12 * 2.0**-53, relative) * float(want.norm())
    worst = float((got - want).abs().max())
    assert worst <= bound, f"{what}: {worst} apart, at most {bound}"


def against(expected, **options):
    run = Run(expected, **options)
    run.steps()
    return run.finish()


# ---- scenarios: (rank, number of ranks, folder)

SCHEDULES = [("1F1B", 1), ("GPipe", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2)]
SCHEDULES += [("DualPipeV", 2)]


def schedules(rank, world, folder):
    join(rank, world, folder)
    expected = Expected(1)
    return {name: against(expected, pp=2, schedule=name, each=each) for name, each in SCHEDULES}


def experts(rank, world, folder):
    """Two stages, whose experts are on two ranks each."""
    join(rank, world, folder)
    expected = Expected(2)
    return {name: against(expected, pp=2, ep=2, schedule=name) for name in ("1F1B", "ZBVZeroBubble")}


def halves(rank, world, folder):
    """The same, with two halves of each micro-batch in flight in a stage."""
    join(rank, world, folder)
    expected = Expected(2, num_nextn_predict_layers=1)
    return {name: against(expected, pp=2, ep=2, schedule=name, halves=True) for name in ("1F1B", "ZBVZeroBubble")}


def overflow(rank, world, folder):
    """What is skipped by each of two stages with one matrix each, and which weights are changed, by what is infinite or
    not a number where; `flat`: without the other stage's flag."""
    join(rank, world, folder)
    layout = Layout(make_mesh(pp=world, device_type="cpu"))
    found = {}
    for case, mesh, bad, scaled in [
        ("nothing", layout, {}, False),
        ("first", layout, {0: torch.nan}, False),
        ("last, by the mesh", layout.mesh, {1: torch.inf}, False),
        ("scaler", layout, {1: torch.nan}, True),
        ("no gradient", layout, {0: None, 1: torch.nan}, False),
        ("flat", layout.flat, {0: torch.nan}, False),
    ]:
        torch.manual_seed(rank)
        w = torch.nn.Parameter(torch.randn(5, 4))
        optimizer = MuonClip([("w", w)], 0.1, mesh=mesh, qk_clip=None, skip_non_finite=not scaled)
        before, value = w.detach().clone(), bad.get(rank, 1.0)
        if value is not None:
            w.grad = torch.randn(5, 4)
            w.grad[1, 2] = value
        if scaled:  # as torch.amp.GradScaler sets it
            optimizer.found_inf = torch.tensor(float(rank in bad))
        optimizer.step()
        found[case] = [optimizer.last_skipped, not torch.equal(w, before)]
    return found


def mtp(rank, world, folder):
    join(rank, world, folder)
    expected = Expected(1, num_nextn_predict_layers=2)
    names = "1F1B", "ZBVZeroBubble"
    return {name: against(expected, pp=2, schedule=name) for name in names}


def fsdp(rank, world, folder):
    """Two stages, whose weights are sharded over two ranks each."""
    join(rank, world, folder)
    expected = Expected(2)
    return {
        f"{name}, ep {ep}": against(expected, pp=2, ep=ep, schedule=name, fsdp=True)
        for name, ep in (("1F1B", 1), ("ZBVZeroBubble", 2))
    }


def checkpoints(rank, world, folder):
    """A step of two stages saved, and loaded by one process and by stages of another schedule, which has the layers
    otherwise; then both go on alike."""
    join(rank, world, folder)
    expected = Expected(1)
    first = Run(expected, pp=2, schedule="1F1B")
    first.step(0, expected.steps[0])
    save_checkpoint(folder, first.model, first.optimizer, 1)
    then = Run(expected, pp=2, schedule="ZBVZeroBubble")
    assert load_checkpoint(folder, then.model, then.optimizer) == 1
    for step in (1, 2):
        then.step(step, expected.steps[step])
    return then.finish()


def refused(rank, world, folder):
    """What is raised, by case."""
    join(rank, world, folder)
    layout, config = Layout(make_mesh(pp=2, device_type="cpu")), tiny.config("kimi")
    sizes = dict(micro_batches=MICRO_BATCHES, micro_batch=(SEQUENCES, LENGTH))
    ids = tokens(0, 1)[0]
    x, y = ids[:, :-1], ids[:, 1:]
    found = {}

    def note(case, call):
        try:
            call()
            found[case] = "nothing raised"
        except Exception as error:
            found[case] = f"{type(error).__name__}: {error}"

    def make(changes=None, **options):
        return Pipeline(tiny.config("kimi", **(changes or {})), layout, **{**sizes, **options})

    note("schedule", lambda: make(schedule="2F2B"))
    note("each", lambda: make(schedule="ZBVZeroBubble", each=3))
    note("each of 1F1B", lambda: make(each=2))
    note("each of interleaved", lambda: make(schedule="Interleaved1F1B", each=1))
    note("layers", lambda: make(schedule="Interleaved1F1B", each=3))
    note("tied", lambda: make(dict(tie_word_embeddings=True)))
    note("no pp", lambda: Pipeline(config, dist.group.WORLD, **sizes))
    pipeline = make()
    note("tokens", lambda: pipeline.step(x[1:], y[1:]))
    note("target", lambda: pipeline.step(x, y - 1000))
    note("generate", lambda: pipeline.model.generate(x, max_new_tokens=1))
    note("save", lambda: pipeline.model.save_pretrained(folder))
    note("dtype", lambda: _given_in_another_dtype(pipeline, x))
    several = make(schedule="ZBVZeroBubble")
    note("forward", lambda: several.model(x))
    for layer in several.model.model.layers:
        layer.checkpoints = True
    note("checkpointed", lambda: several.step(x, y))
    whole = tiny.model("kimi")
    one = Pipeline(config, layout, **sizes).model
    one.load_whole(whole.state_dict())
    layout.check_replicas(one)
    return found


def _given_in_another_dtype(pipeline, x):
    """Only the first stage can notice, before it sends."""
    pipeline._make_schedule()
    stage = pipeline.stages[0]
    if not stage.is_first:
        raise ValueError("Pipeline: a stage must give torch.float32")
    stage.bfloat16()(x[:SEQUENCES])


def page(rank, world, folder):
    """The example of docs/pipelines.md: its losses."""
    join(rank, world, folder)
    text = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    names: dict = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    return names["losses"]
