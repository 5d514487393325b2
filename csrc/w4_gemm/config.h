#pragma once

// Tiles of D and the choice between them: pure functions of the sizes.

#include <algorithm>

#include "common/math.h"
#include "w4_gemm/params.h"

namespace k2k {

// A chunk of the packed weights: 64 rows x 64 of K. Codes of four blocks of 16 rows, then scales.
constexpr int kChunkRows = 64, kChunkDepth = 64, kChunkGroups = 2;  // groups of 32 share a scale
constexpr int kCodeBytes = kChunkRows * kChunkDepth / 2;

// The kinds: how the codes and scales of a chunk are read is in decode.cuh.
struct Int4 {
    static constexpr int kScaleBytes = 2;
};
struct Mxfp4 {
    static constexpr int kScaleBytes = 1;
};
template <class Kind>
constexpr int chunk_bytes = kCodeBytes + kChunkRows * kChunkGroups * Kind::kScaleBytes;

// kTokens rows of D by 128 rows of weights; four warps side by side, each with all tokens.
template <int kTokens_, int kSteps_, int kStages_, int kCtas_>
struct W4Tile {
    static constexpr int kTokens = kTokens_;
    static constexpr int kWeights = 128, kWarpWeights = 32;
    static constexpr int kSteps = kSteps_;  // of 64 of K per stage
    static constexpr int kDepth = kSteps * kChunkDepth;
    static constexpr int kStages = kStages_;
    static constexpr int kCtas = kCtas_;  // CTAs per SM, if its shared memory holds them
    static constexpr int kThreads = kWeights / kWarpWeights * 32;
};
// Decoding. Two stages of 9.2 KB of weights in each of four CTAs keep 74 KB in flight (37 KB on SMs
// with 100 KB of shared memory); bandwidth x latency of DRAM needs 20 to 36 KB per SM. 128 of K for
// a barrier: the fewer instructions beside decoding.
using W4Tile16 = W4Tile<16, 2, 3, 4>;
// 64 products of 16 x 8 x 16 for 64 decoded weights of a lane.
using W4Tile64 = W4Tile<64, 1, 3, 3>;

// The small tile serves up to so many rows per group on average. Each tile decodes its weights:
// with 17 rows, two small tiles take 280 issue slots for 64 of K, one large tile 231.
constexpr int64_t kFewTokens = 16;
constexpr bool takes_few_tokens(const W4GemmParams& p) {
    return p.expected <= kFewTokens * p.groups.number;
}

// Tile rows of a band (rasterisation), as in grouped_gemm: 8 rows of tiles down, then one column on.
constexpr int kW4BandRows = 8;

// Upper bound of the number of tiles, for any offsets and counts.
constexpr int64_t w4_gemm_tiles(const W4GemmParams& p, int tokens, int weights) {
    return (ceil_div(p.rows, tokens) + p.groups.number) *
           ceil_div(p.chunk_rows * kChunkRows, weights);
}

// CTAs of a tile that an SM holds: a CTA takes 1 KB of shared memory more than it asks for.
template <class Tile>
int w4_gemm_resident(int64_t storage_bytes, int64_t most_shared) {
    const int64_t held = (most_shared + 1024) / (storage_bytes + 1024);
    return static_cast<int>(std::clamp<int64_t>(held, 1, Tile::kCtas));
}

}  // namespace k2k
