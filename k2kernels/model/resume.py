"""A checkpoint whose shards are known before the first is written, and that goes on where a killed process stopped."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from k2kernels.model import files
from k2kernels.model.shards import TensorInfo, Writer, header, shard_names

ORIGIN = ".k2kernels-conversion.json"  # in the folder, as long as it is not whole


class ResumableWriter(Writer):
    """A `Writer` that keeps whole shards when its process is killed or interrupted, or a disk is full.

    They stay in the hidden folder in which they are written, which is locked meanwhile, with `origin`. The next writer
    to the same path takes it over: if its origin is the same, shards that are whole and hold what is planned stay, up
    to the first that is not; else all is removed, with a warning. A shard gets its name when it is on the disk.

    Args:
        planned: every tensor that will be added, in order.
        origin: what the bytes of all tensors depend on, as JSON: compared, not read.
    """

    def __init__(self, path: str | Path, max_shard_size: int, planned: Iterable[TensorInfo], origin: Mapping[str, Any]):
        super().__init__(path, max_shard_size)
        self.planned = _in_shards(planned, max_shard_size)
        self.origin = dict(origin)
        self.kept = 0  # shards that were there
        self._there: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether a tensor is in a shard that was there."""
        return name in self._there

    def add(self, name: str, tensor: Tensor) -> None:
        if name not in self:
            super().add(name, tensor)

    def _folder(self, home: Path) -> tuple[Path, int | None]:
        files.remove_leftovers(home)
        target = self.path.absolute()
        if not self._fresh:  # begun when the target was not there
            files.remove_conversions(target.parent, target.name)
        folder, descriptor = files.conversion_folder(home, target.name)
        try:
            self._take_over(folder)
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        return folder, descriptor

    def _take_over(self, folder: Path) -> None:
        """Keeps the first shards that are whole, and nothing else."""
        differs = self._differences(folder)
        if differs:
            warnings.warn(f"{folder}: removed; a conversion {differs} had left it; begun afresh", stacklevel=6)
        else:
            for number, tensors in enumerate(self.planned):
                if not _is_whole(folder, number, len(self.planned), tensors):
                    break
                self._shards.append([info.name for info in tensors])
                self._there.update(info.name for info in tensors)
                self._total_bytes += sum(info.nbytes for info in tensors)
        self.kept = len(self._shards)
        kept = {f"shard-{number}" for number in range(self.kept)}
        for file in folder.iterdir():
            if file.is_dir():
                shutil.rmtree(file)
            elif file.name not in kept:
                file.unlink()
        self._write_origin(folder)

    def _differences(self, folder: Path) -> str:
        """What is known to be different of the conversion that has left a folder."""
        if not any(folder.iterdir()):
            return ""
        try:
            found = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
            differ = [key for key in self.origin if found[key] != self.origin[key]]
        except (OSError, ValueError, KeyError, TypeError):
            shards = {file.name for file in folder.iterdir()} - {"origin", "part", ORIGIN}
            return "of which nothing is known" if shards else ""
        return f"with another {' and another '.join(differ)}" if differ else ""

    def _write_origin(self, folder: Path) -> None:
        (folder / "origin").write_text(json.dumps(self.origin), encoding="utf-8")
        files.sync(folder / "origin")
        os.rename(folder / "origin", folder / ORIGIN)

    def _write(self, file: Path) -> None:
        part = file.with_name("part")
        super()._write(part)
        files.sync(part)
        os.rename(part, file)

    def _publish(self) -> None:
        (self.directory / ORIGIN).unlink()
        try:
            super()._publish()
        except OSError:
            if self._fresh:
                self._write_origin(self.directory)
            raise

    def _kept_after(self, error: BaseException) -> bool:
        """After an interrupt and errors of the file system, not when the source turns out to be damaged."""
        outside = isinstance(error, OSError) or not isinstance(error, Exception)
        if not (outside and self._shards and (self.directory / ORIGIN).exists()):
            return False
        warnings.warn(
            f"{self.directory}: holds {len(self._shards)} of {len(self.planned)} shards; the same conversion to "
            f"{self.path} will go on with them, else remove it",
            stacklevel=4,
        )
        return True


def _in_shards(tensors: Iterable[TensorInfo], max_shard_size: int) -> list[list[TensorInfo]]:
    """As `Writer.add` divides them."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if shards[-1] and size + info.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def _is_whole(folder: Path, number: int, count: int, planned: list[TensorInfo]) -> bool:
    """Whether a shard holds what is planned. One that has its last name already, gets back that of a part."""
    file, last = folder / f"shard-{number}", folder / shard_names(count)[number]
    if last.exists():
        os.rename(last, file)
    if not file.exists():
        return False
    try:
        found = {info.name: (info.dtype, info.shape) for info in header(file)}
    except ValueError:
        return False
    return found == {info.name: (info.dtype, info.shape) for info in planned}
