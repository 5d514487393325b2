// What each of the two modules with kernels compiles for itself: where launches go, and which ops there are.
#include "bind/run.h"
#include "common/device.h"

namespace k2k::bind {

long run_on(int device, void (*launch)(void*), void* context) {
    const DeviceGuard guard(device);
    const long before = num_launches;
    launch(context);
    return num_launches - before;
}

void bind_kernels(py::module_& m) {
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
    bind_quant(m);
    bind_mla_cache(m);
    bind_mla_decode(m);
    bind_fp8_gemm(m);
    bind_newton_schulz(m);
    bind_moe(m);
    bind_moe_exchange(m);
    bind_conformance(m);
}

}  // namespace k2k::bind
