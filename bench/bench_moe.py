"""MoE ops against the same steps in PyTorch's own index operations: at sizes of a CPU, and Kimi-K2's on a GPU.

Shapes: "tiny" is the model that trains on a laptop; "k2" has Kimi-K2's 384 experts, top-8, with narrow rows.
"""

import pytest
import torch
import torch.nn.functional as F

from k2kernels.ops.moe import moe_combine, moe_dispatch, moe_mlp, moe_route
from k2kernels.testing.bench import Case
from k2kernels.testing.inputs import KIMI_K2

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


# On a GPU

SCALE = 2.827  # of Kimi-K2's routing weights
TOKENS = (1, 128, 4096, 8192)


def random_routing(tokens, device):
    """Uniform: indices int32 [T, K] and weights [T, K]."""
    indices = torch.rand(tokens, KIMI_K2.experts, device=device).topk(KIMI_K2.top_k).indices.int()
    return indices, torch.rand(tokens, KIMI_K2.top_k, device=device)


def route_case(tokens):
    experts, top_k = KIMI_K2.experts, KIMI_K2.top_k

    def make(device):
        return torch.randn(tokens, experts, device=device), torch.randn(experts, device=device) * 0.01

    def peer(logits, bias):
        return torch_route(logits, bias, top_k)

    return Case(
        "moe_route",
        f"{tokens} tokens",
        tokens * (4 * experts + 8 * top_k) + 12 * experts,  # logits, indices and weights; bias and counts
        make,
        {
            "k2kernels": lambda logits, bias: moe_route(logits, bias, top_k=top_k, scale=SCALE),
            "torch": peer,
            "torch.compile": torch.compile(peer, dynamic=False),
        },
    )


def dispatch_cases(tokens):
    experts, top_k, hidden = KIMI_K2.experts, KIMI_K2.top_k, KIMI_K2.hidden

    def make(device):
        return torch.randn(tokens, hidden, device=device).bfloat16(), *random_routing(tokens, device)

    def ours(alignment, **options):
        return lambda *args: moe_dispatch(*args, num_experts=experts, alignment=alignment, **options)

    def permute(x, indices, weights):
        return torch_permute(x, indices)

    def quantize_then_permute(x, indices, weights):
        blocks = x.float().unflatten(-1, (-1, 128))
        scales = (blocks.abs().amax(-1) / 448).clamp(min=1e-10)
        codes = (blocks / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2)
        order = indices.flatten().argsort(stable=True)
        token = order // top_k
        return codes.view(torch.uint8)[token], scales[token], order

    plan = 4 * (3 * tokens * top_k + 2 * experts)  # indices, both directions of slots; offsets and counts
    return [
        Case(
            "moe_dispatch",
            f"{tokens} tokens bf16",
            2 * tokens * hidden * (1 + top_k) + plan,
            make,
            {"k2kernels": ours(1), "torch": permute, "torch.compile": torch.compile(permute, dynamic=False)},
        ),
        Case(
            "moe_dispatch",
            f"{tokens} tokens fp8",
            2 * tokens * hidden + tokens * top_k * (hidden + 4 * hidden // 128) + plan,
            make,
            {
                "k2kernels": ours(128, quantize=True),
                "k2kernels column": ours(128, quantize=True, scale_layout="column"),
                "torch": quantize_then_permute,
                "torch.compile": torch.compile(quantize_then_permute, dynamic=False),
            },
        ),
    ]


def combine_case(tokens):
    experts, top_k, hidden = KIMI_K2.experts, KIMI_K2.top_k, KIMI_K2.hidden

    def make(device):
        indices, weights = random_routing(tokens, device)
        handle = moe_dispatch(torch.zeros(tokens, 1, device=device), indices, weights, num_experts=experts).handle
        y = torch.randn(tokens * top_k, hidden, device=device).bfloat16()
        return y, torch.randn(tokens, hidden, device=device).bfloat16(), handle

    def peer(y, shared, handle):
        rows = y[handle.slot_of.flatten()].view(tokens, top_k, hidden)
        return (torch.einsum("tkh,tk->th", rows.float(), handle.weights) + shared.float()).bfloat16()

    return Case(
        "moe_combine",
        f"{tokens} tokens",
        2 * tokens * hidden * (top_k + 2) + 8 * tokens * top_k,  # rows, shared and out; slots and weights
        make,
        {
            "k2kernels": lambda y, shared, handle: moe_combine(y, handle, shared=shared),
            "torch": peer,
            "torch.compile": torch.compile(peer, dynamic=False),
        },
    )


def gpu_cases() -> list[Case]:
    """Kimi-K2's router, dispatch and combine: one token, a decoding step, two prefills; routing is uniform."""
    return [case for tokens in TOKENS for case in (route_case(tokens), *dispatch_cases(tokens), combine_case(tokens))]
