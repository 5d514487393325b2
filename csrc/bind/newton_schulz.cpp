#include <pybind11/stl.h>

#include "bind/run.h"
#include "newton_schulz/config.h"
#include "newton_schulz/launch.h"

namespace k2k::bind {

namespace {

// (x, result, (batch, m, n), (batch_stride, row_stride), type)
using TensorTuple = std::tuple<Address,
                               Address,
                               std::tuple<int32_t, int32_t, int32_t>,
                               std::tuple<int64_t, int64_t>,
                               int>;

long newton_schulz(const std::vector<TensorTuple>& tensors,
                   int num_standard,
                   const std::vector<double>& coefficients,
                   const std::vector<int>& restarts,
                   int iterate_type,
                   Address workspace,
                   int device,
                   Address stream) {
    NsCall call = {};
    for (const auto& [x, result, sizes, strides, type] : tensors) {
        NsTensor t = {};
        t.x = pointer<const void>(x);
        t.result = pointer<void>(result);
        std::tie(t.batch, t.m, t.n) = sizes;
        std::tie(t.x_batch_stride, t.x_row_stride) = strides;
        t.type = static_cast<Type>(type);
        call.tensors.push_back(t);
    }
    call.num_standard = num_standard;
    for (std::size_t i = 0; i + 2 < coefficients.size(); i += 3) {
        call.steps.push_back({static_cast<float>(coefficients[i]),
                              static_cast<float>(coefficients[i + 1]),
                              static_cast<float>(coefficients[i + 2])});
    }
    call.restarts = restarts;
    call.iterate_type = static_cast<Type>(iterate_type);
    call.workspace = pointer<char>(workspace);
    return run(device, [&] { launch_newton_schulz(call, pointer<void>(stream)); });
}

}  // namespace

void bind_newton_schulz(py::module_& m) {
    m.def("newton_schulz", &newton_schulz, py::arg("tensors"), py::arg("num_standard"),
          py::arg("coefficients"), py::arg("restarts"), py::arg("iterate_type"),
          py::arg("workspace"), py::arg("device"), py::arg("stream"),
          "See csrc/newton_schulz/launch.h; tensors are (x, result, (batch, m, n), (batch_stride, "
          "row_stride), type). Returns the number of kernels started.");
    m.def(
        "newton_schulz_workspace",
        [](int64_t rows, int64_t columns, bool gram) {
            return std::make_pair(ns_matrix_bytes(rows, columns, gram), kNsTensorBytes);
        },
        py::arg("m"), py::arg("n"), py::arg("gram"),
        "Bytes of workspace for one matrix of this shape, and for each tensor besides.");
}

}  // namespace k2k::bind
