"""Expert parallelism over a buffer of DeepEP V2, where that is installed. Not yet run with it: tests have a stand-in.

    buffer = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=..., hidden=..., num_topk=..., use_fp8_dispatch=...)
    out = moe_mlp(x, routing, gate_up, down, exchange=DeepEP(buffer, num_experts=384))

DeepEP sends rows between ranks; the ops of `k2kernels.ops.moe` put them into the slots of the local experts, and add
them up. `dispatch` and `combine` are called like those of `k2kernels.parallel.ExpertParallel`, forward and backward,
with these differences:

- A token's rows on one rank are added up there and rounded to bfloat16; DeepEP adds these sums and rounds again. So
  results are not bit-identical to those of one rank, and depend on which experts share a rank (or a node).
- The rows of an expert are in the order of arrival, which differs from run to run; the last bits of the experts'
  gradients depend on it, unless the buffer is made with deterministic=True.
- Rows are bfloat16, of a multiple of 16 bytes; a token names an expert once; the number of experts is a multiple of
  the number of ranks.
- The host waits for the device in each dispatch. DeepEP reports ranks that do not respond.

Source: deepseek-ai/DeepEP at commit dd758ca: deep_ep/buffers/elastic.py, csrc/elastic/buffer.hpp, README.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2kernels.ops._check import FLOATS, INDICES, Arguments
from k2kernels.ops.moe import Dispatched, DispatchHandle, moe_combine
from k2kernels.ops.quant import quantize_1x128
from k2kernels.parallel.checks import check_options
from k2kernels.parallel.exchange import DispatchOptions, codes_to_slots, to_slots
from k2kernels.parallel.uncompiled import uncompiled


class DeepEPHandle(NamedTuple):
    """Where dispatch put the rows."""

    tokens: int  # of this rank
    local: DispatchHandle  # of the rows that arrived here
    sent: Any  # the handle of DeepEP


class DeepEP:
    """Over a `deep_ep.ElasticBuffer`, for num_experts over all ranks; index_dtype is `deep_ep.topk_idx_t`.

    Attributes: first_expert, num_local_experts: the experts of this rank.
    """

    def __init__(self, buffer: Any, *, num_experts: int, index_dtype: torch.dtype = torch.int64):
        args, ranks = Arguments("DeepEP"), buffer.num_ranks
        args.require(num_experts % ranks == 0, "num_experts", f"a multiple of the {ranks} ranks", num_experts)
        self.buffer, self.num_experts, self.index_dtype = buffer, num_experts, index_dtype
        self.num_local_experts = num_experts // ranks
        self.first_expert = buffer.rank_idx * self.num_local_experts

    @uncompiled
    def dispatch(
        self,
        x: Tensor,
        indices: Tensor,
        weights: Tensor,
        **options: Any,
    ) -> Dispatched:
        """As `ExpertParallel.dispatch`, with its options; weights are sent too, and differentiable as x is."""
        args = Arguments("DeepEP.dispatch")
        x = args.tensor("x", x, ("T", "H"), torch.bfloat16)
        indices = args.tensor("indices", indices, ("T", "K"), INDICES)
        weights = args.tensor("weights", weights, ("T", "K"), FLOATS)
        chosen = DispatchOptions(**options)
        check_options("DeepEP.dispatch", chosen)
        rows, scales, experts, arrived_weights, sent = _DeepEPDispatch.apply(x, weights, indices, self, chosen)
        place = experts, sum(sent.num_recv_tokens_per_expert_list), self.num_local_experts, chosen
        if chosen.quantize:
            data, scales, plan = codes_to_slots(rows, scales, *place)
        else:
            data, plan = to_slots(rows, *place)
        local = DispatchHandle(*plan[:4], arrived_weights, plan[4])
        return Dispatched(data, scales, local.offsets, local.counts, DeepEPHandle(len(x), local, sent))

    @uncompiled
    def combine(
        self,
        y: Tensor,
        handle: DeepEPHandle,
        *,
        shared: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Each token's weighted sum of its rows of y, in bfloat16; then + shared + residual, in float32."""
        args = Arguments("DeepEP.combine")
        if not isinstance(handle, DeepEPHandle):
            raise TypeError(f"DeepEP.combine: handle must be the handle of dispatch, got {type(handle).__name__}")
        y = args.tensor("y", y, ("S", "H"), FLOATS)
        shared = args.optional("shared", shared, (handle.tokens, "H"), FLOATS)
        residual = args.optional("residual", residual, (handle.tokens, "H"), FLOATS)
        out_dtype = args.choice("out_dtype", y.dtype if out_dtype is None else out_dtype, FLOATS)
        out = _DeepEPCombine.apply(moe_combine(y, handle.local, out_dtype=torch.bfloat16), self.buffer, handle.sent)
        terms = [term.float() for term in (shared, residual) if term is not None]
        return sum(terms, out.float()).to(out_dtype)


class _DeepEPDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, indices: Tensor, ranks: DeepEP, options: DispatchOptions
    ) -> tuple:
        rows = x.contiguous()
        if options.quantize:
            rows = quantize_1x128(rows, power_of_two=options.power_of_two)
        arrived, experts, arrived_weights, sent, _ = ranks.buffer.dispatch(
            rows,
            topk_idx=indices.to(ranks.index_dtype).contiguous(),
            topk_weights=weights.float().contiguous(),
            num_experts=ranks.num_experts,
        )
        rows, scales = arrived if options.quantize else (arrived, None)
        ctx.buffer, ctx.sent, ctx.quantized = ranks.buffer, sent, options.quantize
        ctx.hidden, ctx.weights_dtype = x.shape[1], weights.dtype
        ctx.mark_non_differentiable(experts, *((rows, scales) if options.quantize else ()))
        return rows, scales, experts, arrived_weights, sent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor, _scales: Any, _experts: Any, d_weights: Tensor, _sent: Any) -> tuple:
        if ctx.quantized and ctx.needs_input_grad[0]:
            raise RuntimeError("DeepEP.dispatch: with quantize=True there is no gradient of x; detach x")
        if ctx.quantized:  # only the gradient of the weights is needed
            d_rows = d_weights.new_zeros(len(d_weights), ctx.hidden, dtype=torch.bfloat16)
        numbers = dict(handle=ctx.sent, topk_weights=d_weights.contiguous())
        d_x, d_weights, _ = ctx.buffer.combine(d_rows.contiguous(), **numbers)
        return None if ctx.quantized else d_x, d_weights.to(ctx.weights_dtype), None, None, None


class _DeepEPCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, buffer: Any, sent: Any) -> Tensor:
        ctx.buffer, ctx.sent = buffer, sent
        return buffer.combine(rows.contiguous(), handle=sent)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.sent)[0], None, None
