#pragma once

// How a binding starts kernels.

#include "bind/bind.h"
#include "common/device.h"

namespace k2k::bind {

// Calls launch() with `device` current and without the GIL; returns how many kernels it started.
template <class Launch>
long run(int device, Launch&& launch) {
    const py::gil_scoped_release release;
    const DeviceGuard guard(device);
    const long before = num_launches;
    launch();
    return num_launches - before;
}

inline void bind_shared_memory(py::module_& m) {
    m.def(
        "shared_memory",
        [] {
            py::dict bytes;
            for (const auto& [kernel, count] : shared_memory()) {
                bytes[py::str(kernel.data(), kernel.size())] = count;
            }
            return bytes;
        },
        "Kernel -> bytes of shared memory that its launches ask for.");
}

}  // namespace k2k::bind
