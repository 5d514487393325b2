"""The grouped product with 4-bit weights against the one with their bfloat16, at sizes of a CPU; packing too.

On a GPU: the experts of a rank of Kimi-K2, and of two other models' sizes, over tokens; beside ours with FP8 and
bfloat16 weights, humming's grouped product and vLLM's Marlin MoE, where they are installed.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from k2kernels.functional.moe_mlp import moe_mlp
from k2kernels.ops.fp8_gemm import grouped_fp8_gemm
from k2kernels.ops.grouped_gemm import grouped_gemm
from k2kernels.ops.moe import Routing, moe_route
from k2kernels.ops.quant import quantize_1x128, quantize_128x128
from k2kernels.ops.w4_gemm import (
    dequantize_w4,
    empty_w4,
    grouped_w4_gemm,
    pack_w4,
    quantize_int4_group32,
    quantize_mxfp4,
    unpack_w4,
)
from k2kernels.testing.bench import Case
from k2kernels.testing.compare import cos_diff
from k2kernels.testing.inputs import KIMI_K2

QUANTIZERS = {"int4": quantize_int4_group32, "mxfp4": quantize_mxfp4}
BITS = {"int4": 4.5, "mxfp4": 4.25}  # of a weight, with its share of a scale


def make(groups, rows, n, k, kind, device="cpu"):
    """a, packed and bfloat16 weights, offsets and counts of equal groups."""
    offsets = torch.arange(groups + 1, dtype=torch.int32, device=device) * rows
    a = torch.randn(groups * rows, k, device=device).bfloat16()
    w = [QUANTIZERS[kind](torch.empty(n, k, device=device).normal_(std=k**-0.5)) for _ in range(groups)]
    codes, scales = (torch.stack(x) for x in zip(*w))
    return a, pack_w4(codes, scales), dequantize_w4(codes, scales), offsets, offsets.diff()


def ours(a, packed, weights, offsets, counts):
    return grouped_w4_gemm(a, packed, offsets=offsets, counts=counts)


def bfloat16(a, packed, weights, offsets, counts):
    return grouped_gemm(a, weights, offsets=offsets, counts=counts)


@pytest.mark.benchmark(group="w4_gemm")
@pytest.mark.parametrize("who", [ours, bfloat16], ids=["k2kernels", "k2kernels bf16"])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_product(benchmark, kind, who):
    torch.manual_seed(0)
    inputs = make(4, 16, 256, 256, kind)
    benchmark(lambda: who(*inputs))


@pytest.mark.benchmark(group="w4 packing")
@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("step", ["quantize", "pack", "unpack", "dequantize"])
def test_packing(benchmark, kind, step):
    w = torch.randn(2, 512, 1024).bfloat16()
    codes, scales = QUANTIZERS[kind](w)
    packed = pack_w4(codes, scales)
    steps = {
        "quantize": lambda: QUANTIZERS[kind](w),
        "pack": lambda: pack_w4(codes, scales),
        "unpack": lambda: unpack_w4(packed),
        "dequantize": lambda: dequantize_w4(codes, scales),
    }
    benchmark(steps[step])


# On a GPU


class Experts(NamedTuple):
    """The routed experts of a model, divided among `ranks`; tokens are those of all ranks together."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    ranks: int = 1

    @property
    def here(self) -> int:
        return self.experts // self.ranks

    def hit(self, tokens: int) -> float:
        """The expected number of experts of a rank with rows, under uniform routing."""
        return self.here * (1 - (1 - self.top_k / self.experts) ** tokens)

    def rows(self, tokens: int) -> float:
        return tokens * self.top_k / self.ranks

    def shape(self, name: str) -> tuple[int, int]:
        wide = self.intermediate
        return (2 * wide, self.hidden) if name == "gate_up" else (self.hidden, wide)


K2 = Experts(KIMI_K2.experts, KIMI_K2.top_k, KIMI_K2.hidden, KIMI_K2.expert_intermediate)
# In the order of their value, should the time on a GPU be short. The top-k of the sizes of Kimi-K3 is an assumption.
MODELS = {
    "K2 EP8": (K2._replace(ranks=8), ("int4", "mxfp4", "bf16", "fp8")),
    "DeepSeek TP8": (Experts(256, 8, 7168, 256), ("int4",)),
    "K3 EP8": (Experts(896, 8, 3584, 3072, 8), ("mxfp4",)),
    "K2 EP1": (K2, ("int4",)),
    "K2 EP16": (K2._replace(ranks=16), ("int4",)),
}
TOKENS = (8, 64, 512, 1, 4096)
LAYERS = ("DeepSeek TP8", "K2 EP1")


def weight_bytes(kind: str, n: int, k: int) -> int:
    if kind in BITS:
        return int(n * k * BITS[kind] / 8)
    return 2 * n * k if kind == "bf16" else n * k + 4 * (-(-n // 128) * -(-k // 128))


@functools.lru_cache(maxsize=2)
def stacked(kind: str, groups: int, n: int, k: int, gated: bool, peer: bool, device: torch.device) -> tuple:
    """The weights of `groups` experts, one made at a time; for `peer` also codes and scales as files hold them.

    They are kept for all inputs of all cases: these choose experts anew, and so find other weights in the L2 cache.
    """
    w4 = empty_w4((groups, n, k), kind, gated=gated, device=device) if kind in BITS else None
    made = []
    for group in range(groups):
        w = torch.empty(n, k, device=device).normal_(std=k**-0.5)
        if w4 is not None:
            pair = QUANTIZERS[kind](w)
            pack_w4(*pair, gated=gated, out=w4.data[group])
            made += [pair] if peer else []
        else:
            made.append((w.bfloat16(),) if kind == "bf16" else quantize_128x128(w))
    rest = tuple(torch.stack(parts) for parts in zip(*made))
    return rest if w4 is None else (w4, *rest)


def routed(model: Experts, tokens: int, device: torch.device) -> torch.Tensor:
    """Uniform: the experts of each token, int32 [T, K]."""
    return torch.rand(tokens, model.experts, device=device).topk(model.top_k).indices.int()


def product_case(where: str, name: str, tokens: int, kind: str) -> Case:
    """One product of a rank's experts, without dispatch and combine; bytes: those of the experts hit, and the rows."""
    model, _ = MODELS[where]
    n, k = model.shape(name)
    swiglu, peer = name == "gate_up" and kind in BITS, kind in BITS and has("humming")

    def make(device: torch.device) -> tuple:
        counts = torch.bincount(routed(model, tokens, device).flatten(), minlength=model.experts)[: model.here]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        a = torch.randn(int(offsets[-1]), k, device=device).bfloat16()
        a = quantize_1x128(a, scale_layout="column") if kind == "fp8" else (a,)
        return *a, stacked(kind, model.here, n, k, swiglu, peer, device), offsets, counts.int()

    expected = max(1, round(model.rows(tokens)))

    def ours(*inputs):
        *a, w, offsets, counts = inputs
        groups = dict(offsets=offsets, counts=counts)
        if kind == "fp8":
            return grouped_fp8_gemm(*a, *w, **groups, expected_m=-(-expected // model.here))
        if kind == "bf16":
            return grouped_gemm(*a, *w, **groups)
        return grouped_w4_gemm(*a, w[0], **groups, swiglu=swiglu, expected=expected)

    bodies: dict[str, Callable] = {"k2kernels": ours}
    if peer:
        # It has the plain product alone: of gate and up, SwiGLU's time comes on top.
        bodies["humming"] = functools.partial(humming, kind=kind, expected=expected)
    rows, result = model.rows(tokens), n // 2 if swiglu else n
    return Case(
        "w4_gemm",
        f"{where} {name} T={tokens} {kind}",
        int(model.hit(tokens) * weight_bytes(kind, n, k) + rows * (k * (1 if kind == "fp8" else 2) + 2 * result)),
        make,
        bodies,
        flops=int(2 * rows * n * k),
        dtype="fp8" if kind == "fp8" else "bf16",
    )


def layer_case(where: str, tokens: int) -> Case:
    """Dispatch, both products and combine with INT4, as vLLM's Marlin MoE does them."""
    model, _ = MODELS[where]
    peer = has("vllm")

    def make(device: torch.device) -> tuple:
        x, logits = torch.randn(tokens, model.hidden, device=device).bfloat16(), torch.randn(tokens, model.experts)
        routing = moe_route(logits.to(device), top_k=model.top_k)
        weights = (
            stacked("int4", model.here, *model.shape(name), name == "gate_up", peer, device)
            for name in ("gate_up", "down")
        )
        return x, routing, *weights

    def ours(x, routing, gate_up, down):
        return moe_mlp(x, routing, gate_up[0], down[0])

    bodies: dict[str, Callable] = {"k2kernels": ours}
    if peer:
        bodies["vLLM Marlin"] = checked(vllm_marlin, ours)
    weights = sum(weight_bytes("int4", *model.shape(name)) for name in ("gate_up", "down"))
    return Case(
        "w4_layer",
        f"{where} T={tokens} int4",
        int(model.hit(tokens) * weights) + 4 * tokens * model.hidden,
        make,
        bodies,
        flops=6 * tokens * model.top_k * model.hidden * model.intermediate,
        dtype="bf16",
    )


def gpu_cases() -> list[Case]:
    """Products over models, kinds and tokens; layers beside Marlin. Cases with the same weights are neighbours."""
    products = [
        product_case(where, name, tokens, kind)
        for where, (_, kinds) in MODELS.items()
        for kind in kinds
        for name in ("gate_up", "down")
        for tokens in TOKENS
    ]
    return products + [layer_case(where, tokens) for where in LAYERS for tokens in TOKENS]


# Peers. One that is of another version than the calls below, or computes something else, is left out with a warning.


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def takes(function: Callable, *names: str) -> None:
    """Raises if `function` lacks one of the arguments."""
    missing = sorted(set(names) - set(inspect.signature(function).parameters))
    if missing:
        name = f"{function.__module__}.{function.__qualname__}"
        raise RuntimeError(f"{name} must take {', '.join(missing)} as in the version that this benchmark knows")


def checked(peer: Callable, ours: Callable) -> Callable:
    """`peer`, with a check of its first result against ours."""
    compared: list = []

    def run(*inputs):
        result = peer(*inputs)
        if not compared:
            difference = cos_diff(result, ours(*inputs))
            if not difference < 1e-4:
                raise RuntimeError(f"its result differs from ours by {difference:.2g}")
            compared.append(True)
        return result

    return run


@functools.lru_cache(maxsize=1)
def humming_layer(w: tuple, kind: str):
    """Known: humming of 2026-11 (vllm-project/humming 18c2fb1); its own default tuning."""
    from humming.layer import HummingLayer, HummingLayerMethod

    (groups, n, k), codes, scales = w[0].shape, *w[1:]
    takes(HummingLayer.forward, "inputs", "expert_layout", "valid_shape_m", "compute_config", "tuning_config")
    takes(HummingLayerMethod.get_default_tuning_configs, "layer", "gemm_type")
    form, of = ("pack-quantized", "int") if kind == "int4" else ("mxfp4-pack-quantized", "float")
    config = dict(quant_method="compressed-tensors", format=form, type=of, num_bits=4, strategy="group", group_size=32)
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, num_experts=groups, torch_dtype=torch.bfloat16)
    layer = layer.to(codes.device)
    layer.load_from_tensors({"weight_packed": codes, "weight_scale": scales})
    layer.transform()
    return layer, HummingLayerMethod.get_default_tuning_configs(layer, gemm_type="grouped_contiguous")


def humming(a, w, offsets, counts, *, kind: str, expected: int) -> torch.Tensor:
    new = humming_layer.cache_info().misses
    layer, tuning = humming_layer(Same(w), kind)
    out = layer(
        inputs=a,
        expert_layout=offsets,
        valid_shape_m=expected,
        compute_config={"gemm_type": "grouped_contiguous"},
        tuning_config=tuning,
    )
    if humming_layer.cache_info().misses > new:
        expert = int(counts.argmax())
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        difference = cos_diff(out[rows], a[rows] @ dequantize_w4(w[1][expert], w[2][expert]).T)
        if not difference < 1e-4:
            raise RuntimeError(f"its result differs from ours by {difference:.2g}")
    return out


@functools.lru_cache(maxsize=2)
def marlin_weights(w: Same) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales in Marlin's order."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_moe_permute_scales

    (groups, n, k), codes, scales = w[0].shape, *w[1:]
    order = torch.empty(groups, 0, dtype=torch.int32, device=codes.device)
    codes = ops.gptq_marlin_moe_repack(codes.mT.contiguous(), order, k, n, 4)
    return codes, marlin_moe_permute_scales(scales.mT.contiguous(), k, n, 32)


def vllm_marlin(x, routing: Routing, gate_up, down) -> torch.Tensor:
    """Known: vLLM of 2026 (00a130a)."""
    from vllm.model_executor.layers.fused_moe.fused_marlin_moe import fused_marlin_moe
    from vllm.scalar_type import scalar_types

    names = "hidden_states w1 w2 bias1 bias2 w1_scale w2_scale gating_output topk_weights topk_ids quant_type_id"
    takes(fused_marlin_moe, *names.split())
    w1, w1_scale = marlin_weights(Same(gate_up))
    w2, w2_scale = marlin_weights(Same(down))
    return fused_marlin_moe(
        hidden_states=x,
        w1=w1,
        w2=w2,
        bias1=None,
        bias2=None,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        gating_output=None,
        topk_weights=routing.weights.float(),
        topk_ids=routing.indices,
        quant_type_id=scalar_types.uint4b8.id,
    )


class Same(tuple):
    """A tuple of weights that is the same only as itself: a key of a cache."""

    def __hash__(self) -> int:
        return id(self[0].data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self[0].data is other[0].data
