#pragma once

// Tiles and grids: pure functions of the sizes.

#include <algorithm>

#include "common/dtypes.h"
#include "common/math.h"
#include "moe/params.h"

namespace k2k {

constexpr int kMostExperts = 1024;
constexpr int kMostTopK = 32;    // a lane per pair of a token
constexpr int kMostGroups = 32;  // a lane per group of the router

// A warp moves 512 contiguous elements of a row, 16 per lane: 1 KiB of bfloat16, enough for DRAM to
// stream. A CTA has 8 independent warps.
constexpr int kMoeThreads = 256;
constexpr int kMoeWarps = kMoeThreads / 32;
constexpr int kWarpColumns = 512;

// A CTA ranks 2,048 pairs, 8 rounds of its warps. Up to 256 tokens of Kimi-K2's top-8, hence in
// every decoding step, there is one tile, which every CTA ranks for itself in a single launch.
// Smaller tiles would make the scan longer, larger ones leave few CTAs.
constexpr int kPlanTile = 2048;
constexpr int kPlanRounds = kPlanTile / kMoeThreads;

// A thread per expert: one CTA adds the counts of the tiles.
constexpr int kScanThreads = kMostExperts;

constexpr bool plans_in_one_launch(int64_t pairs) { return pairs <= kPlanTile; }

// Pieces of a row, one per warp; a row without columns is one piece, because its slots are written.
constexpr int64_t row_pieces(int64_t hidden) {
    return hidden > 0 ? ceil_div(hidden, kWarpColumns) : 1;
}

// CTAs that plan for themselves should all be resident: 4 on 132 SMs. Else there are enough for all
// pieces, up to 65,536; beyond, grid-stride, and the last wave is short.
constexpr unsigned move_blocks(int64_t rows, int64_t hidden, int64_t most) {
    const int64_t blocks = ceil_div(rows * row_pieces(hidden), kMoeWarps);
    return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, most));
}
constexpr int64_t kMostPlanningBlocks = 528;
constexpr int64_t kMostMovingBlocks = 65536;
// Rows of other ranks: the host does not know their number, and a CTA without rows should not be
// started. Two waves of 5 CTAs on 132 SMs.
constexpr int64_t kMostArrivedBlocks = 1320;
static_assert(move_blocks(0, 7168, kMostPlanningBlocks) == 1, "the plan of nothing is written too");
static_assert(move_blocks(128, 7168, kMostPlanningBlocks) == 224, "a decoding step: one wave");
static_assert(move_blocks(4096, 7168, kMostMovingBlocks) == 7168, "prefill");

// Rows that combine has in flight: 128 bytes per thread, 96 KiB on an SM with 3 CTAs; bandwidth x
// latency of DRAM needs 20 to 36. The rest serves short batches, which are bound by the number of
// dependent rounds. (test_machine_code.py checks it in the machine code.)
constexpr int rows_in_flight(Type type) { return type == Type::kF32 ? 2 : 4; }
constexpr int kCombineBlocks = 3;

// The gradient of combine: a CTA per token, whose warps add their dot products. As many warps as
// give each the same number of pieces.
constexpr unsigned gradient_warps(int64_t hidden) {
    const int64_t pieces = row_pieces(hidden);
    return static_cast<unsigned>(ceil_div(pieces, ceil_div(pieces, kMoeWarps)));
}
constexpr int64_t kMostGradientBlocks = 1584;  // four waves of 3 CTAs on 132 SMs; then grid-stride
static_assert(gradient_warps(7168) == 7 && gradient_warps(512) == 1, "no idle warps");

// Router: a warp per token has its scores in registers, in vectors of 4 contiguous experts per
// lane, 128 per warp: 3 for Kimi-K2's 384 experts, 2 for DeepSeek-V3's 256. Up to 3, registers
// allow 4 CTAs per SM.
constexpr int kRouteThreads = 256;
constexpr int kRouteWarps = kRouteThreads / 32;
constexpr int route_vectors(int experts) {
    return experts <= 128 ? 1 : experts <= 256 ? 2 : experts <= 384 ? 3 : experts <= 512 ? 4 : 8;
}
constexpr int route_blocks_resident(int vectors) { return vectors <= 3 ? 4 : 2; }
// 4 CTAs on 132 SMs; 4,096 tokens are one wave. Each CTA adds its counts to the global ones.
constexpr int64_t kMostRouteBlocks = 528;
constexpr unsigned route_blocks(int64_t tokens) {
    return static_cast<unsigned>(
        std::clamp<int64_t>(ceil_div(tokens, kRouteWarps), 1, kMostRouteBlocks));
}

}  // namespace k2k
