#pragma once

// Tiles of D and the choice between them: pure functions of the sizes.

#include "common/math.h"
#include "grouped_gemm/params.h"

namespace k2k {

// Warps of 32 columns divide a tile of D: 16 columns are one ldmatrix of B, and 32 one transpose in
// quads of lanes before D is stored.
template <int kRows_, int kColumns_, int kDepth_, int kWarpRows_, int kStages_, int kCtas_>
struct GroupedGemmTile {
    static constexpr int kRows = kRows_, kColumns = kColumns_;
    static constexpr int kDepth = kDepth_;  // elements of the summed axis per stage
    static constexpr int kWarpRows = kWarpRows_, kWarpColumns = 32;
    static constexpr int kStages = kStages_;
    static constexpr int kCtas = kCtas_;  // CTAs per SM
    static constexpr int kThreads = kRows / kWarpRows * (kColumns / kWarpColumns) * 32;
};
// 64 accumulators per lane and 24 words of operands allow two CTAs per SM, so that one's prologue
// and epilogue overlap the other's main loop. Three stages of 16 KB in flight feed the tensor cores
// of an A100 for 1,500 clocks, twice the latency of DRAM.
using GroupedGemmTile128 = GroupedGemmTile<128, 128, 32, 64, 4, 2>;
// Decoding: nearly all of a stage is weights, 16 of 18 KB. The stages of two CTAs keep 108 KB in
// flight; bandwidth x latency of DRAM needs 20 to 36 KB per SM.
using GroupedGemmTile16 = GroupedGemmTile<16, 128, 64, 16, 4, 2>;
static_assert(GroupedGemmTile128::kThreads == 256 && GroupedGemmTile16::kThreads == 128);

// The small tile serves up to so many rows per group: at most two tiles, the second of which finds
// the weights in L2; a large tile would compute 128 rows. wgrad has large tiles only.
constexpr int64_t kFewRows = 32;
constexpr bool takes_few_rows(const GroupedGemmParams& p) {
    return p.kind != GroupedGemm::kWgrad && p.expected <= kFewRows * p.groups.number;
}

// Tile rows of a band (rasterisation): the scheduler goes down 8 rows of tiles before it goes one
// column on. 8 x 128 rows of A and as many columns of weights are 2 MB each per 1,024 of the summed
// axis.
constexpr int kBandRows = 8;

// Upper bound of the number of tiles, for any offsets and counts.
constexpr int64_t grouped_gemm_tiles(const GroupedGemmParams& p, int tile_rows, int tile_columns) {
    const int64_t row_tiles = ceil_div(p.rows, tile_rows);
    return (p.kind == GroupedGemm::kWgrad ? row_tiles * p.groups.number
                                          : row_tiles + p.groups.number) *
           ceil_div(p.columns, tile_columns);
}

}  // namespace k2k
