"""Where a checkpoint is: what people name instead of its directory, each answered with what to do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name, of huggingface.co
_LFS = b"version https://git-lfs.github.com/spec/"


def checkpoint_folder(path: str | Path) -> Path:
    """The directory `path`, with ~ expanded.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it is a file.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"{folder}: must be a directory with a checkpoint, got a file; {_instead_of_file(folder)}")
    raise FileNotFoundError(f"{path}: must be a directory with a checkpoint, {_instead_of_nothing(str(path))}")


def refuse_file(file: Path) -> None:
    """Raises ValueError where `file`, named in place of a config.json, is no JSON: weights, or an LFS pointer."""
    with file.open("rb") as opened:
        start = opened.read(len(_LFS))
    if start == _LFS:
        raise ValueError(f"{file}: {lfs_remedy(file)}")
    if start[:4] == b"GGUF" or file.suffix in (".gguf", ".safetensors", ".bin", ".pt", ".pth"):
        raise ValueError(f"{file}: must be a directory with a checkpoint, got a file; {_instead_of_file(file)}")


def is_lfs_pointer(file: Path) -> bool:
    """Whether Git has left its note of a large file in its place."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(_LFS)) == _LFS
    except OSError:
        return False


def check_pointers(folder: Path, names: Iterable[str]) -> None:
    """Raises ValueError where one of these files is a note of Git's in place of a large file."""
    for name in names:
        if is_lfs_pointer(folder / name):
            raise ValueError(f"{folder / name}: {lfs_remedy(folder / name)}")


def lfs_remedy(file: Path) -> str:
    folder = shlex.quote(str(file.parent))
    return f"is a Git LFS pointer, the file itself was not fetched; run: git -C {folder} lfs pull"


def no_config(folder: Path) -> str:
    """What is there in place of config.json."""
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    if any(name.endswith(".gguf") for name in names):
        return "; GGUF is not read, get the safetensors files of the model: hf download OWNER/NAME --local-dir DIR"
    return ""


def no_safetensors(folder: Path) -> str:
    """What is there in place of safetensors files."""
    if any(folder.glob("*.gguf")):
        return "GGUF is not read, get the safetensors files: hf download OWNER/NAME --local-dir DIR"
    if any(folder.glob("pytorch_model*.bin")):
        where = str(folder)
        command = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({where!r}, dtype='auto').save_pretrained({where + '-safetensors'!r})"
        )
        return f"pickled weights are not read, convert them: python -c {shlex.quote(command)}"
    return "only safetensors checkpoints are read"


def _instead_of_file(file: Path) -> str:
    if file.suffix == ".gguf":
        return "GGUF is not read, get the safetensors files: hf download OWNER/NAME --local-dir DIR"
    return f"give its directory: {shlex.quote(str(file.parent))}"


def _instead_of_nothing(name: str) -> str:
    if _HUB.fullmatch(name):
        folder = name.partition("/")[2]
        return (
            f"got no such one; if it is a model of huggingface.co, download it: hf download {name} "
            f"--local-dir {folder}, and give {folder}"
        )
    return "got no such one"
