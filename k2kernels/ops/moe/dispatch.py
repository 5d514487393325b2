"""Mixture of experts: routing, load balance, dispatch, combine, and the expert MLP between them.

T tokens, E experts, K experts per token, H hidden, I intermediate, S slots: rows of the expert-major buffer that
dispatch fills and the grouped GEMMs read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments, check_cu_seqlens, check_groups
from k2kernels.ops._constants import constants
from k2kernels.ops._launch import TYPES, address, chip, launch_numbers as launch, matrices_numbers as matrices
from k2kernels.ops._register import register
from k2kernels.ops.fp8_gemm import E4M3, grouped_fp8_gemm, grouped_fp8_gemm_swiglu, grouped_fp8_linear
from k2kernels.ops.quant import QUANTIZABLE, empty_scales, swiglu
from k2kernels.reference import moe as reference
from k2kernels.reference._numeric import wide_dtype

INDICES = (torch.int32, torch.int64)


class Routing(NamedTuple):
    """What `moe_route` returns."""

    indices: Tensor  # int32 [T, K], by descending choice
    weights: Tensor  # float32 (float64 for float64 logits) [T, K]
    counts: Tensor  # int64 [E]: how often each expert was taken


class Handle(NamedTuple):
    """Where dispatch put the rows, for `moe_combine`. Tensors only, so that it passes through torch.compile."""

    slot_of: Tensor  # int32 [T, K]: the slot of each (token, k), -1 where it has none
    token_of_slot: Tensor  # int32 [S]: the token in each slot, -1 in pad slots
    offsets: Tensor  # int32 [E+1]
    counts: Tensor  # int32 [E]
    weights: Tensor  # [T, K]
    overflow: Tensor  # int64 []: pairs dropped for want of capacity


class Dispatched(NamedTuple):
    """What `moe_dispatch` returns."""

    data: Tensor  # [S, H], expert-major
    scales: Tensor | None  # float32, when quantised
    offsets: Tensor  # int32 [E+1]: first slot of each expert, a multiple of the alignment; last: all slots in use
    counts: Tensor  # int32 [E]: rows of each expert; slots offsets[e] + counts[e] ... offsets[e+1] are padding
    handle: Handle


def moe_route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    score: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Chooses `top_k` experts for each token.

    With s = sigmoid(logits) or softmax(logits), a token takes the top_k experts of largest s + bias; the bias steers
    the choice only, the weights are made of s. With groups, the E experts are n_group equal runs, and only experts of
    the topk_group best groups can be taken. A group is as good as the sum of its two best s + bias; without a bias, as
    its best s.

    Args:
        logits: [T, E], float32, bfloat16, float16 or float64; computed in float32 (float64 for float64).
        bias: float32 or float64 [E], or None. No gradient flows to it.
        score: "sigmoid" (DeepSeek-V3, Kimi-K2) or "softmax" (DeepSeek-V2).
        normalize: divides each token's weights by their sum (+ 1e-20).
        scale: multiplies the weights (routed_scaling_factor).

    Returns:
        Routing(indices int32 [T, K], weights [T, K] float32 (float64 for float64 logits), counts int64 [E]).
        indices stand in descending order of s + bias; equals go to the lowest index. Experts whose logit is NaN or -inf
        have score 0 and are taken only when no other is left, so K distinct experts come out of every row; +inf counts
        as the largest finite number. Differentiable in logits.

    Raises:
        TypeError, ValueError: for dtypes and shapes, when n_group does not divide E, or when the kept groups hold fewer
            than top_k experts.

    Source: DeepSeek-V3 `inference/model.py` (class Gate), and the routers of Megatron-LM.
    """
    args = Arguments("moe_route")
    logits = args.tensor("logits", logits, ("T", "E"), FLOATS)
    bias = args.optional("bias", bias, ("E",), (torch.float32, torch.float64), remedy="keep the bias in float32")
    experts = logits.shape[1]
    args.choice("score", score, ("sigmoid", "softmax"))
    for name, value in (("top_k", top_k), ("n_group", n_group), ("topk_group", topk_group)):
        args.integer(name, value, 1)
    args.boolean("normalize", normalize)
    scale = args.number("scale", scale)
    args.require(top_k <= experts, "top_k", lambda: f"from 1 to E={experts}", top_k)
    args.require(experts % n_group == 0, "n_group", lambda: f"a divisor of E={experts}", n_group)
    args.require(topk_group <= n_group, "topk_group", lambda: f"from 1 to n_group={n_group}", topk_group)
    kept = topk_group * (experts // n_group)
    args.require(
        top_k <= kept, "top_k", lambda: f"at most the {kept} experts of the kept groups", top_k, "raise topk_group"
    )
    # The op returns the weights first: PyTorch's opcheck adds up the outputs and wants a float to begin with.
    weights, indices, counts = _moe_route(logits, bias, top_k, n_group, topk_group, score, normalize, scale)
    return Routing(indices, weights, counts)


def moe_sequence_loss(
    logits: Tensor,
    indices: Tensor,
    *,
    top_k: int,
    alpha: float,
    cu_seqlens: Tensor | None = None,
    score: str = "sigmoid",
) -> Tensor:
    """The sequence-wise balance loss: alpha * mean over sequences of sum_e f_e P_e.

    In a sequence of L tokens, f_e = E / (K L) * (number of its `indices` equal to e) and P_e = mean over its tokens of
    s_e / sum(s), with s the scores of the logits. Balanced routing gives alpha. Nothing else is scaled: not by the
    batch, not by ranks.

    Args:
        logits: [T, E], as in `moe_route`.
        indices: int32 or int64 [T, K]. They are counted as given. DeepSeek-V3 counts the choice without the bias: for
            that, pass `moe_route(logits, top_k=K).indices`. Index -1 is not counted.
        top_k: K.
        cu_seqlens: int32 or int64 [B+1], from 0 to T: where each of B sequences begins and ends; None is one
            sequence. Empty sequences do not count in the mean.
        score: as in `moe_route`.

    Returns:
        A float32 scalar (float64 for float64 logits), 0 for T=0; differentiable in logits through P.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and, on a CPU, for indices below -1 or from E on, or for
            cu_seqlens that do not rise from 0 to T.

    Source: DeepSeek-V3 report (arXiv 2412.19437), equations 17 to 20.
    """
    args = Arguments("moe_sequence_loss")
    logits = args.tensor("logits", logits, ("T", "E"), FLOATS)
    indices = args.tensor("indices", indices, ("T", "K"), INDICES)
    cu_seqlens = args.optional("cu_seqlens", cu_seqlens, ("B+1",), INDICES)
    args.choice("score", score, ("sigmoid", "softmax"))
    args.integer("top_k", top_k, 1)
    args.require(top_k == indices.shape[1], "top_k", lambda: f"the width of indices, {indices.shape[1]}", top_k)
    alpha = args.number("alpha", alpha)
    args.require(cu_seqlens is None or cu_seqlens.numel() > 0, "cu_seqlens", "at least [0]", "an empty tensor")
    return _moe_sequence_loss(logits, indices, cu_seqlens, alpha, score)


def moe_update_bias(bias: Tensor, counts: Tensor, *, rate: float, mode: str = "sign") -> Tensor:
    """One step of the router bias against the load: busy experts down, idle ones up. Not in place.

    Args:
        bias: float32 [E].
        counts: int32 or int64 [E], the load of one global batch: `Routing.counts`, summed over micro-batches and ranks
            *as integers* (in bfloat16 40,840 reads as 40,704 or 41,216, which flips signs).
        rate: the largest step.
        mode: "sign": rate * sign(mean(counts) - count), 0 at the mean (DeepSeek-V3).
            "quantile": rate * (experts busier - experts idler) / (E - 1): a step by the load's rank among all loads,
            from -rate for the busiest to rate for the idlest, 0 for the median and for equal loads. The steps add up
            to 0, so the bias does not drift as a whole. It sees counts only; it is not the score-histogram solve of
            Kimi-K3.

    Returns:
        The new bias, float32 [E]. Comparisons are made in integers and are exact, for loads below 2**63 / E.

    Raises:
        TypeError, ValueError: for dtypes (a bias not in float32, counts not integers), shapes and mode.

    Source: Wang et al., "Auxiliary-Loss-Free Load Balancing" (arXiv 2408.15664).
    """
    args = Arguments("moe_update_bias")
    bias = args.tensor("bias", bias, ("E",), torch.float32, remedy="keep the bias in float32")
    counts = args.tensor("counts", counts, ("E",), INDICES, remedy="count in integers")
    args.choice("mode", mode, ("sign", "quantile"))
    return _moe_update_bias(bias, counts, args.number("rate", rate), mode)


def moe_dispatch(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    num_experts: int,
    alignment: int = 1,
    quantize: bool = False,
    power_of_two: bool = False,
    scale_layout: str = "row",
    capacity: int | None = None,
) -> Dispatched:
    """Copies each token's row to a slot of each of its experts.

    Slots are ordered by expert, then token, then k (a stable counting sort: they depend on `indices` alone), and each
    expert's slots begin at a multiple of `alignment`. Shapes depend on shapes only, so nothing waits for the device.

    Args:
        x: [T, H], float32, bfloat16, float16 or float64 (no float64 with `quantize`).
        indices: int32 or int64 [T, K]; -1 drops that pair. The same expert twice in a row is allowed.
        weights: [T, K], floating point; kept in the handle for `moe_combine`.
        num_experts: E.
        alignment: rows; 128 suits tiles of 128, 1 wastes nothing.
        quantize: the rows become e4m3 codes with scales, as `quantize_1x128(x)` makes them.
        power_of_two, scale_layout: as in `quantize_1x128`.
        capacity: S, a multiple of the alignment. Pairs whose slot would be S or above are dropped, and their number is
            `handle.overflow`. None takes T K + min(E, T K) (alignment - 1), rounded up, which always suffices.

    Returns:
        Dispatched(data [S, H], scales, offsets int32 [E+1], counts int32 [E], handle). Rows of `data` beyond
        offsets[e] + counts[e] are padding, with unspecified content, like their scales. scales is None, or float32
        [S, ceil(H/128)]. Differentiable in x unless quantised; the weights get their gradient from `moe_combine`.

    Raises:
        TypeError, ValueError: for dtypes, shapes and options, for a capacity of 2**31 slots or more, and, on a CPU, for
            an index below -1 or from E on (a kernel drops such a pair).

    Source: DeepGEMM (the grouped layout); HybridEP (a capacity known beforehand, overflow counted).
    """
    args = Arguments("moe_dispatch")
    args.boolean("quantize", quantize)
    x = args.tensor("x", x, ("T", "H"), QUANTIZABLE if quantize else FLOATS)
    indices = args.tensor("indices", indices, ("T", "K"), INDICES)
    weights = args.tensor("weights", weights, ("T", "K"), FLOATS)
    args.integer("num_experts", num_experts, 1)
    args.integer("alignment", alignment, 1)
    args.boolean("power_of_two", power_of_two)
    args.choice("scale_layout", scale_layout, ("row", "column"))
    if capacity is not None:
        args.integer("capacity", capacity, 0)
    else:
        pairs = indices.shape[0] * indices.shape[1]
        capacity = pairs + min(num_experts, pairs) * (alignment - 1)
        capacity = (capacity + alignment - 1) // alignment * alignment
    args.require(capacity % alignment == 0, "capacity", lambda: f"a multiple of alignment={alignment}", capacity)
    args.require(capacity < 2**31, "capacity", "below 2**31 slots", capacity, "dispatch fewer tokens at a time")
    place = num_experts, alignment, capacity
    if quantize:
        data, scales, *plan = _moe_dispatch_quantize(x, indices, *place, power_of_two, scale_layout)
    else:
        scales, (data, *plan) = None, _moe_dispatch(x, indices, *place)
    slot_of, token_of_slot, offsets, counts, overflow = plan
    handle = Handle(slot_of, token_of_slot, offsets, counts, weights, overflow)
    return Dispatched(data, scales, offsets, counts, handle)


def moe_combine(
    y: Tensor,
    handle: Handle,
    *,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Adds up each token's expert rows: sum over k of weights[t, k] * y[slot_of[t, k]] + shared[t] + residual[t].

    The sum is made in float32 (float64 for float64), in the order of k, then shared, then residual, and rounded once:
    it is deterministic, and a token's bits do not depend on the other tokens.

    Args:
        y: [S, H], in the slots of `moe_dispatch`; pad rows are not read.
        handle: `Dispatched.handle`.
        shared, residual: [T, H], floating point.
        out_dtype: y's by default.

    Returns:
        [T, H]; a token without slots gets shared + residual only. Differentiable in y, the weights, shared, residual.

    Raises:
        TypeError, ValueError: for dtypes and shapes, for a handle that is not `moe_dispatch`'s, and, on a CPU, for
            slots and tokens in it that do not exist.
    """
    args = Arguments("moe_combine")
    if not isinstance(handle, Handle):
        raise TypeError(f"moe_combine: handle must be the handle of moe_dispatch, got {type(handle).__name__}")
    slot_of = args.tensor("handle.slot_of", handle.slot_of, ("T", "K"), torch.int32)
    token_of_slot = args.tensor("handle.token_of_slot", handle.token_of_slot, ("S",), torch.int32)
    weights = args.tensor("handle.weights", handle.weights, ("T", "K"), FLOATS)
    y = args.tensor("y", y, ("S", "H"), FLOATS)
    shared = args.optional("shared", shared, ("T", "H"), FLOATS)
    residual = args.optional("residual", residual, ("T", "H"), FLOATS)
    out_dtype = args.choice("out_dtype", y.dtype if out_dtype is None else out_dtype, FLOATS)
    return _moe_combine(y, slot_of, token_of_slot, weights, shared, residual, out_dtype)


def expert_alignment(fp8: bool) -> int:
    """Rows at whose multiples each expert's slots should begin, for `moe_mlp(fp8=fp8)`.

    1 where weights are unquantised or FP8 codes: the grouped GEMMs take groups from any row on and read and write none
    of the padding, and an expert has as many tiles wherever it begins. At 128 Kimi-K2's 1,024 rows of a decoding step
    (128 tokens) would lie among 46,000. 128 where the gradient of the weights is an FP8 product: it sums over tokens in
    blocks of 128 that share a scale, and a block across two experts would have to be copied. It does not depend on
    whether gradients are wanted, so that a recomputed pass has the bits of the first.
    """
    return 128 if fp8 else 1


def moe_mlp(
    x: Tensor,
    routing: Routing,
    gate_up: Tensor | tuple[Tensor, Tensor],
    down: Tensor | tuple[Tensor, Tensor],
    *,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
    alignment: int | None = None,
    capacity: int | None = None,
    power_of_two: bool = False,
    fp8: bool = False,
    out_dtype: torch.dtype | None = None,
    exchange: Any = None,
) -> Tensor:
    """The routed experts of a layer: sum over k of weights[t, k] * down_e (silu(gate_e x_t) * up_e x_t).

    e is indices[t, k]; the steps are dispatch, grouped GEMM, SwiGLU, grouped GEMM, combine.

    Args:
        x: [T, H], in the weights' dtype; bfloat16, float16 or float32 where the weights are FP8.
        routing: what `moe_route` returned.
        gate_up: [E, 2I, H], gate rows first; float32, bfloat16, float16 or float64. Or FP8: a pair (float8_e4m3fn
            [E, 2I, H], float32 scales [E, ceil(2I/128), ceil(H/128)]), as `quantize_128x128` makes it.
        down: [E, H, I], or (float8_e4m3fn [E, H, I], float32 [E, ceil(H/128), ceil(I/128)]), like gate_up.
        shared, residual, out_dtype: as in `moe_combine`.
        alignment, capacity: as in `moe_dispatch`; an alignment of None is `expert_alignment(fp8)`.
        power_of_two: how activations are quantised for FP8 weights: once in dispatch, once after SwiGLU.
        fp8: multiply by `grouped_fp8_linear`: weights in high precision (x's dtype or not) are quantised on the fly,
            like activations and gradients. Then power_of_two is of them all.
        exchange: what carries rows to experts that are elsewhere, and back: an object with `dispatch` and `combine`, as
            `k2kernels.parallel.ExpertParallel`. E of gate_up and down are then the experts that are here, and
            `capacity` is of the rows that arrive for them.

    Returns:
        [T, H] in out_dtype (x's by default). Differentiable in x, the routing weights, gate_up, down, shared and
        residual; with FP8 weights, in the routing weights, shared and residual only.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and what the steps raise.

    Source: DeepSeek-V3 (2024), section 2.1.2.
    """
    args = Arguments("moe_mlp")
    codes = isinstance(gate_up, (tuple, list))
    args.require(
        isinstance(down, (tuple, list)) == codes,
        "down",
        "a pair (fp8, scales) like gate_up" if codes else "a tensor like gate_up",
        type(down).__name__,
    )
    args.boolean("fp8", fp8)
    args.require(not (fp8 and codes), "gate_up", "a tensor in high precision with fp8=True", "a pair (fp8, scales)")
    if not isinstance(routing, tuple) or len(routing) < 2:
        raise TypeError(f"moe_mlp: routing must be what moe_route returned, got {type(routing).__name__}")
    for name, pair in (("gate_up", gate_up), ("down", down)) if codes else ():
        args.require(len(pair) == 2, name, "a pair (fp8, scales)", f"a {type(pair).__name__} of {len(pair)}")
    indices, weights = routing[:2]
    (gate_up, gate_up_scales), (down, down_scales) = (gate_up, down) if codes else ((gate_up, None), (down, None))
    x = args.tensor("x", x, ("T", "H"), QUANTIZABLE if codes or fp8 else FLOATS)
    weight_dtype = E4M3 if codes else QUANTIZABLE if fp8 else x.dtype
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
    # As many rows as this rank sends out are expected here; the host does not know how many came.
    expected = min(indices.numel(), data.shape[0])
    if codes:
        groups |= dict(expected_m=-(-expected // max(experts, 1)))
        inner, inner_scales = grouped_fp8_gemm_swiglu(data, scales, gate_up, gate_up_scales, **scaling, **groups)
        y = grouped_fp8_gemm(inner, inner_scales, down, down_scales, out_dtype=x.dtype, **groups)
    elif fp8:
        groups |= dict(alignment=alignment, power_of_two=power_of_two)
        inner = swiglu(grouped_fp8_linear(data, gate_up, **groups))
        y = grouped_fp8_linear(inner, down, **groups)
    else:
        inner = swiglu(_grouped_gemm(data, gate_up, offsets, counts, expected))
        y = _grouped_gemm(inner, down, offsets, counts, expected)
    combine = moe_combine if exchange is None else exchange.combine
    return combine(y, handle, shared=shared, residual=residual, out_dtype=out_dtype)


Rows = tuple[int, int, int]  # what the kernels are told of a matrix: address, type, stride of its rows


def _rows(x: Tensor | None) -> tuple[Tensor | None, Rows]:
    """A matrix whose columns are neighbours, copied only if they are not, and where its rows are."""
    if x is None:
        return None, (0, 0, 0)
    x, _, (_, row_stride) = matrices(x)
    return x, (x.data_ptr(), TYPES[x.dtype], row_stride)


class Arrival(NamedTuple):
    """Of rows that came from other ranks into a buffer of two halves: which one holds them, and which rows exist."""

    half: Tensor  # int32 [1]
    stride: int  # elements from the first half to the second
    told: Tensor | None = None  # int32 [W]: of W equal runs of rows, how many exist; None: all

    def numbers(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Half and told as the kernels take them; zeros for none."""
        told = (0, 0) if self.told is None else (self.told.data_ptr(), self.told.shape[0])
        return (self.half.data_ptr(), self.stride), told


def _float32(x: Tensor | None) -> Tensor | None:
    """Contiguous, in float32: mostly as it is."""
    if x is None:
        return None
    return (x if x.dtype == torch.float32 else x.float()).contiguous()


def _too_much(top_k: int, *, experts: int = 1, groups: int = 1, float64: bool) -> str | None:
    """What no kernel serves."""
    if float64:
        return "no kernel computes in float64"
    if experts > constants.MOE_MOST_EXPERTS:
        return f"the kernels take up to {constants.MOE_MOST_EXPERTS} experts"
    if top_k > constants.MOE_MOST_TOP_K:
        return f"the kernels take up to {constants.MOE_MOST_TOP_K} experts for a token"
    if groups > constants.MOE_MOST_GROUPS:
        return f"the kernel takes up to {constants.MOE_MOST_GROUPS} groups"
    return None


# moe_route


def _route_fake(logits: Tensor, bias: Any, top_k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    return (
        logits.new_empty(tokens, top_k, dtype=wide_dtype(logits.dtype)),
        logits.new_empty(tokens, top_k, dtype=torch.int32),
        logits.new_empty(experts, dtype=torch.int64),
    )


def _route_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.rest = inputs[5:]  # score, normalize, scale


def _route_grad(ctx: Any, grad: Tensor, _indices: None, _counts: None) -> tuple:
    return (_moe_route_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 7)


def _route_kernel(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    score: str,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    weights, indices, counts = _route_fake(logits, bias, top_k)
    tokens, experts = logits.shape
    if tokens > constants.MOE_ROUTE_WARPS:
        counts.zero_()  # several blocks will add to them; one writes them
    logits, rows = _rows(logits)
    bias = _float32(bias)
    launch(
        "moe_route",
        "moe_route",
        logits.device,
        rows,
        address(bias),
        (tokens, experts, top_k),
        (n_group, topk_group),
        score == "softmax",
        normalize,
        scale,
        indices.data_ptr(),
        weights.data_ptr(),
        counts.data_ptr(),
    )
    return weights, indices, counts


def _route_unserved(logits: Tensor, bias: Tensor | None, top_k: int, n_group: int, *_: Any) -> str | None:
    return _too_much(top_k, experts=logits.shape[1], groups=n_group, float64=logits.dtype == torch.float64)


def _route_backward_kernel(
    grad: Tensor, logits: Tensor, indices: Tensor, score: str, normalize: bool, scale: float
) -> Tensor:
    d_logits = logits.new_empty(logits.shape)
    (tokens, experts), top_k = logits.shape, indices.shape[1]
    grad, indices = _float32(grad), indices.contiguous()
    logits, rows = _rows(logits)
    launch(
        "moe_route_backward",
        "moe_route_backward",
        logits.device,
        grad.data_ptr(),
        rows,
        indices.data_ptr(),
        d_logits.data_ptr(),
        (tokens, experts, top_k),
        score == "softmax",
        normalize,
        scale,
    )
    return d_logits


_moe_route = register(
    "moe_route(Tensor logits, Tensor? bias, int top_k, int n_group, int topk_group, str score, bool normalize, "
    "float scale) -> (Tensor weights, Tensor indices, Tensor counts)",
    reference=reference.moe_route,
    fake=_route_fake,
    kernel=_route_kernel,
    unserved=_route_unserved,
    setup_context=_route_setup,
    backward=_route_grad,
)
_moe_route_backward = register(
    "moe_route_backward(Tensor grad, Tensor logits, Tensor indices, str score, bool normalize, float scale) -> Tensor",
    reference=reference.moe_route_backward,
    fake=lambda grad, logits, *_: logits.new_empty(logits.shape),
    kernel=_route_backward_kernel,
    unserved=lambda grad, logits, indices, *_: _too_much(
        indices.shape[1], experts=logits.shape[1], float64=logits.dtype == torch.float64
    ),
)


# moe_sequence_loss


def _loss_validate(logits: Tensor, indices: Tensor, cu_seqlens: Tensor | None, alpha: float, score: str) -> None:
    _check_indices("moe_sequence_loss", indices, logits.shape[1])
    if cu_seqlens is not None:
        check_cu_seqlens("moe_sequence_loss", "cu_seqlens", cu_seqlens, logits.shape[0])


def _loss_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


def _loss_grad(ctx: Any, grad: Tensor) -> tuple:
    return (_moe_sequence_loss_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 4)


def _loss_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((), dtype=wide_dtype(logits.dtype))


def _launch_loss(
    op: str,
    logits: Tensor,
    indices: Tensor,
    cu_seqlens: Tensor | None,
    alpha: float,
    score: str,
    *,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
    d_logits: Tensor | None = None,
) -> None:
    (tokens, experts), top_k = logits.shape, indices.shape[1]
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    hits = logits.new_zeros((sequences, experts), dtype=torch.int32)
    sums = None if loss is None else logits.new_empty(constants.MOE_LOSS_BLOCKS, dtype=torch.float32)
    (logits, rows), indices = _rows(logits), indices.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    launch(
        op,
        "moe_sequence_loss",
        logits.device,
        rows,
        (indices.data_ptr(), indices.dtype == torch.int64),
        (address(cu_seqlens), cu_seqlens is not None and cu_seqlens.dtype == torch.int64),
        (tokens, sequences, experts, top_k),
        alpha,
        score == "softmax",
        (hits.data_ptr(), address(sums)),
        address(loss),
        (address(grad), address(d_logits)),
    )


def _loss_kernel(logits: Tensor, *args: Any) -> Tensor:
    loss = _loss_fake(logits)
    _launch_loss("moe_sequence_loss", logits, *args, loss=loss)
    return loss


def _loss_unserved(logits: Tensor, indices: Tensor, cu_seqlens: Tensor | None, *_: Any) -> str | None:
    if indices.numel() >= 2**31:
        return "the kernels count fewer than 2**31 pairs (token, k)"
    if logits.shape[0] > 0 and cu_seqlens is not None and cu_seqlens.shape[0] < 2:
        return "there are tokens, but no sequence"
    return "no kernel computes in float64" if logits.dtype == torch.float64 else None


def _loss_backward_kernel(grad: Tensor, logits: Tensor, *args: Any) -> Tensor:
    d_logits = logits.new_empty(logits.shape)
    _launch_loss("moe_sequence_loss_backward", logits, *args, grad=_float32(grad), d_logits=d_logits)
    return d_logits


_moe_sequence_loss = register(
    "moe_sequence_loss(Tensor logits, Tensor indices, Tensor? cu_seqlens, float alpha, str score) -> Tensor",
    reference=reference.moe_sequence_loss,
    fake=_loss_fake,
    kernel=_loss_kernel,
    unserved=_loss_unserved,
    validate=_loss_validate,
    setup_context=_loss_setup,
    backward=_loss_grad,
)
_moe_sequence_loss_backward = register(
    "moe_sequence_loss_backward(Tensor grad, Tensor logits, Tensor indices, Tensor? cu_seqlens, float alpha, str score)"
    " -> Tensor",
    reference=reference.moe_sequence_loss_backward,
    fake=lambda grad, logits, *_: logits.new_empty(logits.shape),
    kernel=_loss_backward_kernel,
    unserved=lambda grad, *args: _loss_unserved(*args),
)


# moe_update_bias


def _update_bias_kernel(bias: Tensor, counts: Tensor, rate: float, mode: str) -> Tensor:
    result = bias.new_empty(bias.shape)
    bias, counts = bias.contiguous(), counts.contiguous()
    launch(
        "moe_update_bias",
        "moe_update_bias",
        bias.device,
        bias.data_ptr(),
        (counts.data_ptr(), counts.dtype == torch.int64),
        bias.shape[0],
        rate,
        mode == "quantile",
        result.data_ptr(),
    )
    return result


_moe_update_bias = register(
    "moe_update_bias(Tensor bias, Tensor counts, float rate, str mode) -> Tensor",
    reference=reference.moe_update_bias,
    fake=lambda bias, *_: bias.new_empty(bias.shape),
    kernel=_update_bias_kernel,
    unserved=lambda bias, *_: _too_much(0, experts=bias.shape[0], float64=False),
)


# moe_dispatch


def _dispatch_validate(x: Tensor, indices: Tensor, num_experts: int, *_: Any) -> None:
    _check_indices("moe_dispatch", indices, num_experts)


def _plan_fake(indices: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, ...]:
    """Empty slot_of, token_of_slot, offsets, counts, overflow."""

    empty, int32 = indices.new_empty, torch.int32
    return (
        empty(*indices.shape, dtype=int32),
        empty(capacity, dtype=int32),
        empty(num_experts + 1, dtype=int32),
        empty(num_experts, dtype=int32),
        empty((), dtype=torch.int64),
    )


def _dispatch_fake(x: Tensor, indices: Tensor, num_experts: int, alignment: int, capacity: int) -> tuple[Tensor, ...]:
    return x.new_empty(capacity, x.shape[1]), *_plan_fake(indices, num_experts, capacity)


def _dispatch_quantize_fake(
    x: Tensor,
    indices: Tensor,
    num_experts: int,
    alignment: int,
    capacity: int,
    power_of_two: bool,
    scale_layout: str,
) -> tuple[Tensor, ...]:
    hidden = x.shape[1]
    scales = empty_scales(x, (capacity, -(-hidden // 128)), scale_layout)
    return x.new_empty(capacity, hidden, dtype=E4M3), scales, *_plan_fake(indices, num_experts, capacity)


def _launch_dispatch(
    op: str,
    x: Tensor,
    indices: Tensor,
    num_experts: int,
    alignment: int,
    capacity: int,
    data: Tensor,
    scales: Tensor | None,
    power_of_two: bool,
    plan: tuple[Tensor, ...],
    arrival: Arrival | None = None,
) -> None:
    (tokens, top_k), hidden = indices.shape, x.shape[1]
    x, rows = _rows(x)
    indices = indices.contiguous()
    ranks = before_tile = None
    if (pairs := tokens * top_k) > (tile := constants.MOE_PLAN_TILE):
        ranks = indices.new_empty(pairs, dtype=torch.int16)
        before_tile = indices.new_empty((-(-pairs // tile), num_experts), dtype=torch.int32)
    launch(
        op,
        "moe_dispatch",
        x.device,
        rows,
        *(((0, 0), (0, 0)) if arrival is None else arrival.numbers()),
        indices.data_ptr(),
        indices.dtype == torch.int64,
        (tokens, top_k, hidden, num_experts),
        alignment,
        capacity,
        data.data_ptr(),
        scales is not None,
        power_of_two,
        address(scales),
        (0, 0) if scales is None else scales.stride(),
        tuple(map(Tensor.data_ptr, plan)),
        (address(ranks), address(before_tile)),
    )


def _dispatch_kernel(
    x: Tensor, indices: Tensor, num_experts: int, alignment: int, capacity: int, arrival: Arrival | None = None
) -> tuple[Tensor, ...]:
    data, *plan = _dispatch_fake(x, indices, num_experts, alignment, capacity)
    _launch_dispatch("moe_dispatch", x, indices, num_experts, alignment, capacity, data, None, False, plan, arrival)
    return data, *plan


def _dispatch_quantize_kernel(
    x: Tensor,
    indices: Tensor,
    num_experts: int,
    alignment: int,
    capacity: int,
    power_of_two: bool,
    scale_layout: str,
) -> tuple[Tensor, ...]:
    data, scales, *plan = _dispatch_quantize_fake(
        x, indices, num_experts, alignment, capacity, power_of_two, scale_layout
    )
    place = num_experts, alignment, capacity
    _launch_dispatch("moe_dispatch_quantize", x, indices, *place, data, scales, power_of_two, plan)
    return data, scales, *plan


def _dispatch_unserved(x: Tensor, indices: Tensor, num_experts: int, alignment: int, *_: Any) -> str | None:
    if indices.numel() >= 2**31 or alignment >= 2**31:
        return "the kernels take fewer than 2**31 pairs (token, k), and such an alignment"
    return _too_much(indices.shape[1], experts=num_experts, float64=x.dtype == torch.float64)


def _dispatch_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[1:3])  # slot_of, token_of_slot


def _dispatch_grad(ctx: Any, grad: Tensor, *_: None) -> tuple:
    return _moe_combine(grad, *ctx.saved_tensors, None, None, None, grad.dtype), *[None] * 4


_PLAN = "Tensor slot_of, Tensor token_of_slot, Tensor offsets, Tensor counts, Tensor overflow"
_moe_dispatch = register(
    "moe_dispatch(Tensor x, Tensor indices, SymInt num_experts, SymInt alignment, SymInt capacity) -> "
    f"(Tensor data, {_PLAN})",
    reference=reference.moe_dispatch,
    fake=_dispatch_fake,
    kernel=_dispatch_kernel,
    unserved=_dispatch_unserved,
    validate=_dispatch_validate,
    setup_context=_dispatch_setup,
    backward=_dispatch_grad,
)
_moe_dispatch_quantize = register(
    "moe_dispatch_quantize(Tensor x, Tensor indices, SymInt num_experts, SymInt alignment, SymInt capacity, "
    f"bool power_of_two, str scale_layout) -> (Tensor data, Tensor scales, {_PLAN})",
    reference=reference.moe_dispatch_quantize,
    fake=_dispatch_quantize_fake,
    kernel=_dispatch_quantize_kernel,
    unserved=_dispatch_unserved,
    validate=_dispatch_validate,
)


# moe_permute: rows to the slots of a handle, the gradient of a combine without weights


def _permute_kernel(x: Tensor, slot_of: Tensor, token_of_slot: Tensor, arrival: Arrival | None = None) -> Tensor:
    data = x.new_empty((token_of_slot.shape[0], x.shape[1]))
    _launch_combine_backward("moe_permute", x, None, slot_of, token_of_slot, None, data, None, arrival)
    return data


def _permute_unserved(x: Tensor, slot_of: Tensor, token_of_slot: Tensor) -> str | None:
    return _too_much(slot_of.shape[1], float64=x.dtype == torch.float64)


def _permute_grad(ctx: Any, grad: Tensor) -> tuple:
    return _moe_combine(grad, *ctx.saved_tensors, None, None, None, grad.dtype), None, None


_moe_permute = register(
    "moe_permute(Tensor x, Tensor slot_of, Tensor token_of_slot) -> Tensor",
    reference=reference.moe_permute,
    fake=lambda x, slot_of, token_of_slot: x.new_empty((token_of_slot.shape[0], x.shape[1])),
    kernel=_permute_kernel,
    unserved=_permute_unserved,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
    backward=_permute_grad,
)


# moe_combine


def _combine_validate(y: Tensor, slot_of: Tensor, token_of_slot: Tensor, *_: Any) -> None:
    for name, places, count in (("slot_of", slot_of, y.shape[0]), ("token_of_slot", token_of_slot, slot_of.shape[0])):
        low, high = (int(i) for i in places.aminmax()) if places.numel() else (-1, -1)
        if low < -1 or high >= count:
            raise ValueError(
                f"moe_combine: handle.{name} must be from -1 (none) to {count - 1}, got {low if low < -1 else high}; "
                "pass the handle of moe_dispatch as it is"
            )


def _combine_fake(y: Tensor, slot_of: Tensor, *args: Any) -> Tensor:
    return y.new_empty(slot_of.shape[0], y.shape[1], dtype=args[-1])


def _combine_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, slot_of, token_of_slot, weights, shared, residual, _ = inputs
    ctx.save_for_backward(y if weights is not None else None, slot_of, token_of_slot, weights)
    ctx.dtypes = [
        y.dtype,
        shared.dtype if shared is not None else None,
        residual.dtype if residual is not None else None,
    ]


def _combine_grad(ctx: Any, grad: Tensor) -> tuple:
    y, slot_of, token_of_slot, weights = ctx.saved_tensors
    y_dtype, shared_dtype, residual_dtype = ctx.dtypes
    d_weights = None
    if weights is None:
        d_y = _moe_permute(grad.to(y_dtype), slot_of, token_of_slot)
    else:
        d_y, d_weights = _moe_combine_backward(grad, y, slot_of, token_of_slot, weights)
    d_shared = grad.to(shared_dtype) if ctx.needs_input_grad[4] else None
    d_residual = grad.to(residual_dtype) if ctx.needs_input_grad[5] else None
    return d_y, None, None, d_weights, d_shared, d_residual, None


def _combine_kernel(
    y: Tensor,
    slot_of: Tensor,
    token_of_slot: Tensor,
    weights: Tensor | None,
    shared: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    arrival: Arrival | None = None,
) -> Tensor:
    out = _combine_fake(y, slot_of, out_dtype)
    (slots, hidden), (tokens, top_k) = y.shape, slot_of.shape
    (y, y_rows), (shared, shared_rows), (residual, residual_rows) = map(_rows, (y, shared, residual))
    slot_of, weights = slot_of.contiguous(), _float32(weights)
    launch(
        "moe_combine",
        "moe_combine",
        y.device,
        y_rows,
        (0, 0) if arrival is None else arrival.numbers()[0],
        slot_of.data_ptr(),
        address(weights),
        shared_rows,
        residual_rows,
        out.data_ptr(),
        TYPES[out_dtype],
        (tokens, top_k, hidden, slots),
    )
    return out


def _combine_unserved(
    y: Tensor,
    slot_of: Tensor,
    token_of_slot: Tensor,
    weights: Tensor | None,
    shared: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> str | None:
    dtypes = y.dtype, out_dtype, *[t.dtype for t in (shared, residual) if t is not None]
    return _too_much(slot_of.shape[1], float64=torch.float64 in dtypes)


def _launch_combine_backward(
    op: str,
    grad: Tensor,
    y: Tensor | None,
    slot_of: Tensor,
    token_of_slot: Tensor,
    weights: Tensor | None,
    d_y: Tensor,
    d_weights: Tensor | None,
    arrival: Arrival | None = None,
) -> None:
    (slots, hidden), (tokens, top_k) = d_y.shape, slot_of.shape
    (grad, grad_rows), (y, y_rows) = _rows(grad), _rows(y)
    if y is None:
        y_rows = 0, TYPES[d_y.dtype], 0
    slot_of, token_of_slot, weights = slot_of.contiguous(), token_of_slot.contiguous(), _float32(weights)
    launch(
        op,
        "moe_combine_backward",
        grad.device,
        grad_rows,
        *(((0, 0), (0, 0)) if arrival is None else arrival.numbers()),
        y_rows,
        slot_of.data_ptr(),
        token_of_slot.data_ptr(),
        address(weights),
        d_y.data_ptr(),
        address(d_weights),
        (tokens, top_k, hidden, slots),
    )


def _combine_backward_kernel(
    grad: Tensor,
    y: Tensor,
    slot_of: Tensor,
    token_of_slot: Tensor,
    weights: Tensor,
    arrival: Arrival | None = None,
) -> tuple[Tensor, Tensor]:
    d_y, d_weights = y.new_empty(y.shape), weights.new_empty(weights.shape, dtype=torch.float32)
    _launch_combine_backward("moe_combine_backward", grad, y, slot_of, token_of_slot, weights, d_y, d_weights, arrival)
    return d_y, d_weights.to(weights.dtype)


def _combine_backward_unserved(grad: Tensor, y: Tensor, slot_of: Tensor, *_: Tensor) -> str | None:
    return _too_much(slot_of.shape[1], float64=torch.float64 in (grad.dtype, y.dtype))


_moe_combine = register(
    "moe_combine(Tensor y, Tensor slot_of, Tensor token_of_slot, Tensor? weights, Tensor? shared, Tensor? residual, "
    "ScalarType out_dtype) -> Tensor",
    reference=reference.moe_combine,
    fake=_combine_fake,
    kernel=_combine_kernel,
    unserved=_combine_unserved,
    validate=_combine_validate,
    setup_context=_combine_setup,
    backward=_combine_grad,
)
_moe_combine_backward = register(
    "moe_combine_backward(Tensor grad, Tensor y, Tensor slot_of, Tensor token_of_slot, Tensor weights) -> "
    "(Tensor d_y, Tensor d_weights)",
    reference=reference.moe_combine_backward,
    fake=lambda grad, y, slot_of, token_of_slot, weights: (y.new_empty(y.shape), weights.new_empty(weights.shape)),
    kernel=_combine_backward_kernel,
    unserved=_combine_backward_unserved,
)


# The grouped GEMM of unquantised experts


def _gemm_validate(a: Tensor, b: Tensor, offsets: Tensor, counts: Tensor, expected: int | None = None) -> None:
    check_groups("grouped_gemm", offsets, counts, a.shape[0])


def _gemm_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.expected = inputs
    ctx.save_for_backward(*tensors)


def _gemm_grad(ctx: Any, grad: Tensor) -> tuple:
    a, b, offsets, counts = ctx.saved_tensors
    d_a = _grouped_gemm_dgrad(grad, b, offsets, counts, ctx.expected) if ctx.needs_input_grad[0] else None
    d_b = _grouped_gemm_wgrad(grad, a, offsets, counts) if ctx.needs_input_grad[1] else None
    return d_a, d_b, None, None, None


def _rows_on_16_bytes(x: Tensor) -> Tensor:
    """x, copied only if rows do not begin at multiples of 16 bytes or columns lie apart."""
    *rows, column = x.stride()
    if column == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in rows):
        return x
    width = x.shape[-1]
    return x.new_empty((*x.shape[:-1], -(-width // 8) * 8))[..., :width].copy_(x)


def _launch_gemm(
    op: str,
    kind: int,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    counts: Tensor,
    d: Tensor,
    depth: int,
    expected: int | None = None,
) -> None:
    wgrad = kind == constants.MOE_GEMM_WGRAD
    a, b, offsets, counts = _rows_on_16_bytes(a), _rows_on_16_bytes(b), offsets.contiguous(), counts.contiguous()
    launch(
        op,
        "moe_gemm",
        a.device,
        kind,
        TYPES[a.dtype],
        (a.data_ptr(), b.data_ptr(), d.data_ptr()),
        (*d.shape[-2:], depth, a.shape[0] if expected is None else expected),
        (a.stride(0), b.stride(-2), 0 if wgrad else b.stride(0), d.stride(0) if wgrad else 0),
        (offsets.data_ptr(), counts.data_ptr(), counts.shape[0]),
        chip(a.device).multiprocessors,
    )


def _gemm_fake(a: Tensor, b: Tensor, offsets: Tensor, counts: Tensor, expected: int | None = None) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


def _gemm_kernel(a: Tensor, b: Tensor, offsets: Tensor, counts: Tensor, expected: int | None = None) -> Tensor:
    d = _gemm_fake(a, b, offsets, counts, expected)
    _launch_gemm("grouped_gemm", constants.MOE_GEMM_FORWARD, a, b, offsets, counts, d, a.shape[1], expected)
    return d


def _dgrad_fake(grad: Tensor, b: Tensor, offsets: Tensor, counts: Tensor, expected: int | None = None) -> Tensor:
    return grad.new_empty((grad.shape[0], b.shape[2]))


def _dgrad_kernel(grad: Tensor, b: Tensor, offsets: Tensor, counts: Tensor, expected: int | None = None) -> Tensor:
    d = _dgrad_fake(grad, b, offsets, counts, expected)
    _launch_gemm("grouped_gemm_dgrad", constants.MOE_GEMM_DGRAD, grad, b, offsets, counts, d, grad.shape[1], expected)
    return d


def _wgrad_fake(grad: Tensor, a: Tensor, offsets: Tensor, counts: Tensor) -> Tensor:
    return grad.new_empty((counts.shape[0], grad.shape[1], a.shape[1]))


def _wgrad_kernel(grad: Tensor, a: Tensor, offsets: Tensor, counts: Tensor) -> Tensor:
    d = _wgrad_fake(grad, a, offsets, counts)
    _launch_gemm("grouped_gemm_wgrad", constants.MOE_GEMM_WGRAD, grad, a, offsets, counts, d, grad.shape[0])
    return d


def _gemm_unserved(a: Tensor, b: Tensor, *_: Any) -> str | None:
    if a.dtype not in (torch.bfloat16, torch.float16) or b.dtype != a.dtype:
        return f"the kernels multiply bfloat16 and float16, not {a.dtype} by {b.dtype}"
    return None


_grouped_gemm = register(
    # expected: slots in use, as far as the host can tell; it chooses a kernel's tile and changes no bit.
    "grouped_gemm(Tensor a, Tensor b, Tensor offsets, Tensor counts, SymInt? expected=None) -> Tensor",
    reference=reference.grouped_gemm,
    fake=_gemm_fake,
    kernel=_gemm_kernel,
    unserved=_gemm_unserved,
    validate=_gemm_validate,
    setup_context=_gemm_setup,
    backward=_gemm_grad,
)
_grouped_gemm_dgrad = register(
    "grouped_gemm_dgrad(Tensor grad, Tensor b, Tensor offsets, Tensor counts, SymInt? expected=None) -> Tensor",
    reference=reference.grouped_gemm_dgrad,
    fake=_dgrad_fake,
    kernel=_dgrad_kernel,
    unserved=_gemm_unserved,
)
_grouped_gemm_wgrad = register(
    "grouped_gemm_wgrad(Tensor grad, Tensor a, Tensor offsets, Tensor counts) -> Tensor",
    reference=reference.grouped_gemm_wgrad,
    fake=_wgrad_fake,
    kernel=_wgrad_kernel,
    unserved=_gemm_unserved,
)


def _check_indices(op: str, indices: Tensor, num_experts: int) -> None:
    if indices.numel() == 0:
        return
    low, high = (int(i) for i in indices.aminmax())
    if low < -1 or high >= num_experts:
        raise ValueError(
            f"{op}: indices must be from -1 (none) to E-1={num_experts - 1}, got {low if low < -1 else high}"
        )
