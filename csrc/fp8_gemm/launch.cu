#include <algorithm>
#include <string>

#include "common/launch.h"
#include "fp8_gemm/kernel_portable.cuh"
#include "fp8_gemm/launch.h"

namespace k2k {

namespace {

template <class Tile>
void launch_portable(const Fp8GemmParams& p, const Chip& chip, void* stream) {
    static_assert(sizeof(PortableStorage<Tile>) == Tile::kSharedBytes);
    const int64_t tiles = tiles_at_most(p, Tile::kRows, Tile::kColumns);
    const int64_t ctas = std::min<int64_t>(tiles, int64_t(chip.multiprocessors) * Tile::kCtas);
    LaunchShape shape{static_cast<unsigned>(ctas), Tile::kThreads, 0, stream};
    launch<fp8_gemm_portable_kernel<Tile>, sizeof(PortableStorage<Tile>)>(shape, p);
}

// Kernels index rows, columns and tiles (at least 16 rows each) in 32 bits.
void check_sizes(const Fp8GemmParams& p) {
    const int64_t most = (int64_t(1) << 31) - 1 - 256;
    if (std::max({p.a.rows, p.b.rows, p.k, tiles_at_most(p, 16, 128)}) > most) {
        throw Error("fp8_gemm: rows, columns, K and the number of tiles must be below 2^31");
    }
}

}  // namespace

void launch_fp8_gemm(const Fp8GemmParams& p, const GemmPlan& asked, const Chip& chip,
                     void* stream) {
    if (p.groups.number == 0 || p.a.rows == 0 || p.b.rows == 0) return;
    check_sizes(p);
    const bool quantizes = facts_of(asked.kernel).family == GemmFamily::kSwiglu;
    const GemmPlan plan = serving(asked, p);
    if (quantizes != (p.d_scales.values != nullptr) ||
        (quantizes && (plan.kernel != asked.kernel || p.b.rows % 256 != 0))) {
        throw Error(quantizes ? "fp8_gemm: sm90_swiglu_128x256 takes SwiGLU of a multiple of 128 "
                                "columns, K > 0, and a scale of B for each 128x128"
                              : "fp8_gemm: sm90_swiglu_128x256 alone quantises its result");
    }
    const GemmKernelFacts& facts = facts_of(plan.kernel);
    if (chip.capability < facts.capability() || chip.shared_memory < facts.shared_memory) {
        throw Error(std::string("fp8_gemm: ") + facts.name + " does not run on this GPU, sm_" +
                    std::to_string(chip.capability) + " with " +
                    std::to_string(chip.shared_memory) + " bytes of shared memory per CTA");
    }
    switch (plan.kernel) {
        case GemmKernel::kPortable128x128:
            return launch_portable<PortableTile128>(p, chip, stream);
        case GemmKernel::kPortable64x128:
            return launch_portable<PortableTile64>(p, chip, stream);
        case GemmKernel::kPortable16x128:
            return launch_portable<PortableTile16>(p, chip, stream);
        default:
            return is_small(plan.kernel) ? launch_fp8_gemm_sm90_small(p, plan, chip, stream)
                                         : launch_fp8_gemm_sm90(p, plan, chip, stream);
    }
}

}  // namespace k2k
