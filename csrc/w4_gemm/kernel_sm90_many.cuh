#pragma once

// Products of tokens with packed 4-bit weights for sm_90a and many rows per group:
//
//     D[s, n] = sum over k of A[s, k] W[g, n, k]            s: the slots of group g
//     D[s, i] = silu(gate[s, i]) * up[s, i]                 with SwiGLU: gate and up, rounded to
//                                                           bf16, are the products of W's halves
//     W = bf16(q * s), rounded once
//
// Weights are A of wgmma, 64 rows a warpgroup, and come from registers; the tokens are B, N of them,
// and come from shared memory.
//
// Grid      One persistent CTA per SM; CTA i takes tiles i, i + grid, ... of the tile scheduler
//           tile/group_tiles.cuh, 256 tokens x 128 rows of weights. At a group's end a tile has
//           64, 128, 192 or 256 tokens (N), as many as hold its rows.
// Roles     warps 0 to 3   consumer warpgroup 0: rows 0 .. 63 of weights of the tile, N tokens
//           warps 4 to 7   consumer warpgroup 1: rows 64 .. 127
//           warp 8         tile scheduler and producer: TMA copies of tokens, bulk copies of weights
//           warps 9 to 11  idle: setmaxnreg applies to whole warpgroups
// Stage     64 of K: up to four boxes of 64 tokens x 128 bytes with the 128-byte swizzle, and two
//           chunks of packed weights as they lie in memory. With the first stage of a tile comes its
//           description; one without tokens ends the kernel.
// Weights   A lane reads the codes of 64 of K for its two rows as 16 bytes, their scales as 8 bytes
//           (int4) or 4, and decodes them into 16 registers: the A operands of four wgmma of 16 of
//           K. There are two sets of these registers: one is decoded while the wgmma of the other
//           run.
//
//               tensor cores        stage 0   stage 1   stage 2  ...
//               issue    decode 0 | decode 1 | decode 2 | ...
//
//   barrier      arrivals                              bytes               waiters
//   full[s]      warp 8 once                           tokens, weights     warps 0 to 7
//   empty[s]     warps 0 to 7, when the stage's        -                   warp 8
//                products are complete
//   named        1 + warpgroup: 128 threads, once per 64 tokens: the panel is written
//   s: stage
//
// Gated     blocks of 16 rows are 8 of gate and 8 of up: a lane has gate i and up i of its tokens.
// Order     of a sum: 16 of K at a time, from the first on: that of the portable kernel.
// Edges     K behind the end: tokens are zeros (TMA), and so are packed weights. Tokens behind the
//           group's end belong to other groups or to none; each one reaches its own row of D alone,
//           which is not stored. A chunk behind the last row of weights is the last one again.
// Epilogue  64 tokens at a time, the same code for every N. A warp transposes its 16 rows of weights by stmatrix into the
//           warpgroup's panel, [64 tokens][64 columns of D, or 32 of SwiGLU], rows swizzled; behind
//           the barrier the threads store rows of D, 16 bytes each. Two panels take turns: one is
//           written again behind the next barrier, which its readers have passed.
// Registers 168 per thread at launch; setmaxnreg: consumers 240 (sums 128, weights 2 x 16), the other
//           warps 24.
// Shared    five stages of 32 KB of tokens and 4.5 KB (int4; mxfp4 4.25) of weights, 32 KB of
//           panels: 215 KB of 227.
// Cost      of 64 of K of a tile, by 256 tokens: 4.2 MFLOP, 1,024 clocks at 4,096 FLOPs per clock.
//           36.5 KB from L2, 37 bytes per clock. Shared memory: wgmma reads 64 KB, 36.5 KB arrive:
//           800 clocks at 128 bytes. All are estimates.
// Issue     a consumer warp issues at most 172 instructions (int4) or 192 (mxfp4) for 128 of K, 88 or
//           104 of them to decode: of 2,048 tensor clocks for 256 tokens (512 for 64), two warps a
//           scheduler take 16 to 19 % of the slots.
// Limits    rows of A begin at multiples of 16 bytes and share no memory; K is a multiple of 32;
//           bf16.

#include "arch/control.cuh"
#include "arch/matrix.cuh"
#include "arch/smem.cuh"
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "tile/group_tiles.cuh"
#include "tile/ring.cuh"
#include "tile/swizzle.cuh"
#include "w4_gemm/decode.cuh"
#include "w4_gemm/swiglu.cuh"

namespace k2k {

struct ManyTile {
    int first;   // its first row, in A and D
    int tokens;  // rows; 0: no more tiles
    int column;  // the first, of D
};

template <class Kind>
struct ManyStorage {
    using Panel = uint8_t[kTokenBlock * 128];

    // [stage][64 tokens each][64 of K]
    tile::SwizzledBox<kTokenBlock> tokens[kManyStages][kManyTokens / kTokenBlock];
    alignas(1024) Panel panels[2][2];                    // [warpgroup]
    uint8_t weights[kManyStages][2][chunk_bytes<Kind>];  // [stage][warpgroup]
    ManyTile tiles[kManyStages];                         // in a tile's first stage
    arch::Mbarrier full[kManyStages], empty[kManyStages];
};

using ManyStage = tile::RingPosition<kManyStages>;

// ---- warp 8: tile scheduler and producer

template <class Kind, bool kSwiglu>
K2K_DEVICE void load_many(ManyStorage<Kind>& smem, const W4GemmParams& p,
                          const arch::TensorMap& tokens) {
    constexpr int kRatio = kSwiglu ? 2 : 1;  // rows of weights for a column of D
    constexpr int kBytes = chunk_bytes<Kind>;
    const bool leader = arch::elect_one();
    tile::GroupTiles tiles({p.groups, p.rows, p.columns, p.depth}, kManyTokens,
                           kManyWeights / kRatio, kManyBandRows);
    ManyStage stage;
    for (int index = blockIdx.x;; index += gridDim.x) {
        // Find the next tile of this CTA from the groups' sizes in device memory.
        tile::GroupTile tile = {};
        const bool more = tiles.find(index, tile);
        if (leader) {
            // Describe it in its first stage, once that is free.
            const int behind = more ? tile.rows - tile.row : 0;
            const int left = behind < kManyTokens ? behind : kManyTokens;
            const int first = static_cast<int>(tile.first_row) + tile.row;
            arch::mbarrier_wait(smem.empty[stage.slot], stage.parity ^ 1);
            smem.tiles[stage.slot] = {first, left, tile.column};
            if (!more) arch::mbarrier_arrive(smem.full[stage.slot]);
            // Load its stages.
            const int rows = static_cast<int>(p.chunk_rows), chunk = tile.column * kRatio / 64;
            const int64_t row_bytes = p.chunk_columns * kBytes;
            const uint8_t* weights = p.w + (int64_t(tile.group) * rows + chunk) * row_bytes;
            const int64_t below = chunk + 1 < rows ? row_bytes : 0;
            const uint32_t bytes =
                ceil_div(left, kTokenBlock) * sizeof(smem.tokens[0][0]) + 2 * kBytes;
            const int end = more ? static_cast<int>(p.depth) : 0;
            for (int k = 0; k < end; k += kChunkDepth, stage.advance()) {
                // Wait until both warpgroups have released the stage; start its copies.
                arch::Mbarrier& full = smem.full[stage.slot];
                arch::mbarrier_wait(smem.empty[stage.slot], stage.parity ^ 1);
                arch::mbarrier_arrive_expect_tx(full, bytes);
                auto& chunks = smem.weights[stage.slot];
                arch::bulk_load(chunks[0], weights, kBytes, full);
                arch::bulk_load(chunks[1], weights + below, kBytes, full);
                weights += kBytes;
                for (int row = 0; row < left; row += kTokenBlock) {
                    arch::tma_load_2d(&smem.tokens[stage.slot][row / kTokenBlock], tokens, full, k,
                                      first + row);
                }
            }
        }
        arch::sync_warp();
        if (!more) return;
    }
}

// ---- warps 0 to 7: consumers

// The weights of a lane, 64 of K, as A operands of 16 of K each.
using ManyWeights = uint32_t[kChunkDepth / 16][4];

template <class Kind>
K2K_DEVICE void decode_weights(ManyWeights& weights, const uint8_t* codes, const uint8_t* scales) {
    const uint4 four = *reinterpret_cast<const uint4*>(codes);
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
    W4Scales of_words;
    read_scales<Kind>(of_words, scales);
    K2K_UNROLL
    for (int step = 0; step < kChunkDepth / 16; ++step) {
        const int group = step / 2;
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int row = i % 2;
            weights[step][i] = decode_pair<Kind>(words[2 * row + group], step % 2 * 2 + i / 2,
                                                 of_words[row][group]);
        }
    }
}

// Main loop of a tile: sums += W A^T for the warpgroup's 64 rows of weights and kTokens tokens.
template <class Kind, int kTokens>
K2K_DEVICE void multiply_many(float (&all_sums)[kManyTokens / 2], ManyStorage<Kind>& smem,
                              ManyStage& at, int warpgroup, int depth) {
    auto& sums = reinterpret_cast<float (&)[kTokens / 2]>(all_sums);
    constexpr uint32_t kStageBytes = sizeof(smem.weights[0]);
    const int lane = arch::lane_id(), block = arch::warp_id() % 4;
    // In the first stage.
    const uint8_t* packed = smem.weights[0][0];
    const uint32_t chunk = warpgroup * chunk_bytes<Kind>;
    const uint32_t codes = arch::kept(chunk + (block * 32 + lane) * 16);
    const uint32_t scales =
        arch::kept(chunk + kCodeBytes + (block * 8 + lane / 4) * 4 * Kind::kScaleBytes);
    const uint64_t tokens =
        arch::matrix_descriptor(smem.tokens, arch::Swizzle::k128, 0, 8 * kChunkDepth * 2);
    ManyWeights weights[2];
    // By shuffle: in uniform registers, as are descriptors made of it.
    ManyStage stage{arch::shuffle(at.slot, 0), arch::shuffle(at.parity, 0)};
    int before = 0;  // the slot of the last stage, whose products are still running

    const auto step = [&](ManyWeights& of_stage, bool is_first) {
        // Wait for the stage; decode its weights.
        arch::mbarrier_wait(smem.full[stage.slot], stage.parity);
        decode_weights<Kind>(of_stage, packed + (codes + stage.slot * kStageBytes),
                             packed + (scales + stage.slot * kStageBytes));
        // Multiply: 64 rows of weights x kTokens, four wgmma of 16 of K.
        const uint64_t of_tokens =
            tokens + uint32_t(stage.slot) * arch::descriptor_step(sizeof(smem.tokens[0]));
        arch::wgmma_fence();
        K2K_UNROLL
        for (int i = 0; i < kChunkDepth / 16; ++i) {
            arch::wgmma_rs<bf16, kTokens>(sums, of_stage[i],
                                          of_tokens + i * arch::descriptor_step(32), true);
        }
        arch::wgmma_commit();
        // Wait for the products of the stage before; release it.
        arch::wgmma_wait<1>();
        arch::sync_warp();
        if (lane == 0 && !is_first) arch::mbarrier_arrive(smem.empty[before]);
        before = stage.slot;
        stage.advance();
    };
    for (int k = 0;; k += 2 * kChunkDepth) {
        step(weights[0], k == 0);
        if (k + kChunkDepth >= depth) break;
        step(weights[1], false);
        if (k + 2 * kChunkDepth >= depth) break;
    }
    arch::wgmma_wait<0>(sums);
    tile::warp_arrive(smem.empty[before]);
    at = stage;
}

// Rounds the sums of 64 tokens, applies SwiGLU, and stores the first `tokens` of them from row
// `first`, column `column` of D on, those of the warpgroup, through its `panel`.
template <bool kSwiglu>
K2K_DEVICE void store_tokens(const W4GemmParams& p, const float* sums, uint8_t* panel,
                             int warpgroup, int first, int tokens, int column) {
    constexpr int kPitch = kSwiglu ? 64 : 128, kChunks = kPitch / 16;  // of a row of the panel
    const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    // Write the panel, per stmatrix 16 rows of weights x 16 tokens of a warp; of SwiGLU 8 columns x
    // 32 tokens.
    const int at_token = kSwiglu ? lane : lane / 16 * 8 + lane % 8;
    const int at_chunk = kSwiglu ? warp : 2 * warp + lane / 8 % 2;
    const uint32_t to = arch::smem_address(panel + tile::chunk_offset<kPitch>(at_token, at_chunk));
    K2K_UNROLL
    for (int token = 0; token < kTokenBlock; token += kSwiglu ? 32 : 16) {
        uint32_t words[4];  // of two neighbouring tokens each
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            if constexpr (kSwiglu) {
                const float* four = sums + (token / 8 + i) * 4;
                words[i] = swiglu_pair(four, four + 2);
            } else {
                const float* two = sums + token / 2 + 2 * i;
                words[i] = arch::pack_bf16(two[0], two[1]);
            }
        }
        arch::stmatrix<4, /*kTransposed=*/true>(words, to + token * kPitch);
    }
    arch::barrier_sync(1 + warpgroup, 128);
    // Store rows of D, kChunks lanes each; element by element at its edge, or if they are not
    // aligned.
    constexpr int kRows = 128 / kChunks;  // at a time
    const int row = thread / kChunks, chunk = thread % kChunks;
    column += 8 * chunk;
    tokens -= row;
    const uint8_t* from = panel + tile::chunk_offset<kPitch>(row, chunk);
    bf16* d = p.d + (first + row) * p.d_row_stride + column;
    const int64_t left = p.columns - column, step = kRows * p.d_row_stride;
    if (left >= 8 && p.d_row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(p.d) % 16 == 0) {
        K2K_UNROLL
        for (int i = 0; i < kTokenBlock / kRows; ++i, d += step) {
            const uint4 eight = *reinterpret_cast<const uint4*>(from + i * kRows * kPitch);
            if (i * kRows < tokens) arch::store(reinterpret_cast<uint4*>(d), eight);
        }
    } else {
        K2K_NO_UNROLL
        for (int i = 0; i * kRows < tokens && i * kRows < kTokenBlock; ++i, d += step) {
            const auto* eight = reinterpret_cast<const bf16*>(from + i * kRows * kPitch);
            K2K_NO_UNROLL
            for (int j = 0; j < 8 && j < left; ++j) d[j] = eight[j];
        }
    }
}

template <class Kind, bool kSwiglu>
K2K_DEVICE void multiply_tiles(ManyStorage<Kind>& smem, const W4GemmParams& p, int warpgroup) {
    const int depth = static_cast<int>(p.depth);
    uint32_t panel = 0;  // 0 or 1: the one that is written next
    ManyStage stage;
    for (;;) {
        arch::mbarrier_wait(smem.full[stage.slot], stage.parity);
        const ManyTile tile = smem.tiles[stage.slot];
        const int tokens = arch::shuffle(tile.tokens, 0);
        if (tokens == 0) return;
        // Main loop, with as many tokens as hold the tile's.
        float sums[kManyTokens / 2];
        K2K_UNROLL
        for (float& sum : sums) sum = 0;
        if (tokens <= 64) {
            multiply_many<Kind, 64>(sums, smem, stage, warpgroup, depth);
        } else if (tokens <= 128) {
            multiply_many<Kind, 128>(sums, smem, stage, warpgroup, depth);
        } else if (tokens <= 192) {
            multiply_many<Kind, 192>(sums, smem, stage, warpgroup, depth);
        } else {
            multiply_many<Kind, 256>(sums, smem, stage, warpgroup, depth);
        }
        // Epilogue, 64 tokens at a time, whose sums move to the front: constant register indices.
        const int column = tile.column + warpgroup * (kSwiglu ? 32 : 64);
        K2K_NO_UNROLL
        for (int token = 0; token < tokens; token += kTokenBlock) {
            store_tokens<kSwiglu>(p, sums, smem.panels[warpgroup][panel], warpgroup,
                                  tile.first + token, tokens - token, column);
            panel ^= 1;
            K2K_UNROLL
            for (int i = 0; i < (kManyTokens - kTokenBlock) / 2; ++i) {
                sums[i] = sums[i + kTokenBlock / 2];
            }
        }
    }
}

// ---- the kernel

template <class Kind, bool kSwiglu>
__global__ void __launch_bounds__(kManyThreads, 1)
    w4_gemm_sm90_many_kernel(const __grid_constant__ W4GemmParams p,
                             const __grid_constant__ arch::TensorMap tokens) {
    using Storage = ManyStorage<Kind>;
    Storage& smem = arch::shared_storage<Storage>();
    // By shuffle, so that the compiler keeps it in a uniform register.
    const int warp = arch::shuffle(static_cast<int>(arch::warp_id()), 0);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kManyStages; ++stage) {
            arch::mbarrier_init(smem.full[stage], 1);
            arch::mbarrier_init(smem.empty[stage], 8);
        }
        arch::fence_mbarrier_init();
        arch::tma_prefetch(tokens);
    }
    arch::sync_block();

    // Roles.
    if (warp < 8) {
        arch::registers_increase<240>();
        multiply_tiles<Kind, kSwiglu>(smem, p, warp / 4);
    } else {
        arch::registers_decrease<24>();
        if (warp == 8) load_many<Kind, kSwiglu>(smem, p, tokens);
    }
}

}  // namespace k2k
