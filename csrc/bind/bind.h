#pragma once

// What the files of csrc/bind share. Both modules, _C for GPUs and _emu for the emulator, are made
// of the same functions: module.cpp, one file per op, kernels.cpp, and device.cpp or emulator.cpp.
// Ops take tensors (tensor.h) and launch by run.h. No torch header is included, so that the modules
// do not depend on torch's ABI. Shapes are checked in Python.

#include <pybind11/pybind11.h>

#include <cstdint>

namespace k2k::bind {

namespace py = pybind11;

using Address = std::uintptr_t;  // of memory that is no argument of an op, such as a test's

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Adds a number to the module's `constants`, where k2kernels/ops/_constants.py reads it.
template <class T>
void constant(py::module_& m, const char* name, T value) {
    if (!py::hasattr(m, "constants")) m.attr("constants") = py::dict();
    m.attr("constants")[name] = py::int_(static_cast<int64_t>(value));
}

void bind_runtime(py::module_& m);  // device.cpp, emulator.cpp or no_device.cpp
void bind_kernels(py::module_& m);  // kernels.cpp: all that follow
void bind_quant(py::module_& m);
void bind_mla_cache(py::module_& m);
void bind_mla_decode(py::module_& m);
void bind_mla_prefill(py::module_& m);
void bind_fp8_gemm(py::module_& m);
void bind_newton_schulz(py::module_& m);
void bind_grouped_gemm(py::module_& m);
void bind_w4_gemm(py::module_& m);
void bind_moe(py::module_& m);
void bind_exchange(py::module_& m);
void bind_conformance(py::module_& m);

}  // namespace k2k::bind
