"""MoE ops against the same steps in PyTorch's own index operations: at sizes of a CPU, and Kimi-K2's on a GPU.

Shapes: "tiny" is the model that trains on a laptop; "k2" has Kimi-K2's 384 experts, top-8, with narrow rows.
"""

import functools
import types
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from k2kernels.functional.moe_mlp import moe_mlp
from k2kernels.ops.fp8_gemm import grouped_fp8_gemm, grouped_fp8_gemm_swiglu
from k2kernels.ops.grouped_gemm import grouped_gemm
from k2kernels.ops.moe import moe_combine, moe_dispatch, moe_route
from k2kernels.ops.quant import quantize_128x128, swiglu
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
    """Rows sorted by expert, and their order."""
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


class Rank(NamedTuple):
    """The experts of one of eight ranks that share Kimi-K2's; each token takes `top_k` of them."""

    experts: int = KIMI_K2.experts // 8
    top_k: int = KIMI_K2.top_k
    hidden: int = KIMI_K2.hidden
    intermediate: int = KIMI_K2.expert_intermediate

    def hit(self, tokens: int) -> int:
        """The expected number of experts with rows under uniform routing."""
        return round(self.experts * (1 - (1 - self.top_k / self.experts) ** tokens))


RANK = Rank()
LAYER_TOKENS = (1, 16, 128, 1024, 8192)
INPUTS = "x logits gate_up down routing dispatched data pre inner inner_scales y".split()  # of the stages
STAGES = {  # SwiGLU is part of the first FP8 product
    "bf16": ("route", "dispatch", "gate_up", "swiglu", "down", "combine"),
    "fp8": ("route", "dispatch", "gate_up", "down", "combine"),
}


@functools.cache
def expert_weights(rank: Rank, kind: str, device: torch.device) -> tuple:
    """gate_up and down, pairs where `kind` is "fp8"; one copy for all cases, larger than any cache."""
    gate_up = torch.empty(rank.experts, 2 * rank.intermediate, rank.hidden, device=device, dtype=torch.bfloat16)
    down = torch.empty(rank.experts, rank.hidden, rank.intermediate, device=device, dtype=torch.bfloat16)
    weights = gate_up.normal_(std=rank.hidden**-0.5), down.normal_(std=rank.intermediate**-0.5)
    return tuple(map(quantize_128x128, weights)) if kind == "fp8" else weights


def grouped_mm(rows, weights, ends):
    """PyTorch's grouped GEMM: CUTLASS on Hopper."""
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return function(rows, weights.mT, offs=ends)


def torch_layer(top_k: int):
    """Index operations and `grouped_mm`."""

    def run(x, logits, gate_up, down):
        indices, weights = torch_route(logits, 0, top_k)
        expert, order = indices.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(len(gate_up), device=x.device), right=True).int()
        gate, up = grouped_mm(x[order // top_k], gate_up, ends).chunk(2, dim=-1)
        y = grouped_mm(F.silu(gate) * up, down, ends)
        return torch_unpermute(y, order, weights).to(x.dtype)

    return run


def transformers_layer(top_k: int):
    """The experts of Hugging Face transformers after PyTorch's router; None without the package."""
    try:
        from transformers.integrations.moe import grouped_mm_experts_forward
    except ImportError:
        return None

    def gated(rows):
        gate, up = rows.chunk(2, dim=-1)
        return F.silu(gate) * up

    def run(x, logits, gate_up, down):
        module = types.SimpleNamespace(
            num_experts=len(gate_up), gate_up_proj=gate_up, down_proj=down, _apply_gate=gated, has_gate=True,
            has_bias=False, is_transposed=False, has_post_expert_norm=False, _is_expert_parallel=False,
        )  # fmt: skip
        return grouped_mm_experts_forward(module, x, *torch_route(logits, 0, top_k))

    return run


def layer_case(tokens: int, kind: str, rank: Rank = RANK) -> Case:
    """Router to combine, without the router's product."""

    def make(device):
        x = torch.randn(tokens, rank.hidden, device=device).bfloat16()
        return x, torch.randn(tokens, rank.experts, device=device), *expert_weights(rank, kind, device)

    def ours(x, logits, gate_up, down):
        return moe_mlp(x, moe_route(logits, top_k=rank.top_k, scale=SCALE), gate_up, down)

    bodies = {"k2kernels": ours}
    if kind == "bf16":
        bodies["torch"] = torch_layer(rank.top_k)
        if (peer := transformers_layer(rank.top_k)) is not None:
            bodies["transformers"] = peer
    weights = 3 * rank.hidden * rank.intermediate
    return Case(
        "moe_layer",
        f"{tokens} tokens {kind}",
        rank.hit(tokens) * _bytes(weights, kind) + 4 * tokens * rank.hidden + 4 * tokens * rank.experts,
        make,
        bodies,
        flops=2 * tokens * rank.top_k * weights,
        dtype=kind,
    )


def _bytes(weights: int, kind: str) -> int:
    return 2 * weights if kind == "bf16" else weights + 4 * weights // 128**2


def stage_cases(tokens: int, kind: str, rank: Rank = RANK) -> list[Case]:
    """The steps of the layer, one by one."""
    slots, hidden, wide = tokens * rank.top_k, rank.hidden, rank.intermediate
    fp8 = kind == "fp8"
    activation = 1 + 4 / 128 if fp8 else 2  # bytes
    product = 2 * slots * hidden * wide
    weights, hit = hidden * wide, rank.hit(tokens)
    result = wide * activation if fp8 else 4 * wide  # of the first product, bytes a row

    def make(device):
        x, logits = (
            torch.randn(tokens, hidden, device=device).bfloat16(),
            torch.randn(tokens, rank.experts, device=device),
        )
        gate_up, down = expert_weights(rank, kind, device)
        routing = moe_route(logits, top_k=rank.top_k, scale=SCALE)
        dispatched = dispatch(x, routing)
        pre = first(dispatched, gate_up)
        inner, scales = pre if fp8 else (swiglu(pre), None)
        y = second(inner, scales, down, dispatched)
        return x, logits, gate_up, down, routing, dispatched, dispatched.data, pre, inner, scales, y

    def dispatch(x, routing):
        options = dict(quantize=True, scale_layout="column") if fp8 else {}
        return moe_dispatch(x, routing.indices, routing.weights, num_experts=rank.experts, **options)

    def first(d, weights):
        groups = dict(offsets=d.offsets, counts=d.counts)
        if fp8:
            return grouped_fp8_gemm_swiglu(d.data, d.scales, *weights, scale_layout="column", **groups)
        return grouped_gemm(d.data, weights, **groups)

    def second(inner, scales, weights, d):
        groups = dict(offsets=d.offsets, counts=d.counts)
        if fp8:
            return grouped_fp8_gemm(inner, scales, *weights, out_dtype=torch.bfloat16, **groups)
        return grouped_gemm(inner, weights, **groups)

    def of(function, *names):
        """A body that takes the whole set of inputs."""

        def run(*args):
            return function(*(args[INPUTS.index(name)] for name in names))

        return run

    bodies = {
        "route": of(lambda logits: moe_route(logits, top_k=rank.top_k, scale=SCALE), "logits"),
        "dispatch": of(dispatch, "x", "routing"),
        "gate_up": of(first, "dispatched", "gate_up"),
        "swiglu": of(swiglu, "pre"),
        "down": of(second, "inner", "inner_scales", "down", "dispatched"),
        "combine": of(lambda y, d: moe_combine(y, d.handle), "y", "dispatched"),
    }
    sizes = {  # bytes, FLOPs
        "route": (tokens * (4 * rank.experts + 8 * rank.top_k), 0),
        "dispatch": (2 * tokens * hidden + slots * hidden * activation, 0),
        "gate_up": (hit * _bytes(2 * weights, kind) + slots * (hidden * activation + result), 2 * product),
        "swiglu": (slots * wide * 6, 0),
        "down": (hit * _bytes(weights, kind) + slots * (wide * activation + 2 * hidden), product),
        "combine": (2 * tokens * hidden * (rank.top_k + 1), 0),
    }
    peers = {stage: {} for stage in STAGES[kind]}
    if not fp8:
        for stage, rows in (("gate_up", "data"), ("down", "inner")):
            peers[stage]["torch"] = of(lambda rows, w, d: grouped_mm(rows, w, d.offsets[1:]), rows, stage, "dispatched")
    return [
        Case(
            "moe_stage",
            f"{tokens} tokens {kind} {stage}",
            int(sizes[stage][0]),
            make,
            {"k2kernels": bodies[stage], **peers[stage]},
            flops=sizes[stage][1],
            dtype=kind,
        )
        for stage in STAGES[kind]
    ]


def gpu_cases() -> list[Case]:
    """Kimi-K2's router, dispatch and combine: one token, a decoding step, two prefills; routing is uniform. Then one of
    eight ranks' whole layer, and its stages."""
    cases = [case for tokens in TOKENS for case in (route_case(tokens), *dispatch_cases(tokens), combine_case(tokens))]
    for kind in ("bf16", "fp8"):
        for tokens in LAYER_TOKENS:
            cases += [layer_case(tokens, kind), *stage_cases(tokens, kind)]
    return cases
