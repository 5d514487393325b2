"""Kimi-K2 and DeepSeek-V3 models of Hugging Face's transformers, with the ops of this package inside.

    from k2kernels.integrations.transformers import patch, register_kimi_k2, report, unpatch

    register_kimi_k2()                      # model_type "kimi_k2" without remote code
    model = patch(AutoModelForCausalLM.from_pretrained(path))
    print(report(model))
    model.generate(...)                     # the same greedy tokens

`patch` swaps classes of modules; parameters, their names and `save_pretrained` stay as they are:

- `DeepseekV3Attention` attends over the cache in latent space (`mla_decode`), where transformers expands the keys and
  values of all heads for every token of the past in each step. `PagedLatents` keeps the cache's rows in pages.
- Experts are computed by `moe_mlp`, through transformers' own table of implementations.
- `FP8Linear` is `quantize_1x128` and `fp8_gemm`: any number of rows, such as the 576 of `kv_a_proj_with_mqa`.
- `generate_batch` (continuous batching) keeps latent rows in its paged cache. transformers' own layers cannot: its
  pages have the shape of one head's keys and values.

Tested with transformers 5.17.0, 5.23.0 and 5.24.0; continuous batching with 5.23.0 and 5.24.0, whose classes it needs.
"""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface, FP8Linear
from transformers.integrations.moe import ExpertsInterface
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from k2kernels._backend import UnsupportedError
from k2kernels.engine.cache import PAGE_SIZE
from k2kernels.functional.moe_mlp import moe_mlp
from k2kernels.ops.fp8_gemm import fp8_gemm
from k2kernels.ops.mla_cache import mla_append
from k2kernels.ops.mla_decode import mla_decode
from k2kernels.ops.quant import dequantize, quantize_1x128
from k2kernels.text.tokenizer import KIMI_PATTERN

NAME = "k2kernels"  # of the implementation of experts
BLOCK = (128, 128)  # of FP8 weights that have one scale
LATENT_PAGES = tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (5, 23)
_log = logging.getLogger(__name__)
_swapped: weakref.WeakSet[K2Attention] = weakref.WeakSet()


# kimi_k2


class KimiK2Config(DeepseekV3Config):
    model_type = "kimi_k2"


class KimiK2Model(deepseek.DeepseekV3Model):
    config_class = KimiK2Config
    _can_set_attn_implementation_cached_value = _can_set_experts_implementation_cached_value = True


class KimiK2ForCausalLM(deepseek.DeepseekV3ForCausalLM):
    config_class = KimiK2Config
    _can_set_attn_implementation_cached_value = _can_set_experts_implementation_cached_value = True


class TikTokenTokenizer(TokenizersBackend):
    """tokenizer.json, or tiktoken.model cut into words as Kimi does; the name that its tokenizer_config.json gives."""

    @classmethod
    def _convert_from_tiktoken(cls, vocab_file: str, local_kwargs: dict[str, Any]) -> dict[str, Any]:
        made = super()._convert_from_tiktoken(vocab_file, local_kwargs)
        words = Split(Regex(KIMI_PATTERN), behavior="isolated")
        made["tokenizer_object"].pre_tokenizer = Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
        return made


def register_kimi_k2() -> None:
    """Makes AutoConfig, AutoTokenizer, AutoModel and AutoModelForCausalLM read checkpoints of model_type "kimi_k2".

    They become DeepSeek-V3 models, without remote code; may be called again.
    """
    AutoConfig.register("kimi_k2", KimiK2Config, exist_ok=True)
    AutoTokenizer.register(KimiK2Config, tokenizer_class=TikTokenTokenizer, exist_ok=True)
    AutoModel.register(KimiK2Config, KimiK2Model, exist_ok=True)
    AutoModelForCausalLM.register(KimiK2Config, KimiK2ForCausalLM, exist_ok=True)
    mapping = get_checkpoint_conversion_mapping("deepseek_v3")  # stacks experts; without it none is found in the file
    register_checkpoint_conversion_mapping("kimi_k2", mapping, overwrite=True)


# Swapping


def patch(model: nn.Module) -> nn.Module:
    """Swaps attention, experts and FP8 linears of a DeepSeek-V3, Kimi-K2 or Kimi-K2.5 model, in place.

    Args:
        model: a transformers model, or any module that holds one. Patching twice is patching once.

    Returns:
        The same model. `report` says what was swapped.

    Raises:
        ValueError: there is no DeepseekV3Attention in it.
        UnsupportedError: some of its weights are not on their device: offloaded by accelerate, or meta tensors.
    """
    modules = dict(model.named_modules())
    if not any(isinstance(module, deepseek.DeepseekV3Attention) for module in modules.values()):
        raise ValueError(
            f"patch: model must hold attention layers of model type deepseek_v3, kimi_k2 or kimi_k25, got "
            f"{type(model).__name__}; leave other models as they are"
        )
    for name, module in modules.items():
        if _is_offloaded(module):
            raise UnsupportedError(
                f"patch: weights of model must stay on their device, got {name or 'model'} offloaded; load it without "
                "offload_folder and with a device_map of devices alone"
            )
    for module in modules.values():
        if type(module) in _CLASSES and _obstacle(module) is None:
            module.__class__ = _CLASSES[type(module)]
            if isinstance(module, K2Attention):
                _swapped.add(module)
    experts = [module for module in _experts(modules).values() if not hasattr(module, "_before_k2kernels")]
    experts = [module for module in experts if _obstacle(module) is None]
    for module in experts:  # all before the first assignment: they share a config
        module._before_k2kernels = module.config._experts_implementation
    for module in experts:
        module.config._experts_implementation = NAME
    if LATENT_PAGES:
        continuous_api.PagedAttentionCache = LatentPagedCache
    _log.info(report(model))
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes `patch`, in place; returns the same model. Caches of patched layers may be used further."""
    modules = dict(model.named_modules())
    for module in modules.values():
        if type(module) in _CLASSES.values():
            module.__class__ = type(module).__base__
            _swapped.discard(module)
    for module in _experts(modules).values():
        if hasattr(module, "_before_k2kernels"):
            module.config._experts_implementation = module._before_k2kernels
            del module._before_k2kernels
    if not _swapped:
        continuous_api.PagedAttentionCache = PagedAttentionCache
    return model


def report(model: nn.Module) -> str:
    """One line: how many layers of each kind are swapped, and why others are not."""
    modules = dict(model.named_modules())
    kinds = {
        "attention": {n: m for n, m in modules.items() if isinstance(m, deepseek.DeepseekV3Attention)},
        "experts": _experts(modules),
        "FP8 linears": {n: m for n, m in modules.items() if isinstance(m, FP8Linear)},
    }
    parts, reasons = [], {}
    for kind, found in kinds.items():
        swapped = [m for m in found.values() if isinstance(m, (K2Attention, K2FP8Linear)) or _is_ours(m)]
        parts.append(f"{kind} {len(swapped)} of {len(found)}")
        for name, module in found.items():
            if module not in swapped:
                reasons.setdefault(_obstacle(module) or "not patched", []).append(name)
    if not LATENT_PAGES:
        reasons[f"needs transformers 5.23, this is {transformers.__version__}"] = ["continuous batching"]
    stays = "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({why})" for why, names in reasons.items()
    )
    return f"k2kernels: {', '.join(parts)}; left to transformers: {stays or 'nothing'}"


def _experts(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The stacks of routed experts among modules, by name."""
    blocks = {name: module for name, module in modules.items() if isinstance(module, deepseek.DeepseekV3MoE)}
    return {f"{name}.experts": block.experts for name, block in blocks.items()}


def _is_ours(experts: nn.Module) -> bool:
    return hasattr(experts, "_before_k2kernels") and experts.config._experts_implementation == NAME


def _is_offloaded(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)  # accelerate's
    hooks = getattr(hook, "hooks", (hook,))
    meta = any(tensor.is_meta for tensor in module.parameters(recurse=False))
    return meta or any(getattr(hook, "offload", False) for hook in hooks)


def _obstacle(module: nn.Module) -> str | None:
    """Why a layer stays with transformers, if it does."""
    if "forward" in vars(module):
        return "its forward was replaced"
    if isinstance(module, (deepseek.DeepseekV3Attention, FP8Linear)):
        if type(module) not in (*_CLASSES, *_CLASSES.values()):
            return f"it is a {type(module).__name__}"
        if isinstance(module, FP8Linear):
            return _fp8_obstacle(module, module.weight, module.weight_scale_inv)
        return None if _up_projection(module, module.kv_a_layernorm.weight.dtype) else "kv_b_proj is no plain matrix"
    for name, wanted in dict(has_gate=True, has_bias=False, is_transposed=False, is_concatenated=True).items():
        if getattr(module, name, wanted) != wanted:
            return f"{name}={not wanted}"
    for name in ("_is_expert_parallel", "has_post_expert_norm", "limit", "swiglu_alpha", "gate_softcap", "up_softcap"):
        if getattr(module, name, None):
            return f"{name}={getattr(module, name)}"
    if module.config.hidden_act != "silu" or module.config._experts_implementation == "deepgemm_megamoe":
        return f"{module.config.hidden_act}, {module.config._experts_implementation}"
    gate_up, down = module.gate_up_proj, module.down_proj
    if gate_up.element_size() == 1:
        first = _fp8_obstacle(module, gate_up, module.gate_up_proj_scale_inv)
        return first or _fp8_obstacle(module, down, module.down_proj_scale_inv)
    return None if type(gate_up) is type(down) is nn.Parameter else "its weights are distributed"


def _fp8_obstacle(module: nn.Module, weight: Tensor, scales: Tensor) -> str | None:
    if weight.dtype != torch.float8_e4m3fn:
        return f"weights in {str(weight.dtype).removeprefix('torch.')}"
    if tuple(module.block_size or ()) != BLOCK or module.activation_scheme != "dynamic":
        return f"block_size={module.block_size}, activation_scheme={module.activation_scheme!r}"
    if scales.dtype != torch.float32 or type(weight) is not nn.Parameter:
        return "scales are not float32, or weights are distributed"
    return None


# Attention


class PagedLatents(DynamicLayer):
    """A layer of DynamicCache whose rows [latent | rotated key] are in pages, as `mla_decode` reads them.

    `rows` is [B, capacity, D]; keys and values are views of what is filled. What replaces them (beam search, crop and
    whatever else transformers does to a layer) needs no counterpart here: the next `update` sees that they are no
    longer these views, and copies them. With autograd on, rows are kept as transformers does.
    """

    rows: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, sizes = self.get_seq_length(), [key_states.shape[-1], value_states.shape[-1]]
        batch, _, new, _ = key_states.shape
        end = past + new
        if past == 0 or not self._holds(self.keys) or end + PAGE_SIZE > self.rows.shape[1]:
            # A quarter more than is needed, and a page: reading the last page ends inside.
            capacity = (end + end // 4 + 2 * PAGE_SIZE) // PAGE_SIZE * PAGE_SIZE
            rows = key_states.new_empty(batch, capacity, sum(sizes))
            if past:
                rows[:, :past] = torch.cat([self.keys, self.values], dim=-1)[:, 0]
            self.rows = rows
        self.rows[:, past:end, : sizes[0]] = key_states[:, 0]
        self.rows[:, past:end, sizes[0] :] = value_states[:, 0]
        self.keys, self.values = self.rows[:, None, :end].split(sizes, dim=-1)
        return self.keys, self.values

    def _holds(self, keys: Tensor) -> bool:
        """Whether keys are a view of the first of these rows, which may be written in place."""
        rows = self.rows
        return (
            rows is not None
            and keys.data_ptr() == rows.data_ptr()
            and keys.shape[0] == rows.shape[0]
            and (torch.is_inference_mode_enabled() or not rows.is_inference())
        )

    def pages(self, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cache, table and lengths for `mla_decode`, of the rows from first [B] on of each sequence.

        A page begins at any row: pages overlap, and a sequence's first one begins where its padding ends.
        """
        batch, capacity, size = self.rows.shape
        flat = self.rows.view(-1, size)
        cache = flat.as_strided((len(flat) - PAGE_SIZE + 1, PAGE_SIZE, size), (size, size, 1))
        tokens = self.get_seq_length()
        starts = torch.arange(batch, device=first.device) * capacity + first
        table = starts[:, None] + torch.arange(0, tokens, PAGE_SIZE, device=first.device)
        return cache, table.clamp(max=len(cache) - 1).int(), (tokens - first).int()


class K2Attention(deepseek.DeepseekV3Attention):
    """DeepseekV3Attention that attends in latent space to rows of `PagedLatents` or of a paged cache.

    Static and offloaded caches, prompts, long continuations, other masks than causal ones with padding at the left,
    autograd, autocast and requested attention weights are left to transformers.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy
        super().__setstate__(state)
        _swapped.add(self)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        cache = next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
        if cache is not None and not args:  # the name depends on the version; layers pass everything by name
            hidden = kwargs["hidden_states"]
            if isinstance(cache, LatentPagedCache) and cache.row_size and _up_projection(self, hidden.dtype):
                return self._attend_paged(paged=cache, **kwargs)
            layer = _paged_layer(cache, self.layer_idx)
            if layer is not None and self._absorbs(layer.get_seq_length(), **kwargs):
                first = _padding(kwargs.get("attention_mask"), layer.get_seq_length(), hidden)
                if first is not None:
                    q, latent, rope = self._project(hidden, kwargs["position_embeddings"])
                    cache.update(latent[:, None], rope[:, None], self.layer_idx)
                    return self._attend(q, *layer.pages(first)), None
        return super().forward(*args, **kwargs)

    def _absorbs(self, past: int, hidden_states: Tensor, **kwargs: Any) -> bool:
        """Whether a pass over these new tokens can be made in latent space, and takes fewer FLOPs so.

        Per head, n new tokens after L others take 2 n L (2 C + R) FLOPs in latent space; expanded 2 n L (nope + R + V)
        and 2 L C (nope + V) to expand.
        """
        new, expanded = hidden_states.shape[1], self.qk_nope_head_dim + self.v_head_dim
        return (
            past > 0
            and new * (2 * self.kv_lora_rank - expanded) <= self.kv_lora_rank * expanded
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(hidden_states.device.type)
            and not kwargs.get("output_attentions", False)
            and _up_projection(self, hidden_states.dtype) is not None
        )

    def _project(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, H, latent + rope], and what is cached: latents [B, S, C] and rotated keys [B, S, R]."""
        if self.q_lora_rank is None:
            q = self.q_proj(hidden)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        q = q.unflatten(-1, (-1, self.qk_head_dim))
        q, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, rope = self.kv_a_proj_with_mqa(hidden).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        interleaved, halves = deepseek.apply_rotary_pos_emb_interleave, deepseek.apply_rotary_pos_emb
        rotate = interleaved if self.config.rope_interleave else halves
        q_rope, rope = rotate(q_rope, rope.unsqueeze(2), *position_embeddings, unsqueeze_dim=2)
        key, _ = _up_projection(self, hidden.dtype)
        q = torch.cat([torch.einsum("bshd,hdc->bshc", q, key), q_rope], dim=-1)
        return q, self.kv_a_layernorm(latent), rope.squeeze(2)

    def _attend(self, q: Tensor, pages: Tensor, table: Tensor, lengths: Tensor, starts: Tensor | None = None) -> Tensor:
        """The layer's output [..., hidden] of queries [B, S, H, D], or [T, H, D] from `starts` on."""
        out = mla_decode(
            q, pages, table, lengths, softmax_scale=self.scaling, cu_seqlens_q=starts, head_dim_v=self.kv_lora_rank
        ).out
        _, value = _up_projection(self, q.dtype)
        return self.o_proj(torch.einsum("...hc,hvc->...hv", out, value).flatten(-2))

    def _attend_paged(
        self,
        paged: LatentPagedCache,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cu_seq_lens_q: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Continuous batching: prompts, parts of them and single tokens of several requests, packed: [1, T, hidden]."""
        q, latent, rope = self._project(hidden_states, position_embeddings)
        place = paged.place(self.layer_idx, cu_seq_lens_q, **kwargs)
        mla_append(torch.cat([latent, rope], dim=-1)[0], place.pages, place.new_table, place.new_positions)
        return self._attend(q[0], place.pages, place.table, place.lengths, cu_seq_lens_q)[None], None


def _up_projection(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """kv_b_proj of an attention layer as W_UK [H, nope, C] and W_UV [H, V, C]; None if it is more than a matrix."""
    linear = module.kv_b_proj
    if isinstance(linear, FP8Linear):
        weight = None if _obstacle(linear) else _dequantized(linear, dtype)
    else:
        plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and linear.weight.dtype == dtype
        weight = linear.weight if plain else None
    if weight is None:
        return None
    rows = module.qk_nope_head_dim, module.v_head_dim
    return weight.view(-1, sum(rows), module.kv_lora_rank).split(rows, dim=1)


_decoded: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Tensor]] = weakref.WeakKeyDictionary()


def _dequantized(linear: FP8Linear, dtype: torch.dtype) -> Tensor:
    """The weight of an FP8 linear, computed again only when it was written to or moved."""
    pair = linear.weight, linear.weight_scale_inv
    state = dtype, *((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in pair)
    if linear not in _decoded or _decoded[linear][0] != state:
        _decoded[linear] = state, dequantize(*(tensor.detach() for tensor in pair), block=BLOCK, dtype=dtype)
    return _decoded[linear][1]


def _paged_layer(cache: Any, index: int) -> PagedLatents | None:
    """The layer of a DynamicCache as `PagedLatents`, which it becomes here."""
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is DynamicLayer:
        layer.__class__ = PagedLatents
    return layer if isinstance(layer, PagedLatents) else None


_last_mask: tuple[Any, ...] = ()  # all layers of a pass have the same one


def _padding(mask: Any, past: int, hidden: Tensor) -> Tensor | None:
    """How many tokens are padding [B], at the left, if that and causality are all that the mask says; else None."""
    global _last_mask
    batch, new, _ = hidden.shape
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64, device=hidden.device)
    if not isinstance(mask, Tensor) or mask.shape[-1] != past + new or (mask.dim() == 4 and mask.shape[1] != 1):
        return None
    key = weakref.ref(mask), past, batch
    if _last_mask and _last_mask[0]() is mask and _last_mask[1:3] == key[1:]:
        return _last_mask[3]
    position = torch.arange(past + new, device=mask.device)
    causal = position <= position[past:, None]
    seen = mask[:, 0] if mask.dim() == 4 else mask[:, None].bool() & causal
    if seen.is_floating_point():  # what is added to the logits
        rest = seen.masked_fill(seen == 0, -torch.inf)
        seen = seen == 0
    else:
        seen, rest = seen.bool(), None
    first = seen[:, -1].int().argmax(-1)
    same = torch.equal(seen, causal & (position >= first[:, None, None]))
    if rest is not None:
        same = same and bool((rest <= torch.finfo(rest.dtype).min / 2).all())
    _last_mask = (*key, first.expand(batch) if same else None)
    return _last_mask[3]


# Continuous batching


class Place(NamedTuple):
    """Where the rows of a packed pass are, as `mla_append` and `mla_decode` take it."""

    pages: Tensor
    table: Tensor
    lengths: Tensor
    new_table: Tensor
    new_positions: Tensor


class LatentPagedCache(PagedAttentionCache):
    """transformers' paged cache; the pages of patched models hold rows of D = latent + rope numbers.

    A page of one head of D / 2 keys and D / 2 values is of the same size as one of rows of D: the allocators need only
    be told so. `row_size` is D, or None for other models, for which nothing changes.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        row_size = config.kv_lora_rank + config.qk_rope_head_dim if any(a.config is config for a in _swapped) else None
        self.row_size = None if row_size is None or row_size % 2 else row_size
        if self.row_size:
            config = copy.copy(config)
            config.num_key_value_heads, config.head_dim = 1, self.row_size // 2
        super().__init__(config, *args, **kwargs)

    def place(
        self,
        layer: int,
        starts: Tensor,
        cu_seq_lens_k: dict[str, Tensor],
        max_length_k: dict[str, int],
        read_index: list[Tensor],
        write_index: list[Tensor],
        block_table: Tensor | None = None,
        **_: Any,
    ) -> Place:
        """The rows of a pass in the pages of a layer, from what transformers tells its attention functions."""
        allocator = self.layer_to_allocator[layer]
        layers, page_size = len(allocator.layer_indices), allocator.tokens_per_page
        pages = allocator.cache_tensor.view(-1, page_size, self.row_size)
        number = allocator.layer_indices.index(layer)  # a block has a page for each layer
        ends = cu_seq_lens_k[allocator.layer_type].int()
        lengths = ends.diff()
        if block_table is not None:  # one token of each request; entries count pages of keys, two for each of ours
            table = block_table[allocator.index] // (2 * layers) * layers + number
            return Place(pages, table, lengths, table, lengths - 1)
        # Indices count keys: block * block_physical_stride + place in the page.
        stride, new = allocator.block_physical_stride, write_index[allocator.index]
        page = (new // stride * layers + number).int()
        positions = torch.where(new == allocator.write_trash_index, -1, new % stride)
        rows = (
            read_index[allocator.index] if read_index[allocator.index].numel() else new
        )  # none: nothing is cached yet
        first = torch.arange(0, max_length_k[allocator.layer_type], page_size, device=new.device)
        table = rows[(ends[:-1, None] + first).clamp(max=len(rows) - 1)] // stride * layers + number
        return Place(pages, table.int(), lengths, page[:, None], positions)


# Experts and linears


def _experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The routed experts of a layer, [T, hidden], by `moe_mlp`; what it does not serve, by what was set before."""
    gate_up, down = module.gate_up_proj, module.down_proj
    fp8 = gate_up.element_size() == 1
    grad = torch.is_grad_enabled() and hidden_states.requires_grad
    if _obstacle(module) or (grad if fp8 else gate_up.dtype != hidden_states.dtype):
        table = (FP8ExpertsInterface if fp8 else ExpertsInterface)()
        before = getattr(module, "_before_k2kernels", "eager")
        other = table.get_interface(before, inspect.unwrap(type(module).forward))
        return other(module, hidden_states, top_k_index, top_k_weights)
    if fp8:
        gate_up, down = (gate_up, module.gate_up_proj_scale_inv), (down, module.down_proj_scale_inv)
    return moe_mlp(hidden_states, (top_k_index, top_k_weights), gate_up, down)


class K2FP8Linear(FP8Linear):
    """FP8Linear by `fp8_gemm`, but where a gradient flows."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            return super().forward(input)
        rows = quantize_1x128(input.reshape(-1, input.shape[-1]))
        bias = None if self.bias is None else self.bias.detach()
        out = fp8_gemm(*rows, self.weight.detach(), self.weight_scale_inv.detach(), bias=bias, out_dtype=input.dtype)
        return out.view(*input.shape[:-1], -1)


_CLASSES = {deepseek.DeepseekV3Attention: K2Attention, FP8Linear: K2FP8Linear}
ExpertsInterface.register(NAME, _experts_forward)
FP8ExpertsInterface.register(NAME, _experts_forward)
