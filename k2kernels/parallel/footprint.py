"""Bytes of the parts of a model: parameters, optimizer state, what a layer keeps for its backward, cache, buffers.

Arithmetic on sizes alone: parameters and their update rules are read from a model on the meta device, what the backward
keeps follows the ops that a layer is made of. `python_tests/parallel/test_footprint.py` counts the same bytes in models
that run. T tokens, S slots: rows of experts.
"""

from __future__ import annotations

import functools
import json
import math
from typing import NamedTuple

import torch

from k2kernels.model.config import K2Config
from k2kernels.model.linear import BLOCK, Linear
from k2kernels.model.model import K2Model
from k2kernels.model.moe import Experts
from k2kernels.ops.moe.dispatch import sufficient_capacity
from k2kernels.optim.routing import route
from k2kernels.parallel.exchange import Sizes
from k2kernels.parallel.ranks import layout_of
from k2kernels.reference.mla_cache import LATENT, ROPE, ROW_BYTES
from k2kernels.reference.w4_gemm import packed_shape

PAGE = 64  # tokens of a page of `LatentCache`
EMBEDDING, HEAD = "embedding", "head"  # places of parameters beside the layers, which have numbers


class Weight(NamedTuple):
    """A parameter or buffer of the whole model."""

    name: str
    place: int | str  # a layer's index, EMBEDDING or HEAD
    shape: tuple[int, ...]
    expert: bool  # of the routed experts: distributed over ep
    quantised: bool  # e4m3 codes with a scale per 128x128 block, where the model is kept in FP8
    method: str  # the rule that updates it, "muon" or "adamw"; "" for a buffer
    buffer_itemsize: int = 0  # of a buffer, whatever the model's dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def bytes(self, itemsize: int, fp8: bool = False, w4: str | None = None) -> int:
        """As a parameter of a dtype, or as codes and scales: `fp8` if it is quantised, `w4`, a kind, if of experts."""
        if self.buffer_itemsize:
            return self.numel * self.buffer_itemsize
        if w4 is not None and self.expert:
            return math.prod(packed_shape(w4, self.shape))
        if fp8 and self.quantised:
            *stack, rows, columns = self.shape
            return self.numel + 4 * math.prod(stack) * -(-rows // BLOCK) * -(-columns // BLOCK)
        return self.numel * itemsize


def weights(config: K2Config) -> list[Weight]:
    """Every parameter and buffer, MTP layers included, which have places from num_hidden_layers on."""
    return list(_weights(config.to_json()))


@functools.lru_cache(maxsize=8)  # a model on the meta device takes a second
def _weights(text: str) -> tuple[Weight, ...]:
    with torch.device("meta"):
        model = K2Model(K2Config.from_dict(json.loads(text)))
    quantised = {
        name
        for path, module in model.named_modules()
        if isinstance(module, (Linear, Experts))
        for name, _ in module.named_parameters(prefix=path, recurse=False)
    }
    methods = {row.name: row.method for row in route(list(model.named_parameters()), model=model)}
    found = []
    for name, parameter in model.named_parameters():
        expert = ".mlp.experts." in name
        found.append(Weight(name, _place(name), (*parameter.shape,), expert, name in quantised, methods[name]))
    for name, buffer in model.named_buffers():
        found.append(Weight(name, _place(name), (*buffer.shape,), False, False, "", buffer.itemsize))
    return tuple(found)


def _place(name: str) -> int | str:
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        return int(parts[2])
    return EMBEDDING if parts[:2] == ["model", "embed_tokens"] or parts[0] == "rope" else HEAD


def state_bytes(method: str, numel: int, itemsize: int, momentum_itemsize: int = 4) -> int:
    """MuonClip's state of a parameter: momentum or two moments and a count, and a float32 master weight beside a
    parameter in half precision."""
    master = 4 * numel if itemsize == 2 else 0
    if method == "muon":
        return master + momentum_itemsize * numel
    return master + 2 * max(itemsize, 4) * numel + 4


# ---- what the backward pass keeps


class Pass(NamedTuple):
    """A training pass of a rank."""

    tokens: int
    itemsize: int = 2  # of activations
    fp8: bool = False  # products in FP8: `K2Model.use_fp8`
    slots: int | None = None  # rows of the experts here; None: of all pairs, every expert being here
    experts: int | None = None  # which are here; None: all
    fused_norms: bool = True  # PyTorch's norm on a GPU, which keeps its input; on a CPU it keeps two float32 copies


def layer_bytes(config: K2Config, layer: int, p: Pass) -> int:
    """What layer `layer` keeps for its backward pass, without checkpointing."""
    feed_forward = moe_bytes if config.is_moe_layer(layer) else _dense_bytes
    return attention_bytes(config, p) + _norm(config.hidden_size, p) + feed_forward(config, p)


def checkpoint_bytes(config: K2Config, p: Pass) -> int:
    """What a layer keeps with activation checkpointing: its input."""
    return p.tokens * config.hidden_size * p.itemsize


def attention_bytes(config: K2Config, p: Pass) -> int:
    """The first norm, projections, and what `mla_prefill` keeps: queries, keys, values, one rotary key, output, lse."""
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    heads, value = config.num_attention_heads, config.v_head_dim
    total = _norm(config.hidden_size, p) + _inputs(config.hidden_size, p, layers=2)
    if config.q_lora_rank is not None:
        total += _norm(config.q_lora_rank, p) + _inputs(config.q_lora_rank, p)
    total += _norm(rank, p, stored=rank + rope) + _inputs(rank, p)
    total += p.tokens * heads * (p.itemsize * (config.qk_head_dim + config.qk_nope_head_dim + 2 * value) + 4)
    total += p.tokens * rope * p.itemsize
    return total + (_inputs(heads * value, p) if p.fp8 else 0)  # else o_proj's input is the output itself


def moe_bytes(config: K2Config, p: Pass) -> int:
    """Router, shared experts, and the slots of the routed ones."""
    hidden, experts, top_k = config.hidden_size, config.n_routed_experts, config.num_experts_per_tok
    shared = config.moe_intermediate_size * config.n_shared_experts
    total = p.tokens * 4 * hidden + logits_bytes(config, p)  # the router's input is float32 too
    total += 0 if p.itemsize == 4 else 4 * experts * hidden  # and its weight
    if shared:
        # In float32 the router's input is also that of the shared experts.
        total += 0 if p.itemsize == 4 and not p.fp8 else _inputs(hidden, p)
        total += p.tokens * 2 * shared * p.itemsize + _inputs(shared, p)
    total += 12 * p.tokens * top_k  # experts, slots and weights of each pair
    here = experts if p.experts is None else p.experts
    slots = expert_slots(p.tokens * top_k, here, p.fp8) if p.slots is None else p.slots
    return total + slots * slot_bytes(config, p) + 4 * (2 * here + 1)


def logits_bytes(config: K2Config, p: Pass) -> int:
    """The logits in float32 that a router keeps for `sequence_loss`, checkpointed or not (part of `moe_bytes`)."""
    return 4 * p.tokens * config.n_routed_experts


def expert_slots(pairs: int, experts: int, fp8: bool) -> int:
    """Slots that `pairs` pairs get; with FP8 gradients each expert's begin at a multiple of 128."""
    return sufficient_capacity(experts, pairs, BLOCK if fp8 else 1)


def slot_bytes(config: K2Config, p: Pass) -> int:
    """What a slot of an expert keeps: the row that arrived, gate and up, their SwiGLU, the result, its token."""
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    if p.fp8:  # the first and the third are codes, with a float32 scale for 128 tokens: slots are a multiple of 128
        return (hidden + intermediate) * (BLOCK + 4) // BLOCK + p.itemsize * (2 * intermediate + hidden) + 4
    return p.itemsize * (2 * hidden + 3 * intermediate) + 4


def head_bytes(config: K2Config, p: Pass) -> int:
    """The last norm, the head and torch's cross entropy: the log-probabilities in float32, and the targets."""
    inputs = _inputs(config.hidden_size, p._replace(fp8=False))  # the head's product is never FP8
    return _norm(config.hidden_size, p) + inputs + p.tokens * (4 * config.vocab_size + 8) + 4


def stem_bytes(config: K2Config, p: Pass, sequences: int = 1) -> int:
    """What all layers share: token ids, cosines and sines, and the offsets of the sequences."""
    return p.tokens * (8 + 4 * config.qk_rope_head_dim) + 4 * (sequences + 1)


def _dense_bytes(config: K2Config, p: Pass) -> int:
    width = config.intermediate_size
    return _inputs(config.hidden_size, p) + p.tokens * 2 * width * p.itemsize + _inputs(width, p)


def _inputs(width: int, p: Pass, layers: int = 1) -> int:
    """What linear layers of one input keep: the input, once; or codes of each, with a scale for 128 tokens."""
    if p.fp8:
        return layers * (p.tokens * width + 4 * width * -(-p.tokens // BLOCK))
    return p.tokens * width * p.itemsize


def _norm(width: int, p: Pass, stored: int | None = None) -> int:
    """A norm of `width` columns, its input being part of rows of `stored`."""
    stored = width if stored is None else stored
    if p.fused_norms:
        return p.tokens * (stored * p.itemsize + 4)
    return p.tokens * (4 * (stored if p.itemsize == 4 else width) + 4 * width + 4)


# ---- inference and exchange


def cache_bytes(config: K2Config, rows: int, tokens: int, itemsize: int = 2, fp8: bool = False) -> int:
    """The pages of a `LatentCache` for `rows` sequences of up to `tokens` tokens, and their table."""
    pages = -(-tokens // PAGE)
    return rows * pages * (PAGE * cache_row_bytes(config, itemsize, fp8) * config.num_hidden_layers + 4)


def cache_row_bytes(config: K2Config, itemsize: int = 2, fp8: bool = False) -> int:
    """Bytes of a token and layer."""
    return ROW_BYTES if fp8 else itemsize * config.latent_dim


def serves_fp8_cache(config: K2Config) -> bool:
    """Whether the FP8 cache has rows of these sizes."""
    return (config.kv_lora_rank, config.qk_rope_head_dim) == (LATENT, ROPE)


def absorbed_bytes(config: K2Config, itemsize: int = 2) -> int:
    """kv_b_proj of all layers, decoded: what a decoding session keeps of a model in FP8."""
    width = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    return config.num_hidden_layers * width * config.kv_lora_rank * itemsize


def buffer_bytes(config: K2Config, ranks: int, max_tokens: int, row_dtype: torch.dtype = torch.bfloat16) -> int:
    """The buffer of one rank for exchanges among `ranks` GPUs that reach each other's memory ("symmetric")."""
    sizes = Sizes(config.n_routed_experts, config.hidden_size, config.num_experts_per_tok, max_tokens, row_dtype)
    return layout_of(ranks, sizes).bytes
