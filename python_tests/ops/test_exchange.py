"""The four steps between ranks of one process, by kernels in the emulator and in plain PyTorch.

`python_tests/parallel` has the faults, the epochs, and dispatch and combine over ranks with their gradients.
"""

import contextlib
import itertools

import pytest
import torch

import k2kernels
from k2kernels.ops._check import FLOATS
from k2kernels.ops._constants import constants
from k2kernels.ops.exchange import PHASES, Call, Rank
from k2kernels.reference.exchange import KINDS, Layout, to_16

BF16, F32 = torch.bfloat16, torch.float32
EXPERTS, TOP_K, HIDDEN, MOST_TOKENS = 7, 3, 20, 6
BOUNDS = [0, 3, 5, 7]  # first expert of each of 3 ranks
in_all_modes = pytest.mark.parametrize("mode", ["plain", ("sm_80", 0), ("sm_90a", 1), ("sm_80", 2)], ids=str)


def running(mode):
    return contextlib.nullcontext() if mode == "plain" else k2kernels.emulated(mode[0], seed=mode[1])


def make(world=3):
    extra = 4 * TOP_K
    layout = Layout(world, EXPERTS, TOP_K, MOST_TOKENS, 4 * HIDDEN, extra, constants.EXCHANGE_FLAG_BYTES)
    buffers = [torch.zeros(layout.bytes, dtype=torch.uint8) for _ in range(world)]
    peers = torch.tensor([buffer.data_ptr() for buffer in buffers])
    return [Rank(layout, rank, buffers[rank], peers, buffers, blocks=3) for rank in range(world)]


@in_all_modes
@pytest.mark.parametrize("dtype, index_dtype", [(F32, torch.int64), (BF16, torch.int32)], ids=str)
def test_rows_reach_their_experts_and_return(dtype, index_dtype, mode):
    ranks, tokens = make(), [4, 0, MOST_TOKENS]
    for epoch in (1, 2, 3):
        xs = [torch.randn(n, HIDDEN).to(dtype) for n in tokens]
        weights = [torch.rand(n, TOP_K) for n in tokens]
        indices = [torch.randint(-1, EXPERTS, (n, TOP_K)).to(index_dtype) for n in tokens]
        with running(mode):
            for rank, x, w, index in zip(ranks, xs, weights, indices):
                rank.scatter([x, w], index, Call("dispatch", dtype))
            arrivals = []
            for rank in ranks:
                experts, counts = rank.scatter_wait()
                rows, factors = rank.arrived(0, HIDDEN, dtype), rank.arrived(1, TOP_K, F32)
                assert int(rows.half) == epoch % 2
                arrivals.append((experts, counts, rows.copy(), factors.copy()))
        for (experts, counts, rows, factors), first, end in zip(arrivals, BOUNDS, BOUNDS[1:]):
            assert counts.tolist() == tokens
            shape = 3, MOST_TOKENS, -1
            experts, rows, factors = experts.view(shape), rows.view(shape), factors.view(shape)
            for source, (x, w, index) in enumerate(zip(xs, weights, indices)):
                here = (index >= first) & (index < end)
                assert torch.equal(experts[source, : len(x)], torch.where(here, index - first, -1).int())
                assert (experts[source, len(x) :] == -1).all()
                sent = here.any(1)
                assert torch.equal(rows[source, : len(x)][sent], x[sent])
                assert torch.equal(factors[source, : len(x)][sent], w[sent])

        ys = [torch.randn(3 * MOST_TOKENS * TOP_K, HIDDEN).to(dtype) for _ in ranks]
        with running(mode):
            for rank, y, (experts, counts, *_) in zip(ranks, ys, arrivals):
                slot_of = torch.arange(experts.numel(), dtype=torch.int32).view(experts.shape)
                slot_of[::4, 0] = -1  # no room
                rank.gather(y, experts, slot_of, counts, Call("combine", dtype))
            for home, (rank, index, w) in enumerate(zip(ranks, indices, weights)):
                slot_of, factors = rank.gather_wait(index, w)
                assert torch.equal(factors, w)
                returned = rank.returned(HIDDEN, dtype).copy()
                for token, k in itertools.product(range(len(index)), range(TOP_K)):
                    row, expert = home * MOST_TOKENS + token, int(index[token, k])
                    slot = int(slot_of[token, k])
                    if expert < 0 or (row % 4 == 0 and k == 0):
                        assert slot == -1
                    else:
                        owner = next(r for r in range(3) if expert < BOUNDS[r + 1])
                        assert torch.equal(returned[slot], ys[owner][row * TOP_K + k])
    assert [rank.fault() for rank in ranks] == [None] * 3


def test_steps_are_counted_as_launches():
    ranks, before = make(1), k2kernels.launch_count("moe_exchange")
    x, indices = torch.randn(2, HIDDEN), torch.zeros(2, TOP_K, dtype=torch.int32)
    with k2kernels.emulated():
        ranks[0].scatter([x], indices, Call("dispatch", F32))
        ranks[0].scatter_wait()
    assert k2kernels.launch_count("moe_exchange") == before + 2


@in_all_modes
def test_columns_that_lie_apart_are_refused(mode):
    x, indices = torch.randn(HIDDEN, 4).T, torch.zeros(4, TOP_K, dtype=torch.int32)
    with running(mode), pytest.raises(ValueError, match=r"rows must have stride 1 along columns, got strides"):
        make()[0].scatter([x], indices, Call("dispatch", F32))


def test_parts_of_a_buffer_lie_apart():
    layout = make(2)[0].layout
    parts = [(0, layout.flag_bytes)]
    for kind, most_rows, width in (
        ("scatter", 2 * MOST_TOKENS, layout.row_bytes + layout.extra_bytes),
        ("gather", MOST_TOKENS * TOP_K, layout.row_bytes),
    ):
        _, flags, numbers, rows, half, pitch = layout.place(kind, width)
        assert pitch == width and flags % layout.flag_bytes == half % layout.flag_bytes == rows % 16 == 0
        for shift in (0, half):
            parts.append((flags + shift, 2 * layout.flag_bytes))
            parts.append((numbers + shift, 4 * TOP_K * MOST_TOKENS * (2 if kind == "scatter" else 1)))
            parts.append((rows + shift, most_rows * width))
    parts.sort()
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(parts))
    assert sum(parts[-1]) <= layout.bytes and set(KINDS) == {"scatter", "gather"} and to_16(17) == 32


def test_calls_have_codes_of_their_own():
    calls = [Call(*call) for call in itertools.product(PHASES, FLOATS, (False, True), (False, True))]
    assert len({call.code() for call in calls}) == len(calls)
    assert all(call.code() < 2**8 and Call.phase_of(call.code()) == call.phase for call in calls)


class WrittenMeanwhile:
    """An error record that the device writes, the fault last, after the host has begun to read."""

    def __init__(self, final):
        self.final, self.there = final, False

    def __getitem__(self, index):
        self.there = True
        return self.final[index]

    def tolist(self):
        fault = constants.EXCHANGE_ERROR_FAULT
        return self.final if self.there else [self.final[i] if i == fault else 0 for i in range(len(self.final))]


def test_an_error_record_is_read_from_its_end():
    (member,) = make(1)
    record = [0] * constants.EXCHANGE_ERROR_WORDS
    record[constants.EXCHANGE_ERROR_CALL] = Call("combine", F32).code()
    record[constants.EXCHANGE_ERROR_WHO], record[constants.EXCHANGE_ERROR_NUMBER] = 5, 77
    record[constants.EXCHANGE_ERROR_FAULT] = constants.EXCHANGE_PEER_SILENT
    member.error = WrittenMeanwhile(record)
    assert member.fault() == (constants.EXCHANGE_PEER_SILENT, "combine", 5, 77)
