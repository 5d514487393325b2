"""What is there and what would serve: the facts behind `k2kernels doctor`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from k2kernels.ops._launch import serves
from k2kernels.ops._register import OPS, Op

_PACKAGES = ("numpy", "safetensors", "tqdm", "tokenizers", "matplotlib", "transformers", "cupy", "triton", "pytest")


def info() -> dict[str, Any]:
    """Versions, devices, what was compiled for which architecture, and which body would serve each op, and why.

    Returns:
        dict with `version`, `python`, `platform`, `torch` (version, cuda, threads), `packages` (name -> version or
        None), `extension` (build facts, or `error`), `emulator` (`self_check`, or `error`), `nvcc` (path or None),
        `devices` (name, capability, compute_capability, memory in bytes), `ops` (name -> `cpu`, `cuda` bodies and
        `why`), `kernels` (what each compiled kernel takes: `kernel`, `arch`, `registers`, `stack_bytes`,
        `spill_bytes`, `shared_bytes` fixed by the compiler, `dynamic_shared_bytes` asked for by a launch, None where
        that is not known), `conformance` (GPUs whose instructions the emulator is compared with; None away from the
        source tree).
    """
    from k2kernels import __version__

    extension, devices = _extension(), _devices()

    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()},
        "packages": {name: _version(name) for name in _PACKAGES},
        "extension": extension,
        "emulator": _emulator(),
        "nvcc": shutil.which("nvcc"),
        "devices": devices,
        "ops": {name: _serves(op, extension, devices) for name, op in sorted(OPS.items())},
        "kernels": _kernels(),
        "conformance": _conformance(),
    }


def _serves(op: Op, extension: dict[str, Any], devices: list[dict[str, Any]]) -> dict[str, str]:
    archs = extension.get("cuda_archs", ())
    if not op.has_kernel:
        why = "no kernel yet; plain PyTorch runs on any device"
    elif not archs:
        missing = "the extension is missing" if "error" in extension else "built without nvcc"
        why = f"a kernel, in the emulator; not compiled for GPUs: {missing}"
    elif devices and not any(serves(arch, *device["compute_capability"]) for arch in archs for device in devices):
        why = f"a kernel, but only for {', '.join(archs)}"
    else:
        return {"cpu": "reference", "cuda": "cuda", "why": f"a kernel, for {', '.join(archs)} and the emulator"}
    return {"cpu": "reference", "cuda": "reference", "why": why}


def _kernels() -> list[dict[str, Any]]:
    facts = Path(__file__).with_name("_C.json")  # of the build, beside the module
    if not facts.exists():
        return []
    kernels = [kernel for kernel in json.loads(facts.read_text()) if "conformance::" not in kernel["kernel"]]
    asked = _shared_memory()
    return [{**kernel, "dynamic_shared_bytes": asked.get(kernel["kernel"].replace("k2k::", ""))} for kernel in kernels]


def _shared_memory() -> dict[str, int]:
    try:
        from k2kernels import _C
    except ImportError:
        return {}
    return _C.shared_memory()


def _conformance() -> list[str] | None:
    tests = Path(__file__).parents[1] / "python_tests" / "emulator"
    return sorted(path.stem for path in (tests / "recorded").glob("*.npz")) if tests.exists() else None


def _emulator() -> dict[str, Any]:
    try:
        from k2kernels import _emu
    except ImportError as error:
        return {"error": f"{error}; build it with: pip install -e ."}
    return {"self_check": _self_check(_emu)}


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cuda12x", f"{package}-cuda13x"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def _extension() -> dict[str, Any]:
    try:
        from k2kernels import _C
    except ImportError as error:
        return {"error": f"{error}; build it with: pip install -e ."}
    return {**_C.build_info(), "self_check": _self_check(_C)}


def _self_check(extension: Any) -> str:
    """All 256 e4m3 codes, decoded by the extension and by torch."""
    codes = torch.arange(256, dtype=torch.uint8)
    got = torch.empty(256, dtype=torch.float32)
    extension.decode_e4m3(codes.data_ptr(), got.data_ptr(), 256)
    want = codes.view(torch.float8_e4m3fn).float()
    same = torch.equal(got.nan_to_num(1e9), want.nan_to_num(1e9))
    return "passed" if same else "FAILED: e4m3 codes are decoded differently from torch"


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "compute_capability": (properties.major, properties.minor),
                "memory": properties.total_memory,
            }
        )
    return found
