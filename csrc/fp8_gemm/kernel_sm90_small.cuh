#pragma once

// D[m, n] = w[m] (sum over blocks of 128 of K of
//                 (sum of A[m, k] B[n, k]) a_scale[m, block] b_scale[n, block]) + bias[n] + C[m, n]
//
// for each group, w, bias and C as there are, on sm_90a, for few rows m (tokens).
//
// What takes time is reading B (the weights). It lies on the side of 64 rows of wgmma, the tokens
// on the side that may be as narrow as 8, so that a stage is hardly more than weights and two
// blocks, with some 90 KB each on its way, fit on a multiprocessor.
//
// Grid      clusters of `split` blocks, as many as fit at once; cluster i takes tiles (64 rows of B
//           x kTokens of A) i, i + clusters, ... of schedule.cuh, and each block of it a part of K:
//           33 tiles of N = 2112 by 4 are 132 blocks.
// Roles     warps 0 to 3    products of a block of K, sum * (b_scale * a_scale) added to the result
//           warp 4          finds tiles; copies A and B by TMA
//           warp 5          copies the scales, one for each row of A and B, by cp.async
// Split     each block leaves its part in its shared memory; block r adds all parts, in the order
//           of the ranks, for tokens r * kTokens / split and on, reading the others' memory.
//
//   barrier      arrivals                                        bytes      waiters
//   full[s]      warp 4 once, each lane of warp 5 by its copies  A and B    warps 0 to 3
//   empty[s]     warps 0 to 3                                    -          warps 4, 5
//   found[t]     warp 4 once                                     -          warps 0 to 3, 5
//   used[t]      warps 0 to 3, 5                                 -          warp 4
//   parts_ready  a thread of each block, publishing its part     -          warps 0 to 3
//   parts_read   a thread of each block                          -          warps 0 to 3
//   named 1      warps 0 to 3: the part is written; the parts are read
//
// Order     of the blocks of K is their own in each part, and the parts follow one another: from
//           call to call the same, but with split > 1 not that of the other kernels.
// Registers 168 a thread, so that two blocks fit; sum and result take kTokens / 2 each.
// Limits    rows of A and B begin at multiples of 16 bytes; K > 0; groups are not cut along K.

#include "arch/cluster.cuh"
#include "arch/fence.cuh"
#include "arch/wgmma.cuh"
#include "fp8_gemm/pipeline_sm90.cuh"

namespace k2k {

template <class Tile>
struct alignas(1024) SmallStorage {
    // Rows of a part: 4 more than 64 columns keep the lanes that write it apart in the banks.
    static constexpr int kPartRow = Tile::kColumns + 4;

    uint8_t b[Tile::kStages][Tile::kColumns * kBlockK];
    uint8_t a[Tile::kStages][Tile::kTokens * kBlockK];
    float b_scales[Tile::kStages][Tile::kColumns];
    float a_scales[Tile::kStages][Tile::kTokens];
    float part[Tile::kTokens][kPartRow];
    GemmTile tiles[kTilesAhead];
    arch::Mbarrier full[Tile::kStages], empty[Tile::kStages];
    arch::Mbarrier found[kTilesAhead], used[kTilesAhead];
    arch::Mbarrier parts_ready, parts_read;
};

// The part of K that is this block's: blocks first to end - 1.
struct KPart {
    int first, end;
};
K2K_DEVICE KPart part_of_k(int64_t k, uint32_t rank, uint32_t split) {
    const uint32_t blocks = static_cast<uint32_t>(ceil_div(k, kBlockK));
    const auto until = [&](uint32_t r) {
        return static_cast<int>(blocks / split * r + (blocks % split * r) / split);
    };
    return {until(rank), until(rank + 1)};
}

// ---- warp 4

template <class Tile>
K2K_DEVICE void load_small_factors(SmallStorage<Tile>& smem,
                                   const Fp8GemmParams& p,
                                   const HopperMaps& maps,
                                   KPart part,
                                   int split) {
    GemmTiles tiles(p, Tile::kTokens, Tile::kColumns, kBand);
    tile::RingPosition<Tile::kStages> stage;
    tile::RingPosition<kTilesAhead> ahead;
    bool more = true;
    for (int index = blockIdx.x / split; more; index += gridDim.x / split) {
        GemmTile tile;
        more = tiles.find(index, tile);
        if (!more) tile.group = -1;
        if (arch::lane_id() == 0) {
            arch::mbarrier_wait(smem.used[ahead.slot], ahead.parity ^ 1);
            smem.tiles[ahead.slot] = tile;
            arch::mbarrier_arrive(smem.found[ahead.slot]);
        }
        ahead.advance();
        if (!more) break;

        const int a_matrix = p.a.matrices > 1 ? tile.group : 0;
        const int b_matrix = p.b.matrices > 1 ? tile.group : 0;
        for (int block = part.first; block < part.end; ++block, stage.advance()) {
            if (arch::lane_id() != 0) continue;
            arch::Mbarrier& full = smem.full[stage.slot];
            arch::mbarrier_wait(smem.empty[stage.slot], stage.parity ^ 1);
            arch::mbarrier_arrive_expect_tx(full, (Tile::kTokens + Tile::kColumns) * kBlockK);
            arch::tma_load_3d(smem.b[stage.slot], maps.b, full, block * kBlockK, tile.column,
                              b_matrix, arch::CacheHint::kEvictFirst);
            arch::tma_load_3d(smem.a[stage.slot], maps.a, full, block * kBlockK,
                              static_cast<int>(tile.first_row) + tile.row, a_matrix,
                              arch::CacheHint::kEvictLast);
        }
        arch::sync_warp();
    }
}

// ---- warp 5

template <class Tile>
K2K_DEVICE void load_small_scales(SmallStorage<Tile>& smem, const Fp8GemmParams& p, KPart part) {
    tile::RingPosition<Tile::kStages> stage;
    tile::RingPosition<kTilesAhead> at;
    const int lane = arch::lane_id();
    for (; has_tile(smem, at); leave_tile(smem, at)) {
        const GemmTile& tile = smem.tiles[at.slot];
        const int a_left = tile.rows - tile.row - lane;  // from this lane's first row on
        const int b_left = static_cast<int>(p.b.rows) - tile.column - lane;
        const float* a = p.a.scales + tile.group * p.a.scale_matrix_stride +
                         (tile.first_row + tile.row + lane) * p.a.scale_row_stride;
        const float* b = p.b.scales + tile.group * p.b.scale_matrix_stride;
        const int64_t b_row = tile.column + lane + p.b.block_offset;
        for (int block = part.first; block < part.end; ++block, stage.advance()) {
            arch::mbarrier_wait(smem.empty[stage.slot], stage.parity ^ 1);
            K2K_UNROLL
            for (int i = 0; i < Tile::kTokens; i += 32) {
                if (Tile::kTokens < 32 && lane >= Tile::kTokens) break;
                load_scale(smem.a_scales[stage.slot][lane + i],
                           a + i * p.a.scale_row_stride + block * p.a.scale_column_stride,
                           i < a_left, p.a.scales);
            }
            K2K_UNROLL
            for (int i = 0; i < Tile::kColumns; i += 32) {
                const int64_t row = (b_row + i) >> p.b.block_shift;
                load_scale(smem.b_scales[stage.slot][lane + i],
                           b + row * p.b.scale_row_stride + block * p.b.scale_column_stride,
                           i < b_left, p.b.scales);
            }
            arch::cp_async_arrive(smem.full[stage.slot]);
        }
    }
    finish_scales();
}

// ---- warps 0 to 3

// Adds the parts of D for token `token` of the tile and columns 2 lane, 2 lane + 1, multiplies with
// the row's weight, adds bias and C, and stores them.
template <class Tile>
K2K_DEVICE void finish_token(
    SmallStorage<Tile>& smem, const Fp8GemmParams& p, const GemmTile& tile, int token, int split) {
    const int own = arch::lane_id() * 2, column = tile.column + own;
    const int64_t row = tile.first_row + tile.row + token;
    float values[2] = {};
    for (int rank = 0; rank < split; ++rank) {
        const float* part = &smem.part[token][own];
        if (split > 1) part = arch::cluster_pointer(part, rank);
        const float2 pair = *reinterpret_cast<const float2*>(part);
        // The first part as it is: adding it to zero would lose the sign of a zero.
        values[0] = rank == 0 ? pair.x : values[0] + pair.x;
        values[1] = rank == 0 ? pair.y : values[1] + pair.y;
    }
    if (tile.row + token >= tile.rows || column >= p.b.rows) return;
    if (p.row_weights != nullptr) {
        const float weight = row_weight(p, tile, tile.row + token);
        values[0] = rounded_product(values[0], weight);
        values[1] = rounded_product(values[1], weight);
    }
    const bool second = column + 1 < p.b.rows;
    const auto add = [&](const Addend& addend) {
        if (addend.values == nullptr) return;
        by_result_type(addend.type, [&](auto* type) {
            float pair[2];
            load_pair(pair,
                      static_cast<const std::remove_pointer_t<decltype(type)>*>(addend.values) +
                          tile.group * addend.matrix_stride + row * addend.row_stride + column,
                      second);
            values[0] += pair[0];
            values[1] += pair[1];
        });
    };
    add(p.bias);
    add(p.c);
    by_result_type(p.d_type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        struct alignas(2 * sizeof(T)) Pair {
            T values[2];
        };
        T* d =
            static_cast<T*>(p.d) + tile.group * p.d_matrix_stride + row * p.d_row_stride + column;
        const Pair pair = {{narrowed<T>(values[0]), narrowed<T>(values[1])}};
        if (second && reinterpret_cast<uintptr_t>(d) % sizeof(Pair) == 0) {
            *reinterpret_cast<Pair*>(d) = pair;
        } else {
            d[0] = pair.values[0];
            if (second) d[1] = pair.values[1];
        }
    });
}

template <class Tile>
K2K_DEVICE void multiply_small_tiles(SmallStorage<Tile>& smem,
                                     const Fp8GemmParams& p,
                                     KPart part,
                                     int split) {
    constexpr int kValues = Tile::kTokens / 2;
    const int lane = arch::lane_id(), warp = arch::warp_id();
    const int weight_row = 16 * warp + lane / 4;
    const int rank = split > 1 ? static_cast<int>(arch::cluster_rank()) : 0;
    tile::RingPosition<Tile::kStages> stage;
    tile::RingPosition<kTilesAhead> at;
    tile::RingPosition<1> parts;  // of the barriers about parts

    for (; has_tile(smem, at); leave_tile(smem, at)) {
        const GemmTile& tile = smem.tiles[at.slot];
        float result[kValues], sum[kValues];  // of 64 columns of D x kTokens rows
        K2K_UNROLL
        for (int i = 0; i < kValues; ++i) result[i] = 0;
        for (int block = part.first; block < part.end; ++block, stage.advance()) {
            arch::mbarrier_wait(smem.full[stage.slot], stage.parity);
            const float* b_scales = smem.b_scales[stage.slot] + weight_row;
            const float2 b_scale = make_float2(b_scales[0], b_scales[8]);
            const uint64_t b_tile =
                arch::matrix_descriptor(smem.b[stage.slot], arch::Swizzle::k128, 0, 8 * kBlockK);
            const uint64_t a_tile =
                arch::matrix_descriptor(smem.a[stage.slot], arch::Swizzle::k128, 0, 8 * kBlockK);
            arch::wgmma_fence();
            K2K_UNROLL
            for (int kk = 0; kk < kBlockK / 32; ++kk) {
                const uint64_t step = kk * arch::descriptor_step(32);
                arch::wgmma_ss<e4m3, Tile::kTokens>(sum, b_tile + step, a_tile + step, kk > 0);
            }
            arch::wgmma_commit();
            arch::wgmma_wait<0>(sum);
            promote(result, sum, b_scale, smem.a_scales[stage.slot] + lane % 4 * 2);
            arch::sync_warp();
            if (lane == 0) arch::mbarrier_arrive(smem.empty[stage.slot]);
        }

        // This block's part, turned: a row for each token.
        arch::mbarrier_wait(smem.parts_read, parts.parity ^ 1);
        K2K_UNROLL
        for (int i = 0; i < kValues; ++i) {
            smem.part[i / 4 * 8 + lane % 4 * 2 + i % 2][weight_row + i / 2 % 2 * 8] = result[i];
        }
        arch::barrier_sync(1, 128);
        if (static_cast<int>(threadIdx.x) < split) {
            arch::mbarrier_arrive_cluster(smem.parts_ready, threadIdx.x);
        }
        arch::mbarrier_wait_cluster(smem.parts_ready, parts.parity);
        const int tokens = Tile::kTokens / split;
        for (int token = rank * tokens + warp; token < (rank + 1) * tokens; token += 4) {
            finish_token(smem, p, tile, token, split);
        }
        arch::barrier_sync(1, 128);
        if (static_cast<int>(threadIdx.x) < split) {
            arch::mbarrier_arrive_remote(smem.parts_read, threadIdx.x);
        }
        parts.advance();
    }
    // The others' arrivals at this barrier have landed before the CTA ends.
    if (split > 1) arch::mbarrier_wait(smem.parts_read, parts.parity ^ 1);
}

// ---- the kernel

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    fp8_gemm_sm90_small_kernel(const __grid_constant__ Fp8GemmParams p,
                               const __grid_constant__ HopperMaps maps,
                               int split) {
    using Storage = SmallStorage<Tile>;
    Storage& smem = arch::shared_storage<Storage>();
    const int warp = arch::warp_id();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Tile::kStages; ++stage) {
            arch::mbarrier_init(smem.full[stage], 1 + 32);
            arch::mbarrier_init(smem.empty[stage], 4);
        }
        for (int tile = 0; tile < kTilesAhead; ++tile) {
            arch::mbarrier_init(smem.found[tile], 1);
            arch::mbarrier_init(smem.used[tile], 1 + 4);
        }
        arch::mbarrier_init(smem.parts_ready, split);
        arch::mbarrier_init(smem.parts_read, split);
        arch::fence_mbarrier_init();
        arch::tma_prefetch(maps.a);
        arch::tma_prefetch(maps.b);
    }
    arch::sync_block();
    if (split > 1) arch::cluster_sync_relaxed();

    const KPart part = part_of_k(p.k, split > 1 ? arch::cluster_rank() : 0, split);
    if (warp < 4) multiply_small_tiles(smem, p, part, split);
    if (warp == 4) load_small_factors(smem, p, maps, part, split);
    if (warp == 5) load_small_scales(smem, p, part);
    arch::sync_warp();
    // The others still read the last part here: they have consumed it before they arrive.
    if (split > 1) arch::cluster_sync_relaxed();
}

}  // namespace k2k
