"""The tensor maps of a GPU build are made with CuTe's arguments: python_tests/emulator/fixtures/README.md."""

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAPS = json.loads((ROOT / "python_tests/emulator/fixtures/tensor_maps.json").read_text())
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

# csrc/arch/tensor_map.cpp as a GPU build compiles it; a recorder stands in the driver's place.
RECORDER = """
#include <cuda.h>
#include <cuda_runtime.h>
#include <cstdio>
#include "arch/tensor_map.h"

static char record[1000];

static CUresult CUDAAPI encode(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void*, const cuuint64_t* sizes,
                               const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                               CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                               CUtensorMapL2promotion l2_promotion, CUtensorMapFloatOOBfill oob_fill) {
    char* at = record;
    at += sprintf(at, "{\\"type\\": %d, \\"rank\\": %u", int(type), rank);
    const auto list = [&](const char* name, const auto* values, unsigned count) {
        at += sprintf(at, ", \\"%s\\": [", name);
        for (unsigned i = 0; i < count; ++i) at += sprintf(at, i ? ", %llu" : "%llu", (unsigned long long)values[i]);
        at += sprintf(at, "]");
    };
    list("sizes", sizes, rank);
    list("stride_bytes", strides, rank - 1);
    list("box", box, rank);
    list("element_strides", element_strides, rank);
    sprintf(at, ", \\"interleave\\": %d, \\"swizzle\\": %d, \\"l2_promotion\\": %d, \\"oob_fill\\": %d}",
            int(interleave), int(swizzle), int(l2_promotion), int(oob_fill));
    return CUDA_SUCCESS;
}

extern "C" cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned,
                                                                 unsigned long long,
                                                                 cudaDriverEntryPointQueryResult* found) {
    *entry = reinterpret_cast<void*>(encode);
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

extern "C" const char* make(int type, int rank, const unsigned long long* n, int swizzle) {
    using namespace k2k;
    const auto box = [=](int d) { return static_cast<unsigned>(n[2 * rank - 1 + d]); };
    const auto t = static_cast<Type>(type);
    const auto s = static_cast<arch::Swizzle>(swizzle);
    if (rank == 2) {
        arch::make_tensor_map(t, nullptr, {n[0], n[1]}, {n[2]}, {box(0), box(1)}, s);
    } else {
        arch::make_tensor_map(t, nullptr, {n[0], n[1], n[2]}, {n[3], n[4]}, {box(0), box(1), box(2)}, s);
    }
    return record;
}
"""
TYPES = {9: 1, 0: 3}  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, _UINT8 -> k2k::Type kBf16, kE4m3
SWIZZLES = {3: 128}  # CU_TENSOR_MAP_SWIZZLE_128B


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_tensor_maps_of_a_gpu_build(tmp_path):
    source, library = tmp_path / "recorder.cpp", tmp_path / "recorder.so"
    source.write_text(RECORDER)
    subprocess.run(
        [
            NVCC, "-std=c++17", "-shared", "-cudart", "none", "-Xcompiler=-fPIC", f"-I{ROOT / 'csrc'}",
            source, ROOT / "csrc/arch/tensor_map.cpp", "-o", library,
        ],
        check=True,
    )  # fmt: skip
    make = ctypes.CDLL(str(library)).make
    make.restype = ctypes.c_char_p
    for name, cute in MAPS.items():
        numbers = [*cute["sizes"], *cute["stride_bytes"], *cute["box"]]
        array = (ctypes.c_ulonglong * len(numbers))(*numbers)
        ours = json.loads(make(TYPES[cute["type"]], cute["rank"], array, SWIZZLES[cute["swizzle"]]))
        assert ours == cute, name
