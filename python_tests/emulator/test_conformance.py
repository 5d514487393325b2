"""Every wrapper of csrc/arch against the PTX manual: in the emulator, as recorded on GPUs, and on this machine's GPU.

conformance_cases.py has the formulas, record.py makes the recordings.
"""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance_cases import MAKERS, RECORDED, case, run_on_gpu

from k2kernels import _C, _emu
from k2kernels.cli import main

CSRC = Path(__file__).parents[2] / "csrc"
NEEDS = _emu.conformance_names()
RECORDINGS = {path.stem: np.load(path) for path in sorted(RECORDED.glob("*.npz"))}
GPU = bool(_C.build_info()["cuda_archs"]) and torch.cuda.is_available()


def emulate(name, made, seed):
    """The kernel's output in the emulator, from and to memory whose surroundings fault."""
    _emu.configure(NEEDS[name], seed)
    places = []
    for array in (made.input, made.before):
        places.append(_emu.allocate(array.nbytes))
        ctypes.memmove(places[-1], array.ctypes.data, array.nbytes)
    try:
        _emu.conformance(name, *places, -1)
        output = np.empty_like(made.before)
        ctypes.memmove(output.ctypes.data, places[1], output.nbytes)
        return output
    finally:
        for place in places:
            _emu.release(place)


def test_every_kernel_has_a_formula():
    assert set(MAKERS) == set(NEEDS)


def test_every_wrapper_is_shown():
    headers = "\n".join(path.read_text() for path in (CSRC / "arch").glob("*.cuh"))
    names = set(re.findall(r"^K2K_(?:HOST_)?DEVICE [\w ]+?[&*]? ?(\w+)\(", headers.replace("constexpr ", ""), re.M))
    verbs = ("prefetch_{}d", "load_{}d", "load_{}d_multicast", "store_{}d", "reduce_add_{}d")
    names |= {"tma_" + verb.format(rank) for verb in verbs for rank in (1, 2, 3)}
    names -= {"check_wgmma", "has_mma_e4m3"}  # are no instructions
    kernels = "\n".join(path.read_text() for path in (CSRC / "conformance").glob("*.cuh"))
    assert len(names) > 80
    assert [name for name in sorted(names) if not re.search(rf"arch::{name}\b", kernels)] == []
    listed = (CSRC / "arch" / "README.md").read_text()
    listed += "".join(listed.replace("{1,2,3}d", f"{rank}d") for rank in (1, 2, 3))
    missing = [name for name in names if name.removesuffix("_multicast") not in listed]
    assert missing == [], "not in csrc/arch/README.md"


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_emulator(name):
    made = case(name)
    for seed in range(4):
        output = emulate(name, made, seed)
        wrong = np.flatnonzero(output != made.after)
        assert made.holds(output), f"seed {seed}: {wrong.size} of {output.size} words differ, first {wrong[:8]}"
    for gpu, recorded in RECORDINGS.items():
        if name not in recorded:  # a kernel of a later chip
            continue
        if made.within_bounds:
            assert made.holds(recorded[name]), f"{gpu} is outside the bounds"
        else:
            assert np.array_equal(output, recorded[name]), f"{gpu} did otherwise"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU, or built without nvcc")
def test_gpu():
    hopper = torch.cuda.get_device_capability() == (9, 0)
    made = {name: case(name) for name, chip in NEEDS.items() if hopper or chip == 80}
    assert [name for name, wanted in made.items() if not wanted.holds(run_on_gpu(name, wanted))] == []


def test_doctor_says_where_it_was_recorded(capsys):
    main(["doctor"])
    text = "recorded on " + ", ".join(RECORDINGS) if RECORDINGS else "not recorded on a GPU yet"
    assert f"conformance: {text}\n" in capsys.readouterr().out
