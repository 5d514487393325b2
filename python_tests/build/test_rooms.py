"""The structure of the repository: an op has six places of one name, and imports go downwards only."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "k2kernels"
SHARED_CSRC = {"arch", "common", "tile", "bind", "conformance", "emulator"}


def parts_of(folder):
    """The modules and packages in a folder, without private ones."""
    return {p.stem for p in folder.glob("[!_]*") if p.suffix == ".py" or (p / "__init__.py").is_file()}


OPS = sorted(parts_of(PACKAGE / "ops"))

# What a folder (or file) of the package may import of the package; everything may import what stands below it.
FLOORS = {
    "text": {"text"},
    "reference": {"reference"},
    "ops": {"ops", "reference", "_backend"},
    "functional": {"functional", "ops", "reference", "_backend"},
    "model": {"model", "functional", "ops", "reference"},
    "optim": {"optim", "ops"},
    "engine": {"engine", "model", "ops", "reference"},
    "parallel": {"parallel", "model", "functional", "optim", "ops", "_backend", "reference"},
    "integrations": {"integrations", "train", "parallel", "engine", "model", "optim", "functional", "ops", "reference"}
    | {"text"},
    "serve": {"serve", "engine", "model", "text"},
    "testing": {"testing", "ops", "reference", "_backend"},
    "train": {"train", "parallel", "model", "optim", "ops", "text"},
}
EVERYWHERE = {"k2kernels._backend", "k2kernels._backend.UnsupportedError"}
# K2Model.generate is the engine's function, and from_pretrained(mesh=) asks `parallel` for the ranks. Both import the
# modules below K2Model, never K2Model itself.
UPWARDS = {
    "k2kernels/model/model.py": {"k2kernels.engine.generate", "k2kernels.engine.generate.generate"},
    "k2kernels/model/checkpoint.py": {"k2kernels.parallel.layout", "k2kernels.parallel.layout.Layout"},
}


def test_there_are_ops():
    assert {"mla_decode", "fp8_gemm", "quant", "grouped_gemm", "moe", "exchange", "newton_schulz"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_op_has_six_rooms(op):
    rooms = [
        ROOT / "csrc" / op / "README.md",
        ROOT / "python_tests" / "ops" / f"test_{op}.py",
        ROOT / "bench" / f"bench_{op}.py",
    ]
    assert [str(room) for room in rooms if not room.is_file()] == []
    assert f"`csrc/{op}`" in (ROOT / "README.md").read_text(), f"README.md has no row for {op}"


def test_rooms_belong_to_an_op():
    csrc = {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()} - SHARED_CSRC
    assert csrc == parts_of(PACKAGE / "reference") == set(OPS)


@pytest.mark.parametrize("folder", ["ops", "functional"])
def test_tests_belong_to_what_they_test(folder):
    """test_<part>.py, and test_<part>_kernel.py and the like: what is too much for one file."""
    parts = parts_of(PACKAGE / folder)
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "python_tests" / folder).glob("test_*.py")}
    assert tests >= parts
    assert all(test in parts or any(test.startswith(f"{part}_") for part in parts) for test in tests)


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_run_downwards(floor):
    wrong = []
    for path in (PACKAGE / floor).rglob("*.py"):
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "k2kernels" and len(parts) > 1 and name not in EVERYWHERE:
                known = (PACKAGE / parts[1]).exists() or (PACKAGE / f"{parts[1]}.py").exists()
                allowed = UPWARDS.get(str(path.relative_to(ROOT)), ())
                if known and parts[1] not in FLOORS[floor] and name not in allowed:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if parts[:2] == ["k2kernels", "_C"] and floor != "ops":
                wrong.append(f"{path.relative_to(ROOT)} touches the extension")
            if name.startswith("torch.distributed") and floor in ("model", "optim"):
                wrong.append(f"{path.relative_to(ROOT)} uses process groups")
    assert wrong == []


def test_private_names_of_ops_are_used_by_ops_alone():
    """But for `testing`, which replaces parts of the way to a kernel."""
    wrong = []
    for path in set(PACKAGE.rglob("*.py")) - {*(PACKAGE / "ops").rglob("*.py"), *(PACKAGE / "testing").rglob("*.py")}:
        modules = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("k2kernels.ops"):
                names = [name.name for name in node.names]
                modules |= {name.asname or name.name for name in node.names}
                if node.module != "k2kernels.ops":
                    wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in names if name.startswith("_")]
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in modules:
                if node.attr.startswith("_"):
                    wrong.append(f"{path.relative_to(ROOT)} uses {node.value.id}.{node.attr}")
    assert wrong == []


def test_rooms_of_csrc_include_no_other():
    wrong = []
    for path in (ROOT / "csrc").rglob("*"):
        room = path.relative_to(ROOT / "csrc").parts[0]
        if path.suffix in {".h", ".cuh", ".cu"} and room not in SHARED_CSRC:
            others = set(re.findall(r'#include "(\w+)/', path.read_text())) - {room, "arch", "common", "tile"}
            wrong += [f"{path.relative_to(ROOT)} includes {other}" for other in others]
    assert wrong == []


def test_imports_have_no_circle():
    """Imports inside functions and for type checkers included."""
    files = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    names = {path: name.removesuffix(".__init__") for path, name in files.items()}
    modules = set(names.values()) - {"k2kernels"}  # which imports everything, and whose version some read
    graph = {}
    for path, name in names.items():
        found = set(_imports(path))
        # `from a import b` yields a and a.b; it needs a itself only where b is no module.
        members = [m for m in found if m.rpartition(".")[0] in found]
        packages = {m.rpartition(".")[0] for m in members}
        needed = {m.rpartition(".")[0] for m in members if m not in modules}
        graph[name] = (found - packages | needed) & modules
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_csrc_keeps_its_rules():
    wrong = []
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in {".h", ".cuh", ".cu", ".cpp"}:
            continue
        text, room = path.read_text(), path.relative_to(ROOT / "csrc").parts[0]
        if re.search(r"\basm\b", text) and room != "arch":
            wrong.append(f"{path.relative_to(ROOT)}: asm outside csrc/arch")
        if "K2K_EMULATED" in text and room not in {"arch", "common", "emulator"}:
            wrong.append(f"{path.relative_to(ROOT)}: K2K_EMULATED outside arch, common and emulator")
        if re.search(r"#include\s*[<\"](torch|ATen|c10)/", text):
            wrong.append(f"{path.relative_to(ROOT)}: includes torch")
    assert wrong == []
