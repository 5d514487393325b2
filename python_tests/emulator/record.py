"""Records the outputs of the conformance kernels on the current GPU: recorded/<gpu>.npz, kept in the repository.

    python python_tests/emulator/record.py

From then on test_conformance.py compares the emulator with the recording, bit for bit.
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from conformance_cases import RECORDED, case, run_on_gpu


def main() -> int:
    from k2kernels import _C

    if not torch.cuda.is_available() or not _C.build_info()["cuda_archs"]:
        print("record.py needs a CUDA device, and k2kernels built with nvcc", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name()
    hopper = torch.cuda.get_device_capability() == (9, 0)
    outputs, wrong = {}, []
    for name, chip in sorted(_C.conformance_names().items()):
        if chip == 90 and not hopper:
            continue
        made = case(name)
        try:
            outputs[name] = run_on_gpu(name, made)
        except RuntimeError as error:  # after a fault no later kernel runs: keep what there is
            wrong.append(f"{name}: {error}")
            break
        if not made.holds(outputs[name]):
            differ = np.flatnonzero(outputs[name] != made.after)
            wrong.append(f"{name}: {differ.size} of {made.after.size} words differ, first {differ[:8]}")
    RECORDED.mkdir(exist_ok=True)
    path = RECORDED / (re.sub(r"\W+", "_", gpu).strip("_").lower() + ".npz")
    np.savez_compressed(path, **outputs)
    print(f"{path}: {len(outputs)} kernels on {gpu}, {path.stat().st_size} bytes")
    for line in wrong:
        print(f"not as the manual says: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
