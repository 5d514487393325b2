"""Builds the extension modules k2kernels._C and k2kernels._emu with CMake; everything else is in pyproject.toml.

Environment variables: K2K_CUDA (AUTO: the GPU's kernels if nvcc is found; ON: or fail; OFF), K2K_CUDA_ARCHS
(80;90a-real;120-real), K2K_LINEINFO (OFF), K2K_BUILD_DIR (CMake's build folder; kept for incremental builds),
K2K_BUILD_TYPE (Release), MAX_JOBS (parallel compile jobs; all cores).
"""

import contextlib
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FACTS = "_C.json"  # registers and shared memory of each kernel; made where kernels are compiled
OPTIONS = {
    "CMAKE_BUILD_TYPE": ("K2K_BUILD_TYPE", "Release"),
    "K2K_CUDA": ("K2K_CUDA", "AUTO"),
    "K2K_CUDA_ARCHS": ("K2K_CUDA_ARCHS", "80;90a-real;120-real"),
    "K2K_LINEINFO": ("K2K_LINEINFO", "OFF"),
}


class CMakeBuild(build_ext):
    def build_extensions(self):
        import pybind11  # a build requirement: not installed for other commands

        self._warn_of_torch()
        # The installed packages before PATH: `make env` and pip then run the same CMake. Another release writes other
        # command lines, and everything would be compiled again.
        os.environ["PATH"] = os.pathsep.join([*self._installed_tools(), os.environ.get("PATH", "")])

        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = Path(os.environ.get("K2K_BUILD_DIR", ROOT / "build" / tag))
        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DK2K_VERSION={self.distribution.get_version()}",
        ]
        # Always passed: otherwise CMake would reuse the values of the last build.
        configure += [f"-D{option}={os.environ.get(name, value)}" for option, (name, value) in OPTIONS.items()]
        if ninja := shutil.which("ninja"):  # by name: CMake's cache may name the ninja of another build environment
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if ccache := shutil.which("ccache"):
            configure += [f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}", f"-DCMAKE_CUDA_COMPILER_LAUNCHER={ccache}"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self._run("cmake", "-S", str(ROOT), "-B", str(build), *configure)
        self._run("cmake", "--build", str(build), "--parallel", jobs)
        for extension in self.extensions:
            out = Path(self.get_ext_fullpath(extension.name)).resolve()
            self._install(build / out.name, out)
        self._install(build / FACTS, out.parent / FACTS)

    def copy_extensions_to_source(self):  # of an editable install
        super().copy_extensions_to_source()
        package = Path(self.get_finalized_command("build_py").get_package_dir("k2kernels"))
        self._install(Path(self.build_lib) / "k2kernels" / FACTS, package / FACTS)

    @staticmethod
    def _installed_tools():
        """Folders of the executables in the packages cmake and ninja, where these are installed."""
        for package, attribute in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
            with contextlib.suppress(ImportError, AttributeError):
                yield getattr(importlib.import_module(package), attribute)

    @staticmethod
    def _warn_of_torch():
        """No error: pip replaces an older torch after this build, and an isolated build sees none."""
        try:
            found = importlib.metadata.version("torch")
        except importlib.metadata.PackageNotFoundError:
            return
        if tuple(int(n) for n in found.split(".")[:2]) < (2, 10):
            print(
                f"k2kernels: torch {found} is installed; kernels need torch >= 2.10, whose tensors they read through "
                "torch.Tensor.__dlpack_c_exchange_api__: `pip install 'torch>=2.10'`",
                file=sys.stderr,
            )

    @staticmethod
    def _install(made, out):
        if not made.exists():
            out.unlink(missing_ok=True)
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_suffix(".tmp")
        shutil.copy(made, temporary)  # always: setuptools copies a file only if it is newer than the old one
        os.replace(temporary, out)  # a process that has the old module loaded keeps it

    @staticmethod
    def _run(*command):
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            why = f"exit status {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else error
            raise SystemExit(
                f"k2kernels: `{' '.join(command[:2])} ...` failed ({why}). The build needs CMake >= 3.24 and a "
                "C++17 compiler: on Debian or Ubuntu `apt-get install g++`, on Fedora `dnf install gcc-c++`, "
                "on macOS `xcode-select --install`; then `pip install cmake ninja pybind11`. "
                "K2K_CUDA=OFF builds without nvcc."
            ) from None


setup(ext_modules=[Extension("k2kernels._C", []), Extension("k2kernels._emu", [])], cmdclass={"build_ext": CMakeBuild})
