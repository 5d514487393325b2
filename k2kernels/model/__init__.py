"""The thin model: configuration, checkpoints, forward pass, paged latent cache, generation."""

from k2kernels.model.config import K2Config
from k2kernels.model.model import K2Model

__all__ = ["K2Config", "K2Model"]
