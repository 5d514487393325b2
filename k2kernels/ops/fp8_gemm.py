"""GEMMs of e4m3 operands with block scales: the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.ops._check import Arguments
from k2kernels.ops._register import register
from k2kernels.reference import fp8_gemm as reference

RESULTS = (torch.bfloat16, torch.float16, torch.float32)
E4M3 = torch.float8_e4m3fn


def fp8_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: Tensor | None = None,
    accumulate: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """D = A · Bᵀ (+ bias) (+ C) of block-scaled e4m3 matrices.

    Per 128 of K, the exact products are summed in float32, multiplied by (a_scale * b_scale) and added to the float32
    result in the order of K; then bias, then C; then one rounding to out_dtype.

    Args:
        a: [M, K] float8_e4m3fn.
        a_scales: [M, ceil(K/128)] float32, of `quantize_1x128`; row or column layout (any strides).
        b: [N, K] float8_e4m3fn: the weight, as a linear layer stores it.
        b_scales: float32, [ceil(N/128), ceil(K/128)] of `quantize_128x128`, or [N, ceil(K/128)] of `quantize_1x128`.
        out_dtype: bfloat16, float16 or float32.
        bias: [N], bfloat16, float16 or float32.
        accumulate: C [M, N], bfloat16, float16 or float32.
        out: [M, N] in out_dtype: written in place and returned. It may be `accumulate`.

    Returns:
        D [M, N]. M, N and K are free: none need be a multiple of 128, and any may be 0. Not differentiable.

    Source: DeepSeek-V3 (2024), section 3.3.2; DeepGEMM, fp8_gemm_nt.
    """
    args = Arguments("fp8_gemm")
    a = args.tensor("a", a, ("M", "K"), E4M3)
    b = args.tensor("b", b, ("N", "K"), E4M3)
    blocks = -(-args.sizes["K"] // 128)
    a_scales = args.tensor("a_scales", a_scales, ("M", blocks), torch.float32)
    b_scales = _b_scales(args, b, b_scales)
    bias = args.optional("bias", bias, ("N",), RESULTS)
    accumulate = args.optional("accumulate", accumulate, ("M", "N"), RESULTS)
    args.choice("out_dtype", out_dtype, RESULTS)
    if out is None:
        return _fp8_gemm(a, a_scales, b, b_scales, bias, accumulate, out_dtype)
    out = _out(args, out, ("M", "N"), out_dtype, (bias, accumulate))
    _fp8_gemm_out(a, a_scales, b, b_scales, bias, accumulate, out)
    return out


def _b_scales(args: Arguments, b: Tensor, b_scales: Tensor) -> Tensor:
    """Checks b_scales [..., N or ceil(N/128), ceil(K/128)] against b [..., N, K]."""
    b_scales = args.tensor("b_scales", b_scales, None, torch.float32)
    *leading, n, k = b.shape
    coarse, fine = [[*leading, rows, -(-k // 128)] for rows in (-(-n // 128), n)]
    args.require(
        list(b_scales.shape) in (coarse, fine),
        "b_scales",
        f"{coarse} (one scale per 128x128) or {fine} (per 1x128) for b {list(b.shape)}",
        list(b_scales.shape),
    )
    return b_scales


def _out(args: Arguments, out: Tensor, shape: tuple, out_dtype: torch.dtype, inputs: tuple) -> Tensor:
    out = args.tensor("out", out, shape, out_dtype, remedy="out_dtype= must name the dtype of out")
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, *inputs))
    args.require(
        not differentiated, "out", "used without autograd", "an argument with requires_grad", "use torch.no_grad()"
    )
    return out


_fp8_gemm = register(
    "fp8_gemm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? bias, Tensor? accumulate,"
    " ScalarType out_dtype) -> Tensor",
    reference=reference.fp8_gemm,
    fake=lambda a, a_scales, b, b_scales, bias, accumulate, out_dtype: a.new_empty(
        (a.shape[0], b.shape[0]), dtype=out_dtype
    ),
)
_fp8_gemm_out = register(
    "fp8_gemm_out(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? bias, Tensor? accumulate,"
    " Tensor(a!) out) -> ()",
    reference=reference.fp8_gemm_out,
    fake=lambda a, a_scales, b, b_scales, bias, accumulate, out: None,
    mutates=True,
)
