// The Python module k2kernels._C. Raw pointers and sizes come in; no torch header is included, so
// the module does not depend on torch's ABI.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/selfcheck.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
    py::dict info;
    info["version"] = K2K_VERSION;
    info["build_type"] = K2K_BUILD_TYPE;
    info["compiler"] = __VERSION__;
    info["cuda_archs"] = py::tuple();  // no kernels are compiled yet
    return info;
}

void decode_e4m3(std::uintptr_t codes, std::uintptr_t values, std::size_t count) {
    k2k::decode_e4m3(reinterpret_cast<const std::uint8_t*>(codes), reinterpret_cast<float*>(values),
                     count);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "Compiled part of k2kernels.";
    m.def("build_info", &build_info, "How this module was built.");
    m.def("decode_e4m3", &decode_e4m3, py::arg("codes"), py::arg("values"), py::arg("count"),
          "Decodes `count` e4m3 bytes at address `codes` to float32 at address `values`.");
}
