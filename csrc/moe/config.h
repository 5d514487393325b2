#pragma once

// Tiles and grids, as pure functions of the sizes.

#include "common/dtypes.h"
#include "common/math.h"
#include "moe/params.h"

namespace k2k {

constexpr int kMostExperts = 1024;
constexpr int kMostTopK = 32;    // a token's pairs lie in the lanes of a warp
constexpr int kMostGroups = 32;  // and so do the router's groups

// A warp moves 512 neighbours of a row, 16 a lane: 1 KiB of bfloat16, enough for DRAM to stream.
// Blocks are only there to bring warps: 8 of them.
constexpr int kMoeThreads = 256;
constexpr int kMoeWarps = kMoeThreads / 32;
constexpr int kWarpColumns = 512;

// A block ranks 2,048 pairs, 8 rounds of its warps: a batch of Kimi-K2's top-8 up to 256 tokens,
// hence every decoding step, is one tile, which every block ranks for itself in the one launch
// there is. More tiles would be a longer scan, larger ones a longer tail of few blocks.
constexpr int kPlanTile = 2048;
constexpr int kPlanRounds = kPlanTile / kMoeThreads;

// One thread for each expert: the tiles' counts are added up by one block.
constexpr int kScanThreads = kMostExperts;

constexpr bool plans_in_one_launch(int64_t pairs) { return pairs <= kPlanTile; }

// Rows in pieces of a warp; a row without columns is one piece, because its slots are written too.
constexpr int64_t row_pieces(int64_t hidden) {
    return hidden > 0 ? ceil_div(hidden, kWarpColumns) : 1;
}

// Blocks that plan for themselves should all be resident: 132 SMs of 4. Others are as many as there
// are pieces; from 65,536 on they walk, and the tail of the last wave is short.
constexpr unsigned move_blocks(int64_t rows, int64_t hidden, int64_t most) {
    const int64_t blocks = ceil_div(rows * row_pieces(hidden), kMoeWarps);
    return static_cast<unsigned>(blocks < 1 ? 1 : blocks < most ? blocks : most);
}
constexpr int64_t kMostPlanningBlocks = 528;
constexpr int64_t kMostMovingBlocks = 65536;
// Rows of other ranks: how many there are only the device knows, and a block without any should not
// be started. Two waves of 132 SMs of 5.
constexpr int64_t kMostArrivedBlocks = 1320;
static_assert(move_blocks(0, 7168, kMostPlanningBlocks) == 1, "the plan of nothing is written too");
static_assert(move_blocks(128, 7168, kMostPlanningBlocks) == 224, "a decoding step: one wave");
static_assert(move_blocks(4096, 7168, kMostMovingBlocks) == 7168, "prefill");

// How many rows combine has in flight at once: 128 bytes a thread, 96 KiB on an SM of 3 blocks,
// where bandwidth x latency of DRAM ask for 20 to 36. The rest is for short batches, whose time is
// the number of trips. (test_machine_code.py holds the machine code to it.)
constexpr int rows_in_flight(Type type) { return type == Type::kF32 ? 2 : 4; }
constexpr int kCombineBlocks = 3;

// The gradient of combine: a block for each token, because its warps add up the dot products. As
// many warps as give each the same number of pieces.
constexpr unsigned gradient_warps(int64_t hidden) {
    const int64_t pieces = row_pieces(hidden);
    return static_cast<unsigned>(ceil_div(pieces, ceil_div(pieces, kMoeWarps)));
}
constexpr int64_t kMostGradientBlocks = 1584;  // 132 SMs of 3, four times over; then they go on
static_assert(gradient_warps(7168) == 7 && gradient_warps(512) == 1, "no idle warps");

// Router: a warp for each token, which holds its scores: a vector of 4 neighbours a lane, 128
// experts a vector, as often as the experts need. 3: Kimi-K2's 384; 2: DeepSeek-V3's 256. Few are
// held by so many registers that 4 blocks share a multiprocessor.
constexpr int kRouteThreads = 256;
constexpr int kRouteWarps = kRouteThreads / 32;
constexpr int route_vectors(int experts) {
    return experts <= 128 ? 1 : experts <= 256 ? 2 : experts <= 384 ? 3 : experts <= 512 ? 4 : 8;
}
constexpr int route_blocks_resident(int vectors) { return vectors <= 3 ? 4 : 2; }
// 132 SMs of 4; 4,096 tokens are one wave. Each block adds its counts to the others'.
constexpr int64_t kMostRouteBlocks = 528;
constexpr unsigned route_blocks(int64_t tokens) {
    const int64_t blocks = ceil_div(tokens, kRouteWarps);
    return static_cast<unsigned>(blocks < 1                  ? 1
                                 : blocks < kMostRouteBlocks ? blocks
                                                             : kMostRouteBlocks);
}

}  // namespace k2k
