"""The adapter to DeepEP, with a stand-in for its buffer: ranks are threads, and rows arrive in any order."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from k2kernels.functional.moe_mlp import moe_mlp
from k2kernels.integrations.deep_ep import DeepEP
from k2kernels.ops.moe import moe_combine, moe_dispatch

RANKS, EXPERTS, TOP_K, HIDDEN = 3, 12, 4, 128
TOKENS = [5, 9, 3]
STARTS = [0, 5, 14, 17]
BF16, F32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


class Buffer:
    """What DeepEP's source says of `ElasticBuffer`'s dispatch and combine without expansion."""

    def __init__(self, rank, board, barrier):
        self.rank_idx, self.num_ranks, self.calls = rank, RANKS, 0
        self._board, self._barrier = board, barrier

    def _tell_all(self, what):
        self.calls += 1
        self._board[self.calls, self.rank_idx] = what
        self._barrier.wait()
        return [self._board[self.calls, rank] for rank in range(RANKS)]

    def dispatch(self, x, topk_idx=None, topk_weights=None, *, num_experts=None, handle=None):
        parts = x if isinstance(x, tuple) else (x,)
        assert parts[0].is_contiguous() and parts[0].dtype == (E4M3 if len(parts) == 2 else BF16)
        assert len(parts) == 1 or parts[1].dtype == F32
        if handle is None:
            assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous() and num_experts % RANKS == 0
            assert topk_weights.dtype == F32 and topk_weights.is_contiguous()
        else:
            assert topk_idx is None and num_experts is None
        told = self._tell_all((parts, topk_idx, topk_weights))
        here = num_experts // RANKS if handle is None else handle.here
        first = self.rank_idx * here
        if handle is None:
            of = [(r, t) for r, (_, i, _) in enumerate(told) for t in range(len(i))]
            local = [torch.where((i >= first) & (i < first + here), i - first, -1) for _, i, _ in told]
            of = [(r, t) for r, t in of if (local[r][t] >= 0).any()]
            of = [of[i] for i in torch.randperm(len(of), generator=torch.Generator().manual_seed(self.calls))]
            experts = torch.stack([local[r][t] for r, t in of] or [topk_idx[0][:0].new_empty(TOP_K)])[: len(of)]
            counts = [int((experts == e).sum()) for e in range(here)]
            handle = SimpleNamespace(
                of=of, topk_idx=topk_idx.clone(), here=here, num_recv_tokens_per_expert_list=counts
            )
        else:
            experts = None
        arrived = tuple(
            torch.stack([told[r][0][n].view(torch.uint8)[t] for r, t in handle.of]).view(parts[n].dtype)
            for n in range(len(parts))
        )
        weights = None if topk_weights is None else torch.stack([told[r][2][t] for r, t in handle.of])
        return arrived if len(parts) == 2 else arrived[0], experts, weights, handle, None

    def combine(self, x, handle, topk_weights=None):
        assert x.dtype == BF16 and x.is_contiguous() and x.shape[0] == len(handle.of)
        assert topk_weights is None or (topk_weights.dtype == F32 and topk_weights.is_contiguous())
        told = self._tell_all((x, topk_weights, handle.of))
        out = torch.zeros(len(handle.topk_idx), x.shape[1])
        weights = torch.zeros(handle.topk_idx.shape)
        for rank, (rows, numbers, of) in enumerate(told):
            for i, (r, t) in enumerate(of):
                if r == self.rank_idx:
                    out[t] += rows[i].float()
                    if numbers is not None:
                        mine = handle.topk_idx[t].div(handle.here, rounding_mode="floor") == rank
                        weights[t] = torch.where(mine, numbers[i], weights[t])
        return out.to(BF16), None if topk_weights is None else weights, None


def on_ranks(call):
    """What call(rank, adapter) returns on each rank."""
    board, barrier = {}, threading.Barrier(RANKS, timeout=20)
    adapters = [DeepEP(Buffer(rank, board, barrier), num_experts=EXPERTS) for rank in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(call, range(RANKS), adapters))


def make_batch():
    """Whole numbers, so that sums in any order are the same, also in bfloat16."""
    torch.manual_seed(0)
    total = STARTS[-1]
    indices = torch.rand(total, EXPERTS).argsort(-1)[:, :TOP_K]
    indices = torch.where(torch.rand(total, TOP_K) < 0.2, -1, indices).int()
    weights = 2.0 ** torch.randint(-1, 2, (total, TOP_K))
    x, shared, grad = (torch.randint(-4, 5, (total, HIDDEN)).to(BF16) for _ in range(3))
    return x, indices, weights, shared, grad


def experts(sent, first, last, data):
    slots = torch.arange(len(data), dtype=torch.int32)
    expert = first + torch.searchsorted(sent.offsets[1:].contiguous(), slots, right=True).clamp(max=last - first)
    pad = (sent.handle.local if hasattr(sent.handle, "local") else sent.handle).token_of_slot < 0
    return data.float().masked_fill(pad[:, None], float("nan")) * (1 + expert % 3)[:, None]


def through(dispatch, combine, first, last, x, indices, weights, shared, grad, *, quantize=False):
    x, weights, shared = x.clone().requires_grad_(not quantize), weights.clone().requires_grad_(), shared.clone()
    sent = dispatch(x, indices, weights, alignment=4, quantize=quantize, power_of_two=quantize)
    data = sent.data
    if quantize:
        data = (data.float() * sent.scales.repeat_interleave(128, 1)).to(BF16)
    out = combine(experts(sent, first, last, data), sent.handle, shared=shared.requires_grad_(), out_dtype=F32)
    out.backward(grad.float())
    return [t for t in (out.detach(), x.grad, weights.grad, shared.grad) if t is not None]


@pytest.mark.parametrize("quantize", [False, True])
def test_results_and_gradients_are_those_of_one_rank(quantize):
    batch = make_batch()

    def one(*args, **options):
        return moe_dispatch(*args, num_experts=EXPERTS, **options)

    want = through(one, moe_combine, 0, EXPERTS - 1, *batch, quantize=quantize)

    def call(rank, adapter):
        mine = [t[STARTS[rank] : STARTS[rank + 1]] for t in batch]
        first = adapter.first_expert
        last = first + adapter.num_local_experts - 1
        return through(adapter.dispatch, adapter.combine, first, last, *mine, quantize=quantize)

    for rank, got in enumerate(on_ranks(call)):
        assert len(got) == len(want)
        for g, w in zip(got, want):
            assert g.dtype == w.dtype and torch.equal(g, w[STARTS[rank] : STARTS[rank + 1]])


def test_a_whole_layer():
    batch = make_batch()
    gate_up, down = torch.randn(EXPERTS, 64, HIDDEN).to(BF16) / 11, torch.randn(EXPERTS, HIDDEN, 32).to(BF16) / 6
    want = moe_mlp(batch[0], tuple(batch[1:3]), gate_up, down)

    def call(rank, adapter):
        mine = [t[STARTS[rank] : STARTS[rank + 1]] for t in batch]
        here = slice(adapter.first_expert, adapter.first_expert + adapter.num_local_experts)
        return moe_mlp(mine[0], tuple(mine[1:3]), gate_up[here], down[here], exchange=adapter)

    difference = torch.cat(on_ranks(call)).float() - want.float()
    assert difference.norm() < 2**-8 * want.float().norm()  # bfloat16 rounds by 2**-9 at most, each rank's sum too


def test_what_does_not_go_says_so():
    def call(rank, adapter):
        x, indices, weights, *_ = (t[STARTS[rank] : STARTS[rank + 1]] for t in make_batch())
        with pytest.raises(TypeError, match=r"DeepEP.dispatch: x must be .*bfloat16, got .*float32"):
            adapter.dispatch(x.float(), indices, weights)
        with pytest.raises(TypeError, match=r"DeepEP.combine: handle must be the handle of dispatch, got NoneType"):
            adapter.combine(x, None)
        sent = adapter.dispatch(x.requires_grad_(), indices, weights.requires_grad_(), quantize=True)
        with pytest.raises(ValueError, match=r"DeepEP.combine: shared must be \[\d+, H=128\]"):
            adapter.combine(sent.data.to(BF16), sent.handle, shared=torch.zeros(1, HIDDEN))
        with pytest.raises(RuntimeError, match="with quantize=True there is no gradient of x"):
            adapter.combine(sent.data.to(BF16), sent.handle).sum().backward()

    on_ranks(call)
    with pytest.raises(ValueError, match=r"DeepEP: num_experts must be a multiple of the 3 ranks, got 10"):
        DeepEP(SimpleNamespace(num_ranks=3, rank_idx=0), num_experts=10)
