"""Feed-forward layers: the SwiGLU MLP, and the mixture of routed and shared experts.

Letters of shapes: N tokens, E experts, I intermediate.

Source: DeepSeek-V3 (2024), sections 2.1.2 and 2.1.3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2kernels.functional.moe_mlp import moe_mlp
from k2kernels.model.config import K2Config
from k2kernels.model.linear import Float32Buffers, Fp8Linear, Linear
from k2kernels.model.micro_batch import MicroBatch
from k2kernels.ops.moe import Routing, moe_route, moe_sequence_loss, moe_update_bias
from k2kernels.ops.quant import swiglu
from k2kernels.ops.w4_gemm import W4, empty_w4
from k2kernels.ops.w4_gemm.gradient import pack_masters
from k2kernels.reference._numeric import wide


class Mlp(nn.Module):
    """down(silu(gate x) * up x); the rows of `gate_up_proj` are gate, then up."""

    def __init__(self, config: K2Config, intermediate: int):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * intermediate)
        self.down_proj = Linear(intermediate, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.gate_up_proj, Fp8Linear) and isinstance(self.down_proj, Fp8Linear):
            return self.down_proj.product(*self.gate_up_proj.swiglu(x), x)
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Router(Float32Buffers):
    """Logits of the experts, in float32 (float64 stays) like the bias that balances them, in a bfloat16 model too."""

    def __init__(self, config: K2Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        counts = torch.zeros(config.n_routed_experts, dtype=torch.int64)
        self.register_buffer("expert_counts", counts, persistent=False)

    def reset_buffers(self) -> None:
        self.expert_counts.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = wide(x)
        return F.linear(x, self.weight.to(x.dtype))


class Experts(nn.Module):
    """The stacked weights of the routed experts: gate_up_proj [E, 2I, hidden], down_proj [E, hidden, I].

    In a model kept in FP8 they are e4m3, with float32 scales [E, ceil(2I/128), ceil(hidden/128)] and so on in
    `gate_up_proj_scale_inv` and `down_proj_scale_inv`. With `fp8`, which `K2Model.use_fp8` sets, their products are FP8
    and their dtype is unchanged. In a model kept in 4 bits they are the bytes of `pack_w4`, uint8 [E, ceil(2I/64),
    ceil(hidden/64), C] and so on, gate_up_proj gated, and `w4` is their kind: see `use_w4`. With
    `train_w4`, a kind, which `K2Model.use_w4` sets, they are quantised to 4 bits in each pass; with `pack_once`, in the
    first pass after each change of their versions.

    Over ranks (`k2kernels.parallel.Layout.shard_experts`) they are DTensors of which this rank has some experts, from
    `first_expert` on, and `ranks` is the Layout. `gradients` is "sum" or "mean", as `expert_parallel` describes, and
    `divisor` what each backward divides them by. `compute_dtype` is what the weights are cast to for the products,
    None: their own dtype. The weights are used in `forward` only, so that FSDP can gather them for it.
    """

    fp8 = False
    power_of_two = False
    w4: str | None = None
    train_w4: str | None = None
    pack_once = False
    ranks: Any = None
    first_expert = 0
    gradients, divisor = "sum", 1
    compute_dtype: torch.dtype | None = None

    def __init__(self, config: K2Config):
        super().__init__()
        experts, hidden, intermediate = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))
        self.register_parameter("gate_up_proj_scale_inv", None)
        self.register_parameter("down_proj_scale_inv", None)
        self.power_of_two = config.power_of_two_scales
        self._packed: dict[str, tuple[tuple, W4]] = {}  # with pack_once: of which weights, and what was made of them
        self._shapes = {"gate_up_proj": (2 * intermediate, hidden), "down_proj": (hidden, intermediate)}

    def use_w4(self, kind: str) -> None:
        """Replaces the weights by packed 4-bit ones of a kind, whose bytes are still to be set: for inference."""
        for name in self._shapes:
            like = getattr(self, name)
            empty = empty_w4((len(like), *self._shapes[name]), kind, gated=name == "gate_up_proj", device=like.device)
            setattr(self, name, nn.Parameter(empty.data, requires_grad=False))
        self.w4 = kind

    def packed(self, name: str, data: Tensor) -> W4:
        """The W4 of the bytes of some experts of the parameter `name`, of a model kept in 4 bits."""
        return W4(data, self.w4, (len(data), *self._shapes[name]), name == "gate_up_proj")

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        *,
        shared: Tensor | None = None,
        exchange: Any = None,
        capacity: int | None = None,
    ) -> Tensor:
        """`moe_mlp` with these weights: x [N, hidden] -> [N, hidden]."""
        options = dict(fp8=True) if self.fp8 else {}
        options["power_of_two"] = self.fp8 or self.power_of_two
        weights = self.weights()
        if self.train_w4:
            options["w4"] = self.train_w4
            if self.pack_once and not torch.compiler.is_compiling():
                options["w4_packed"] = tuple(map(self._once, self._shapes, weights))
        return moe_mlp(x, routing, *weights, shared=shared, exchange=exchange, capacity=capacity, **options)

    def weights(self) -> tuple:
        """`gate_up` and `down` as `moe_mlp` takes them: of this rank's experts."""
        gate_up, down = self._here(self.gate_up_proj), self._here(self.down_proj)
        if self.w4:
            return self.packed("gate_up_proj", gate_up), self.packed("down_proj", down)
        if self.gate_up_proj_scale_inv is None:
            return gate_up, down
        return (gate_up, self._here(self.gate_up_proj_scale_inv)), (down, self._here(self.down_proj_scale_inv))

    def _once(self, name: str, weight: Tensor) -> W4:
        """The packed weight of the parameter `name`, packed now if the parameter has changed."""
        source = getattr(self, name)
        source = source.to_local() if self.ranks is not None else source  # a view: the version is the shard's
        key = self.train_w4, weight.dtype, source.data_ptr(), source._version
        if name not in self._packed or self._packed[name][0] != key:
            self._packed.pop(name, None)  # its memory is for the new one
            self._packed[name] = key, pack_masters(weight, self.train_w4)
        return self._packed[name][1]

    def drop_packed(self) -> None:
        """Forgets what `pack_once` has packed."""
        self._packed.clear()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": {}}

    def _here(self, weight: Tensor) -> Tensor:
        if self.ranks is not None:
            weight = weight.to_local()
            if self.divisor > 1 and weight.requires_grad:
                weight = _DividedGradient.apply(weight, self.divisor)
        cast = self.compute_dtype is not None and weight.dtype.is_floating_point
        return weight.to(self.compute_dtype) if cast else weight


class _DividedGradient(torch.autograd.Function):
    """The same tensor, whose gradient is divided by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.divisor, None


class _WithLoss(torch.autograd.Function):
    """The same tensor; its backward adds the gradient of `scale` times a loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.options = scale, dict(dtype=loss.dtype, device=loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full((), ctx.scale, **ctx.options), None


class Moe(nn.Module):
    """Each token is processed by its top-k experts and the shared ones.

    A forward pass in training mode adds to `gate.expert_counts` int64 [E] how many tokens each expert got, and keeps
    the logits for `sequence_loss`. Recomputation by activation checkpointing is not counted.

    If some experts are on other ranks, `exchange` sends rows to them (see `moe_mlp`), and `experts` holds the others;
    `capacity` is then how many rows these take, None: as many as could arrive. `exchange.check()` raises faults that an
    exchange detects after it has returned. Where a pass has several micro-batches, the first one takes `exchange`, the
    others those of `more_exchanges`: which one comes with the call, and stays with its backward pass.
    """

    def __init__(self, config: K2Config):
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = Mlp(config, shared) if shared else None
        self.exchange: Any = None
        self.more_exchanges: tuple[Any, ...] = ()
        self.capacity: int | None = None
        self.balance: tuple[float, float] | None = None  # `K2Model.use_sequence_loss`
        self._logits: Tensor | None = None  # [B, T, E] of the last pass in training mode

    def forward(self, x: Tensor, micro_batch: MicroBatch | None = None) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden]."""
        config = self.config
        if self.experts.ranks is not None and self.exchange is None:
            raise ValueError(
                "Moe: experts of other ranks must be reachable; call k2kernels.parallel.expert_parallel(model, mesh, "
                "max_tokens=...) on every rank"
            )
        flat = x.flatten(0, 1)
        logits = self.gate(flat)
        routing = moe_route(
            logits,
            self.gate.e_score_correction_bias,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            score=config.scoring_func,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )
        if self.training and not recomputing():
            seen = routing.counts, logits.unflatten(0, x.shape[:2])
            if micro_batch is None:
                self._record(*seen)
            else:
                micro_batch.later(self._record, *seen, micro_batch.number > 0)
        if self.training and self.balance is not None and torch.is_grad_enabled():
            # In recomputation too: that of reentrant checkpointing makes the only graph there is.
            alpha, scale = self.balance
            scale *= 1.0 if micro_batch is None else micro_batch.share  # losses are means over sequences
            loss = self._sequence_loss(logits.unflatten(0, x.shape[:2]), alpha)
            routing = routing._replace(weights=_WithLoss.apply(routing.weights, loss, scale))
        shared = None if self.shared_experts is None else self.shared_experts(flat)
        exchange = self.exchange
        if micro_batch is not None and micro_batch.number > 0:
            exchange = self.more_exchanges[micro_batch.number - 1]
        out = self.experts(flat, routing, shared=shared, exchange=exchange, capacity=self.capacity)
        return out.view_as(x)

    def _record(self, counts: Tensor, logits: Tensor, more: bool = False) -> None:
        """Of a pass, or, with `more`, of a later micro-batch of it."""
        self.gate.expert_counts += counts
        self._logits = torch.cat([self._logits, logits]) if more else logits

    def sequence_loss(self, alpha: float) -> Tensor:
        """The balance loss of each sequence of the last pass in training mode; differentiable.

        It takes the experts that the scores alone, without bias and groups, would choose.
        """
        if self._logits is None:
            raise ValueError("sequence_loss: a forward pass in training mode must come first")
        if self.balance is not None:
            return self._sequence_loss(self._logits.detach(), alpha)
        if torch.is_grad_enabled() and not self._logits.requires_grad:
            raise ValueError(
                "sequence_loss: the last forward pass must have a graph (it had none if it ran under torch.no_grad(), "
                "as in reentrant activation checkpointing), or the loss would have no gradient; call "
                "K2Model.use_sequence_loss(alpha) before the forward pass, or read the value under torch.no_grad()"
            )
        return self._sequence_loss(self._logits, alpha)

    def _sequence_loss(self, logits: Tensor, alpha: float) -> Tensor:
        """Of logits [B, T, E]."""
        config, length, logits = self.config, logits.shape[1], logits.flatten(0, 1)
        ends = torch.arange(0, len(logits) + 1, length, dtype=torch.int32, device=logits.device)
        choice = moe_route(logits.detach(), top_k=config.num_experts_per_tok, score=config.scoring_func)
        return moe_sequence_loss(
            logits,
            choice.indices,
            top_k=config.num_experts_per_tok,
            alpha=alpha,
            cu_seqlens=ends,
            score=config.scoring_func,
        )

    def update_bias(self, rate: float) -> None:
        """Changes the router's bias against the load counted since the last call, and resets the count."""
        gate = self.gate
        gate.e_score_correction_bias.copy_(moe_update_bias(gate.e_score_correction_bias, gate.expert_counts, rate=rate))
        gate.expert_counts.zero_()

    def __getstate__(self) -> dict:
        # The logits are part of a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "_logits": None}


def exchanges(model: nn.Module) -> list[Any]:
    """The exchanges of a model, each once."""
    layers = (module for module in model.modules() if isinstance(module, Moe) and module.exchange is not None)
    return list({id(e): e for layer in layers for e in (layer.exchange, *layer.more_exchanges)}.values())


def check_exchanges(found: list[Any]) -> None:
    """Raises the faults that exchanges have reported, of all work that the host has waited for."""
    for exchange in found:
        getattr(exchange, "check", lambda: None)()


def recomputing() -> bool:
    """Whether a backward pass is running: then this is activation checkpointing's second forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
