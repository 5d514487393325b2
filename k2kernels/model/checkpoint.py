"""Weights of a model from and to Hugging Face checkpoints, BF16, block FP8 or 4-bit, one tensor at a time.

Tensors that are fused or stacked in the model are separate in the files: `pieces` defines the mapping for both
directions. Every name, shape and dtype is checked from the files' headers before the first weight is read.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from k2kernels._backend import UnsupportedError
from k2kernels.model.capacity import device_bytes, existing_device, gb
from k2kernels.model.compressed_tensors import FORMATS, quantization_config, schemes
from k2kernels.model.config import K2Config, read_config_file, text_part
from k2kernels.model.linear import Fp8Linear
from k2kernels.model.moe import Experts
from k2kernels.model.packed import (
    PackedInfo,
    dequantize_packed_into,
    file_tensors,
    joined,
    name_in_model,
    quantize_w4,
    read_packed,
)
from k2kernels.model.shards import (
    DTYPES,
    MAX_SHARD_SIZE,
    Progress,
    Reader,
    TensorInfo,
    Writer,
    on_terminal,
    rival_of_index,
    scan,
    some,
)
from k2kernels.ops._check import Arguments
from k2kernels.ops.w4_gemm import pack_w4, unpack_w4
from k2kernels.reference.quant import dequantize
from k2kernels.reference.w4_gemm import GROUP

Model = TypeVar("Model", bound=nn.Module)

SCALE = "_scale_inv"  # `weight_scale_inv` beside `weight`: the factors of its codes
FP8_BLOCK = (128, 128)  # what the model's FP8 modules hold
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCALE_DTYPES = (*_FLOATS, torch.float8_e8m0fnu)
ELEMENTS_AT_ONCE = 1 << 22  # of an FP8 weight: bounds temporary copies, about 13 bytes each

# Copies and unused tensors that files may hold beside the weights.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq|model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")
_VISION = ("vision_tower.", "mm_projector.", "multi_modal_projector.")
_MTP = re.compile(r"model\.layers\.(\d+)\.(enorm|hnorm|eh_proj|shared_head\.norm)\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def from_pretrained(
    cls: type[Model],
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    keep_fp8: bool = False,
    progress: bool = True,
    mesh: Any = None,
    keep_quantized: bool | None = None,
) -> Model:
    """Loads the Hugging Face checkpoint in the directory `path`. Weights are read one at a time.

    Args:
        path: directory with config.json and safetensors files.
        dtype: float dtype of the weights, or its name ("bfloat16"); None and "auto" take the one that config.json
            names, or else that of the embedding. The router's bias and the scales stay float32.
        keep_quantized: keep weights as they are, for inference, instead of dequantising them: block FP8 with its
            scales (those of activations are powers of two where quantization_config has `scale_fmt: ue8m0`); 4-bit
            weights of the routed experts (compressed-tensors' INT4 and MXFP4) packed by `pack_w4`, one expert at a
            time, in a model that is bfloat16 otherwise. Dequantised, 4-bit weights take 3.5 times the memory: Kimi-K2's
            2 TB.
        keep_fp8: the older name of keep_quantized.
        progress: show a progress bar, if stderr is a terminal.
        mesh: a `k2kernels.parallel.Layout`, or a DeviceMesh with dimensions "dp" and "ep" (see
            `k2kernels.parallel.make_mesh`). Each rank then reads and keeps its own experts, and all other weights. Call
            it on every rank; an error of one is raised on all. `k2kernels.parallel.expert_parallel` must follow before
            the model is used.

    MTP layers follow config.json's num_nextn_predict_layers. Layers beyond that number are left out with a warning,
    and so is the number itself if the files hold no MTP layer at all (transformers writes such checkpoints).

    Raises:
        FileNotFoundError: the directory, config.json or a shard is missing (named).
        ValueError: tensors are missing, unexpected, of the wrong shape or dtype (listed), or hold impossible values:
            FP8 weights with NaN, scales below 0, and NaN or infinity in scales, norms and the router; keep_quantized
            with a checkpoint that is not quantised.
        MemoryError: the weights are more than the memory of the device; nothing has been read then.
        UnsupportedError: a kind of checkpoint that is recognised but not supported.
    """
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        dtype = None if name == "auto" else next((d for d in _FLOATS if _dtype_name(d) == name), dtype)
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"from_pretrained: dtype must be a float dtype or None, got {dtype!r}")
    keep = keep_fp8 if keep_quantized is None else keep_quantized
    if not isinstance(keep, bool):
        raise TypeError(f"from_pretrained: keep_quantized must be True or False, got {keep!r}")
    if mesh is not None:
        from k2kernels.parallel.layout import Layout

        ranks = Layout.of(mesh)
        with ranks.together("from_pretrained"):
            return _read(cls, path, dtype, device, keep, progress and ranks.writes, ranks)
    return _read(cls, path, dtype, device, keep, progress, None)


def _read(
    cls: type[Model],
    path: str | Path,
    dtype: torch.dtype | None,
    device: str | torch.device,
    keep: bool,
    progress: bool,
    ranks: Any,
) -> Model:
    """`from_pretrained`, of the part of the model that belongs to this rank of a Layout."""
    device = existing_device(device)
    raw = read_config_file(path)
    config = K2Config.from_pretrained(path)
    found = _named_as_in_model(scan(path), text_part(raw)[1])
    config = _with_mtp_layers_found(config, found, path)
    tensors = joined(found, config.quantization_config, str(path))
    _check_number_of_tensors(config, tensors, path)
    dtype = dtype or _stored_dtype(text_part(raw)[0], config, tensors)
    block = config.weight_block_size
    w4 = any(isinstance(info, PackedInfo) for info in tensors.values())
    if keep and w4:
        _check_keep_w4(dtype, path)
    elif keep:
        _check_keep_fp8(config, path)
    config = replace(
        config,
        dtype=_dtype_name(dtype),
        quantization_config=config.quantization_config if keep else None,
    )
    with torch.device("meta"):
        model = cls(config)
        if keep and w4:
            _use_w4_experts(model, tensors, str(path))
        elif keep:
            _use_fp8_modules(model, tensors, config.power_of_two_scales)
    _check(_wanted(model), tensors, set(_tied(model)), block, str(path))
    if ranks is not None:
        ranks.shard_experts(model)  # after the check: every rank finds what is wrong with any expert
    _check_memory(model, tensors, dtype, device, keep, str(path))
    tied = _tied(model)
    _load(model, tensors, block, str(path), progress, lambda name, t: _create(model, name, t, dtype, device))
    for alias, name in tied.items():
        _put(model, alias, model.get_parameter(name))
    _fill_unsaved_buffers(model, device)
    return model.eval()


def load_pretrained(
    model: nn.Module, path: str | Path, *, device: str | torch.device | None = None, progress: bool = True
) -> None:
    """Fills the weights of a model from the Hugging Face checkpoint in the directory `path`, in their dtypes.

    The second half of `from_pretrained`, for a model that is distributed already: of each DTensor, by
    `k2kernels.parallel.parallelize` or `fully_shard`, a rank reads the rows that it keeps, of experts and of other
    weights, and decodes them if they are FP8 or 4-bit; and a stage of a `k2kernels.parallel.Pipeline` its own layers.
    So no process ever holds the model:

        with torch.device("meta"):
            model = K2Model(K2Config.from_pretrained(path))
        model = parallelize(model.to(torch.bfloat16), mesh, max_tokens=4096)
        model.load_pretrained(path)

    Every rank calls it; with a `k2kernels.parallel.Layout`, which `parallelize` gives the model, an error of one rank
    is raised on all.

    Args:
        device: where to make tensors of a model on the meta device; None: where its mesh is, or the CPU.
        progress: show a progress bar, on the rank that writes, if its stderr is a terminal.

    Raises:
        ValueError: the files do not fit the model, or hold impossible values, as in `from_pretrained`; some of the
            model's tensors are on the meta device, others not.
        UnsupportedError: a tensor is divided along another axis than its first.
    """
    ranks = getattr(model, "ranks", None)
    with contextlib.nullcontext() if ranks is None else ranks.together("load_pretrained"):
        config = K2Config.from_pretrained(path)
        found = _named_as_in_model(scan(path), text_part(read_config_file(path))[1])
        _with_mtp_layers_found(model.config, found, path)
        tensors = joined(found, config.quantization_config, str(path))
        tied, wanted = _tied(model), _wanted(model)
        if hasattr(model, "whole_on_meta"):  # a stage of a pipeline: the other layers are on other ranks
            elsewhere = _wanted(model.whole_on_meta()).keys() - wanted.keys()
            tensors = {n: info for n, info in tensors.items() if n.removesuffix(SCALE) not in elsewhere}
        _check(wanted, tensors, set(tied), config.weight_block_size, str(path))
        _leave_meta(model, device)
        _load(model, tensors, config.weight_block_size, str(path), progress and (ranks is None or ranks.writes), _same)
        with torch.no_grad():
            now = model.state_dict(keep_vars=True)
            for alias, name in tied.items():
                if now[alias] is not now[name] and _in_parts(now[name]):
                    now[alias].to_local().copy_(now[name].to_local())
                elif now[alias] is not now[name]:
                    _put(model, alias, now[name])


def _same(name: str, tensor: Tensor) -> Tensor:
    return tensor


def _leave_meta(model: nn.Module, device: str | torch.device | None) -> None:
    """Gives a model on the meta device memory: of DTensors, their part of this rank."""
    tensors = model.state_dict(keep_vars=True)
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if not meta:
        return
    if len(meta) < len(tensors):
        raise ValueError(f"load_pretrained: all weights or none must be on the meta device, got {some(meta)} there")
    if device is None:
        device = next((t.device_mesh.device_type for t in tensors.values() if _in_parts(t)), "cpu")
        if device == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
    model.to_empty(device=existing_device(device, Arguments("load_pretrained")))


def save_pretrained(
    model: nn.Module,
    path: str | Path,
    *,
    format: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: bool = False,
) -> None:
    """Writes config.json and safetensors under Hugging Face's names to the directory `path`; transformers reads them.

    Either all files are written or none: see `shards.Writer`. Tied weights are written once; MTP layers without the
    copies of embedding and head that DeepSeek's own files contain.

    Of a model over ranks (`k2kernels.parallel`) every rank calls it, with the same path: one rank gets each expert, and
    each other weight that is in parts, in turn and writes all. The files are those of a whole model, to the bit. An
    error is raised on every rank.

    Args:
        format: None: weights as they are. "int4" or "mxfp4": the routed experts are quantised from the model's weights
            to the 4 bits of Kimi-K2-Thinking and Kimi-K3 (compressed-tensors' names and configuration), all other
            weights become BF16: what `k2kernels convert --to int4` makes of the saved model. Of a bfloat16 model in
            training with `use_w4` of that kind, the logits of the files loaded with keep_quantized are those of the
            model, to the bit.
        max_shard_size: bytes; a larger model is split into shards with an index.

    Raises:
        ValueError: a weight is on the meta device; or, with a format, it is unknown, the model has no routed experts,
            weights are codes already, columns of experts are no multiple of 32, or hold NaN or infinity.
        OSError: the file system refused; what was there before is unchanged.
    """
    tensors = _unique(model)
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise ValueError(f"save_pretrained: every weight must hold data, got {some(meta)} on the meta device")
    ranks = getattr(model, "ranks", None)
    tensors = {n: t.to_local() if _in_parts(t) and t.device_mesh.size() == 1 else t for n, t in tensors.items()}
    parts = {name: tensor for name, tensor in tensors.items() if _in_parts(tensor)}
    if parts and ranks is None:
        raise ValueError(
            f"save_pretrained: the ranks of weights in parts must be known, got {some(parts)} in parts; distribute the "
            "model with k2kernels.parallel.parallelize, or call Layout.shard_experts(model) before fully_shard"
        )
    quantized = any(tensor.dtype in _CODES for tensor in tensors.values())
    dtype, quantization = tensors["model.embed_tokens.weight"].dtype, model.config.quantization_config
    if format is not None:
        with contextlib.nullcontext() if ranks is None else ranks.together("save_pretrained"):
            _check_export(model, tensors, format)
        quantized, dtype, quantization = True, torch.bfloat16, quantization_config(format)
    config = replace(model.config, dtype=_dtype_name(dtype), quantization_config=quantization if quantized else None)
    writes = ranks is None or ranks.writes
    new = functools.partial(Writer, path, max_shard_size)
    with new() if ranks is None else ranks.writer(new) as writer:
        writer.write_text("config.json", config.to_json())
        if parts:
            writer.share({name: (first_row(name, t), len(t.to_local())) for name, t in parts.items()})
        shown = progress and writes and on_terminal()
        for name, tensor in tqdm(tensors.items(), desc="saving") if shown else tensors.items():
            if name not in parts:
                wholes = [tensor.detach()]
            elif is_stack(name):
                wholes = [writer.experts(name, tensor)]
            else:
                wholes = writer.whole(name, tensor)
            for whole in wholes:
                stored = _w4_pieces(model, name, whole) if _is_w4(model, name) else pieces(name, whole)
                for piece_name, piece in stored if format is None else _exported(model, name, stored, format):
                    writer.add(piece_name, piece)


_CODES = (torch.float8_e4m3fn, torch.uint8)


def _check_export(model: nn.Module, tensors: dict[str, Tensor], format: str) -> None:
    """Raises ValueError unless the model can be saved in this format; of experts, judging by those that are here."""

    def require(good: bool, what: str, wanted: str, got: Any, remedy: str = "") -> None:
        if not good:
            raise ValueError(f"save_pretrained: {what} must be {wanted}, got {got}{remedy}")

    kinds = tuple(FORMATS.values())
    others = "; save without, and convert the files with `k2kernels convert`"
    require(format in kinds, "format", f"None or one of {', '.join(kinds)}", repr(format), others)
    codes = [name for name, tensor in tensors.items() if tensor.dtype in _CODES]
    remedy = "; load the model with keep_quantized=False, or convert its files with `k2kernels convert`"
    require(not codes, "weights", f"in high precision to become {format}", f"codes in {some(codes)}", remedy)
    stacks = {name: tensor for name, tensor in tensors.items() if is_stack(name)}
    require(bool(stacks), "a model that becomes " + format, "one with routed experts", "none")
    for name, tensor in stacks.items():
        columns = tensor.shape[-1]
        require(columns % GROUP == 0, f"the columns of {name}", f"a multiple of {GROUP} to become {format}", columns)
        here = tensor.to_local() if _in_parts(tensor) else tensor
        finite = all(bool(expert.isfinite().all()) for expert in here.detach())
        require(finite, name, "finite", "NaN or infinity")


def _exported(
    model: nn.Module, name: str, stored: Iterable[tuple[str, Tensor]], format: str
) -> Iterator[tuple[str, Tensor]]:
    """The files' tensors of the model's tensor `name` in a 4-bit format; `stored` are those in high precision."""
    dtype = model.get_submodule(name.rpartition(".")[0]).compute_dtype if is_stack(name) else None
    for piece_name, piece in stored:
        if is_stack(name):  # rounded as for the products first
            piece = piece.to(dtype or piece.dtype)
            yield from file_tensors(piece_name, *quantize_w4(piece, format, piece_name, ELEMENTS_AT_ONCE))
        else:
            yield piece_name, piece.to(torch.bfloat16) if piece_name.endswith(".weight") else piece


def pieces(name: str, tensor: Tensor | Iterable[Tensor], first: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that make up the model's tensor `name`: their names, and views of it.

    Fused gate and up are two of them, gate rows first; stacked experts are one each (three, gate and up being fused),
    numbered from `first` on. Scales follow their weights.
    """
    parent, _, leaf = name.rpartition(".")
    if is_stack(name):
        projection, scale = (leaf.removesuffix(SCALE), SCALE) if leaf.endswith(SCALE) else (leaf, "")
        for expert, part in enumerate(tensor, first):
            yield from _halves(f"{parent}.{expert}.{projection}", f"weight{scale}", part)
    else:
        yield from _halves(parent, leaf, tensor)


def _w4_pieces(model: nn.Module, name: str, stack: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The files' tensors of a stack of packed experts, one expert after the other."""
    parent, _, leaf = name.rpartition(".")
    experts = model.get_submodule(parent)
    for number, data in enumerate(stack):
        codes, scales = unpack_w4(experts.packed(leaf, data[None]))
        both = (dict(_halves(f"{parent}.{number}.{leaf}", "weight", x[0])) for x in (codes, scales))
        for weight, (half_codes, half_scales) in _zipped(*both):
            yield from file_tensors(weight, half_codes, half_scales, _w4_group_size(model.config, experts.w4))


def _zipped(first: dict[str, Tensor], second: dict[str, Tensor]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    return ((name, (first[name], second[name])) for name in first)


def _w4_group_size(config: K2Config, kind: str) -> int:
    """Of the files that were loaded: 32, 64 or 128."""
    sizes = {scheme.group_size for scheme in schemes(config.quantization_config) if scheme.kind == kind}
    return sizes.pop() if len(sizes) == 1 else GROUP


def _halves(module: str, leaf: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if module.endswith(".gate_up_proj"):
        gate, up = tensor.chunk(2)
        module = module.removesuffix("gate_up_proj")
        yield f"{module}gate_proj.{leaf}", gate
        yield f"{module}up_proj.{leaf}", up
    else:
        yield f"{module}.{leaf}", tensor


# ---- what the files hold -------------------------------------------------------------------------------------------


def _named_as_in_model(tensors: dict[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    """Without the decoder's prefix and a vision tower beside it."""
    decoder = [name for name in tensors if not (prefix and name.startswith(_VISION))]
    found = {name_in_model(name, prefix): tensors[name] for name in decoder}
    if len(found) < len(decoder):
        twice = [name for name in decoder if tensors[name] is not found[name_in_model(name, prefix)]]
        raise ValueError(f"{tensors[twice[0]].file.parent}: tensors must be there once, got others for {some(twice)}")
    return found


def _with_mtp_layers_found(config: K2Config, tensors: dict[str, TensorInfo], path: str | Path) -> K2Config:
    """The config, and the tensors, with the same number of MTP layers."""
    layers = config.num_hidden_layers
    found = sorted({int(m[1]) for m in map(_MTP.fullmatch, tensors) if m} - set(range(layers)))
    if config.num_nextn_predict_layers and not found:
        warnings.warn(
            f"{path}: config.json has num_nextn_predict_layers={config.num_nextn_predict_layers}, but the files hold "
            "no MTP layer; the model is loaded without",
            stacklevel=4,
        )
        return replace(config, num_nextn_predict_layers=0)
    left_out = [layer for layer in found if layer >= layers + config.num_nextn_predict_layers]
    if left_out:
        warnings.warn(
            f"{path}: MTP layers {left_out} are left out, because config.json has "
            f"num_nextn_predict_layers={config.num_nextn_predict_layers}",
            stacklevel=4,
        )
        for name in [n for n in tensors if (m := _LAYER.match(n)) and int(m[1]) in left_out]:
            del tensors[name]
    return config


def _stored_dtype(raw: Any, config: K2Config, tensors: dict[str, TensorInfo]) -> torch.dtype:
    embedding = tensors.get("model.embed_tokens.weight")
    if not (raw.get("dtype") or raw.get("torch_dtype")) and embedding and DTYPES.get(embedding.dtype) in _FLOATS:
        return DTYPES[embedding.dtype]
    return getattr(torch, config.dtype)


def _check_number_of_tensors(config: K2Config, tensors: dict[str, Any], path: str | Path) -> None:
    """Raises ValueError where the files lack most of the model, before that is built."""
    wanted = sum(count for count, _, _ in config.tensors())
    if wanted > 2 * len(tensors) + 1000:
        raise ValueError(
            f"{path}: the checkpoint does not fit config.json: num_hidden_layers={config.num_hidden_layers} and "
            f"n_routed_experts={config.n_routed_experts} make {wanted} tensors, the files hold {len(tensors)}"
            f"{rival_of_index(path)}"
        )


def _check_keep_w4(dtype: torch.dtype, path: str | Path) -> None:
    if dtype != torch.bfloat16:
        raise ValueError(
            f"{path}: keep_quantized of 4-bit weights must go with dtype torch.bfloat16, in which they are multiplied, "
            f"got {dtype}; leave dtype out, or load with keep_quantized=False"
        )


def _check_memory(
    model: nn.Module, tensors: dict[str, Any], dtype: torch.dtype, device: torch.device, keep: bool, path: str
) -> None:
    """Raises MemoryError if the weights, or this rank's part of them, are more than the device can hold."""
    needed = sum(
        (tensor.to_local() if _in_parts(tensor) else tensor).numel()
        * (dtype if _is_castable(name, tensor) else tensor.dtype).itemsize
        for name, tensor in _unique(model).items()
    )
    has = device_bytes(device)
    if has is None or needed <= has:
        return
    stored = sum(info.nbytes for info in tensors.values())
    quantised = any(isinstance(info, PackedInfo) or info.dtype == "F8_E4M3" for info in tensors.values())
    if quantised and not keep:
        remedy = f"load with keep_quantized=True (--keep-quantized), as the files have them: {gb(stored)} in all"
    elif quantised:
        remedy = "divide the experts among more GPUs (mesh, torchrun)"
    else:
        remedy = "divide the experts among GPUs (mesh, torchrun), or convert the checkpoint: k2kernels convert"
    raise MemoryError(
        f"{path}: weights must fit into the {gb(has)} of {str(device)!r}, got {gb(needed)} in {_dtype_name(dtype)}; "
        + remedy
    )


def _use_w4_experts(model: nn.Module, tensors: dict[str, Any], path: str) -> None:
    """Makes room for packed weights in the stacks of experts that the files hold in 4 bits."""
    served = set()
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            weights = dict(module.named_parameters(recurse=False))
            names = [piece for leaf, weight in weights.items() for piece, _ in pieces(f"{name}.{leaf}", weight)]
            found = [tensors[n] for n in names if n in tensors]
            kinds = {info.dtype if isinstance(info, PackedInfo) else "others" for info in found}
            if kinds <= {"others"}:
                continue
            if len(kinds) > 1:
                raise UnsupportedError(
                    f"{path}: keep_quantized needs experts of one kind in a layer, got {' and '.join(sorted(kinds))} "
                    f"in {name}; load with keep_quantized=False"
                )
            module.use_w4(kinds.pop())
            served |= set(names)
    others = [name for name, info in tensors.items() if isinstance(info, PackedInfo) and name not in served]
    if others:
        raise UnsupportedError(
            f"{path}: keep_quantized needs the routed experts alone to be packed, got {some(others)}; load with "
            "keep_quantized=False"
        )


def _check_keep_fp8(config: K2Config, path: str | Path) -> None:
    if config.weight_block_size is None:
        raise ValueError(
            f"{path}: keep_quantized must go with a block-FP8 or 4-bit checkpoint, got one of neither; load it "
            "without, or convert it with `k2kernels convert SRC DST --to fp8`, int4 or mxfp4"
        )

    def require(good: bool, wanted: str, got: Any) -> None:
        if not good:
            raise UnsupportedError(f"{path}: keep_quantized needs {wanted}, got {got}; load without keep_quantized")

    block, scale_fmt = list(config.weight_block_size), config.quantization_config.get("scale_fmt")
    require(block == list(FP8_BLOCK), f"weight_block_size {list(FP8_BLOCK)}", block)
    require(scale_fmt in (None, "ue8m0"), "quantization_config.scale_fmt 'ue8m0' or none", repr(scale_fmt))
    for name in ("moe_intermediate_size", *(["intermediate_size"] if config.first_k_dense_replace else [])):
        width = getattr(config, name)
        wanted = f"{name} to be a multiple of {FP8_BLOCK[0]} (the scales of gate and up are fused)"
        require(width % FP8_BLOCK[0] == 0, wanted, width)


# ---- what the model needs ------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A tensor that the files must hold, and the tensor of the model that it is part of."""

    owner: str
    like: Tensor


def _unique(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, a tied one under its first name only."""
    first: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in tensors.items() if first.setdefault(id(tensor), name) == name}


def _wanted(model: nn.Module) -> dict[str, _Piece]:
    """What the files must hold of the whole model, by name in the files."""
    return {
        name: _Piece(owner, like)
        for owner, tensor in _unique(model).items()
        for name, like in pieces(owner, _as_in_files(model, owner, tensor))
    }


def _as_in_files(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The whole of `tensor` as `pieces` takes it: of packed experts, uint8 of the shape of their weights."""
    if not _is_w4(model, name):
        return _like_whole(tensor)
    parent, _, leaf = name.rpartition(".")
    return torch.empty(model.get_submodule(parent).packed(leaf, tensor).shape, dtype=torch.uint8, device="meta")


def _is_w4(model: nn.Module, name: str) -> bool:
    """Whether the model's tensor `name` is a stack of packed experts."""
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, Experts) and module.w4 is not None


def _tied(model: nn.Module) -> dict[str, str]:
    """The other names of tied weights, and the first."""
    owners = _unique(model)
    first_name = {id(tensor): name for name, tensor in owners.items()}
    tensors = model.state_dict(keep_vars=True)
    return {name: first_name[id(tensor)] for name, tensor in tensors.items() if name not in owners}


def kept(name: str, tensor: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """What of each of the model tensor's `pieces` is on this rank: its name, the number of the first row that is here,
    and the rows, which share the tensor's memory. Pieces of which nothing is here are left out."""
    if not _in_parts(tensor):
        for piece, whole in pieces(name, tensor):
            yield piece, 0, whole
        return
    first, local = first_row(name, tensor), tensor.to_local()
    if is_stack(name):
        for piece, whole in pieces(name, local, first):
            yield piece, 0, whole
        return
    row = 0
    for piece, like in pieces(name, _like_whole(tensor)):
        start, end = max(first, row), min(first + len(local), row + len(like))
        if start < end:
            yield piece, start - row, local[start - first : end - first]
        row += len(like)


def first_row(name: str, tensor: Tensor) -> int:
    """The number of the first row of a DTensor that is here.

    Raises:
        UnsupportedError: it is divided along another axis than the first, or the rows here are not consecutive.
    """
    (chunk,) = tensor.__create_chunk_list__()
    if tuple(chunk.sizes) != tuple(tensor.to_local().shape) or tuple(chunk.sizes[1:]) != tuple(tensor.shape[1:]):
        raise UnsupportedError(f"{name}: must be divided along its first axis, got {list(tensor.placements)}")
    return chunk.offsets[0]


def is_stack(name: str) -> bool:
    """Whether the model's tensor `name` is a stack of experts, which are pieces of their own."""
    return name.rpartition(".")[0].endswith(".mlp.experts")


def _in_parts(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def _like_whole(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype, of which this rank may have only a part."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if _in_parts(tensor) else tensor


def _is_fp8(name: str, tensors: dict[str, TensorInfo]) -> bool:
    return name in tensors and tensors[name].dtype == "F8_E4M3"


def _use_fp8_modules(model: nn.Module, tensors: dict[str, TensorInfo], power_of_two: bool) -> None:
    """Makes modules FP8 where the files hold FP8: linear layers of attention and feed-forward, and experts."""
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, nn.Linear) and re.search(r"\.(self_attn|mlp)\.", name):
            first = next(pieces(f"{name}.weight", module.weight))[0]
            if _is_fp8(first, tensors):
                fp8 = Fp8Linear(module.in_features, module.out_features, power_of_two)
                setattr(model.get_submodule(parent), leaf, fp8)
        elif isinstance(module, Experts):
            weights = dict(module.named_parameters(recurse=False))
            names = [piece for leaf, weight in weights.items() for piece, _ in pieces(f"{name}.{leaf}", weight)]
            if not any(_is_fp8(piece, tensors) for piece in names):
                continue
            for leaf, weight in weights.items():
                experts, *sizes = weight.shape
                grid = [-(-size // step) for size, step in zip(sizes, FP8_BLOCK)]
                codes, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(experts, *grid)
                setattr(module, leaf, nn.Parameter(codes, requires_grad=False))
                setattr(module, leaf + SCALE, nn.Parameter(scales, requires_grad=False))


def _check(wanted: dict[str, _Piece], tensors: dict[str, TensorInfo], tied: set[str], block: Any, path: str) -> None:
    """Raises ValueError with everything that is wrong with the names, shapes and dtypes."""
    faults: dict[str, list[str]] = {"missing": [name for name in wanted if name not in tensors]}
    for name, info in tensors.items():
        if name in wanted:
            for kind, fault in faults_of(name, info, wanted[name].like, tensors, block):
                faults.setdefault(kind, []).append(fault)
        elif not (name in tied or _IGNORED.fullmatch(name) or _is_fp8(name.removesuffix(SCALE), tensors)):
            faults.setdefault("unexpected", []).append(name)
    lines = [f"{len(items)} {kind}: {some(items)}" for kind, items in faults.items() if items]
    if lines:
        faults = "\n  ".join(lines)
        raise ValueError(f"{path}: the checkpoint does not fit config.json; tensors\n  {faults}{rival_of_index(path)}")


def faults_of(
    name: str, info: TensorInfo, like: Tensor, tensors: dict[str, TensorInfo], block: tuple[int, int] | None
) -> Iterator[tuple[str, str]]:
    """What is wrong with a tensor of the files that is to become `like`: the kind of fault, and a text."""
    dtype, shape = "of the wrong dtype", "of the wrong shape"
    if info.shape != tuple(like.shape):
        yield shape, f"{name} (wanted {list(like.shape)}, got {list(info.shape)})"
    elif isinstance(info, PackedInfo):
        pass  # its tensors were checked when they were joined
    elif like.dtype in (torch.float8_e4m3fn, torch.uint8):
        wanted = "packed 4-bit codes" if like.dtype == torch.uint8 else "F8_E4M3"
        if info.dtype != wanted:
            yield dtype, f"{name} (wanted {wanted}, got {info.dtype}; load without keep_quantized)"
    elif info.dtype == "F8_E4M3":
        if block is None:
            yield dtype, f"{name} (F8_E4M3, but config.json has no quantization_config with weight_block_size)"
        elif name + SCALE not in tensors:
            yield "missing", f"{name + SCALE} (for {name}, which is F8_E4M3)"
        else:
            grid = [-(-size // step) for size, step in zip(info.shape, block)]
            yield from faults_of(name + SCALE, tensors[name + SCALE], like.new_empty(grid), tensors, block)
    elif DTYPES.get(info.dtype) not in (_SCALE_DTYPES if name.endswith(SCALE) else _FLOATS):
        yield dtype, f"{name} (wanted a float, got {info.dtype})"


# ---- filling -------------------------------------------------------------------------------------------------------


def _load(
    model: nn.Module,
    tensors: dict[str, TensorInfo],
    block: tuple[int, int] | None,
    path: str,
    progress: bool,
    create: Callable[[str, Tensor], Tensor],
) -> None:
    """Fills `model` with what is here of its weights; `create` gives one memory, in the order of the files."""
    owners = _unique(model)
    lengths = {  # of what is here of each piece
        name: (owner, tensors[name].shape[0] if isinstance(part, _PackedTarget) else len(part))
        for owner, t in owners.items()
        for name, _, part in _targets(model, owner, t)
    }
    total = sum(_nbytes(tensors[name], length) for name, (_, length) in lengths.items())
    targets: dict[str, tuple[int, Tensor | _PackedTarget]] = {}  # where the parts of the owners created so far go
    packed: set[str] = set()  # pieces that were packed together with another
    bar = Progress(total, "loading", progress)
    with bar, torch.no_grad(), Reader(_parts(tensors)) as weights, Reader(_parts(tensors)) as scales:
        for name, info in tensors.items():
            if name not in lengths or name in packed:
                continue
            if name not in targets:
                owner = lengths[name][0]
                new = create(owner, owners[owner])
                targets.update((piece, (first, part)) for piece, first, part in _targets(model, owner, new))
            first, target = targets.pop(name)
            if isinstance(target, _PackedTarget):
                packed.update(target.names)
                _pack(target, tensors, weights, path)
                bar.update(sum(_nbytes(tensors[piece], lengths[piece][1]) for piece in target.names))
                continue
            rows = None if len(target) == info.shape[0] else (first, first + len(target))
            scale = tensors.get(name + SCALE)
            if isinstance(info, PackedInfo):
                parts = read_packed(info, weights, path, kept=False, rows=rows)
                dequantize_packed_into(target, *parts, ELEMENTS_AT_ONCE)
            elif info.dtype == "F8_E4M3" and target.dtype != torch.float8_e4m3fn:
                skip, grid = 0, None  # the rows of the scales
                if rows is not None:
                    skip, grid = first % block[0], (first // block[0], -(-rows[1] // block[0]))
                factors = read_scales(scale, scales, path, grid)
                dequantize_into(target, read_codes(info, weights, path, rows), factors, block, skip)
            elif name.endswith(SCALE):
                target.copy_(read_scales(info, scales, path, rows))
            elif info.dtype == "F8_E4M3":
                target.copy_(read_codes(info, weights, path, rows))
            else:
                target.copy_(read_weight(name, info, weights, path, rows))
            bar.update(_nbytes(info, len(target)))


class _PackedTarget(NamedTuple):
    """Where one expert's packed bytes of a stack go, and the weights of the files that they are made of."""

    names: list[str]
    data: Tensor
    kind: str


def _targets(model: nn.Module, name: str, tensor: Tensor) -> Iterator[tuple[str, int, Tensor | _PackedTarget]]:
    """As `kept`; of a stack of packed experts the targets, which gate and up of one have in common."""
    if not _is_w4(model, name):
        yield from kept(name, tensor)
        return
    parent, _, leaf = name.rpartition(".")
    kind = model.get_submodule(parent).w4
    first, here = (first_row(name, tensor), tensor.to_local()) if _in_parts(tensor) else (0, tensor)
    for number, data in enumerate(here, first):
        names = [piece for piece, _ in _halves(f"{parent}.{number}.{leaf}", "weight", torch.empty(2, device="meta"))]
        target = _PackedTarget(names, data, kind)
        yield from ((piece, 0, target) for piece in names)


def _pack(target: _PackedTarget, tensors: dict[str, Any], reader: Reader, path: str) -> None:
    """Reads the codes of one expert, to its device, and packs them there."""
    others = [f"{name} ({tensors[name].dtype})" for name in target.names if tensors[name].dtype != target.kind]
    if others:
        raise ValueError(f"{path}: experts must be {target.kind} like the model's, got {some(others)}")
    parts = [read_packed(tensors[name], reader, path, kept=True) for name in target.names]
    codes, scales = (torch.cat([x.to(target.data.device) for x in both]) for both in zip(*parts))
    pack_w4(codes, scales, gated=len(parts) == 2, out=target.data)


def _parts(tensors: dict[str, Any]) -> list[TensorInfo]:
    """The tensors of the files, those of packed weights one by one."""
    return [part for info in tensors.values() for part in (info.parts if isinstance(info, PackedInfo) else [info])]


def _nbytes(info: TensorInfo, rows: int) -> int:
    """Of some rows of a tensor of the files."""
    return info.nbytes // max(info.shape[0], 1) * rows


Rows = tuple[int, int]  # the first, and the one after the last


def read_weight(name: str, info: TensorInfo, reader: Reader, path: str, rows: Rows | None = None) -> Tensor:
    """A weight in high precision, which is `name` in the model; or some of its rows.

    NaN and infinity raise ValueError where the check is cheap and such a value would go unnoticed or affect every
    token: in the router, which would choose an expert never or always, and in vectors (its bias, norms).
    """
    weight = reader.get(info, rows)
    if name.startswith("model.") and (weight.dim() < 2 or ".mlp.gate." in name):
        bad = weight.numel() - int(weight.isfinite().sum())
        if bad:
            raise ValueError(f"{path}: {info.name} must hold finite numbers, got {bad} others in {info.file.name}")
    return weight


def read_codes(info: TensorInfo, reader: Reader, path: str, rows: Rows | None = None) -> Tensor:
    """An FP8 weight, or some of its rows; a NaN among its codes is an error."""
    codes = reader.get(info, rows)
    some_bytes = codes.view(torch.uint8).flatten().split(ELEMENTS_AT_ONCE)
    if any(int((part & 0x7F).amax()) == 0x7F for part in some_bytes if part.numel()):
        bad = int(((codes.view(torch.uint8) & 0x7F) == 0x7F).sum())
        raise ValueError(f"{path}: {info.name} must hold numbers, got {bad} NaN codes in {info.file.name}")
    return codes


def read_scales(info: TensorInfo, reader: Reader, path: str, rows: Rows | None = None) -> Tensor:
    """The scales of an FP8 weight in float32, or some of their rows; they must be finite and not negative."""
    scales = reader.get(info, rows).float()
    bad = int((~scales.isfinite() | (scales < 0)).sum())
    if bad:
        raise ValueError(
            f"{path}: {info.name} must hold finite numbers of 0 or more, got {bad} others in {info.file.name}"
        )
    return scales


def dequantize_into(target: Tensor, codes: Tensor, scales: Tensor, block: tuple[int, int], skip: int = 0) -> None:
    """target [rows, columns] = codes * scales of their blocks, a few rows of blocks at a time. The first row is number
    `skip` of its block."""
    rows, columns = codes.shape
    step = block[0] * max(1, ELEMENTS_AT_ONCE // max(1, block[0] * columns))
    starts = [0, *range(block[0] - skip if skip else step, rows, step)]
    for start, end in zip(starts, [*starts[1:], rows]):
        grid = slice((start + skip) // block[0], -(-(end + skip) // block[0]))
        device_codes, device_scales = codes[start:end].to(target.device), scales[grid].to(target.device)
        target[start:end] = dequantize(device_codes, device_scales, *block, target.dtype)


def _create(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Gives the model's tensor `name` memory: weights in `dtype`, scales and buffers in their own."""
    new = torch.empty_like(tensor, dtype=dtype if _is_castable(name, tensor) else None, device=device)
    return _put(model, name, new, like=tensor)


def _is_castable(name: str, tensor: Tensor) -> bool:
    """Whether a model's tensor takes the dtype that is asked for."""
    return isinstance(tensor, nn.Parameter) and tensor.dtype in _FLOATS and not name.endswith(SCALE)


def _put(model: nn.Module, name: str, tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Sets the model's `name` to `tensor`, as a parameter if `like` is one."""
    parent, _, leaf = name.rpartition(".")
    if isinstance(like, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=like.requires_grad)
    setattr(model.get_submodule(parent), leaf, tensor)
    return tensor


def _fill_unsaved_buffers(model: nn.Module, device: torch.device) -> None:
    """Gives buffers that no file holds (frequencies, counters) memory and their first values."""
    for module in model.modules():
        meta = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in meta:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if meta:
            module.reset_buffers()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
