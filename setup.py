"""Builds the extension module k2kernels._C with CMake; everything else is in pyproject.toml.

Environment variables: K2K_BUILD_DIR (where CMake works; kept, so that a second build touches only what changed),
K2K_BUILD_TYPE (Release), MAX_JOBS (parallel compile jobs; all cores).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11  # a build requirement: only known to be there when something is built

        out = Path(self.get_ext_fullpath(ext.name)).resolve()  # in k2kernels/ when editable
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = Path(os.environ.get("K2K_BUILD_DIR", ROOT / "build" / tag))
        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('K2K_BUILD_TYPE', 'Release')}",
            f"-DK2K_VERSION={self.distribution.get_version()}",
        ]
        if ninja := shutil.which("ninja"):  # by name: the cached one may have been another build's
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if ccache := shutil.which("ccache"):
            configure += [f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self._run("cmake", "-S", str(ROOT), "-B", str(build), *configure)
        self._run("cmake", "--build", str(build), "--target", "_C", "--parallel", jobs)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_suffix(".tmp")
        shutil.copy2(build / out.name, temporary)
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
                "on macOS `xcode-select --install`; then `pip install cmake ninja pybind11`."
            ) from None


setup(ext_modules=[Extension("k2kernels._C", [])], cmdclass={"build_ext": CMakeBuild})
