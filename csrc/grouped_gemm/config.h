#pragma once

// Tiles of D, and which of them serves a product: pure functions of the sizes.

#include "common/math.h"
#include "grouped_gemm/params.h"

namespace k2k {

// A tile of D is cut among warps of 32 columns: 16 of them at a time are one ldmatrix of B, and 32
// one transposition in the quads before D is stored.
template <int kRows_, int kColumns_, int kDepth_, int kWarpRows_, int kStages_, int kBlocks_>
struct GroupedGemmTile {
    static constexpr int kRows = kRows_, kColumns = kColumns_;
    static constexpr int kDepth = kDepth_;  // of a stage
    static constexpr int kWarpRows = kWarpRows_, kWarpColumns = 32;
    static constexpr int kStages = kStages_;
    static constexpr int kBlocks = kBlocks_;  // on one multiprocessor
    static constexpr int kThreads = kRows / kWarpRows * (kColumns / kWarpColumns) * 32;
};
// 64 sums a lane and 24 words of operands leave room for two blocks, so that one's ends hide behind
// the other's products. Three stages of 16 KB on their way last the tensor cores of an A100 for
// 1,500 clocks, twice the latency of DRAM.
using GroupedGemmTile128 = GroupedGemmTile<128, 128, 32, 64, 4, 2>;
// Decoding: nearly all of a stage is weights, 16 of 18 KB, and the stages of two blocks keep 108 KB
// in flight, where bandwidth x latency of DRAM ask for 20 to 36 a multiprocessor.
using GroupedGemmTile16 = GroupedGemmTile<16, 128, 64, 16, 4, 2>;
static_assert(GroupedGemmTile128::kThreads == 256 && GroupedGemmTile16::kThreads == 128);

// Up to so many rows a group the small tile serves it: two tiles, the second of which finds the
// weights in L2; a large one would compute 128 rows for them. wgrad has large tiles only.
constexpr int64_t kFewRows = 32;
constexpr bool takes_few_rows(const GroupedGemmParams& p) {
    return p.kind != GroupedGemm::kWgrad && p.expected <= kFewRows * p.groups.number;
}

// Rows of tiles that blocks go down before they go one column on: 8 x 128 rows of A and as many
// columns' weights are 2 MB each for every 1,024 of the summed axis.
constexpr int kBandRows = 8;

// As many tiles as there can be, whatever stands in offsets and counts.
constexpr int64_t grouped_gemm_tiles(const GroupedGemmParams& p, int tile_rows, int tile_columns) {
    const int64_t row_tiles = ceil_div(p.rows, tile_rows);
    return (p.kind == GroupedGemm::kWgrad ? row_tiles * p.groups.number
                                          : row_tiles + p.groups.number) *
           ceil_div(p.columns, tile_columns);
}

}  // namespace k2k
