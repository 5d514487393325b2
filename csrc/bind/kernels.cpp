// What each of the two modules with kernels compiles for itself: where launches go, and which ops
// there are.
#include "bind/run.h"
#include "common/device.h"
#include "common/dtypes.h"
#include "tile/groups.h"

namespace k2k::bind {

long run_on(int device, void (*launch)(void*), void* context) {
    const DeviceGuard guard(device);
    const long before = num_launches;
    launch(context);
    return num_launches - before;
}

void bind_kernels(py::module_& m) {
    constant(m, "TYPE_F32", Type::kF32);
    constant(m, "TYPE_BF16", Type::kBf16);
    constant(m, "TYPE_FP16", Type::kFp16);
    constant(m, "TYPE_E4M3", Type::kE4m3);
    constant(m, "TYPE_U8", Type::kU8);
    constant(m, "GROUPS_OF_MATRICES", tile::Groups::Axis::kMatrices);
    constant(m, "GROUPS_OF_ROWS", tile::Groups::Axis::kRows);
    constant(m, "GROUPS_OF_K", tile::Groups::Axis::kK);
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
    bind_grouped_gemm(m);
    bind_moe(m);
    bind_exchange(m);
    bind_conformance(m);
}

}  // namespace k2k::bind
