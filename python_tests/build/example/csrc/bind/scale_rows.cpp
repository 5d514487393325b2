#include "bind/run.h"
#include "scale_rows/launch.h"

namespace k2k::bind {

namespace {

long scale_rows(Address x,
                Address y,
                int type,
                int64_t rows,
                int64_t columns,
                int64_t x_row_stride,
                int device,
                Address stream) {
    const ScaleRowsParams p{pointer<const void>(x),
                            pointer<void>(y),
                            static_cast<Type>(type),
                            rows,
                            columns,
                            x_row_stride};
    return run(device, [&] { launch_scale_rows(p, pointer<void>(stream)); });
}

}  // namespace

void bind_scale_rows(py::module_& m) {
    m.def("scale_rows", &scale_rows, py::arg("x"), py::arg("y"), py::arg("type"), py::arg("rows"),
          py::arg("columns"), py::arg("x_row_stride"), py::arg("device"), py::arg("stream"),
          "See csrc/scale_rows/params.h; returns the number of kernels started.");
}

}  // namespace k2k::bind
