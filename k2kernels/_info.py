"""What is there and what would serve: the facts behind `k2kernels doctor`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from k2kernels.ops import fp8_gemm
from k2kernels.ops._launch import Chip, chip, code_for
from k2kernels.ops._register import OPS, Op

_PACKAGES = ("numpy", "safetensors", "tqdm", "tokenizers", "matplotlib", "transformers", "cupy", "triton", "pytest")

# The chips that plans are shown for where no GPU is at hand: of an architecture that CMake compiles for, the largest.
_CHIPS = {
    "80": ("A100", Chip(80, 108, 163 * 1024)),
    "90a": ("H100 SXM", Chip(90, 132, 227 * 1024)),
    "120": ("RTX 5090", Chip(120, 170, 99 * 1024)),
}
# Linear layers of Kimi-K2: groups, N, K. Rows are those of a group.
_LINEARS = {
    "q_a + kv_a": (1, 2112, 7168),
    "q_b": (1, 12288, 1536),
    "kv_b": (1, 16384, 512),
    "o_proj": (1, 7168, 8192),
    "gate_up": (1, 4096, 7168),
    "down": (1, 7168, 2048),
    "48 experts, gate_up": (48, 4096, 7168),
    "48 experts, down": (48, 7168, 2048),
}
_ROWS = (1, 64, 512, 4096)


def info() -> dict[str, Any]:
    """Versions, devices, what was compiled for which architecture, and which body would serve each op, and why.

    Returns:
        dict with `version`, `python`, `platform`, `torch` (version, cuda, threads), `packages` (name -> version or
        None), `extension` (build facts, or `error`), `emulator` (`self_check`, or `error`), `nvcc` (path or None),
        `devices` (name, capability, compute_capability, memory in bytes, `code`: which of the compiled it runs), `ops`
        (name -> `cpu`, `cuda` bodies and `why`), `kernels` (what each compiled kernel takes: `kernel`, `arch`,
        `registers`, `stack_bytes`, `spill_bytes`, `shared_bytes` fixed by the compiler, `dynamic_shared_bytes` of a
        launch, None where that is not known), `fp8_gemm` (`pinned`: the plan of K2KERNELS_FP8_GEMM, or None, or
        `error`; `plans` of Kimi-K2's linear layers, for each GPU here, or for one of each architecture compiled for),
        `conformance` (GPUs whose instructions the emulator is compared with; None away from the source tree).
    """
    from k2kernels import __version__

    extension = _extension()
    devices = _devices(extension.get("cuda_archs", ()))
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
        "fp8_gemm": _fp8_gemm(extension, devices),
        "conformance": _conformance(),
    }


def _serves(op: Op, extension: dict[str, Any], devices: list[dict[str, Any]]) -> dict[str, str]:
    archs = extension.get("cuda_archs", ())
    if not op.has_kernel:
        why = "no kernel yet; plain PyTorch runs on any device"
    elif not archs:
        missing = "the extension is missing" if "error" in extension else "built without nvcc"
        why = f"a kernel, in the emulator; not compiled for GPUs: {missing}"
    elif devices and not any(device["code"] for device in devices):
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


def _fp8_gemm(extension: dict[str, Any], devices: list[dict[str, Any]]) -> dict[str, Any]:
    try:
        fp8_gemm.fp8_gemm_kernels()
    except ImportError:
        return {"pinned": None, "plans": []}
    if devices:
        chips = [(device["name"], chip(torch.device("cuda", i))) for i, device in enumerate(devices)]
    else:
        archs = {arch.partition("-")[0] for arch in extension.get("cuda_archs", ())}
        chips = [_CHIPS[arch] for arch in _CHIPS if arch in archs or not archs]
    plans = []
    for name, facts in chips:
        for linear, (groups, n, k) in _LINEARS.items():
            best = {m: fp8_gemm.plans_on(facts, groups, m, n, k)[:1] for m in _ROWS}
            of_rows = {m: plan[0][0]._asdict() for m, plan in best.items() if plan}
            plans.append({"device": name, "linear": linear, "groups": groups, "n": n, "k": k, "of_rows": of_rows})
    try:
        pinned = fp8_gemm.pinned_plan()
    except ValueError as error:
        return {"pinned": None, "error": str(error), "plans": plans}
    return {"pinned": None if pinned is None else pinned._asdict(), "plans": plans}


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


def _devices(archs: Iterable[str]) -> list[dict[str, Any]]:
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
                "code": code_for(archs, properties.major, properties.minor),
            }
        )
    return found
