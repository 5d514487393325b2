"""What the ranks do with the sharded MuonClip, for `ranks.py`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from rank_scenarios import join
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from k2kernels import optim
from k2kernels.model import K2Config, K2Model
from k2kernels.optim import QKClip
from k2kernels.parallel import MuonClip, expert_parallel, muon, muon_traffic, sum_expert_counts

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


SPLITS = {"query": "heads"}


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
        elif how == "mixed":  # some replicas, and a replicated DTensor
            keep = {toy.tall, toy.key, toy.norm}
            fully_shard(toy, mesh=mesh, ignored_params=keep)
            toy.norm = nn.Parameter(distribute_tensor(toy.norm.detach(), mesh, [Replicate()]))
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


HOWS = ["replicas", "sharded", "mixed"]


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


def same_gradients(rank, world, folder):
    join(rank, world, folder)
    for how in HOWS:
        for dtype in (F32, F64, BF16):
            check_same_gradients(rank, world, how, dtype)
    check_same_gradients(rank, world, "sharded", F32, smoothing=0.5)
    check_same_gradients(rank, world, "replicas", BF16, smoothing=0.5)
    return "the same"
