"""Multi-token prediction: a layer that predicts the token after next from a position's hidden state and next token.

Source: DeepSeek-V3 (2024), section 2.2. The hidden state is the one *after* the final norm, as in transformers
(modeling_layers.py, MtpModel); the paper does not specify it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from k2kernels.model.attention import Step
from k2kernels.model.config import K2Config
from k2kernels.model.layer import DecoderLayer


class MtpLayer(DecoderLayer):
    """A decoder layer between a projection of (next token, hidden state) and a norm; it shares embedding and head."""

    def __init__(self, config: K2Config, index: int):
        super().__init__(config, index)
        self.enorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(self, hidden: Tensor, embedded: Tensor, step: Step) -> Tensor:
        """Both [B, T, hidden]: normed hidden states, and the embedding of each position's next token.

        Returns the normed hidden state: the input of the head, and of the next MTP layer.
        """
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        return self.shared_head["norm"](super().forward(x, step))
