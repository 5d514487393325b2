#pragma once

// What the two kernels for sm_90a share: the queue of tiles between the scheduler warp and the
// other warps, positions in the ring of stages, scales, promotion.

#include "arch/cp_async.cuh"
#include "arch/tma.cuh"
#include "fp8_gemm/config.h"
#include "fp8_gemm/epilogue.cuh"
#include "tile/ring.cuh"

namespace k2k {

struct HopperMaps {
    arch::TensorMap a, b;  // [matrices, rows, K]
    arch::TensorMap d;     // [matrices, rows, columns], if `stores_by_tma`
    bool stores_by_tma;
};

// Length of the queue of tiles. If K is short, the stages hold parts of several tiles.
constexpr int kTilesAhead = 4;

// Named barriers (bar.sync); 0 is sync_block's.
enum NamedBarrier : int {
    kWarpgroupBarrier = 1,  // + warpgroup, 128 threads: panel of D is free; is written; K cleared
    kSwigluBarrier = 3,     // + warp % 4, 64 threads, a warp of each warpgroup: half written; read
};

// Waits for the scheduler's next tile; false if there is none.
template <class Storage>
K2K_DEVICE bool has_tile(Storage& smem, const tile::RingPosition<kTilesAhead>& at) {
    arch::mbarrier_wait(smem.found[at.slot], at.parity);
    return smem.tiles[at.slot].group >= 0;
}

// Releases the tile's slot in the queue; every warp that waits for tiles calls it once per tile.
template <class Storage>
K2K_DEVICE void leave_tile(Storage& smem, tile::RingPosition<kTilesAhead>& at) {
    tile::warp_arrive(smem.used[at.slot]);
    at.advance();
}

// Starts the copy of a scale; writes zero if it is not `valid`. `any` is a valid address for copies
// that read nothing.
K2K_DEVICE void load_scale(float& target, const float* source, bool valid, const float* any) {
    arch::cp_async<4>(arch::smem_address(&target), valid ? source : any, valid);
}

// A warp must not exit before its copies have landed.
K2K_DEVICE void finish_scales() {
    arch::cp_async_commit();
    arch::cp_async_wait<0>();
}

// result += sum * (a_scale * b_scale), with a scale for each of the lane's two rows (a_scale) and
// one per column (b_scales, from the lane's first column on).
template <int kValues>
K2K_DEVICE void promote(float (&result)[kValues], const float (&sum)[kValues], float2 a_scale,
                        const float* b_scales) {
    K2K_UNROLL
    for (int j = 0; j < kValues / 4; ++j) {
        const float2 b = *reinterpret_cast<const float2*>(b_scales + 8 * j);
        result[4 * j] = fmaf(sum[4 * j], a_scale.x * b.x, result[4 * j]);
        result[4 * j + 1] = fmaf(sum[4 * j + 1], a_scale.x * b.y, result[4 * j + 1]);
        result[4 * j + 2] = fmaf(sum[4 * j + 2], a_scale.y * b.x, result[4 * j + 2]);
        result[4 * j + 3] = fmaf(sum[4 * j + 3], a_scale.y * b.y, result[4 * j + 3]);
    }
}

}  // namespace k2k
