"""The model's configuration: Hugging Face's field names, read from and written to config.json."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from k2kernels._backend import UnsupportedError
from k2kernels.model.files import OLD, PREFIX, finish_exchange
from k2kernels.model.folder import checkpoint_folder, is_lfs_pointer, lfs_remedy, no_config, refuse_file
from k2kernels.model.normalise import (
    check,
    check_number,
    check_size,
    is_int,
    normalise_quantization,
    normalise_rope,
    rope_fields,
)
from k2kernels.model.presets import PRESETS

# Kimi-K2.5 and later keep the decoder, of type kimi_k2, in `text_config` beside a vision tower; so does Kimi-VL, whose
# decoder is Moonlight.
MODEL_TYPES = ("deepseek_v3", "kimi_k2")
WRAPPER_TYPES = ("kimi_k25", "kimi_vl")
# Models whose tensors are named, sized and quantised as here, which is enough to convert and to count them, and what
# they have besides.
CONVERTED_TYPES = {"deepseek_v2": "", "deepseek_v32": "the indexer of its sparse attention"}
# Models that are taken for relatives, and what they have that this model has not.
_OTHER_TYPES = {
    "kimi_k3": "Kimi-K3: linear attention (KDA), experts of a narrower latent",
    "kimi_linear": "Kimi-Linear and Kimi-K3: linear attention (KDA)",
    "gpt_oss": "gpt-oss: grouped-query attention with sinks, experts with biases",
    "deepseek_v32": "DeepSeek-V3.2: sparse attention behind an indexer",
    "deepseek_v4": "DeepSeek-V4: compressed sparse attention",
}

_MAY_BE_ZERO = {"n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers", "aux_loss_alpha"}
_MAY_BE_ZERO |= {"initializer_range"}
# Fields that are the same in every published model of the family. Other values are refused.
_FIXED = {"hidden_act": "silu", "topk_method": "noaux_tc", "attention_bias": False}
# What null means where transformers allows it: off, or what the field's absence from the formula amounts to.
_NULL = {
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "rope_interleave": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "moe_layer_freq": 1,
    "aux_loss_alpha": 0.0,
    "seq_aux": True,
}


@dataclass(kw_only=True)
class K2Config:
    """Sizes and switches of a Kimi-K2 / DeepSeek-V3 model.

    A field's default is the one transformers' DeepseekV3Config gives a key that config.json leaves out, except that
    there are no MTP layers and no special tokens unless given.

    Raises:
        ValueError: a field is out of range (field, wanted, got).
        UnsupportedError: a field has a value that is recognised but not supported.
    """

    # sizes
    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    max_position_embeddings: int = 4096
    # latent attention; q_lora_rank None means one full-rank q_proj
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    # feed-forward: the first layers are dense, the others route to experts and add the shared ones (0: none)
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    # norms, positions
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # None, or YaRN with every key of `normalise_rope`
    rope_interleave: bool = True
    # the rest
    num_nextn_predict_layers: int = 0  # MTP layers, at index num_hidden_layers and up
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    dtype: str = "bfloat16"  # of the weights on disk that are not quantised
    quantization_config: dict[str, Any] | None = None  # None, block FP8, or compressed-tensors' 4-bit weights

    def __post_init__(self) -> None:
        self.n_shared_experts = self.n_shared_experts or 0
        self.rope_scaling = normalise_rope(self.rope_scaling)
        self.quantization_config = normalise_quantization(self.quantization_config)
        self._validate()

    # ---- reading and writing ------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> K2Config:
        """The configuration in a parsed config.json, of any type in `MODEL_TYPES` or `WRAPPER_TYPES`.

        Reads positions in both styles: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`.
        Keys that this model does not use are ignored.
        """
        values, _ = text_part(values)
        values = {key: _NULL.get(key) if value is None else value for key, value in values.items()}
        if values.get("attention_dropout"):
            warnings.warn(f"config.json: attention_dropout={values['attention_dropout']} is not applied", stacklevel=3)
        for key, wanted in _FIXED.items():
            if values.get(key) not in (None, wanted):
                raise UnsupportedError(f"K2Config: {key} must be {wanted!r}, got {values[key]!r}")
        # Keys and values are expanded to all heads, so the number is unused; files of smaller models still have
        # transformers' default of 128. A smaller number than that of heads would be another kind of attention.
        heads, shared = values.get("num_attention_heads"), values.get("num_key_value_heads")
        if is_int(heads) and is_int(shared) and shared < heads:
            raise UnsupportedError(
                f"K2Config: num_key_value_heads must equal num_attention_heads={heads}, as latent attention expands "
                f"its keys to all heads, got {shared}"
            )
        dtype = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
        values["dtype"] = str(dtype).removeprefix("torch.")
        values.update(rope_fields(values))
        if values.get("rope_theta") is None:
            values.pop("rope_theta", None)
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> K2Config:
        """Reads `path`/config.json (or `path` itself, if it is a file).

        The stop ids are those of config.json and of generation_config.json together: in Kimi-K2 they end a text and a
        turn of chat.
        """
        raw = read_config_file(path)
        config = cls.from_dict(raw)
        generation = Path(path).expanduser() / "generation_config.json"
        if generation.is_file():
            more = _id_list(_read_json(generation).get("eos_token_id"))
            ids = list(dict.fromkeys([*config.eos_token_ids, *more]))
            if ids != config.eos_token_ids:
                config = replace(config, eos_token_id=ids if len(ids) > 1 else ids[0])
        return config

    @classmethod
    def preset(cls, name: str) -> K2Config:
        """A published model ("kimi-k2", "kimi-k2-thinking", "deepseek-v3", "moonlight-16b-a3b") or "tiny", K2 in
        miniature for a laptop. Published weights in another form than BF16 are not part of it."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"K2Config.preset: name must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name])

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, of type deepseek_v3 for Kimi-K2 too: transformers and servers support it."""
        values = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **asdict(self),
            "torch_dtype": self.dtype,
            "num_key_value_heads": self.num_attention_heads,
            "attention_dropout": 0,
            **_FIXED,
        }
        if self.rope_scaling is not None:  # older readers use `type`
            given = {key: value for key, value in self.rope_scaling.items() if value is not None}
            values["rope_scaling"] = {"type": "yarn", **given}
        if self.quantization_config is None:  # for transformers the key alone means a quantised checkpoint
            del values["quantization_config"]
        return values

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes config.json to the directory `path`."""
        (Path(path) / "config.json").write_text(self.to_json(), encoding="utf-8")

    # ---- derived --------------------------------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and expanded key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of a token's row in the cache: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end a text; empty when there are none."""
        return _id_list(self.eos_token_id)

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times YaRN's mscale squared (from factor and mscale_all_dim)."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling and self.rope_scaling["mscale_all_dim"]:
            scale *= yarn_mscale(self.rope_scaling["factor"], self.rope_scaling["mscale_all_dim"]) ** 2
        return scale

    @property
    def rope_attention_factor(self) -> float:
        """The factor of cos and sin: 1 unless YaRN's mscale and mscale_all_dim differ."""
        if self.rope_scaling is None:
            return 1.0
        factor, mscale, all_dim = (self.rope_scaling[key] for key in ("factor", "mscale", "mscale_all_dim"))
        if self.rope_scaling["attention_factor"] is not None:
            return self.rope_scaling["attention_factor"]
        if mscale and all_dim:
            return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
        return yarn_mscale(factor)

    @property
    def weight_block_size(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale in a block-FP8 checkpoint; None if the checkpoint is not in FP8."""
        block = (self.quantization_config or {}).get("weight_block_size")
        return None if block is None else tuple(block)

    @property
    def power_of_two_scales(self) -> bool:
        """Whether a block-FP8 checkpoint's scales, those of activations too, are powers of two (DeepSeek-V3.1)."""
        return bool(self.quantization_config) and self.quantization_config.get("scale_fmt") == "ue8m0"

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` routes to experts (MTP layers, at num_hidden_layers and up, do)."""
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0

    def parameter_counts(self) -> tuple[int, int]:
        """All parameters, and those one token uses (embedding and head included); MTP layers are not counted.

        The router's per-expert bias counts as a parameter: it is trained, although not by gradient.
        """
        moe_layers = sum(self.is_moe_layer(layer) for layer in range(self.num_hidden_layers))
        total = sum(count * math.prod(shape) for count, shape, _ in self.tensors())
        unused = moe_layers * (self.n_routed_experts - self.num_experts_per_tok)
        return total, total - unused * 3 * self.hidden_size * self.moe_intermediate_size

    def tensors(self) -> Iterator[tuple[int, tuple[int, ...], str]]:
        """Every tensor of a checkpoint without MTP layers: the number of such tensors, their shape, and "plain",
        "quantised" (in FP8 files), "expert" (in FP8 and 4-bit files) or "float32"."""
        hidden, heads, layers = self.hidden_size, self.num_attention_heads, self.num_hidden_layers
        moe = sum(self.is_moe_layer(layer) for layer in range(layers))
        yield 1 if self.tie_word_embeddings else 2, (self.vocab_size, hidden), "plain"
        yield 1 + 2 * layers, (hidden,), "plain"

        if self.q_lora_rank is None:
            yield layers, (heads * self.qk_head_dim, hidden), "quantised"
        else:
            yield layers, (self.q_lora_rank, hidden), "quantised"
            yield layers, (self.q_lora_rank,), "plain"
            yield layers, (heads * self.qk_head_dim, self.q_lora_rank), "quantised"
        yield layers, (self.latent_dim, hidden), "quantised"
        yield layers, (self.kv_lora_rank,), "plain"
        yield layers, (heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank), "quantised"
        yield layers, (hidden, heads * self.v_head_dim), "quantised"

        shared = self.moe_intermediate_size * self.n_shared_experts
        mlps = [
            (layers - moe, self.intermediate_size, "quantised"),
            (moe * self.n_routed_experts, self.moe_intermediate_size, "expert"),
            (moe if shared else 0, shared, "quantised"),
        ]
        for count, width, kind in mlps:
            yield 2 * count, (width, hidden), kind
            yield count, (hidden, width), kind
        yield moe, (self.n_routed_experts, hidden), "plain"
        yield moe, (self.n_routed_experts,), "float32"

    # ---- checks -----------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type == "int" or (name == "q_lora_rank" and value is not None):
                check_size(name, value, 0 if name in _MAY_BE_ZERO else 1)
            elif field.type == "bool":
                check.require(isinstance(value, bool), name, "true or false", repr(value))
            elif field.type == "float":
                check_number(name, value, positive=name not in _MAY_BE_ZERO)
        if self.attention_bias:
            raise UnsupportedError("K2Config: attention_bias must be False, got True")
        check.choice("scoring_func", self.scoring_func, ("sigmoid", "softmax"))
        check.choice("dtype", self.dtype, ("bfloat16", "float16", "float32", "float64"))
        check.require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "even", self.qk_rope_head_dim)

        experts, groups = self.n_routed_experts, self.n_group
        check.require(experts % groups == 0, "n_group", f"a divisor of n_routed_experts={experts}", groups)
        check.require(groups == 1 or experts // groups >= 2, "n_group", "one with 2 or more experts a group", groups)
        check.require(self.topk_group <= groups, "topk_group", f"at most n_group={groups}", self.topk_group)
        reachable = experts // groups * self.topk_group
        check.require(
            self.num_experts_per_tok <= reachable,
            "num_experts_per_tok",
            f"at most {reachable}, the experts in topk_group={self.topk_group} groups",
            self.num_experts_per_tok,
        )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
            check.require(all(i is None or is_int(i) for i in ids), name, "an integer or null", repr(value))


def text_part(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The decoder's part of a parsed config.json, and the prefix its tensors' names carry in the files.

    Raises:
        ValueError: for a model type that is not of this family.
        UnsupportedError: for a relative that has another architecture.
    """
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in _OTHER_TYPES:
        raise UnsupportedError(
            f"K2Config: model_type must be one of {', '.join(MODEL_TYPES + WRAPPER_TYPES)}, got {model_type!r} "
            f"({_OTHER_TYPES[model_type]}), which is another architecture"
        )
    if model_type in WRAPPER_TYPES:
        inner = values.get("text_config")
        check.require(isinstance(inner, Mapping), "text_config", f"an object in a {model_type} file", repr(inner))
        quantization = inner.get("quantization_config") or values.get("quantization_config")
        inner = {"model_type": "kimi_k2", **inner, "quantization_config": quantization}
        return text_part(inner)[0], "language_model."
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"K2Config: model_type must be one of {', '.join(MODEL_TYPES + WRAPPER_TYPES)}, got {model_type!r}"
        )
    return values, ""


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The parsed `path`/config.json, or `path` itself if it is a file."""
    path = Path(path).expanduser()
    if path.is_file():
        refuse_file(path)
        return _read_json(path)
    file = checkpoint_folder(path) / "config.json"
    if not file.is_file():
        finish_exchange(path)
    if not file.is_file():
        raise FileNotFoundError(f"K2Config: no config.json in {path}{_interrupted(path)}{no_config(path)}")
    return _read_json(file)


def _interrupted(path: Path) -> str:
    for folder in path.glob(f"{PREFIX}replacing-*"):
        return f"; a save was interrupted or is under way: {folder} holds the new files, {OLD} in it the old ones"
    return ""


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's correction for a context stretched `factor` times."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_json(file: Path) -> dict[str, Any]:
    if is_lfs_pointer(file):
        raise ValueError(f"K2Config: {file} {lfs_remedy(file)}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets in brackets
        raise ValueError(f"K2Config: {file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"K2Config: {file} must hold a JSON object, got {type(values).__name__}")
    return values


def _id_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
