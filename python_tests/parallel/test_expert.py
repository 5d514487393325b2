import contextlib
import re

import pytest
import torch
import torch.distributed as dist

import k2kernels
from k2kernels import UnsupportedError
from k2kernels.ops.moe import moe_combine, moe_dispatch, moe_route
from k2kernels.parallel import ExpertParallel
from k2kernels.parallel.split import Places, Split

SIZES = dict(num_experts=8, hidden=128, top_k=2, max_tokens=16)


def run(dispatch, combine, quantize):
    torch.manual_seed(0)
    x = torch.randn(16, 128, requires_grad=not quantize)
    logits = torch.randn(16, 8, requires_grad=True)
    shared = torch.randn(16, 128)
    routing = moe_route(logits, top_k=2)
    sent = dispatch(x, routing.indices, routing.weights, alignment=4, quantize=quantize, scale_layout="column")
    rows = sent.data.float()
    out = combine(rows.square(), sent.handle, shared=shared, out_dtype=torch.bfloat16)
    out.float().square().sum().backward()
    return [rows, sent.offsets, sent.counts, out, logits.grad] + ([sent.scales] if quantize else [x.grad])


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("transport", ["auto", "local"])
def test_local_transport_is_the_ops(transport, quantize):
    layer = ExpertParallel(**SIZES, transport=transport)
    got = run(layer.dispatch, layer.combine, quantize)
    want = run(lambda *args, **kwargs: moe_dispatch(*args, num_experts=8, **kwargs), moe_combine, quantize)
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    assert (layer.transport, layer.rank, layer.world_size) == ("local", 0, 1)
    assert (layer.first_expert, layer.num_local_experts) == (0, 8)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("emulated", [False, True])
def test_virtual_transport_is_one_rank_with_the_kernels_of_many(emulated, quantize):
    layer = ExpertParallel(**SIZES, transport="virtual")
    before = k2kernels.launch_count("moe_exchange")
    with k2kernels.emulated("sm_90a", seed=3) if emulated else contextlib.nullcontext():
        rows, offsets, counts, out, *grads = run(layer.dispatch, layer.combine, quantize)
        layer.check()
        assert (k2kernels.launch_count("moe_exchange") > before) == emulated
        want = run(lambda *args, **kwargs: moe_dispatch(*args, num_experts=8, **kwargs), moe_combine, quantize)
    assert torch.equal(offsets, want[1]) and torch.equal(counts, want[2]) and torch.equal(out, want[3])
    real = torch.cat([torch.arange(start, start + count) for start, count in zip(offsets, counts)])
    assert torch.equal(rows[real], want[0][real]) and torch.equal(grads[0], want[4])
    assert torch.equal(*((x[real] if quantize else x) for x in (grads[1], want[5])))
    assert not layer.degraded and (layer.transport, layer.num_local_experts) == ("virtual", 8)
    with pytest.raises(UnsupportedError, match="float64"):
        layer.dispatch(torch.randn(3, 128, dtype=torch.float64), *moe_route(torch.randn(3, 8), top_k=2)[:2])


def test_local_transport_compiles():
    layer = ExpertParallel(**SIZES)
    x, routing = torch.randn(9, 128), moe_route(torch.randn(9, 8), top_k=2)

    def through(x, indices, weights):
        sent = layer.dispatch(x, indices, weights)
        return layer.combine(sent.data, sent.handle)

    compiled = torch.compile(through, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 4):
        args = x[:tokens], routing.indices[:tokens], routing.weights[:tokens]
        assert torch.equal(compiled(*args), through(*args))


def test_a_group_of_one_rank_is_local(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert ExpertParallel(dist.group.WORLD, **SIZES).transport == "local"
    finally:
        dist.destroy_process_group()


class SomeRanks:
    def __init__(self, ranks):
        self.ranks = ranks

    def size(self):
        return self.ranks

    def rank(self):
        return 0


def test_what_is_not_served_says_so():
    with pytest.raises(UnsupportedError, match=r"transport 'torch' needs a group"):
        ExpertParallel(**SIZES, transport="torch")
    with pytest.raises(UnsupportedError, match=r"'virtual' cannot reach .* k2kernels.parallel.VirtualRanks"):
        ExpertParallel(SomeRanks(2), **SIZES, transport="virtual")
    with pytest.raises(UnsupportedError, match=r"'local' cannot reach the experts of a group of 2 ranks; use 'torch'"):
        ExpertParallel(SomeRanks(2), **SIZES, transport="local")


@pytest.mark.parametrize("experts, ranks", [(384, 5), (384, 8), (7, 3), (4, 4), (5, 1)])
def test_experts_are_split_in_order(experts, ranks):
    splits = [Split(experts, ranks, rank) for rank in range(ranks)]
    sizes = [split.num_local_experts for split in splits]
    assert sum(sizes) == experts and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert [split.first_expert for split in splits] == [sum(sizes[:rank]) for rank in range(ranks)]
    for live in (list(range(ranks)), list(range(1, ranks))):
        rank, number = Places(experts, [splits[0].bounds(r) for r in live])(torch.arange(-1, experts))
        assert rank[0] == len(live)
        for position, r in enumerate(live):
            here = torch.nonzero(rank[1:] == position)[:, 0]
            assert here.tolist() == list(range(splits[r].first_expert, splits[r].first_expert + sizes[r]))
            assert number[1:][here].tolist() == list(range(sizes[r]))


def test_bytes_between_nodes_are_as_documented():
    """What crosses from rank 0 of 4 nodes of 8, K2's shape: tokens counted as the hops count them."""
    from k2kernels.parallel import torch_transport

    torch.manual_seed(0)
    split = Split(384, 32, 0)
    ranks = Places(384, [split.bounds(rank) for rank in range(32)])
    nodes = Places(384, [(first, first + 96) for first in range(0, 384, 96)])
    row = 7168 + 56 * 4 + 8 * 4
    for limit, name in ((4, "anywhere"), (2, "on 2 of the nodes")):
        indices = moe_route(torch.randn(4096, 384), top_k=8, n_group=4, topk_group=limit).indices
        rank, node = ranks(indices)[0], nodes(indices)[0]
        reached = [sum((rank == r).any(1).sum().item() for r in range(8, 32))]
        reached += [sum((node == n).any(1).sum().item() for n in range(1, 4))]
        want = [n * row / 4096 for n in reached] + [(node > 0).sum().item() * 2 * 7168 / 4096]
        line = next(s for s in torch_transport.__doc__.splitlines() if s.strip().startswith(name))
        got = [int(n.replace(" ", "")) for n in re.findall(r"\b\d\d \d\d\d\b", line)]
        assert got == pytest.approx(want, rel=0.03)


def test_nodes_are_runs_of_hosts_of_equal_length():
    from k2kernels.parallel.peers import Peers

    peers = object.__new__(Peers)
    for hosts, ranks in (("aabb", 2), ("abcd", 1), ("aaaa", 0), ("abab", 0), ("aaab", 0), ("aabbaa", 0), ("a", 0)):
        peers.hosts = lambda hosts=hosts: list(hosts)
        assert peers.ranks_per_node() == ranks, hosts


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"ExpertParallel: transport must be one of 'auto', .*, got 'nccl'"):
        ExpertParallel(**SIZES, transport="nccl")
    with pytest.raises(ValueError, match=r"ExpertParallel: num_experts must be an int >= 1, got 0"):
        ExpertParallel(num_experts=0, hidden=128, top_k=2, max_tokens=16)
    with pytest.raises(ValueError, match=r"ExpertParallel: num_experts must be at least the 9 ranks, got 8"):
        ExpertParallel(SomeRanks(9), **SIZES)
    for name, bad in (
        ("num_experts", 2.5),
        ("hidden", "64"),
        ("top_k", 9),
        ("max_tokens", -1),
        ("row_dtype", torch.int8),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"ExpertParallel: {name} must be .*, got"):
            ExpertParallel(**{**SIZES, name: bad})
    for ranks in (3, -1, 2.0, True):
        with pytest.raises((ValueError, TypeError), match=r"ExpertParallel: ranks_per_node must be .*, got"):
            ExpertParallel(SomeRanks(4), **SIZES, ranks_per_node=ranks)
    with pytest.raises(
        ValueError, match=r"ExpertParallel.mask: rank must be another rank of the group, got a group of one"
    ):
        ExpertParallel(**SIZES).mask(0)
    layer = ExpertParallel(**SIZES)
    with pytest.raises(ValueError, match=r"ExpertParallel.dispatch: x must be at most max_tokens=16 rows, got 17"):
        layer.dispatch(torch.zeros(17, 128), torch.zeros(17, 2, dtype=torch.int32), torch.zeros(17, 2))
    with pytest.raises(ValueError, match=r"ExpertParallel.dispatch: x must be \[T=4, 128\], got \[4, 64\] float32"):
        layer.dispatch(torch.zeros(4, 64), torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"indices must be \[T=4, 2\], got \[4, 3\] int32"):
        layer.dispatch(torch.zeros(4, 128), torch.zeros(4, 3, dtype=torch.int32), torch.zeros(4, 3))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_does_not_count_dropped_pairs_again(use_reentrant):
    ep = ExpertParallel(num_experts=4, hidden=128, top_k=2, max_tokens=16)
    x, weights = torch.randn(9, 128, requires_grad=True), torch.ones(9, 2)
    indices = torch.tensor([[0, 1]], dtype=torch.int32).repeat(9, 1)

    def layer(x):
        sent = ep.dispatch(x, indices, weights, capacity=8)
        return ep.combine(sent.data, sent.handle)

    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert x.grad.any() and int(ep.overflow) == 10
