"""How ranks exchange rows: epochs, halves, faults, and rows that do not exist. In the emulator and in plain PyTorch."""

import pytest
import torch
from rank_checks import BF16, EXPERTS, F32, TOP_K, make_batch, one_rank, same
from test_virtual import ABORTED, MODES, SILENT, check, in_all_modes, make, running, split_up, through
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import k2kernels
from k2kernels import PeerTimeout, _emu
from k2kernels.ops import _launch, grouped_gemm
from k2kernels.ops._constants import constants
from k2kernels.ops.exchange import Call
from k2kernels.ops.moe import dispatch
from k2kernels.ops.moe.dispatch import combine_rows_backward, dispatch_rows
from k2kernels.parallel import ExpertParallel, ranks
from k2kernels.parallel.exchange import DispatchOptions
from k2kernels.parallel.ranks import BufferRoute, _dispatch

in_some_modes = pytest.mark.parametrize("mode", ["plain", ("sm_80", 2)], ids=str)


@in_all_modes
@pytest.mark.parametrize("first", [2**32 - 4, 2**32 - 3, 2**31 - 3], ids=hex)
def test_epochs_go_on_after_the_last_number(first, mode):
    """A group that makes 6,000 exchanges a second comes here in eight days."""
    virtual = make(2)
    for member in virtual.group.members:
        member.state[:2] = torch.tensor(first).int()
    for seed in range(2):
        batch, starts = make_batch("uniform", 2, seed=seed)
        with running(mode):
            want_sent, want = one_rank(batch, alignment=4)
            sent, got = through(virtual, split_up(batch, starts), alignment=4)
        check(virtual, batch, starts, sent, got, want_sent, want)


def test_plain_and_emulated_calls_share_one_count_of_epochs():
    virtual = make(2)
    for seed, mode in enumerate(["plain", ("sm_80", 1), "plain", "plain", ("sm_90a", 1)]):
        batch, starts = make_batch("uniform", 2, seed=seed)
        with running(mode):
            want_sent, want = one_rank(batch, alignment=4)
            sent, got = through(virtual, split_up(batch, starts), alignment=4)
        check(virtual, batch, starts, sent, got, want_sent, want)
        epochs = [2 * (seed + 1), 3 * (seed + 1)]  # scatters and gathers, forward and backward
        assert all(member.state[:2].tolist() == epochs for member in virtual.group.members)


class Recording(TorchDispatchMode):
    """The launches of a `with` block, to be launched again as they are, as a CUDA graph does it, which keeps the memory
    that its kernels use."""

    def __init__(self):
        super().__init__()
        self.calls, self.memory = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.memory.append(result)
        return result

    def __enter__(self):
        def noted(*args, **op):
            self.calls.append((_launch._emulated_stream.get(), args, op))
            launch(*args, **op)

        launch, self.patch = _launch.launch, pytest.MonkeyPatch()
        for module in (_launch, dispatch):
            self.patch.setattr(module, "launch", noted)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def replay(self):
        with _launch.emulated_together():
            for stream, args, op in self.calls:
                with _launch.emulated_stream(stream):
                    _launch.launch(*args, **op)


@pytest.mark.parametrize("mode", MODES[1:3], ids=str)
def test_a_graph_with_an_odd_number_of_exchanges_is_replayed(mode):
    """Between the replays other exchanges are made, as drafting makes them: one of them at a time, or two."""
    virtual = make(2)
    batches = [make_batch("uniform", 2, seed=seed)[0]._replace(x=torch.randn(5, 40)) for seed in range(5)]
    starts = [0, 2, 5]
    parts = split_up(batches[0], starts)
    xs = [p.x.clone() for p in parts]
    indices = [p.indices.int() for p in parts]
    weights = [p.weights.clone() for p in parts]

    def layer():
        sent = virtual.dispatch(xs, indices, weights)
        return virtual.combine([s.data for s in sent], [s.handle for s in sent])

    with torch.no_grad(), running(mode):
        with Recording() as graph:
            outs = layer()
        for i, batch in enumerate(batches):
            for rank, p in enumerate(split_up(batch, starts)):
                xs[rank].copy_(p.x)
                indices[rank].copy_(p.indices)
                weights[rank].copy_(p.weights)
            graph.replay()
            virtual.group.check()
            want = one_rank_combine(batch)
            for rank in range(2):
                same(outs[rank], want[starts[rank] : starts[rank + 1]], f"replay {i}")
            for _ in range(i % 3):
                virtual.dispatch(xs, indices, weights)


@in_some_modes
def test_a_layer_over_ranks_may_be_checkpointed(mode):
    virtual = make(2)
    batch, starts = make_batch("uniform", 2)
    gradients = []
    for run in (lambda f, *xs: f(*xs), lambda f, *xs: checkpoint(f, *xs, use_reentrant=False)):
        parts = split_up(batch, starts)
        xs = [p.x.detach().clone().requires_grad_() for p in parts]

        def layer(*xs, parts=parts):
            sent = virtual.dispatch(list(xs), [p.indices for p in parts], [p.weights.detach() for p in parts])
            return tuple(virtual.combine([2 * s.data for s in sent], [s.handle for s in sent]))

        with running(mode):
            sum(out.float().square().sum() for out in run(layer, *xs)).backward()
        gradients.append([x.grad for x in xs])
    assert all(x.abs().sum() > 0 for x in gradients[0] if x.numel())
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*gradients))


@pytest.mark.parametrize("mode", MODES[1:2], ids=str)
def test_a_gradient_that_did_not_come_has_no_expert(mode):
    """Its rows are those of an earlier call: `_BufferCombine.backward` makes NaN of what has no expert."""
    virtual = make(2)
    batch, starts = make_batch("uniform", 2)
    parts = split_up(batch, starts)
    with torch.no_grad(), running(mode):
        sent = virtual.dispatch(*([p[i] for p in parts] for i in range(3)))
        virtual.combine([s.data for s in sent], [s.handle for s in sent])
        member, p = virtual.group.members[0], parts[0]
        member.timeout = 10**8  # nanoseconds
        route = BufferRoute(None, None, p.indices.int())
        program = ranks._sent_gradients(member, p.x.contiguous(), p.weights.contiguous(), route)
        next(program), next(program)
        *_, experts = ranks._end(program)
    assert member.fault() is not None
    mine, theirs = experts.view(2, -1)
    assert (mine >= 0).any() and (theirs == -1).all()


def one_rank_combine(batch):
    sent = k2kernels.moe_dispatch(*batch[:3], num_experts=EXPERTS)
    return k2kernels.moe_combine(sent.data, sent.handle)


def send(member, p, value):
    member.scatter([torch.full_like(p.x, value)], p.indices.contiguous(), Call("dispatch", p.x.dtype))


@in_all_modes
def test_a_late_rank_keeps_its_rows_and_is_named(mode):
    """Rank 0 gives rank 1 up in epoch 1 and goes on, as a graph does. Rank 1 then finds what epoch 1 brought, as it
    was, and learns of it in epoch 2."""
    virtual = make(2)
    members, parts = virtual.group.members, split_up(*make_batch("uniform", 2, dtype=F32))
    with running(mode):
        for member in members:
            member.timeout = 10**8
        for value in (1, 2, 3):  # epochs 1 and 3 share a half
            send(members[0], parts[0], value)
            _, row_counts = members[0].scatter_wait()
            assert row_counts.tolist() == ([len(parts[0].x), 0] if value == 1 else [0, 0])
        send(members[1], parts[1], 9)
        experts, row_counts = members[1].scatter_wait()
        assert row_counts.tolist() == [len(p.x) for p in parts] and members[1].fault() is None
        here = (experts.view(2, -1, TOP_K) >= 0).any(-1)
        assert here[0].any()
        rows = members[1].arrived(0, 40, F32).copy().view(2, -1, 40)
        assert (rows[0][here[0]] == 1).all()
        send(members[1], parts[1], 9)
        _, row_counts = members[1].scatter_wait()
    assert row_counts.tolist()[0] == 0
    assert members[0].fault() == (SILENT, "dispatch", 1, 1)
    assert members[1].fault() == (ABORTED, "dispatch", 1, 2)


@in_some_modes
def test_ranks_that_make_different_calls_are_refused(mode):
    """Each would take the other's bytes for its own."""
    first, second = make(3, 256), make(3, 256)
    parts = split_up(*make_batch("uniform", 3, hidden=256, dtype=BF16))
    with running(mode):
        for virtual, calls in (
            (first, [dict(quantize=True), {}, {}]),
            (second, [dict(quantize=True, power_of_two=True), dict(quantize=True), dict(quantize=True)]),
        ):
            programs = []
            for member, split, p, call in zip(virtual.group.members, virtual.splits, parts, calls):
                flags = dict(dict(quantize=False, power_of_two=False), **call)
                options = DispatchOptions(**flags)
                rows = list(k2kernels.quantize_1x128(p.x)) if options.quantize else [p.x]
                call = Call("dispatch", p.x.dtype, **flags)
                programs.append(_dispatch(member, rows, p.indices.contiguous(), options, split.num_local_experts, call))
            with pytest.raises(ValueError, match="the ranks must make the same calls; rank 0 differs from"):
                virtual.group.run([0, 1, 2], programs)
            faults = [member.fault() for member in virtual.group.members]
            assert all(fault.fault == constants.EXCHANGE_OTHER_CALL for fault in faults)
            with pytest.raises(ValueError, match="must make the same calls"):
                virtual.group.check()


@in_all_modes
@pytest.mark.parametrize("tokens", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_ranks_without_tokens_have_gradients(tokens, mode):
    """Of a sum: one number, expanded to no rows."""
    virtual = make(2)
    x = [torch.randn(n, 40, requires_grad=True) for n in tokens]
    weights = [torch.rand(n, TOP_K, requires_grad=True) for n in tokens]
    indices = [torch.randint(0, EXPERTS, (n, TOP_K)) for n in tokens]
    with running(mode):
        sent = virtual.dispatch(x, indices, weights)
        outs = virtual.combine([s.data for s in sent], [s.handle for s in sent])
        sum(out.sum() for out in outs).backward()
    for one, w in zip(x, weights):
        torch.testing.assert_close(one.grad, w.detach().sum(1, keepdim=True).expand(one.shape))


class Stream:
    def __init__(self, recorded=False):
        self.recorded, self.waited = recorded, []

    def wait_stream(self, other):
        self.waited.append(other)


def test_a_call_on_another_stream_waits_for_the_one_before(monkeypatch):
    monkeypatch.setattr(ranks, "_is_recorded", lambda stream: stream.recorded)
    first, second, graph, fork = Stream(), Stream(), Stream(recorded=True), Stream(recorded=True)
    last = None
    for stream in (first, first, second, graph, fork, first):
        last = ranks.follow(stream, last)
        assert last is stream
    assert (first.waited, second.waited, graph.waited, fork.waited) == ([], [first], [], [graph])


def counted(function):
    before = _emu.counters()["bytes_loaded"]
    result = function()
    return result, _emu.counters()["bytes_loaded"] - before


@pytest.mark.parametrize("max_tokens", [9, 300], ids=["one launch", "three launches"])
def test_rows_that_did_not_come_are_not_loaded(max_tokens):
    """Whatever there is room for: the same bytes, and no row that was sent to other ranks alone."""
    virtual = make(3, 48, max_tokens=max_tokens, blocks=64)
    batch, starts = make_batch("some dropped", 3, hidden=48, dtype=F32)
    parts, members = split_up(batch, starts), virtual.group.members
    with running(("sm_80", 0)):
        for member, p in zip(members, parts):
            send(member, p, 1)
        for member, split in zip(members, virtual.splits):
            (experts, row_counts), loaded = counted(member.scatter_wait)
            assert row_counts.tolist() == [len(p.x) for p in parts]
            arrived = member.arrived(0, 48, F32, row_counts)
            sizes = split.num_local_experts, 1, 4 * experts.numel()
            (_, slot_of, token_of_slot, *_), loaded = counted(
                lambda arrived=arrived, e=experts, s=sizes: dispatch_rows(arrived, e, *s)
            )
            rows, pairs = int((experts >= 0).any(1).sum()), int((experts >= 0).sum())
            assert loaded == rows * 192
            y = torch.randn(len(token_of_slot), 48)
            weights = torch.rand(experts.shape)
            _, loaded = counted(
                lambda arrived=arrived, a=(y, slot_of, token_of_slot, weights): combine_rows_backward(arrived, *a)
            )
            assert loaded == (rows + pairs) * 192


def test_the_tile_of_the_products_follows_the_tokens(monkeypatch):
    """Not the rows there is room for."""
    expected = []
    monkeypatch.setattr(grouped_gemm, "launch", lambda *args: expected.append(args[-2]))
    ep = ExpertParallel(None, num_experts=4, hidden=16, top_k=2, max_tokens=64, transport="virtual")
    x, routing = torch.randn(3, 16).to(BF16), (torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2))
    weights = torch.randn(4, 64, 16).to(BF16), torch.randn(4, 16, 32).to(BF16)
    with running(("sm_80", 0)):
        k2kernels.moe_mlp(x, routing, *weights, exchange=ep)
    assert expected == [6, 6]


@in_some_modes
def test_dropped_pairs_are_counted(mode):
    ep = ExpertParallel(None, num_experts=4, hidden=16, top_k=2, max_tokens=64, transport="virtual")
    x, indices = torch.randn(5, 16).to(BF16), torch.zeros(5, 2, dtype=torch.int32)
    with running(mode):
        ep.dispatch(x, indices, torch.ones(5, 2))
        assert ep.overflow is None
        for n in (1, 2):
            sent = ep.dispatch(x, indices, torch.ones(5, 2), capacity=4)
            assert len(sent.data) == 4 and int(ep.overflow) == 6 * n


def test_what_is_too_much_for_a_flag():
    with pytest.raises(ValueError, match=r"max_tokens must be an int in 0 .. 16777215, got 16777216"):
        k2kernels.parallel.VirtualRanks(1, num_experts=1, hidden=1, top_k=1, max_tokens=2**24)


def test_a_group_that_failed_says_so_again():
    virtual = make(2)
    virtual.withhold(1)
    parts = split_up(*make_batch("uniform", 2))
    for _ in range(2):
        with pytest.raises(PeerTimeout, match="rank 1 did not send"):
            virtual.dispatch(*([p[i] for p in parts] for i in range(3)))
