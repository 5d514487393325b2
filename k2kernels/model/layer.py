"""One layer of the stack."""

from __future__ import annotations

from torch import Tensor, nn

from k2kernels.model.attention import LatentAttention, Step
from k2kernels.model.config import K2Config
from k2kernels.model.moe import Mlp, Moe


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each on the normed input and added to it; `index` counts from the bottom."""

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
        return self.feed_forward(self.attend(x, step))

    def attend(self, x: Tensor, step: Step) -> Tensor:
        """The first half of `forward`."""
        return x + self.self_attn(self.input_layernorm(x), step)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half."""
        return x + self.mlp(self.post_attention_layernorm(x))
