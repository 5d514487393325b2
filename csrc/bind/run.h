#pragma once

// How a binding starts kernels.

#include "bind/bind.h"
#include "common/device.h"
#include "common/dtypes.h"
#include "tile/groups.h"

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

inline void bind_types(py::module_& m) {
    constant(m, "TYPE_F32", Type::kF32);
    constant(m, "TYPE_BF16", Type::kBf16);
    constant(m, "TYPE_FP16", Type::kFp16);
    constant(m, "TYPE_E4M3", Type::kE4m3);
    constant(m, "TYPE_U8", Type::kU8);
    constant(m, "GROUPS_OF_MATRICES", tile::Groups::Axis::kMatrices);
    constant(m, "GROUPS_OF_ROWS", tile::Groups::Axis::kRows);
    constant(m, "GROUPS_OF_K", tile::Groups::Axis::kK);
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
