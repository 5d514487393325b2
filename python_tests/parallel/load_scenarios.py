"""What ranks check of files and models in parts; `ranks.py` calls each function as (rank, number of ranks, folder)."""

from __future__ import annotations

import math
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import checkpoints
import pytest
import torch
import torch.distributed as dist
from layout_checks import Live, Reads, files, local, on_rank_0
from rank_scenarios import join
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from k2kernels import UnsupportedError
from k2kernels.model import K2Config, K2Model
from k2kernels.model.shards import Reader, Writer, scan
from k2kernels.parallel import Layout, Pipeline, make_mesh, parallelize

# Shards of 2 and 4 ranks are uneven, cut blocks of 128 rows, and contain the boundary of gate and up.
SIZES = dict(checkpoints.PARTIAL, intermediate_size=335, moe_intermediate_size=159)
HOW = ("fully_shard", "parallelize")


def in_parts(how, layout, model):
    if how == "parallelize":
        return parallelize(model, layout, max_tokens=64)
    layout.shard_experts(model)
    for layer in model.model.layers:
        if layout.ep.size() == 1:
            fully_shard(layer, mesh=layout.flat)
        else:
            experts = {p for name, p in layer.named_parameters() if "mlp.experts." in name}
            fully_shard(layer, mesh=layout.flat, ignored_params=experts)
    if layout.ep.size() == 1:
        fully_shard(model, mesh=layout.flat)
    return model


def on_meta(path, dtype):
    with torch.device("meta"):
        return K2Model(K2Config.from_pretrained(path)).to(dtype)


def assert_whole(model, whole):
    """Every weight, put together by torch, is that of the whole model, to the bit."""
    want, got = whole.state_dict(), model.state_dict()
    assert set(got) == set(want)
    for name, tensor in got.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert full.dtype == want[name].dtype and torch.equal(full, want[name]), name


def kept_bytes(model):
    return sum(local(t).nbytes for t in (*model.parameters(), *model.buffers()))


def check_load(rank, world, layout, how, path):
    for file, dtype in (("float", torch.float32), ("fp8", torch.bfloat16)):
        stored = scan(path / file)
        whole = K2Model.from_pretrained(path / file, dtype=dtype, progress=False)
        model = in_parts(how, layout, on_meta(path / file, dtype))
        with Reads() as reads, Live() as live:
            model.load_pretrained(path / file, progress=False)
        assert_whole(model, whole)
        for (name, got), want in zip(model.named_buffers(), whole.buffers(), strict=True):
            assert torch.equal(got, want), name

        # Bytes read: each of a weight by one rank, without its replicas (embedding, head and norm of "fully_shard"
        # over ep); scales by all ranks that have rows of their blocks.
        whole_weights = {k for k, p in model.state_dict().items() if not isinstance(p, DTensor)}
        shared = sum(i.nbytes for k, i in stored.items() if k in whole_weights)
        weights = sum(i.nbytes for k, i in stored.items() if not k.endswith("_scale_inv")) - shared
        mine = reads.experts + reads.others - reads.scales - shared
        every = layout.gather(mine)
        copies = layout.dp.size() if how == "fully_shard" and layout.ep.size() > 1 else 1
        experts = sum(i.nbytes for k, i in stored.items() if ".mlp.experts." in k and not k.endswith("_scale_inv"))
        weights += (copies - 1) * experts
        assert sum(every) == weights and mine <= 1.1 * weights / world, (mine, weights / world)

        # Memory: what is kept, one tensor of the files, and what decoding makes of it, whose blocks are padded.
        largest = max(i.nbytes for i in stored.values())  # and FSDP fills up short shards
        codes = (i for i in stored.values() if i.dtype == "F8_E4M3")
        padded = max((math.prod(-(-size // 128) * 128 for size in i.shape) for i in codes), default=0)
        decoding = padded * (8 + 3 * dtype.itemsize)
        assert live.most <= kept_bytes(model) + largest + decoding + 8192, (live.most, kept_bytes(model), decoding)

        # Once more, over other weights, on the CPU.
        torch.manual_seed(1)
        again = in_parts(how, layout, K2Model(model.config).to(dtype))
        again.load_pretrained(path / file, progress=False)
        assert_whole(again, whole)

        # Saved, the files are those of the whole model.
        with Live() as live:
            model.save_pretrained(path / "again", max_shard_size=30_000)
        # A shard that waits; a tensor that arrives; its copy that is written.
        assert live.most <= 30_000 + 3 * max(p.nbytes for p in whole.parameters()), live.most
        if rank == 0:
            whole.save_pretrained(path / "want", max_shard_size=30_000)
            assert files(path / "again") == files(path / "want")
        dist.barrier()


def check_errors(rank, world, layout, how, path):
    """One rank cannot read or write: an error on every rank; nothing is left behind."""
    get, add, last = Reader.get, Writer.add, world - 1

    def broken(reader, info, rows=None):
        if rank == last and info.name.endswith("o_proj.weight"):
            raise OSError(5, "Input/output error")
        return get(reader, info, rows)

    model = in_parts(how, layout, on_meta(path / "float", torch.float32))
    with mock.patch.object(Reader, "get", broken):
        with pytest.raises(OSError if rank == last else RuntimeError, match="Input/output error"):
            model.load_pretrained(path / "float", progress=False)
    model.load_pretrained(path / "float", progress=False)
    model.save_pretrained(path / "before")
    want, calls = files(path / "before"), []

    def full(writer, name, tensor):
        calls.append(name)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        add(writer, name, tensor)

    with mock.patch.object(Writer, "add", full):
        with pytest.raises(OSError if rank == 0 else RuntimeError, match="No space left on device"):
            model.save_pretrained(path / "before")
    assert files(path / "before") == want
    dist.barrier()
    other = K2Model(model.config)
    other.model.norm.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"model.norm.weight \(wanted \[3\], got \[192\]\)"):
        other.load_pretrained(path / "float", progress=False)
    columns = K2Model(model.config)
    weight = distribute_tensor(columns.lm_head.weight.detach(), layout.flat, [Shard(1)])
    columns.lm_head.weight = torch.nn.Parameter(weight)
    with pytest.raises(UnsupportedError, match=r"lm_head.weight: must be divided along its first axis, got \[Shard"):
        columns.load_pretrained(path / "float", progress=False)
    with pytest.raises(ValueError, match=r"the ranks of weights in parts must be known, got lm_head.weight in parts"):
        columns.save_pretrained(path / "columns")


def load(rank, world, folder, ep=1):
    """Both, of models in parts by either means: check -> None, or what went wrong."""
    join(rank, world, folder)
    path, found = Path(folder), {}

    def make():
        torch.manual_seed(0)
        checkpoints.fp8_checkpoint(path, SIZES, shards=3)

    on_rank_0(rank, make)
    layout = Layout(make_mesh(ep=ep, device_type="cpu"))
    for how in HOW:
        for check in (check_load, check_errors):
            begun = time.monotonic()
            try:
                check(rank, world, layout, how, path)
                found[f"{how}: {check.__name__}"] = None
            except BaseException:  # pytest's "did not raise" is no Exception
                found[f"{how}: {check.__name__}"] = traceback.format_exc()
                return found
            if rank == 0:
                print(f"{how}, ep {ep}: {check.__name__}: {time.monotonic() - begun:.1f} s", file=sys.stderr)
    return found


def stages(rank, world, folder):
    """A stage reads its layers alone, and on four ranks its experts and its shards of them."""
    join(rank, world, folder)
    path = Path(folder)

    def make():
        torch.manual_seed(0)
        checkpoints.fp8_checkpoint(path, SIZES, shards=3)

    on_rank_0(rank, make)
    layout = Layout(make_mesh(pp=2, ep=world // 2, device_type="cpu"))
    for file, dtype in (("float", torch.float32), ("fp8", torch.bfloat16)):
        whole = K2Model.from_pretrained(path / file, dtype=dtype, progress=False)
        with torch.device("meta"):
            sizes = dict(micro_batches=2, micro_batch=(1, 8))
            stage = Pipeline(K2Config.from_pretrained(path / file), layout, **sizes).model.to(dtype)
        parallelize(stage, layout, max_tokens=64)
        with Reads() as reads:
            stage.load_pretrained(path / file, progress=False)
        want, got = whole.state_dict(), stage.state_dict()
        for name, tensor in got.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(full, want[name]), name
        every = [None] * world
        dist.all_gather_object(every, (list(got), reads.experts + reads.others - reads.scales))
        assert {name for names, _ in every for name in names} == set(want)
        # Each weight is read once; the router's bias, a buffer, by all ranks of its stage.
        stored = {name: i.nbytes for name, i in scan(path / file).items() if not name.endswith("_scale_inv")}
        biases = sum(nbytes for name, nbytes in stored.items() if name.endswith("e_score_correction_bias"))
        stored = sum(stored.values()) + (world // 2 - 1) * biases
        assert sum(read for _, read in every) == stored, (every, stored)
    return "read"


def load_ep_2(rank, world, folder):
    return load(rank, world, folder, ep=2)
