"""What every rank checks of `parallelize`: training over ranks against one process with all tokens.

Both are float64, so that they differ by the order of sums only. Bounds, from the first step on:

- gradients differ by GRADIENT of their norm: sums over tokens, channels and layers of up to some thousand terms;
- weights by `weight_bound`, which is how far Newton-Schulz carries that;
- losses by the sum over weights of |gradient| times the bound of a weight, to first order; twice that is allowed.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_scenarios import join
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from k2kernels import optim, parallel
from k2kernels._backend import UnsupportedError
from k2kernels.model import K2Model
from k2kernels.model.moe import Router
from k2kernels.optim import QKClip
from k2kernels.parallel import Layout, make_mesh, parallelize

TAU, LR, BIAS_RATE = 0.5, 0.02, 1e-2
MTP_WEIGHT, BALANCE = 0.3, 0.5
STEPS, ROWS = 3, 2  # sequences of a rank
GRADIENT = 2**12 * 2.0**-53
OPTIONS = dict(max_tokens=64, step_timeout=20.0)


def weight_bound(longest):
    """An update is lr 0.2 sqrt(max(m, n)) NewtonSchulz(M / |M|), whose singular values, and so differences, grow by at
    most 3.4445 in each of five iterations."""
    return STEPS * LR * 0.2 * longest**0.5 * 3.4445**5 * GRADIENT


def whole_model(**changes):
    """One dense layer, one with experts, one for MTP."""
    torch.manual_seed(0)
    changes = dict(num_hidden_layers=2, num_nextn_predict_layers=1) | changes
    return tiny.model("kimi", **changes).double().train()


def tokens(step, world):
    return torch.randint(0, 256, (ROWS * world, 13), generator=torch.Generator().manual_seed(step))


def loss_of(model, ids):
    """Means over tokens: of the next one, and of those beyond it."""
    logits, hidden = model(ids[:, :-1], return_hidden=True)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    for k, beyond in enumerate(model.mtp_logits(ids[:, :-1], hidden)) if model.mtp_layers else ():
        targets = ids[:, 2 + k : beyond.shape[1] + 2 + k]
        loss = loss + MTP_WEIGHT * F.cross_entropy(beyond.flatten(0, 1), targets.flatten())
    return loss


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def optimizer_of(model, **options):
    return optim.MuonClip(model, LR, qk_clip=QKClip(TAU), **options)


class Record:
    """Of three steps: what there is to compare."""

    def __init__(self):
        self.losses, self.gradients, self.norms, self.clips, self.counts, self.paths = [], {}, [], [], [], []
        self.weights, self.buffers = {}, {}

    def finish(self, model):
        self.weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
        self.buffers = {name: b.clone() for name, b in model.named_buffers() if "correction_bias" in name}


def one_process(model, world):
    """All tokens in one process; its own maxima are those of all ranks."""
    record, maxima = Record(), {}
    clip = QKClip(TAU, max_logits=lambda: maxima, reset_max_logits=model.reset_max_logits)
    optimizer = optim.MuonClip(model, LR, qk_clip=clip)
    for step in range(STEPS):
        loss = loss_of(model, tokens(step, world))
        (loss + model.sequence_loss(BALANCE)).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        record.losses.append(loss.item())
        record.paths.append(sum(float(g.abs().sum()) for g in grads.values()))
        record.gradients = record.gradients or grads
        record.norms.append(float(torch.stack([g.norm() for g in grads.values()]).norm()))
        record.counts.append({layer: load.clone() for layer, load in model.expert_load().items()})
        maxima.update(model.max_logits())
        optimizer.step()
        record.clips.append(optimizer.last_clip)
        optimizer.zero_grad()
        model.update_router_bias(BIAS_RATE)
    record.finish(model)
    return record


def over_ranks(model, layout, rank, world, micro_batches=1):
    record = Record()
    optimizer = optimizer_of(model, mesh=layout.mesh)
    assert isinstance(optimizer, parallel.MuonClip)
    model.use_sequence_loss(BALANCE, scale=1 / micro_batches)
    for step in range(STEPS):
        mine = tokens(step, world)[ROWS * rank : ROWS * (rank + 1)]
        total = torch.zeros((), dtype=torch.float64)
        for ids in mine.chunk(micro_batches):
            loss = loss_of(model, ids) / micro_batches
            loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        record.losses.append(float(total) / world)
        layout.reduce_gradients(model)
        if step == 0:
            grads = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
            record.gradients = grads
        record.norms.append(float(layout.clip_grad_norm_(model.parameters(), torch.inf)))
        layout.reduce_statistics(model)
        record.counts.append(model.expert_load())
        optimizer.step()
        record.clips.append(optimizer.last_clip)
        optimizer.zero_grad()
        model.update_router_bias(BIAS_RATE)
    record.finish(model)
    return record


def compare(got, want):
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        assert (got.gradients[name] - gradient).norm() <= GRADIENT * gradient.norm(), name
    bound = weight_bound(max(max(w.shape) for w in want.weights.values()))
    assert bound < 1e-9
    for name, weight in want.weights.items():
        assert (got.weights[name] - weight).abs().max() <= bound, name
    for loss, other, path in zip(got.losses, want.losses, want.paths):
        assert abs(loss - other) <= 2 * bound * path + GRADIENT * abs(other), (loss, other)
    assert abs(got.norms[0] - want.norms[0]) <= GRADIENT * want.norms[0]
    clipped = 0
    for reports, others in zip(got.clips, want.clips):
        assert reports.keys() == others.keys()
        for layer, report in others.items():
            torch.testing.assert_close(reports[layer].max_logit, report.max_logit, rtol=2**-22, atol=0)
            torch.testing.assert_close(reports[layer].gamma, report.gamma, rtol=2**-22, atol=0)
            clipped += int((report.gamma < 1).sum())
    assert clipped > 0
    for counts, others in zip(got.counts, want.counts):
        assert all(torch.equal(counts[layer], other) for layer, other in others.items())
    assert got.buffers and all(torch.equal(got.buffers[name], b) for name, b in want.buffers.items())
    assert all(b.abs().max() > 0 for b in want.buffers.values())


# ---- layouts. name: (ranks, ep, options, micro-batches, changes of the configuration)

CASES = {
    "dp": (2, 1, dict(fsdp=False), 1, {}),
    "ep": (2, 2, dict(fsdp=False), 2, {}),
    "fsdp": (2, 1, dict(checkpoint_activations=True), 2, {}),
    "ep and fsdp of the rest": (2, 2, {}, 1, {}),
    "ep and dp": (4, 2, dict(fsdp=False, checkpoint_activations=True), 1, {}),
    "ep and fsdp": (4, 2, dict(checkpoint_activations=True), 2, {}),
    "uneven shards of experts": (4, 2, {}, 1, dict(n_routed_experts=6)),
    "ranks without experts": (4, 2, {}, 1, dict(n_routed_experts=2)),
}


def cases(rank, world, folder):
    """Whether each case is as one process: None, or what differs."""
    join(rank, world, folder)
    found, references = {}, {}
    for name, (ranks, ep, options, micro_batches, changes) in CASES.items():
        if ranks != world:
            continue
        key = str(changes)
        references[key] = references.get(key) or one_process(whole_model(**changes), world)
        found[name] = attempt(check_case, rank, world, ep, options, micro_batches, changes, references[key])
    return found


def check_case(rank, world, ep, options, micro_batches, changes, want):
    layout = Layout(make_mesh(ep=ep, device_type="cpu"))
    model = parallelize(whole_model(**changes), layout, **OPTIONS, **options)
    assert isinstance(model, K2Model) and isinstance(model, FSDPModule) == options.get("fsdp", True)
    assert set(want.weights) == {name for name, _ in model.named_parameters()}
    stack = model.model.layers[1].mlp.experts.gate_up_proj
    here, every = len(stack.to_local() if isinstance(stack, DTensor) else stack), len(stack)
    shares = world if options.get("fsdp", True) else ep
    if every % shares == 0:
        assert here == every // shares
    compare(over_ranks(model, layout, rank, world, micro_batches), want)


def attempt(check, *arguments):
    """None, or what was wrong; the other ranks go on with this one."""
    try:
        check(*arguments)
    except AssertionError as error:
        return f"{error!r} at line {error.__traceback__.tb_next.tb_lineno}"


# ---- bfloat16 products, float32 weights


class Masters:
    """One process: float32 weights, and a copy in bfloat16, but for the router, that computes each rank's gradients."""

    def __init__(self, model):
        self.masters, self.model = model, copy.deepcopy(model)
        for name, p in self.model.named_parameters():
            p.data = p.data if name.endswith("gate.weight") else p.data.bfloat16()
        self.model.use_sequence_loss(BALANCE)
        clip = QKClip(TAU, max_logits=self.model.max_logits, reset_max_logits=self.model.reset_max_logits)
        self.optimizer = optim.MuonClip(self.masters, LR, qk_clip=clip)

    @torch.no_grad()
    def take_weights(self):
        for p, master in zip(self.model.parameters(), self.masters.parameters()):
            p.copy_(master)

    def gradients(self, ids, ranks):
        """Means of float32 over the ranks' tokens; returns the loss of each rank."""
        self.take_weights()
        losses = []
        for mine in ids.chunk(ranks):
            self.model.zero_grad()
            loss = loss_of(self.model, mine)
            loss.backward()
            losses.append(loss.item())
            for p, master in zip(self.model.parameters(), self.masters.parameters()):
                if p.grad is not None:
                    part = p.grad.float() / ranks
                    master.grad = part if master.grad is None else master.grad + part
        return losses


def bfloat16(rank, world, folder):
    join(rank, world, folder)
    found = {"fsdp": attempt(check_bfloat16, rank, world, 1)} if world == 2 else {}
    return found | {"ep": attempt(check_bfloat16, rank, world, 2)}


def check_bfloat16(rank, world, ep):
    """With ep = 1 and two ranks all is the same to the bit: the same products, and (a + b) / 2 = a / 2 + b / 2.

    With ep = 2 an expert's product over the tokens of two ranks is rounded once, not once for each, and how many rows
    there are decides the order of sums. Between an expert's weight and the loss lie fewer than 16 roundings of 2^-9 in
    each direction: a gradient differs by 2^-4 of its norm at most. Weights then part, by no more than an update of Muon
    (of 0.2 sqrt(max(m, n)) lr in the spectral norm, times the 1.3 that five iterations may leave) in each; AdamW's are
    smaller.
    """
    layout = Layout(make_mesh(ep=ep, device_type="cpu"))
    want = Masters(whole_model().float())
    options = dict(compute_dtype=torch.bfloat16, checkpoint_activations=True)
    model = parallelize(whole_model().float(), layout, **OPTIONS, **options).use_sequence_loss(BALANCE)
    optimizer = optimizer_of(model, mesh=layout)
    dtypes = {}
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda module, args, out: dtypes.update(logits=out.dtype, weight=module.weight.dtype))
    exact = ep == 1
    for step in range(STEPS):
        ids = tokens(step, world)
        losses = want.gradients(ids, world)
        logits = model(ids[ROWS * rank : ROWS * (rank + 1), :-1])
        assert logits.dtype == torch.float32 and torch.equal(logits, logits.bfloat16())
        model.reset_max_logits()
        for layer in (m for m in model.modules() if isinstance(m, Router)):
            layer.expert_counts.zero_()
        loss = loss_of(model, ids[ROWS * rank : ROWS * (rank + 1)])
        loss.backward()
        layout.reduce_gradients(model)
        assert loss.item() == losses[rank] if exact else abs(loss.item() - losses[rank]) < 2**-4 * losses[rank]
        for (name, p), q in zip(model.named_parameters(), want.masters.parameters()):
            assert p.dtype == torch.float32, name
            if q.grad is None:
                assert p.grad is None
            elif exact:
                assert torch.equal(whole(p.grad), q.grad), f"{step} {name}"
            elif step == 0:
                assert p.grad.dtype == torch.float32, name
                assert (whole(p.grad) - q.grad).norm() <= 2**-4 * q.grad.norm(), name
        layout.reduce_statistics(model)
        assert all(s.dtype == torch.float32 for s in model.max_logits().values())
        for one, other in ((model, optimizer), (want.model, want.optimizer)):
            other.step()
            other.zero_grad()
            one.update_router_bias(BIAS_RATE)
        assert any(bool((report.gamma < 1).any()) for report in optimizer.last_clip.values())
    assert dtypes == dict(logits=torch.float32, weight=torch.float32)
    for p, q in zip(model.parameters(), want.masters.parameters()):
        p, q = whole(p.detach()), q.detach()
        assert (
            torch.equal(p, q)
            if exact
            else bool((p - q).abs().max() <= 2 * STEPS * 1.3 * LR * 0.2 * max(q.shape) ** 0.5)
        )


# ---- the optimizer's state, refusals


def more(rank, world, folder):
    join(rank, world, folder)
    checks = [check_refused, check_documentation] if world == 2 else [check_state]
    found = {check.__name__: attempt(check, rank, world) for check in checks}
    return found | {"check_loaded": attempt(check_loaded, rank, folder)}


def check_documentation(rank, world):
    """The program of docs/training.md."""
    text = (Path(__file__).parents[2] / "docs/training.md").read_text()
    program = text.split("## Training over ranks")[1].split("```python\n")[1].split("```")[0]
    batches = [tokens(step, world)[ROWS * rank : ROWS * (rank + 1)].split(1) for step in range(2)]
    names = dict(globals(), config=tiny.config(num_hidden_layers=2), batches=batches, MuonClip=optim.MuonClip)
    exec(program, names)
    model = names["model"]
    start = K2Model(model.config).requires_grad_(False)  # of the same shapes
    assert names["optimizer"].param_groups[0]["step"] == 2 and names["loss"].isfinite()
    for p, q in zip(model.parameters(), start.parameters()):
        assert isinstance(p, DTensor) and p.shape == q.shape and p.full_tensor().isfinite().all()
    names["layout"].check_replicas(model)
    assert not any(load.any() for load in model.expert_load().values())  # the router's biases took it


def check_loaded(rank, folder):
    """A model whose experts were loaded in parts."""
    want, layout = whole_model(), Layout(make_mesh(ep=2, device_type="cpu"))
    if rank == 0:
        want.save_pretrained(f"{folder}/model")
    dist.barrier()
    model = K2Model.from_pretrained(f"{folder}/model", progress=False, mesh=layout, dtype=torch.float64)
    model = parallelize(model, layout, **OPTIONS)
    for (name, p), q in zip(model.named_parameters(), want.parameters()):
        assert torch.equal(whole(p.detach()), q), name


def check_state(rank, world):
    """The state of experts over dp x ep, among them ranks without any, is whole in `state_dict`, and is loaded from
    whole tensors as from DTensors."""
    for experts in (8, 6, 2):
        layout = Layout(make_mesh(ep=2, device_type="cpu"))
        model = parallelize(whole_model(n_routed_experts=experts).float().bfloat16(), layout, **OPTIONS)
        optimizer = optimizer_of(model, mesh=layout)
        loss_of(model, tokens(0, world)[ROWS * rank : ROWS * (rank + 1)]).backward()
        optimizer.step()
        state = optimizer.state_dict()
        plain = {**state, "state": {i: {k: whole(v) for k, v in s.items()} for i, s in state["state"].items()}}
        for saved in (state, plain):
            fresh = optimizer_of(model, mesh=layout)
            fresh.load_state_dict(saved)
            again = fresh.state_dict()["state"]
            for i, entries in plain["state"].items():
                for key, value in entries.items():
                    assert torch.equal(whole(again[i][key]), value), (experts, i, key)
        name, stack = next((n, p) for n, p in model.named_parameters() if n.endswith("experts.down_proj"))
        number = optimizer.param_groups[0]["param_names"].index(name)
        assert plain["state"][number]["momentum_buffer"].shape == stack.shape
        assert plain["state"][number]["master"].abs().amax((1, 2)).min() > 0  # of every expert


def check_refused(rank, world):
    layout = Layout(make_mesh(ep=2, device_type="cpu"))

    def refused(error, match, model=None, **options):
        with pytest.raises(error, match=match):
            parallelize(whole_model() if model is None else model, layout, **OPTIONS | options)

    half = dict(compute_dtype=torch.bfloat16)
    refused(UnsupportedError, "compute_dtype must be None, or torch.bfloat16 with fsdp and float32", **half)
    refused(UnsupportedError, "with fsdp=False", whole_model().float(), fsdp=False, **half)
    refused(UnsupportedError, "got torch.float16", whole_model().float(), compute_dtype=torch.float16)
    refused(UnsupportedError, "must not share a weight beside MTP", whole_model(tie_word_embeddings=True))
    refused(ValueError, "must have decoder layers, got a Linear", nn.Linear(2, 2))
    refused(TypeError, "gradients", gradients="sum")
    mixed = whole_model()
    mixed.model.norm.float()
    refused(ValueError, "of one dtype", mixed)
    refused(ValueError, "must not be distributed yet", parallelize(whole_model(), layout, **OPTIONS))
    refused(ValueError, "must have all experts", parallelize(whole_model(), layout, **OPTIONS, fsdp=False), fsdp=False)
    # A meta model stays one; embedding and head that share a weight are one unit.
    with torch.device("meta"):
        model = parallelize(whole_model(), layout, **OPTIONS)
    assert all(p.is_meta and isinstance(p, DTensor) for p in model.parameters())
    tied = dict(tie_word_embeddings=True, num_nextn_predict_layers=0)
    model, want, ids = parallelize(whole_model(**tied), layout, **OPTIONS), whole_model(**tied), tokens(0, world)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for _ in range(2):
        loss_of(want, ids).backward()
        loss_of(model, ids[ROWS * rank : ROWS * (rank + 1)]).backward()
    for (name, p), q in zip(model.named_parameters(), want.parameters()):
        assert (whole(p.grad) - q.grad).norm() <= GRADIENT * q.grad.norm(), name
    assert (
        abs(layout.clip_grad_norm_(model.parameters(), 1e-3) - nn.utils.clip_grad_norm_(want.parameters(), 1e-3)) < 1e-9
    )
    for (name, p), q in zip(model.named_parameters(), want.parameters()):
        assert (whole(p.grad) - q.grad).norm() <= 4 * GRADIENT * q.grad.norm(), name
