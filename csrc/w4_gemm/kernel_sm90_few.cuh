#pragma once

// Products of tokens with packed 4-bit weights on sm_90a, for few tokens of a group:
//
//     D[s, n] = sum over k of A[s, k] W[g, n, k]            s: the slots of group g
//     D[s, i] = silu(gate[s, i]) * up[s, i]                 with SwiGLU: gate and up, rounded to
//                                                           bf16, are the products of W's halves
//     W = bf16(q * s), rounded once
//
// The kernel is bound by reading W, and nearly as much by the instructions that decode it. wgmma
// computes the transpose: W is the operand with 64 rows, which may come from registers, where it is
// decoded; the tokens are the operand that may be as narrow as 8.
//
// Grid      Persistent clusters of `split` CTAs, as many as fit. Cluster i takes tiles (64 rows of W
//           for each warpgroup x kTokens of A) i, i + clusters, ... of tile/group_tiles.cuh, which
//           reads the groups' sizes on the device; each of its CTAs has a part of K (split-K).
// Roles     consumer warpgroups  side by side in rows of W: decode, wgmma, epilogue
//           a producer warp      tile scheduler; copies of A (TMA) and W (bulk)
// Stage     64 kChunks of K. A: [32 of K][tokens][32] by one TMA box, rows of 64 bytes with the
//           64-byte swizzle: its third axis are the groups of 32 of K, so that what lies behind K
//           becomes zeros for any K. W: kChunks packed chunks for each warpgroup as they lie in
//           memory, one contiguous copy. The producer warp issues two or more copies a stage: its
//           instructions take slots from the consumer warps beside it.
// Weights   A lane reads the codes of a chunk's 16 rows x 64 of K that its A fragments need as 16
//           bytes (LDS.128), the scales of its two rows as 8 bytes (int4) or 4.
// Overlap   Two sets of fragments, of 64 of K each: one is decoded while the products of the other
//           run (wgmma_wait<1>). A stage is released when the first products of the next have been
//           issued: then its last are done.
//
//               decode 0 | wgmma 0            | wgmma 2            ...
//                        | decode 1 | wgmma 1 | decode 2 ...
//
// Gated     blocks of 16 rows are 8 of gate and 8 of up: a lane has gate i in row g, up i in row
//           g + 8 of its accumulators.
// Split     Each CTA leaves its sums in its shared memory. CTA r adds all parts, in the order of
//           ranks, for the rows of 4 / split warps of each warpgroup, through distributed shared
//           memory; these warps store.
//
//   barrier      arrivals                                   bytes     waiters
//   full[s]      producer                                   A and W   consumer warps
//   empty[s]     consumer warps                             -         producer
//   found[t]     producer                                   -         consumer warps
//   used[t]      consumer warps                             -         producer
//   parts_ready  a thread of each CTA, publishing its part  -         consumer warps
//   parts_read   a thread of each CTA                       -         consumer warps
//   named        kPartBarrier, consumer warps: the part is written; the parts are read
//   s: stage; t: slot of the tile queue
//
// Order     of a sum: 16 of K at a time, from the first on, in any tile: the bits of the portable
//           kernel. With split > 1: so inside a part, then the parts: the same bits from call to
//           call and in any batch, but not those of the other kernels.
// Edges     Tokens outside a group are multiplied (a column of wgmma's result depends on its token
//           alone) and not stored; those outside A are zeros. Warpgroups behind the last row of W
//           compute with what lies in their stage, and store nothing.
// Issue     of a consumer warp for 8,192 weights, 64 for each lane: 143 to 169 instructions (int4), 161
//           to 189 (mxfp4).
// Registers 96 with the tiles of 32 and 64 tokens: nine warps, or 17, leave no more to a quarter of
//           an SM; 128 with that of 8.
// Limits    rows of A begin at multiples of 16 bytes, at different addresses; K is a multiple of 32,
//           above 0; bf16.

#include "arch/cluster.cuh"
#include "arch/fence.cuh"
#include "arch/smem.cuh"
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "tile/group_tiles.cuh"
#include "tile/ring.cuh"
#include "w4_gemm/decode.cuh"
#include "w4_gemm/swiglu.cuh"

namespace k2k {

constexpr int kGroupDepth = kChunkDepth / kChunkGroups;  // of K that share a scale, and a TMA row
constexpr int kFewTilesAhead = 4;                        // length of the queue of tiles

enum FewNamedBarrier : uint32_t { kFewPartBarrier = 1 };

template <class Kind, class Tile>
struct alignas(1024) FewStorage {
    static constexpr int kGroupBytes = Tile::kTokens * kGroupDepth * 2;
    static constexpr int kTokenBytes = Tile::kDepth / kGroupDepth * kGroupBytes;
    static constexpr int kChunkBytes = chunk_bytes<Kind>;
    static constexpr bool kSplits = Tile::kCtas > 1;  // there is room for parts

    uint8_t a[Tile::kStages][kTokenBytes];  // [32 of K][token][32], swizzled
    uint8_t w[Tile::kStages][Tile::kWarpgroups][Tile::kChunks * kChunkBytes];
    float4 part[kSplits ? Tile::kTokens / 8 : 1][kSplits ? Tile::kConsumers : 1];  // of each thread
    tile::GroupTile tiles[kFewTilesAhead];
    arch::Mbarrier full[Tile::kStages], empty[Tile::kStages];
    arch::Mbarrier found[kFewTilesAhead], used[kFewTilesAhead];
    arch::Mbarrier parts_ready, parts_read;
};

// The part of K of a CTA: chunks first to end - 1.
struct ChunkPart {
    int first, end;
};
K2K_DEVICE ChunkPart part_of_chunks(int64_t chunks, uint32_t rank, uint32_t split) {
    const auto until = [&](uint32_t r) {
        return static_cast<int>(static_cast<uint32_t>(chunks) * r / split);
    };
    return {until(rank), until(rank + 1)};
}

// ---- the producer warp: tile scheduler, and copies of A and W

template <class Kind, class Tile>
K2K_DEVICE void load_few(FewStorage<Kind, Tile>& smem, const W4GemmParams& p,
                         const arch::TensorMap& tokens, ChunkPart part) {
    using Storage = FewStorage<Kind, Tile>;
    const bool leader = arch::elect_one();
    tile::RingPosition<Tile::kStages> stage;
    tile::RingPosition<kFewTilesAhead> ahead;
    const int columns = p.swiglu ? Tile::kWeights / 2 : Tile::kWeights;  // of D in a tile
    tile::GroupTiles tiles({p.groups, p.rows, p.columns, p.depth}, Tile::kTokens, columns,
                           kW4BandRows);
    bool more = true;
    for (int index = blockIdx.x / p.split; more; index += gridDim.x / p.split) {
        // Find the next tile; publish it once a slot of the queue is free.
        tile::GroupTile tile;
        more = tiles.find(index, tile);
        if (!more) tile.group = -1;
        if (leader) {
            arch::mbarrier_wait(smem.used[ahead.slot], ahead.parity ^ 1);
            smem.tiles[ahead.slot] = tile;
            arch::mbarrier_arrive(smem.found[ahead.slot]);
        }
        ahead.advance();
        if (!more) break;
        if (leader) {
            const int chunk_row = tile.column / columns * Tile::kWarpgroups;
            const int below = static_cast<int>(p.chunk_rows) - chunk_row;
            const int rows = below < Tile::kWarpgroups ? below : Tile::kWarpgroups;
            const int64_t row_bytes = p.chunk_columns * Storage::kChunkBytes;
            const uint8_t* w = p.w + (tile.group * p.chunk_rows + chunk_row) * row_bytes +
                               int64_t(part.first) * Storage::kChunkBytes;
            const int token = static_cast<int>(tile.first_row) + tile.row;
            auto at = stage;
            K2K_NO_UNROLL
            for (int chunk = part.first; chunk < part.end; chunk += Tile::kChunks) {
                // Wait until the consumers have released the stage, then start its copies. Weights
                // are read once, tokens by every CTA: L2 evicts weights first.
                const int left = part.end - chunk;
                const int w_bytes =
                    (left < Tile::kChunks ? left : Tile::kChunks) * Storage::kChunkBytes;
                arch::Mbarrier& full = smem.full[at.slot];
                arch::mbarrier_wait(smem.empty[at.slot], at.parity ^ 1);
                arch::mbarrier_arrive_expect_tx(full, Storage::kTokenBytes + rows * w_bytes);
                arch::tma_load_3d(smem.a[at.slot], tokens, full, 0, token, chunk * kChunkGroups,
                                  arch::CacheHint::kEvictLast);
                K2K_UNROLL
                for (int i = 0; i < Tile::kWarpgroups; ++i) {
                    if (i >= rows) break;
                    arch::bulk_load(smem.w[at.slot][i], w + i * row_bytes, w_bytes, full,
                                    arch::CacheHint::kEvictFirst);
                }
                w += Tile::kChunks * Storage::kChunkBytes;
                at.advance();
            }
            stage = at;
        }
        arch::sync_warp();
    }
}

// ---- consumer warpgroups

// The codes and scales of a chunk that a lane decodes.
struct FewCodes {
    uint32_t words[4];
    W4Scales scales;
};

// Fragments of 64 of K: A operands of four wgmma.
using FewFragments = uint32_t[4][4];

template <class Kind>
K2K_DEVICE void decode_fragments(FewFragments& fragments, const FewCodes& codes) {
    K2K_UNROLL
    for (int s = 0; s < 4; ++s) {
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int row = i % 2, group = s / 2;
            fragments[s][i] = decode_pair<Kind>(codes.words[2 * row + group], 2 * (s % 2) + i / 2,
                                                codes.scales[row][group]);
        }
    }
}

// Starts sums += fragments tokens: a chunk of K, of which `tokens` is the descriptor.
template <class Tile>
K2K_DEVICE void start_products(float (&sums)[Tile::kTokens / 2], const FewFragments& fragments,
                               uint64_t tokens) {
    arch::wgmma_fence();
    K2K_UNROLL
    for (int s = 0; s < 4; ++s) {
        const uint32_t step = s / 2 * (Tile::kTokens * kGroupDepth * 2) + s % 2 * 32;
        arch::wgmma_rs<bf16, Tile::kTokens>(sums, fragments[s],
                                            tokens + arch::descriptor_step(step), true);
    }
    arch::wgmma_commit();
}

// Adds the parts of the cluster for the warps of rank `rank`, through distributed shared memory, in
// the order of ranks. True for these warps.
template <class Kind, class Tile>
K2K_DEVICE bool add_parts(FewStorage<Kind, Tile>& smem, float (&sums)[Tile::kTokens / 2], int split,
                          uint32_t parity) {
    const int thread = threadIdx.x, warp = thread / 32 % 4;
    const auto rank = static_cast<int>(arch::cluster_rank());
    // Wait until the cluster has read the previous tile's part; write this one.
    arch::mbarrier_wait(smem.parts_read, parity ^ 1);
    K2K_UNROLL
    for (int j = 0; j < Tile::kTokens / 8; ++j) {
        smem.part[j][thread] =
            make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
    }
    arch::barrier_sync(kFewPartBarrier, Tile::kConsumers);
    // Publish it to each CTA of the cluster (release), wait for theirs (acquire).
    if (thread < split) arch::mbarrier_arrive_cluster(smem.parts_ready, thread);
    arch::mbarrier_wait_cluster(smem.parts_ready, parity);
    const bool own = warp * split / 4 == rank;
    K2K_NO_UNROLL
    for (int other = 0; own && other < split; ++other) {
        const float4* parts = arch::cluster_pointer(&smem.part[0][thread], other);
        K2K_UNROLL
        for (int j = 0; j < Tile::kTokens / 8; ++j) {
            const float4 four = parts[j * Tile::kConsumers];
            // Take the first part unchanged: 0 + -0 would lose the sign.
            sums[4 * j] = other == 0 ? four.x : sums[4 * j] + four.x;
            sums[4 * j + 1] = other == 0 ? four.y : sums[4 * j + 1] + four.y;
            sums[4 * j + 2] = other == 0 ? four.z : sums[4 * j + 2] + four.z;
            sums[4 * j + 3] = other == 0 ? four.w : sums[4 * j + 3] + four.w;
        }
    }
    arch::barrier_sync(kFewPartBarrier, Tile::kConsumers);
    // Arrive at each CTA's parts_read: its part may be overwritten.
    if (thread < split) arch::mbarrier_arrive_remote(smem.parts_read, thread);
    return own;
}

// Epilogue of a warp: rounds and stores its rows of W, columns of D from `column` on.
template <class Tile>
K2K_DEVICE void store_few(const W4GemmParams& p, const tile::GroupTile& tile, int column,
                          const float (&sums)[Tile::kTokens / 2]) {
    const int lane = arch::lane_id();
    const bool odd = lane & 4;  // the row of W, lane / 4
    const int token = lane % 4 * 2 + odd;
    column += lane / 8 * 2;
    const int rows = tile.rows - tile.row - token, left = static_cast<int>(p.columns) - column;
    bf16* d = p.d + (tile.first_row + tile.row + token) * p.d_row_stride + column;
    const bool aligned = p.d_row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(p.d) % 4 == 0;
    const auto store = [&](bf16* to, uint32_t pair, int columns) {
        if (aligned && columns > 1) {
            *reinterpret_cast<uint32_t*>(to) = pair;
        } else {
            if (columns > 0) to[0] = bf16{static_cast<uint16_t>(pair)};
            if (columns > 1) to[1] = bf16{static_cast<uint16_t>(pair >> 16)};
        }
    };
    K2K_UNROLL
    for (int j = 0; j < Tile::kTokens / 8; ++j) {
        // Round: rows g and g + 8 of two tokens, or the SwiGLU of both rows.
        uint32_t words[2];
        if (p.swiglu) {
            words[0] = swiglu_pair(sums + 4 * j, sums + 4 * j + 2);
            words[1] = words[0] >> 16;
        } else {
            words[0] = arch::pack_bf16(sums[4 * j], sums[4 * j + 2]);
            words[1] = arch::pack_bf16(sums[4 * j + 1], sums[4 * j + 3]);
        }
        // Exchange with the lane of the neighbouring row: this lane gets both rows of one token.
        const uint32_t own = odd ? words[1] : words[0];
        const uint32_t other = arch::shuffle_xor(odd ? words[0] : words[1], 4);
        const uint32_t upper = odd ? other : own, lower = odd ? own : other;
        if (8 * j >= rows) continue;
        store(d + 8 * j * p.d_row_stride, arch::byte_permute(upper, lower, 0x5410), left);
        if (!p.swiglu) {
            store(d + 8 * j * p.d_row_stride + 8, arch::byte_permute(upper, lower, 0x7632),
                  left - 8);
        }
    }
}

template <class Kind, class Tile>
K2K_DEVICE void multiply_few(FewStorage<Kind, Tile>& smem, const W4GemmParams& p, ChunkPart part) {
    using Storage = FewStorage<Kind, Tile>;
    const int lane = arch::lane_id(), warp = arch::warp_id(), warpgroup = warp / 4,
              block = warp % 4;
    // Where this lane reads in a stage, and the tokens of the first one.
    const uint8_t* codes = smem.w[0][warpgroup] + (block * 32 + lane) * 16;
    const uint8_t* scales =
        smem.w[0][warpgroup] + kCodeBytes + (block * 8 + lane / 4) * 4 * Kind::kScaleBytes;
    const uint64_t tokens =
        arch::matrix_descriptor(smem.a, arch::Swizzle::k64, 0, 8 * kGroupDepth * 2);
    const auto read_codes = [&](FewCodes& to, int slot, int chunk) {
        const int at = slot * sizeof smem.w[0] + chunk * Storage::kChunkBytes;
        const uint4 four = *reinterpret_cast<const uint4*>(codes + at);
        to.words[0] = four.x;
        to.words[1] = four.y;
        to.words[2] = four.z;
        to.words[3] = four.w;
        read_scales<Kind>(to.scales, scales + at);
    };
    const auto tokens_of = [&](int slot) {
        const uint32_t low =
            static_cast<uint32_t>(tokens) +
            slot * static_cast<uint32_t>(arch::descriptor_step(Storage::kTokenBytes));
        return (tokens >> 32 << 32) | arch::shuffle(low, 0);
    };
    constexpr uint64_t kNextChunk = arch::descriptor_step(kChunkGroups * Storage::kGroupBytes);

    tile::RingPosition<Tile::kStages> stage;
    tile::RingPosition<kFewTilesAhead> at;
    uint32_t parts_parity = 0;
    for (;; at.advance()) {
        arch::mbarrier_wait(smem.found[at.slot], at.parity);
        if (smem.tiles[at.slot].group < 0) break;
        float sums[Tile::kTokens / 2] = {};
        FewFragments fragments[2];
        int left = part.end - part.first, before = -1;  // chunks; the stage before
        K2K_NO_UNROLL
        for (; left >= Tile::kChunks; left -= Tile::kChunks, stage.advance()) {
            // Wait for the stage; read this lane's codes and scales.
            arch::mbarrier_wait(smem.full[stage.slot], stage.parity);
            const uint64_t of_stage = tokens_of(stage.slot);
            FewCodes codes_of[2];
            K2K_UNROLL
            for (int chunk = 0; chunk < 2; ++chunk) read_codes(codes_of[chunk], stage.slot, chunk);
            K2K_UNROLL
            for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
                // Decode a chunk while the products of the one before run.
                const int set = chunk % 2;
                arch::wgmma_wait<1>();
                if (chunk == 1) {
                    // Release the stage before: its products are done.
                    arch::sync_warp();
                    if (lane == 0 && before >= 0) arch::mbarrier_arrive(smem.empty[before]);
                }
                decode_fragments<Kind>(fragments[set], codes_of[set]);
                if (chunk + 2 < Tile::kChunks) read_codes(codes_of[set], stage.slot, chunk + 2);
                start_products<Tile>(sums, fragments[set], of_stage + chunk * kNextChunk);
            }
            before = stage.slot;
        }
        arch::wgmma_wait<0>(sums);
        if (before >= 0) tile::warp_arrive(smem.empty[before]);
        // The last chunks of K, fewer than a stage has.
        if (left > 0) {
            arch::mbarrier_wait(smem.full[stage.slot], stage.parity);
            const uint64_t of_stage = tokens_of(stage.slot);
            K2K_NO_UNROLL
            for (int chunk = 0; chunk < left; ++chunk) {
                FewCodes one;
                read_codes(one, stage.slot, chunk);
                decode_fragments<Kind>(fragments[0], one);
                start_products<Tile>(sums, fragments[0], of_stage + chunk * kNextChunk);
                arch::wgmma_wait<0>(sums);
            }
            tile::warp_arrive(smem.empty[stage.slot]);
            stage.advance();
        }

        // Release the tile's slot; add the parts of K; store.
        const tile::GroupTile tile = smem.tiles[at.slot];
        tile::warp_arrive(smem.used[at.slot]);
        bool stores = true;
        if constexpr (Storage::kSplits) {
            if (p.split > 1) {
                stores = add_parts(smem, sums, p.split, parts_parity);
                parts_parity ^= 1;
            }
        }
        const int column = tile.column + warp * (p.swiglu ? 8 : 16);
        if (stores) store_few<Tile>(p, tile, column, sums);
    }
    // Do not exit before the other CTAs' arrivals at this barrier have landed.
    if (p.split > 1) arch::mbarrier_wait(smem.parts_read, parts_parity ^ 1);
}

// ---- the kernel

template <class Kind, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas)
    w4_gemm_sm90_few_kernel(const __grid_constant__ W4GemmParams p,
                            const __grid_constant__ arch::TensorMap tokens) {
    FewStorage<Kind, Tile>& smem = arch::shared_storage<FewStorage<Kind, Tile>>();
    constexpr int kConsumerWarps = Tile::kConsumers / 32;
    // Prologue: one thread initialises the barriers and prefetches the tensor map.
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Tile::kStages; ++stage) {
            arch::mbarrier_init(smem.full[stage], 1);
            arch::mbarrier_init(smem.empty[stage], kConsumerWarps);
        }
        for (int tile = 0; tile < kFewTilesAhead; ++tile) {
            arch::mbarrier_init(smem.found[tile], 1);
            arch::mbarrier_init(smem.used[tile], kConsumerWarps);
        }
        arch::mbarrier_init(smem.parts_ready, p.split);
        arch::mbarrier_init(smem.parts_read, p.split);
        arch::fence_mbarrier_init();
        arch::tma_prefetch(tokens);
    }
    // Split-K: no CTA may arrive at another's barriers before they are initialised.
    arch::sync_block();
    if (p.split > 1) arch::cluster_sync_relaxed();

    const ChunkPart part =
        part_of_chunks(p.chunk_columns, p.split > 1 ? arch::cluster_rank() : 0, p.split);
    if (arch::warp_id() < kConsumerWarps) multiply_few(smem, p, part);
    if (arch::warp_id() == kConsumerWarps) load_few(smem, p, tokens, part);
    arch::sync_warp();
    // Split-K: do not exit before the other CTAs have read this one's last part.
    if (p.split > 1) arch::cluster_sync_relaxed();
}

}  // namespace k2k
