"""Checkpoints between BF16, block FP8 and 4-bit experts, on a CPU, one tensor at a time, without building the model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2kernels.model.checkpoint import (
    ELEMENTS_AT_ONCE,
    SCALE,
    dequantize_into,
    faults_of,
    read_codes,
    read_scales,
    read_weight,
)
from k2kernels.model.compressed_tensors import quantization_config
from k2kernels.model.config import CONVERTED_TYPES, K2Config, read_config_file, text_part
from k2kernels.model.files import conversions, remove_leftovers
from k2kernels.model.normalise import normalise_quantization
from k2kernels.model.packed import (
    PackedInfo,
    dequantize_packed_into,
    file_tensors,
    joined,
    name_in_model,
    packed_tensors,
    quantize_w4,
    read_packed,
)
from k2kernels.model.resume import ResumableWriter
from k2kernels.model.shards import DTYPES, INDEX, MAX_SHARD_SIZE, Progress, Reader, TensorInfo, all_finite, scan, some
from k2kernels.ops.w4_gemm import KINDS
from k2kernels.reference.quant import quantize_128x128

# What DeepSeek quantises: attention and feed-forward projections, routed and shared experts. Embedding, head, norms,
# router and the projection that joins an MTP layer's inputs stay BF16.
_QUANTIZED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    r"|mlp\.((experts\.\d+|shared_experts)\.)?(gate_proj|up_proj|down_proj))\.weight"
)
# What Kimi quantises to 4 bits: the routed experts.
_EXPERTS = re.compile(r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)\.weight")
_QUANTIZATION_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
_COPIED = (".json", ".txt", ".model", ".jinja", ".py", ".md")  # tokenizer, generation settings, licence ...


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    progress: bool = True,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    scale_fmt: str | None = None,
    q_min: int = -7,
    scale_rule: str = "even",
) -> None:
    """Writes the checkpoint directory `src` to the new directory `dst` as "bf16", "fp8", "int4" or "mxfp4".

    "fp8" is DeepSeek's format: the projections of attention and feed-forward in e4m3 with a float32 scale per 128x128
    block, all other weights in BF16. "int4" and "mxfp4" are the formats of Kimi-K2-Thinking and Kimi-K3: the routed
    experts in compressed-tensors' 4 bits with a scale for 32 weights, all others in BF16 (see `quantize_int4_group32`,
    which takes `q_min`, and `quantize_mxfp4`, which takes `scale_rule`). To "bf16", all weights become BF16. What is
    quantised in `src` is dequantised to BF16 first. The router's bias stays float32.
    With `scale_fmt` "ue8m0", as in DeepSeek-V3.1, scales are rounded up to powers of two, still stored in float32, and
    config.json requires the same of activations' scales.

    config.json is changed accordingly; tokenizer and other small files are copied. `dst` appears complete or not at
    all; no more than about one shard is in memory. A conversion that was killed or interrupted, or found the disk full,
    leaves its whole shards in a hidden folder beside `dst`: called again with the same source, which has not changed,
    and the same options, it goes on behind them. The result is the same to the byte.

    Raises:
        ValueError: an option is unknown, or two cannot be combined; `src` is of that kind already or is damaged, or the
            K of an expert's weight is no multiple of 32; `dst` exists and is not empty.
        FileNotFoundError: `src`, its config.json or a shard is missing.
        UnsupportedError: a kind of checkpoint that is recognised but not supported.
        OSError: `dst` could not be written, or another process is converting to it.
    """
    if to not in ("bf16", "fp8", *KINDS):
        raise ValueError(f"convert: to must be 'bf16', 'fp8', 'int4' or 'mxfp4', got {to!r}")
    if q_min not in (-7, -8) or (q_min != -7 and to != "int4"):
        raise ValueError(f"convert: q_min must be -7, or -8 with to='int4', got {q_min!r} with to={to!r}")
    if scale_rule not in ("even", "floor") or (scale_rule != "even" and to != "mxfp4"):
        raise ValueError(
            f"convert: scale_rule must be 'even', or 'floor' with to='mxfp4', got {scale_rule!r} with to={to!r}"
        )
    if scale_fmt not in (None, "ue8m0") or (scale_fmt and to != "fp8"):
        raise ValueError(f"convert: scale_fmt must be None, or 'ue8m0' with to='fp8', got {scale_fmt!r} with to={to!r}")
    src, dst = Path(src), Path(dst)
    if dst.is_dir():
        remove_leftovers(dst)
    if dst.exists() and (held := _held(dst)):
        raise ValueError(f"convert: dst must be a new or empty directory, got {dst}, which holds {some(held, 3)}")
    raw = read_config_file(src)
    quantization, prefix = _quantization(raw)
    block = quantization and quantization.get("weight_block_size")
    tensors = joined(scan(src), quantization, str(src))
    _check(src, tensors, to, block, prefix)

    infos = [part for info in tensors.values() for part in getattr(info, "parts", [info])]
    planned = {
        name: list(_outputs(name, info, name_in_model(name, prefix), to))
        for name, info in tensors.items()
        if not name.endswith(SCALE)
    }
    writer = ResumableWriter(
        dst,
        max_shard_size,
        [output for outputs in planned.values() for output in outputs],
        {
            "source": _stamps({src / "config.json", *(info.file for info in infos)}),
            "set of options": [to, max_shard_size, scale_fmt, q_min, scale_rule],
            "version of k2kernels": _version(),
        },
    )
    bar = Progress(sum(info.nbytes for info in infos), f"converting to {to}", progress)
    with bar, torch.no_grad(), Reader(infos) as weights, Reader(infos) as scales, writer as out:
        if out.kept:
            bar.note(f"resumed: {out.kept} of {len(out.planned)} shards were there")
        for name, info in tensors.items():
            bar.update(info.nbytes)
            if name.endswith(SCALE) or all(output.name in out for output in planned[name]):
                continue
            model_name = name_in_model(name, prefix)
            if isinstance(info, PackedInfo):
                weight = torch.empty(info.shape, dtype=torch.bfloat16)
                codes = read_packed(info, weights, str(src), kept=False)
                dequantize_packed_into(weight, *codes, ELEMENTS_AT_ONCE)
            elif info.dtype == "F8_E4M3":
                weight = torch.empty(info.shape, dtype=torch.bfloat16)
                factors = read_scales(tensors[name + SCALE], scales, str(src))
                dequantize_into(weight, read_codes(info, weights, str(src)), factors, block)
            else:
                weight = read_weight(model_name, info, weights, str(src))
            if to == "fp8" and _QUANTIZED.fullmatch(model_name):
                codes, factors = _quantize(weight, info, scale_fmt == "ue8m0")
                out.add(name, codes)
                out.add(name + SCALE, factors)
            elif to in KINDS and _EXPERTS.fullmatch(model_name):
                named, grid = f"convert: {info.name} in {info.file}", dict(q_min=q_min, scale_rule=scale_rule)
                for part_name, part in file_tensors(name, *quantize_w4(weight, to, named, ELEMENTS_AT_ONCE, **grid)):
                    out.add(part_name, part)
            else:
                # Copied, as one page held keeps all of the file mapped.
                out.add(name, weight.to(torch.bfloat16 if name.endswith(".weight") else None, copy=True))
            del weight
        out.write_text("config.json", json.dumps(_new_config(raw, to, scale_fmt), indent=2) + "\n")
        for file in sorted(src.iterdir()):
            if file.is_file() and file.suffix in _COPIED and file.name not in ("config.json", INDEX):
                out.copy(file)


def _quantization(raw: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The normalised quantization_config, and the prefix of the decoder's names.

    Of a model type that this package does not compute (DeepSeek-V3.2), its tensors are converted all the same.
    """
    if raw.get("model_type") in CONVERTED_TYPES:
        return normalise_quantization(raw.get("quantization_config")), ""
    return K2Config.from_dict(raw).quantization_config, text_part(raw)[1]


def _held(dst: Path) -> list[str]:
    """What is in the way of a conversion to `dst`; shards that another one left are not."""
    if not dst.is_dir():
        return [dst.name]
    begun = {path.name for path in dst.glob(conversions(dst.absolute().name))}
    return sorted({path.name for path in dst.iterdir()} - begun)


def _outputs(name: str, info: TensorInfo | PackedInfo, model_name: str, to: str) -> Iterator[TensorInfo]:
    """The tensors that a weight becomes: their names, shapes and dtypes."""

    def output(end: str, dtype: str, *shape: int) -> TensorInfo:
        return TensorInfo(Path(), name + end, shape, dtype)

    if to == "fp8" and _QUANTIZED.fullmatch(model_name):
        yield output("", "F8_E4M3", *info.shape)
        yield output(SCALE, "F32", *(-(-size // 128) for size in info.shape))
    elif to in KINDS and _EXPERTS.fullmatch(model_name):
        yield from packed_tensors(name, to, *info.shape)
    else:
        kept = not name.endswith(".weight") and info.dtype in DTYPES and info.dtype != "F8_E4M3"
        yield output("", info.dtype if kept else "BF16", *info.shape)


def _stamps(files: set[Path]) -> dict[str, list[int]]:
    """Path, size and time of change of files: other contents have others."""
    found = {file.resolve(): file.stat() for file in files}
    return {os.fsdecode(file): [stat.st_size, stat.st_mtime_ns] for file, stat in sorted(found.items())}


def _version() -> str:
    from k2kernels import __version__

    return __version__


def _check(
    src: Path,
    tensors: dict[str, TensorInfo | PackedInfo],
    to: str,
    block: tuple[int, int] | None,
    prefix: str,
) -> None:
    """Raises ValueError unless `src` can be converted, judging by the headers of its files."""
    quantized = {name for name, info in tensors.items() if info.dtype == "F8_E4M3"}
    experts = {name: info for name, info in tensors.items() if _EXPERTS.fullmatch(name_in_model(name, prefix))}
    if to in KINDS and not experts:
        raise ValueError(f"convert: src must have routed experts to become {to}, got none in {src}")
    if to in KINDS and all(info.dtype == to for info in experts.values()):
        raise ValueError(
            f"convert: src must have experts of another kind to become {to}, got {src}, which is {to} already"
        )
    odd = [f"{name} {list(info.shape)}" for name, info in experts.items() if len(info.shape) != 2 or info.shape[1] % 32]
    if to in KINDS and odd:
        raise ValueError(f"convert: K of a weight must be a multiple of 32 to become {to}, got {some(odd)}")
    if to == "fp8" and (quantized or block):
        raise ValueError(f"convert: src must be BF16 or FP32 to become fp8, got {src}, which is FP8 already")
    if to == "bf16" and not any(_casts(name, info) for name, info in tensors.items()):
        raise ValueError(
            f"convert: src must hold quantised or FP32 weights to become bf16, got {src}, which is BF16 already"
        )
    if quantized and block is None:
        raise ValueError(f"convert: config.json of {src} must have a quantization_config, as {min(quantized)} is FP8")
    faults = []
    for name, info in tensors.items():
        faults += [fault for _, fault in faults_of(name, info, torch.empty(info.shape, device="meta"), tensors, block)]
        if name in quantized and len(info.shape) != 2:
            faults.append(f"{name} (wanted 2 axes, got {list(info.shape)})")
        if name.endswith(SCALE) and name.removesuffix(SCALE) not in quantized:
            faults.append(f"{name} (a scale without an FP8 weight)")
    if faults:
        raise ValueError(f"convert: {src} is damaged; {len(faults)} tensors: {some(faults)}")


def _casts(name: str, info: TensorInfo) -> bool:
    return info.dtype != "BF16" and name.endswith(".weight")


def _quantize(weight: Tensor, info: TensorInfo, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """e4m3 codes and scales of 128x128 blocks, computed a few rows of blocks at a time."""
    if weight.dim() != 2:
        raise ValueError(f"convert: {info.name} must have 2 axes, got {list(weight.shape)}")
    step = max(1, ELEMENTS_AT_ONCE // (128 * weight.shape[1])) * 128
    parts = []
    for part in weight.split(step):
        if not all_finite(part):
            raise ValueError(f"convert: {info.name} in {info.file} must hold finite numbers, got NaN or infinity")
        parts.append(quantize_128x128(part, power_of_two))
    codes, scales = zip(*parts)
    return torch.cat([c.view(torch.uint8) for c in codes]).view(torch.float8_e4m3fn), torch.cat(scales)


def _new_config(raw: dict[str, Any], to: str, scale_fmt: str | None) -> dict[str, Any]:
    """config.json with the entry of quantised weights, if any, and BF16 as the dtype of the others."""
    new = {key: value for key, value in raw.items() if key != "quantization_config"}
    decoder = new
    if raw.get("model_type") not in CONVERTED_TYPES and text_part(raw)[1]:
        decoder = {key: value for key, value in raw["text_config"].items() if key != "quantization_config"}
        new["text_config"] = decoder
    decoder[next((key for key in ("dtype", "torch_dtype") if key in decoder), "torch_dtype")] = "bfloat16"
    if to == "fp8":
        decoder["quantization_config"] = _QUANTIZATION_CONFIG | ({"scale_fmt": scale_fmt} if scale_fmt else {})
    elif to in KINDS:
        decoder["quantization_config"] = quantization_config(to)
    return new
