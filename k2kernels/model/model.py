"""The Kimi-K2 / DeepSeek-V3 model: a stack of latent attention and feed-forward layers over the ops of this library.

Modules and parameters are named as in Hugging Face checkpoints, except that gate and up are fused and experts stacked.

Source: DeepSeek-V3 (2024), section 2; where implementations differ: transformers, models/deepseek_v3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from k2kernels.engine.generate import generate
from k2kernels.functional.linear_log_probs import LogProbs, linear_log_probs
from k2kernels.functional.w4_linear import TRAINED
from k2kernels.model import checkpoint
from k2kernels.model.attention import Prefill
from k2kernels.model.linear import Linear
from k2kernels.model.micro_batch import MicroBatch, alternately, divide
from k2kernels.model.moe import Experts, Moe
from k2kernels.model.trunk import Decoder, Trunk
from k2kernels.ops._check import FLOATS, Arguments

__all__ = ["Decoder", "K2Model"]  # pickled models name both here


class K2Model(Trunk):
    """A language model; weights are random (normal, standard deviation config.initializer_range) until loaded.

    Loading with keep_quantized replaces the weights of linear layers and experts by e4m3 codes and scales, or those of
    experts by packed 4-bit codes, for inference.
    To train with FP8 products on weights in high precision, see `use_fp8`.

    In training mode a forward pass records, per layer, the largest attention logit of each head (`max_logits`, for
    QK-Clip) and how many tokens each expert got (`expert_load`, for `update_router_bias`).

    Over ranks, `ranks` is their `k2kernels.parallel.Layout`, whose `reduce_statistics` makes what was recorded that of
    all ranks.
    """

    ranks: Any = None
    gradients = "sum"  # of all ranks; `k2kernels.parallel.parallelize`: "mean"
    statistics_reduced = True  # nothing was recorded since
    from_pretrained = classmethod(checkpoint.from_pretrained)
    load_pretrained = checkpoint.load_pretrained
    save_pretrained = checkpoint.save_pretrained
    generate = generate

    def forward(self, input_ids: Tensor, *, return_hidden: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the next token at every position; differentiable.

        Args:
            input_ids: int64 or int32 [B, T], B sequences of T tokens without padding.
            return_hidden: also return the hidden states after the final norm, [B, T, hidden], which `mtp_logits` takes.

        Returns:
            float32 [B, T, vocab] (float64 of a float64 model), or (that, hidden).

        Raises:
            ValueError: T is 0 or above config.max_position_embeddings, or (on a CPU) an id is not in the vocabulary.
        """
        self.check_ids("K2Model", input_ids)
        self._records()
        hidden = self.model(input_ids, self._steps(*input_ids.shape))
        logits = self._logits(hidden)
        return (logits, hidden) if return_hidden else logits

    def log_probs(self, input_ids: Tensor, *, temperature: float = 1.0, entropy: bool = False) -> Tensor | LogProbs:
        """Log-probability of each token but the first, given those before it, without the logits in memory.

        See `k2kernels.linear_log_probs`; differentiable. In half precision its logits are not rounded, as those of
        `forward` are. On one device: modules that gather weights around `forward` alone (FSDP) do not around this.

        Args:
            input_ids: int64 or int32 [B, T], T from 2 on. Sequences may be padded at their ends by any ids.
            temperature, entropy: as `k2kernels.linear_log_probs` takes them.

        Returns:
            float32 [B, T-1] (float64 of a float64 model), or LogProbs of this and the entropies.

        Raises:
            ValueError: as `forward`; or T is 1.
        """
        self.check_ids("log_probs", input_ids)
        if input_ids.shape[1] < 2:
            raise ValueError(f"log_probs: input_ids must have 2 tokens or more, got {list(input_ids.shape)}")
        self._records()
        hidden = self.model(input_ids[:, :-1], self._steps(len(input_ids), input_ids.shape[1] - 1))
        weight = self.lm_head.weight
        return linear_log_probs(hidden, weight, input_ids[:, 1:], temperature=temperature, entropy=entropy)

    def use_fp8(self, enabled: bool = True) -> K2Model:
        """Computes the products of attention's and feed-forward's linear layers and of the experts in FP8 from now on.

        Weights keep names and dtype: they are masters, quantised in each pass with one scale per 128x128 block;
        activations and gradients get one per token and 128 features, or, in the weights' gradients, per feature and 128
        tokens. Embedding, head, norms, router, MTP's projection and attention itself are unchanged, and so are saved
        checkpoints. See `k2kernels.fp8_linear` and `k2kernels.moe_mlp`.

        Returns:
            The model.

        Raises:
            ValueError: the weights are FP8 or 4-bit codes (keep_quantized) or float64.

        Source: DeepSeek-V3 (2024), section 3.3: which parts are FP8 and which are not.
        """
        modules = [module for module in self.modules() if isinstance(module, (Linear, Experts))]
        dtypes = {p.dtype for module in self.modules() for p in module.parameters(recurse=False)}
        if enabled and dtypes & {torch.float8_e4m3fn, torch.uint8, torch.float64}:
            kinds = {torch.float8_e4m3fn: "FP8 codes", torch.uint8: "4-bit codes", torch.float64: "float64"}
            got = next(text for dtype, text in kinds.items() if dtype in dtypes)
            got += "; load it with keep_quantized=False" if "codes" in got else ""
            raise ValueError(f"use_fp8: weights must be bfloat16, float16 or float32, got {got}")
        for module in modules:
            module.fp8 = enabled
        return self

    def use_w4(self, kind: str | None = "int4", *, pack_once: bool = False) -> K2Model:
        """Quantises the weights of the routed experts to 4 bits in each pass from now on; gradients pass straight
        through. All else stays as it is.

        Weights keep names and dtype: they are masters, and saved checkpoints are unchanged. The logits are those, to
        the bit, of the model that `save_pretrained(..., format="int4")`, or "mxfp4", writes and that is loaded with
        keep_quantized. Call it on a bfloat16 model; see `k2kernels.grouped_w4_linear`.

        Args:
            kind: "int4" or "mxfp4"; None: no longer.
            pack_once: keep the packed weights until PyTorch counts a change of the weights (an optimizer's step,
                loading, any change in place): the micro-batches of a step, recomputed layers and evaluation share
                them. A change that is not counted must be followed by another `use_w4`: one through `.data`, or an
                optimizer's step that a CUDA graph replays. Compiled passes pack each time. Not for weights that
                `fully_shard` gathers anew; `parallelize` with fsdp turns it off.

        Returns:
            The model.

        Raises:
            ValueError: another kind, the experts are FP8 or 4-bit codes, or their columns are no multiple of 32; or
                pack_once with modules of `fully_shard`.
        """
        if kind not in (None, *TRAINED):
            raise ValueError(f"use_w4: kind must be None or one of {', '.join(TRAINED)}, got {kind!r}")
        if pack_once and any(hasattr(module, "reshard") for module in self.modules()):  # an FSDPModule
            raise ValueError("use_w4: pack_once must be False for a model with fully_shard, got True")
        stacks = [module for module in self.modules() if isinstance(module, Experts)]
        weights = [weight for module in stacks for weight in (module.gate_up_proj, module.down_proj)]
        for weight in weights if kind else ():
            if not weight.dtype.is_floating_point or weight.dtype == torch.float8_e4m3fn:
                raise ValueError("use_w4: experts must be in high precision, got codes; load with keep_quantized=False")
            if weight.shape[-1] % 32:
                raise ValueError(f"use_w4: columns of experts must be a multiple of 32, got {list(weight.shape)}")
        for module in stacks:
            module.train_w4, module.pack_once = kind, pack_once
            module.drop_packed()
        return self

    def mtp_logits(self, input_ids: Tensor, hidden: Tensor) -> list[Tensor]:
        """What the MTP layers predict beyond the next token; differentiable, also in `hidden`.

        Args:
            input_ids: [B, T], T > number of MTP layers.
            hidden: [B, T, hidden], from `model(input_ids, return_hidden=True)`.

        Returns:
            One float32 [B, T-1-k, vocab] per MTP layer k: position t, given the tokens up to t+1+k, predicts token
            t+2+k. Its targets are input_ids[:, 2+k:] for all but the last position.

        Raises:
            ValueError: the configuration has no MTP layers, or the sequences are too short.
        """
        if not self.mtp_layers:
            raise ValueError("mtp_logits: the configuration must have num_nextn_predict_layers above 0, got 0")
        self.check_ids("mtp_logits", input_ids)
        batch, length = input_ids.shape
        Arguments("mtp_logits").tensor("hidden", hidden, (batch, length, self.config.hidden_size), FLOATS)
        if length <= len(self.mtp_layers):
            raise ValueError(f"mtp_logits: input_ids must have more than {len(self.mtp_layers)} tokens, got {length}")
        self._records()
        return self._mtp_logits(hidden, lambda first: self.model.embed_tokens(input_ids[:, first:]))

    def max_logits(self) -> dict[int, Tensor]:
        """Per layer, MTP layers included: the largest logit of each head, float32 [H], since the last reset."""
        return {layer.self_attn.layer: layer.self_attn.max_logit.clone() for layer in self.model.layers}

    def reset_max_logits(self) -> None:
        """Sets `max_logits` back to -inf."""
        for layer in self.model.layers:
            layer.self_attn.max_logit.fill_(-torch.inf)

    def expert_load(self) -> dict[int, Tensor]:
        """Per MoE layer: the tokens each expert got in training mode since `update_router_bias`, float64 [E]."""
        return {index: layer.gate.expert_counts.double() for index, layer in self._moe_layers()}

    @torch.no_grad()
    def update_router_bias(self, rate: float) -> None:
        """Loss-free balancing: changes every expert's bias by `rate` against its load, and resets the load.

        Call it once per optimizer step. Over several ranks, `k2kernels.parallel.Layout.reduce_statistics` must come
        first.

        Raises:
            ValueError: the load is that of one rank of several.
        """
        self.check_statistics("update_router_bias")
        for _, layer in self._moe_layers():
            layer.update_bias(rate)

    def check_statistics(self, caller: str) -> None:
        """Raises ValueError if maxima and expert counts are those of one rank, and others share the weights."""
        if self.ranks is not None and not self.statistics_reduced:
            raise ValueError(
                f"{caller}: maxima and expert counts must be those of all {self.ranks.world_size} ranks that share the "
                "weights, or copies of these would differ, got this rank's; call "
                "k2kernels.parallel.Layout.reduce_statistics(model) once per step, before it"
            )

    def use_sequence_loss(self, alpha: float | None, scale: float = 1.0) -> K2Model:
        """Adds the gradient of `scale * sequence_loss(alpha)` in the backward pass of every forward pass in training
        mode from now on; None ends that. The loss that the caller differentiates does not change.

        Unlike adding `sequence_loss` to the loss, it includes every micro-batch of a pipeline, and any kind of
        activation checkpointing. `scale` is what else the loss is multiplied by: 1 / n for the mean over n
        micro-batches, or the factor of a gradient scaler; it holds for the forward passes that follow.

        Returns:
            The model.

        Raises:
            ValueError: alpha is below 0.
        """
        if alpha is not None and not alpha >= 0:
            raise ValueError(f"use_sequence_loss: alpha must be at least 0, or None, got {alpha}")
        for _, layer in self._moe_layers():
            layer.balance = None if alpha is None else (alpha, scale)
        return self

    def sequence_loss(self, alpha: float | None = None) -> Tensor:
        """The sequence-wise balance loss of the last forward pass in training mode, summed over layers.

        `alpha` is config.aux_loss_alpha by default. Add the result to your loss; with `use_sequence_loss`, which has
        its gradient added already, it is only a number.

        Raises:
            ValueError: no forward pass in training mode came before; or gradients are enabled, and it has none, as
                after reentrant activation checkpointing. Under torch.no_grad() its value can be read.
        """
        alpha = self.config.aux_loss_alpha if alpha is None else alpha
        zero = torch.zeros((), device=self.device)
        return sum((layer.sequence_loss(alpha) for _, layer in self._moe_layers()), start=zero)

    def _records(self) -> None:
        if self.training and self.ranks is not None:
            self.statistics_reduced = False

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _mtp_logits(self, hidden: Tensor, embedded: Callable[[int], Tensor]) -> list[Tensor]:
        """`embedded` gives the embedding of the ids from a position on."""
        batch, length, _ = hidden.shape
        logits = []
        for k, layer in enumerate(self.mtp_layers):
            step, given = self._steps(batch, length - 1 - k), (hidden[:, :-1], embedded(k + 1))
            hidden = alternately([layer], step, *given) if isinstance(step, list) else layer(*given, step)
            logits.append(self._logits(hidden))
        return logits

    def _steps(self, batch: int, length: int) -> Prefill | list[Prefill]:
        """Of all sequences; or of each micro-batch, where the layers have exchanges for several."""
        count = 1 + max([0, *(len(layer.more_exchanges) for _, layer in self._moe_layers())])
        if min(count, batch) == 1:
            return self._prefill(batch, length)
        return [self._prefill(size, length, part) for size, part in divide(batch, count)]

    def _prefill(self, batch: int, length: int, micro_batch: MicroBatch | None = None) -> Prefill:
        device = self.device
        positions = torch.arange(length, device=device).repeat(batch)
        cu_seqlens = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
        return Prefill(self.rope(positions), cu_seqlens, micro_batch=micro_batch)

    def _moe_layers(self) -> list[tuple[int, Moe]]:
        return [(layer.self_attn.layer, layer.mlp) for layer in self.model.layers if isinstance(layer.mlp, Moe)]
