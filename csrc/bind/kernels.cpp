// Compiled once for each of the two modules: binds all ops, and lists the shared memory of their
// kernels.
#include "bind/run.h"
#include "common/launch.h"

namespace k2k::bind {

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
        "Kernel -> bytes of shared memory of a CTA.");
    bind_quant(m);
    bind_mla_cache(m);
    bind_mla_decode(m);
    bind_mla_prefill(m);
    bind_fp8_gemm(m);
    bind_newton_schulz(m);
    bind_grouped_gemm(m);
    bind_w4_gemm(m);
    bind_moe(m);
    bind_exchange(m);
    bind_conformance(m);
}

}  // namespace k2k::bind
