"""A whole layer of experts by kernels in the emulator, from the router to combine, and its gradients."""

from collections import Counter

import pytest
import torch

import k2kernels
from k2kernels import _backend
from k2kernels.functional.moe_mlp import expert_alignment, moe_mlp
from k2kernels.ops.moe import moe_route
from k2kernels.testing.compare import check_close

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SCHEDULES = [("sm_80", 0), ("sm_90a", 1), ("sm_80", 2), ("sm_90a", 3)]

in_all_schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s[0]}-{s[1]}")


def launches(function):
    """The result, and how many kernels of each op were launched."""
    before = Counter(_backend._launches)
    return function(), Counter(_backend._launches) - before


def make(tokens, experts, hidden, intermediate, dtype):
    x, shared = torch.randn(2, tokens, hidden).to(dtype)
    gate_up = (torch.randn(experts, 2 * intermediate, hidden) * hidden**-0.5).to(dtype)
    down = (torch.randn(experts, hidden, intermediate) * intermediate**-0.5).to(dtype)
    return x, torch.randn(tokens, experts), gate_up, down, shared


def layer(options):
    def run(x, logits, gate_up, down, shared):
        routing = moe_route(logits, top_k=3, scale=2.5)
        return moe_mlp(x, routing, gate_up, down, shared=shared, **options)

    return run


LAYERS = {  # tokens, experts, hidden, intermediate, options
    "decoding": (5, 16, 136, 72, {}),
    "many rows": (150, 4, 64, 32, {}),
    "aligned": (20, 8, 40, 24, dict(alignment=16)),
    "little room": (60, 4, 32, 16, dict(alignment=4, capacity=120)),
    "odd sizes": (9, 5, 37, 11, {}),
}


@in_all_schedules
@pytest.mark.parametrize("case", LAYERS)
def test_layer_and_gradients(case, schedule):
    """Within twice the error of PyTorch's steps in the same precision, all from the same experts."""
    *sizes, options = LAYERS[case]
    dtype = F16 if schedule[1] == 1 else BF16
    inputs = [t.requires_grad_() for t in make(*sizes, dtype)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    grad = torch.randn(sizes[0], sizes[2])

    def run(leaves):
        out = layer(options)(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    with k2kernels.emulated(schedule[0], seed=schedule[1]):
        got, launched = launches(lambda: run(inputs))
    once = ("moe_route", "moe_dispatch", "moe_combine_backward", "moe_route_backward", "swiglu", "swiglu_backward")
    assert all(launched[op] == 1 for op in once), launched
    assert launched["moe_combine"] == 2  # itself, and the gradient of dispatch
    assert launched["grouped_gemm"] == launched["grouped_gemm_dgrad"] == launched["grouped_gemm_wgrad"] == 2
    for g, w, p in zip(got, run(exact_inputs), run(inputs)):
        check_close(g, w, same_precision=p)


@in_all_schedules
@pytest.mark.parametrize("tokens", [6, 200])
def test_layer_of_fp8_experts(tokens, schedule):
    x, logits, gate_up, down, shared = make(tokens, 8, 256, 128, BF16)
    weights = k2kernels.quantize_128x128(gate_up), k2kernels.quantize_128x128(down)
    want = layer({})(x, logits, *weights, shared)
    with k2kernels.emulated(schedule[0], seed=schedule[1]):
        got, launched = launches(lambda: layer({})(x, logits, *weights, shared))
    assert launched["moe_dispatch_quantize"] == launched["moe_combine"] == 1
    # The same codes but for what one rounding of an activation to bfloat16 changes.
    exact = [k2kernels.dequantize(*w, block=(128, 128), dtype=F64) for w in weights]
    routing = moe_route(logits.double(), top_k=3, scale=2.5)
    plain = moe_mlp(x.double(), routing, *exact, shared=shared.double())
    error = (want.double() - plain).norm()
    assert (got.double() - want.double()).norm() < 0.1 * error and (got.double() - plain).norm() < 1.05 * error


def test_a_token_does_not_depend_on_its_batch():
    x, logits, gate_up, down, shared = make(100, 4, 64, 48, BF16)
    with k2kernels.emulated(seed=3):
        together = layer({})(x, logits, gate_up, down, shared)
        for some in ([0], [99], list(range(40, 55))):
            alone = layer({})(x[some], logits[some], gate_up, down, shared[some])
            assert torch.equal(alone, together[some])


def test_alignment():
    """Wherever experts begin the layer is the same to the bit; padding costs rows of memory."""
    x, logits, gate_up, down, shared = make(30, 8, 64, 48, BF16)
    with k2kernels.emulated():
        want = layer({})(x, logits, gate_up, down, shared)
        for alignment in (expert_alignment(False), 4, 16):
            assert torch.equal(layer(dict(alignment=alignment))(x, logits, gate_up, down, shared), want)
    assert expert_alignment(fp8=False) == 1
    assert expert_alignment(fp8=True) == 128  # as grouped_fp8_wgrad takes it
