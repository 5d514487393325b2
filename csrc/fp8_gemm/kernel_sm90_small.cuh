#pragma once

// D[m, n] = w[m] (sum over blocks of 128 of K of
//                 (sum of A[m, k] B[n, k]) a_scale[m, block] b_scale[n, block]) + bias[n] + C[m, n]
//
// for each group, with w, bias and C optional, on sm_90a, for few rows m (tokens).
//
// The kernel is bound by reading B (the weights). wgmma computes the transpose: B is the operand
// with 64 rows, the tokens are the operand that may be as narrow as 8. So a stage is little more
// than weights, and two CTAs with about 90 KB in flight each fit on an SM.
//
// Grid      Persistent clusters of `split` CTAs, as many as fit. Cluster i takes tiles (64 rows of
//           B x kTokens of A) i, i + clusters, ... of schedule.cuh; each of its CTAs has a part of
//           K (split-K). Example: N = 2112 has 33 tiles, which with split 4 occupy 132 SMs.
// Roles     warps 0 to 3   consumer warpgroup: wgmma of one stage into `sum`, then
//                          result += sum * (b_scale * a_scale); epilogue, a warp per token
//           warp 4         producer and tile scheduler: TMA copies of A and B
//           warp 5         producer of scales by cp.async, one for each row of A and of B
// Split     Each CTA writes its partial result to its shared memory. CTA r adds all parts, in the
//           order of ranks, for kTokens / split tokens from r * kTokens / split on, through
//           distributed shared memory.
//
//   barrier      arrivals                                        bytes      waiters
//   full[s]      warp 4 once, each lane of warp 5 (cp.async)     A and B    warps 0 to 3
//   empty[s]     warps 0 to 3                                    -          warps 4, 5
//   found[t]     warp 4 once                                     -          warps 0 to 3, 5
//   used[t]      warps 0 to 3, 5                                 -          warp 4
//   parts_ready  a thread of each CTA, publishing its part       -          warps 0 to 3
//   parts_read   a thread of each CTA                            -          warps 0 to 3
//   named        kPartBarrier, warps 0 to 3: the part is written; the parts are read
//   s: stage; t: slot of the tile queue, by which warp 4 hands tiles to the other warps
//
// Order     The blocks of K are added in order inside a part, then the parts: equal from call to
//           call, but with split > 1 not the order of the other kernels.
// Registers 168 per thread, so that two CTAs fit; sum and result take kTokens / 2 each.
// Limits    rows of A and B begin at multiples of 16 bytes; K > 0; no groups along K.

#include "arch/cluster.cuh"
#include "arch/fence.cuh"
#include "arch/wgmma.cuh"
#include "fp8_gemm/pipeline_sm90.cuh"

namespace k2k {

template <class Tile>
struct alignas(1024) SmallStorage {
    // Row length of a part: 4 more than 64 columns, against bank conflicts when it is written.
    static constexpr int kPartRow = Tile::kColumns + 4;

    uint8_t b[Tile::kStages][Tile::kColumns * kBlockK];  // [stage][column][128], swizzled
    uint8_t a[Tile::kStages][Tile::kTokens * kBlockK];   // [stage][token][128], swizzled
    float b_scales[Tile::kStages][Tile::kColumns];
    float a_scales[Tile::kStages][Tile::kTokens];
    float part[Tile::kTokens][kPartRow];  // this CTA's partial result
    GemmTile tiles[kTilesAhead];
    arch::Mbarrier full[Tile::kStages], empty[Tile::kStages];
    arch::Mbarrier found[kTilesAhead], used[kTilesAhead];
    arch::Mbarrier parts_ready, parts_read;
};

enum SmallNamedBarrier : int { kPartBarrier = 1 };

// The part of K of a CTA: blocks first to end - 1.
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

// ---- warp 4: tile scheduler and producer of A and B

template <class Tile>
K2K_DEVICE void load_small_factors(SmallStorage<Tile>& smem, const Fp8GemmParams& p,
                                   const HopperMaps& maps, KPart part, int split) {
    GemmTiles tiles(p, Tile::kTokens, Tile::kColumns, kBand);
    tile::RingPosition<Tile::kStages> stage;
    tile::RingPosition<kTilesAhead> ahead;
    bool more = true;
    for (int index = blockIdx.x / split; more; index += gridDim.x / split) {
        // Find the next tile; publish it once a slot of the tile queue is free.
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
            // Wait until the consumers have released the stage, then start its copies. Weights are
            // read once, tokens by every CTA: L2 evicts weights first.
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

// ---- warp 5: producer of scales

template <class Tile>
K2K_DEVICE void load_small_scales(SmallStorage<Tile>& smem, const Fp8GemmParams& p, KPart part) {
    tile::RingPosition<Tile::kStages> stage;
    tile::RingPosition<kTilesAhead> at;
    const int lane = arch::lane_id();
    for (; has_tile(smem, at); leave_tile(smem, at)) {
        // Lane i copies the scales of rows i, i + 32, ... of the tile.
        const GemmTile& tile = smem.tiles[at.slot];
        const int a_left = tile.rows - tile.row - lane;  // rows from this lane's first on
        const int b_left = static_cast<int>(p.b.rows) - tile.column - lane;
        const float* a = p.a.scales + tile.group * p.a.scale_matrix_stride +
                         (tile.first_row + tile.row + lane) * p.a.scale_row_stride;
        const float* b = p.b.scales + tile.group * p.b.scale_matrix_stride;
        const int64_t b_row = tile.column + lane + p.b.block_offset;
        for (int block = part.first; block < part.end; ++block, stage.advance()) {
            arch::mbarrier_wait(smem.empty[stage.slot], stage.parity ^ 1);
            // Copy the scales of A, zeros beyond the group's rows.
            K2K_UNROLL
            for (int i = 0; i < Tile::kTokens; i += 32) {
                if (Tile::kTokens < 32 && lane >= Tile::kTokens) break;
                load_scale(smem.a_scales[stage.slot][lane + i],
                           a + i * p.a.scale_row_stride + block * p.a.scale_column_stride,
                           i < a_left, p.a.scales);
            }
            // Copy the scales of B: of 128 or of one column, repeated to one per column.
            K2K_UNROLL
            for (int i = 0; i < Tile::kColumns; i += 32) {
                const int64_t row = (b_row + i) >> p.b.block_shift;
                load_scale(smem.b_scales[stage.slot][lane + i],
                           b + row * p.b.scale_row_stride + block * p.b.scale_column_stride,
                           i < b_left, p.b.scales);
            }
            // Arrive at `full` when this lane's copies have landed.
            arch::cp_async_arrive(smem.full[stage.slot]);
        }
    }
    finish_scales();
}

// ---- warps 0 to 3: consumers

// Epilogue of a warp for one token, a lane having two columns: adds the parts, applies the row
// weight, bias and C, stores.
template <class Tile>
K2K_DEVICE void finish_token(SmallStorage<Tile>& smem, const Fp8GemmParams& p, const GemmTile& tile,
                             int token, int split) {
    const int own = arch::lane_id() * 2, column = tile.column + own;
    const int64_t row = tile.first_row + tile.row + token;
    // Add the parts from the shared memory of every CTA of the cluster, in the order of ranks.
    float values[2] = {};
    for (int rank = 0; rank < split; ++rank) {
        const float* part = &smem.part[token][own];
        if (split > 1) part = arch::cluster_pointer(part, rank);
        const float2 pair = *reinterpret_cast<const float2*>(part);
        // Take the first part unchanged: 0 + -0 would lose the sign.
        values[0] = rank == 0 ? pair.x : values[0] + pair.x;
        values[1] = rank == 0 ? pair.y : values[1] + pair.y;
    }
    if (tile.row + token >= tile.rows || column >= p.b.rows) return;
    // Apply the row weight, then bias and C, rounding as the other kernels do.
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
    // Round once and store the pair, by one access if it is aligned.
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

// Main loop, exchange of the parts, epilogue.
template <class Tile>
K2K_DEVICE void multiply_small_tiles(SmallStorage<Tile>& smem, const Fp8GemmParams& p, KPart part,
                                     int split) {
    constexpr int kValues = Tile::kTokens / 2;  // accumulators of a thread, 64 x kTokens / 128
    const int lane = arch::lane_id(), warp = arch::warp_id();
    const int weight_row = 16 * warp + lane / 4;  // rows of B of this lane: this one and + 8
    const int rank = split > 1 ? static_cast<int>(arch::cluster_rank()) : 0;
    tile::RingPosition<Tile::kStages> stage;
    tile::RingPosition<kTilesAhead> at;
    tile::RingPosition<1> parts;  // parity of parts_ready and parts_read

    for (; has_tile(smem, at); leave_tile(smem, at)) {
        const GemmTile& tile = smem.tiles[at.slot];
        float result[kValues], sum[kValues];  // [64 columns of D x kTokens rows]
        K2K_UNROLL
        for (int i = 0; i < kValues; ++i) result[i] = 0;
        for (int block = part.first; block < part.end; ++block, stage.advance()) {
            // Wait for A, B and scales of this block of 128 of K.
            arch::mbarrier_wait(smem.full[stage.slot], stage.parity);
            const float* b_scales = smem.b_scales[stage.slot] + weight_row;
            const float2 b_scale = make_float2(b_scales[0], b_scales[8]);
            const uint64_t b_tile =
                arch::matrix_descriptor(smem.b[stage.slot], arch::Swizzle::k128, 0, 8 * kBlockK);
            const uint64_t a_tile =
                arch::matrix_descriptor(smem.a[stage.slot], arch::Swizzle::k128, 0, 8 * kBlockK);
            // Multiply: weights are wgmma's first operand, tokens its second.
            arch::wgmma_fence();
            K2K_UNROLL
            for (int kk = 0; kk < kBlockK / 32; ++kk) {
                const uint64_t step = kk * arch::descriptor_step(32);
                arch::wgmma_ss<e4m3, Tile::kTokens>(sum, b_tile + step, a_tile + step, kk > 0);
            }
            arch::wgmma_commit();
            arch::wgmma_wait<0>(sum);
            // Promote, then release the stage: the scales of A are read from shared memory.
            promote(result, sum, b_scale, smem.a_scales[stage.slot] + lane % 4 * 2);
            arch::sync_warp();
            if (lane == 0) arch::mbarrier_arrive(smem.empty[stage.slot]);
        }

        // Wait until the cluster has read the previous tile's part; write this one, transposed to a
        // row for each token.
        arch::mbarrier_wait(smem.parts_read, parts.parity ^ 1);
        K2K_UNROLL
        for (int i = 0; i < kValues; ++i) {
            smem.part[i / 4 * 8 + lane % 4 * 2 + i % 2][weight_row + i / 2 % 2 * 8] = result[i];
        }
        arch::barrier_sync(kPartBarrier, 128);
        // Publish it to each CTA of the cluster (release), wait for theirs (acquire).
        if (static_cast<int>(threadIdx.x) < split) {
            arch::mbarrier_arrive_cluster(smem.parts_ready, threadIdx.x);
        }
        arch::mbarrier_wait_cluster(smem.parts_ready, parts.parity);
        // Epilogue of this CTA's tokens, a warp per token.
        const int tokens = Tile::kTokens / split;
        for (int token = rank * tokens + warp; token < (rank + 1) * tokens; token += 4) {
            finish_token(smem, p, tile, token, split);
        }
        arch::barrier_sync(kPartBarrier, 128);
        // Arrive at each CTA's parts_read: its part may be overwritten.
        if (static_cast<int>(threadIdx.x) < split) {
            arch::mbarrier_arrive_remote(smem.parts_read, threadIdx.x);
        }
        parts.advance();
    }
    // Do not exit before the other CTAs' arrivals at this barrier have landed.
    if (split > 1) arch::mbarrier_wait(smem.parts_read, parts.parity ^ 1);
}

// ---- the kernel

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    fp8_gemm_sm90_small_kernel(const __grid_constant__ Fp8GemmParams p,
                               const __grid_constant__ HopperMaps maps, int split) {
    using Storage = SmallStorage<Tile>;
    Storage& smem = arch::shared_storage<Storage>();
    const int warp = arch::warp_id();
    // Prologue: one thread initialises the barriers and prefetches the tensor maps.
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
    // Split-K: no CTA may arrive at another's barriers before they are initialised.
    arch::sync_block();
    if (split > 1) arch::cluster_sync_relaxed();

    const KPart part = part_of_k(p.k, split > 1 ? arch::cluster_rank() : 0, split);
    if (warp < 4) multiply_small_tiles(smem, p, part, split);
    if (warp == 4) load_small_factors(smem, p, maps, part, split);
    if (warp == 5) load_small_scales(smem, p, part);
    arch::sync_warp();
    // Split-K: do not exit before the other CTAs have read this one's last part.
    if (split > 1) arch::cluster_sync_relaxed();
}

}  // namespace k2k
