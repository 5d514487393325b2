"""What every rank checks of the `torch` transport; the tokens of all ranks are known to each, made from one seed."""

from __future__ import annotations

import collections
import contextlib
import copy
from typing import NamedTuple
from unittest import mock

import pytest
import tiny
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import k2kernels
from k2kernels.functional.moe_mlp import moe_mlp
from k2kernels.model.moe import Moe
from k2kernels.ops.moe import moe_combine, moe_dispatch, moe_route
from k2kernels.ops.quant import quantize_128x128
from k2kernels.parallel import ExpertParallel, expert_parallel

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TOKENS = [5, 0, 9, 3]  # of each rank; `on_nodes` changes it
EXPERTS, TOP_K = 10, 3
NODES: dict = {}  # ranks_per_node=, of all that the checks make
SKEWS = ("uniform", "one hot expert", "empty ranks", "some dropped", "all dropped", "repeated", "none at all")


def on_nodes(world):
    """From now on there are two ranks a node. Tokens by node, then rank are not those by number in the node first."""
    NODES["ranks_per_node"] = 2
    TOKENS[:] = [5, 9, 3, 0, 2, 4][:world]


class Batch(NamedTuple):
    x: Tensor
    indices: Tensor
    weights: Tensor
    shared: Tensor
    residual: Tensor
    grad: Tensor


def make_batch(skew, world, hidden=40, dtype=BF16, seed=0):
    """The tokens of all ranks, and where those of each begin."""
    torch.manual_seed(seed)
    tokens = [0] * world if skew == "none at all" else TOKENS[:world]
    total = sum(tokens)
    indices = torch.rand(total, EXPERTS).argsort(-1)[:, :TOP_K]
    if skew == "one hot expert":
        indices[:, 1] = 4
    elif skew == "empty ranks":
        indices = torch.randint(0, 2, (total, TOP_K))
    elif skew == "some dropped":
        indices = torch.where(torch.rand(total, TOP_K) < 0.5, -1, indices)
    elif skew == "all dropped":
        indices = torch.full_like(indices, -1)
    elif skew == "repeated":
        indices[:, 2] = indices[:, 0]
    weights = torch.randn(total, TOP_K)
    weights[indices < 0] = float("nan")  # of no consequence
    rows = [torch.randn(total, hidden).to(dtype) for _ in range(4)]
    return Batch(rows[0], indices, weights, *rows[1:]), [sum(tokens[:r]) for r in range(world + 1)]


def part(batch, starts, rank):
    return Batch(*(t[starts[rank] : starts[rank + 1]] for t in batch))


def expert_of_rows(offsets, rows):
    return torch.searchsorted(offsets[1:].contiguous(), torch.arange(rows, dtype=torch.int32), right=True)


def expert_rows(sent, first, last):
    """What stands for the experts: a bf16-exact function of row and expert; padding is NaN, and so is what it makes."""
    expert = first + expert_of_rows(sent.offsets, len(sent.data)).clamp(max=last - first)
    pad = (sent.handle.token_of_slot < 0)[:, None]
    rows = sent.data.masked_fill(pad, float("nan")) * (1 + expert / 8).to(sent.data.dtype)[:, None]
    return rows + 1


def through(dispatch, combine, first, last, batch, **options):
    """Dispatch, experts, combine and their gradients."""
    x, weights, shared, residual = (t.clone().requires_grad_() for t in (batch.x, *batch[2:5]))
    sent = dispatch(x, batch.indices, weights, **options)
    out = combine(expert_rows(sent, first, last), sent.handle, shared=shared, residual=residual, out_dtype=F32)
    out.backward(batch.grad.to(F32))
    grads = dict(x=x.grad, weights=weights.grad, shared=shared.grad, residual=residual.grad)
    return sent, dict(out=out.detach(), **grads)


def one_rank(batch, **options):
    return through(
        lambda *a, **o: moe_dispatch(*a, num_experts=EXPERTS, **o), moe_combine, 0, EXPERTS - 1, batch, **options
    )


def same(got, want, what=""):
    assert got.dtype == want.dtype and got.shape == want.shape, (what, got.shape, want.shape, got.dtype, want.dtype)
    bits = [torch.cat([t.flatten()]).view(torch.uint8) for t in (got, want)]
    assert torch.equal(*bits), (what, got, want)


def same_rows(ep, got, want):
    """What arrived here is what one rank would give to these experts."""
    first, n = ep.first_expert, ep.num_local_experts
    assert got.counts.tolist() == want.counts[first : first + n].tolist()
    start = int(want.offsets[first])
    assert got.offsets.tolist() == [int(o) - start for o in want.offsets[first : first + n + 1]]
    for e in range(n):
        here, there = int(got.offsets[e]), int(want.offsets[first + e])
        count = int(got.counts[e])
        same(got.data[here : here + count], want.data[there : there + count], f"rows of expert {e}")
        if want.scales is not None:
            same(got.scales[here : here + count], want.scales[there : there + count], f"scales of expert {e}")
        assert (got.handle.token_of_slot[here + count : int(got.offsets[e + 1])] == -1).all()


def make(hidden=40, **options):
    sizes = dict(num_experts=EXPERTS, hidden=hidden, top_k=TOP_K, max_tokens=9, step_timeout=20.0)
    return ExpertParallel(dist.group.WORLD, **{**sizes, "transport": "torch", **NODES, **options})


def dense(batch):
    """Token by token, without slots: the sum in float32 in the order of k."""
    out = torch.empty(len(batch.x), batch.x.shape[1])
    for t, row in enumerate(batch.x):
        total = torch.zeros(batch.x.shape[1])
        for k, expert in enumerate(batch.indices[t].tolist()):
            if expert >= 0:
                y = row * torch.tensor(1 + expert / 8).to(row.dtype) + 1
                total = total + y.float() * batch.weights[t, k]
        out[t] = total + batch.shared[t].float() + batch.residual[t].float()
    return out


# ---- checks: each is run on every rank


def check_bits(rank, world):
    """Rows, result and all gradients, for every routing, plain and dense formula."""
    ep = make()
    bounds = [0]
    for r in range(world):
        bounds.append(bounds[-1] + EXPERTS // world + (r < EXPERTS % world))
    assert [ep.first_expert, ep.first_expert + ep.num_local_experts] == bounds[rank : rank + 2]
    for skew in SKEWS:
        for alignment in (1, 4):
            batch, starts = make_batch(skew, world)
            want_sent, want = one_rank(batch, alignment=alignment)
            same(want["out"], dense(batch), skew)
            experts = ep.first_expert, ep.first_expert + ep.num_local_experts - 1
            mine = part(batch, starts, rank)
            if skew == "repeated":
                mine = mine._replace(indices=mine.indices.int())
            sent, got = through(ep.dispatch, ep.combine, *experts, mine, alignment=alignment)
            same_rows(ep, sent, want_sent)
            for name in want:
                same(got[name], want[name][starts[rank] : starts[rank + 1]], f"{skew}: {name}")
            assert int(sent.handle.overflow) == 0 and not sent.handle.degraded and not ep.degraded


def check_dtypes(rank, world):
    ep = make()
    experts = ep.first_expert, ep.first_expert + ep.num_local_experts - 1
    for dtype in (F16, F32, F64):
        batch, starts = make_batch("some dropped", world, dtype=dtype, seed=1)
        want_sent, want = one_rank(batch)
        sent, got = through(ep.dispatch, ep.combine, *experts, part(batch, starts, rank))
        same_rows(ep, sent, want_sent)
        for name in want:
            same(got[name], want[name][starts[rank] : starts[rank + 1]], f"{dtype}: {name}")


def check_fp8(rank, world):
    """Codes and scales travel packed; hidden sizes without and with a remainder of 128, of 4 and of 2."""
    for hidden, layout, power_of_two in ((256, "row", False), (200, "column", True), (37, "column", False)):
        ep = make(hidden)
        for skew in ("uniform", "some dropped", "none at all"):
            batch, starts = make_batch(skew, world, hidden=hidden, seed=2)
            options = dict(alignment=4, quantize=True, scale_layout=layout, power_of_two=power_of_two)
            mine = part(batch, starts, rank)
            want = moe_dispatch(*batch[:3], num_experts=EXPERTS, **options)
            got = ep.dispatch(*mine[:3], **options)
            same_rows(ep, got, want)
            assert got.scales.stride(0 if layout == "column" else 1) == 1
            rows = want.data.float().to(BF16)
            out = moe_combine(rows, want.handle)[starts[rank] : starts[rank + 1]]
            same(ep.combine(got.data.float().to(BF16), got.handle), out)
    x = mine.x.clone().requires_grad_()
    data = ep.dispatch(x, *mine[1:3], quantize=True).data
    with pytest.raises(RuntimeError, match="with quantize=True there is no gradient of x"):
        data.float().sum().backward()


def check_capacity(rank, world):
    """What has no room here is dropped from the highest slots on, and its token's rank knows: nothing is added."""
    ep = make()
    first, n = ep.first_expert, ep.num_local_experts
    for capacity in (0, 4, 8, 64):
        batch, starts = make_batch("one hot expert", world, seed=3)
        batch.weights[2] = float("inf")  # times nothing is nothing, if its pairs are dropped
        kept = torch.zeros(batch.indices.shape, dtype=torch.bool)
        for r in range(world):
            lo, hi = ep._split.bounds(r)
            local = torch.where((batch.indices >= lo) & (batch.indices < hi), batch.indices - lo, -1)
            there = moe_dispatch(batch.x, local, batch.weights, num_experts=hi - lo, alignment=4, capacity=capacity)
            kept |= there.handle.slot_of >= 0
            if r == rank:
                want = there
        sent, got = through(
            ep.dispatch, ep.combine, first, first + n - 1, part(batch, starts, rank), alignment=4, capacity=capacity
        )
        assert int(sent.handle.overflow) == int(want.handle.overflow)
        assert sent.counts.tolist() == want.counts.tolist() and sent.offsets.tolist() == want.offsets.tolist()
        real = want.handle.token_of_slot >= 0
        same(sent.data[real], want.data[real])
        _, oracle = one_rank(batch._replace(indices=batch.indices.where(kept, -1)))
        for name in oracle:
            same(got[name], oracle[name][starts[rank] : starts[rank + 1]], f"capacity {capacity}: {name}")


def check_node_limited_routing(rank, world):
    """The router's logits get their gradient; groups of experts are chosen first."""
    torch.manual_seed(4)
    ep, starts = make(), [sum(TOKENS[:r]) for r in range(world + 1)]
    x, logits = torch.randn(starts[-1], 40), torch.randn(starts[-1], EXPERTS)
    mine = slice(starts[rank], starts[rank + 1])

    def run(dispatch, combine, first, last, x, logits):
        logits = logits.clone().requires_grad_()
        routing = moe_route(logits, top_k=TOP_K, n_group=5, topk_group=2)
        sent = dispatch(x, routing.indices, routing.weights)
        out = combine(expert_rows(sent, first, last), sent.handle)
        out.square().sum().backward()
        return out, logits.grad

    want = run(lambda *a: moe_dispatch(*a, num_experts=EXPERTS), moe_combine, 0, EXPERTS - 1, x, logits)
    last = ep.first_expert + ep.num_local_experts - 1
    got = run(ep.dispatch, ep.combine, ep.first_expert, last, x[mine], logits[mine])
    for g, w in zip(got, want):  # close: a sigmoid's last bit depends on where a vector ends
        torch.testing.assert_close(g, w[mine], rtol=1e-5, atol=1e-5)
    assert TOKENS[rank] == 0 or got[1].abs().sum() > 0


def check_a_token_goes_to_a_node_once(rank, world):
    """What crosses between nodes, between whom; with a router that chooses one node for a token."""
    ep = make(num_experts=12)
    if not NODES:
        assert [hop.group for hop in ep._torch.hops] == [dist.group.WORLD]
        return
    nodes, number = world // 2, rank % 2
    rail, node = (dist.get_process_group_ranks(hop.group) for hop in ep._torch.hops)
    assert rail == list(range(number, world, 2)) and node == [rank - number, rank - number + 1]
    assert make()._torch.hops[0].group is ep._torch.hops[0].group
    torch.manual_seed(12)
    starts = [sum(TOKENS[:r]) for r in range(world + 1)]
    x, logits = torch.randn(starts[-1], 40), torch.randn(starts[-1], 12)
    for groups in (1, 2):
        routing = moe_route(logits, top_k=TOP_K, n_group=nodes, topk_group=groups)
        whole = moe_dispatch(x, routing.indices, routing.weights, num_experts=12)
        mine = slice(starts[rank], starts[rank + 1])
        sent = ep.dispatch(x[mine], routing.indices[mine], routing.weights[mine])
        there = routing.indices[mine] // (12 // nodes)
        assert sent.handle.route.legs[0].sent_rows == [int((there == n).any(1).sum()) for n in range(nodes)]
        assert groups > 1 or sum(sent.handle.route.legs[0].sent_rows) == TOKENS[rank]
        same(ep.combine(sent.data, sent.handle), moe_combine(whole.data, whole.handle)[mine])


def check_nodes_are_learnt(rank, world):
    """From host names, where they say so on all ranks; the first way that `make` finds without ranks_per_node."""
    if not NODES:
        return
    for host, hops in ((f"host{rank // 2}", 2), (f"host{rank % 2}", 1), (f"host{rank}", 1), ("host", 1)):
        with mock.patch("socket.gethostname", lambda host=host: host):
            assert len(make(ranks_per_node=None)._torch.hops) == hops, host
    assert len(make(ranks_per_node=0)._torch.hops) == 1
    with pytest.raises(ValueError, match=r"the ranks must agree on ranks_per_node, got 0 on rank 0; 2 on ranks 1"):
        make(ranks_per_node=0 if rank == 0 else 2)


class HostReads(TorchDispatchMode):
    """Operations for which the host waits for a device, by name."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        for part in ("_local_scalar_dense", "nonzero.", "is_nonzero", "masked_select", "unique", "aten.equal."):
            self.seen[name] += part in name
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        tolist, seen = Tensor.tolist, self.seen

        def counted(tensor):
            seen["tolist"] += 1
            return tolist(tensor)

        self.patch = mock.patch.object(Tensor, "tolist", counted)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)


def check_host_reads(rank, world):
    """One of each hop in dispatch, the numbers of rows; none in combine, and none backward."""
    ep = make()
    for quantize in (False, True):
        x = torch.randn(TOKENS[rank], 40, requires_grad=not quantize)
        indices = torch.randint(-1, EXPERTS, (TOKENS[rank], TOP_K))
        weights = torch.randn(TOKENS[rank], TOP_K, requires_grad=True)
        with HostReads() as reads:
            sent = ep.dispatch(x, indices, weights, quantize=quantize)
            rows = sent.data.float().requires_grad_() if quantize else sent.data
            out = ep.combine(rows, sent.handle)
        hops = 2 if NODES.get("ranks_per_node", 0) not in (0, world) else 1
        assert +reads.seen == ({} if ep.transport == "local" else {"tolist": hops}), reads.seen
        with HostReads() as reads:
            out.sum().backward()
        assert +reads.seen == {}, reads.seen


def check_recomputation(rank, world):
    """Activation checkpointing dispatches a second time, in the backward pass."""
    ep = make()
    first, last = ep.first_expert, ep.first_expert + ep.num_local_experts - 1
    batch, starts = make_batch("uniform", world, seed=5)
    mine = part(batch, starts, rank)

    def layer(x, weights):
        sent = ep.dispatch(x, mine.indices, weights)
        return x + ep.combine(expert_rows(sent, first, last), sent.handle)

    results = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        x, weights = mine.x.clone().requires_grad_(), mine.weights.clone().requires_grad_()
        out = wrap(layer, wrap(layer, x, weights), weights)
        out.backward(mine.grad)
        results.append((out.detach(), x.grad, weights.grad))
    for got, want in zip(*results):
        same(got, want)


def check_double_backward_is_refused(rank, world):
    ep = make()
    batch, starts = make_batch("uniform", world, seed=6)
    mine = part(batch, starts, rank)
    x = mine.x.clone().requires_grad_()
    sent = ep.dispatch(x, *mine[1:3])
    out = ep.combine(sent.data.square(), sent.handle)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def check_kernels(rank, world):
    """The local steps by the kernels, in the emulator: they read rows that lie apart, in what arrived."""
    for options in (dict(), dict(quantize=True)):
        ep = make(128)
        batch, starts = make_batch("some dropped", world, hidden=128, seed=7)
        mine, results = part(batch, starts, rank), []
        for mode in (contextlib.nullcontext(), k2kernels.emulated("sm_80", seed=2)):
            before = k2kernels.launch_count("moe_dispatch")
            with mode:
                sent = ep.dispatch(*mine[:3], alignment=4, **options)
                rows = sent.data.float().nan_to_num().to(BF16)
                results.append((sent.counts, ep.combine(rows, sent.handle)))
        assert k2kernels.launch_count("moe_dispatch") > before
        for got, want in zip(*results):
            same(got, want)


def check_mlp(rank, world):
    """The routed experts of a layer, bfloat16 and FP8: forward, and the experts' own gradients."""
    ep = make(128)
    first, n = ep.first_expert, ep.num_local_experts
    batch, starts = make_batch("uniform", world, hidden=128, seed=8)
    gate_up, down = torch.randn(EXPERTS, 64, 128) / 11, torch.randn(EXPERTS, 128, 32) / 6
    bf16 = gate_up.to(BF16), down.to(BF16)
    fp8 = quantize_128x128(gate_up), quantize_128x128(down)

    def run(batch, weights, exchange):
        leaves = [t.clone().requires_grad_() for t in (batch.weights, batch.x)]
        experts = [t.clone().requires_grad_() for t in weights] if isinstance(weights[0], Tensor) else weights
        x = leaves[1] if isinstance(weights[0], Tensor) else batch.x
        out = moe_mlp(x, (batch.indices, leaves[0]), *experts, shared=batch.shared, exchange=exchange)
        out.backward(batch.grad)
        mine = [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
        return mine, [e.grad for e in experts if isinstance(e, Tensor)]

    for weights in (bf16, fp8):
        want, want_experts = run(batch, weights, None)
        here = [
            w[first : first + n] if isinstance(w, Tensor) else tuple(t[first : first + n] for t in w) for w in weights
        ]
        got, got_experts = run(part(batch, starts, rank), here, ep)
        for g, w in zip(got, want, strict=True):
            same(g, w[starts[rank] : starts[rank + 1]])
        for g, w in zip(got_experts, want_experts, strict=True):
            same(g, w[first : first + n])


def check_model(rank, world):
    """The whole tiny model on this rank's sequences, and its MoE layers alone."""
    torch.manual_seed(9)
    whole = tiny.model("deepseek", n_routed_experts=24).double().train()
    split = copy.deepcopy(whole)
    ep = expert_parallel(split, dist.group.WORLD, max_tokens=64, step_timeout=20.0, **NODES)
    assert ep.transport == ("torch" if world > 1 else "local")
    lo, hi = ep.first_expert, ep.first_expert + ep.num_local_experts
    ids = torch.arange(world * 20).view(world, 20) * 7 % 256

    whole(ids).square().mean().backward()
    (split(ids[rank : rank + 1]).square().mean() / world).backward()
    for (name, got), want in zip(split.named_parameters(), whole.parameters()):
        if ".mlp.experts." in name:
            torch.testing.assert_close(local(got.grad), want.grad[lo:hi], rtol=1e-9, atol=1e-12)
        elif want.grad is not None:
            total = got.grad.clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, want.grad, rtol=1e-9, atol=1e-12)

    layers = [[m for m in model.modules() if isinstance(m, Moe)] for model in (whole, split)]
    for want_layer, got_layer in zip(*layers):
        x, grad = torch.randn(2, world, 6, 96, dtype=F64)
        want_x, got_x = x.clone().requires_grad_(), x[rank : rank + 1].clone().requires_grad_()
        want, got = want_layer(want_x), got_layer(got_x)
        want.backward(grad)
        got.backward(grad[rank : rank + 1])
        torch.testing.assert_close(got, want[rank : rank + 1], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(got_x.grad, want_x.grad[rank : rank + 1], rtol=1e-12, atol=1e-13)
    assert copy.deepcopy(split).model.layers[-1].mlp.exchange is ep
    with pytest.raises(ValueError, match="whose experts are distributed"):
        expert_parallel(split, dist.group.WORLD, max_tokens=64)


def check_errors_are_every_ranks(rank, world):
    """A rank's bad index, or another call than the others', is reported by all; then they go on."""
    ep = make()
    batch, starts = make_batch("uniform", world, seed=10)
    mine = part(batch, starts, rank)
    for bad in (-2, EXPERTS, 2**40):
        indices = mine.indices.clone()
        if rank == 0:
            indices[3, 1] = bad
        with pytest.raises(ValueError, match=rf"got {bad} for token 3 of rank 0; every rank raises this"):
            ep.dispatch(mine.x, indices, mine.weights)
    if world > 1:
        with pytest.raises(ValueError, match=r"the ranks must make the same calls; .* differ from rank"):
            ep.dispatch(*mine[:3], quantize=rank == 0)
    with pytest.raises(TypeError, match=r"handle must be the handle of this object's dispatch, got k2kernels.ops.moe"):
        ep.combine(mine.x, moe_dispatch(*mine[:3], num_experts=EXPERTS).handle)
    sent = ep.dispatch(*mine[:3])
    with pytest.raises(ValueError, match=r"ExpertParallel.combine: y must be \[S="):
        ep.combine(torch.zeros(len(sent.data) + 1, 40), sent.handle)
    same(ep.combine(sent.data, sent.handle), one_rank_combine(batch)[starts[rank] : starts[rank + 1]])


def local(t):
    return t.to_local() if hasattr(t, "to_local") else t


def one_rank_combine(batch):
    sent = moe_dispatch(*batch[:3], num_experts=EXPERTS)
    return moe_combine(sent.data, sent.handle)


def check_ranks_without_tokens(rank, world):
    """A sum's gradient is one number, expanded to no rows on the ranks that have no tokens."""
    ep = make()
    for tokens in (0 if rank == 0 else 3, 0 if rank > 0 else 3, 0):
        x = torch.randn(tokens, 40, requires_grad=True)
        weights = torch.rand(tokens, TOP_K, requires_grad=True)
        sent = ep.dispatch(x, torch.randint(0, EXPERTS, (tokens, TOP_K)), weights)
        ep.combine(sent.data, sent.handle).sum().backward()
        torch.testing.assert_close(x.grad, weights.detach().sum(1, keepdim=True).expand(x.shape))


def check_configs_must_agree(rank, world):
    if world > 1:
        with pytest.raises(ValueError, match=r"the ranks must agree on hidden, got 41 on rank 0; 40 on rank"):
            make(hidden=41 if rank == 0 else 40)
        with pytest.raises(ValueError, match=r"the ranks must agree on max_tokens, got .* 8 on rank 1"):
            make(max_tokens=8 if rank == 1 else 9)
    make()


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}
