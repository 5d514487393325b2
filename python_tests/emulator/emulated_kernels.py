"""Compiles the test kernels and the emulator with the host compiler into one library, called through ctypes."""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
KERNELS = Path(__file__).parent / "kernels"
CXX = os.environ.get("CXX", "g++")
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-DK2K_EMULATED",
    f"-I{ROOT / 'csrc'}",
    f"-I{KERNELS}",
]
# What a GPU would trip over or leave undefined becomes a fault, which the emulator reports.
CHECKS = ["-fsanitize=alignment,bounds,shift-exponent", "-fsanitize-undefined-trap-on-error"]
KERNEL_FLAGS = ["-O1", "-g", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-ffp-contract=off", *CHECKS]

# K2K_SANITIZE=address or thread: run with LD_PRELOAD=$(g++ -print-file-name=libasan.so) or libtsan.so. The emulator is
# not instrumented: it tells the sanitizer what its instructions touch.
SANITIZE = os.environ.get("K2K_SANITIZE", "")
EMULATOR_FLAGS = ["-O2", *{"": [], "address": ["-DK2K_ASAN"], "thread": ["-DK2K_TSAN"]}[SANITIZE]]
LINK_FLAGS = [f"-fsanitize={SANITIZE}"] if SANITIZE else []
KERNEL_FLAGS += LINK_FLAGS
BUILD = ROOT / "build" / "emulator_tests" / (SANITIZE or "plain")

SCHEDULES = {"round_robin": 0, "depth_first": 1, "pct2": 2, "pct3": 3}  # seeds


def compile_object(source, flags, headers=KERNELS):
    """Compiles if the source, any header (of csrc or the folder `headers`) or the flags have changed."""
    BUILD.mkdir(parents=True, exist_ok=True)
    headers = sorted(p for d in (ROOT / "csrc", headers) for p in d.rglob("*") if p.suffix in {".h", ".cuh"})
    content = b"".join(p.read_bytes() for p in [source, *headers])
    key = hashlib.sha256(content + " ".join([CXX, *flags]).encode()).hexdigest()[:16]
    name = f"{source.parent.name}-{source.stem}"
    out = BUILD / f"{name}-{key}.o"
    if not out.exists():
        for old in BUILD.glob(f"{name}-*.o"):
            old.unlink(missing_ok=True)
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        temporary = out.with_suffix(f".{os.getpid()}")
        subprocess.run([CXX, *flags, *language, "-c", str(source), "-o", str(temporary)], check=True)
        os.replace(temporary, out)
    return out


def link(name, objects, fiber=ROOT / "csrc/emulator/fiber.cpp"):
    """The emulator and `objects` as one library."""
    sources = {*(ROOT / "csrc/emulator").glob("*.[cS]*"), ROOT / "csrc/arch/tensor_map.cpp", fiber}
    sources -= {ROOT / "csrc/emulator/fiber.cpp"} - {fiber}
    objects = [compile_object(source, [*FLAGS, *EMULATOR_FLAGS]) for source in sorted(sources)] + objects
    key = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:16]
    out = BUILD / f"{name}-{key}.so"
    if not out.exists():
        for old in BUILD.glob(f"{name}-*.so"):
            old.unlink(missing_ok=True)
        temporary = out.with_suffix(f".{os.getpid()}")  # another test run may build it too
        subprocess.run([CXX, "-shared", *LINK_FLAGS, *map(str, objects), "-o", str(temporary)], check=True)
        os.replace(temporary, out)
    return out


@cache
def library(ucontext=False):
    sources = [*sorted(KERNELS.glob("*.cu")), KERNELS / "support.cpp"]
    kernels = [compile_object(source, [*FLAGS, *KERNEL_FLAGS, "-DBUG=planted_bug"]) for source in sources]
    portable = KERNELS.parent / "fiber_ucontext.cpp"
    out = link("kernels_ucontext", kernels, fiber=portable) if ucontext else link("kernels", kernels)
    lib = ctypes.CDLL(str(out))
    lib.last_error.restype = ctypes.c_char_p
    lib.allocate.restype = ctypes.c_void_p
    lib.allocate.argtypes = [ctypes.c_size_t]
    lib.release.argtypes = [ctypes.c_void_p]
    lib.count_switches.restype = lib.count_bytes_loaded.restype = ctypes.c_uint64
    lib.configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return lib


def load_module(name, objects):
    """Loads a library as a Python module."""
    spec = importlib.util.spec_from_file_location(name, link(name, objects))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def binding_flags(name):
    import pybind11

    flags = ["-fvisibility=hidden", *(f"-I{i}" for i in (pybind11.get_include(), sysconfig.get_path("include")))]
    return [f"-DK2K_MODULE={name}", *(f'-DK2K_{fact}=""' for fact in ("VERSION", "BUILD_TYPE", "CUDA_ARCHS")), *flags]


def emulated_module():
    """The package's kernels as they are in k2kernels._emu, but with the checks and the sanitizer of this build."""
    csrc = ROOT / "csrc"
    objects = [compile_object(source, [*FLAGS, *KERNEL_FLAGS]) for source in sorted(csrc.glob("*/launch*.cu"))]
    bindings = {csrc / "common/selfcheck.cpp", *(csrc / "bind").glob("*.cpp")}
    bindings -= {csrc / "bind/device.cpp", csrc / "bind/no_device.cpp"}
    objects += [compile_object(source, [*FLAGS, *binding_flags("_emu")]) for source in sorted(bindings)]
    return load_module("_emu", objects)


class EmulatorError(RuntimeError):
    pass


def run(kernel, *arguments, seed=0, delivery=-1, arch=90, bug=0, hopper_fp8=False, ucontext=False):
    """Runs a kernel's C function. Arrays are copied to guarded memory and back; delivery: the seed's, or an enum's."""
    lib = library(ucontext)
    lib.configure(seed, delivery, arch, hopper_fp8)
    ctypes.c_int.in_dll(lib, "planted_bug").value = bug
    addresses, values = [], []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            assert argument.flags.c_contiguous
            addresses.append((lib.allocate(argument.nbytes), argument))
            ctypes.memmove(addresses[-1][0], argument.ctypes.data, argument.nbytes)
            values.append(ctypes.c_void_p(addresses[-1][0]))
        else:
            values.append(ctypes.c_int(argument))
    try:
        if getattr(lib, kernel)(*values):
            raise EmulatorError(lib.last_error().decode())
        for address, array in addresses:
            ctypes.memmove(array.ctypes.data, address, array.nbytes)
    finally:
        ctypes.c_int.in_dll(lib, "planted_bug").value = 0
        for address, _ in addresses:
            lib.release(address)


def to_bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
