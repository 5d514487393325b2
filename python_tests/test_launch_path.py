"""What the host does between the public function and the kernel: counted, because time depends on the machine."""

import gc
import sys

import pytest
import torch

import k2kernels as k
from k2kernels.ops.grouped_gemm import multiply
from k2kernels.ops.newton_schulz import muon_update
from k2kernels.testing.stand_in import no_kernels

X = torch.randn(1, 256).bfloat16()
DATA, SCALES = k.quantize_1x128(X)
FP8 = k.quantize_128x128(torch.randn(256, 256))
FP8_EXPERT, TURNED = [x[None] for x in FP8], k.quantize_1x128(torch.randn(16, 256), transpose=True)
GRAD = torch.randn(1, 128).bfloat16()
WEIGHT = torch.ones(256).bfloat16()
Q = torch.randn(1, 1, 8, 576).bfloat16()
ROW, CACHE = torch.randn(1, 576).bfloat16(), torch.zeros(2, 64, 576).bfloat16()
TABLE, ONE = torch.tensor([[0, 1]], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
ENDS = torch.tensor([0, 1], dtype=torch.int32)
INDICES, WEIGHTS, LOGITS = torch.tensor([[0, 3]], dtype=torch.int32), torch.ones(1, 2), torch.randn(1, 8)
BIAS = torch.zeros(8)
MATRIX, STEP = torch.randn(24, 40), [[torch.randn(1, 24, 40)] for _ in range(3)]
SLOTS = k.moe_dispatch(X, INDICES, WEIGHTS, num_experts=8)
EXPERTS, PLACES = torch.randn(8, 128, 256).bfloat16(), (SLOTS.offsets, SLOTS.counts)
COUNTS = torch.ones(8, dtype=torch.int64)
PACKED = k.pack_w4(*k.quantize_int4_group32(EXPERTS / 8))
PREFILL_Q, PREFILL_KV, ROPE_KEY = (
    torch.randn(1, 2, 192).bfloat16(),
    torch.randn(1, 2, 256).bfloat16(),
    ROW[:, :64].clone(),
)
OF_VALUES, OF_ROWS, CU = PREFILL_Q[..., :128].clone(), torch.zeros(1, 2), torch.tensor([0, 1], dtype=torch.int32)


def dispatched():
    data, _, _, _, handle = k.moe_dispatch(X, INDICES, WEIGHTS, num_experts=8)
    return data, *handle[:4], handle.overflow


# op -> a call, the Python functions that it may enter, and the ops of PyTorch that it may call beside allocations
CALLS = {
    "quantize_1x128": (lambda: k.quantize_1x128(X), 29, set()),
    "dequantize": (lambda: k.dequantize(DATA, SCALES), 26, {"aten::reshape", "aten::view"}),
    "swiglu": (lambda: k.swiglu(X), 24, set()),
    "swiglu_quantize": (lambda: k.swiglu_quantize(X), 30, set()),
    "rms_norm_quantize": (lambda: k.rms_norm_quantize(X, WEIGHT, eps=1e-6), 31, set()),
    "swiglu_backward": (lambda: torch.ops.k2kernels.swiglu_backward(GRAD, X), 19, set()),
    "mla_append": (lambda: k.mla_append(ROW, CACHE, TABLE, ONE), 37, set()),
    "mla_decode": (lambda: k.mla_decode(Q, CACHE, TABLE, ONE, softmax_scale=0.1), 47, set()),
    "mla_gather": (lambda: k.mla_gather(CACHE, TABLE, ONE), 32, set()),
    "mla_prefill": (
        lambda: k.mla_prefill(
            PREFILL_Q, PREFILL_KV, None, k_rope=ROPE_KEY, cu_seqlens_q=CU, cu_seqlens_k=CU, softmax_scale=0.1
        ),
        60,
        {"aten::new_zeros", "aten::zero_", "aten::fill_"},
    ),
    "mla_prefill_backward": (
        lambda: torch.ops.k2kernels.mla_prefill_backward(
            OF_VALUES, OF_ROWS, PREFILL_Q, PREFILL_KV, None, ROPE_KEY, OF_VALUES, OF_ROWS, CU, CU, 0.1, True
        ),
        60,
        {"aten::new_zeros", "aten::zero_", "aten::fill_"},
    ),
    "moe_route": (lambda: k.moe_route(LOGITS, BIAS, top_k=2), 39, set()),
    "moe_dispatch": (dispatched, 39, set()),
    "newton_schulz": (lambda: k.newton_schulz(MATRIX), 39, set()),
    "newton_schulz_grouped": (lambda: k.newton_schulz_grouped([MATRIX]), 42, set()),
    "muon_update": (lambda: muon_update(*STEP, lr=0.1), 58, set()),
    "fp8_gemm": (lambda: k.fp8_gemm(DATA, SCALES, *FP8), 50, set()),
    "grouped_fp8_gemm": (lambda: k.grouped_fp8_gemm(DATA, SCALES, *FP8_EXPERT, offsets=ENDS), 56, set()),
    "fp8_gemm_swiglu": (lambda: k.fp8_gemm_swiglu(DATA, SCALES, *FP8), 58, set()),
    "grouped_fp8_wgrad": (lambda: k.grouped_fp8_wgrad(*TURNED, *TURNED, offsets=ENDS, counts=ONE), 48, set()),
    "moe_combine": (lambda: k.moe_combine(SLOTS.data, SLOTS.handle, shared=X), 37, set()),
    "moe_update_bias": (lambda: k.moe_update_bias(BIAS, COUNTS, rate=1e-3), 26, set()),
    "grouped_gemm": (lambda: multiply(SLOTS.data, EXPERTS, *PLACES, None), 27, set()),
    "grouped_gemm_wgrad": (lambda: torch.ops.k2kernels.grouped_gemm_wgrad(SLOTS.data, SLOTS.data, *PLACES), 25, set()),
    "grouped_w4_gemm": (lambda: k.grouped_w4_gemm(SLOTS.data, PACKED, offsets=PLACES[0], counts=PLACES[1]), 52, set()),
    "moe_sequence_loss": (
        lambda: k.moe_sequence_loss(LOGITS, INDICES, top_k=2, alpha=0.1),
        33,
        {"aten::new_zeros", "aten::zero_", "aten::fill_"},
    ),
}


# Memory besides results: tickets, unused largest logits, counters and sums of the loss, workspaces.
WORKSPACES = {
    "mla_prefill": 1,
    "mla_prefill_backward": 2,
    "mla_decode": 1,
    "moe_sequence_loss": 2,
    "newton_schulz": 1,
    "newton_schulz_grouped": 1,
    "muon_update": 1,
}


def entered(call):
    """The names of the Python functions that a call enters."""
    names = []
    gc.collect()
    gc.disable()  # what it frees calls functions, too
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return names


@pytest.mark.parametrize("op", CALLS)
def test_a_call_enters_few_functions(op):
    call, most, _ = CALLS[op]
    with no_kernels():
        call()  # the first looks for the module
        before = k.launch_count(op)
        names = entered(call)
    assert k.launch_count(op) == before + 1
    assert len(names) <= most, names


@pytest.mark.parametrize("op", CALLS)
def test_a_call_asks_pytorch_for_its_results_alone(op):
    """No copy, no view: each takes as long as the launch. And a profiler shows the op by its name."""
    call, _, besides = CALLS[op]
    torch.use_deterministic_algorithms(False)  # under which new memory is poisoned: a fill for each result
    with no_kernels(), torch.profiler.profile() as profile:
        results = call()
    names = [event.name for event in profile.events()]
    assert names.count(f"k2kernels::{op}") == 1
    assert set(names) <= {f"k2kernels::{op}", "aten::new_empty", "aten::empty"} | besides, names
    tensors = 0 if results is None else len(results) if isinstance(results, tuple) else 1
    assert names.count("aten::empty") == tensors + WORKSPACES.get(op, 0)
