"""The kernels on a GPU, at sizes of Kimi-K2: against the reference bit for bit, on other streams, in CUDA graphs.

What the emulator has shown at small sizes is asked of the hardware here. Run by `make gpu`.
"""

import pytest
import torch

import k2kernels as k
from k2kernels.testing.inputs import KIMI_K2, poisoned_cache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GROUPS = dict(
    offsets=torch.tensor([0, 256, 512, 640, 1024], dtype=torch.int32),
    counts=torch.tensor([200, 256, 0, 300], dtype=torch.int32),
)
REAL = torch.cat([torch.arange(start, start + n) for start, n in ((0, 200), (256, 256), (640, 300))])


def rows(*shape, dtype=torch.bfloat16):
    return (torch.randn(*shape) * torch.logspace(-4, 4, shape[-2])[:, None]).to(dtype)


def paged(quantize):
    torch.manual_seed(7)
    made = poisoned_cache([torch.randn(n, KIMI_K2.cache_row).bfloat16() for n in (100, 7, 333)], 64, quantize=quantize)
    positions = torch.tensor([0, 99, 5, 6, 64, 332])
    return made.kv_cache, made.block_table, positions


def append(kv, cache, table, positions):
    cache = cache.clone()
    k.mla_append(kv, cache, table, positions)
    return cache


# name -> (the op whose launches are counted, function, arguments on the CPU)
CASES = {
    **{
        f"quantize_1x128 {dtype} {layout}": (
            "quantize_1x128",
            lambda x, layout=layout: k.quantize_1x128(x, scale_layout=layout, power_of_two=layout == "column"),
            lambda dtype=dtype: (rows(515, 7168, dtype=dtype),),
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for layout in ("row", "column")
    },
    "quantize_1x128 transposed": (
        "quantize_1x128",
        lambda x: k.quantize_1x128(x, transpose=True),
        lambda: (rows(515, 7168),),
    ),
    "quantize_1x128 narrow": ("quantize_1x128", k.quantize_1x128, lambda: (rows(33, 200),)),
    "quantize_128x128": ("quantize_128x128", k.quantize_128x128, lambda: (rows(576, 7168),)),
    "quantize_128x128 stacked": ("quantize_128x128", k.quantize_128x128, lambda: (rows(3, 200, 300),)),
    "dequantize 1x128": (
        "dequantize",
        lambda data, scales: k.dequantize(data, scales, block=(1, 128), dtype=torch.bfloat16),
        lambda: k.quantize_1x128(rows(515, 7168)),
    ),
    "dequantize 128x128": (
        "dequantize",
        lambda data, scales: k.dequantize(data, scales, block=(128, 128), dtype=torch.float32),
        lambda: k.quantize_128x128(rows(576, 7168)),
    ),
    "mla_append": (
        "mla_append",
        append,
        lambda: (torch.randn(6, KIMI_K2.cache_row).bfloat16(), *paged(quantize=False)),
    ),
    "mla_append 656": (
        "mla_append",
        append,
        lambda: (torch.randn(6, KIMI_K2.cache_row).bfloat16(), *paged(quantize=True)),
    ),
    "mla_gather": ("mla_gather", k.mla_gather, lambda: paged(quantize=False)),
    "mla_gather 656": ("mla_gather", k.mla_gather, lambda: paged(quantize=True)),
}


def to(device, values):
    return tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in values)


def bits(result):
    """The tensors of a result as bytes: NaN equals NaN, and -0 is not 0."""
    flat = [result] if isinstance(result, torch.Tensor) else list(result)
    return [t.detach().cpu().contiguous().view(torch.uint8) for t in flat]


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_the_reference_bit_for_bit(name):
    op, function, arguments = CASES[name]
    on_cpu = arguments()
    before = k.launch_count(op)
    got = function(*to("cuda", on_cpu))
    assert k.launch_count(op) > before, "the reference ran instead of the kernel"
    for g, w in zip(bits(got), bits(function(*on_cpu))):
        assert torch.equal(g, w), f"{int((g != w).sum())} of {w.numel()} bytes differ"


def test_padding_rows_are_neither_read_nor_written():
    x = torch.full((1024, 4096), float("nan"), dtype=torch.bfloat16)
    x[REAL] = rows(len(REAL), 4096)
    got = k.swiglu_quantize(x.cuda(), **{name: value.cuda() for name, value in GROUPS.items()})
    want = k.swiglu_quantize(x, **GROUPS)
    steps = got[0].cpu().view(torch.uint8)[REAL].int() - want[0].view(torch.uint8)[REAL].int()
    assert steps.abs().max() <= 1 and (steps != 0).float().mean() < 1e-3  # the last bit of exp is free
    torch.testing.assert_close(got[1].cpu()[REAL], want[1][REAL], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_swiglu(dtype):
    x = torch.randn(515, 4096).to(dtype)
    exact = x.double()
    want = torch.nn.functional.silu(exact[:, :2048]) * exact[:, 2048:]
    error = (k.swiglu(x.cuda()).cpu().double() - want).abs()
    assert (error <= torch.finfo(dtype).eps * want.abs() + 1e-7).all()


def test_another_stream_and_a_graph_with_changing_inputs():
    x = rows(256, 7168).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        k.quantize_1x128(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        data, scales = k.quantize_1x128(x)
    for _ in range(3):
        new = rows(256, 7168)
        x.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(g, w) for g, w in zip(bits((data, scales)), bits(k.quantize_1x128(new))))


def test_compiled():
    x = rows(256, 7168).cuda()
    got = torch.compile(k.quantize_1x128, fullgraph=True)(x)
    assert all(torch.equal(g, w) for g, w in zip(bits(got), bits(k.quantize_1x128(x))))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_device_of_the_tensors_counts_not_the_current_one():
    x = rows(64, 512)
    got = k.quantize_1x128(x.to("cuda:1"))
    assert got[0].device.index == 1
    assert all(torch.equal(g, w) for g, w in zip(bits(got), bits(k.quantize_1x128(x))))
