"""`moe_mlp` against dense experts, in plain PyTorch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from k2kernels.functional.moe_mlp import moe_mlp
from k2kernels.ops.moe import (
    Routing,
    moe_route,
    moe_sequence_loss,
)
from k2kernels.ops.quant import dequantize, quantize_1x128, quantize_128x128
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import expert_indices

F64 = torch.float64
TOKENS = [0, 1, 2, 7, 127, 128, 129]
FAMILY = [(8, 2, 4, 2), (64, 6, 8, 3), (256, 8, 8, 4), (384, 8, 1, 1), (896, 16, 1, 1)]  # E, K, n_group, topk_group


def dense_mlp(x, indices, weights, gate_up, down):
    """Every expert on every token, then a weighted sum."""
    one_hot = F.one_hot(indices.long() + 1, gate_up.shape[0] + 1)[..., 1:].to(x.dtype)  # [T, K, E]
    expert_weights = (weights[..., None] * one_hot).sum(1)
    gate, up = torch.einsum("th,eih->tei", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("tei,ehi,te->th", F.silu(gate) * up, down, expert_weights)


def make_mlp(tokens, experts, hidden, intermediate, dtype=F64):
    x = torch.randn(tokens, hidden, dtype=dtype)
    gate_up = torch.randn(experts, 2 * intermediate, hidden, dtype=dtype) * hidden**-0.5
    down = torch.randn(experts, hidden, intermediate, dtype=dtype) * intermediate**-0.5
    return x, gate_up, down


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("family", [(8, 2), (64, 6), (384, 8)])
def test_mlp_equals_dense_experts_with_gradients(family, tokens):
    experts, top_k = family
    x, gate_up, down = make_mlp(tokens, experts, 16, 8)
    logits, bias = torch.randn(tokens, experts, dtype=F64), torch.randn(experts) * 0.1
    shared, residual = torch.randn(2, tokens, 16, dtype=F64)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, logits, shared, residual)]
    routing = moe_route(logits, bias, top_k=top_k, scale=2.827)
    got = moe_mlp(x, routing, gate_up, down, shared=shared, residual=residual, alignment=4)

    taken = logits.sigmoid().gather(1, routing.indices.long())
    weights = taken / taken.sum(-1, keepdim=True) * 2.827
    want = dense_mlp(x, routing.indices, weights, gate_up, down) + shared + residual
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(want)
    got_grads = torch.autograd.grad(got, leaves, grad)
    want_grads = torch.autograd.grad(want, leaves, grad)
    for g, w in zip(got_grads, want_grads):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)
    if tokens > 1:
        assert got_grads[3].abs().max() > 1e-6  # the router learns


@pytest.mark.parametrize("skew", ["one hot expert", "some dropped", "all dropped"])
def test_mlp_of_skewed_routing(skew):
    x, gate_up, down = make_mlp(33, 8, 16, 8)
    indices, weights = expert_indices(skew, 33, 2, 8).int(), torch.rand(33, 2, dtype=F64)
    got = moe_mlp(x, Routing(indices, weights, None), gate_up, down)
    torch.testing.assert_close(got, dense_mlp(x, indices, weights, gate_up, down), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp_precision(dtype):
    x, gate_up, down = make_mlp(64, 8, 64, 32, dtype)
    routing = moe_route(torch.randn(64, 8), top_k=2)
    got = moe_mlp(x, routing, gate_up, down)
    assert got.dtype == dtype
    exact = dense_mlp(*(t.double() for t in (x, routing.indices, routing.weights, gate_up, down)))
    plain = dense_mlp(x, routing.indices, routing.weights.to(dtype), gate_up, down)
    check_close(got, exact, same_precision=plain, max_cos_diff=1e-4)


def test_mlp_gradcheck():
    x, gate_up, down = make_mlp(5, 4, 3, 2)
    indices, weights = expert_indices("some dropped", 5, 2, 4).int(), torch.rand(5, 2, dtype=F64)
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]

    def layer(x, weights, gate_up, down):
        return moe_mlp(x, Routing(indices, weights, None), gate_up, down, residual=x, alignment=2)

    assert torch.autograd.gradcheck(layer, leaves)


def test_mlp_recomputed_or_repeated_is_bitwise_the_same():
    x, gate_up, down = make_mlp(100, 8, 32, 16, torch.float32)
    logits = torch.randn(100, 8)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, logits)]

    def layer(x, gate_up, down, logits):
        return moe_mlp(x, moe_route(logits, top_k=2), gate_up, down)

    results = []
    for run in (layer, layer, lambda *a: checkpoint(layer, *a, use_reentrant=False)):
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_mlp_refuses_a_second_backward():
    x, gate_up, down = make_mlp(4, 4, 4, 4)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(moe_mlp(x, moe_route(x, top_k=2), gate_up, down).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="this op has no backward"):
        grad.sum().backward()


def test_mlp_bad_arguments():
    x, gate_up, down = make_mlp(4, 4, 6, 3)
    routing = moe_route(torch.randn(4, 4), top_k=2)
    with pytest.raises(TypeError, match=r"moe_mlp: gate_up must be \[E, 2I, H=6\] float64, got .* float32"):
        moe_mlp(x, routing, gate_up.float(), down)
    with pytest.raises(ValueError, match=r"moe_mlp: down must be \[E=4, H=6, I=3\] float64, got \[4, 3, 6\] float64"):
        moe_mlp(x, routing, gate_up, down.mT)
    with pytest.raises(ValueError, match=r"moe_mlp: gate_up must be even in its middle axis, got \[4, 5, 6\]"):
        moe_mlp(x, routing, gate_up[:, :5], down)


def make_fp8_mlp(tokens, experts, hidden, intermediate, dtype):
    x, gate_up, down = make_mlp(tokens, experts, hidden, intermediate, torch.float32)
    return x.to(dtype), quantize_128x128(gate_up), quantize_128x128(down)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("alignment", [1, 16])
def test_fp8_mlp_of_the_quantised_operands(power_of_two, alignment):
    tokens, experts, top_k = 21, 4, 2
    x, gate_up, down = make_fp8_mlp(tokens, experts, 192, 96, torch.float32)
    indices, weights = expert_indices("some dropped", tokens, top_k, experts).int(), torch.rand(tokens, top_k)
    routing = Routing(indices, weights, None)
    shared = torch.randn(tokens, 192)
    got = moe_mlp(x, routing, gate_up, down, shared=shared, power_of_two=power_of_two, alignment=alignment)

    def rounded(t):  # to what the codes and scales hold
        return dequantize(*quantize_1x128(t.float(), power_of_two=power_of_two), dtype=F64)

    w_up, w_down = (dequantize(*w, block=(128, 128), dtype=F64) for w in (gate_up, down))
    want = shared.double()
    for t, k in itertools.product(range(tokens), range(top_k)):
        if (e := indices[t, k]) >= 0:
            gate, up = (rounded(x[t : t + 1]) @ w_up[e].T).chunk(2, dim=-1)
            want[t] += weights[t, k] * (rounded(F.silu(gate) * up) @ w_down[e].T)[0]
    check_close(got, want, budget=2e-5)


def test_fp8_mlp_is_near_the_unquantised_one():
    x, gate_up, down = make_fp8_mlp(64, 8, 256, 128, torch.bfloat16)
    routing = moe_route(torch.randn(64, 8), top_k=2)
    got = moe_mlp(x, routing, gate_up, down)
    assert got.dtype == torch.bfloat16
    w_up, w_down = (dequantize(*w, block=(128, 128), dtype=F64) for w in (gate_up, down))
    want = dense_mlp(x.double(), routing.indices, routing.weights.double(), w_up, w_down)
    # Two quantisations of about 2.6e-2 relative error each.
    assert (got.double() - want).norm() / want.norm() < 0.05


def test_fp8_mlp_gradient_flows_to_the_routing_weights_only():
    x, gate_up, down = make_fp8_mlp(8, 4, 128, 64, torch.float32)
    logits = torch.randn(8, 4, requires_grad=True)
    moe_mlp(x, moe_route(logits, top_k=2), gate_up, down).square().sum().backward()
    assert logits.grad.abs().max() > 0
    with pytest.raises(RuntimeError, match="this op has no backward"):
        moe_mlp(x.requires_grad_(), moe_route(logits, top_k=2), gate_up, down).sum().backward()


def test_fp8_mlp_bad_arguments():
    x, gate_up, down = make_fp8_mlp(8, 4, 128, 192, torch.float32)
    routing = moe_route(torch.randn(8, 4), top_k=2)
    with pytest.raises(ValueError, match=r"moe_mlp: down must be a pair .fp8, scales. like gate_up, got Tensor"):
        moe_mlp(x, routing, gate_up, down[0])
    with pytest.raises(ValueError, match=r"moe_mlp: gate_up must be a pair .fp8, scales., got a tuple of 1"):
        moe_mlp(x, routing, gate_up[:1], down)
    with pytest.raises(ValueError, match=r"moe_mlp: the scales of down must be \[4, 1, 2\] float32, got \[4, 2, 1\]"):
        moe_mlp(x, routing, gate_up, (down[0], down[1].mT))
    with pytest.raises(TypeError, match=r"moe_mlp: x must be .*, got \[8, 128\] float64"):
        moe_mlp(x.double(), routing, gate_up, down)
    with pytest.raises(TypeError, match=r"moe_mlp: routing must be what moe_route returned, got Tensor"):
        moe_mlp(x, routing.indices, gate_up, down)


def test_mlp_compiles_with_its_backward_for_any_number_of_tokens():
    _, gate_up, down = make_mlp(0, 8, 16, 8)
    bias = torch.randn(8)
    leaves = [gate_up.requires_grad_(), down.requires_grad_()]

    def layer(x, logits):
        routing = moe_route(logits, bias, top_k=2)
        out = moe_mlp(x, routing, *leaves, alignment=4)
        return out.square().sum() + moe_sequence_loss(logits, routing.indices, top_k=2, alpha=0.1)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (7, 12, 33):
        x, logits = torch.randn(tokens, 16, dtype=F64, requires_grad=True), torch.randn(tokens, 8, dtype=F64)
        inputs = [x, logits.requires_grad_(), *leaves]
        want, got = layer(x, logits), compiled(x, logits)
        assert torch.equal(got, want)
        for g, w in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)):
            assert torch.equal(g, w)


def test_fp8_mlp_compiles():
    x, gate_up, down = make_fp8_mlp(9, 4, 128, 64, torch.bfloat16)
    routing = moe_route(torch.randn(9, 4), top_k=2)
    torch._dynamo.reset()
    compiled = torch.compile(moe_mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 5):
        inputs = x[:tokens], Routing(*(t[:tokens] for t in routing))
        assert torch.equal(compiled(*inputs, gate_up, down), moe_mlp(*inputs, gate_up, down))


def test_shapes_without_data():
    def layer(tokens, hidden, intermediate, experts, top_k):
        x = torch.empty(tokens, hidden, device="meta", dtype=torch.bfloat16, requires_grad=True)
        gate_up = torch.empty(experts, 2 * intermediate, hidden, device="meta", dtype=torch.bfloat16)
        down = torch.empty(experts, hidden, intermediate, device="meta", dtype=torch.bfloat16)
        logits = torch.empty(tokens, experts, device="meta", requires_grad=True)
        out = moe_mlp(x, moe_route(logits, top_k=top_k), gate_up, down, alignment=128)
        out.sum().backward()
        assert out.shape == x.grad.shape == (tokens, hidden) and out.dtype == x.grad.dtype == torch.bfloat16
        assert logits.grad.shape == (tokens, experts)

    layer(0, 16, 8, 8, 2)
    layer(2**20, 7168, 2048, 384, 8)  # more than 2**31 elements in every buffer
    with pytest.raises(ValueError, match=r"capacity must be below 2\*\*31 slots, got 21475"):
        layer(2**28, 16, 8, 384, 8)
