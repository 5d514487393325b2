"""MoE ops against the same steps in PyTorch's own index operations, at sizes of a CPU.

Shapes: "tiny" is the model that trains on a laptop; "k2" has Kimi-K2's 384 experts, top-8, with narrow rows.
"""

import pytest
import torch
import torch.nn.functional as F

from k2kernels.ops.moe import moe_combine, moe_dispatch, moe_mlp, moe_route

SHAPES = {  # T, E, K, H, I
    "tiny": (2048, 8, 2, 64, 128),
    "k2": (512, 384, 8, 256, 64),
}


@pytest.fixture(params=SHAPES)
def layer(request):
    tokens, experts, top_k, hidden, intermediate = SHAPES[request.param]
    torch.manual_seed(0)
    logits, bias = torch.randn(tokens, experts), torch.randn(experts) * 0.01
    return {
        "x": torch.randn(tokens, hidden),
        "logits": logits,
        "bias": bias,
        "top_k": top_k,
        "routing": moe_route(logits, bias, top_k=top_k, scale=2.827),
        "gate_up": torch.randn(experts, 2 * intermediate, hidden) * hidden**-0.5,
        "down": torch.randn(experts, hidden, intermediate) * intermediate**-0.5,
    }


def torch_route(logits, bias, top_k):
    scores = logits.sigmoid()
    indices = (scores + bias).topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, indices)
    return indices, weights / weights.sum(-1, keepdim=True) * 2.827


def torch_permute(x, indices):
    """Rows by expert, and where they came from."""
    order = indices.flatten().argsort(stable=True)
    return x[order // indices.shape[1]], order


def torch_unpermute(y, order, weights):
    tokens, top_k = weights.shape
    rows = torch.empty_like(y).index_copy_(0, order, y)
    return (rows.view(tokens, top_k, -1) * weights[..., None]).sum(1)


def torch_mlp(x, indices, weights, gate_up, down):
    out = torch.zeros_like(x)
    for expert, (w_up, w_down) in enumerate(zip(gate_up.unbind(), down.unbind())):
        token, k = torch.where(indices == expert)
        if token.numel():
            gate, up = (x[token] @ w_up.T).chunk(2, dim=-1)
            rows = (F.silu(gate) * up) @ w_down.T
            out = out.index_add(0, token, rows * weights[token, k, None])
    return out


def forward_backward(function, *args):
    leaves = [a.detach().requires_grad_(a.is_floating_point()) for a in args]

    def run():
        for leaf in leaves:
            leaf.grad = None
        function(*leaves).sum().backward()

    return run


@pytest.mark.benchmark(group="moe_route")
@pytest.mark.parametrize("who", ["k2kernels", "torch"])
def test_route(benchmark, layer, who):
    logits, bias, top_k = layer["logits"], layer["bias"], layer["top_k"]
    if who == "k2kernels":
        benchmark(lambda: moe_route(logits, bias, top_k=top_k, scale=2.827))
    else:
        benchmark(lambda: torch_route(logits, bias, top_k))


@pytest.mark.benchmark(group="moe_dispatch + moe_combine")
@pytest.mark.parametrize("who", ["k2kernels", "torch"])
def test_dispatch_combine(benchmark, layer, who):
    x, (indices, weights, counts) = layer["x"], layer["routing"]

    def ours():
        dispatched = moe_dispatch(x, indices, weights, num_experts=len(counts))
        return moe_combine(dispatched.data, dispatched.handle)

    benchmark(ours if who == "k2kernels" else lambda: torch_unpermute(*torch_permute(x, indices), weights))


@pytest.mark.benchmark(group="moe_mlp")
@pytest.mark.parametrize("who", ["k2kernels", "torch"])
def test_mlp(benchmark, layer, who):
    x, routing, gate_up, down = (layer[name] for name in ("x", "routing", "gate_up", "down"))
    if who == "k2kernels":
        benchmark(lambda: moe_mlp(x, routing, gate_up, down))
    else:
        benchmark(lambda: torch_mlp(x, routing.indices, routing.weights, gate_up, down))


@pytest.mark.benchmark(group="moe_mlp with backward")
@pytest.mark.parametrize("who", ["k2kernels", "torch"])
def test_mlp_backward(benchmark, layer, who):
    x, routing, gate_up, down = (layer[name] for name in ("x", "routing", "gate_up", "down"))

    def ours(x, weights, gate_up, down):
        return moe_mlp(x, routing._replace(weights=weights), gate_up, down)

    def peer(x, weights, gate_up, down):
        return torch_mlp(x, routing.indices, weights, gate_up, down)

    benchmark(forward_backward(ours if who == "k2kernels" else peer, x, routing.weights, gate_up, down))
