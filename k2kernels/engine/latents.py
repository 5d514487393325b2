"""The cache of a text as a file, which another engine with the same model takes as a prefix that it has computed.

Form "latent-1": one safetensors file. Its tensors, of L layers (MTP layers last), T tokens (a multiple of 64), C latent
and R rope dimensions:

    tokens   int32 [T]
    latent   [L, T, C], after the norm, and rope [L, T, R], rotated; in the dtype of the cache
    packed   uint8 [L, T, 656] instead of both: the rows of an FP8 cache, as `mla_append` writes them

and its metadata: `form`; `model`, a digest of the configuration and of some weights; `mtp_layers`; `rope_order`, which
of the rotated pairs' members are neighbours: "half-split" (all first members, then all second ones; the order of this
library and of transformers) or "interleaved" (vLLM's).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from k2kernels.engine.cache import PAGE_SIZE
from k2kernels.engine.engine import Engine
from k2kernels.engine.pool import Key, extend_keys, root_key
from k2kernels.model import files
from k2kernels.model.trunk import Trunk
from k2kernels.reference.mla_cache import ROW_BYTES

FORM = "latent-1"
ORDERS = ("half-split", "interleaved")
_OF_FILES = ("dtype", "torch_dtype", "quantization_config", "eos_token_id", "bos_token_id", "pad_token_id")


def save_latents(engine: Engine, ids: Sequence[int], path: str | Path, *, salt: str = "") -> int:
    """Writes the rows of the full pages at the beginning of `ids` that are in the engine's cache, as those of
    `request.prompt + sample.tokens` are until the pool needs their pages.

    Returns:
        The number of tokens in the file.

    Raises:
        ValueError: not one full page is there.
        OSError: the file cannot be written; one that was there before stays.
    """
    with engine.stepping:
        pages = engine.pool.find(_keys(ids, salt))
        if not pages:
            raise ValueError(
                f"save_latents: the cache must have the first {PAGE_SIZE} of ids under this salt, has none"
            )
        rows = engine.pool.pages[:, pages].flatten(1, 2)
    return write_latents(engine.model, ids, rows, path, mtp_layers=engine.drafts)


def write_latents(
    model: Trunk,
    ids: Sequence[int],
    rows: Tensor,
    path: str | Path,
    *,
    rope_order: str = "half-split",
    mtp_layers: int = 0,
) -> int:
    """The same of rows that another program computed with the same weights.

    Args:
        rows: [L, T, C + R] (or uint8 [L, T, 656]), the rows of the first T of `ids` in each layer; what does not fill
            a page is left out. vLLM's are `cache.flatten(0, 1)[slots]` of each layer, with `rope_order="interleaved"`.

    Returns:
        The number of tokens in the file.

    Raises:
        ValueError: another shape; not one full page.
        OSError: as `save_latents`.
    """
    latent, rope = model.config.kv_lora_rank, model.config.qk_rope_head_dim
    width = ROW_BYTES if rows.dtype == torch.uint8 else latent + rope
    layers = model.config.num_hidden_layers + mtp_layers
    good = rows.dim() == 3 and rows.shape[0] == layers and rows.shape[2] == width
    if not good or not PAGE_SIZE <= rows.shape[1] <= len(ids):
        wanted = f"[{layers}, {PAGE_SIZE} to {len(ids)}, {width}]"
        raise ValueError(f"write_latents: rows must be {wanted}, got {list(rows.shape)}")
    if rope_order not in ORDERS:
        raise ValueError(f"write_latents: rope_order must be {' or '.join(ORDERS)}, got {rope_order!r}")
    rows = rows[:, : rows.shape[1] // PAGE_SIZE * PAGE_SIZE].cpu()
    tensors = {"tokens": torch.tensor(ids[: rows.shape[1]], dtype=torch.int32)}
    if rows.dtype == torch.uint8:
        tensors["packed"] = rows.contiguous()
    else:
        tensors["latent"], tensors["rope"] = (part.contiguous() for part in rows.split([latent, rope], dim=-1))
    metadata = dict(form=FORM, model=_digest(model), mtp_layers=str(mtp_layers), rope_order=rope_order)
    files.replace_file(Path(path), lambda file: file.write(save(tensors, metadata)))
    return rows.shape[1]


def load_latents(engine: Engine, path: str | Path, *, salt: str = "") -> int:
    """Puts the pages of a file into the engine's cache, as far as it has room; a request whose prompt begins with the
    file's tokens then computes the rest alone.

    Returns:
        The number of tokens that the cache has of the file.

    Raises:
        ValueError: not a file of this form, of this model, or for a cache of this dtype; or it has no rows of MTP
            layers, which a speculative engine needs.
    """

    def require(condition: bool, what: str, wanted: object, got: object) -> None:
        if not condition:
            raise ValueError(f"load_latents: {what} of {path} must be {wanted}, got {got}")

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"load_latents: {path} is not a safetensors file: {error}") from error
    require(metadata.get("form") == FORM, "form", FORM, metadata.get("form"))
    require(metadata.get("model") == _digest(engine.model), "model", "that of the engine", "another one")
    order = metadata.get("rope_order")
    require(order in ORDERS, "rope_order", " or ".join(ORDERS), order)
    cache, config = engine.pool.pages, engine.model.config
    names = {"tokens", "packed"} if cache.dtype == torch.uint8 else {"tokens", "latent", "rope"}
    require(set(tensors) == names, "tensors", sorted(names), sorted(tensors))
    tokens = tensors["tokens"]
    count = tokens.numel()
    require(
        tokens.dtype == torch.int32 and tokens.dim() == 1 and count > 0 and count % PAGE_SIZE == 0,
        "tokens", f"int32 [T], T a multiple of {PAGE_SIZE}", f"{tokens.dtype} {list(tokens.shape)}",
    )  # fmt: skip
    layers = config.num_hidden_layers + engine.drafts
    widths = dict(packed=cache.shape[-1], latent=config.kv_lora_rank, rope=config.qk_rope_head_dim)
    for name in names - {"tokens"}:
        part = tensors[name]
        good = part.dtype == cache.dtype and part.dim() == 3 and part.shape[0] >= layers
        good = good and list(part.shape[1:]) == [count, widths[name]]
        wanted = f"{cache.dtype} [{layers} or more, {count}, {widths[name]}]"
        require(good, name, wanted, f"{part.dtype} {list(part.shape)}")
    if cache.dtype == torch.uint8:
        require(order == "half-split", "rope_order", "half-split, as rows are packed", order)
        rows = tensors["packed"]
    else:
        rope = tensors["rope"]
        if order == "interleaved":
            rope = torch.cat([rope[..., 0::2], rope[..., 1::2]], dim=-1)
        rows = torch.cat([tensors["latent"], rope], dim=-1)
    return _put(engine, rows[:layers].unflatten(1, (-1, PAGE_SIZE)), _keys(tokens.tolist(), salt))


def _put(engine: Engine, rows: Tensor, keys: list[Key]) -> int:
    """Rows [layers, pages, 64, row] of pages that the cache does not have."""
    pool = engine.pool
    with engine.stepping:
        there = pool.find(keys)
        pool.share(there)  # or taking pages might take these
        new = pool.take(min(len(keys) - len(there), pool.available))
        end = len(there) + len(new)
        pool.pages[:, new] = rows[:, len(there) : end].to(pool.pages.device)
        for page, key in zip(new, keys[len(there) : end]):
            pool.publish(page, key)
        pool.release(there + new)
    return end * PAGE_SIZE


def _keys(ids: Sequence[int], salt: str) -> list[Key]:
    keys: list[Key] = []
    extend_keys(keys, root_key(salt), ids)
    return keys


def _digest(model: Trunk) -> str:
    """Of the architecture, and of weights that quantisation leaves alone: the norms before the cache, and 8 rows of the
    embedding, in float32."""
    values = {key: value for key, value in model.config.to_dict().items() if key not in _OF_FILES}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    norms = [layer.self_attn.kv_a_layernorm.weight for layer in model.model.layers[: model.model.depth]]
    for weight in (*norms, model.model.embed_tokens.weight[:8]):
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
