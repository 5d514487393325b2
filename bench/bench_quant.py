"""Quantisers and SwiGLU against PyTorch's nearest equivalents, at sizes of a CPU."""

import pytest
import torch
import torch.nn.functional as F

from k2kernels.ops.quant import dequantize, quantize_1x128, quantize_128x128, swiglu, swiglu_quantize
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


@pytest.mark.benchmark(group="swiglu")
@pytest.mark.parametrize("who", ["k2kernels", "torch"])
def test_swiglu(benchmark, x, who):
    if who == "k2kernels":
        benchmark(swiglu, x)
    else:
        gate, up = x.chunk(2, dim=-1)
        benchmark(lambda: F.silu(gate) * up)


@pytest.mark.benchmark(group="swiglu_quantize")
@pytest.mark.parametrize("who", ["one op", "two ops"])
def test_swiglu_quantize(benchmark, x, who):
    if who == "one op":
        benchmark(swiglu_quantize, x)
    else:
        benchmark(lambda: quantize_1x128(swiglu(x)))


def gpu_cases() -> list[Case]:
    """The shapes of Kimi-K2 on a GPU: activations of 128 and 4096 tokens, their experts' rows, one expert's weight."""
    compiled = torch.compile(reference_1x128, dynamic=False)
    cases = []
    for tokens in (128, 4096):
        elements = tokens * KIMI_K2.hidden

        def activations(device: torch.device, tokens: int = tokens) -> tuple[torch.Tensor]:
            return (torch.randn(tokens, KIMI_K2.hidden, device=device).bfloat16(),)

        one_way = dict(shape=f"{tokens} tokens x 7168", bytes=round(elements * (3 + 4 / 128)), make=activations)
        cases += [
            Case("quantize_1x128", bodies={"k2kernels": quantize_1x128, "torch.compile": compiled}, **one_way),
            Case("transposed", bodies={"k2kernels": lambda x: quantize_1x128(x, transpose=True)}, **one_way),
        ]
        outputs = KIMI_K2.top_k * tokens * KIMI_K2.expert_intermediate

        def gate_up(device: torch.device, tokens: int = tokens) -> tuple[torch.Tensor]:
            shape = (KIMI_K2.top_k * tokens, 2 * KIMI_K2.expert_intermediate)
            return (torch.randn(*shape, device=device).bfloat16(),)

        cases += [
            Case(
                "swiglu_quantize",
                f"{KIMI_K2.top_k * tokens} rows x 4096",
                round(outputs * (5 + 4 / 128)),
                gate_up,
                {"k2kernels": swiglu_quantize},
            ),
            Case(
                "swiglu",
                f"{KIMI_K2.top_k * tokens} rows x 4096",
                outputs * 6,
                gate_up,
                {"k2kernels": swiglu, "torch.compile": torch.compile(torch_swiglu, dynamic=False)},
            ),
        ]

    def weight(device: torch.device) -> tuple[torch.Tensor]:
        return (torch.randn(2 * KIMI_K2.expert_intermediate, KIMI_K2.hidden, device=device).bfloat16(),)

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
    """What a user would write, for torch.compile to fuse."""
    blocks = x.float().unflatten(-1, (-1, 128))
    scales = (blocks.abs().amax(-1) / 448).clamp(min=1e-10)
    return (blocks / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2), scales


def torch_swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
