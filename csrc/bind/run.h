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

}  // namespace k2k::bind
