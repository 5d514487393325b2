"""One layer of the stack."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from k2kernels.model.attention import LatentAttention, Prefill, Step
from k2kernels.model.config import K2Config
from k2kernels.model.moe import Mlp, Moe


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each on the normed input and added to it; `index` counts from the bottom.

    With `checkpoints`, a pass whose gradient is needed keeps the input only, and the backward pass runs it again.
    """

    checkpoints = False

    def __init__(self, config: K2Config, index: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.is_moe_layer(index):
            self.mlp = Moe(config)
        else:
            self.mlp = Mlp(config, config.intermediate_size)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden]."""
        if not (self.checkpoints and torch.is_grad_enabled()):
            return self._halves(x, step)
        # Not stopped early: an exception would pass by the hooks of modules inside, such as FSDP's.
        options = dict(use_reentrant=False, preserve_rng_state=False, early_stop=False)
        return checkpoint(self._halves, x, step, **options)

    def _halves(self, x: Tensor, step: Step) -> Tensor:
        return self.feed_forward(self.attend(x, step), step)

    def attend(self, x: Tensor, step: Step) -> Tensor:
        """The first half of `forward`."""
        return x + self.self_attn(self.input_layernorm(x), step)

    def feed_forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        """The second half."""
        normed = self.post_attention_layernorm(x)
        if isinstance(step, Prefill) and step.micro_batch is not None and isinstance(self.mlp, Moe):
            return x + self.mlp(normed, step.micro_batch)
        return x + self.mlp(normed)
