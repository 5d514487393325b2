"""Log-probabilities in chunks of the vocabulary, against log_softmax of all logits."""

import math
import sys

import pytest
import torch

import k2kernels
from k2kernels.functional.linear_log_probs import LogProbs
from k2kernels.testing.compare import check_close

chunked = sys.modules[LogProbs.__module__]
TEMPERATURE = 0.7


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """9 chunks of the vocabulary, the last one narrower."""
    monkeypatch.setattr(chunked, "COLUMNS", 32)


def case(dtype, tokens=300, hidden=24, vocabulary=270):
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, dtype=torch.float64).to(dtype)
    w = (2 * torch.randn(vocabulary, hidden, dtype=torch.float64)).to(dtype)
    targets = torch.randint(vocabulary, (tokens,))
    targets[:3] = torch.tensor([0, vocabulary - 1, 32])
    return x, w, targets, torch.randn(tokens, dtype=torch.float64), torch.randn(tokens, dtype=torch.float64)


def whole(x, w, targets, temperature):
    log_p = (x @ w.T / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def results(function, x, w, targets, grad, grad_entropy, dtype):
    """Log-probabilities, entropy, and gradients of x and w, with operands in `dtype`."""
    x, w = (t.to(dtype).requires_grad_() for t in (x, w))
    log_probs, entropy = function(x, w, targets)
    out = grad.to(log_probs.dtype) @ log_probs + grad_entropy.to(log_probs.dtype) @ entropy
    return (log_probs.detach(), entropy.detach(), *torch.autograd.grad(out, (x, w)))


def ours(x, w, targets):
    return k2kernels.linear_log_probs(x, w, targets, temperature=TEMPERATURE, entropy=True)


def theirs(x, w, targets):
    return whole(x, w, targets, TEMPERATURE)


NAMES = "log_probs", "entropy", "gradient of hidden", "gradient of weight"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_against_all_logits_in_float64(dtype):
    """Whatever the operands' dtype, errors are those of float32: sums over chunks in bfloat16 would drift."""
    inputs = case(dtype)
    got = results(ours, *inputs, dtype)
    want = results(theirs, *inputs, torch.float64)
    exact = dtype if dtype == torch.float64 else torch.float32
    plain = results(theirs, *inputs, exact)
    for name, one, right, same in zip(NAMES, got, want, plain):
        assert one.dtype == (exact if "grad" not in name else dtype)
        if dtype == torch.float64:
            torch.testing.assert_close(one, right, rtol=1e-13, atol=1e-12)
        else:
            check_close(one, right, same_precision=same, name=name)


def test_gradients_by_differences():
    x, w, targets, *_ = case(torch.float64, tokens=3, hidden=2, vocabulary=35)
    inputs = x.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: tuple(ours(x, w, targets)), inputs, fast_mode=True)
    log_probs = lambda x, w: k2kernels.linear_log_probs(x, w, targets)  # noqa: E731
    assert torch.autograd.gradcheck(log_probs, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_row_are_its_own(dtype):
    """Alone, in any batch, at any place of it."""
    inputs = case(dtype)
    x, w, targets, *grads = inputs
    want = results(ours, *inputs, dtype)[:3]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    for some in (torch.tensor([17]), torch.tensor([270, 3]), order[:129], order):
        some_grads = (grad[some] for grad in grads)
        got = results(ours, x[some], w, targets[some], *some_grads, dtype)[:3]
        for name, one, right in zip(NAMES, got, want):
            assert torch.equal(one, right[some]), f"{name} of {len(some)} rows"


def test_shapes_and_frozen_operands():
    x, w, targets, *_ = case(torch.float32, tokens=6)
    want = whole(x.double(), w.double(), targets, 1.0)[0].view(2, 3)
    x = x.view(2, 3, -1).requires_grad_()
    log_probs = k2kernels.linear_log_probs(x, w, targets.int().view(2, 3))
    torch.testing.assert_close(log_probs.double(), want, rtol=1e-5, atol=1e-5)
    log_probs.sum().backward()
    assert x.grad.shape == x.shape and w.grad is None
    w.requires_grad_()
    k2kernels.linear_log_probs(x.detach(), w, targets.view(2, 3)).sum().backward()
    assert w.grad.shape == w.shape
    none = k2kernels.linear_log_probs(x[:0], w, targets[:0].view(0, 3), entropy=True)
    assert none.log_probs.shape == none.entropy.shape == (0, 3)
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(none.log_probs.sum(), (x, w)))


def test_large_logits():
    """No overflow, and no cancellation in what is small."""
    x, w = torch.ones(1, 1), torch.cat([torch.linspace(-9e4, 9e4, 100), torch.tensor([9e4])])[:, None]
    log_probs, entropy = k2kernels.linear_log_probs(x, w, torch.tensor([99]), entropy=True)
    torch.testing.assert_close(torch.stack([log_probs, -entropy]), torch.full((2, 1), -math.log(2)))


def test_memory_does_not_grow_with_the_logits():
    """No tensor beyond the chunk: the storages that autograd keeps, and the largest that is made."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    x, w, targets, *_ = case(torch.float32, tokens=800, hidden=4, vocabulary=600)
    x.requires_grad_(), w.requires_grad_()
    with Watch():
        k2kernels.linear_log_probs(x, w, targets).sum().backward()
    assert largest <= max(chunked.ROWS * chunked.COLUMNS, x.numel(), 4 * len(x)) * 4 * 1.2  # rows are padded


def test_compiled():
    x, w, targets, *_ = case(torch.float32, tokens=5, hidden=8, vocabulary=40)
    x.requires_grad_()
    found = []
    for function in (ours, torch.compile(ours, fullgraph=True, backend="eager")):
        log_probs, entropy = function(x, w, targets)
        found.append((log_probs, entropy, *torch.autograd.grad(log_probs.sum() + entropy.sum(), x)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(weight=torch.randn(270, 8)), ValueError, r"weight must be \[V=270, H=24\] float32, got \[270, 8\]"),
        (dict(weight=torch.randn(270, 24).double()), TypeError, "weight must be .* got .* float64"),
        (dict(weight=torch.randn(0, 24)), ValueError, "weight must be of 1 or more rows"),
        (dict(targets=torch.zeros(4).long()), ValueError, r"targets must be \[3\] int32 or int64, got \[4\]"),
        (dict(targets=torch.tensor([0, 270, 1])), ValueError, "targets must be from 0 to 269, got 0 to 270"),
        (dict(targets=torch.tensor([0, -100, 1])), ValueError, ".* got -100 to 1"),
        (dict(temperature=0.0), ValueError, "temperature must be positive"),
        (dict(entropy=1), TypeError, "entropy must be True or False"),
    ],
)
def test_messages(change, error, message):
    x, w, targets, *_ = case(torch.float32, tokens=3)
    with pytest.raises(error, match=f"linear_log_probs: {message}"):
        k2kernels.linear_log_probs(**{**dict(hidden=x, weight=w, targets=targets), **change})


def test_a_second_derivative_is_refused():
    x, w, targets, *_ = case(torch.float32, tokens=3)
    log_probs = k2kernels.linear_log_probs(x.requires_grad_(), w, targets)
    with pytest.raises(RuntimeError, match="has a first derivative only"):
        torch.autograd.grad(log_probs.sum(), x, create_graph=True)
