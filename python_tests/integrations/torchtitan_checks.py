"""Optimizers in torchtitan's container, with the real package: `make test-torchtitan` runs these."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig

from k2kernels.integrations.torchtitan import OptimizersContainer, muon_clip
from k2kernels.optim import Muon, MuonClip


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_embeddings = torch.nn.Embedding(20, 8)
        self.wq, self.wo = torch.nn.Linear(8, 24, bias=False), torch.nn.Linear(24, 8, bias=False)
        self.norm = torch.nn.RMSNorm(8)
        self.w1_EFD = torch.nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, ids):
        x = self.norm(self.wo(self.wq(self.tok_embeddings(ids))).tanh())
        return torch.einsum("td,efd->tf", x, self.w1_EFD).square().mean()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def train(net, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        net(torch.arange(10) + step).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def test_the_weights_are_those_of_the_optimizer_alone(net):
    other = copy.deepcopy(net)
    container = muon_clip(lr=0.02, adamw=dict(lr=0.01)).build(model_parts=[net])
    assert isinstance(container, OptimizersContainer)
    (optimizer,) = container
    methods = {row.name: row.method for row in optimizer.routing_table()}
    muon = {"wq.weight", "wo.weight", "w1_EFD"}
    assert methods == {name: "muon" if name in muon else "adamw" for name, _ in net.named_parameters()}
    alone = MuonClip(other.named_parameters(), 0.02, adamw=dict(lr=0.01), qk_clip=None)
    for a, b in zip(train(net, container, 3), train(other, alone, 3)):
        assert torch.equal(a, b)


def test_checkpoints_continue(net):
    container = muon_clip(lr=0.02).build(model_parts=[net])
    train(net, container, 2)
    state, copied = copy.deepcopy(container.state_dict()), copy.deepcopy(net)
    assert any(name.startswith("state.wq.weight.") for name in state)
    want = train(net, container, 2, first=2)
    resumed = muon_clip(lr=0.5).build(model_parts=[copied])
    resumed.load_state_dict(state)
    for a, b in zip(train(copied, resumed, 2, first=2), want):
        assert torch.equal(a, b)


def test_groups_of_muon_beside_adamw_of_torchtitan(net):
    def group(pattern, name, **options):
        return ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs=options)

    groups = [
        group(r"w[qo]\.weight", "k2kernels.Muon", lr=0.02, weight_decay=0.0),
        group("w1_EFD", "k2kernels.Muon", lr=0.01, momentum=0.9),
        group(".*", "AdamW", lr=1e-3),
    ]
    container = OptimizersContainer.Config(param_groups=groups, implementation="for-loop").build(model_parts=[net])
    muon, _ = container
    assert isinstance(muon, Muon) and [g["lr"] for g in muon.param_groups] == [0.02, 0.01]
    schedule = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=container, training_steps=10)
    before = [p.detach().clone() for p in net.parameters()]
    after = train(net, container, 1)
    assert not any(torch.equal(a, b) for a, b in zip(before, after))
    rates = [g["lr"] for g in muon.param_groups]
    schedule.step()
    assert all(g["lr"] > rate for g, rate in zip(muon.param_groups, rates))


def test_sharded_by_fully_shard(net, tmp_path):
    other = copy.deepcopy(net)
    want = train(other, muon_clip(lr=0.02).build(model_parts=[other]), 3)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        container = muon_clip(lr=0.02).build(model_parts=[net])
        got = train(net, container, 3)
        assert any(name.startswith("state.wq.weight.") for name in container.state_dict())
    finally:
        dist.destroy_process_group()
    for a, b in zip(got, want):
        torch.testing.assert_close(a.full_tensor(), b)


def test_messages(net):
    def build(*groups):
        groups = [ParamGroupConfig(pattern=p, optimizer_name=n, optimizer_kwargs=o) for p, n, o in groups]
        return OptimizersContainer.Config(param_groups=groups).build(model_parts=[net])

    with pytest.raises(ValueError, match=r"k2kernels.Muon: optimizer_kwargs of each group must have lr"):
        build((".*", "k2kernels.Muon", {}))
    with pytest.raises(ValueError, match=r"k2kernels.MuonClip: must have one group, .* got 2 groups"):
        build(("wq", "k2kernels.MuonClip", dict(lr=1.0)), (".*", "k2kernels.MuonClip", dict(lr=1.0)))
    with pytest.raises(NotImplementedError, match=r"Optimizer k2kernels.Nonsense not added"):
        build((".*", "k2kernels.Nonsense", dict(lr=1.0)))
