// The Python modules k2kernels._C and k2kernels._emu.
#include "bind/bind.h"
#include "common/error.h"
#include "common/selfcheck.h"

namespace k2k::bind {

namespace {

py::dict build_info() {
    py::dict info;
    info["version"] = K2K_VERSION;
    info["build_type"] = K2K_BUILD_TYPE;
    info["compiler"] = __VERSION__;
    info["cuda_archs"] = py::tuple(py::str(K2K_CUDA_ARCHS).attr("split")());
    return info;
}

}  // namespace

PYBIND11_MODULE(K2K_MODULE, m, py::mod_gil_not_used()) {
    m.doc() = "Compiled part of k2kernels.";
    auto error = py::register_local_exception<Error>(m, "Error", PyExc_RuntimeError);
    py::register_local_exception<NoDeviceError>(m, "NoDeviceError", error);
    m.def("build_info", &build_info, "How this module was built.");
    m.def(
        "decode_e4m3",
        [](Address codes, Address values, std::size_t count) {
            decode_e4m3(pointer<const std::uint8_t>(codes), pointer<float>(values), count);
        },
        py::arg("codes"), py::arg("values"), py::arg("count"),
        "Decodes `count` e4m3 bytes at address `codes` to float32 at address `values`.");
    bind_runtime(m);
}

}  // namespace k2k::bind
