"""Directories of safetensors files: read one tensor at a time, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from k2kernels.model import files
from k2kernels.model.folder import checkpoint_folder, is_lfs_pointer, lfs_remedy, no_safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_SIZE = 5_000_000_000  # bytes

# safetensors' codes of what a model's weights and scales may be, those of packed codes included
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class TensorInfo(NamedTuple):
    """The location of a tensor, from the header of its file."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # safetensors' code: F32, BF16, F8_E4M3 ...

    @property
    def nbytes(self) -> int:
        """Bytes in the file; for a dtype that is not in DTYPES, an upper bound."""
        return math.prod(self.shape) * (DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 8)


class WriteError(OSError):
    """A checkpoint could not be written; what was there before is unchanged."""


def scan(path: str | Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint directory by name, from the headers of its files alone.

    A single `model.safetensors` (which wins if both are there, as in transformers), or shards with an index. The index
    defines the contents of the checkpoint; every shard it names must exist, be complete, and hold the listed tensors.

    Raises:
        FileNotFoundError: no checkpoint, or a shard is missing.
        ValueError: a file is damaged, or the index and the shards disagree.
    """
    path = checkpoint_folder(path)
    if (path / SINGLE).is_file():
        return {info.name: info for info in header(path / SINGLE)}
    if not (path / INDEX).is_file():
        raise FileNotFoundError(f"{path}: holds neither {SINGLE} nor {INDEX}; {no_safetensors(path)}")
    weight_map = _weight_map(path / INDEX)
    files = sorted(set(weight_map.values()))
    absent = [file for file in files if not (path / file).is_file()]
    if absent:
        raise FileNotFoundError(f"{path}: {len(absent)} of {len(files)} shards are missing: {some(absent)}")
    headers = {file: {info.name: info for info in header(path / file)} for file in files}
    misplaced = [
        f"{name} (listed in the index for {file}, {_whereabouts(name, headers)})"
        for name, file in weight_map.items()
        if name not in headers[file]
    ]
    if misplaced:
        raise ValueError(f"{path / INDEX}: {len(misplaced)} tensors are not in the listed shards: {some(misplaced)}")
    return {info.name: info for file in files for info in headers[file].values() if weight_map.get(info.name) == file}


def rival_of_index(path: str | Path) -> str:
    """What to add to a message on tensors that do not fit, where `scan` passed an index over; else nothing."""
    if not all((Path(path).expanduser() / name).is_file() for name in (SINGLE, INDEX)):
        return ""
    return f"; {SINGLE} was read, not the shards of {INDEX} beside it: remove the one of these that is out of date"


class Reader:
    """Reads tensors one at a time, keeping little of the files in memory.

    safetensors maps a file into memory, and pages that were read count as memory of the process until the file is
    closed. So the file is reopened after half as many bytes as the largest of `tensors` has: the total stays below the
    largest tensor. A tensor that `get` returned must be released before the next `get`.
    """

    def __init__(self, tensors: Iterable[TensorInfo]):
        self.window = max((info.nbytes for info in tensors), default=0) // 2
        self._file: Path | None = None
        self._handle: Any = None
        self._mapped = 0

    def get(self, info: TensorInfo, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor; or some of its rows, from the first to before the second: nothing else is read then."""
        size = info.nbytes
        if rows is not None:
            size = size // max(info.shape[0], 1) * (rows[1] - rows[0])
        if info.file != self._file or self._mapped + size > self.window:
            self.close()
            self._file, self._handle = info.file, _open(info.file)
        self._mapped += size
        if rows is None:
            return self._handle.get_tensor(info.name)
        return self._handle.get_slice(info.name)[rows[0] : rows[1]]

    def close(self) -> None:
        if self._handle is not None:
            self._handle.__exit__(None, None, None)
        self._file, self._handle, self._mapped = None, None, 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Writer:
    """Writes a checkpoint into `path` when the `with` block ends: all of it, or, after an error, none.

    Shards are written under another name, flushed to the disk, and renamed at the end. A new directory is created by
    one rename. In an existing one the old checkpoint's files are moved aside first, and back if anything fails; other
    files are not touched. `config.json` is moved aside first and written last: whatever kills the process in between,
    no mixture is read, and the next load or save finishes the exchange (`files.finish_exchange`). What a process that
    was killed earlier had written is removed by the next save, with a warning.

    Tensors are referenced (not copied, if they are contiguous on the CPU) until their shard is full.
    """

    def __init__(self, path: str | Path, max_shard_size: int = MAX_SHARD_SIZE):
        self.path = Path(path)
        self.max_shard_size = max_shard_size
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []  # names of the tensors, by shard
        self._total_bytes = 0

    def __enter__(self) -> Writer:
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path}: is a file; give a directory to write a checkpoint to")
        self._fresh = not self.path.exists()
        home = self.path.absolute().parent if self._fresh else self.path
        home.mkdir(parents=True, exist_ok=True)
        with _writing(self.path):
            if not self._fresh:
                files.finish_exchange(self.path)
            self.directory, self._lock = self._folder(home)
        self._exchanging = False
        return self

    def _folder(self, home: Path) -> tuple[Path, int | None]:
        """The folder that is filled, and the descriptor that locks it."""
        files.remove_leftovers(home)
        target = self.path.absolute()
        for folder in (target.parent, target):
            files.remove_conversions(folder, target.name)
        return files.new_folder(home)

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor, in a new shard if the current one would become too large."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_size:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def write_text(self, name: str, text: str) -> None:
        """Adds a small file."""
        with _writing(self.path):
            (self.directory / name).write_text(text, encoding="utf-8")

    def copy(self, file: Path) -> None:
        """Adds a copy of a file."""
        with _writing(self.path):
            shutil.copyfile(file, self.directory / file.name)

    def __exit__(self, kind: type | None, error: BaseException | None = None, *_: object) -> None:
        try:
            if kind is None:
                with _writing(self.path):
                    self._finish()
        except BaseException as problem:
            error = problem
            raise
        finally:
            # An exchange that could not be taken back holds the old checkpoint.
            if not self._exchanging and (error is None or not self._kept_after(error)):
                shutil.rmtree(self.directory, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)

    def _kept_after(self, error: BaseException) -> bool:
        """Whether what was written stays after an error."""
        return False

    def _flush(self) -> None:
        with _writing(self.path):
            self._write(self.directory / f"shard-{len(self._shards)}")
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _write(self, file: Path) -> None:
        save_file(self._pending, file, metadata={"format": "pt"})
        file.chmod(self.directory.stat().st_mode & 0o666)  # safetensors makes it readable by the owner alone

    def _finish(self) -> None:
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        names = shard_names(count)
        for i, name in enumerate(names):
            os.rename(self.directory / f"shard-{i}", self.directory / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self._shards) for tensor in shard}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            self.write_text(INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        for file in self.directory.iterdir():
            files.sync(file)
        self._publish()
        with contextlib.suppress(OSError):  # not supported by every file system; the files themselves are flushed
            files.sync(self.path)
            files.sync(self.path.absolute().parent)

    def _publish(self) -> None:
        if self._fresh:
            os.rename(self.directory, self.path)
        else:
            self._replace()

    def _replace(self) -> None:
        """Replaces the old checkpoint's files by the staged ones; restores them on any error."""
        new = {file.name for file in self.directory.iterdir()}
        old = [f.name for f in self.path.iterdir() if f.is_file() and (f.name in new or _belongs_to_checkpoint(f.name))]
        self.directory = files.begin_exchange(self.directory, old)
        try:
            self._exchanging = True
            files.exchange(self.directory)
            self._exchanging = False
        except BaseException:
            self._exchanging = any((self.directory / files.OLD).iterdir())
            raise


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Adds to errors of the file system and safetensors which checkpoint was being written."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        code = re.search(r"os error (\d+)", str(error))  # safetensors has errno in the text
        number = error.errno if isinstance(error, OSError) else int(code[1]) if code else errno.EIO
        raise WriteError(
            number, f"cannot write the checkpoint {path} ({error}); what was there before is unchanged"
        ) from error


def on_terminal() -> bool:
    """Whether bars may be drawn: stderr is a terminal. In a file each of their states would be a line."""
    return sys.stderr.isatty()


class Progress:
    """A bar on stderr that counts bytes, if that is a terminal.

    Without `shown` nothing is written, and no bar is made, as tqdm takes locks and starts a thread.
    """

    def __init__(self, total: int, what: str, shown: bool):
        self._shown = shown
        self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True) if shown and on_terminal() else None

    def update(self, size: int) -> None:
        if self._bar is not None:
            self._bar.update(size)

    def note(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._shown:
            tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def shard_names(count: int) -> list[str]:
    """The names of a checkpoint's files."""
    return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor infinity, in a tenth of the time of `isfinite` on a CPU."""
    return x.numel() == 0 or all(bool(edge.isfinite()) for edge in x.aminmax())  # which pass NaN on


def some(items: Iterable[str], most: int = 10) -> str:
    """The first items of a list, for a message."""
    items = list(items)
    tail = f" ... and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + tail


def _open(file: Path) -> Any:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{os.fsencode(file)!r}: safetensors takes paths in UTF-8 only; rename the directory"
        ) from None
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except SafetensorError as error:
        if is_lfs_pointer(file):
            raise ValueError(f"{file}: {lfs_remedy(file)}") from None
        raise ValueError(f"{file}: is truncated or no safetensors file ({error}); fetch it again") from error


def header(file: Path) -> list[TensorInfo]:
    with _open(file) as handle:
        infos = []
        for name in handle.keys():
            part = handle.get_slice(name)
            infos.append(TensorInfo(file, name, tuple(part.get_shape()), part.get_dtype()))
        return infos


def _weight_map(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        good = all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: must be a JSON object with a weight_map ({error!r})") from error
    if not good:
        raise ValueError(f"{file}: weight_map must name files of the same directory")
    return weight_map


def _whereabouts(name: str, headers: dict[str, dict[str, TensorInfo]]) -> str:
    return next((f"is in {file}" for file, header in headers.items() if name in header), "is in none of the shards")


def _belongs_to_checkpoint(name: str) -> bool:
    return name in (INDEX, "config.json") or re.fullmatch(r"model.*\.safetensors", name) is not None
