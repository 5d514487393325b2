"""K2KERNELS_FP8_GEMM: a plan for all GEMMs of a process."""

import re

import pytest
import torch

import k2kernels
from k2kernels.ops import fp8_gemm as ops
from k2kernels.ops.quant import quantize_1x128, quantize_128x128


@pytest.fixture
def pin(monkeypatch):
    def to(text):
        monkeypatch.setenv("K2KERNELS_FP8_GEMM", text)
        ops.pinned_plan.cache_clear()

    yield to
    to("")


def gemm():
    torch.manual_seed(0)
    a, b = quantize_1x128(torch.randn(3, 1280)), quantize_128x128(torch.randn(72, 1280))
    return k2kernels.fp8_gemm(*a, *b, out_dtype=torch.float32)


def forced(*plan):
    with ops.fp8_gemm_kernel(*plan):
        return gemm()


@pytest.mark.parametrize(
    "text, plan",
    [
        ("sm90_128x192", ("sm90_128x192", None, 1)),
        ("sm90_128x192,share=a", ("sm90_128x192", "a", 1)),
        ("sm90_small_8x64,split=4", ("sm90_small_8x64", None, 4)),
    ],
)
def test_a_pinned_plan_serves_every_gemm(text, plan, pin):
    """The bits tell the plan: parts of K are added in another order than the whole."""
    pin(text)
    assert ops.pinned_plan() == plan
    with k2kernels.emulated("sm_90a"):
        got, whole, parts = gemm(), forced("sm90_small_8x64"), forced("sm90_small_8x64", None, 4)  # blocks go first
        assert not torch.equal(whole, parts)
        assert torch.equal(got, parts if plan[2] == 4 else whole)


def test_it_reaches_the_launch(pin, monkeypatch):
    seen = []
    monkeypatch.setattr(ops, "launch", lambda *args, op: seen.append(args[-2]))
    with k2kernels.emulated("sm_90a"):
        gemm()
        pin("sm90_256x128,share=b")
        gemm()
        with ops.fp8_gemm_kernel("sm90_128x128", "a"):
            gemm()
    assert seen == [None, ("sm90_256x128", "b", 1), ("sm90_128x128", "a", 1)]


WRONG = {
    "sm90_128x192,shared=a": "must be KERNEL[,share=a|b][,split=1|2|4|8], such as sm90_128x192,share=a, got "
    "'sm90_128x192,shared=a'; unset it to let sizes choose",
    "sm90_128x192,share=a,share=b": "must be KERNEL",
    "sm90_small_8x64,split=two": "must be KERNEL",
    "sm90_small_8x64,split": "must be KERNEL",
    "sm90_small_8x64,": "must be KERNEL",
    " sm90_small_8x64": "kernel must be one of 'portable_128x128', ",
    ",share=a": "kernel must be one of ",
    "sm90_128x192,share=c": "share must be one of None, 'a', 'b', got 'c'",
    "sm90_small_8x64,split=3": "split must be one of 1, 2, 4, 8, got 3",
    "sm90_128x192,split=2": "split must be one of 1, got 2",
    "portable_64x128,share=a": "share must be one of None, got 'a'",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_plan_is_refused(text, pin):
    pin(text)
    with pytest.raises(ValueError, match=re.escape(f"K2KERNELS_FP8_GEMM: {WRONG[text]}")), k2kernels.emulated("sm_90a"):
        gemm()


def test_a_gpu_that_cannot_run_it_says_so(pin):
    pin("sm90_128x128")
    with k2kernels.emulated("sm_80"), pytest.raises(RuntimeError, match="sm90_128x128 does not run on this GPU, sm_80"):
        gemm()
