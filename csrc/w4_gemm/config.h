#pragma once

// Tiles of D and the choice between them: pure functions of the sizes.

#include <algorithm>

#include "common/chip.h"
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
struct Int4Wide {  // the scales as they are; served by the portable kernel alone
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

// ---- kernel for sm_90a and many rows per group: tiles of up to 256 tokens, by 64, x 128 rows of
// weights; two warpgroups of 64 rows of weights each.
constexpr int kTokenBlock = 64, kManyTokens = 256, kManyWeights = 128;
// Of 227 KB: five stages of 36.5 KB, 32 KB of D.
constexpr int kManyStages = 5;
constexpr int kManyThreads = 384;
// Tile rows of a band: 132 tiles at a time read 1,024 tokens and 33 x 128 rows of weights, 2.3 KB per
// step of K for each, which is near the least.
constexpr int kManyBandRows = 4;
// It serves more rows per group than this on average.
constexpr int64_t kNotManyTokens = 64;
constexpr bool takes_many_tokens(const W4GemmParams& p, const Chip& chip) {
    return chip.capability == 90 && p.expected > kNotManyTokens * p.groups.number;
}

// Upper bound of the number of tiles, for any offsets and counts.
constexpr int64_t w4_gemm_tiles(const W4GemmParams& p, int tokens, int weights) {
    return (ceil_div(p.rows, tokens) + p.groups.number) *
           ceil_div(p.chunk_rows * kChunkRows, weights);
}

// ---- sm_90a, few rows: 64 rows of weights for each warpgroup by 8 to 64 tokens

// A stage has kChunks chunks along K of each warpgroup's weights, and the tokens' part of K.
template <int kTokens_, int kWarpgroups_, int kChunks_, int kStages_, int kCtas_>
struct FewTile {
    static constexpr int kTokens = kTokens_;
    static constexpr int kWarpgroups = kWarpgroups_, kWeights = kWarpgroups * kChunkRows;
    static constexpr int kChunks = kChunks_, kDepth = kChunks * kChunkDepth;
    static constexpr int kStages = kStages_;
    static constexpr int kCtas = kCtas_;                  // per SM
    static constexpr int kConsumers = kWarpgroups * 128;  // threads
    static constexpr int kThreads = kConsumers + 32;      // and a producer warp
    static constexpr int kSharedMost = 228 * 1024 / kCtas - 1024;
};
// Each tile of weights reads its tokens again. From L2 an SM gets about 46 bytes a clock, of which
// 21 are the weights at the full rate of an H200's HBM: so at least three rows of weights a token.
using FewTile8 = FewTile<8, 1, 4, 5, 3>;
using FewTile32 = FewTile<32, 2, 2, 5, 2>;
using FewTile64 = FewTile<64, 4, 4, 3, 1>;

// How the kernel for few rows cuts K: into as many parts as keep the CTAs of all groups' weights
// below two an SM of an H100 or H200, of at least 512 of K each. A function of the number of groups
// and of N and K alone: a row's bits do not depend on its batch, nor on the GPU.
constexpr int kMostW4Split = 4;
constexpr int w4_split(int64_t groups, int64_t chunk_rows, int64_t chunk_columns) {
    int split = 1;
    while (split < kMostW4Split && groups * chunk_rows * 2 * split <= 2 * 132 &&
           chunk_columns >= 2 * split * 8) {
        split *= 2;
    }
    return split;
}
static_assert(w4_split(1, 4096 / 64, 7168 / 64) == 4 && w4_split(1, 7168 / 64, 2048 / 64) == 2);
static_assert(w4_split(2, 7168 / 64, 2048 / 64) == 1 && w4_split(8, 4096 / 64, 7168 / 64) == 1);

// Whether that kernel serves a call: up to 64 rows a group on average (above, a tile of more tokens
// decodes its weights less often), and whenever K is cut, so that all calls cut it.
constexpr bool takes_few_rows(const W4GemmParams& p) {
    return p.split > 1 || p.expected <= 64 * p.groups.number;
}

// Whether a tile of so many tokens has room for the rows of most groups. Of one group the estimate
// is exact, of several a group may have twice the average.
constexpr bool holds_most_groups(const W4GemmParams& p, int tokens) {
    return p.expected * (p.groups.number > 1 ? 2 : 1) <= tokens * p.groups.number;
}

// CTAs of a tile that an SM holds: a CTA takes 1 KB of shared memory more than it asks for.
template <class Tile>
int w4_gemm_resident(int64_t storage_bytes, int64_t most_shared) {
    const int64_t held = (most_shared + 1024) / (storage_bytes + 1024);
    return static_cast<int>(std::clamp<int64_t>(held, 1, Tile::kCtas));
}

}  // namespace k2k
