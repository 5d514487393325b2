"""Attention over a paged cache of latent rows (decoding): the public functions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MlaOutput(NamedTuple):
    """What an attention op returns."""

    out: Tensor  # in the dtype of the queries
    lse: Tensor  # natural logarithm of the sum of exponentials, float32; -inf where a row sees no key
    max_logits: Tensor | None  # largest scaled, masked logit, float32; None unless asked for
