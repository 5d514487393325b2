"""What every rank checks of a model over ranks: gradients, copies, clipping, and the files of checkpoints."""

from __future__ import annotations

import copy
import hashlib
import math
import weakref
from pathlib import Path
from unittest import mock

import checkpoints
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from k2kernels.model import K2Model
from k2kernels.model.shards import Reader, Writer, scan
from k2kernels.optim import MuonClip, QKClip
from k2kernels.parallel import Layout, expert_parallel, make_mesh

LAYERS = dict(num_hidden_layers=2)  # one dense, one with experts


def layout_of(world):
    """All ranks share the experts; of four, two do, and two have copies of them."""
    return Layout(make_mesh(ep=2, device_type="cpu"))


def whole_model(**changes):
    torch.manual_seed(0)
    return tiny.model("kimi", **{**LAYERS, **changes})


def split_model(layout, whole, **options):
    model = copy.deepcopy(whole)
    expert_parallel(model, layout, max_tokens=64, **{"step_timeout": 20.0, **options})
    return model


def ids_of(world, seed=0):
    """A sequence for each rank, known to all."""
    return torch.randint(0, 256, (world, 12), generator=torch.Generator().manual_seed(seed))


def loss_of(model, ids):
    return model(ids).square().mean()


def mine(layout, whole, name):
    """This rank's part of a tensor of the whole model."""
    if ".mlp.experts." not in name or layout.ep.size() == 1:
        return whole
    return whole.chunk(layout.ep.size())[layout.ep.get_local_rank()]


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def assert_parts(layout, model, whole):
    """The model has its part of every tensor of the whole one, to the bit."""
    want = whole.state_dict()
    got = model.state_dict()
    assert set(got) == set(want)
    for name, tensor in got.items():
        assert torch.equal(bits(local(tensor)), bits(mine(layout, want[name], name))), name


def bits(t):
    return t.detach().contiguous().flatten().view(torch.uint8)


def on_rank_0(rank, make):
    """Rank 0 makes files, and the others wait."""
    if rank == 0:
        make()
    dist.barrier()


# ---- checks: each is run on every rank


def check_experts_are_dtensors(rank, world, folder):
    layout, whole = layout_of(world), whole_model()
    model = split_model(layout, whole)
    down, full = (m.model.layers[1].mlp.experts.down_proj for m in (model, whole))
    assert isinstance(down, DTensor) and down.placements == (Shard(0),) and down.shape == full.shape
    assert torch.equal(down.full_tensor(), full)
    assert_parts(layout, model, whole)
    assert_parts(layout, copy.deepcopy(model), whole)
    assert_parts(layout, copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(whole).to(torch.bfloat16))
    alone = split_model(None, whole)
    assert type(alone.model.layers[1].mlp.experts.down_proj) is nn.Parameter
    ragged = whole_model(n_routed_experts=9)
    with pytest.raises(ValueError, match=r"a multiple of the 2 ranks of 'ep', got 9; the ranks that fit are \[3, 9\]"):
        split_model(layout, ragged)
    with pytest.raises(ValueError, match="gradients must be one of"):
        split_model(layout, whole, gradients="average")


def check_generation_and_fp8(rank, world, folder):
    """The same tokens as the whole model's, and a step with FP8 products."""
    layout, whole = layout_of(world), whole_model()
    model, ids = split_model(layout, whole), ids_of(world)[rank : rank + 1]
    options = dict(max_new_tokens=5, eos_token_ids=[])
    assert torch.equal(model.generate(ids, **options), whole.generate(ids, **options))
    loss_of(model.train().use_fp8(), ids).backward()
    assert all(local(p.grad).isfinite().all() for n, p in model.named_parameters() if ".mlp.experts." in n)


def check_gradients(rank, world, folder):
    """By DistributedDataParallel and by the layout: the means, or the sums, of what one process has."""
    layout, whole = layout_of(world), whole_model().double().train()
    ids = ids_of(world)
    whole_loss = torch.stack([loss_of(whole, ids[r : r + 1]) for r in range(world)])
    whole_loss.mean().backward()

    def compare(model, factor=1):
        for (name, got), want in zip(model.named_parameters(), whole.parameters()):
            if want.grad is None:
                assert got.grad is None, name
                continue
            want_grad = factor * mine(layout, want.grad, name)
            torch.testing.assert_close(local(got.grad), want_grad, rtol=1e-9, atol=1e-13)

    for gradients, factor in (("mean", 1), ("sum", world)):
        model = split_model(layout, whole, gradients=gradients)
        model.zero_grad()
        for part in ids[rank : rank + 1].split(1):
            loss_of(model, part).backward()
        layout.reduce_gradients(model)
        compare(model, factor)
    model = split_model(layout, whole, gradients="mean")
    model.zero_grad()
    copies = DistributedDataParallel(model)
    assert_parts(layout, model, whole)
    counts = model.model.layers[1].mlp.gate.expert_counts.zero_()
    for _ in range(2):  # the second pass copies buffers of rank 0
        model.zero_grad()
        copies(ids[rank : rank + 1]).square().mean().backward()
    assert counts.sum() == 2 * 2 * ids.shape[1]  # its own tokens, of two passes
    one = copy.deepcopy(whole)
    one.reset_max_logits()
    one.model.layers[1].mlp.gate.expert_counts.zero_()
    loss_of(one, ids[rank : rank + 1])
    assert torch.equal(counts, 2 * one.model.layers[1].mlp.gate.expert_counts)
    if world == 2:
        compare(model)


def check_a_wrapper_is_refused(rank, world, folder):
    """DistributedDataParallel of a module that contains the model cannot know what to leave alone."""

    class Around(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

    layout, whole = layout_of(world), whole_model()
    model = split_model(layout, whole)
    with pytest.raises(Exception) as error:
        DistributedDataParallel(Around(model))
    assert "DTensor" in str(error.value), str(error.value)
    assert_parts(layout, model, whole)


def check_distributed_checkpoint(rank, world, folder):
    """What the ranks save, a whole model, one process and ranks load; and what one process saves, ranks load."""
    layout, whole = layout_of(world), whole_model()
    model = split_model(layout, whole)
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/dcp")

    def emptied(model):
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()):
                t.zero_()
        return model

    def load(model, path, **options):
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id=f"{folder}/{path}", **options)
        model.load_state_dict(state)
        return model

    checkpoints.assert_same(load(emptied(whole_model()), "dcp").state_dict(), whole.state_dict())
    checkpoints.assert_same(load(emptied(whole_model()), "dcp", no_dist=True).state_dict(), whole.state_dict())
    assert_parts(layout, load(emptied(split_model(layout, whole)), "dcp"), whole)
    on_rank_0(rank, lambda: dcp.save(whole.state_dict(), checkpoint_id=f"{folder}/one", no_dist=True))
    assert_parts(layout, load(emptied(split_model(layout, whole)), "one"), whole)


def files(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(path).iterdir()}


def check_save(rank, world, folder):
    """The files are those of the whole model, to the byte; a failure is every rank's, and changes nothing."""
    layout, whole = layout_of(world), whole_model()
    on_rank_0(rank, lambda: whole.save_pretrained(f"{folder}/whole", max_shard_size=100_000))
    want = files(f"{folder}/whole")
    assert len(want) > 4  # several shards
    model = split_model(layout, whole)
    for _ in range(2):  # a new directory, and one that holds a checkpoint
        model.save_pretrained(f"{folder}/parts", max_shard_size=100_000)
        assert files(f"{folder}/parts") == want
        dist.barrier()

    add, calls = Writer.add, []

    def full(self, name, tensor):
        calls.append(name)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")
        add(self, name, tensor)

    for target, what in (("add", full), ("_finish", mock.Mock(side_effect=OSError(28, "No space left on device")))):
        with mock.patch.object(Writer, target, what):
            with pytest.raises(OSError if rank == 0 else RuntimeError, match="No space left on device") as error:
                model.save_pretrained(f"{folder}/parts", max_shard_size=100_000)
        assert rank == 0 or "rank 0 raised" in str(error.value)
        assert files(f"{folder}/parts") == want
        dist.barrier()
    model.save_pretrained(f"{folder}/parts", max_shard_size=100_000)
    # Copies on ranks that share no experts: one writes.
    copies = copy.deepcopy(whole)
    expert_parallel(copies, Layout(make_mesh(dp=world, device_type="cpu")), max_tokens=64)
    copies.save_pretrained(f"{folder}/copies", max_shard_size=100_000)
    assert files(f"{folder}/copies") == want


class Live(TorchDispatchMode):
    """Bytes of memory that tensors hold, and the most there were, without the meta device."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and not isinstance(t, DTensor) and t.device.type == "cpu":
                storage = t.untyped_storage()
                if storage not in self.seen:
                    self.seen[storage] = True
                    self._count(storage.nbytes())
                    weakref.finalize(storage, self._count, -storage.nbytes())
        return out

    def _count(self, size):
        self.now += size
        self.most = max(self.most, self.now)


class Reads:
    """What passes through `Reader.get`: bytes of experts and of others, and the most that was mapped at a time."""

    def __init__(self):
        self.experts = self.others = self.scales = self.mapped = 0

    def __enter__(self):
        get = Reader.get

        def counted(reader, info, rows=None):
            tensor = get(reader, info, rows)
            if info.name.endswith("_scale_inv"):
                self.scales += tensor.nbytes
            if ".mlp.experts." in info.name:
                self.experts += tensor.nbytes
            else:
                self.others += tensor.nbytes
            self.mapped = max(self.mapped, reader._mapped)
            return tensor

        self.patch = mock.patch.object(Reader, "get", counted)
        self.patch.start()
        return self

    def __exit__(self, *_):
        self.patch.stop()


def check_load(rank, world, folder):
    """A rank reads its experts and no other's, BF16 and FP8, and never holds more than what it keeps and one tensor."""
    path = Path(folder)

    def make():
        torch.manual_seed(0)
        checkpoints.fp8_checkpoint(path, dict(checkpoints.ALIGNED, n_routed_experts=32), shards=3)

    on_rank_0(rank, make)
    ids = ids_of(world)[rank : rank + 1]
    for ep in {2, world}:
        layout = Layout(make_mesh(ep=ep, device_type="cpu"))
        for name, options in (
            ("float", dict(dtype=torch.float64)),
            ("fp8", dict(dtype=torch.float64)),
            ("fp8", dict(dtype=torch.float32, keep_fp8=True)),
        ):
            stored = scan(path / name)
            experts = sum(info.nbytes for key, info in stored.items() if ".mlp.experts." in key)
            others = sum(info.nbytes for key, info in stored.items() if ".mlp.experts." not in key)
            whole = K2Model.from_pretrained(path / name, progress=False, **options)
            with Reads() as reads, Live() as live:
                model = K2Model.from_pretrained(path / name, progress=False, mesh=layout.mesh, **options)
            assert (reads.experts * ep, reads.others) == (experts, others)
            assert_parts(layout, model, whole)

            # Memory: what is kept, and of one tensor the file's pages and what decoding makes: 3 copies and scales;
            # of codes that are kept, masks.
            kept, all_of_it = (sum(local(t).nbytes for t in (*m.parameters(), *m.buffers())) for m in (model, whole))
            largest = max(math.prod(info.shape) for info in stored.values())
            decoding = largest * (3 if "keep_fp8" in options else 8 + 3 * options["dtype"].itemsize)
            assert kept <= live.most <= kept + decoding < all_of_it, (kept, live.most, decoding, all_of_it)
            assert reads.mapped <= max(info.nbytes for info in stored.values())
            of_experts = sum(p.nbytes for name, p in whole.named_parameters() if ".mlp.experts." in name)
            assert kept == all_of_it - of_experts + of_experts // ep

            with pytest.raises(ValueError, match=r"call k2kernels\.parallel\.expert_parallel"):
                model(ids)
            expert_parallel(model, layout.mesh, max_tokens=64, step_timeout=20.0)
            with torch.no_grad():
                got, want = model(ids), whole(ids)
            # FP8 products: the last bit of a float32 sum, which the number of rows decides, may move an activation to
            # the next code, by 1/16 of it at most; the weights are the same to the bit.
            tolerance = 1e-2 * float(want.abs().max()) if "keep_fp8" in options else 1e-11
            torch.testing.assert_close(got, want, rtol=1e-9, atol=tolerance)
            model.save_pretrained(path / "again")
            if rank == 0:
                whole.save_pretrained(path / "want")
                assert files(path / "again") == files(path / "want")
            dist.barrier()


def check_errors_of_loading_are_every_ranks(rank, world, folder):
    """A weight that only one rank reads is bad; a file that only one rank lacks."""
    layout, path = Layout(make_mesh(ep=world, device_type="cpu")), Path(folder, "bad")

    def make():
        whole_model().save_pretrained(path)

    on_rank_0(rank, make)
    read, last = Reader.get, 7 // (8 // world)

    def broken(reader, info, rows=None):
        if ".mlp.experts.7." in info.name:
            raise ValueError(f"{info.name} is damaged")
        return read(reader, info, rows)

    with mock.patch.object(Reader, "get", broken):
        want = r"^model.layers.1.mlp.experts.7" if rank == last else rf"rank {last} raised ValueError: model.layers.1"
        with pytest.raises(ValueError if rank == last else RuntimeError, match=want):
            K2Model.from_pretrained(path, progress=False, mesh=layout)
    where = path if rank else Path(folder, "nowhere")
    with pytest.raises(RuntimeError if rank else FileNotFoundError, match="nowhere"):
        K2Model.from_pretrained(where, progress=False, mesh=layout)
    model = K2Model.from_pretrained(path, progress=False, mesh=layout)
    other = Layout(make_mesh(dp=world, device_type="cpu"))
    with pytest.raises(ValueError, match="group must be the mesh that the model was loaded with"):
        expert_parallel(model, other, max_tokens=64)


def check_clip_grad_norm(rank, world, folder):
    """The norm of the whole model's gradients, whatever is where; torch's own function refuses."""
    layout, whole = layout_of(world), whole_model().double().train()
    ids = ids_of(world)
    torch.stack([loss_of(whole, ids[r : r + 1]) for r in range(world)]).mean().backward()
    for norm_type in (2.0, 1.0, float("inf")):
        model = split_model(layout, whole, gradients="mean")
        model.zero_grad()
        loss_of(model, ids[rank : rank + 1]).backward()
        layout.reduce_gradients(model)
        if norm_type == 2.0:
            with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        clipped = copy.deepcopy(whole)
        for p, q in zip(clipped.parameters(), whole.parameters()):
            p.grad = None if q.grad is None else q.grad.clone()
        want = nn.utils.clip_grad_norm_(clipped.parameters(), 1e-3, norm_type)
        got = layout.clip_grad_norm_(model.parameters(), 1e-3, norm_type)
        assert want > 1e-3
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
        for (name, p), q in zip(model.named_parameters(), clipped.parameters()):
            if q.grad is not None:
                torch.testing.assert_close(local(p.grad), mine(layout, q.grad, name), rtol=1e-8, atol=1e-13)


def check_beside_fsdp(rank, world, folder):
    """`fully_shard` of everything but the experts: gradients, their norm, distributed checkpoints."""
    layout, whole = layout_of(world), whole_model().double().train()
    model = split_model(layout, whole, gradients="mean")
    experts = {p for name, p in model.named_parameters() if ".mlp.experts." in name}
    for layer in model.model.layers:
        fully_shard(layer, mesh=layout.flat, ignored_params=experts)
    fully_shard(model, mesh=layout.flat, ignored_params=experts)
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/dcp")
    state = whole_model(initializer_range=1.0).double().state_dict()
    dcp.load(state, checkpoint_id=f"{folder}/dcp")
    checkpoints.assert_same(state, whole.state_dict())

    ids = ids_of(world)
    torch.stack([loss_of(whole, ids[r : r + 1]) for r in range(world)]).mean().backward()
    loss_of(model, ids[rank : rank + 1]).backward()
    layout.reduce_gradients(model)
    for got, want in zip(model.parameters(), whole.parameters()):
        if want.grad is not None:
            torch.testing.assert_close(got.grad.full_tensor(), want.grad, rtol=1e-9, atol=1e-13)
    want = nn.utils.clip_grad_norm_(whole.parameters(), 1e-3)
    torch.testing.assert_close(layout.clip_grad_norm_(model.parameters(), 1e-3), want, rtol=1e-9, atol=0)
    for got, want in zip(model.parameters(), whole.parameters()):
        if want.grad is not None:
            torch.testing.assert_close(got.grad.full_tensor(), want.grad, rtol=1e-8, atol=1e-13)
    model.save_pretrained(f"{folder}/parts")
    if rank == 0:
        whole.save_pretrained(f"{folder}/whole")
        assert files(f"{folder}/parts") == files(f"{folder}/whole")
    dist.barrier()


def check_statistics(rank, world, folder):
    """Maxima and counts are those of one process with all tokens, in one message each; without them nothing goes on."""
    layout, whole = layout_of(world), whole_model().double().train()
    ids = ids_of(world)
    model = split_model(layout, whole)
    for r in range(world):
        loss_of(whole, ids[r : r + 1])
    loss_of(model, ids[rank : rank + 1])
    for call in (layout.max_logits(model), lambda: model.update_router_bias(0.1)):
        with pytest.raises(ValueError, match=rf"must be those of all {world} ranks .* call .*reduce_statistics"):
            call()
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as calls:
        layout.reduce_statistics(model)
    assert calls.call_count == 2
    want = whole.max_logits()
    assert all(torch.equal(got, want[layer]) for layer, got in model.max_logits().items())
    for m in (model, whole):
        m.update_router_bias(0.1)
    for got, want in zip(model.buffers(), whole.buffers()):
        assert torch.equal(got, want)


def check_copies_stay_equal(rank, world, folder):
    """Two steps of MuonClip that clip, with balancing: copies are equal to the bit. Without the reductions they part,
    and `check_replicas` says so."""
    layout, whole = Layout(make_mesh(dp=world, device_type="cpu")), whole_model().train()
    for reduced in (True, False):
        model = split_model(layout, whole, gradients="mean")
        clips = 0
        with pytest.raises(ValueError, match="must be those of all"):
            MuonClip(model, 0.02)
        optimizer = MuonClip(model, 0.02, qk_clip=QKClip(0.5, max_logits=layout.max_logits(model)))
        layout.check_replicas(model)
        for step in range(2):
            for micro_batch in range(2):
                loss_of(model, ids_of(world, 2 * step + micro_batch)[rank : rank + 1]).backward()
            layout.reduce_gradients(model)
            if reduced:
                layout.reduce_statistics(model)
            else:
                model.statistics_reduced = True
            optimizer.step()
            optimizer.zero_grad()
            model.update_router_bias(0.01)
            clips += sum(int((report.gamma < 1).sum()) for report in optimizer.last_clip.values())
        assert clips > 0
        if reduced:
            layout.check_replicas(model)
            for name, t in model.state_dict().items():
                every = [torch.empty_like(t) for _ in range(world)]
                dist.all_gather(every, t)
                assert all(torch.equal(t, other) for other in every), name
        else:
            with pytest.raises(ValueError, match=r"copies must be the same .* \(ranks \[1") as error:
                layout.check_replicas(model)
            assert "kv_b_proj" in str(error.value) or "q_b_proj" in str(error.value)


def check_replicas_of_experts(rank, world, folder):
    """Ranks that share the experts differ in them; their copies on other ranks must not."""
    layout, whole = layout_of(world), whole_model()
    model = split_model(layout, whole)
    layout.check_replicas(model)
    if rank == world - 1:
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj.to_local()[0, 0, 0] += 1
            model.model.norm.weight[0] += 1
    with pytest.raises(ValueError, match="copies must be the same") as error:
        layout.check_replicas(model)
    assert f"model.norm.weight (ranks [{world - 1}])" in str(error.value)
    assert (f"down_proj (ranks [{world - 1}])" in str(error.value)) == (world == 4)


def check_meshes(rank, world, folder):
    with pytest.raises(ValueError, match=rf"must be the world size {world}, got 1 \* 1 \* 3"):
        make_mesh(ep=3, dp=1)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    with pytest.raises(ValueError, match="mesh must have a dimension 'ep', and may have 'dp' and 'pp', got no"):
        Layout(mesh)
    stage = Layout(make_mesh(pp=2, device_type="cpu"))
    here, each = rank // (world // 2), world // 2
    assert (stage.world_size, stage.pp.size(), stage.pp.get_local_rank()) == (each, 2, here)
    assert stage.flat.mesh.tolist() == list(range(here * each, here * each + each))
    assert stage.writes == (rank % each == 0)
    group = Layout(dist.group.WORLD)
    assert group.world_size == group.ep.size() == world and group.dp is None
    layout = Layout(make_mesh(ep=2, device_type="cpu"))
    assert (layout.world_size, layout.ep.size(), layout.dp.size()) == (world, 2, world // 2)
    assert layout.flat.ndim == 1 and layout.flat.mesh.tolist() == list(range(world))
    assert layout.ep.mesh.tolist() == [rank // 2 * 2, rank // 2 * 2 + 1]


LAYOUT_CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}
OF_FILES = ("check_distributed_checkpoint", "check_save", "check_load", "check_errors_of_loading_are_every_ranks")
