#include <algorithm>

#include "common/launch.h"
#include "fp8_gemm/kernel_sm90_small.cuh"
#include "fp8_gemm/launch.h"
#include "fp8_gemm/maps.h"

namespace k2k {

namespace {

template <class Tile>
void launch_tile(const Fp8GemmParams& p, int split, const Chip& chip, void* stream) {
    static_assert(sizeof(SmallStorage<Tile>) <= kSharedOfTwo);
    HopperMaps maps = {};
    maps.a = codes_map(p.a, p.k, Tile::kTokens);
    maps.b = codes_map(p.b, p.k, Tile::kColumns);
    const int64_t tiles = tiles_at_most(p, Tile::kTokens, Tile::kColumns);
    const int64_t clusters = std::min<int64_t>(tiles, 2 * chip.multiprocessors / split);
    const auto ctas = static_cast<unsigned>(clusters * split);
    const LaunchShape shape{ctas, Tile::kThreads, 0, stream, static_cast<unsigned>(split)};
    launch<fp8_gemm_sm90_small_kernel<Tile>, sizeof(SmallStorage<Tile>)>(shape, p, maps, split);
}

}  // namespace

void launch_fp8_gemm_sm90_small(const Fp8GemmParams& p, const GemmPlan& plan, const Chip& chip,
                                void* stream) {
    switch (plan.kernel) {
        case GemmKernel::kSmall8:
            return launch_tile<SmallTile8>(p, plan.split, chip, stream);
        case GemmKernel::kSmall16:
            return launch_tile<SmallTile16>(p, plan.split, chip, stream);
        case GemmKernel::kSmall32:
            return launch_tile<SmallTile32>(p, plan.split, chip, stream);
        default:
            return launch_tile<SmallTile64>(p, plan.split, chip, stream);
    }
}

}  // namespace k2k
