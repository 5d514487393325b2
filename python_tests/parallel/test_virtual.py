"""The kernels that write into other ranks' buffers: W ranks in one process, in the emulator's adversarial schedules and
in plain PyTorch, against one rank with all tokens, bit for bit."""

import contextlib

import pytest
import torch
from rank_checks import (
    BF16,
    EXPERTS,
    F16,
    F32,
    F64,
    SKEWS,
    TOP_K,
    dense,
    expert_rows,
    make_batch,
    one_rank,
    part,
    same,
    same_rows,
)

import k2kernels
from k2kernels import PeerTimeout, UnsupportedError, _emu
from k2kernels.ops._constants import constants
from k2kernels.ops.exchange import Call
from k2kernels.ops.moe import moe_combine, moe_dispatch
from k2kernels.parallel import VirtualRanks
from k2kernels.testing.inputs import guarded

MODES = ["plain", ("sm_80", 0), ("sm_90a", 1), ("sm_80", 2), ("sm_90a", 3)]
SILENT, ABORTED = constants.EXCHANGE_PEER_SILENT, constants.EXCHANGE_PEER_ABORTED
in_all_modes = pytest.mark.parametrize("mode", MODES, ids=str)


def running(mode):
    return contextlib.nullcontext() if mode == "plain" else k2kernels.emulated(mode[0], seed=mode[1])


class GuardedRanks(VirtualRanks):
    """Whose buffers lie beside memory that faults."""

    def _allocate(self, size, device):
        return guarded(torch.zeros(size, dtype=torch.uint8))


def make(world, hidden=40, max_tokens=9, **options):
    sizes = dict(num_experts=EXPERTS, hidden=hidden, top_k=TOP_K, max_tokens=max_tokens, row_dtype=F32, blocks=2)
    return GuardedRanks(world, **{**sizes, **options})


def experts_of(virtual, rank):
    split = virtual.splits[rank]
    return split.first_expert, split.first_expert + split.num_local_experts - 1


def through(virtual, parts, **options):
    """Dispatch, experts, combine and their gradients, of all ranks that take part."""
    leaves = [p and [t.clone().requires_grad_() for t in (p.x, *p[2:5])] for p in parts]
    column = [[leaf and leaf[i] for leaf in leaves] for i in range(4)]
    sent = virtual.dispatch(column[0], [p and p.indices for p in parts], column[1], **options)
    ys = [s and expert_rows(s, *experts_of(virtual, rank)) for rank, s in enumerate(sent)]
    handles = [s and s.handle for s in sent]
    outs = virtual.combine(ys, handles, shared=column[2], residual=column[3], out_dtype=F32)
    live = [(out, p) for out, p in zip(outs, parts) if p]
    torch.autograd.backward([out for out, _ in live], [p.grad.to(F32) for _, p in live])
    grads = ("x", "weights", "shared", "residual")
    return sent, [
        p and dict(out=out.detach(), **{name: t.grad for name, t in zip(grads, leaf)})
        for out, p, leaf in zip(outs, parts, leaves)
    ]


def split_up(batch, starts):
    return [part(batch, starts, rank) for rank in range(len(starts) - 1)]


def check(virtual, batch, starts, sent, got, want_sent, want):
    for rank in range(virtual.world_size):
        same_rows(virtual.splits[rank], sent[rank], want_sent)
        for name in want:
            same(got[rank][name], want[name][starts[rank] : starts[rank + 1]], f"{name} of rank {rank}")


@in_all_modes
@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_bits(world, skew, mode):
    batch, starts = make_batch(skew, world, dtype=(BF16, F16, F32)[world % 3])
    virtual, before = make(world), k2kernels.launch_count("moe_exchange")
    with running(mode):
        want_sent, want = one_rank(batch, alignment=4)  # by the same bodies: kernels sum a dot product their own way
        sent, got = through(virtual, split_up(batch, starts), alignment=4)
    if world % 3 == 0:
        same(want["out"], dense(batch))
    check(virtual, batch, starts, sent, got, want_sent, want)
    launched = k2kernels.launch_count("moe_exchange") - before
    assert launched == (0 if mode == "plain" else 10 * world)  # send and wait: dispatch, combine, and three backward


@in_all_modes
def test_fp8(mode):
    for hidden, layout, power_of_two in ((256, "row", False), (200, "column", True), (37, "column", False)):
        virtual = make(3, hidden)
        for skew in ("uniform", "none at all"):
            batch, starts = make_batch(skew, 3, hidden=hidden, seed=2)
            options = dict(alignment=4, quantize=True, scale_layout=layout, power_of_two=power_of_two)
            parts = split_up(batch, starts)
            with running(mode):
                want = moe_dispatch(*batch[:3], num_experts=EXPERTS, **options)
                sent = virtual.dispatch(*([p[i] for p in parts] for i in range(3)), **options)
            rows = [s.data.float().to(BF16) for s in sent]
            with running(mode):
                outs = virtual.combine(rows, [s.handle for s in sent])
            out = moe_combine(want.data.float().to(BF16), want.handle)
            for rank in range(3):
                same_rows(virtual.splits[rank], sent[rank], want)
                same(outs[rank], out[starts[rank] : starts[rank + 1]])


@in_all_modes
def test_many_exchanges(mode):
    """Halves and epochs: two dispatches before their combines, each time other tokens, on the same buffers."""
    virtual = make(3)
    for seed in range(3):
        batches = [make_batch(skew, 3, seed=seed) for skew in ("uniform", "some dropped")]
        with running(mode):
            parts = [split_up(*batch) for batch in batches]
            sent = [virtual.dispatch(*([p[i] for p in some] for i in range(3))) for some in parts]
            outs = [
                virtual.combine(
                    [expert_rows(s, *experts_of(virtual, rank)) for rank, s in enumerate(one)], [s.handle for s in one]
                )
                for one in sent
            ]
        for (batch, starts), out in zip(batches, outs):
            want = moe_dispatch(*batch[:3], num_experts=EXPERTS)
            want = moe_combine(expert_rows(want, 0, EXPERTS - 1), want.handle)
            for rank in range(3):
                same(out[rank], want[starts[rank] : starts[rank + 1]])


@pytest.mark.parametrize("mode", ["plain", ("sm_80", 2)], ids=str)
def test_more_pairs_than_a_launch_plans(mode):
    torch.manual_seed(0)
    virtual = make(3, 16, max_tokens=250)
    tokens = [250, 1, 200]
    starts = [0, 250, 251, 451]
    batch, _ = make_batch("uniform", 1, hidden=16)
    x, indices = torch.randn(451, 16), torch.randint(-1, EXPERTS, (451, TOP_K))
    batch = type(batch)(x, indices, torch.randn(451, TOP_K), *torch.randn(3, 451, 16))
    assert virtual.world_size * max(tokens) * TOP_K > 2048
    with running(mode):
        want_sent, want = one_rank(batch)
        sent, got = through(virtual, split_up(batch, starts))
    check(virtual, batch, starts, sent, got, want_sent, want)


@in_all_modes
def test_capacity(mode):
    for capacity in (0, 4, 8):
        virtual = make(3)
        batch, starts = make_batch("one hot expert", 3, seed=3)
        batch.weights[2] = float("inf")  # of a dropped pair: nothing
        kept, overflow = torch.zeros(batch.indices.shape, dtype=torch.bool), []
        for split in virtual.splits:
            first, n = split.first_expert, split.num_local_experts
            local = batch.indices - first
            local = torch.where((local >= 0) & (local < n), local, -1)
            there = moe_dispatch(batch.x, local, batch.weights, num_experts=n, alignment=4, capacity=capacity).handle
            kept |= there.slot_of >= 0
            overflow.append(int(there.overflow))
        with running(mode):
            sent, got = through(virtual, split_up(batch, starts), alignment=4, capacity=capacity)
            _, want = one_rank(batch._replace(indices=batch.indices.where(kept, -1)))
        assert [int(s.handle.overflow) for s in sent] == overflow and sum(overflow) > 0
        for rank in range(3):
            for name in want:
                same(got[rank][name], want[name][starts[rank] : starts[rank + 1]], name)


@in_all_modes
def test_rows_are_sent_once_to_each_rank_and_nothing_else_is_written(mode):
    virtual = make(3, blocks=3)
    batch, starts = make_batch("repeated", 3, dtype=F32)
    members, parts = virtual.group.members, split_up(batch, starts)
    for member in members:
        member.buffer[member.layout.place("scatter", 0)[3] :] = 0xAB
        for flags in member.layout.cleared(member.buffer):
            flags.zero_()
    before = _emu.counters()["bytes_stored"]
    with running(mode):
        for member, p in zip(members, parts):
            member.scatter([p.x], p.indices.contiguous(), Call("dispatch", F32))
        stored = _emu.counters()["bytes_stored"] - before
        experts = [member.scatter_wait()[0] for member in members]
    sent = 0
    for member, split, numbers in zip(members, virtual.splits, experts):
        rows = member.arrived(0, 40, F32).copy().view(3, 9, 40)
        numbers = numbers.view(3, 9, TOP_K)
        for source, p in enumerate(parts):
            local = p.indices - split.first_expert
            local = torch.where((local >= 0) & (local < split.num_local_experts), local, -1)
            same(numbers[source, : len(p.x)], local.int())
            assert (numbers[source, len(p.x) :] == -1).all()
            wanted = (local >= 0).any(1)
            sent += int(wanted.sum())
            same(rows[source, : len(p.x)][wanted], p.x[wanted])
            for untouched in (rows[source, : len(p.x)][~wanted], rows[source, len(p.x) :]):
                assert (untouched.contiguous().view(torch.uint8) == 0xAB).all()
    if mode != "plain":
        assert stored == sent * 160  # 40 floats a row, in 16-byte stores


@in_all_modes
@pytest.mark.parametrize("lost", [0, 2])
def test_a_rank_that_does_not_send_is_named_then_masked(lost, mode):
    virtual = make(3)
    batch, starts = make_batch("uniform", 3, seed=4)
    parts = split_up(batch, starts)
    columns = [[p[i] for p in parts] for i in range(3)]
    with running(mode):
        sent = virtual.dispatch(*columns)
        ys = [expert_rows(s, *experts_of(virtual, rank)) for rank, s in enumerate(sent)]
        handles = [s.handle for s in sent]
        virtual.combine(ys, handles)
        virtual.withhold(lost)
        with pytest.raises(PeerTimeout, match=rf"timed out in 'combine', epoch 2: rank {lost} did not send") as end:
            virtual.combine(ys, handles)
        assert (end.value.phase, end.value.ranks, end.value.epoch) == ("combine", (lost,), 2)
        with pytest.raises(PeerTimeout, match="mask the rank, or make a new group"):
            virtual.dispatch(*columns)
        virtual.mask(lost)
        assert virtual.degraded
        parts[lost] = None
        sent, got = through(virtual, parts)
        first, last = experts_of(virtual, lost)
        indices = batch.indices.masked_fill((batch.indices >= first) & (batch.indices <= last), -1)
        indices[starts[lost] : starts[lost + 1]] = -1
        _, want = one_rank(batch._replace(indices=indices))
    for rank in {0, 1, 2} - {lost}:
        assert sent[rank].handle.degraded
        for name in want:
            same(got[rank][name], want[name][starts[rank] : starts[rank + 1]], name)


@in_all_modes
def test_a_rank_that_does_not_dispatch_is_named(mode):
    virtual = make(4)
    parts = split_up(*make_batch("uniform", 4))
    virtual.withhold(3)
    with running(mode), pytest.raises(PeerTimeout, match=r"in 'dispatch', epoch 1: rank 3 did not send"):
        virtual.dispatch(*([p[i] for p in parts] for i in range(3)))
    errors = [member.fault() for member in virtual.group.members[:3]]
    assert all(e.fault in (SILENT, ABORTED) and e.who == 3 for e in errors)


@in_all_modes
def test_the_first_to_give_up_tells_the_others(mode):
    """Whose own time is not over yet."""
    virtual = make(3)
    parts, members = split_up(*make_batch("uniform", 3)), virtual.group.members
    with running(mode):
        for member, p, timeout in zip(members[:2], parts, (10**8, 10**15)):
            member.timeout = timeout
            member.scatter([p.x], p.indices.contiguous(), Call("dispatch", p.x.dtype))
        for member in members[:2]:
            experts, row_counts = member.scatter_wait()
            assert (experts.view(3, -1)[2] == -1).all() and row_counts[2] == 0
    assert members[0].fault() == (SILENT, "dispatch", 2, 1)
    assert members[1].fault() == (ABORTED, "dispatch", 2, 1)


@in_all_modes
def test_what_did_not_come_back_is_nan(mode):
    virtual = make(2)
    batch = make_batch("uniform", 2)[0]
    parts = split_up(batch._replace(x=batch.x.float()), [0, 2, 5])
    members = virtual.group.members
    with running(mode):
        for member, p in zip(members, parts):
            member.timeout = 10**8
            member.scatter([p.x], p.indices.contiguous(), Call("dispatch", F32))
        (experts, row_counts), _ = [member.scatter_wait() for member in members]
        slots = torch.arange(experts.numel(), dtype=torch.int32).view(experts.shape)
        members[0].gather(torch.randn(slots.numel(), 40), experts, slots, row_counts, Call("combine", F32))
        indices, weights = parts[0].indices.contiguous(), parts[0].weights.contiguous()
        slot_of, poisoned = members[0].gather_wait(indices, weights)
    elsewhere = indices >= virtual.splits[1].first_expert
    assert elsewhere.any() and poisoned[elsewhere].isnan().all() and (slot_of >= 0).all()
    same(poisoned[~elsewhere], weights[~elsewhere])
    assert members[0].fault() == (SILENT, "combine", 1, 1)


@in_all_modes
def test_bad_indices_are_reported_and_reach_no_memory(mode):
    for bad in (-2, EXPERTS, 2**31 - 1, -(2**31)):
        virtual = make(3)
        parts = split_up(*make_batch("uniform", 3))
        parts[2].indices[1, 0] = bad
        with running(mode), pytest.raises(ValueError, match=rf"got {bad} for token 1 of rank 2; it was treated as -1"):
            virtual.dispatch(*([p[i] for p in parts] for i in range(3)))


def test_double_backward_is_refused():
    virtual = make(2)
    parts = split_up(*make_batch("uniform", 2))
    xs = [p.x.clone().requires_grad_() for p in parts]
    sent = virtual.dispatch(xs, [p.indices for p in parts], [p.weights for p in parts])
    outs = virtual.combine([s.data.square() for s in sent], [s.handle for s in sent])
    grads = torch.autograd.grad(sum(out.square().sum() for out in outs), xs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grads[0].sum().backward()


def test_what_is_not_served():
    with pytest.raises(ValueError, match=r"VirtualRanks: world_size must be an int in 1 .. 64, got 65"):
        VirtualRanks(65, num_experts=70, hidden=8, top_k=1, max_tokens=1)
    virtual = make(2, row_dtype=BF16)
    parts = split_up(*make_batch("uniform", 2, dtype=F32))
    columns = [[p[i] for p in parts] for i in range(3)]
    for dtype in (F32, F64):
        with pytest.raises(UnsupportedError, match=r"x is torch.float.., and the buffers are for rows of torch.bfloat"):
            virtual.dispatch([x.to(dtype) for x in columns[0]], *columns[1:])
    many = torch.zeros(10, 40), torch.zeros(10, TOP_K, dtype=torch.int32), torch.zeros(10, TOP_K)
    with pytest.raises(ValueError, match=r"x must be at most max_tokens=9 rows, got 10"):
        virtual.dispatch(*([t, t] for t in many))
    sent = virtual.dispatch([x.to(BF16) for x in columns[0]], *columns[1:])
    ys = [s.data.requires_grad_() for s in sent]
    with pytest.raises(UnsupportedError, match=r"out_dtype is torch.float32, and the buffers are for rows of torch.bf"):
        virtual.combine(ys, [s.handle for s in sent], out_dtype=F32)


def test_a_refused_call_begins_on_no_rank():
    virtual = make(3)
    x, indices, weights = (
        [torch.randn(4, 40)] * 3,
        [torch.zeros(4, TOP_K, dtype=torch.int32)] * 3,
        [torch.ones(4, TOP_K)] * 3,
    )
    sent = virtual.dispatch(x, indices, weights)
    ys, handles = [s.data for s in sent], [s.handle for s in sent]

    def refused(message, function, *args, **options):
        with pytest.raises((TypeError, ValueError), match=message):
            function(*args, **options)

    for option, bad in (("alignment", 0), ("capacity", -1), ("capacity", 6), ("scale_layout", "mn"), ("quantize", 1)):
        options = {"alignment": 4, option: bad}
        refused(rf"dispatch: {option} must be", virtual.dispatch, x, indices, weights, **options)
    refused(r"dispatch: x must be a list of 3, one for each rank, got 2", virtual.dispatch, x[:2], indices, weights)
    refused(r"dispatch: x must be a list of 3, one for each rank, got Tensor", virtual.dispatch, x[0], indices, weights)
    refused(r"dispatch: x must be one for rank 1, got None", virtual.dispatch, [x[0], None, x[2]], indices, weights)
    refused(r"combine: y must be \[S=", virtual.combine, [ys[0], ys[1][:-1], ys[2]], handles)
    refused(r"combine: y must be .*, got .* int32", virtual.combine, [y.int() for y in ys], handles)
    refused(r"combine: shared must be \[T=4, 40\]", virtual.combine, ys, handles, shared=[x[0], x[1][:3], x[2]])
    refused(r"combine: handles must be one for rank 2, got None", virtual.combine, ys, [*handles[:2], None])
    refused(r"handle must be the handle of this object's dispatch, got builtins.int", virtual.combine, ys, [1, 2, 3])
    refused(r"combine: out_dtype must be", virtual.combine, ys, handles, out_dtype=torch.int32)
    out = virtual.combine(ys, handles)  # epochs are even on all ranks
    virtual.group.check()
    assert all(torch.equal(o, TOP_K * x[0]) for o in out)
