#include <algorithm>

#include "common/launch.h"
#include "fp8_gemm/kernel_sm90.cuh"
#include "fp8_gemm/launch.h"
#include "fp8_gemm/maps.h"

namespace k2k {

namespace {

// Boxes of 64 rows x 64 columns; false if TMA cannot store D.
bool result_map(const Fp8GemmParams& p, arch::TensorMap& map) {
    if (p.d_type != Type::kBf16 && p.d_type != Type::kFp16) return false;
    const int64_t matrices = p.groups.axis == GemmGroups::Axis::kRows ? 1 : p.groups.number;
    const int64_t row_bytes = p.d_row_stride * 2;
    const int64_t matrix_bytes = matrices > 1 ? p.d_matrix_stride * 2 : p.a.rows * row_bytes;
    const auto bits = reinterpret_cast<uintptr_t>(p.d) | uintptr_t(row_bytes | matrix_bytes);
    if (bits % 16 != 0 || row_bytes == 0) return false;
    const auto unsign = [](int64_t n) { return static_cast<uint64_t>(n); };
    map = arch::make_tensor_map(
        p.d_type, p.d, {unsign(p.b.rows), unsign(p.a.rows), unsign(matrices)},
        {unsign(row_bytes), unsign(matrix_bytes)}, {64, 64, 1}, arch::Swizzle::k128);
    return true;
}

template <class Tile>
void launch_tile(const Fp8GemmParams& p, Share share, const Chip& chip, void* stream) {
    static_assert(sizeof(HopperStorage<Tile>) <= kSharedOfOne);
    const unsigned cluster = share != Share::kNone ? 2 : 1;
    HopperMaps maps = {};
    maps.a = codes_map(p.a, p.k, share == Share::kA ? Tile::kRows / 2 : Tile::kRows);
    const int columns = Tile::kSwiglu ? 128 : Tile::kColumns;  // per TMA copy
    maps.b = codes_map(p.b, p.k, share == Share::kB ? columns / 2 : columns);
    maps.stores_by_tma = result_map(p, maps.d);
    const int64_t tiles = tiles_at_most(p, Tile::kRows * (share == Share::kB ? 2 : 1),
                                        Tile::kColumns * (share == Share::kA ? 2 : 1));
    const int64_t clusters = std::min<int64_t>(tiles, chip.multiprocessors / cluster);
    const auto ctas = static_cast<unsigned>(clusters * cluster);
    const LaunchShape shape{ctas, Tile::kThreads, 0, stream, cluster};
    launch<fp8_gemm_sm90_kernel<Tile>, sizeof(HopperStorage<Tile>)>(shape, p, maps, share);
}

}  // namespace

void launch_fp8_gemm_sm90(const Fp8GemmParams& p, const GemmPlan& plan, const Chip& chip,
                          void* stream) {
    switch (plan.kernel) {
        case GemmKernel::kHopper128x128:
            return launch_tile<HopperTile128x128>(p, plan.share, chip, stream);
        case GemmKernel::kHopper128x192:
            return launch_tile<HopperTile128x192>(p, plan.share, chip, stream);
        case GemmKernel::kHopper256x128:
            return launch_tile<HopperTile256x128>(p, plan.share, chip, stream);
        case GemmKernel::kHopper64x256:
            return launch_tile<HopperTile64x256>(p, plan.share, chip, stream);
        case GemmKernel::kHopperPingPong:
            return launch_tile<HopperTilePingPong>(p, plan.share, chip, stream);
        case GemmKernel::kHopperSwiglu:
            return launch_tile<HopperTileSwiglu>(p, plan.share, chip, stream);
        default:
            return launch_tile<HopperTileFine>(p, plan.share, chip, stream);
    }
}

}  // namespace k2k
