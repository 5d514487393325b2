// The module for GPUs where no nvcc was found: it holds the facts of the build and no kernels.
#include "bind/bind.h"

namespace k2k::bind {

void bind_runtime(py::module_& m) {
    m.def("device_count", [] { return 0; }, "0: this build has no kernels for GPUs.");
}

}  // namespace k2k::bind
