"""Quantisers, RMSNorm and SwiGLU in front of them, against PyTorch's nearest equivalents, at sizes of a CPU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from k2kernels.ops.quant import (
    dequantize,
    quantize_1x128,
    quantize_128x128,
    rms_norm_quantize,
    swiglu,
    swiglu_quantize,
)
from k2kernels.testing.bench import Case
from k2kernels.testing.inputs import KIMI_K2

SHAPES = {  # rows, columns
    "tiny": (2048, 128),
    "k2 token": (64, 7168),
    "k2 expert": (512, 2048),
}


@pytest.fixture(params=SHAPES)
def x(request):
    torch.manual_seed(0)
    return torch.randn(SHAPES[request.param]).bfloat16()


QUANTIZERS = {
    "1x128": quantize_1x128,
    "1x128 column": lambda x: quantize_1x128(x, scale_layout="column"),
    "1x128 power of two": lambda x: quantize_1x128(x, power_of_two=True),
    "1x128 transpose": lambda x: quantize_1x128(x, transpose=True),
    "128x128": quantize_128x128,
    "torch, one scale": lambda x: (x / (x.abs().amax() / 448)).to(torch.float8_e4m3fn),
}


@pytest.mark.benchmark(group="quantize")
@pytest.mark.parametrize("who", QUANTIZERS)
def test_quantize(benchmark, x, who):
    benchmark(QUANTIZERS[who], x)


@pytest.mark.benchmark(group="dequantize")
@pytest.mark.parametrize("who", ["k2kernels", "torch, one scale"])
def test_dequantize(benchmark, x, who):
    data, scales = quantize_128x128(x)
    if who == "k2kernels":
        benchmark(dequantize, data, scales, block=(128, 128), dtype=torch.bfloat16)
    else:
        benchmark(lambda: data.to(torch.bfloat16) * 0.5)


@pytest.mark.benchmark(group="rms_norm_quantize")
@pytest.mark.parametrize("who", ["one op", "two ops"])
def test_rms_norm_quantize(benchmark, x, who):
    weight = torch.rand(x.shape[-1], dtype=x.dtype)
    benchmark(rms_norm_quantize if who == "one op" else norm_then_quantize, x, weight)


@pytest.mark.benchmark(group="swiglu")
@pytest.mark.parametrize("who", ["k2kernels", "torch"])
def test_swiglu(benchmark, x, who):
    if who == "k2kernels":
        benchmark(swiglu, x)
    else:
        gate, up = x.chunk(2, dim=-1)
        benchmark(lambda: F.silu(gate) * up)


@pytest.mark.benchmark(group="swiglu_backward")
@pytest.mark.parametrize("who", ["k2kernels", "torch"])
def test_swiglu_backward(benchmark, x, who):
    function = torch.ops.k2kernels.swiglu_backward if who == "k2kernels" else torch_swiglu_backward
    benchmark(function, torch.randn(len(x), x.shape[-1] // 2).bfloat16(), x)


@pytest.mark.benchmark(group="swiglu_quantize")
@pytest.mark.parametrize("who", ["one op", "two ops"])
def test_swiglu_quantize(benchmark, x, who):
    if who == "one op":
        benchmark(swiglu_quantize, x)
    else:
        benchmark(lambda: quantize_1x128(swiglu(x)))


def gpu_cases() -> list[Case]:
    """The shapes of Kimi-K2 on a GPU: activations of 128 and 4096 tokens, their experts' rows, one expert's weight."""

    def random(*shapes: tuple[int, ...]) -> Callable[[torch.device], tuple[torch.Tensor, ...]]:
        return lambda device: tuple(torch.randn(shape, device=device).bfloat16() for shape in shapes)

    compiled = {
        function: torch.compile(function, dynamic=False)
        for function in (reference_1x128, reference_rms_norm_1x128, torch_swiglu, torch_swiglu_backward)
    }
    cases = []
    for tokens in (128, 4096):
        shape = f"{tokens} tokens x 7168"
        elements = tokens * KIMI_K2.hidden
        moved, make = round(elements * (3 + 4 / 128)), random((tokens, KIMI_K2.hidden))
        cases += [
            Case(
                "quantize_1x128",
                shape,
                moved,
                make,
                {
                    "k2kernels": quantize_1x128,
                    "k2kernels column": lambda x: quantize_1x128(x, scale_layout="column"),
                    "torch.compile": compiled[reference_1x128],
                },
            ),
            Case("transposed", shape, moved, make, {"k2kernels": lambda x: quantize_1x128(x, transpose=True)}),
            Case(
                "dequantize 1x128",
                shape,
                moved,
                lambda device, make=make: quantize_1x128(*make(device)),
                {"k2kernels": lambda data, scales: dequantize(data, scales, dtype=torch.bfloat16)},
            ),
        ]
        cases += [
            Case(
                "rms_norm_quantize",
                f"{tokens} tokens x {columns}",
                round(tokens * columns * (3 + 4 / 128)) + 2 * columns,
                random((tokens, columns), (columns,)),
                {
                    "k2kernels": rms_norm_quantize,
                    "k2kernels column": lambda x, weight: rms_norm_quantize(x, weight, scale_layout="column"),
                    "two ops": norm_then_quantize,
                    "torch.compile": compiled[reference_rms_norm_1x128],
                },
            )
            for columns in (KIMI_K2.hidden, 1536, KIMI_K2.latent)  # 1536: the latent of the queries
        ]
        rows, intermediate = KIMI_K2.top_k * tokens, KIMI_K2.expert_intermediate
        shape, make = f"{rows} rows x {2 * intermediate}", random((rows, 2 * intermediate))
        outputs = rows * intermediate
        cases += [
            Case("swiglu_quantize", shape, round(outputs * (5 + 4 / 128)), make, {"k2kernels": swiglu_quantize}),
            Case("swiglu", shape, outputs * 6, make, {"k2kernels": swiglu, "torch.compile": compiled[torch_swiglu]}),
            Case(
                "swiglu_backward",
                shape,
                outputs * 10,
                random((rows, intermediate), (rows, 2 * intermediate)),
                {
                    "k2kernels": torch.ops.k2kernels.swiglu_backward,
                    "torch.compile": compiled[torch_swiglu_backward],
                },
            ),
        ]

    weight = random((2 * KIMI_K2.expert_intermediate, KIMI_K2.hidden))
    elements = 2 * KIMI_K2.expert_intermediate * KIMI_K2.hidden
    return [
        *cases,
        Case("quantize_128x128", "gate_up 4096 x 7168", 3 * elements, weight, {"k2kernels": quantize_128x128}),
        Case(
            "dequantize",
            "gate_up 4096 x 7168",
            3 * elements,
            lambda device: quantize_128x128(*weight(device)),
            {"k2kernels": lambda data, scales: dequantize(data, scales, block=(128, 128), dtype=torch.bfloat16)},
        ),
    ]


def reference_1x128(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain PyTorch operations, for torch.compile to fuse."""
    blocks = x.float().unflatten(-1, (-1, 128))
    scales = (blocks.abs().amax(-1) / 448).clamp(min=1e-10)
    return (blocks / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2), scales


def torch_swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def torch_swiglu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([d_gate, grad * gate * sigmoid], dim=-1).to(x.dtype)


def norm_then_quantize(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_1x128(F.rms_norm(x, weight.shape, weight, 1e-6))


def reference_rms_norm_1x128(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return reference_1x128(F.rms_norm(x, weight.shape, weight, 1e-6))
