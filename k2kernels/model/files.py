"""Files and folders that appear whole under their name, and what a killed process leaves of them.

Everything is written under a temporary name, `.k2kernels-PURPOSE-HOST-NUMBER`, which its process holds locked (flock).
A temporary name without a lock is what a killed process has left: the next one removes it, or finishes its work.

    writing     a file, or
    saving      a folder, that is being written
    replacing   a folder whose files are taking the places of others in the folder around it
    converting  a folder that `convert` fills; NUMBER is made of the target's name. It stays until a conversion to this
                target goes on with it, or something else is saved there
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

PREFIX = ".k2kernels-"
HOST = re.sub(r"[^A-Za-z0-9]+", "", platform.node())[:24] or "host"
OTHER_HOST = 3600  # seconds without a change after which a lock that this host does not see is taken to be gone
PLAN, OLD = ".k2kernels-plan.json", ".k2kernels-replaced"  # in a folder "replacing"
KEY = "config.json"  # leaves its place first and takes it last: a folder without it is not loaded


def lock(path: Path, wait: float = 0.0) -> int | None:
    """A descriptor that holds a file or folder locked until it is closed; None while another one does.

    Raises:
        OSError: there is no such path, or its file system has no locks.
    """
    end = time.monotonic() + wait
    while True:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # else it was replaced before it was locked
                return descriptor
        except BlockingIOError:
            if time.monotonic() >= end:
                os.close(descriptor)
                return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.02)


@contextlib.contextmanager
def _abandoned(path: Path, wait: float = 0.0) -> Iterator[bool]:
    """Whether a killed process left `path`; it is locked meanwhile."""
    descriptor = _lock_abandoned(path, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock_abandoned(path: Path, wait: float = 0.0) -> int | None:
    """A descriptor that holds `path` locked if a killed process left it, else None."""
    try:
        if path.name.split("-")[2:3] == [HOST] or time.time() - path.stat().st_mtime > OTHER_HOST:
            return lock(path, wait)
    except OSError:
        pass  # it is gone, or cannot be locked
    return None


def _new(parent: Path, purpose: str, make: Callable[[Path], Any]) -> tuple[Path, int | None]:
    while True:
        path = parent / f"{PREFIX}{purpose}-{HOST}-{secrets.token_hex(4)}"
        make(path)
        try:
            descriptor = lock(path)
        except FileNotFoundError:
            continue  # removed before it was locked
        except OSError:
            return path, None
        if descriptor is not None:
            return path, descriptor


def new_folder(parent: Path) -> tuple[Path, int | None]:
    """A new folder to save into, and the descriptor that locks it; None where the file system has no locks."""
    return _new(parent, "saving", Path.mkdir)


def conversion_folder(parent: Path, target: str) -> tuple[Path, int | None]:
    """The folder of a conversion to `target`, the name of a checkpoint: a new one, or what a killed one has left.

    Returns:
        The folder, and the descriptor that locks it; None where the file system has no locks.

    Raises:
        BlockingIOError: another process converts to this target, or may do so.
    """
    for path in sorted(parent.glob(conversions(target))):
        descriptor = _lock_abandoned(path)
        if descriptor is None:
            raise BlockingIOError(
                f"another process converts to it, in {path}; wait for it, or remove that folder if there is none"
            )
        return path, descriptor
    path = parent / conversions(target).replace("*", HOST)
    path.mkdir()
    try:
        descriptor = lock(path)
    except OSError:
        return path, None
    if descriptor is None:
        raise BlockingIOError(f"another process converts to it, in {path}; wait for it")
    return path, descriptor


def conversions(target: str) -> str:
    """The pattern of the folders of conversions to a name."""
    return f"{PREFIX}converting-*-{hashlib.sha256(os.fsencode(target)).hexdigest()[:16]}"


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes were writing in `folder`, with a warning that names it; conversions stay."""
    for path in folder.glob(f"{PREFIX}writing-*"):
        _remove_abandoned(path)
    for path in folder.glob(f"{PREFIX}saving-*"):
        _remove_abandoned(path, "save")


def remove_conversions(folder: Path, target: str) -> None:
    """Removes what killed conversions to `target` have left in `folder`, with a warning that names it."""
    for path in folder.glob(conversions(target)):
        _remove_abandoned(path, "conversion")


def _remove_abandoned(path: Path, what: str = "") -> None:
    with _abandoned(path) as abandoned:
        if not abandoned:
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if what:
            warnings.warn(f"{path}: removed; a {what} that was killed had left it", stacklevel=4)


def replace_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file under a temporary name, makes sure that it is on the disk, and renames it.

    Raises:
        OSError: the file of that name, if any, is unchanged.
    """
    temporary, descriptor = None, None
    try:
        remove_leftovers(path.parent)
        temporary, descriptor = _new(path.parent, "writing", lambda new: new.open("xb").close())
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{path}: cannot be written ({reason(error)}); what was there before is unchanged") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


def sync(path: Path) -> None:
    """Makes sure that a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """The cause that a user can act on: an error of the file system where there is one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return str(cause) if cause is not None else f"{type(error).__name__}: {error}"


# ---- the files of one folder in place of others


def begin_exchange(folder: Path, old: list[str]) -> Path:
    """Makes a folder of `new_folder` one whose files replace the files `old` of the folder around it.

    From here on the exchange is finished by `finish_exchange` should this process be killed.

    Returns:
        The folder under its new name.
    """
    new = sorted(file.name for file in folder.iterdir())
    (folder / OLD).mkdir()
    (folder / PLAN).write_text(json.dumps({"new": new, "old": old}))
    sync(folder / PLAN)
    sync(folder)
    name = f"{PREFIX}replacing-{folder.name.removeprefix(PREFIX).partition('-')[2]}"
    os.rename(folder, folder.with_name(name))
    return folder.with_name(name)


def exchange(folder: Path) -> None:
    """Moves the files, or the rest of them. On any error all are where they were at the start of this call."""
    target, plan = folder.parent, json.loads((folder / PLAN).read_text())
    new = sorted(plan["new"], key=lambda name: name == KEY)
    moves = []
    if all((folder / name).exists() for name in new):  # no new one has moved yet, so what is there are old ones
        old = sorted(plan["old"], key=lambda name: name != KEY)
        moves += [(target / name, folder / OLD / name) for name in old if (target / name).exists()]
    moves += [(folder / name, target / name) for name in new if (folder / name).exists()]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            os.rename(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            os.rename(destination, source)
        raise


def finish_exchange(target: Path, wait: float = 30.0) -> None:
    """Finishes what a process that was killed between two renames has begun in the folder `target`, with a warning.

    Where the old files are all in their places, they stay; the new ones are removed.

    Raises:
        OSError: the folder cannot be written to; nothing is changed.
    """
    for folder in sorted(target.glob(f"{PREFIX}replacing-*")):
        with _abandoned(folder, wait) as abandoned:
            if not abandoned:
                continue
            if (folder / KEY).exists() and (target / KEY).exists():
                what = "removed; a save was killed before it replaced the checkpoint, which is as it was"
            else:
                exchange(folder)
                what = "a save was killed while it replaced the checkpoint; it is finished now"
            shutil.rmtree(folder, ignore_errors=True)
            warnings.warn(f"{folder}: {what}", stacklevel=3)
