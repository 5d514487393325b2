"""The test kernels compiled by nvcc: no spills, and the intended instructions."""

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from emulated_kernels import KERNELS, ROOT

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
TOOLS = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

# kernel, architecture, instructions of its SASS with the least number of each
CASES = [
    ("warp_sum", "80", {"SHFL": 5}),
    ("gemm_mma", "80", {"HMMA.16816.F32.BF16": 16, "LDSM": 12, "LDGSTS": 4}),
    ("gemm_mma", "90a", {"HMMA.16816.F32.BF16": 16, "LDSM": 12, "LDGSTS": 4}),
    ("gemm_wgmma", "90a", {"HGMMA.64x128x16.F32.BF16": 4, "UTMALDG.2D": 2, "SYNCS": 4, "USETMAXREG": 2}),
    ("small", "90a", {"UTMALDG.2D": 1, "UTMASTG.2D": 1, "LDG.E.128.CONSTANT": 1, "UCGABAR": 1, "STAS": 1}),
]


@pytest.mark.parametrize("kernel, arch, wanted", CASES)
def test_kernel_compiles(kernel, arch, wanted, tmp_path):
    cubin = tmp_path / "kernel.cubin"
    target = f"--generate-code=arch=compute_{arch},code=[sm_{arch}]"
    command = [NVCC, "-std=c++17", f"-I{ROOT / 'csrc'}", f"-I{KERNELS}", target, "-Xptxas=-v", "-cubin"]
    done = subprocess.run([*command, KERNELS / f"{kernel}.cu", "-o", cubin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    assert spills and set(spills) == {"0"}, done.stderr

    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=TOOLS)
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)")
    path = {"PATH": f"{TOOLS}:/usr/local/cuda/bin:/usr/bin:/bin"}
    sass = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, env=path, check=True).stdout
    found = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", sass, re.M))
    for name, least in wanted.items():
        count = sum(n for instruction, n in found.items() if instruction.startswith(name))
        assert count >= least, f"{name}: {count} of {least}; {sorted(found)}"
