"""Checkpoint directories made by hand: shards, index, and DeepSeek's block FP8 written block by block."""

import json
import math
import re

import tiny
import torch
from safetensors.torch import load_file, save_file

# Sizes at which blocks of 128 are cut in both directions: 192, 160, 224 and 336 are no multiples.
PARTIAL = dict(
    hidden_size=192,
    q_lora_rank=192,
    kv_lora_rank=160,
    qk_nope_head_dim=40,
    intermediate_size=336,
    moe_intermediate_size=160,
    num_hidden_layers=2,
)
# Fused gate and up need widths that are multiples of 128 to stay FP8.
ALIGNED = dict(PARTIAL, intermediate_size=384, moe_intermediate_size=128)
FP8_CONFIG = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128], activation_scheme="dynamic")


def read(path):
    """All tensors of a checkpoint directory, by the library's plainest means."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write(path, tensors, config, shards=1):
    """A checkpoint by hand: every `shards`-th tensor in the same shard, so that what belongs together is torn apart."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if shards == 1:
        save_file({n: tensors[n].contiguous() for n in names}, path / "model.safetensors")
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n].contiguous() for n in names[i::shards]}, path / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same(state, expected):
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(_bits(state[name]), _bits(tensor)), name


def _bits(tensor):
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


QUANTIZED = re.compile(r".*\.(self_attn\.\w+_proj(_with_mqa)?|mlp\.(experts\.\d+\.|shared_experts\.)?\w+_proj)\.weight")


def quantize(tensors, power_of_two=False):
    """DeepSeek's format, block by block: amax / 448 in float32 or the next power of two, codes of the quotient."""
    out = {}
    for name, weight in tensors.items():
        if not QUANTIZED.fullmatch(name):
            out[name] = weight
            continue
        rows, columns = weight.shape
        scale = torch.empty(-(-rows // 128), -(-columns // 128))
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                where = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                scale[i, j] = weight[where].abs().max() / 448
                if power_of_two:
                    scale[i, j] = 2.0 ** math.ceil(math.log2(scale[i, j]))
                codes[where] = (weight[where] / scale[i, j]).to(torch.float8_e4m3fn)
        out[name], out[name + "_scale_inv"] = codes, scale
    return out


def dequantize(tensors, dtype=torch.float64):
    """code * scale, block by block."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            wide, scale = tensor.to(dtype), tensors[name + "_scale_inv"].to(dtype)
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    wide[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] *= scale[i, j]
            out[name] = wide
        elif not name.endswith("_scale_inv"):
            out[name] = tensor
    return out


def fp8_checkpoint(path, sizes, shards=1, **config_changes):
    config = tiny.config("kimi", **sizes)
    tiny.model("kimi", **sizes).save_pretrained(path / "float")
    tensors = quantize(read(path / "float"))
    write(path / "fp8", tensors, {**config.to_dict(), "quantization_config": FP8_CONFIG, **config_changes}, shards)
    return path / "fp8", tensors
