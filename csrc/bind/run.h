#pragma once

// How a binding starts kernels. The bindings do not depend on their module: they are compiled once,
// and both modules link them.

#include <memory>
#include <type_traits>

#include "bind/tensor.h"
#include "common/chip.h"

namespace k2k::bind {

// Calls launch(context, stream) with `device` current and with the stream that is current there in
// PyTorch (_C), or in this thread's configuration (_emu); returns how many kernels it started.
// device.cpp and emulator.cpp.
long run_on(DLDevice device, void (*launch)(void* context, void* stream), void* context);

// Calls launch(stream) on `device`, without the GIL; returns how many kernels it started.
template <class Launch>
long run(DLDevice device, Launch&& launch) {
    using Call = std::remove_reference_t<Launch>;
    const py::gil_scoped_release release;
    return run_on(
        device, [](void* context, void* stream) { (*static_cast<Call*>(context))(stream); },
        std::addressof(launch));
}

// The same on the device of a tensor ...
template <class Launch>
long run(const Tensor& tensor, Launch&& launch) {
    return run(tensor.device(), launch);
}

// ... and for a function of csrc/<op>/launch.h.
template <class Params>
long run(const Tensor& tensor, void (*launch)(const Params&, void*), const Params& params) {
    return run(tensor, [&](void* stream) { launch(params, stream); });
}

}  // namespace k2k::bind

namespace pybind11::detail {

// k2kernels.ops._launch.Chip, a tuple.
template <>
struct type_caster<k2k::Chip> {
    PYBIND11_TYPE_CASTER(k2k::Chip, const_name("Chip"));
    bool load(handle object, bool) {
        int* const fields[] = {&value.capability, &value.multiprocessors, &value.shared_memory};
        if (!PyTuple_Check(object.ptr()) || PyTuple_GET_SIZE(object.ptr()) != 3) return false;
        for (int i = 0; i < 3; ++i) {
            *fields[i] = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(object.ptr(), i)));
        }
        if (PyErr_Occurred() == nullptr) return true;
        PyErr_Clear();  // pybind11 raises TypeError
        return false;
    }
};

}  // namespace pybind11::detail
