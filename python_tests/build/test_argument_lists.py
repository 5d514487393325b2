"""How often an op's arguments are listed from the public function to its kernel: each list is one more to keep in step.

Counted are signatures and tuples in k2kernels/ops and k2kernels/reference, and signatures in csrc/bind, that name most
of the op's arguments. Calls are not: they use a list.
"""

import ast
import re
from pathlib import Path

import pytest

import k2kernels  # noqa: F401 (registers the ops)
from k2kernels.ops._register import OPS

ROOT = Path(__file__).parents[2]
MOST = 5
FEW = 4  # names in a list of interest: (x, y) is everywhere


def python_lists(text):
    """(name of the function or None, line, names) of each signature and each tuple or list of names."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            names = {x.arg for x in node.args.posonlyargs + node.args.args + node.args.kwonlyargs}
            yield getattr(node, "name", None), node.lineno, names
        elif isinstance(node, (ast.Tuple, ast.List)):
            yield None, node.lineno, {x.id for x in node.elts if isinstance(x, ast.Name)}


def cpp_lists(text):
    """The same of each signature that takes tensors."""
    for found in re.finditer(r"(\w*)\(([^(){};]*\bTensor\b[^(){};]*)\)", text):
        names = {part.split()[-1].lstrip("*&") for part in found[2].split(",") if part.strip()}
        yield found[1], text[: found.start()].count("\n") + 1, names


def lists_in(texts):
    """[(file, function, line, names)] of texts by path."""
    found = []
    for path, text in texts.items():
        lists = python_lists(text) if path.suffix == ".py" else cpp_lists(text)
        found += [(path.name, *one) for one in lists if len(one[2]) >= FEW]
    return found


def lists_of(op, names, lists):
    """Where the arguments `names` of `op` are listed: most of them, and little else."""
    return [
        f"{file}:{line} {function or ''}"
        for file, function, line, listed in lists
        if len(listed & names) >= max(FEW, 0.7 * len(names), 0.7 * len(listed))
        and (function not in OPS or function == op)  # another op's own list
    ]


@pytest.fixture(scope="module")
def lists():
    files = [p for room in ("ops", "reference") for p in (ROOT / "k2kernels" / room).rglob("*.py")]
    return lists_in({path: path.read_text() for path in (*files, *(ROOT / "csrc/bind").glob("*.cpp"))})


@pytest.mark.parametrize("op", sorted(OPS))
def test_arguments_are_listed_in_few_places(op, lists):
    names = {argument.name for argument in OPS[op].plain._schema.arguments}
    found = lists_of(op, names, lists)
    assert len(found) <= MOST, f"{op}: {sorted(names)} are listed {len(found)} times:\n" + "\n".join(found)


def test_a_list_is_recognised():
    python = "def f(q, k, v, w, *, o): return (q, k, v, w)\ng = lambda q, k, v, w: 0\nh(q, k, v, w)\n(q, k)"
    cpp = "long f(const Tensor& q,\n const Tensor& k, float v, int w) { g(q, k, v, w); }"
    assert len(lists_of("f", set("qkvw"), lists_in({Path("a.py"): python, Path("b.cpp"): cpp}))) == 4
