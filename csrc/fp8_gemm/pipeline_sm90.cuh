#pragma once

// What the two kernels for sm_90a share: a warp that finds tiles and tells the others, stages of a
// pipeline, scales, promotion.

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

// Tiles that warp 0 may find before the first is finished: stages hold parts of several where K is
// short.
constexpr int kTilesAhead = 4;

// Waits for the next tile; false behind the last one.
template <class Storage>
K2K_DEVICE bool has_tile(Storage& smem, const tile::RingPosition<kTilesAhead>& at K2K_WHERE) {
    arch::mbarrier_wait(smem.found[at.slot], at.parity K2K_PASS_WHERE);
    return smem.tiles[at.slot].group >= 0;
}

// This warp needs the tile no more.
template <class Storage>
K2K_DEVICE void leave_tile(Storage& smem, tile::RingPosition<kTilesAhead>& at K2K_WHERE) {
    tile::warp_arrive(smem.used[at.slot] K2K_PASS_WHERE);
    at.advance();
}

// Copies a scale, or zero in the place of one that is not `valid`.
K2K_DEVICE void load_scale(float& target,
                           const float* source,
                           bool valid,
                           const float* any K2K_WHERE) {
    arch::cp_async<4>(arch::smem_address(&target), valid ? source : any, valid K2K_PASS_WHERE);
}

// The warp that copies scales does not end before its copies have.
K2K_DEVICE void finish_scales(K2K_WHERE_ONLY) {
    arch::cp_async_commit(K2K_PASS_WHERE_ONLY);
    arch::cp_async_wait<0>(K2K_PASS_WHERE_ONLY);
}

// result += sum * (a_scale * b_scale): a scale for each of this lane's two rows and for each
// column, the first being the lane's.
template <int kValues>
K2K_DEVICE void promote(float (&result)[kValues],
                        const float (&sum)[kValues],
                        float2 a_scale,
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
