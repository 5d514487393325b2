"""Host time of a call, from the public function to the launch, with inputs of one row.

On a CPU a stand-in replaces the extension module; `bench/gpu.py launch` measures the same calls with the kernels.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import k2kernels as k
from k2kernels.testing.inputs import KIMI_K2
from k2kernels.testing.stand_in import no_kernels


def calls(device: torch.device | str = "cpu") -> dict[str, Callable[[], Any]]:
    """op -> a call of it; and one of PyTorch's own, for comparison."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    x, gate_up = random(1, KIMI_K2.hidden), random(1, 2 * KIMI_K2.expert_intermediate)
    row, cache = random(1, KIMI_K2.cache_row), random(2, 64, KIMI_K2.cache_row)
    q = random(1, 1, KIMI_K2.heads, KIMI_K2.cache_row)
    table = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    data, scales = k.quantize_1x128(x)
    weight = random(KIMI_K2.hidden)
    return {
        "quantize_1x128": lambda: k.quantize_1x128(x),
        "dequantize": lambda: k.dequantize(data, scales),
        "swiglu": lambda: k.swiglu(gate_up),
        "swiglu_quantize": lambda: k.swiglu_quantize(gate_up),
        "rms_norm_quantize": lambda: k.rms_norm_quantize(x, weight, eps=1e-6),
        "mla_append": lambda: k.mla_append(row, cache, table, one),
        "mla_gather": lambda: k.mla_gather(cache, table, one),
        "mla_decode": lambda: k.mla_decode(q, cache, table, one, softmax_scale=KIMI_K2.softmax_scale),
        "torch.add": lambda: torch.add(x, x),
    }


@pytest.mark.benchmark(group="launch path")
@pytest.mark.parametrize("op", calls())
def test_launch_path(benchmark, op):
    with no_kernels(), torch.no_grad():
        benchmark(calls()[op])
