"""Puts the example's files where CONTRIBUTING.md says, and its kernel into a module in the place of `_emu`."""

import hashlib
import re
import sys
from pathlib import Path

import pytest

import k2kernels.ops
import k2kernels.reference
from k2kernels.ops import _launch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

sys.path.insert(0, str(ROOT / "python_tests" / "emulator"))
k2kernels.ops.__path__.append(str(HERE / "ops"))
k2kernels.reference.__path__.append(str(HERE / "reference"))


@pytest.fixture(scope="session")
def _built():
    pytest.importorskip("pybind11", reason="pybind11, which builds the package, is not installed")
    from emulated_kernels import BUILD, FLAGS, KERNEL_FLAGS, binding_flags, compile_object, load_module

    # The two files of csrc/bind that name the ops, with the example as the only one.
    folder = BUILD / "example"
    (folder / "bind").mkdir(parents=True, exist_ok=True)
    for name in ("bind.h", "kernels.cpp"):
        text = (ROOT / "csrc/bind" / name).read_text().replace("bind_quant(", "bind_scale_rows(")
        text = re.sub(r".*\bbind_(?!runtime|kernels|scale_rows)\w+\(.*\n", "", text)
        (folder / "bind" / name).write_text(text)
    sources = [folder / "bind/kernels.cpp"]
    sources += [ROOT / "csrc/bind" / f"{name}.cpp" for name in ("emulator", "module", "tensor")]
    sources += [
        ROOT / "csrc/common/selfcheck.cpp",
        HERE / "csrc/bind/scale_rows.cpp",
        HERE / "csrc/scale_rows/launch.cu",
    ]
    digests = [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]
    together = "".join(f'#include "{source}" // {digest}\n' for source, digest in zip(sources, digests))
    (folder / "scale_rows.cpp").write_text(together)

    flags = [f"-I{folder}", f"-I{HERE / 'csrc'}", *FLAGS, *KERNEL_FLAGS, *binding_flags("example")]
    return load_module("example", [compile_object(folder / "scale_rows.cpp", flags, headers=HERE)])


@pytest.fixture(autouse=True)
def _example_module(_built, monkeypatch):
    from k2kernels.ops.scale_rows import scale_rows

    monkeypatch.setattr(k2kernels, "scale_rows", scale_rows, raising=False)
    monkeypatch.setattr(_launch, "_module", lambda name: _built)
