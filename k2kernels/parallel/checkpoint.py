"""Checkpoints of a training run: model and optimizer by torch.distributed.checkpoint, resumable on another mesh.

    DIR/latest        the name of the newest checkpoint that is whole
    DIR/step_12/      torch.distributed.checkpoint's files, and state.pt: step, options of the optimizer, extra

Everything of a checkpoint is on the disk before `latest` names it, so whatever interrupts a save, `latest` names the
one before. The tensors have the names of the whole model, with the optimizer's state as `optimizer.NAME.KEY`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from k2kernels.model.files import reason, replace_file, sync

LATEST, STATE = "latest", "state.pt"


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    step: int,
    *,
    extra: Any = None,
) -> Path:
    """Saves a training run, as one checkpoint of all ranks. Collective: every rank of torch.distributed calls it.

    Args:
        path: a directory of checkpoints on a file system that all ranks share; the last two stay in it.
        model: its state dict is saved, parameters of `parallelize`, `fully_shard` and `expert_parallel` as what they
            are; a pipeline stage saves its layers.
        optimizer: None, or one whose parameters are the model's; of ours, masters and momenta too.
        step: the number of steps done.
        extra: what else is to be kept, from rank 0: numbers, strings, tensors, and lists and dicts of them.

    Returns:
        The directory of the checkpoint.

    Raises:
        OSError: on every rank, if one cannot write; the checkpoint before is unchanged.
    """
    path, ranks = Path(path), _Ranks()
    model = _unwrapped(model)
    tensors = dict(model.state_dict())
    state, options = _optimizer_state(model, optimizer)
    tensors.update(state)
    name, failure = None, None
    if ranks.rank == 0:
        try:
            name = _new_folder(path, step)
        except OSError as error:
            failure = error
    name = ranks.of_rank_0(name)
    if name is None:
        raise OSError(f"save_checkpoint: {path} cannot be written ({failure or 'on rank 0'})") from failure
    folder = path / name
    try:
        with _no_warning():
            dcp.save(tensors, checkpoint_id=folder, no_dist=ranks.alone)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise OSError(
            f"save_checkpoint: {folder} cannot be written ({_reason(error)}); the checkpoint before is unchanged"
        ) from error
    if ranks.rank == 0:
        try:
            replace_file(folder / STATE, lambda f: torch.save({"step": step, "options": options, "extra": extra}, f))
            sync(folder)
            previous = _latest(path)
            replace_file(path / LATEST, lambda f: f.write(f"{name}\n".encode()))
            _remove(old for old in path.glob("step_*") if old.name not in (name, previous))
        except (OSError, RuntimeError) as error:
            failure = error
    if ranks.of_rank_0(failure is None) is False:
        raise OSError(f"save_checkpoint: {folder} cannot be written ({failure or 'on rank 0'})") from failure
    return folder


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> int:
    """Loads the newest checkpoint of `save_checkpoint` into a model and an optimizer, in place. Collective.

    The mesh may be another one than that of the save: other numbers of ranks, of stages, of ranks that share the
    experts, or one process without torch.distributed.

    Args:
        path: the directory of checkpoints.
        model: as `save_checkpoint` had it, but for how it is distributed.
        optimizer: the same; None leaves its state in the file.

    Returns:
        The number of steps done.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is another model's, or another optimizer's, or cannot be read. Model and optimizer may then hold
            some of it.
    """
    ranks = _Ranks()
    model = _unwrapped(model)
    found = checkpoint_info(path)
    if found is None:
        raise FileNotFoundError(f"load_checkpoint: {path} must be a directory of save_checkpoint, got one without")
    folder = found["folder"]
    try:
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a pickle of torch, which raises many kinds for a damaged file
        raise ValueError(f"load_checkpoint: {folder} cannot be read ({_reason(error)})") from error
    tensors = dict(model.state_dict())
    _check_model(folder, tensors, saved)
    entries = {} if optimizer is None else _empty_state(folder, model, optimizer, saved, found["options"])
    tensors.update(entries)
    try:
        with _no_warning():
            dcp.load(tensors, checkpoint_id=folder, no_dist=ranks.alone)
    except (CheckpointException, Exception) as error:
        raise ValueError(f"load_checkpoint: {folder} cannot be read ({_reason(error)})") from error
    if optimizer is not None:
        _load_optimizer(model, optimizer, entries, found["options"])
    return found["step"]


def checkpoint_info(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What the newest checkpoint in a directory says of itself: "folder", "step", "extra", "options". Collective.

    Returns:
        None if there is no checkpoint.

    Raises:
        ValueError: it cannot be read.
    """
    path = Path(path)
    name = _Ranks().of_rank_0(_latest(path))
    if name is None:
        return None
    folder = path / name
    try:
        state = torch.load(folder / STATE, weights_only=True, map_location="cpu")
        return {"folder": folder, **{key: state[key] for key in ("step", "extra", "options")}}
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise ValueError(f"{folder}: must be a checkpoint, but cannot be read ({type(error).__name__})") from error


class _Ranks:
    """All ranks of torch.distributed, or one process without."""

    def __init__(self) -> None:
        self.alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self.alone else dist.get_rank()

    def of_rank_0(self, value: Any) -> Any:
        values = [value]
        if not self.alone:
            dist.broadcast_object_list(values, src=0)
        return values[0]


# ---- the optimizer's state by names


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, str, Tensor]]:
    """The number of each parameter in the optimizer's state dict, its name, and itself."""
    names = {p: name for name, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in enumerate(params):
        if p not in names:
            raise ValueError(
                f"optimizer: its parameters must be the model's, got one of shape {list(p.shape)} that is not; make "
                "the optimizer after the model is distributed"
            )
        yield number, names[p], p


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Any], list]:
    """name -> tensor, and the options of each group."""
    if optimizer is None:
        return {}, []
    whole = optimizer.state_dict()
    numbers = [number for group in whole["param_groups"] for number in group["params"]]
    tensors = {}
    for number, name, _ in _names(model, optimizer):
        for key, value in whole["state"].get(numbers[number], {}).items():
            tensors[f"optimizer.{name}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors, [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in whole["param_groups"]]


def _empty_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any], options: list
) -> dict[str, Tensor]:
    """Tensors for what the checkpoint has of an optimizer's state, distributed as the optimizer's own."""
    if len(options) != len(optimizer.param_groups):
        raise ValueError(
            f"load_checkpoint: optimizer must have the {len(options)} parameter groups of {folder}, got "
            f"{len(optimizer.param_groups)}"
        )
    own, _ = _optimizer_state(model, optimizer)
    keys = _keys_of(saved)
    entries = {}
    for _, name, p in _names(model, optimizer):
        for key in keys.get(name, ()):
            full = f"optimizer.{name}.{key}"
            size, dtype = saved[full].size, saved[full].properties.dtype
            if full in own and own[full].shape == size and own[full].dtype == dtype:
                entries[full] = own[full].detach()
            elif size == p.shape:
                entries[full] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            else:
                entries[full] = torch.zeros(size, dtype=dtype)
    return entries


def _load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, entries: dict[str, Tensor], options: list
) -> None:
    groups, number = [], 0
    for group, saved in zip(optimizer.param_groups, options):
        count = len(group["params"])
        kept = {"param_names": group["param_names"]} if "param_names" in group else {}
        groups.append({**saved, **kept, "params": list(range(number, number + count))})
        number += count
    keys = _keys_of(entries)
    states = {
        number: {key: entries[f"optimizer.{name}.{key}"] for key in keys[name]}
        for number, name, _ in _names(model, optimizer)
        if name in keys
    }
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _keys_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameter -> the keys of its state, of the names optimizer.PARAMETER.KEY among `names`."""
    keys: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("optimizer."):
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            keys.setdefault(parameter, []).append(key)
    return keys


def _check_model(folder: Path, tensors: dict[str, Any], saved: dict[str, Any]) -> None:
    faults = [f"{name} is not in it" for name in tensors if name not in saved]
    faults += [
        f"{name} is {list(saved[name].size)} in it, {list(t.shape)} in the model"
        for name, t in tensors.items()
        if name in saved and isinstance(t, Tensor) and tuple(saved[name].size) != tuple(t.shape)
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"load_checkpoint: {folder} must be of the same model, but {'; '.join(faults[:5])}{more}")


def _unwrapped(model: nn.Module) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def _no_warning() -> Iterator[None]:
    """Without torch.distributed.checkpoint's, that one process works alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


# ---- files


def _latest(path: Path) -> str | None:
    try:
        name = (path / LATEST).read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return name if name and (path / name).is_dir() else None


def _new_folder(path: Path, step: int) -> str:
    """Makes an empty folder, after removing what interrupted saves have left."""
    path.mkdir(parents=True, exist_ok=True)
    _remove(folder for folder in path.glob("step_*") if not (folder / STATE).exists())
    name, again = f"step_{step}", 0
    while (path / name).exists():
        again += 1
        name = f"step_{step}.{again}"
    (path / name).mkdir()
    return name


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The cause that a user can act on: the first rank's, and an error of the file system where there is one."""
    rank, failures = "", getattr(error, "failures", None)  # of torch.distributed.checkpoint
    if failures:
        number, (error, _) = next(iter(failures.items()))
        rank = f"rank {number}: "
    return rank + reason(error)
