"""The expert MLP of a layer: dispatch, grouped GEMM, SwiGLU, grouped GEMM, combine.

T tokens, E experts, K experts per token, H hidden, I intermediate, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k2kernels.functional.fp8_linear import grouped_fp8_linear
from k2kernels.functional.w4_linear import TRAINED, grouped_w4_linear
from k2kernels.ops._check import FLOATS, Arguments
from k2kernels.ops.fp8_gemm import grouped_fp8_gemm, grouped_fp8_gemm_swiglu
from k2kernels.ops.grouped_gemm import multiply
from k2kernels.ops.moe import Routing, moe_combine, moe_dispatch
from k2kernels.ops.quant import QUANTIZABLE, swiglu
from k2kernels.ops.w4_gemm import W4
from k2kernels.ops.w4_gemm.packed import check_w4
from k2kernels.ops.w4_gemm.product import multiply as multiply_w4

_DENSE, _FP8, _W4 = "a tensor", "a pair (fp8, scales)", "a W4"  # kinds of weights


def expert_alignment(fp8: bool) -> int:
    """Rows at whose multiples each expert's slots should begin, for `moe_mlp(fp8=fp8)`.

    1 where weights are unquantised or codes of 8 or 4 bits: the grouped GEMMs take groups from any row on and read and
    write none of the padding, and an expert has as many tiles wherever it begins. At 128 Kimi-K2's 1,024 rows of a
    decoding step (128 tokens) would be spread over 46,000. 128 where the gradient of the weights is an FP8 product: it
    sums over tokens in blocks of 128 that share a scale, and a block across two experts would have to be copied. It
    does not depend on whether gradients are required, so that a recomputed pass has the bits of the first.
    """
    return 128 if fp8 else 1


def moe_mlp(
    x: Tensor,
    routing: Routing,
    gate_up: Tensor | tuple[Tensor, Tensor] | W4,
    down: Tensor | tuple[Tensor, Tensor] | W4,
    *,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
    alignment: int | None = None,
    capacity: int | None = None,
    power_of_two: bool = False,
    fp8: bool = False,
    out_dtype: torch.dtype | None = None,
    exchange: Any = None,
    w4: str | None = None,
    w4_packed: tuple[W4, W4] | None = None,
) -> Tensor:
    """The routed experts of a layer: sum over k of weights[t, k] * down_e (silu(gate_e x_t) * up_e x_t).

    e is indices[t, k]; the steps are dispatch, grouped GEMM, SwiGLU, grouped GEMM, combine.

    Args:
        x: [T, H], in the weights' dtype; bfloat16, float16 or float32 where the weights are FP8; bfloat16 where they
            are packed 4-bit weights.
        routing: what `moe_route` returned.
        gate_up: [E, 2I, H], gate rows first; float32, bfloat16, float16 or float64. Or FP8: a pair (float8_e4m3fn
            [E, 2I, H], float32 scales [E, ceil(2I/128), ceil(H/128)]), as `quantize_128x128` makes it. Or 4-bit: what
            `pack_w4(..., gated=True)` makes of codes of [E, 2I, H]; the result then has the bits of the one with the
            dequantised weights.
        down: [E, H, I], or (float8_e4m3fn [E, H, I], float32 [E, ceil(H/128), ceil(I/128)]), or a W4 of shape (E, H, I)
            that is not gated, like gate_up.
        shared, residual, out_dtype: as in `moe_combine`.
        alignment, capacity: as in `moe_dispatch`; an alignment of None is `expert_alignment(fp8)`.
        power_of_two: how activations are quantised for FP8 weights: once in dispatch, once after SwiGLU.
        fp8: multiply by `grouped_fp8_linear`: weights in high precision (x's dtype or not) are quantised on the fly,
            like activations and gradients. Then power_of_two is of them all.
        w4: "int4" or "mxfp4": multiply by `grouped_w4_linear`: weights in high precision are quantised to 4 bits on the
            fly, with straight-through gradients, x is bfloat16. The result has the bits of that with packed weights.
        w4_packed: with w4, the `packed` of `grouped_w4_linear` for gate_up (not gated) and down.
        exchange: what carries rows to experts that are elsewhere, and back: an object with `dispatch` and `combine`, as
            `k2kernels.parallel.ExpertParallel`. E of gate_up and down are then the experts that are here, and
            `capacity` is of the rows that arrive for them.

    Returns:
        [T, H] in out_dtype (x's by default). Differentiable in x, the routing weights, gate_up, down, shared and
        residual; with packed 4-bit weights in all but these (see `grouped_w4_gemm`), so that what stands before frozen
        experts can be trained; with FP8 weights, in the routing weights, shared and residual only.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and what the steps raise.

    Source: DeepSeek-V3 (2024), section 2.1.2.
    """
    args = Arguments("moe_mlp")
    kind = _kind(gate_up)
    args.require(_kind(down) == kind, "down", f"{kind} like gate_up", type(down).__name__)
    codes, packed = kind == _FP8, kind == _W4
    args.boolean("fp8", fp8)
    args.require(not fp8 or kind == _DENSE, "gate_up", "a tensor in high precision with fp8=True", kind)
    if w4 is not None:
        args.choice("w4", w4, TRAINED)
        args.require(kind == _DENSE, "gate_up", f"a tensor in high precision with w4={w4!r}", kind)
        args.require(not fp8, "w4", "None with fp8=True", repr(w4))
    args.require(w4_packed is None or w4 is not None, "w4_packed", "None without w4", type(w4_packed).__name__)
    if not isinstance(routing, tuple) or len(routing) < 2:
        raise TypeError(f"moe_mlp: routing must be what moe_route returned, got {type(routing).__name__}")
    for name, pair in (("gate_up", gate_up), ("down", down)) if codes else ():
        args.require(len(pair) == 2, name, "a pair (fp8, scales)", f"a {type(pair).__name__} of {len(pair)}")
    indices, weights = routing[:2]
    (gate_up, gate_up_scales), (down, down_scales) = (gate_up, down) if codes else ((gate_up, None), (down, None))
    x = args.tensor("x", x, ("T", "H"), torch.bfloat16 if packed or w4 else QUANTIZABLE if codes or fp8 else FLOATS)
    if packed:
        experts = _check_w4(args, gate_up, down)
    else:
        weight_dtype = torch.float8_e4m3fn if codes else QUANTIZABLE if fp8 or w4 else x.dtype
        gate_up = args.tensor("gate_up", gate_up, ("E", "2I", "H"), weight_dtype)
        experts, double, hidden = gate_up.shape
        args.require(double % 2 == 0, "gate_up", "even in its middle axis", gate_up.shape)
        args.sizes["I"] = double // 2
        down = args.tensor("down", down, ("E", "H", "I"), weight_dtype)
    if codes:
        blocks = [-(-size // 128) for size in (double, hidden, double // 2)]
        args.tensor("the scales of gate_up", gate_up_scales, (experts, *blocks[:2]), torch.float32)
        args.tensor("the scales of down", down_scales, (experts, *blocks[1:]), torch.float32)

    alignment = expert_alignment(fp8) if alignment is None else alignment
    scaling = dict(power_of_two=power_of_two, scale_layout="column")
    place = dict(alignment=alignment, capacity=capacity, quantize=codes, **scaling)
    if exchange is None:
        dispatched = moe_dispatch(x, indices, weights, num_experts=experts, **place)
    else:
        dispatched = exchange.dispatch(x, indices, weights, **place)
    data, scales, offsets, counts, handle = dispatched
    groups = dict(offsets=offsets, counts=counts)
    # An estimate: as many rows as this rank sends. How many arrived is known on the device only.
    expected = min(indices.numel(), data.shape[0])
    if codes:
        groups |= dict(expected_m=-(-expected // max(experts, 1)))
        inner, inner_scales = grouped_fp8_gemm_swiglu(data, scales, gate_up, gate_up_scales, **scaling, **groups)
        y = grouped_fp8_gemm(inner, inner_scales, down, down_scales, out_dtype=x.dtype, **groups)
    elif fp8:
        groups |= dict(alignment=alignment, power_of_two=power_of_two)
        inner = swiglu(grouped_fp8_linear(data, gate_up, **groups))
        y = grouped_fp8_linear(inner, down, **groups)
    elif w4:
        groups |= dict(kind=w4, expected=expected)
        of_gate_up, of_down = w4_packed or (None, None)
        inner = swiglu(grouped_w4_linear(data, gate_up, packed=of_gate_up, **groups))
        y = grouped_w4_linear(inner, down, packed=of_down, **groups)
    elif packed:
        inner = multiply_w4(data, gate_up, offsets, counts, True, expected)
        y = multiply_w4(inner, down, offsets, counts, False, expected)
    else:
        inner = swiglu(multiply(data, gate_up, offsets, counts, expected))
        y = multiply(inner, down, offsets, counts, expected)
    combine = moe_combine if exchange is None else exchange.combine
    return combine(y, handle, shared=shared, residual=residual, out_dtype=out_dtype)


def _kind(weight: Any) -> str:
    return _W4 if isinstance(weight, W4) else _FP8 if isinstance(weight, (tuple, list)) else _DENSE


def _check_w4(args: Arguments, gate_up: W4, down: W4) -> int:
    """The number of experts of packed weights, which fit each other and x."""
    for name, w, gated in (("gate_up", gate_up, True), ("down", down, False)):
        check_w4(args, name, w)
        args.require(w.gated == gated, name, f"packed with gated={gated}", f"gated={w.gated}")
    args.require(len(gate_up.shape) == 3, "the shape of gate_up", "(E, 2I, H)", lambda: list(gate_up.shape))
    (experts, double, hidden), x_hidden = gate_up.shape, args.sizes["H"]
    wanted = lambda: f"(E, 2I, H={x_hidden})"  # noqa: E731
    args.require(hidden == x_hidden, "the shape of gate_up", wanted, lambda: list(gate_up.shape))
    shape = experts, hidden, double // 2
    args.require(
        down.shape == shape, "the shape of down", lambda: f"(E, H, I) = {list(shape)}", lambda: list(down.shape)
    )
    return experts
