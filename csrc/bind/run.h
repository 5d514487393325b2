#pragma once

// How a binding starts kernels. Nothing here depends on the module that it ends up in: the files
// of bindings are compiled once, and both modules link them.

#include <memory>
#include <type_traits>

#include "bind/bind.h"

namespace k2k::bind {

// Calls `launch(context)` with `device` current; returns how many kernels it started. kernels.cpp.
long run_on(int device, void (*launch)(void*), void* context);

// Calls launch() with `device` current and without the GIL; returns how many kernels it started.
template <class Launch>
long run(int device, Launch&& launch) {
    using Call = std::remove_reference_t<Launch>;
    const py::gil_scoped_release release;
    return run_on(
        device, [](void* context) { (*static_cast<Call*>(context))(); }, std::addressof(launch));
}

}  // namespace k2k::bind
