"""FP8 GEMMs against torch.matmul on unquantised operands, at sizes of a CPU, and Kimi-K2's on a GPU."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from k2kernels.ops.fp8_gemm import fp8_gemm, grouped_fp8_gemm, grouped_fp8_wgrad
from k2kernels.ops.quant import quantize_1x128, quantize_128x128
from k2kernels.testing.bench import Case
from k2kernels.testing.compare import cos_diff
from k2kernels.testing.inputs import KIMI_K2

SHAPES = {  # M, N, K
    "tiny": (512, 256, 128),
    "k2 q_a + kv_a, 1 token": (1, 2112, 7168),
    "k2 kv_b, 64 tokens": (64, 2048, 512),  # 8 of 64 heads
}
GROUPED = {  # G, rows of each group, N, K
    "tiny": (8, 256, 256, 64),
    "k2, narrow": (48, 8, 128, 256),
}
PEERS = {"torch float32": torch.float32, "torch bfloat16": torch.bfloat16}


@pytest.mark.benchmark(group="fp8_gemm")
@pytest.mark.parametrize("who", ["k2kernels", *PEERS])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_gemm(benchmark, shape, who):
    torch.manual_seed(0)
    m, n, k = SHAPES[shape]
    x, w = torch.randn(m, k), torch.randn(n, k)
    if who == "k2kernels":
        benchmark(fp8_gemm, *quantize_1x128(x), *quantize_128x128(w))
    else:
        benchmark(torch.matmul, x.to(PEERS[who]), w.to(PEERS[who]).T)


@pytest.mark.benchmark(group="grouped_fp8_gemm")
@pytest.mark.parametrize("who", ["contiguous", "masked", *PEERS])
@pytest.mark.parametrize("shape", GROUPED)
def test_grouped_fp8_gemm(benchmark, shape, who):
    torch.manual_seed(0)
    groups, rows, n, k = GROUPED[shape]
    x, w = torch.randn(groups, rows, k), torch.randn(groups, n, k)
    weights = quantize_128x128(w)
    if who == "contiguous":
        offsets = torch.arange(groups + 1, dtype=torch.int32) * rows
        benchmark(grouped_fp8_gemm, *quantize_1x128(x.flatten(0, 1)), *weights, offsets=offsets)
    elif who == "masked":
        masked_m = torch.full((groups,), rows, dtype=torch.int32)
        benchmark(grouped_fp8_gemm, *quantize_1x128(x), *weights, masked_m=masked_m)
    else:
        benchmark(torch.bmm, x.to(PEERS[who]), w.to(PEERS[who]).mT)


@pytest.mark.benchmark(group="grouped_fp8_wgrad")
@pytest.mark.parametrize("who", ["k2kernels", *PEERS])
def test_grouped_fp8_wgrad(benchmark, who):
    torch.manual_seed(0)
    groups, rows, n, k = 8, 256, 256, 64
    dy, x = torch.randn(groups, rows, n), torch.randn(groups, rows, k)
    if who == "k2kernels":
        operands = [t for y in (dy, x) for t in quantize_1x128(y.flatten(0, 1), transpose=True)]
        offsets = torch.arange(groups + 1, dtype=torch.int32) * rows
        benchmark(grouped_fp8_wgrad, *operands, offsets=offsets, counts=offsets.diff())
    else:
        benchmark(torch.bmm, dy.to(PEERS[who]).mT, x.to(PEERS[who]))


# On a GPU

HIDDEN, INTERMEDIATE = KIMI_K2.hidden, KIMI_K2.expert_intermediate
LINEARS = {  # N, K of Kimi-K2
    "q_a + kv_a": (1536 + KIMI_K2.cache_row, HIDDEN),
    "q_b": (KIMI_K2.heads * (KIMI_K2.nope + KIMI_K2.rope), 1536),
    "kv_b": (KIMI_K2.heads * (KIMI_K2.nope + KIMI_K2.value), KIMI_K2.latent),
    "o_proj": (HIDDEN, KIMI_K2.heads * KIMI_K2.value),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),  # of the shared expert, and of each routed one
    "down": (HIDDEN, INTERMEDIATE),
    "dense gate_up": (2 * 18432, HIDDEN),
    "dense down": (HIDDEN, 18432),
}
ROWS = (1, 8, 64, 128, 512, 4096)
RANKS = (1, 8, 32)  # of expert parallelism
TOKENS = (128, 1024, 8192)  # of all ranks together
EXPERT_ROWS = 128  # DeepGEMM's alignment of the groups of one matrix


def gpu_cases() -> list[Case]:
    """Dense layers over rows, the quantisation of their inputs, experts over ranks and tokens, and wgrad.

    The bfloat16 product, and quantisation with product, are separate cases, because they read other bytes and so have
    other lower bounds.
    """
    cases = [case for name in LINEARS for rows in ROWS for case in linear_cases(name, rows)]
    widths = sorted({k for _, k in LINEARS.values()})
    cases += [quantize_case(rows, k) for rows in ROWS for k in widths]
    cases += [
        case
        for ranks, tokens, name in itertools.product(RANKS, TOKENS, ("gate_up", "down"))
        for case in expert_cases(ranks, tokens, name)
    ]
    return cases + [case for name in ("gate_up", "down") for case in wgrad_cases(name)]


def fp8_bytes(rows: int, columns: int, block: int = 1) -> int:
    """Bytes of codes and scales."""
    return rows * columns + 4 * -(-rows // block) * -(-columns // 128)


def bf16(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def linear_cases(name: str, m: int) -> list[Case]:
    """One layer on m rows: the product, with the quantisation of its input, and in bfloat16."""
    n, k = LINEARS[name]
    shape, flops = f"{name} M={m}", 2 * m * n * k
    weight, result = fp8_bytes(n, k, 128), 2 * m * n

    def wide(device: torch.device) -> tuple[torch.Tensor, ...]:
        return bf16(m, k, device=device), *quantize_128x128(bf16(n, k, device=device))

    def make(device: torch.device) -> tuple[torch.Tensor, ...]:
        x, *w = wide(device)
        return *quantize_1x128(x, scale_layout="column"), *w

    def unquantised(device: torch.device) -> tuple[torch.Tensor, ...]:
        return bf16(m, k, device=device), bf16(n, k, device=device)

    def both(x, w, w_scales):
        return fp8_gemm(*quantize_1x128(x, scale_layout="column"), w, w_scales)

    bodies = {"k2kernels": fp8_gemm, **{who: checked(peer, fp8_gemm) for who, peer in dense_peers().items()}}
    return [
        Case("fp8_gemm", shape, fp8_bytes(m, k) + weight + result, make, bodies, flops, "fp8"),
        Case("fp8_gemm", shape, 2 * m * k + weight + result, wide, {"quantize + k2kernels": both}, flops, "fp8"),
        Case("fp8_gemm", shape, 2 * (m + n) * k + result, unquantised, {"torch bf16": F.linear}, flops, "bf16"),
    ]


def quantize_case(rows: int, k: int) -> Case:
    return Case(
        "quantize_1x128",
        f"column M={rows} K={k}",
        2 * rows * k + fp8_bytes(rows, k),
        lambda device: (bf16(rows, k, device=device),),
        {"k2kernels": functools.partial(quantize_1x128, scale_layout="column")},
    )


def expert_rows(ranks: int, tokens: int) -> list[int]:
    """The rows of each expert of one rank, under uniform routing of the tokens' top-k choices."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, KIMI_K2.experts, generator=generator).topk(KIMI_K2.top_k).indices
    counts = torch.bincount(chosen.flatten(), minlength=KIMI_K2.experts)
    return counts[: KIMI_K2.experts // ranks].tolist()


def expert_cases(ranks: int, tokens: int, name: str) -> list[Case]:
    """The experts of one of `ranks` ranks: rows side by side (contiguous), and a matrix for each expert (masked)."""
    n, k = LINEARS[name]
    counts = expert_rows(ranks, tokens)
    groups, real, most = len(counts), sum(counts), max(counts)
    starts = [0, *itertools.accumulate(-(-count // EXPERT_ROWS) * EXPERT_ROWS for count in counts)]
    moved = real * (k + 4 * (k // 128) + 2 * n) + sum(c > 0 for c in counts) * fp8_bytes(n, k, 128)
    options = dict(flops=2 * real * n * k, dtype="fp8")

    def weights(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.empty(groups, n, k, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(groups, -(-n // 128), k // 128, device=device)
        for group in range(groups):  # all at once would need four times the memory
            codes[group], scales[group] = quantize_128x128(bf16(n, k, device=device))
        return codes, scales

    def contiguous(device: torch.device) -> tuple[torch.Tensor, ...]:
        x = quantize_1x128(bf16(starts[-1], k, device=device), scale_layout="column")
        places = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (starts, counts))
        group_of = torch.full((starts[-1],), -1, dtype=torch.int32)
        for group, (start, count) in enumerate(zip(starts, counts)):
            group_of[start : start + count] = group
        return *x, *weights(device), *places, group_of.to(device)

    def masked(device: torch.device) -> tuple[torch.Tensor, ...]:
        x = quantize_1x128(bf16(groups, most, k, device=device), scale_layout="column")
        return *x, *weights(device), torch.tensor(counts, dtype=torch.int32, device=device)

    def ours(a, a_scales, b, b_scales, offsets, counts, group_of):
        return grouped_fp8_gemm(a, a_scales, b, b_scales, offsets=offsets, counts=counts)

    def ours_masked(a, a_scales, b, b_scales, counts):
        return grouped_fp8_gemm(a, a_scales, b, b_scales, masked_m=counts, expected_m=-(-real // groups))

    rows = {"k2kernels": ours}
    matrices = {"k2kernels": ours_masked}
    if importlib.util.find_spec("deep_gemm"):
        is_real = torch.cat([torch.arange(-(-c // EXPERT_ROWS) * EXPERT_ROWS) < c for c in counts])
        rows["DeepGEMM"] = checked(deep_gemm_contiguous, ours, lambda d: d[is_real.to(d.device)])
        of_groups = torch.arange(most) < torch.tensor(counts)[:, None]
        peer = functools.partial(deep_gemm_masked, expected_m=-(-real // groups))
        matrices["DeepGEMM"] = checked(peer, ours_masked, lambda d: d[of_groups.to(d.device)])
    shape = f"EP{ranks} {name} T={tokens}"
    return [
        Case("grouped_fp8_gemm", shape, moved, contiguous, rows, **options),
        Case("grouped_fp8_gemm", f"{shape} masked", moved, masked, matrices, **options),
    ]


def wgrad_cases(name: str, groups: int = 12, rows: int = 2048) -> list[Case]:
    """Weight gradients of the experts of a rank (of 32), of `rows` tokens each, into float32."""
    n, k = LINEARS[name]
    total, result, flops = groups * rows, 4 * groups * n * k, 2 * groups * rows * n * k
    shape = f"{name} G={groups} x {rows}"

    def make(device: torch.device) -> tuple[torch.Tensor, ...]:
        transposed = (
            quantize_1x128(bf16(total, size, device=device), transpose=True, scale_layout="column") for size in (n, k)
        )
        offsets = torch.arange(groups + 1, dtype=torch.int32, device=device) * rows
        return *itertools.chain(*transposed), offsets, offsets.diff()

    def unquantised(device: torch.device) -> tuple[torch.Tensor, ...]:
        return bf16(groups, rows, n, device=device), bf16(groups, rows, k, device=device)

    def ours(a, a_scales, b, b_scales, offsets, counts):
        return grouped_fp8_wgrad(a, a_scales, b, b_scales, offsets=offsets, counts=counts)

    moved = fp8_bytes(n, total) + fp8_bytes(k, total) + result
    plain = {"torch bf16": lambda dy, x: torch.bmm(dy.mT, x)}
    return [
        Case("grouped_fp8_wgrad", shape, moved, make, {"k2kernels": ours}, flops, "fp8"),
        Case("grouped_fp8_wgrad", shape, 2 * total * (n + k) + result // 2, unquantised, plain, flops, "bf16"),
    ]


# Peers with the same arithmetic; one that raises is left out with a warning.


def checked(peer: Callable, ours: Callable, of: Callable = lambda d: d) -> Callable:
    """`peer`, with a check of its first result against ours: a wrong peer is not measured."""
    compared: list = []

    def run(*inputs):
        result = peer(*inputs)
        if not compared:
            difference = cos_diff(of(result), of(ours(*inputs)))
            if not difference < 1e-5:
                raise RuntimeError(f"its result differs from ours by {difference:.2g}")
            compared.append(True)
        return result

    return run


def dense_peers() -> dict[str, Callable]:
    """GEMMs with scales 1x128 for A and 128x128 for B; PyTorch's is cuBLAS's, from Hopper and CUDA 12.9 on."""
    found = {}
    if hasattr(F, "scaled_mm"):
        found["torch scaled_mm"] = scaled_mm
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        found["torch scaled_mm"] = old_scaled_mm
    if importlib.util.find_spec("deep_gemm"):
        found["DeepGEMM"] = deep_gemm
    return found


def scaled_mm(a, a_scales, b, b_scales):
    one, block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    return F.scaled_mm(a, b.T, a_scales, one, by_columns(b_scales).T, block, output_dtype=torch.bfloat16)


def old_scaled_mm(a, a_scales, b, b_scales):
    return torch._scaled_mm(a, b.T, scale_a=a_scales, scale_b=by_columns(b_scales).T, out_dtype=torch.bfloat16)


def by_columns(scales: torch.Tensor) -> torch.Tensor:
    """Scales [N blocks, K blocks] in cuBLAS's layout: rows padded to multiples of 4."""
    return F.pad(scales, (0, -scales.shape[1] % 4))


def deep_gemm(a, a_scales, b, b_scales):
    import deep_gemm

    d = a.new_empty((a.shape[0], b.shape[0]), dtype=torch.bfloat16)
    deep_gemm.fp8_gemm_nt((a, a_scales), (b, b_scales), d, disable_ue8m0_cast=True)
    return d


def deep_gemm_contiguous(a, a_scales, b, b_scales, offsets, counts, group_of):
    import deep_gemm

    d = a.new_empty((a.shape[0], b.shape[1]), dtype=torch.bfloat16)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a, a_scales), (b, b_scales), d, group_of, disable_ue8m0_cast=True)
    return d


def deep_gemm_masked(a, a_scales, b, b_scales, counts, expected_m):
    import deep_gemm

    d = a.new_empty((*a.shape[:2], b.shape[1]), dtype=torch.bfloat16)
    operands = (a, a_scales), (b, b_scales), d, counts, expected_m
    deep_gemm.m_grouped_fp8_gemm_nt_masked(*operands, disable_ue8m0_cast=True)
    return d
