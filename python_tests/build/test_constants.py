"""Constants shared by C++ and Python are defined in C++ and read in Python."""

import ast
import re
from pathlib import Path

import pytest

from k2kernels import _C, _emu
from k2kernels.ops._constants import constants
from k2kernels.reference import mla_cache, mla_prefill, w4_gemm

ROOT = Path(__file__).parents[2]
OPS = sorted((ROOT / "k2kernels" / "ops").rglob("*.py"))
PYTHON = sorted((ROOT / "k2kernels").rglob("*.py"))
HEADERS = sorted((ROOT / "csrc").glob("*/*.h"))

# Numbers of ops that no kernel uses.
OF_PYTHON = {
    ("_launch", "EMULATED_CHIPS"): "what the emulator pretends to be",
    ("_check", "LARGEST"): "of an int that PyTorch's dispatcher takes",
    ("gradient", "SCRATCH"): "how many experts are dequantised at a time",
    ("newton_schulz", "WORKSPACE_BYTES"): "how many matrices go into one launch",
}
# What a definition states on its own, because it must work without kernels: they must state the same.
DEFINED_TWICE = {
    "LATENT": (mla_cache.LATENT, "MLA_LATENT"),
    "ROPE": (mla_cache.ROPE, "MLA_ROPE"),
    "ROW_BYTES": (mla_cache.ROW_BYTES, "MLA_ROW_BYTES"),
    "CODE_BYTES": (w4_gemm.CODE_BYTES, "W4_CODE_BYTES"),
}


def assigned(path):
    """(name, value) of each upper-case name that a file binds at its top."""
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if hasattr(node, "target") else []
        for target in targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            for name in names:
                if isinstance(name, ast.Name) and name.id.isupper():
                    yield name.id, node.value


def has_numbers(value):
    """Whether numbers stand in an expression, or it enumerates."""
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") not in ("range", "enumerate"):
        return False  # what is made of numbers for another purpose: a chip, a slice
    return any(
        (isinstance(node, ast.Constant) and type(node.value) in (int, float))
        or getattr(getattr(node, "func", None), "id", "") in ("range", "enumerate")
        for node in ast.walk(value)
    )


def test_ops_type_no_numbers():
    found = {(path.stem, name) for path in OPS for name, value in assigned(path) if has_numbers(value)}
    assert found == set(OF_PYTHON), "export it: constant(m, ...) in csrc/bind, constants... in Python"


def c_names():
    """Constants of C++, as Python would name them."""
    text = "".join(re.sub(r"//.*", "", header.read_text()) for header in HEADERS)
    for declaration in re.findall(r"(?m)^constexpr [\w:]+ (k\w+ = [^;]*)", text):
        for name in re.findall(r"\bk([A-Z]\w*) =", declaration):
            yield re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()


def test_no_name_of_a_constant_is_bound_to_a_number_on_both_sides():
    names = set(c_names())
    assert {"MOST_EXPERTS", "NORM_MOST_COLUMNS", "ROW_BYTES"} <= names
    of_python = {name.lstrip("_") for path in PYTHON for name, value in assigned(path) if has_numbers(value)}
    of_python |= {"ROW_BYTES"}  # made of others
    assert of_python & names == set(DEFINED_TWICE)
    for value, exported in DEFINED_TWICE.values():
        assert getattr(constants, exported) == value


def test_the_state_between_pieces_is_as_wide_on_both_sides():
    assert constants.PREFILL_STATE_FLOATS == constants.PREFILL_VALUE + mla_prefill.STATE_EXTRA


def test_both_modules_export_the_same():
    assert len(_emu.constants) > 20
    if _C.build_info()["cuda_archs"]:
        assert _C.constants == _emu.constants


def test_every_constant_that_python_reads_is_exported_and_every_exported_one_is_read():
    files = [*PYTHON, *(ROOT / "python_tests").rglob("*.py")]
    read = {name for path in files for name in re.findall(r"\bconstants\.([A-Z][A-Z0-9_]+)\b", path.read_text())}
    read |= {exported for _, exported in DEFINED_TWICE.values()}
    assert read == set(_emu.constants)


def test_limits_of_definitions_are_within_those_of_kernels():
    import torch

    from k2kernels import newton_schulz

    with pytest.raises(ValueError, match=f"steps must be an int in 1 .. {constants.NS_MOST_STEPS}"):
        newton_schulz(torch.zeros(2, 2), steps=constants.NS_MOST_STEPS + 1)
    with pytest.raises(AttributeError, match="csrc/bind exports no constant 'MOST_LEGS'"):
        getattr(constants, "MOST_LEGS")  # noqa: B009 (no name that others would have to export)
