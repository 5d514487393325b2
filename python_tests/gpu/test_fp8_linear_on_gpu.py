"""FP8 linear layers, forward and backward, on a GPU: their numbers, in CUDA graphs, and without waiting."""

import contextlib

import pytest
import torch

import k2kernels as k

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROWS, N, K, EXPERTS = 1024, 512, 1536, 4
STARTS = {1: [0, 300, 300, 700, 1024], 128: [0, 384, 384, 768, 1024]}
COUNTS = [[300, 0, 290, 200], [1, 0, 129, 256]]


def inputs():
    torch.manual_seed(0)
    x, grad = torch.randn(ROWS, K).bfloat16().cuda(), torch.randn(ROWS, N).bfloat16().cuda()
    return x.requires_grad_(), (torch.randn(EXPERTS, N, K) * K**-0.5).cuda().requires_grad_(), grad


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def dense(x, weight, grad):
    return torch.autograd.grad(k.fp8_linear(x, weight[0]), (x, weight), grad)


def grouped(x, weight, grad, offsets, counts, alignment):
    y = k.grouped_fp8_linear(x, weight, offsets=offsets, counts=counts, alignment=alignment)
    return torch.autograd.grad(y, (x, weight), grad)


def check(got, want):
    """Two roundings to e4m3 are noise of -28.8 dB."""
    noise = (got.double() - want).square().sum() / want.square().sum()
    assert noise < 10**-2.8


def test_gradients():
    x, weight, grad = inputs()
    before = k.launch_count("fp8_gemm")
    d_x, d_weight = dense(x, weight, grad)
    assert k.launch_count("fp8_gemm") == before + 3
    check(d_x, grad.double() @ weight[0].double())
    check(d_weight[0], grad.double().T @ x.double())


@pytest.mark.parametrize("alignment", STARTS)
def test_grouped_gradients(alignment):
    x, weight, grad = inputs()
    d_x, d_weight = grouped(x, weight, grad, ints(STARTS[alignment]), ints(COUNTS[0]), alignment)
    for group, (start, count) in enumerate(zip(STARTS[alignment], COUNTS[0])):
        rows = slice(start, start + count)
        if count:
            check(d_x[rows], grad[rows].double() @ weight[group].double())
            check(d_weight[group], grad[rows].double().T @ x[rows].double())
        else:
            assert d_weight[group].eq(0).all()


@contextlib.contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("alignment", STARTS)
def test_in_a_graph_with_changing_groups(alignment):
    x, weight, grad = inputs()
    offsets, counts = ints(STARTS[alignment]), ints(COUNTS[0])
    dense(x, weight, grad)
    with no_waiting():
        grouped(x, weight, grad, offsets, counts, alignment)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = *dense(x, weight, grad), *grouped(x, weight, grad, offsets, counts, alignment)
    for sizes in COUNTS:
        counts.copy_(ints(sizes))
        with torch.no_grad():
            x.normal_()
        graph.replay()
        want = *dense(x, weight, grad), *grouped(x, weight, grad, offsets, counts, alignment)
        assert all(torch.equal(g, w) for g, w in zip(results, want))


def test_compiled():
    x, weight, grad = inputs()
    offsets, counts = ints(STARTS[1]), ints(COUNTS[0])
    torch._dynamo.reset()

    def run(x, weight):
        y = k.grouped_fp8_linear(x, weight, offsets=offsets, counts=counts)
        real = torch.arange(ROWS, device="cuda")[:, None] < 300
        return k.fp8_linear(x, weight[0]) + y.where(real, 0)

    got, want = (
        torch.autograd.grad(function(x, weight), (x, weight), grad)
        for function in (torch.compile(run, fullgraph=True), run)
    )
    assert all(torch.equal(g, w) for g, w in zip(got, want))
