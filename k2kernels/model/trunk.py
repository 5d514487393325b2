"""The network that every pass runs through: embedding, layers, final norm, head, rotary embedding, MTP layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from k2kernels.model.attention import Step
from k2kernels.model.config import K2Config
from k2kernels.model.layer import DecoderLayer
from k2kernels.model.micro_batch import alternately
from k2kernels.model.mtp import MtpLayer
from k2kernels.model.rope import Rope


class Layers(nn.ModuleList):
    """Some layers of a model, each under its number in the whole model; indices and slices count what is here."""

    def __init__(self, layers: Sequence[DecoderLayer]):
        super().__init__()
        for layer in layers:
            self.add_module(str(layer.self_attn.layer), layer)

    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]


class Decoder(nn.Module):
    """Embedding, layers and final norm. MTP layers follow the others and are not part of `forward`.

    With some of the `layers` only, it has the embedding if the first is among them, and norm and MTP layers if the last
    is.
    """

    def __init__(self, config: K2Config, layers: range | None = None):
        super().__init__()
        count = config.num_hidden_layers
        here = range(count) if layers is None else layers
        self.depth = len(here)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if 0 in here else None
        stack = [DecoderLayer(config, index) for index in here]
        if count - 1 in here:
            stack += [MtpLayer(config, count + k) for k in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList(stack) if layers is None else Layers(stack)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps) if count - 1 in here else None

    def forward(self, x: Tensor, step: Step | list[Step]) -> Tensor:
        """Ids [B, T], or hidden states [B, T, hidden] where the first layer is elsewhere -> [B, T, hidden], after the
        final norm if that is here. With a list of steps, of micro-batches, these run through the layers alternately."""
        if not x.is_floating_point():
            x = self.embed_tokens(x)
        if isinstance(step, list):
            x = alternately(self.layers[: self.depth], step, x)
        else:
            for layer in self.layers[: self.depth]:
                x = layer(x, step)
        return x if self.norm is None else self.norm(x)


class Trunk(nn.Module):
    """The modules of a `K2Model`: what `k2kernels.engine` uses of it. Weights are random until loaded."""

    def __init__(self, config: K2Config, layers: range | None = None):
        super().__init__()
        if not isinstance(config, K2Config):
            raise TypeError(f"K2Model: config must be a K2Config, got {type(config).__name__}; see K2Config.from_dict")
        self.config = config
        self.model = Decoder(config, layers)
        self.lm_head = None
        if self.model.norm is not None:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            if config.tie_word_embeddings:
                self.lm_head.weight = self.model.embed_tokens.weight
        self.rope = Rope(config)
        for parameter in self.parameters():
            if parameter.dim() > 1:  # norms keep their ones
                nn.init.normal_(parameter, std=config.initializer_range)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.rope.inverse_frequency.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are not quantised."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)

    @property
    def mtp_layers(self) -> Sequence[MtpLayer]:
        """The multi-token prediction layers; empty for Kimi-K2."""
        return self.model.layers[self.model.depth :]

    def check_ids(self, caller: str, input_ids: Tensor, *, wait: bool = False) -> None:
        """Raises ValueError or TypeError unless `input_ids` [B, T] are ids of this vocabulary and fit the context.

        The values are checked on a CPU; with `wait` on every device.
        """
        dtype = getattr(input_ids, "dtype", type(input_ids).__name__)
        if dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{caller}: input_ids must be an int64 or int32 tensor, got {dtype}")
        limit = self.config.max_position_embeddings
        if input_ids.dim() != 2 or not 0 < input_ids.shape[1] <= limit or input_ids.shape[0] == 0:
            raise ValueError(f"{caller}: input_ids must be [B, T], T from 1 to {limit}, got {list(input_ids.shape)}")
        device = self.device
        if input_ids.device != device and (input_ids.is_meta or not wait):
            raise ValueError(f"{caller}: input_ids must be on {device} like the model, got {input_ids.device}")
        if wait or (input_ids.is_cpu and not torch.compiler.is_compiling()):
            low, high = (int(i) for i in input_ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                wanted = f"0 to {self.config.vocab_size - 1}"
                raise ValueError(f"{caller}: input_ids must be {wanted}, got {low if low < 0 else high}")
