"""The kernels of the sequence loss and of the router's bias, in the emulator."""

import itertools
import math

import pytest
import torch

import k2kernels
from k2kernels.ops.moe import balance, moe_route, moe_sequence_loss, moe_update_bias
from k2kernels.reference import moe as reference
from k2kernels.testing.compare import check_close, check_op
from k2kernels.testing.inputs import guarded

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SCHEDULES = [("sm_80", 0), ("sm_90a", 1), ("sm_80", 2), ("sm_90a", 3)]

in_all_schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s[0]}-{s[1]}")


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_sequence_loss_formula(score):
    experts, top_k, alpha, ends = 6, 2, 0.3, [0, 4, 4, 7, 11]
    logits = torch.randn(11, experts, dtype=F64)
    indices = torch.randint(-1, experts, (11, top_k), dtype=torch.int32)
    losses = []
    for start, end in ((0, 4), (4, 7), (7, 11)):
        length, loss = end - start, 0.0
        for e in range(experts):
            f = experts / (top_k * length) * int((indices[start:end] == e).sum())
            scores = logits[start:end].sigmoid() if score == "sigmoid" else logits[start:end].exp()
            loss += f * sum(float(row[e] / row.sum()) for row in scores) / length
        losses.append(alpha * loss)
    got = moe_sequence_loss(logits, indices, top_k=top_k, alpha=alpha, cu_seqlens=torch.tensor(ends), score=score)
    assert got.item() == pytest.approx(sum(losses) / 3, rel=1e-12)
    whole = moe_sequence_loss(logits[:4], indices[:4], top_k=top_k, alpha=alpha, score=score)
    assert whole.item() == pytest.approx(losses[0], rel=1e-12)


def test_sequence_loss_of_balanced_routing_is_alpha():
    indices = torch.arange(16).reshape(8, 2) % 4
    got = moe_sequence_loss(torch.zeros(8, 4), indices, top_k=2, alpha=0.001)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(0.001, rel=1e-6)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 2, 2, 7], dtype=torch.int32)])
def test_sequence_loss_gradient(score, cu_seqlens):
    logits = torch.randn(7, 8, dtype=F64, requires_grad=True)
    indices = moe_route(logits, top_k=3, score=score).indices
    loss = lambda x: moe_sequence_loss(x, indices, top_k=3, alpha=0.5, cu_seqlens=cu_seqlens, score=score)  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits)


def test_sequence_loss_edges():
    none = torch.zeros(0, 8, requires_grad=True)
    empty = moe_sequence_loss(none, torch.zeros(0, 2, dtype=torch.int32), top_k=2, alpha=1.0)
    empty.backward()
    assert empty.item() == 0 and none.grad.shape == (0, 8)
    logits = torch.full((2, 8), math.nan, requires_grad=True)
    got = moe_sequence_loss(logits, torch.tensor([[0, 1], [0, 2]]), top_k=2, alpha=1.0)
    got.backward()
    assert got.item() == 0 and (logits.grad == 0).all()


def test_sequence_loss_bad_arguments():
    logits, indices = torch.zeros(4, 8), torch.zeros(4, 2, dtype=torch.int32)
    for ends in ([0, 3], [1, 4], [0, 3, 2, 4]):
        with pytest.raises(ValueError, match=r"moe_sequence_loss: cu_seqlens must rise from 0 to 4 .*, got \[\d"):
            moe_sequence_loss(logits, indices, top_k=2, alpha=1.0, cu_seqlens=torch.tensor(ends))
    with pytest.raises(ValueError, match=r"top_k must be the width of indices, 2, got 3"):
        moe_sequence_loss(logits, indices, top_k=3, alpha=1.0)
    with pytest.raises(ValueError, match=r"moe_sequence_loss: indices must be from -1 .none. to E-1=7, got 8"):
        moe_sequence_loss(logits, indices + 8, top_k=2, alpha=1.0)


def test_update_bias_by_sign():
    bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
    counts = torch.tensor([1, 3, 9, 3])  # mean 4
    got = moe_update_bias(bias, counts, rate=0.25)
    assert got.tolist() == [0.75, 0.25, -0.75, 0.25]
    assert bias.tolist() == [0.5, 0.0, -0.5, 0.0]  # not in place
    assert moe_update_bias(bias, torch.full((4,), 7), rate=0.25).tolist() == bias.tolist()


def test_update_bias_by_rank():
    counts = torch.tensor([5, 5, 1, 90, 7], dtype=torch.int32)
    got = moe_update_bias(torch.zeros(5), counts, rate=1.0, mode="quantile")
    assert got.tolist() == [0.25, 0.25, 1.0, -1.0, -0.5]
    assert moe_update_bias(torch.ones(3), torch.full((3,), 7), rate=1.0, mode="quantile").tolist() == [1.0] * 3
    assert moe_update_bias(torch.ones(1), torch.tensor([7]), rate=1.0, mode="quantile").tolist() == [1.0]


@pytest.mark.parametrize("mode", ["sign", "quantile"])
def test_update_bias_counts_are_exact(mode):
    base = 2**40  # float32 holds no odd number above 2**24, float64 none above 2**53
    counts = torch.tensor([base + 1, base, base - 1])
    assert counts.float().unique().numel() == 1
    assert moe_update_bias(torch.zeros(3), counts, rate=1.0, mode=mode).tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("mode", ["sign", "quantile"])
def test_update_bias_balances_the_load(mode):
    experts, top_k = 16, 2
    skew = torch.linspace(-1.5, 1.5, experts)
    bias = torch.zeros(experts)
    imbalance = []
    for step in range(300):
        counts = moe_route(torch.randn(512, experts) + skew, bias, top_k=top_k).counts
        bias = moe_update_bias(bias, counts, rate=0.02 if step < 150 else 0.002, mode=mode)
        imbalance.append(float(counts.max() / counts.double().mean()))
    assert imbalance[0] > 2.5
    assert sum(imbalance[-20:]) / 20 < 1.3  # sampling noise alone gives about 1.2
    if mode == "quantile":
        assert abs(bias.sum()) < 1e-3


def test_update_bias_bad_arguments():
    with pytest.raises(
        TypeError, match=r"moe_update_bias: counts must be .* int64, got \[4\] float32; count in integers"
    ):
        moe_update_bias(torch.zeros(4), torch.zeros(4), rate=0.1)
    with pytest.raises(TypeError, match=r"bias must be \[E\] float32, got \[4\] bfloat16; keep the bias in float32"):
        moe_update_bias(torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64), rate=0.1)
    with pytest.raises(ValueError, match=r"mode must be one of 'sign', 'quantile', got 'median'"):
        moe_update_bias(torch.zeros(4), torch.zeros(4, dtype=torch.int64), rate=0.1, mode="median")


def launched(op, kernels, schedule, function, *args, **options):
    before = k2kernels.launch_count(op)
    with k2kernels.emulated(schedule[0], seed=schedule[1]):
        result = function(*args, **options)
    assert k2kernels.launch_count(op) == before + kernels
    return result


def loss_by_sequences(logits, indices, ends, alpha, score):
    """In float64, sequence by sequence: alpha times the mean of sum over e of f_e P_e."""
    experts, top_k = logits.shape[1], indices.shape[1]
    losses = []
    for begin, end in itertools.pairwise(ends):
        if end == begin:
            continue
        z = logits[begin:end].double()
        scores = z.sigmoid() if score == "sigmoid" else z.softmax(-1)
        taken = indices[begin:end].flatten()
        frequency = torch.bincount(taken[taken >= 0], minlength=experts) * experts / (top_k * (end - begin))
        losses.append((frequency * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum())
    return alpha * torch.stack(losses).mean() if losses else logits.double().sum() * 0


LOSSES = {  # tokens, experts, top-k, ends of sequences, dtype
    "K2": (40, 384, 8, [0, 7, 7, 40], F32),
    "V3": (20, 256, 8, None, BF16),
    "K3": (9, 896, 16, [0, 0, 0, 4, 9, 9], F32),
    "odd": (33, 37, 5, [0, 1, 2, 33], F16),
    "one": (1, 6, 6, [0, 1], F32),
    "more than the router takes": (3, 1500, 40, [0, 2, 3], F32),
    "many sequences": (600, 8, 2, list(range(0, 601, 2)), F32),
    "more blocks than there may be": (4300, 8, 2, [0, 4200, 4300], F32),
    "nothing": (0, 8, 2, [0, 0], F32),
}


@in_all_schedules
@pytest.mark.parametrize("case", LOSSES)
def test_sequence_loss_and_its_gradient(case, schedule):
    tokens, experts, top_k, ends, dtype = LOSSES[case]
    score = ("sigmoid", "softmax")[schedule[1] // 2]
    logits = torch.randn(tokens, experts).to(dtype)
    indices = torch.randint(-1, experts, (tokens, top_k))
    if schedule[1] % 2:
        indices = indices.int()
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=(torch.int64, torch.int32)[schedule[1] % 2])
    ends = [0, tokens] if ends is None else ends

    exact_logits = logits.double().requires_grad_()
    exact = loss_by_sequences(exact_logits, indices, ends, 0.3, score)
    (exact_gradient,) = torch.autograd.grad(2.5 * exact, exact_logits)
    plain = reference.moe_sequence_loss(logits, indices, cu_seqlens, 0.3, score)
    args = guarded(logits), guarded(indices), None if cu_seqlens is None else guarded(cu_seqlens)
    kernels = 3 if tokens else 1
    loss = launched("moe_sequence_loss", kernels, schedule, balance._moe_sequence_loss, *args, 0.3, score)
    # Up to 32 terms in a row, in a dozen steps; terms are positive.
    assert loss.dtype == F32 and loss.shape == ()
    check_close(loss, exact.detach(), budget=float(exact.detach()) * 4e-6 + 1e-30)
    check_close(loss, plain.double(), budget=float(exact.detach()) * 4e-6 + 1e-30)

    rest = torch.tensor(2.5), *args, 0.3, score
    plain = reference.moe_sequence_loss_backward(rest[0], logits, indices, cu_seqlens, 0.3, score)
    got = launched(
        "moe_sequence_loss_backward", 2 if tokens else 0, schedule, balance._moe_sequence_loss_backward, *rest
    )
    assert got.dtype == dtype and got.shape == logits.shape
    check_close(got, exact_gradient, same_precision=plain)


@in_all_schedules
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_sequence_loss_of_bad_logits(score, schedule):
    nan, inf = math.nan, math.inf
    logits = torch.randn(9, 8)
    logits[0], logits[1], logits[2], logits[3] = nan, -inf, inf, torch.tensor([nan, 1, -inf, 2, inf, 3, 0, nan])
    logits[4], logits[5], logits[6] = -200, 300, torch.tensor([1e38, -1e38, 0, 88, -88, 104, -104, 3e38])
    args = logits, torch.randint(0, 8, (9, 2)), torch.tensor([0, 3, 9]), 1.5, score
    got = launched("moe_sequence_loss", 3, schedule, balance._moe_sequence_loss, *args)
    want = balance._moe_sequence_loss(*args)
    assert want.isfinite()
    torch.testing.assert_close(got, want, rtol=4e-6, atol=0)
    grad = torch.tensor(1.0)
    got = launched("moe_sequence_loss_backward", 2, schedule, balance._moe_sequence_loss_backward, grad, *args)
    torch.testing.assert_close(got, balance._moe_sequence_loss_backward(grad, *args), rtol=1e-5, atol=1e-7)


def test_sequence_loss_is_the_same_bits_in_any_schedule():
    logits, indices = torch.randn(500, 40), torch.randint(0, 40, (500, 3))
    losses = [
        launched("moe_sequence_loss", 3, s, moe_sequence_loss, logits, indices, top_k=3, alpha=1.0) for s in SCHEDULES
    ]
    assert len(set(map(float, losses))) == 1


def test_sequence_loss_of_rows_that_lie_apart():
    wide = torch.full((9, 50), math.nan)
    wide[:, 1:41] = torch.randn(9, 40)
    indices = torch.randint(0, 40, (9, 3))
    want = moe_sequence_loss(wide[:, 1:41], indices, top_k=3, alpha=1.0)
    for logits in (wide[:, 1:41], wide[:, 1:41].mT.contiguous().mT):
        got = launched("moe_sequence_loss", 3, SCHEDULES[2], moe_sequence_loss, logits, indices, top_k=3, alpha=1.0)
        torch.testing.assert_close(got, want)


def test_what_does_not_exist_reaches_no_memory():
    """The host does not look into a GPU's indices and ends."""
    logits = guarded(torch.randn(5, 8))
    indices = guarded(torch.tensor([[8, -9], [2**31 - 1, 0], [1, 2], [3, 4], [-1, 7]], dtype=torch.int32))
    with k2kernels.emulated():
        for ends in ([0, 3, 5], [9, -4, 2**30], [5, 5, 5], [0, 1, 2]):
            cu_seqlens = guarded(torch.tensor(ends, dtype=torch.int32))
            loss = balance._moe_sequence_loss.kernel(logits, indices, cu_seqlens, 1.0, "sigmoid")
            d_logits = balance._moe_sequence_loss_backward.kernel(
                torch.ones(()), logits, indices, cu_seqlens, 1.0, "softmax"
            )
            if ends == [0, 3, 5]:
                assert loss.isfinite() and d_logits.isfinite().all()


def test_sequence_loss_trains_the_router():
    """The public function, with autograd, by kernels alone."""
    logits = torch.randn(12, 16, requires_grad=True)
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)

    def loss(logits):
        choice = moe_route(logits.detach(), top_k=4)
        return moe_sequence_loss(logits, choice.indices, top_k=4, alpha=0.1, cu_seqlens=ends)

    (want,) = torch.autograd.grad(loss(logits), logits)
    with k2kernels.emulated(seed=3):
        (got,) = torch.autograd.grad(loss(logits), logits)
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


# The bias


@in_all_schedules
@pytest.mark.parametrize("mode", ["sign", "quantile"])
@pytest.mark.parametrize("experts", [1, 2, 37, 384, 896, 1024])
def test_update_bias_equals_the_reference_bit_for_bit(experts, mode, schedule):
    bias = torch.randn(experts)
    for counts in (
        torch.randint(0, 50, (experts,)),
        torch.randint(0, 2**31 - 1, (experts,)).int(),
        torch.full((experts,), 7),
        # In float32 they all look alike.
        (1 << 40) + torch.arange(experts)[torch.randperm(experts)],
        (1 << 24) + torch.randint(0, 2, (experts,)),
    ):
        want = reference.moe_update_bias(bias, counts, 1e-3, mode)
        with k2kernels.emulated(schedule[0], seed=schedule[1]):
            got = moe_update_bias(guarded(bias), guarded(counts), rate=1e-3, mode=mode)
        assert got.dtype == F32 and torch.equal(got, want)


def test_update_bias_moves_the_busy_down():
    """By hand: the mean is 2**24 + 2/3, which no float32 is."""
    bias, counts = torch.zeros(3), (1 << 24) + torch.tensor([0, 1, 1])
    got = launched("moe_update_bias", 1, SCHEDULES[3], moe_update_bias, bias, counts, rate=0.5)
    assert got.tolist() == [0.5, -0.5, -0.5]
    got = launched("moe_update_bias", 1, SCHEDULES[3], moe_update_bias, bias, counts, rate=0.5, mode="quantile")
    assert got.tolist() == [0.5, -0.25, -0.25]


def test_update_bias_of_entries_that_lie_apart():
    bias, counts = torch.randn(20, 2)[:, 0], torch.randint(0, 9, (20, 3))[:, 1]
    want = moe_update_bias(bias, counts, rate=0.1)
    assert torch.equal(launched("moe_update_bias", 1, SCHEDULES[0], moe_update_bias, bias, counts, rate=0.1), want)


def test_what_no_kernel_serves():
    indices = torch.zeros(2, 2, dtype=torch.int32)
    with k2kernels.emulated():
        with pytest.raises(k2kernels.UnsupportedError, match=r"moe_sequence_loss: .* float64"):
            moe_sequence_loss(torch.zeros(2, 8).double(), indices, top_k=2, alpha=1.0)
        with pytest.raises(k2kernels.UnsupportedError, match=r"bias: .*E of bias must be at most 1024 .* got 1025"):
            moe_update_bias(torch.zeros(1025), torch.zeros(1025, dtype=torch.int64), rate=1.0)


def test_registered():
    logits, indices, ends = torch.randn(6, 8), torch.randint(0, 8, (6, 2)), torch.tensor([0, 2, 6])
    with k2kernels.emulated():
        check_op(balance._moe_sequence_loss, (logits, indices, ends, 0.1, "softmax"), differentiable=True)
        check_op(balance._moe_update_bias, (torch.randn(8), torch.arange(8), 0.1, "quantile"))
