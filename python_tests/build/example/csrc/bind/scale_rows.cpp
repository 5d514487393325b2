#include "bind/run.h"
#include "scale_rows/launch.h"

namespace k2k::bind {

void bind_scale_rows(py::module_& m) {
    m.def("scale_rows", [](const Tensor& x, const Tensor& y) {
        const ScaleRowsParams p{
            x.data<const void>(), y.data<void>(), x.type(), x.size(0), x.size(1), x.stride(0)};
        return run(x, launch_scale_rows, p);
    });
}

}  // namespace k2k::bind
