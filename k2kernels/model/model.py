"""The Kimi-K2 / DeepSeek-V3 model: a stack of latent attention and feed-forward layers over the ops of this library.

Modules and parameters are named as in Hugging Face checkpoints, except that gate and up are fused and experts stacked.

Source: DeepSeek-V3 (2024), section 2; where implementations differ: transformers, models/deepseek_v3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from k2kernels.model import checkpoint
from k2kernels.model.attention import Decode, Prefill
from k2kernels.model.config import K2Config
from k2kernels.model.generate import generate
from k2kernels.model.layer import DecoderLayer
from k2kernels.model.linear import Linear
from k2kernels.model.moe import Experts, Moe
from k2kernels.model.mtp import MtpLayer
from k2kernels.model.rope import Rope
from k2kernels.ops._check import FLOATS, Arguments


class Decoder(nn.Module):
    """Embedding, layers and final norm. MTP layers stand behind the others and do not take part in `forward`."""

    def __init__(self, config: K2Config):
        super().__init__()
        self.depth = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config, index) for index in range(self.depth)]
        mtp = [MtpLayer(config, self.depth + k) for k in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList([*layers, *mtp])
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, step: Prefill | Decode) -> Tensor:
        """[B, T] -> [B, T, hidden], after the final norm."""
        x = self.embed_tokens(input_ids)
        for layer in self.layers[: self.depth]:
            x = layer(x, step)
        return self.norm(x)


class K2Model(nn.Module):
    """A language model; weights are random (normal, standard deviation config.initializer_range) until loaded.

    Loading with keep_fp8 puts e4m3 codes and scales in the place of linear layers and experts; that is for inference.
    To train with FP8 products on weights in high precision, see `use_fp8`.

    In training mode a forward pass records, per layer, the largest attention logit of each head (`max_logits`, for
    QK-Clip) and how many tokens each expert got (`expert_load`, for `update_router_bias`).
    """

    def __init__(self, config: K2Config):
        super().__init__()
        if not isinstance(config, K2Config):
            raise TypeError(f"K2Model: config must be a K2Config, got {type(config).__name__}; see K2Config.from_dict")
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rope = Rope(config)
        for parameter in self.parameters():
            if parameter.dim() > 1:  # norms keep their ones
                nn.init.normal_(parameter, std=config.initializer_range)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        keep_fp8: bool = False,
        progress: bool = True,
    ) -> K2Model:
        """Loads a Hugging Face checkpoint; see `k2kernels.model.checkpoint.from_pretrained`."""
        return checkpoint.from_pretrained(cls, path, dtype=dtype, device=device, keep_fp8=keep_fp8, progress=progress)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes config.json and safetensors under Hugging Face's names; transformers reads them back."""
        checkpoint.save_pretrained(self, path)

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
        hidden = self.model(input_ids, self._prefill(*input_ids.shape))
        logits = self._logits(hidden)
        return (logits, hidden) if return_hidden else logits

    def use_fp8(self, enabled: bool = True) -> K2Model:
        """From now on the products of attention's and feed-forward's linear layers and of the experts are FP8.

        Weights keep names and dtype: they are masters, quantised in each pass with one scale per 128x128 block;
        activations and gradients get one per token and 128 features, or, in the weights' gradients, per feature and 128
        tokens. Embedding, head, norms, router, MTP's projection and attention itself stay as they are. Saved
        checkpoints hold nothing of it. See `k2kernels.fp8_linear` and `k2kernels.moe_mlp`.

        Returns:
            The model.

        Raises:
            ValueError: it holds FP8 codes (keep_fp8) instead of masters, or is float64.

        Source: DeepSeek-V3 (2024), section 3.3: which parts are FP8 and which are not.
        """
        modules = [module for module in self.modules() if isinstance(module, (Linear, Experts))]
        dtypes = {p.dtype for module in self.modules() for p in module.parameters(recurse=False)}
        if enabled and dtypes & {torch.float8_e4m3fn, torch.float64}:
            got = "FP8 codes; load it without keep_fp8" if torch.float8_e4m3fn in dtypes else "float64"
            raise ValueError(f"use_fp8: weights must be bfloat16, float16 or float32, got {got}")
        for module in modules:
            module.fp8 = enabled
        return self

    @property
    def mtp_layers(self) -> Sequence[MtpLayer]:
        """The multi-token prediction layers; empty for Kimi-K2."""
        return self.model.layers[self.config.num_hidden_layers :]

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
        logits = []
        for k, layer in enumerate(self.mtp_layers):
            embedded = self.model.embed_tokens(input_ids[:, k + 1 :])
            hidden = layer(hidden[:, :-1], embedded, self._prefill(batch, length - 1 - k))
            logits.append(self._logits(hidden))
        return logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        speculative: bool = False,
        cache_dtype: str = "auto",
        on_token: Callable[[Tensor], None] | None = None,
        cuda_graphs: bool = True,
    ) -> Tensor:
        """Continues the prompts; see `k2kernels.model.generate.generate`."""
        return generate(
            self,
            input_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_token_ids=eos_token_ids,
            attention_mask=attention_mask,
            speculative=speculative,
            cache_dtype=cache_dtype,
            on_token=on_token,
            cuda_graphs=cuda_graphs,
        )

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
        """Loss-free balancing: moves every expert's bias by `rate` against its load, and forgets the load.

        Call it once per optimizer step. Over several ranks, sum the `expert_counts` buffers first.
        """
        for _, layer in self._moe_layers():
            layer.update_bias(rate)

    def sequence_loss(self, alpha: float | None = None) -> Tensor:
        """The sequence-wise balance loss of the last forward pass in training mode, summed over layers.

        `alpha` is config.aux_loss_alpha by default. Add the result to your loss.
        """
        alpha = self.config.aux_loss_alpha if alpha is None else alpha
        zero = torch.zeros((), device=self.lm_head.weight.device)
        return sum((layer.sequence_loss(alpha) for _, layer in self._moe_layers()), start=zero)

    def check_ids(self, caller: str, input_ids: Tensor, *, wait: bool = False) -> None:
        """Raises ValueError or TypeError unless `input_ids` [B, T] are ids of this vocabulary and fit the context.

        The ids themselves are looked at on a CPU; with `wait` on every device.
        """
        dtype = getattr(input_ids, "dtype", type(input_ids).__name__)
        if dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{caller}: input_ids must be an int64 or int32 tensor, got {dtype}")
        limit = self.config.max_position_embeddings
        if input_ids.dim() != 2 or not 0 < input_ids.shape[1] <= limit or input_ids.shape[0] == 0:
            raise ValueError(f"{caller}: input_ids must be [B, T], T from 1 to {limit}, got {list(input_ids.shape)}")
        device = self.lm_head.weight.device
        if input_ids.device != device and (input_ids.is_meta or not wait):
            raise ValueError(f"{caller}: input_ids must be on {device} like the model, got {input_ids.device}")
        if wait or (input_ids.is_cpu and not torch.compiler.is_compiling()):
            low, high = (int(i) for i in input_ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                wanted = f"0 to {self.config.vocab_size - 1}"
                raise ValueError(f"{caller}: input_ids must be {wanted}, got {low if low < 0 else high}")

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _prefill(self, batch: int, length: int) -> Prefill:
        device = self.lm_head.weight.device
        positions = torch.arange(length, device=device).repeat(batch)
        cu_seqlens = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
        return Prefill(self.rope(positions), cu_seqlens)

    def _moe_layers(self) -> list[tuple[int, Moe]]:
        return [(index, layer.mlp) for index, layer in enumerate(self.model.layers) if isinstance(layer.mlp, Moe)]
