"""Weights of a model from and to Hugging Face checkpoints, BF16 or block FP8, one tensor at a time.

Tensors that are fused or stacked in the model are separate in the files: `pieces` defines the mapping for both
directions. Every name, shape and dtype is checked from the files' headers before the first weight is read.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from k2kernels._backend import UnsupportedError
from k2kernels.model.config import K2Config, read_config_file, text_part
from k2kernels.model.linear import Fp8Linear
from k2kernels.model.moe import Experts
from k2kernels.model.shards import DTYPES, MAX_SHARD_SIZE, Progress, Reader, TensorInfo, Writer, scan, some
from k2kernels.reference.quant import dequantize

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
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    keep_fp8: bool = False,
    progress: bool = True,
    mesh: Any = None,
) -> Model:
    """Loads the Hugging Face checkpoint in the directory `path`. Weights are read one at a time.

    Args:
        path: directory with config.json and safetensors files.
        dtype: float dtype of the weights; None takes the one config.json names, or else that of the embedding.
            The router's bias and the scales stay float32.
        keep_fp8: keep a block-FP8 checkpoint's weights and scales as they are instead of dequantising them. Scales of
            activations are powers of two where its quantization_config has `scale_fmt: ue8m0`.
        progress: show a progress bar.
        mesh: a `k2kernels.parallel.Layout`, or a DeviceMesh with dimensions "dp" and "ep" (see
            `k2kernels.parallel.make_mesh`). Each rank then reads and keeps its own experts, and all other weights. Call
            it on every rank; an error of one is raised on all. `k2kernels.parallel.expert_parallel` must follow before
            the model is used.

    MTP layers follow config.json's num_nextn_predict_layers. Layers beyond that number are left out with a warning,
    and so is the number itself if the files hold no MTP layer at all (transformers writes such checkpoints).

    Raises:
        FileNotFoundError: the directory, config.json or a shard is missing (named).
        ValueError: tensors are missing, unexpected, of the wrong shape or dtype (listed), or hold impossible values:
            FP8 weights with NaN, scales below 0, and NaN or infinity in scales, norms and the router.
        UnsupportedError: a kind of checkpoint that is recognised but not supported.
    """
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"from_pretrained: dtype must be a float dtype or None, got {dtype!r}")
    if mesh is not None:
        from k2kernels.parallel.layout import Layout

        ranks = Layout.of(mesh)
        with ranks.together("from_pretrained"):
            return _read(cls, path, dtype, device, keep_fp8, progress and ranks.writes, ranks)
    return _read(cls, path, dtype, device, keep_fp8, progress, None)


def _read(
    cls: type[Model],
    path: str | Path,
    dtype: torch.dtype | None,
    device: str | torch.device,
    keep_fp8: bool,
    progress: bool,
    ranks: Any,
) -> Model:
    """`from_pretrained`, of the part of the model that belongs to this rank of a Layout."""
    device = _device(device)
    raw = read_config_file(path)
    config = K2Config.from_pretrained(path)
    tensors = _named_as_in_model(scan(path), text_part(raw)[1])
    config = _with_mtp_layers_found(config, tensors, path)
    _check_number_of_tensors(config, tensors, path)
    if keep_fp8:
        _check_keep_fp8(config, path)
    dtype = dtype or _stored_dtype(text_part(raw)[0], config, tensors)
    block = config.weight_block_size
    config = replace(
        config,
        dtype=_dtype_name(dtype),
        quantization_config=config.quantization_config if keep_fp8 else None,
    )
    with torch.device("meta"):
        model = cls(config)
        if keep_fp8:
            _use_fp8_modules(model, tensors, config.power_of_two_scales)
    _check(_wanted(model), tensors, set(_tied(model)), block, str(path))
    if ranks is not None:
        ranks.shard_experts(model)  # after the check: every rank finds what is wrong with any expert
    _load(model, tensors, block, str(path), dtype, device, progress)
    return model.eval()


def save_pretrained(
    model: nn.Module, path: str | Path, *, max_shard_size: int = MAX_SHARD_SIZE, progress: bool = False
) -> None:
    """Writes config.json and safetensors under Hugging Face's names to the directory `path`; transformers reads them.

    Either all files are written or none: see `shards.Writer`. Tied weights are written once; MTP layers without the
    copies of embedding and head that DeepSeek's own files contain.

    Of a model over ranks (`k2kernels.parallel`) every rank calls it, with the same path: one rank gets each expert in
    turn and writes all, so that the files are those of a whole model. An error is raised on every rank.

    Args:
        max_shard_size: bytes; a larger model is split into shards with an index.

    Raises:
        OSError: the file system refused; what was there before is unchanged.
    """
    tensors = _unique(model)
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise ValueError(f"save_pretrained: every weight must hold data, got {some(meta)} on the meta device")
    experts = {name for name in tensors if _is_sharded_stack(model, name)}
    parts = [name for name, tensor in tensors.items() if hasattr(tensor, "to_local") and name not in experts]
    if parts:
        raise ValueError(
            f"save_pretrained: every weight but the experts must be whole, got {some(parts)} in parts (FSDP); load "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(options=StateDictOptions("
            "full_state_dict=True)) into a whole model and save that"
        )
    fp8 = any(tensor.dtype == torch.float8_e4m3fn for tensor in tensors.values())
    config = replace(
        model.config,
        dtype=_dtype_name(tensors["model.embed_tokens.weight"].dtype),
        quantization_config=model.config.quantization_config if fp8 else None,
    )
    ranks = getattr(model, "ranks", None)
    writes = ranks is None or ranks.writes
    new = functools.partial(Writer, path, max_shard_size)
    with new() if ranks is None else ranks.writer(new) as writer:
        writer.write_text("config.json", config.to_json())
        for name, tensor in tqdm(tensors.items(), desc="saving") if progress and writes else tensors.items():
            whole = writer.experts(tensor) if name in experts else tensor.detach()
            for piece_name, piece in pieces(name, whole):
                writer.add(piece_name, piece)


def pieces(name: str, tensor: Tensor | Iterable[Tensor], first: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that make up the model's tensor `name`: their names, and views of it.

    Fused gate and up are two of them, gate rows first; stacked experts are one each (three, gate and up being fused),
    numbered from `first` on. Scales follow their weights.
    """
    parent, _, leaf = name.rpartition(".")
    if parent.endswith(".mlp.experts"):
        projection, scale = (leaf.removesuffix(SCALE), SCALE) if leaf.endswith(SCALE) else (leaf, "")
        for expert, part in enumerate(tensor, first):
            yield from _halves(f"{parent}.{expert}.{projection}", f"weight{scale}", part)
    else:
        yield from _halves(parent, leaf, tensor)


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
    return {
        name.removeprefix(prefix): info for name, info in tensors.items() if not (prefix and name.startswith(_VISION))
    }


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


def _check_number_of_tensors(config: K2Config, tensors: dict[str, TensorInfo], path: str | Path) -> None:
    """Raises ValueError where the files lack most of the model, before that is built."""
    wanted = sum(count for count, _, _ in config.tensors())
    if wanted > 2 * len(tensors) + 1000:
        raise ValueError(
            f"{path}: the checkpoint does not fit config.json: num_hidden_layers={config.num_hidden_layers} and "
            f"n_routed_experts={config.n_routed_experts} make {wanted} tensors, the files hold {len(tensors)}"
        )


def _check_keep_fp8(config: K2Config, path: str | Path) -> None:
    if config.weight_block_size is None:
        raise ValueError(
            f"{path}: keep_fp8 must go with a block-FP8 checkpoint, got one without quantization_config; load it "
            "without keep_fp8, or convert it with `k2kernels convert SRC DST --to fp8`"
        )

    def require(good: bool, wanted: str, got: Any) -> None:
        if not good:
            raise UnsupportedError(f"{path}: keep_fp8 needs {wanted}, got {got}; load without keep_fp8")

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
    """What the files must hold of the weights that are here, by name in the files."""
    return {
        name: _Piece(owner, like)
        for owner, whole in _unique(model).items()
        for name, like in pieces(owner, _here(whole), _first_expert(model, owner))
    }


def _tied(model: nn.Module) -> dict[str, str]:
    """The other names of tied weights, and the first."""
    owners = _unique(model)
    first_name = {id(tensor): name for name, tensor in owners.items()}
    tensors = model.state_dict(keep_vars=True)
    return {name: first_name[id(tensor)] for name, tensor in tensors.items() if name not in owners}


def _here(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank; shares its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _first_expert(model: nn.Module, name: str) -> int:
    """The number of the first expert that the model's tensor `name` holds here."""
    return getattr(model.get_submodule(name.rpartition(".")[0]), "first_expert", 0)


def _is_sharded_stack(model: nn.Module, name: str) -> bool:
    """Whether the model's tensor `name` is a stack of experts that are shared out over ranks."""
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, Experts) and module.ranks is not None


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
        raise ValueError(f"{path}: the checkpoint does not fit config.json; tensors\n  " + "\n  ".join(lines))


def faults_of(
    name: str, info: TensorInfo, like: Tensor, tensors: dict[str, TensorInfo], block: tuple[int, int] | None
) -> Iterator[tuple[str, str]]:
    """What is wrong with a tensor of the files that is to become `like`: the kind of fault, and a text."""
    dtype, shape = "of the wrong dtype", "of the wrong shape"
    if info.shape != tuple(like.shape):
        yield shape, f"{name} (wanted {list(like.shape)}, got {list(info.shape)})"
    elif like.dtype == torch.float8_e4m3fn:
        if info.dtype != "F8_E4M3":
            yield dtype, f"{name} (wanted F8_E4M3, got {info.dtype}; load without keep_fp8)"
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
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
) -> None:
    """Gives `model`, which is on the meta device, memory and fills it with what is here of its weights."""
    owners, wanted, tied = _unique(model), _wanted(model), _tied(model)
    targets: dict[str, Tensor] = {}  # where the pieces of the owners created so far go
    total = sum(tensors[name].nbytes for name in wanted)
    bar = Progress(total, "loading", progress)
    with bar, torch.no_grad(), Reader(tensors.values()) as weights, Reader(tensors.values()) as scales:
        for name, info in tensors.items():
            if name not in wanted:
                continue
            if name not in targets:
                owner = wanted[name].owner
                new = _create(model, owner, owners[owner], dtype, device)
                targets.update(pieces(owner, _here(new), _first_expert(model, owner)))
            target = targets.pop(name)
            scale = tensors.get(name + SCALE)
            if info.dtype == "F8_E4M3" and target.dtype != torch.float8_e4m3fn:
                factors = read_scales(scale, scales, path)
                dequantize_into(target, read_codes(info, weights, path), factors, block)
            elif name.endswith(SCALE):
                target.copy_(read_scales(info, scales, path))
            elif info.dtype == "F8_E4M3":
                target.copy_(read_codes(info, weights, path))
            else:
                target.copy_(read_weight(name, info, weights, path))
            bar.update(info.nbytes)
    for alias, name in tied.items():
        _put(model, alias, model.get_parameter(name))
    _fill_unsaved_buffers(model, device)


def read_weight(name: str, info: TensorInfo, reader: Reader, path: str) -> Tensor:
    """A weight in high precision, which is `name` in the model.

    NaN and infinity raise ValueError where the check is cheap and such a value would go unnoticed or affect every
    token: in the router, which would choose an expert never or always, and in vectors (its bias, norms).
    """
    weight = reader.get(info)
    if name.startswith("model.") and (weight.dim() < 2 or ".mlp.gate." in name):
        bad = weight.numel() - int(weight.isfinite().sum())
        if bad:
            raise ValueError(f"{path}: {info.name} must hold finite numbers, got {bad} others in {info.file.name}")
    return weight


def read_codes(info: TensorInfo, reader: Reader, path: str) -> Tensor:
    """An FP8 weight; a NaN among its codes is an error."""
    codes = reader.get(info)
    some_bytes = codes.view(torch.uint8).flatten().split(ELEMENTS_AT_ONCE)
    bad = sum(int(((part & 0x7F) == 0x7F).sum()) for part in some_bytes)
    if bad:
        raise ValueError(f"{path}: {info.name} must hold numbers, got {bad} NaN codes in {info.file.name}")
    return codes


def read_scales(info: TensorInfo, reader: Reader, path: str) -> Tensor:
    """The scales of an FP8 weight in float32; they must be finite and not negative."""
    scales = reader.get(info).float()
    bad = int((~scales.isfinite() | (scales < 0)).sum())
    if bad:
        raise ValueError(
            f"{path}: {info.name} must hold finite numbers of 0 or more, got {bad} others in {info.file.name}"
        )
    return scales


def dequantize_into(target: Tensor, codes: Tensor, scales: Tensor, block: tuple[int, int]) -> None:
    """target [rows, columns] = codes * scales of their blocks, a few rows of blocks at a time."""
    rows, columns = codes.shape
    step = max(1, ELEMENTS_AT_ONCE // max(1, block[0] * columns))  # rows of blocks
    for i in range(0, -(-rows // block[0]), step):
        part = slice(i * block[0], (i + step) * block[0])
        device_codes, device_scales = codes[part].to(target.device), scales[i : i + step].to(target.device)
        target[part] = dequantize(device_codes, device_scales, *block, target.dtype)


def _create(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Gives the model's tensor `name` memory: weights in `dtype`, scales and buffers in their own."""
    castable = isinstance(tensor, nn.Parameter) and tensor.dtype in _FLOATS and not name.endswith(SCALE)
    new = torch.empty_like(tensor, dtype=dtype if castable else None, device=device)
    return _put(model, name, new, like=tensor)


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


def _device(device: str | torch.device) -> torch.device:
    """The device; raises ValueError before any file is read if it does not exist."""
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # an unknown name; a device without a driver
        reason = str(error).splitlines()[0]
        raise ValueError(f"from_pretrained: device must be one of this machine, got {device!r} ({reason})") from error
    if found.type == "meta":
        raise ValueError(f"from_pretrained: device must hold data, got {device!r}; K2Model(config) needs no files")
    return found


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
