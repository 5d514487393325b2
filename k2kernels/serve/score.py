"""Log-probabilities of a given text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from k2kernels.engine import Engine
from k2kernels.engine.cache import LatentCache
from k2kernels.engine.sampling import TokenLogprobs
from k2kernels.model.extend import Extend

CHUNK = 256  # tokens of a pass: bounds the logits


@torch.no_grad()
def score(engine: Engine, ids: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Of each id but the first, given those before it, with the `top` likeliest ones in its place.

    Runs passes of the engine's model over a cache of its own, in the arithmetic of the engine's passes. Only the
    thread that does the engine's steps may call it, as `on_update` is.
    """
    model, result = engine.model, []
    cache = LatentCache(
        model.config,
        layers=model.config.num_hidden_layers,
        rows=1,
        max_tokens=len(ids),
        dtype=model.lm_head.weight.dtype,
        device=engine.device,
    )
    cache.reserve(0, len(ids))
    tokens = torch.tensor(ids, device=engine.device)
    for start in range(0, len(ids) - 1, CHUNK):
        some, following = tokens[start : start + CHUNK], tokens[start + 1 : start + CHUNK + 1]
        step = Extend(model.rope, cache.pages, cache.block_table, engine.absorbed, [start], [len(some)])
        hidden = model.model(some[None], step)[0, : len(following)]
        rows = model.lm_head(hidden).float().log_softmax(dim=-1)
        own = rows.gather(-1, following[:, None]).squeeze(-1)
        values, names = rows.topk(min(top, rows.shape[-1]), dim=-1)
        for one, these, of in zip(own.tolist(), names.tolist(), values.tolist()):
            result.append(TokenLogprobs(one, list(zip(these, of))))
    return result
