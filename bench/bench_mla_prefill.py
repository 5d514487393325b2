"""Attention of whole sequences, forward and backward: at sizes of a CPU in float32, and Kimi-K2's on a GPU.

FLOPs are those of the formula whatever a kernel executes: a visible pair of a head costs 2 (D + V) forward and
2 (3 D + 2 V) backward. Peers get keys with the rope part copied to all heads, which is not in their time; ours computes
max logits too.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from k2kernels.ops.mla_prefill import mla_prefill
from k2kernels.testing.bench import Case
from k2kernels.testing.inputs import KIMI_K2

NOPE, ROPE, VALUE = 128, KIMI_K2.rope, 128
DIM = NOPE + ROPE

SHAPES = {  # B, L, H, Dqk, Dv
    "tiny": (16, 128, 4, 48, 32),
    "k2, 8 of 64 heads": (1, 512, 8, 192, 128),
}


@pytest.fixture(params=SHAPES)
def inputs(request):
    batch, length, heads, dim, value_dim = SHAPES[request.param]
    torch.manual_seed(0)
    tokens = batch * length
    q, k, v = (torch.randn(tokens, heads, d, requires_grad=True) for d in (dim, dim, value_dim))
    return (q, k, v), torch.arange(0, tokens + 1, length, dtype=torch.int32), dim**-0.5


def ours(leaves, cu_seqlens, scale):
    return mla_prefill(*leaves, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, softmax_scale=scale).out


def torch_sdpa(leaves, cu_seqlens, scale):
    sequences = (x.unflatten(0, (len(cu_seqlens) - 1, -1)).transpose(1, 2) for x in leaves)
    out = F.scaled_dot_product_attention(*sequences, is_causal=True, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


WHO = {"k2kernels": ours, "torch sdpa": torch_sdpa}


@pytest.mark.benchmark(group="mla_prefill")
@pytest.mark.parametrize("who", WHO)
def test_forward(benchmark, inputs, who):
    with torch.no_grad():
        benchmark(WHO[who], *inputs)


@pytest.mark.benchmark(group="mla_prefill, forward and backward")
@pytest.mark.parametrize("who", WHO)
def test_forward_and_backward(benchmark, inputs, who):
    leaves = inputs[0]
    grad = torch.randn_like(WHO[who](*inputs))
    benchmark(lambda: torch.autograd.grad(WHO[who](*inputs), leaves, grad))


# On a GPU

# What a body makes in its first call with a set of inputs, by body and set: keys of all heads, a forward pass.
# Emptied when the next case makes its inputs.
KEPT: dict[tuple[str, int], tuple] = {}

BATCHES = {  # name -> lengths of queries, and of keys
    "1x8k": ([8192], [8192]),
    "1x2k": ([2048], [2048]),
    "1x4k": ([4096], [4096]),
    "1x16k": ([16384], [16384]),
    "1x32k": ([32768], [32768]),
    "4x2k": ([2048] * 4, [2048] * 4),
    "mixed": ([100, 3000, 500, 4000, 20, 572], [100, 3000, 500, 4000, 20, 572]),  # 8,192 tokens, packed
    "2k after 30k": ([2048], [32768]),
}
ALONE = ("1x32k", "2k after 30k")  # forward alone


def gpu_cases() -> list[Case]:
    """Causal batches of Kimi-K2's 64 heads, forward and backward; one of DeepSeek-V3's 128, cuDNN's published shape."""
    found = [
        case(name, 64, backward) for backward in (False, True) for name in BATCHES if not backward or name not in ALONE
    ]
    return [*found, case("1x8k", 128, False), case("1x8k", 128, True)]


def pairs(lengths_q: list[int], lengths_k: list[int]) -> int:
    """Visible pairs of a query and a key, causal, where no sequence has more queries than keys."""
    return sum(n * m - n * (n - 1) // 2 for n, m in zip(lengths_q, lengths_k))


def case(name: str, heads: int, backward: bool) -> Case:
    lengths_q, lengths_k = BATCHES[name]
    queries, keys, seen = sum(lengths_q), sum(lengths_k), pairs(lengths_q, lengths_k)
    row_q, row_k = heads * DIM, heads * (NOPE + VALUE) + ROPE  # elements of a token
    bytes_ = 2 * (queries * row_q + keys * row_k) + queries * heads * (2 * VALUE + 8)
    if backward:  # reads dO besides, writes dQ, dK and dV
        bytes_ += 2 * (queries * (heads * VALUE + row_q) + keys * row_k)
    flops = 2 * heads * seen * ((3 * DIM + 2 * VALUE) if backward else DIM + VALUE)

    def make(device: torch.device) -> tuple[Tensor, ...]:
        KEPT.clear()

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16)

        cu = [torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (lengths_q, lengths_k)]
        return normal(queries, heads, DIM), normal(keys, heads, NOPE + VALUE), normal(keys, ROPE), *cu

    bodies = backward_bodies(name) if backward else forward_bodies(name)
    op = "mla_prefill_backward" if backward else "mla_prefill"
    return Case(op, f"{name} h{heads}", bytes_, make, bodies, flops)


def forward(q: Tensor, kv: Tensor, k_rope: Tensor, cu_q: Tensor, cu_k: Tensor, max_logits: bool = True):
    return mla_prefill(
        q, kv, None, k_rope=k_rope, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, softmax_scale=KIMI_K2.softmax_scale,
        return_max_logits=max_logits,
    )  # fmt: skip


def forward_bodies(name: str) -> dict[str, Callable]:
    return {"k2kernels": forward, **{who: once_expanded(who, attend) for who, attend in peers(name).items()}}


def backward_bodies(name: str) -> dict[str, Callable]:
    found = {who: differentiated(who, attend) for who, attend in peers(name).items()}
    return {"k2kernels": backward, **found}


def backward(q: Tensor, kv: Tensor, k_rope: Tensor, cu_q: Tensor, cu_k: Tensor):
    """The op itself: what autograd adds is not in the time."""
    key = "k2kernels", id(q)
    if key not in KEPT:
        result = forward(q, kv, k_rope, cu_q, cu_k)
        grads = torch.randn_like(result.out), torch.zeros_like(result.lse)
        KEPT[key] = *grads, q, kv, None, k_rope, result.out, result.lse, cu_q, cu_k
    return torch.ops.k2kernels.mla_prefill_backward(*KEPT[key], KIMI_K2.softmax_scale, True)


def expanded(q: Tensor, kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v = kv.split([NOPE, VALUE], dim=-1)
    return q, torch.cat([k, k_rope[:, None].expand(-1, k.shape[1], -1)], dim=-1), v.contiguous()


def once_expanded(who: str, attend: Callable) -> Callable:
    def run(q, kv, k_rope, cu_q, cu_k):
        key = who, id(q)
        if key not in KEPT:
            KEPT[key] = expanded(q, kv, k_rope)
        return attend(*KEPT[key], cu_q, cu_k)

    return run


def differentiated(who: str, attend: Callable) -> Callable:
    def run(q, kv, k_rope, cu_q, cu_k):
        key = who, id(q)
        if key not in KEPT:
            leaves = [x.detach().requires_grad_() for x in expanded(q, kv, k_rope)]
            out = attend(*leaves, cu_q, cu_k)
            KEPT[key] = out, leaves, torch.randn_like(out)
        out, leaves, grad = KEPT[key]
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return run


def peers(name: str) -> dict[str, Callable]:
    """What this machine has for such a batch: name -> attend(q, k, v, cu_seqlens_q, cu_seqlens_k) -> out."""
    lengths_q, lengths_k = BATCHES[name]
    longest = dict(max_seqlen_q=max(lengths_q), max_seqlen_k=max(lengths_k))
    found: dict[str, Callable] = {}
    if lengths_q == lengths_k and len(set(lengths_q)) == 1:
        from torch.nn.attention import SDPBackend

        for who, backend in {"cuDNN": SDPBackend.CUDNN_ATTENTION, "torch sdpa": None}.items():
            found[who] = functools.partial(sdpa_by, backend)
    if importlib.util.find_spec("flash_attn_interface"):
        found["FlashAttention-3"] = functools.partial(flash_attention_3, longest)
    if importlib.util.find_spec("flash_attn"):
        found["FlashAttention-2, V padded"] = functools.partial(flash_attention_2, longest)
    if importlib.util.find_spec("flashinfer"):
        found["FlashInfer"] = flashinfer_ragged()
    return found


def sdpa_by(backend, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    from torch.nn.attention import sdpa_kernel

    if backend is None:
        return torch_sdpa((q, k, v), cu_q, KIMI_K2.softmax_scale)
    with sdpa_kernel(backend):
        return torch_sdpa((q, k, v), cu_q, KIMI_K2.softmax_scale)


def flash_attention_3(longest: dict[str, int], q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    scale = KIMI_K2.softmax_scale
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, **longest, softmax_scale=scale, causal=True, deterministic=True)
    return out[0] if isinstance(out, tuple) else out


def flash_attention_2(longest: dict[str, int], q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    v, scale = F.pad(v, [0, DIM - VALUE]), KIMI_K2.softmax_scale
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, **longest, softmax_scale=scale, causal=True, deterministic=True)
    return out[..., :VALUE]


def flashinfer_ragged() -> Callable:
    """FlashInfer's ragged prefill; its plan, made on the host once per step of a model, is not in the time."""
    import flashinfer

    wrappers: list = []

    def run(q, k, v, cu_q, cu_k):
        if not wrappers:
            space = torch.empty(256 << 20, dtype=torch.int8, device=q.device)
            wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(space, "NHD")
            heads = q.shape[1]
            wrapper.plan(
                cu_q, cu_k, heads, heads, DIM, head_dim_vo=VALUE, causal=True, sm_scale=KIMI_K2.softmax_scale,
                q_data_type=q.dtype,
            )  # fmt: skip
            wrappers.append(wrapper)
        return wrappers[0].run(q, k, v)

    return run
