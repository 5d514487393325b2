"""The example of CONTRIBUTING.md is the code in `example/`, which python_tests/build/example runs and this compiles."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sass import counts, dump
from test_sass import ARCHS, check, short

HERE = Path(__file__).parent / "example"
ROOT = HERE.parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
FILES = sorted(str(p.relative_to(HERE)) for p in HERE.rglob("*") if p.suffix in {".h", ".cuh", ".cu", ".cpp", ".py"})
FILES.remove("conftest.py")

# As the page says it.
PLANS = {
    "scale_rows_kernel<bf16>": (48, 4, 2, {}),
    "scale_rows_kernel<fp16>": (48, 4, 2, {}),
    "scale_rows_kernel<float>": (48, 8, 4, {}),
}


@pytest.mark.parametrize("file", FILES)
def test_page_holds_the_file(file):
    language = "python" if file.endswith(".py") else "cpp"
    assert f"```{language}\n{(HERE / file).read_text()}```\n" in PAGE


def test_page_holds_no_other_code():
    assert len(re.findall(r"^```(?:python|cpp)$", PAGE, re.M)) == len(FILES)
    assert f'"{next(iter(PLANS))}": {next(iter(PLANS.values()))},' in PAGE


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_kernel_meets_its_plan(tmp_path):
    made, facts = tmp_path / "scale_rows.o", tmp_path / "facts.json"
    targets = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in ARCHS]
    flags = [
        "-std=c++17",
        "-Xcompiler=-Wall",
        "--expt-relaxed-constexpr",
        "-Xptxas=-v,--warn-on-spills,--warning-as-error",
    ]
    command = [
        sys.executable,
        ROOT / "cmake/nvcc_log.py",
        NVCC,
        *flags,
        *targets,
        f"-I{HERE / 'csrc'}",
        f"-I{ROOT / 'csrc'}",
    ]
    subprocess.run([*command, "-c", HERE / "csrc/scale_rows/launch.cu", "-o", made], check=True)
    subprocess.run([sys.executable, ROOT / "cmake/kernel_facts.py", facts, made], check=True)
    kernels = json.loads(facts.read_text())
    assert {(short(k), k["arch"]) for k in kernels} == {(name, arch) for name in PLANS for arch in ARCHS}
    opcodes = counts(dump(made))
    for kernel in kernels:
        check(kernel, PLANS[short(kernel)], opcodes)
