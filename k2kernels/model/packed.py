"""4-bit weights in the files of a checkpoint: three tensors each, which are read, checked and written as one.

    <module>.weight_packed    codes: int32 [N, K/8] (INT4) or uint8 [N, K/2] (MXFP4)
    <module>.weight_scale     scales: bfloat16 or uint8 [N, K/group]
    <module>.weight_shape     INT4: [N, K]

`joined` puts a `PackedInfo` called <module>.weight in their place, so that the rest of loading sees one weight.
`name_in_model` gives experts that are named as in Kimi-K3's files the names of this model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k2kernels._backend import UnsupportedError
from k2kernels.model import compressed_tensors
from k2kernels.model.compressed_tensors import Scheme
from k2kernels.model.shards import Reader, TensorInfo, all_finite, some
from k2kernels.ops.w4_gemm import dequantize_w4, quantize_int4_group32, quantize_mxfp4
from k2kernels.reference.w4_gemm import GROUP, INT4_SCALES_BELOW, LARGEST_E8M0

CODES, SCALES, SHAPE = "_packed", "_scale", "_shape"  # behind <module>.weight
_DTYPES = {  # of codes, of scales, and the codes in an element
    "int4": (("I32",), ("BF16",), 8),
    "mxfp4": (("U8", "I8"), ("U8", "F8_E8M0"), 2),
}
# Tensors of other kinds of quantised weights, by the end of their names.
_REFUSED = {
    "weight_zero_point": "asymmetric weights (zero points)",
    "weight_g_idx": "weights in the order of their activations (g_idx)",
    "weight_global_scale": "NVFP4 weights (a global scale)",
    "input_global_scale": "quantised activations",
    "input_scale": "quantised activations",
    "input_zero_point": "quantised activations",
}
_SERVED = "served are experts one by one as compressed-tensors packs them (weight_packed, weight_scale)"
# Those whose codes have other names: beside which tensor, and whose they are.
_REFUSED_CODES = {
    re.compile(r".*\.(gate_up|down)_proj_(blocks|scales)"): "MXFP4 experts stacked as in gpt-oss",
    re.compile(r".*\.ffn\.experts\.\d+\.w[123]\.(weight|scale)"): "experts named as in DeepSeek-V4",
}
_K3_MLP = re.compile(r"(.*\blayers\.\d+\.)block_sparse_moe\.(.*)")
_K3_EXPERT = re.compile(r"(experts\.\d+\.)(w1|w2|w3)(\..*)")
_K3_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def name_in_model(name: str, prefix: str = "") -> str:
    """A tensor's name without the decoder's prefix; as `mlp` where it is called `block_sparse_moe`."""
    name = name.removeprefix(prefix)
    if mlp := _K3_MLP.fullmatch(name):
        layer, rest = mlp.groups()
        if expert := _K3_EXPERT.fullmatch(rest):
            rest = expert[1] + _K3_PROJECTIONS[expert[2]] + expert[3]
        return f"{layer}mlp.{rest}"
    return name


class PackedInfo(NamedTuple):
    """A 4-bit weight of the files; in the place of a `TensorInfo`."""

    name: str  # in the files, without the ends of its tensors
    shape: tuple[int, ...]  # [N, K] of the weight
    dtype: str  # "int4" or "mxfp4"
    group_size: int
    codes: TensorInfo
    scales: TensorInfo
    stored_shape: TensorInfo | None

    @property
    def file(self) -> Path:
        return self.codes.file

    @property
    def parts(self) -> list[TensorInfo]:
        """Its tensors in the files."""
        return [info for info in (self.codes, self.scales, self.stored_shape) if info is not None]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.parts)


def joined(
    tensors: Mapping[str, TensorInfo], quantization: Mapping[str, Any] | None, path: str
) -> dict[str, TensorInfo | PackedInfo]:
    """`tensors` in their order, with one `PackedInfo` in the place of the tensors of each 4-bit weight.

    Raises:
        ValueError: tensors of packed weights are missing, alone, or of the wrong dtype or shape; or config.json says
            nothing of them, or something else.
        UnsupportedError: tensors of quantised weights that are not served.
    """
    for end, what in _REFUSED.items():
        found = [name for name in tensors if name.endswith(f".{end}")]
        if found:
            raise UnsupportedError(f"{path}: {what} are not served, got {some(found)}")
    for pattern, what in _REFUSED_CODES.items():
        found = [name for name in tensors if pattern.fullmatch(name)]
        if found:
            raise UnsupportedError(f"{path}: {what} are not served, got {some(found, 2)}; {_SERVED}")
    weights = {name.removesuffix(CODES) for name in tensors if name.endswith(f".weight{CODES}")}
    if not weights and not any(name.endswith(f".weight{SCALES}") for name in tensors):
        return dict(tensors)
    method = (quantization or {}).get("quant_method")
    if method != compressed_tensors.METHOD:
        raise ValueError(
            f"{path}: config.json must have a quantization_config of compressed-tensors, as the files hold packed "
            f"weights ({some(sorted(weights), 1)}), got {method!r}"
        )
    known = compressed_tensors.schemes(quantization)
    faults: list[str] = []
    result: dict[str, TensorInfo | PackedInfo] = {}
    for name, info in tensors.items():
        weight = name.removesuffix(CODES).removesuffix(SCALES).removesuffix(SHAPE)
        if weight == name or not weight.endswith(".weight"):
            result[name] = info
        elif weight not in weights:
            faults.append(f"{name} (without {weight}{CODES})")
        elif name == weight + CODES:
            if weight in tensors:
                faults.append(f"{weight} (beside {name}: a weight is packed or not)")
            found = _info(weight, tensors, known, faults)
            if found is not None:
                result[weight] = found
    if faults:
        raise ValueError(f"{path}: {len(faults)} tensors of packed weights are wrong: {some(faults)}")
    return result


def _info(weight: str, tensors: Mapping[str, TensorInfo], known: set[Scheme], faults: list[str]) -> PackedInfo | None:
    codes, scales, shape = (tensors.get(weight + end) for end in (CODES, SCALES, SHAPE))
    kinds = sorted({scheme.kind for scheme in known})
    kind = next((kind for kind in kinds if codes.dtype in _DTYPES[kind][0]), None)
    before = len(faults)
    if kind is None:
        wanted = " or ".join(dtype for one in kinds for dtype in _DTYPES[one][0])
        faults.append(f"{weight}{CODES} (wanted {wanted} for {' and '.join(kinds)}, got {codes.dtype})")
        return None
    if scales is None:
        faults.append(f"{weight}{SCALES} is missing (for {weight}{CODES})")
        return None
    _, scale_dtypes, in_code = _DTYPES[kind]
    if scales.dtype not in scale_dtypes:
        faults.append(f"{weight}{SCALES} (wanted {' or '.join(scale_dtypes)}, got {scales.dtype})")
    if len(codes.shape) != 2 or 0 in codes.shape:
        faults.append(f"{weight}{CODES} (wanted 2 axes, got {list(codes.shape)})")
        return None
    n, k = codes.shape[0], codes.shape[1] * in_code
    if k % GROUP:
        faults.append(f"{weight}{CODES} (wanted a K that is a multiple of {GROUP}, got {k})")
    sizes = sorted({scheme.group_size for scheme in known if scheme.kind == kind})
    grids = {(n, k // size): size for size in sizes if k % size == 0}
    if scales.shape not in grids:
        wanted = " or ".join(str([n, k // size]) for size in sizes)
        faults.append(f"{weight}{SCALES} (wanted {wanted} for groups of {sizes}, got {list(scales.shape)})")
    if shape is not None and (shape.dtype not in ("I64", "I32") or shape.shape not in ((2,), (0,))):
        faults.append(f"{weight}{SHAPE} (wanted I64 [2], got {shape.dtype} {list(shape.shape)})")
    if len(faults) > before:
        return None
    return PackedInfo(weight, (n, k), kind, grids[scales.shape], codes, scales, shape)


def read_packed(
    info: PackedInfo, reader: Reader, path: str, *, kept: bool, rows: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of groups of 32, or some of their rows, in memory of their own, checked; `kept`: to be packed.

    Raises:
        ValueError: weight_shape is another, or a scale is NaN or infinite, or, where `kept`, too large for `pack_w4`.
    """
    if info.stored_shape is not None and info.stored_shape.shape == (2,):
        stored = reader.get(info.stored_shape).tolist()
        if stored != list(info.shape):
            raise ValueError(
                f"{path}: {info.stored_shape.name} must be {list(info.shape)} like the codes, got {stored}"
            )
    codes = reader.get(info.codes, rows).clone()
    scales = reader.get(info.scales, rows).clone()
    if info.dtype == "int4":
        bad = scales[~(scales.abs() < (INT4_SCALES_BELOW if kept else torch.inf))]
        wanted = f"numbers below {INT4_SCALES_BELOW} in magnitude, to be kept" if kept else "finite numbers"
    else:
        codes, scales = codes.view(torch.uint8), scales.view(torch.uint8)
        bad = scales[scales > (LARGEST_E8M0 if kept else 254)]
        wanted = (
            f"bytes of at most {LARGEST_E8M0}, a scale of 2, to be kept" if kept else "numbers, not the NaN byte 255"
        )
    if bad.numel():
        raise ValueError(
            f"{path}: {info.scales.name} must hold {wanted}, got {bad.numel()} others ({bad[0].item()}) in "
            f"{info.scales.file.name}"
        )
    if info.group_size > GROUP:
        scales = scales.repeat_interleave(info.group_size // GROUP, -1)
    return codes, scales


def dequantize_packed_into(target: Tensor, codes: Tensor, scales: Tensor, elements: int) -> None:
    """target [N, K] = bfloat16(q * s) in its dtype, about `elements` at a time."""
    step = max(1, elements // target.shape[1])
    for i in range(0, len(codes), step):
        rows = slice(i, i + step)
        target[rows] = dequantize_w4(codes[rows].to(target.device), scales[rows].to(target.device))


def quantize_w4(
    weight: Tensor, kind: str, name: str, elements: int, *, q_min: int = -7, scale_rule: str = "even"
) -> tuple[Tensor, Tensor]:
    """4-bit codes and scales of weight [N, K], about `elements` at a time.

    Raises:
        ValueError: `name` holds NaN or infinity.
    """
    parts = []
    for part in weight.split(max(1, elements // weight.shape[1])):
        if not all_finite(part):
            raise ValueError(f"{name} must hold finite numbers, got NaN or infinity")
        if kind == "int4":
            parts.append(quantize_int4_group32(part, q_min=q_min))
        else:
            parts.append(quantize_mxfp4(part, scale_rule=scale_rule))
    codes, scales = zip(*parts)
    return torch.cat(codes), torch.cat(scales)


def file_tensors(weight: str, codes: Tensor, scales: Tensor, group_size: int = GROUP) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a file holds of a 4-bit weight, called <module>.weight."""
    yield weight + CODES, codes
    yield weight + SCALES, scales[:, :: group_size // GROUP]
    if codes.dtype == torch.int32:
        yield weight + SHAPE, torch.tensor([codes.shape[0], 8 * codes.shape[1]])


def packed_tensors(weight: str, kind: str, n: int, k: int) -> Iterator[TensorInfo]:
    """The names, shapes and dtypes of `file_tensors` of an [N, K] weight in groups of 32."""
    codes, scales, in_code = _DTYPES[kind]
    yield TensorInfo(Path(), weight + CODES, (n, k // in_code), codes[0])
    yield TensorInfo(Path(), weight + SCALES, (n, k // GROUP), scales[0])
    if kind == "int4":
        yield TensorInfo(Path(), weight + SHAPE, (2,), "I64")
