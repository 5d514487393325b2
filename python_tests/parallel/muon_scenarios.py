"""What the ranks do with the sharded MuonClip, for `ranks.py`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from rank_scenarios import join
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from k2kernels import optim
from k2kernels.model import K2Config, K2Model
from k2kernels.optim import QKClip
from k2kernels.parallel import Layout, MuonClip, expert_parallel, make_mesh, muon, muon_traffic

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
HEADS = 3


class Toy(nn.Module):
    """Matrices whose rows do not divide by the ranks, fewer rows than ranks, a stack, blocks, biases, an embedding."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        shapes = dict(
            query=(HEADS * 5, 12),  # [nope 3 | rope 2]
            key=(HEADS * 4, 9),  # [nope 3 | value 1]
            query_bias=(HEADS * 5,),
            gate_up_proj=(14, 6),  # two blocks
            tall=(11, 3),
            short=(2, 17),
            same=(11, 3),
            stack=(3, 6, 5),
            norm=(13,),
        )
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=F64).to(dtype)))
        self.embed = nn.Embedding(7, 6, dtype=dtype)


def target():
    fields = dict(layer=0, num_heads=HEADS, nope_dim=3, rope_dim=2, value_dim=1)
    return dict(query=("query", "query_bias"), key=("key",), **fields)


def maxima_of(step, rank):
    """Of one rank: the largest of a head is not always on the same one. No head is hot in every step."""
    generator = torch.Generator().manual_seed(1000 + 10 * step + rank)
    return torch.rand(HEADS, generator=generator) * (3 + step)


class Run:
    """A toy and its optimizer; `step` is with the same gradients on all ranks and in one process."""

    def __init__(self, make, world, rank=None, **options):
        self.step, self.world, self.rank = 0, world, rank
        clip = QKClip(2.0, targets=[target()], max_logits=self.maxima, reset_max_logits=lambda: None, **options)
        self.toy, self.optimizer = make(lambda named, **more: (named, dict(lr=0.1, qk_clip=clip, adamw=dict(lr=0.03))))

    def maxima(self):
        every = [maxima_of(self.step, rank) for rank in range(self.world)]
        return {0: torch.stack(every).amax(0) if self.rank is None else every[self.rank].clone()}

    def go(self, step, without=()):
        self.step = step
        generator = torch.Generator().manual_seed(step)
        for name, p in self.toy.named_parameters():
            grad = torch.randn(p.shape, generator=generator, dtype=F64).to(p.dtype)
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = None if name in without else grad
        self.optimizer.step()


def one_process(dtype, **more):
    def make(arguments):
        toy = Toy(dtype)
        named, options = arguments(list(toy.named_parameters()))
        return toy, optim.MuonClip(named, splits={"query": HEADS}, **options, **more)

    return make


def over_ranks(dtype, mesh, how, **more):
    def make(arguments):
        toy = Toy(dtype)
        if how == "sharded":
            fully_shard(toy, mesh=mesh)
        elif how == "mixed":  # some replicas, a replicated DTensor, and columns for AdamW
            keep = {toy.tall, toy.key, toy.norm, toy.embed.weight}
            fully_shard(toy, mesh=mesh, ignored_params=keep)
            toy.norm = nn.Parameter(distribute_tensor(toy.norm.detach(), mesh, [Replicate()]))
            toy.embed.weight = nn.Parameter(distribute_tensor(toy.embed.weight.detach(), mesh, [Shard(1)]))
        named, options = arguments(list(toy.named_parameters()))
        options |= dict(bucket_elements=60) | more
        return toy, MuonClip(named, splits={"query": HEADS}, mesh=mesh, **options)

    return make


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def same_parameters(got, want, where):
    for (name, p), q in zip(got.toy.named_parameters(), want.toy.parameters()):
        assert torch.equal(whole(p.detach()), q.detach()), f"{where}: {name}"


def same_states(got, want, where):
    got, want = got.optimizer.state_dict(), want.optimizer.state_dict()
    names = [name for group in want["param_groups"] for name in group["param_names"]]
    for i, entries in want["state"].items():
        assert entries.keys() == got["state"][i].keys(), f"{where}: {names[i]} {got['state'][i].keys()}"
        for key, value in entries.items():
            new = whole(got["state"][i][key])
            assert new.dtype == value.dtype and torch.equal(new, value), f"{where}: {key} of {names[i]}"


def check_same_gradients(rank, world, how, dtype, steps=4, **clip):
    """Bit for bit one process: weights, states, reports."""
    mesh = init_device_mesh("cpu", (world,))
    got = Run(over_ranks(dtype, mesh, how), world, rank, **clip)
    want = Run(one_process(dtype), world, **clip)
    clips = 0
    for step in range(steps):
        where = f"{how}, {dtype}, step {step}"
        without = [(), ("key", "tall"), ("embed.weight", "stack"), ()][step % 4]
        for run in (got, want):
            if step == 3:  # masters must follow
                with torch.no_grad():
                    run.toy.tall.mul_(0.5)
                    run.toy.embed.weight.mul_(0.5)
            run.go(step, without)
        same_parameters(got, want, where)
        same_states(got, want, where)
        (report,), (expected,) = got.optimizer.last_clip.values(), want.optimizer.last_clip.values()
        assert torch.equal(report.max_logit, expected.max_logit) and torch.equal(report.gamma, expected.gamma), where
        clips += int((report.gamma < 1).sum())
    assert clips > 2
    for name, p in got.toy.named_parameters():  # one owner has the momentum
        if owners := got.optimizer.owner_of(name):
            momentum = got.optimizer.state[p]["momentum_buffer"]
            rows = torch.tensor([len(momentum)])
            assert (len(momentum) > 0) == (rank in owners), name
            dist.all_reduce(rows)
            assert int(rows) == p.numel() // p.shape[-1], name


# ---- faults, each of which the comparison must see


def momentum_of_another(run):
    """The owner takes rows of another momentum."""

    def update(self, *args):
        for p in self.params:
            momentum = self.optimizer.state[p]["momentum_buffer"]
            momentum.copy_(momentum.roll(1, 0))
        return real(self, *args)

    real = muon._Exchange.update
    return mock.patch.object(muon._Exchange, "update", update)


def momentum_lost(run):
    """The momentum begins anew, as if the owner had changed."""

    def update(self, *args):
        for p in self.params:
            self.optimizer.state[p]["momentum_buffer"].zero_()
        return real(self, *args)

    real = muon._Exchange.update
    return mock.patch.object(muon._Exchange, "update", update)


def shards_in_reverse(run):
    """A rank writes its rows of the new weight in another order."""
    real = muon.Arrived.take
    return mock.patch.object(muon.Arrived, "take", lambda self, *size: real(self, *size).flip(0))


def padded_shards(run):
    """An uneven shard is read with a row of padding before it."""

    def shards(self, part):
        weight, grad = real(self, part)
        uneven = self.params[part.parameter].shape[0] % self.ranks
        return weight, torch.cat([grad[:1] * 0, grad[:-1]]) if uneven else grad

    real = muon._Sharded.shards
    return mock.patch.object(muon._Sharded, "shards", shards)


def ranks_late(run):
    """The maxima are reduced before any rank but the first has written its own."""
    late = torch.inf if run.rank else 0
    return mock.patch.object(run.optimizer, "_read_here", lambda: {0: run.maxima()[0] - late})


def maxima_of_one_rank(run):
    """They are not reduced."""
    return mock.patch.object(run.optimizer._clipper, "read", run.maxima)


def not_broadcast(run):
    """One owner's new weights are not sent."""

    def broadcast(self, owner, parts):
        if owner == run.world - 1:
            return owner, [], torch.empty(0), SimpleNamespace(wait=lambda: None)
        return real(self, owner, parts)

    real = muon._Replicated.broadcast
    return mock.patch.object(muon._Replicated, "broadcast", broadcast)


def nothing(run):
    return contextlib.nullcontext()


FAULTS = [
    (nothing, "sharded"),
    (nothing, "replicas"),
    (momentum_of_another, "sharded"),
    (momentum_of_another, "replicas"),
    (momentum_lost, "sharded"),
    (shards_in_reverse, "sharded"),
    (padded_shards, "sharded"),
    (ranks_late, "sharded"),
    (ranks_late, "replicas"),
    (maxima_of_one_rank, "replicas"),
    (not_broadcast, "replicas"),
]


def faults(rank, world, folder):
    """Whether any rank has other weights than one process, by fault and way to hold parameters."""
    join(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for plant, how in FAULTS:
        got, want = Run(over_ranks(F32, mesh, how), world, rank), Run(one_process(F32), world)
        with plant(got):
            for step in range(3):
                got.go(step)
                want.go(step)
        pairs = [(whole(p.detach()), q) for p, q in zip(got.toy.parameters(), want.toy.parameters())]
        differs = torch.tensor([float(not all(torch.equal(p, q.detach()) for p, q in pairs))])
        dist.all_reduce(differs)
        found[f"{plant.__name__}, {how}"] = bool(differs)
    return found


def same_gradients(rank, world, folder):
    join(rank, world, folder)
    for how, dtype in (("replicas", F32), ("sharded", F32), ("sharded", BF16), ("mixed", F64), ("mixed", BF16)):
        check_same_gradients(rank, world, how, dtype)
    check_same_gradients(rank, world, "sharded", F32, smoothing=0.5)
    check_same_gradients(rank, world, "replicas", BF16, smoothing=0.5)
    return "the same"


# ---- a model


def tokens(step, world, config):
    return torch.randint(0, config.vocab_size, (2 * world, 13), generator=torch.Generator().manual_seed(step))


def backward(model, ids):
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()


def make_model(name):
    torch.manual_seed(0)
    if name == "tiny":
        return K2Model(K2Config.preset("tiny")).double().train()
    return tiny.model(name, num_hidden_layers=2).double().train()


def check_model(rank, world, name, how):
    """Three steps on the tokens of all ranks: the largest difference of a weight from one process, and more."""
    layout = Layout(make_mesh(ep=world if how == "experts" else 1, device_type="cpu"))
    mesh = layout.flat
    model, want = make_model(name), make_model(name)
    tau = 0.1 if name == "tiny" else 0.5
    if how == "experts":
        expert_parallel(model, layout, max_tokens=256, row_dtype=F64)
    experts = {p for n, p in model.named_parameters() if ".mlp.experts." in n} if how == "experts" else set()
    if how != "replicas":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, ignored_params=experts)
        fully_shard(model, mesh=mesh, ignored_params=experts)
    optimizer = MuonClip(model, 0.02, mesh=mesh, qk_clip=QKClip(tau), bucket_elements=2**14)
    maxima: dict = {}
    expected = optim.MuonClip(
        want, 0.02, qk_clip=QKClip(tau, max_logits=lambda: maxima, reset_max_logits=want.reset_max_logits)
    )
    clips = 0
    for step in range(3):
        ids = tokens(step, world, model.config)
        backward(model, ids[2 * rank : 2 * rank + 2])
        backward(want, ids)
        for p in model.parameters():
            if how == "replicas":
                dist.all_reduce(p.grad)
            if how == "replicas" or p in experts:
                p.grad /= world
        maxima.update(want.max_logits())
        optimizer.step()
        expected.step()
        for layer, report in expected.last_clip.items():
            assert torch.equal(report.gamma < 1, optimizer.last_clip[layer].gamma < 1), "other heads were clipped"
            clips += int((report.gamma < 1).sum())
        layout.reduce_statistics(model)  # the counts; the optimizer has reduced the maxima that it needs itself
        loads = model.expert_load(), want.expert_load()
        assert all(torch.equal(loads[0][layer], load) for layer, load in loads[1].items()), "loads"
        for one, other in ((model, optimizer), (want, expected)):
            one.update_router_bias(1e-2)
            other.zero_grad()
    worst, parted = 0.0, []
    for (n, p), q in zip(model.named_parameters(), want.parameters()):
        q = q.detach()
        if p in experts and not isinstance(p, DTensor):
            q = q.tensor_split(world)[rank]
        elif how == "replicas":
            first = p.detach().clone()
            dist.broadcast(first, 0)
            parted += [] if torch.equal(first, p) else [n]
        worst = max(worst, float((whole(p.detach()) - q).abs().max()))
    assert parted == [], f"replicas differ: {parted}"
    for a, b in zip(model.buffers(), want.buffers()):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-9, atol=0):
            raise AssertionError("buffers differ")
    moved = max(float((a - b).abs().max()) for a, b in zip(want.parameters(), make_model(name).parameters()))
    longest = max(max(p.shape) for p in want.parameters() if p.dim() > 1)
    return dict(worst=worst, clips=clips, moved=moved, longest=longest)


def models(rank, world, folder):
    join(rank, world, folder)
    hows = ["replicas", "sharded", "experts"] if world == 2 else ["replicas", "experts"]
    return {how: check_model(rank, world, "kimi", how) for how in hows}


def preset(rank, world, folder):
    join(rank, world, folder)
    return {how: check_model(rank, world, "tiny", how) for how in ("sharded", "experts")}


# ---- checkpoints, in a folder of the test's


CHECKPOINTS = [("replicas", BF16), ("sharded", F32), ("sharded", BF16), ("mixed", F64)]
FIRST_WORLD = 2  # whose maxima all runs see


def start(how, dtype, mesh):
    if how == "plain":
        return Run(one_process(dtype), FIRST_WORLD, smoothing=0.5)
    return Run(over_ranks(dtype, mesh, how), FIRST_WORLD, smoothing=0.5)


def save(rank, world, folder, plain=False):
    """Two steps, then a checkpoint of each kind."""
    join(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    for how, dtype in CHECKPOINTS:
        run = start("plain" if plain else how, dtype, mesh)
        run.go(0)
        run.go(1)
        model, state = get_state_dict(run.toy, run.optimizer)
        path = Path(os.environ["K2K_TEST_CHECKPOINTS"], f"{how}-{dtype}")
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=path)
    return "saved"


def save_plain(rank, world, folder):
    return save(rank, world, folder, plain=True)


def resume(rank, world, folder, plain=False):
    """Two more steps: the bits of four in one process."""
    join(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    for how, dtype in CHECKPOINTS:
        run, want = start("plain" if plain else how, dtype, mesh), start("plain", dtype, None)
        with torch.no_grad():
            for p in run.toy.parameters():
                p.zero_()
        model, state = get_state_dict(run.toy, run.optimizer)
        path = Path(os.environ["K2K_TEST_CHECKPOINTS"], f"{how}-{dtype}")
        loaded = {"model": model, "optimizer": state}
        dcp.load(loaded, checkpoint_id=path)
        set_state_dict(run.toy, run.optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        for step in range(4):
            want.go(step)
        run.go(2)
        run.go(3)
        where = f"{how}, {dtype}, {world} ranks"
        same_parameters(run, want, where)
        if not plain:
            same_states(run, want, where)
    return "the same"


def resume_plain(rank, world, folder):
    return resume(rank, world, folder, plain=True)


# ---- what is sent


class Counted:
    """Counts the tensors that pass to collectives: what `muon_traffic` describes."""

    def __init__(self, rank):
        self.rank, self.seen = rank, [0, 0, 0]

    def add(self, sent, received):
        self.seen = [a + b for a, b in zip(self.seen, (1, sent, received))]

    @contextlib.contextmanager
    def counting(self):
        real = dist.all_to_all_single, dist.broadcast, dist.all_reduce

        def all_to_all_single(out, given, out_sizes, in_sizes, **options):
            others = [r for r in range(len(in_sizes)) if r != self.rank]
            assert given.nbytes == sum(in_sizes) and out.nbytes == sum(out_sizes)
            self.add(sum(in_sizes[r] for r in others), sum(out_sizes[r] for r in others))
            return real[0](out, given, out_sizes, in_sizes, **options)

        def broadcast(t, group_src, **options):
            self.add(*((t.nbytes, 0) if group_src == self.rank else (0, t.nbytes)))
            return real[1](t, group_src=group_src, **options)

        def all_reduce(t, *args, **options):
            self.add(t.nbytes, t.nbytes)
            return real[2](t, *args, **options)

        with contextlib.ExitStack() as patches:
            for new in (all_to_all_single, broadcast, all_reduce):
                patches.enter_context(mock.patch.object(dist, new.__name__, new))
            yield


def sent(rank, world, folder):
    """[counted, computed] of each way to hold a model."""
    join(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for how in ("sharded", "replicas", "experts", "halves"):
        dtype = BF16 if how == "halves" else F32
        model = tiny.model("kimi", num_hidden_layers=2).train().to(dtype)
        options = dict(bucket_elements=2**13)
        local = ()
        if how == "experts":
            local = ("*.mlp.experts.*",)
        computed = muon_traffic(model, world, sharded=how != "replicas", local=local, **options)[rank]
        experts = {p for n, p in model.named_parameters() if local and ".mlp.experts." in n}
        if how != "replicas":
            fully_shard(model, mesh=mesh, ignored_params=experts)
            if not experts:  # stacks stay where they are: as matrices, they are the plan's
                stacks = {n for n, p in model.named_parameters() if p.ndim == 3}
                computed = muon_traffic(
                    tiny.model("kimi", num_hidden_layers=2).to(dtype), world, local=stacks, **options
                )[rank]
        optimizer = MuonClip(model, 0.02, mesh=mesh, qk_clip=QKClip(0.5), local=local, **options)
        counted = Counted(rank)
        for _ in range(2):  # the first takes over the masters
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            counted.seen = [0, 0, 0]
            with counted.counting():
                optimizer.step()
        found[how] = [counted.seen, list(computed)]
    return found


# ---- what is refused


def message(call, *args, **options):
    try:
        call(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def refused(rank, world, folder):
    """What was raised, by case."""
    join(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    both = init_device_mesh("cpu", (1, world), mesh_dim_names=("pp", "dp"))
    found = {}

    def parameter(placements, over=mesh, shape=(8, 6)):
        return nn.Parameter(distribute_tensor(torch.ones(shape), over, placements))

    def make(named, **options):
        return MuonClip(named, 0.1, **{"mesh": mesh, "qk_clip": None, **options})

    plain = nn.Parameter(torch.ones(8, 6))
    found["columns"] = message(make, [("a", parameter([Shard(1)]))])
    found["two dimensions"] = message(make, [("a", parameter([Replicate(), Shard(0)], both))])
    found["rows of a stack"] = message(make, [("a", parameter([Shard(1)], shape=(2, 8, 6)))])
    partial = DTensor.from_local(torch.ones(8, 6), mesh, [Partial()])
    found["partial"] = message(make, [("a", nn.Parameter(partial))])
    flat = nn.Parameter(torch.ones(8, 6))
    flat._fsdp_flattened = True
    found["fsdp1"] = message(make, [("a", flat)])
    found["mesh"] = message(make, [("a", plain)], mesh=both)
    found["no mesh"] = message(make, [("a", plain)], mesh=dist.group.WORLD)
    found["capturable"] = message(make, [("a", plain)], capturable=True)
    found["local"] = message(make, [("a", plain)], local=["b.*"])
    found["optim"] = message(optim.MuonClip, [("a", parameter([Shard(0)]))], 0.1, qk_clip=None)
    derived = type("Derived", (optim.MuonClip,), {})
    found["derived"] = message(derived, [("a", plain)], 0.1, mesh=mesh)
    optimizer = make([("a", plain), ("b", nn.Parameter(torch.ones(8, 6)))])
    found["add"] = message(optimizer.add_param_group, dict(params=[], method="muon"))
    plain.grad = torch.ones(8, 6) if rank == 0 else None
    found["gradient on some ranks"] = message(optimizer.step)
    # AdamW takes any placement; targets of QK-Clip must have known rows.
    make([("a", parameter([Shard(1)]))], rules={"a": "adamw"})
    clip = QKClip(
        targets=[dict(layer=0, query="a", key=None, num_heads=2, nope_dim=4)],
        max_logits=lambda: {},
        reset_max_logits=lambda: None,
    )
    found["target"] = message(make, [("a", parameter([Shard(1)]))], rules={"a": "adamw"}, qk_clip=clip)
    return found


def overflow(rank, world, folder):
    """An infinity on one rank changes nothing on any."""
    join(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    run = Run(over_ranks(F32, mesh, "sharded", skip_non_finite=True), world, rank)
    run.go(0)
    before = {name: p.detach().clone() for name, p in run.toy.named_parameters()}
    for name, p in run.toy.named_parameters():
        p.grad = torch.ones_like(p)
        if name == "query" and rank == world - 1:
            p.grad.to_local()[0, 0] = torch.inf
    run.optimizer.step()
    assert run.optimizer.last_skipped is True
    for name, p in run.toy.named_parameters():
        assert torch.equal(whole(p.detach()), whole(before[name])), name
    run.go(1)
    assert run.optimizer.last_skipped is False
    return "skipped"
