#pragma once

// D[m, n] = w[m] (sum over blocks of 128 of K of
//                 (sum of A[m, k] B[n, k]) a_scale[m, block] b_scale[n, block]) + bias[n] + C[m, n]
//
// for each group, with w, bias and C optional, on sm_90a: a persistent, warp-specialised GEMM.
//
// Reading   Begin with HopperTile128x128 and Share::kNone: kPipelines = kAcross = kWaves =
//           kColumnScales = 1, kFine = kSwiglu = false. Then fp8_gemm_sm90_kernel (roles),
//           load_factors and load_scales (producers), multiply_tiles (consumers), store_panels
//           (epilogue). Everything else is a variant, marked at its branch:
//             kWaves = 2         a warpgroup has two waves of 64 rows: 256x128, ping-pong, SwiGLU
//             kAcross = 2        the warpgroups divide the columns, not the rows: 64x256, SwiGLU
//             kColumnScales = 2  two 128-column scales of B per tile: 128x192, 64x256, SwiGLU
//             kFine              1x128 scales of B: one for each column; and groups along K
//             kPipelines = 2     ping-pong: each warpgroup has tiles and stages of its own
//             kSwiglu            gate and up in one tile, quantised epilogue: swiglu_sm90.cuh
//             share              kA or kB: the CTAs of a cluster load that operand by multicast
//
// Grid      One CTA per SM, alone or in clusters of two. Cluster i takes tiles i, i + clusters, ...
//           of the persistent tile scheduler (schedule.cuh). The two CTAs of a cluster have
//           adjacent tiles of a row (or column); each loads half of the shared A (or B) into both.
// Roles     warp 0         producer and tile scheduler: TMA copies of A and B, 128 of K per stage
//           warp 1         producer of scales by cp.async: any strides, zeros beyond the group
//           warps 2, 3     idle; in ping-pong warps 0 and 1 of the second pipeline
//           warps 4 to 11  two consumer warpgroups, each with half of the tile: wgmma of one stage
//                          into `sum`, then promotion: result += sum * (a_scale * b_scale). One
//                          promotes while the other's wgmma run. Epilogue at the end of a tile.
// Ping-pong (for short K) Warps 0, 1 and 4 to 7 take tiles i, i + 2 clusters, ...; warps 2, 3 and 8
//           to 11 the tiles between. A warpgroup begins a tile when the other is halfway through
//           its own, so one warpgroup's epilogue and prologue overlap the other's main loop.
// SwiGLU    Warpgroup 0 computes 128 columns of gate, warpgroup 1 the same columns of up.
//
//   barrier      arrivals (of a pipeline)                        bytes      waiters
//   full[s]      warp 0 once, each lane of warp 1 (cp.async)     A and B    warps 4 to 11
//   empty[s]     warps 4 to 11 of each CTA of the cluster        -          warps 0 and 1
//   found[t]     warp 0 once                                     -          warps 1, 4 to 11
//   used[t]      warps 1, 4 to 11                                -          warp 0
//   halfway      ping-pong: consumer warps, once per tile        -          consumers of the other
//   named        NamedBarrier in pipeline_sm90.cuh
//   s: stage; t: slot of the tile queue, by which warp 0 hands tiles to the other warps
//
// Stage     tile_rows + tile_columns rows of 128 bytes, 128-byte swizzle, and their scales.
// Epilogue  store_panels: 64 columns of a warpgroup at a time through shared memory, by TMA. Or
//           store_by_rows, 32 columns at a time: with bias or C, for float32, if the group ends
//           inside the 64 rows, or if rows of D do not begin at multiples of 16 bytes.
// Registers 56 per thread of warps 0 to 3, 224 of the others, of which sum and result take
//           columns of a warpgroup / 2 x (1 + waves): 128 to 192.
// Shared    of 227 KB: stages x (rows + columns) x 132 bytes or less, panels of 8 KB.
//           128x128 5 x 32 + 4 x 8 KB; 128x192 4 x 40 + 6 x 8; 256x128 4 x 48 + 2 x 8;
//           64x256 4 x 40 + 4 x 8; ping-pong 2 x (3 x 32 + 8); SwiGLU 4 x 48 + 32 for the exchange.
// Limits    rows of A and B begin at multiples of 16 bytes; K > 0.

#include "arch/cluster.cuh"
#include "arch/control.cuh"
#include "arch/fence.cuh"
#include "arch/matrix.cuh"
#include "arch/wgmma.cuh"
#include "fp8_gemm/pipeline_sm90.cuh"
#include "fp8_gemm/swiglu_sm90.cuh"
#include "tile/swizzle.cuh"

namespace k2k {

template <class Tile>
struct Panels {
    // [warpgroup][panel][64 rows x 128 bytes of D], 128-byte swizzle
    uint8_t panels[2 / Tile::kPipelines][Tile::kPanels][64 * 128];
};

// Shared memory of a pipeline, which feeds both consumer warpgroups, in ping-pong one of them.
template <class Tile>
struct alignas(1024) HopperPipeline {
    static constexpr int kWarps = 8 / Tile::kPipelines;  // consumers

    uint8_t a[Tile::kStages][Tile::kRows * kBlockK];     // [stage][row][128], swizzled
    uint8_t b[Tile::kStages][Tile::kColumns * kBlockK];  // [stage][column][128], swizzled
    std::conditional_t<Tile::kSwiglu, SwigluExchange, Panels<Tile>> result;
    float a_scales[Tile::kStages][Tile::kRows];
    float b_scales[Tile::kStages][Tile::kColumnScales];
    GemmTile tiles[kTilesAhead];  // of the tile scheduler; group -1: no more tiles
    arch::Mbarrier full[Tile::kStages], empty[Tile::kStages];
    arch::Mbarrier found[kTilesAhead], used[kTilesAhead];
    arch::Mbarrier halfway;
};

template <class Tile>
struct HopperStorage {
    HopperPipeline<Tile> pipelines[Tile::kPipelines];
};

// ---- warp 0 (and 2): tile scheduler and producer of A and B

// Starts the copy of `rows` rows of an operand, from `row` on, 128 of K each. Shared: of this CTA's
// half of the rows, to both CTAs.
K2K_DEVICE void load_factor(uint8_t* target, const arch::TensorMap& map, arch::Mbarrier& full,
                            int rows, bool shared, int k, int row, int matrix) {
    if (shared) {
        const int half = rows / 2, first = static_cast<int>(arch::cluster_rank()) * half;
        arch::tma_load_3d_multicast(target + first * kBlockK, map, full, /*cta_mask=*/3, k,
                                    row + first, matrix, arch::CacheHint::kNone);
    } else {
        arch::tma_load_3d(target, map, full, k, row, matrix, arch::CacheHint::kNone);
    }
}

template <class Tile>
K2K_DEVICE void load_factors(HopperPipeline<Tile>& smem, const Fp8GemmParams& p,
                             const HopperMaps& maps, Share share, int pipeline) {
    // share: schedule pairs of adjacent tiles; each CTA of the cluster takes one of the pair.
    const bool shares = share != Share::kNone;
    const int rank = shares ? static_cast<int>(arch::cluster_rank()) : 0;
    const int clusters = shares ? gridDim.x / 2 : gridDim.x;
    GemmTiles tiles(p, share == Share::kB ? 2 * Tile::kRows : Tile::kRows,
                    share == Share::kA ? 2 * Tile::kColumns : Tile::kColumns, kBand);
    tile::RingPosition<Tile::kStages> stage;
    tile::RingPosition<kTilesAhead> ahead;
    bool more = true;
    int index = (shares ? blockIdx.x / 2 : blockIdx.x) + pipeline * clusters;
    for (; more; index += Tile::kPipelines * clusters) {
        // Find the next tile from the groups' sizes in device memory.
        GemmTile tile;
        more = tiles.find(index, tile);
        if (share == Share::kA) tile.column += rank * Tile::kColumns;
        if (Tile::kSwiglu) tile.column /= 2;  // SwiGLU: the same column of gate and of up
        if (share == Share::kB) tile.row += rank * Tile::kRows;
        // Publish it to warp 1 and the consumers once a slot of the tile queue is free.
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
        for (int k = tile.k_begin; k < tile.k_end; k += kBlockK, stage.advance()) {
            if (arch::lane_id() != 0) continue;
            // Wait until all consumers have released the stage (share: of both CTAs).
            arch::Mbarrier& full = smem.full[stage.slot];
            arch::mbarrier_wait(smem.empty[stage.slot], stage.parity ^ 1);
            // Start the copies; their bytes complete `full`.
            arch::mbarrier_arrive_expect_tx(full, (Tile::kRows + Tile::kColumns) * kBlockK);
            load_factor(smem.a[stage.slot], maps.a, full, Tile::kRows, share == Share::kA, k,
                        static_cast<int>(tile.first_row) + tile.row, a_matrix);
            if constexpr (Tile::kSwiglu) {
                // SwiGLU: 128 rows of gate's weights, then 128 of up's.
                const int up = static_cast<int>(p.b.rows) / 2 + tile.column;
                load_factor(smem.b[stage.slot], maps.b, full, 128, share == Share::kB, k,
                            tile.column, b_matrix);
                load_factor(smem.b[stage.slot] + 128 * kBlockK, maps.b, full, 128,
                            share == Share::kB, k, up, b_matrix);
            } else {
                load_factor(smem.b[stage.slot], maps.b, full, Tile::kColumns, share == Share::kB, k,
                            tile.column, b_matrix);
            }
        }
        arch::sync_warp();
    }
    // share: drain: wait until both CTAs have released all stages, before this CTA exits.
    if (shares && arch::lane_id() == 0) {
        for (int i = 0; i < Tile::kStages; ++i, stage.advance()) {
            arch::mbarrier_wait(smem.empty[stage.slot], stage.parity ^ 1);
        }
    }
    arch::sync_warp();
}

// ---- warp 1 (and 3): producer of scales

template <class Tile>
K2K_DEVICE void load_scales(HopperPipeline<Tile>& smem, const Fp8GemmParams& p) {
    constexpr int kStep = Tile::kFine ? 1 : 128;  // columns per scale of B
    // SwiGLU: lane 0 loads the scale of gate's columns, lane 1 that of up's.
    const int lane_step = Tile::kSwiglu ? static_cast<int>(p.b.rows) / 2 : kStep;
    tile::RingPosition<Tile::kStages> stage;
    tile::RingPosition<kTilesAhead> at;
    const int lane = arch::lane_id();
    for (; has_tile(smem, at); leave_tile(smem, at)) {
        // Lane i copies the scales of rows (kFine: and columns) i, i + 32, ... of the tile.
        const GemmTile& tile = smem.tiles[at.slot];
        const int k_end = tile.k_end;
        const int a_left = tile.rows - tile.row - lane;  // rows from this lane's first on
        const int column = tile.column / kStep * kStep + lane * lane_step;
        const int b_left = static_cast<int>(p.b.rows) - column;
        // a: [row][block of K], b: [block of columns][block of K], at their strides.
        const float* a = p.a.scales + tile.group * p.a.scale_matrix_stride +
                         (tile.first_row + tile.row + lane) * p.a.scale_row_stride;
        const float* b = p.b.scales + tile.group * p.b.scale_matrix_stride;
        for (int k = tile.k_begin; k < k_end; k += kBlockK, stage.advance()) {
            arch::mbarrier_wait(smem.empty[stage.slot], stage.parity ^ 1);
            // Copy the scales of A, zeros beyond the group's rows.
            const int block = k / kBlockK;
            const float* source = a + block * p.a.scale_column_stride;
            K2K_NO_UNROLL
            for (int i = 0; i < Tile::kRows; i += 32) {
                load_scale(smem.a_scales[stage.slot][lane + i], source, i < a_left, p.a.scales);
                source += 32 * p.a.scale_row_stride;
            }
            // Copy the scales of B: per 128 columns, or (fine) per column.
            source = b + block * p.b.scale_column_stride;
            K2K_NO_UNROLL
            for (int i = 0; lane + i < Tile::kColumnScales; i += 32) {
                const int64_t row = (column + i * kStep + p.b.block_offset) >> p.b.block_shift;
                load_scale(smem.b_scales[stage.slot][lane + i], source + row * p.b.scale_row_stride,
                           i * kStep < b_left, p.b.scales);
            }
            // Arrive at `full` when this lane's copies have landed.
            arch::cp_async_arrive(smem.full[stage.slot]);
        }
    }
    finish_scales();
}

// ---- warps 4 to 11: consumers

// Zeros bytes valid .. 127 of a stage's rows: K beyond the end of a group (groups along K only).
template <int kRows>
K2K_DEVICE void clear_tail(uint8_t* rows, int valid) {
    for (int row = threadIdx.x % 128; row < kRows; row += 128) {
        for (int k = valid; k < kBlockK; ++k) {
            rows[tile::chunk_offset<kBlockK>(row, k / 16) + k % 16] = 0;
        }
    }
}

// result += sum * (a_scale * b_scale), with scale b0 of B in the first kBoundary columns, else b1.
template <int kBoundary, int kValues>
K2K_DEVICE void promote(float (&result)[kValues], const float (&sum)[kValues], float2 a_scale,
                        float b0, float b1) {
    const float scales[2][2] = {{a_scale.x * b0, a_scale.y * b0}, {a_scale.x * b1, a_scale.y * b1}};
    K2K_UNROLL
    for (int i = 0; i < kValues; ++i) {
        result[i] = fmaf(sum[i], scales[i / 4 * 8 >= kBoundary][i / 2 % 2], result[i]);
    }
}

// Epilogue by TMA: 64 rows of two-byte results, in panels of 64 columns (128 bytes).
template <class Tile, class T, int kValues>
K2K_DEVICE void store_panels(HopperPipeline<Tile>& smem, const HopperMaps& maps,
                             const float (&values)[kValues], int warpgroup, int column, int row,
                             int matrix) {
    static_assert(kValues / 32 % Tile::kPanels == 0, "a panel's last store was kPanels ago");
    const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    K2K_UNROLL
    for (int first = 0; first < kValues / 32; ++first) {
        // Wait until the TMA store that last used this panel has read it.
        uint8_t* panel =
            smem.result.panels[Tile::kPipelines == 1 ? warpgroup : 0][first % Tile::kPanels];
        if (thread == 0) arch::bulk_wait_read<Tile::kPanels - 1>();
        arch::barrier_sync(kWarpgroupBarrier + warpgroup, 128);
        // Round to T and write the panel: per stmatrix 16 rows x 16 columns of a warp.
        K2K_UNROLL
        for (int j = 0; j < 8; j += 2) {
            uint32_t words[4];
            K2K_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int at = 4 * (8 * first + j + i / 2) + 2 * (i % 2);
                words[i] = pack<T>(values[at], values[at + 1]);
            }
            const int r = 16 * warp + lane % 16, chunk = j + lane / 16;
            arch::stmatrix(words, arch::smem_address(panel + tile::chunk_offset<128>(r, chunk)));
        }
        // Make the generic writes visible to TMA, then store the panel.
        arch::fence_proxy_async();
        arch::barrier_sync(kWarpgroupBarrier + warpgroup, 128);
        if (thread == 0) {
            arch::tma_store_3d(maps.d, panel, column + 64 * first, row, matrix);
            arch::bulk_commit();
        }
    }
}

// Four contiguous elements of a row, `left` of them in the matrix: one access if they are aligned
// to their size.
template <class T>
struct alignas(4 * sizeof(T)) Four {
    T values[4];
};
template <class T>
K2K_DEVICE bool is_four(const T* first, int64_t left) {
    return left >= 4 && reinterpret_cast<uintptr_t>(first) % sizeof(Four<T>) == 0;
}

// Adds bias or C, if any, to four contiguous elements; `row` counts the rows of all groups.
K2K_DEVICE void add_four(float (&four)[4], const Addend& addend, int group, int64_t row, int column,
                         int64_t left) {
    if (addend.values == nullptr) return;
    const int64_t at = group * addend.matrix_stride + row * addend.row_stride + column;
    by_result_type(addend.type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T* source = static_cast<const T*>(addend.values) + at;
        Four<T> added = {};
        if (is_four(source, left)) {
            added = *reinterpret_cast<const Four<T>*>(source);
        } else {
            K2K_UNROLL
            for (int i = 0; i < 4; ++i) {
                if (i < left) added.values[i] = source[i];
            }
        }
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) four[i] += widened(added.values[i]);
    });
}

// Epilogue without TMA: adds bias and C to 64 rows and stores those within the group's D. A warp
// transposes 16 rows x 32 columns at a time through its quarter of the panel, so that its accesses
// to C and D are coalesced. Loops are not unrolled, to keep the code small.
template <class Tile, int kValues>
K2K_DEVICE void store_by_rows(HopperPipeline<Tile>& smem, const Fp8GemmParams& p,
                              float (&values)[kValues], const GemmTile& tile, int warpgroup,
                              int row, int column) {
    const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    auto* panel =
        reinterpret_cast<float*>(smem.result.panels[Tile::kPipelines == 1 ? warpgroup : 0][0]) +
        warp * 16 * 32;
    const int group = tile.group, rows = tile.rows - (row + 16 * warp);
    const int64_t first_row = tile.first_row + row + 16 * warp;
    // Wait until earlier TMA stores have read the panel.
    if (thread == 0) arch::bulk_wait_read<0>();
    arch::barrier_sync(kWarpgroupBarrier + warpgroup, 128);
    K2K_NO_UNROLL
    for (int first = 0; first < 2 * kValues; first += 32) {
        // Write this lane's accumulators: rows lane / 4 and lane / 4 + 8, four pairs of columns.
        K2K_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int r = lane / 4 + i % 2 * 8, chunk = i / 2 * 2 + lane % 4 / 2;
            *reinterpret_cast<float2*>(panel + r * 32 + (chunk ^ r % 8) * 4 + lane % 2 * 2) =
                make_float2(values[2 * i], values[2 * i + 1]);
        }
        arch::sync_warp();
        // Read rows back, 8 lanes per row of 32 columns; add bias and C, round, store.
        const int at = column + first + lane % 8 * 4;
        const int64_t left = p.b.rows - at;
        K2K_NO_UNROLL
        for (int r = lane / 8; r < 16 && r < rows && left > 0; r += 4) {
            const float4 sums =
                *reinterpret_cast<const float4*>(panel + r * 32 + (lane ^ r) % 8 * 4);
            float four[4] = {sums.x, sums.y, sums.z, sums.w};
            add_four(four, p.bias, group, first_row + r, at, left);
            add_four(four, p.c, group, first_row + r, at, left);
            by_result_type(p.d_type, [&](auto* type) {
                using T = std::remove_pointer_t<decltype(type)>;
                T* d = static_cast<T*>(p.d) + group * p.d_matrix_stride +
                       (first_row + r) * p.d_row_stride + at;
                Four<T> results;
                K2K_UNROLL
                for (int i = 0; i < 4; ++i) results.values[i] = narrowed<T>(four[i]);
                if (is_four(d, left)) {
                    *reinterpret_cast<Four<T>*>(d) = results;
                } else {
                    K2K_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        if (i < left) d[i] = results.values[i];
                    }
                }
            });
        }
        arch::sync_warp();
        // Move the accumulators of the next 32 columns to the front: constant register indices.
        K2K_UNROLL
        for (int i = 0; i < kValues - 16; ++i) values[i] = values[i + 16];
    }
}

// Epilogue of 64 rows of a warpgroup: row weights, bias, C, stores.
template <class Tile, int kValues>
K2K_DEVICE void finish_wave(HopperPipeline<Tile>& smem, const Fp8GemmParams& p,
                            const HopperMaps& maps, float (&values)[kValues], const GemmTile& tile,
                            int warpgroup, int row, int column) {
    const int matrix = p.groups.axis == GemmGroups::Axis::kRows ? 0 : tile.group;
    const int d_row = static_cast<int>(tile.first_row) + row;
    weigh(values, p, tile, row + static_cast<int>(threadIdx.x % 128) / 32 * 16);
    if (!maps.stores_by_tma || row + 64 > tile.rows || p.bias.values != nullptr ||
        p.c.values != nullptr) {
        store_by_rows(smem, p, values, tile, warpgroup, row, column);
    } else if (p.d_type == Type::kBf16) {
        store_panels<Tile, bf16>(smem, maps, values, warpgroup, column, d_row, matrix);
    } else {
        store_panels<Tile, fp16>(smem, maps, values, warpgroup, column, d_row, matrix);
    }
}

// Main loop and epilogue of a consumer warpgroup.
template <class Tile>
K2K_DEVICE void multiply_tiles(HopperStorage<Tile>& storage, const Fp8GemmParams& p,
                               const HopperMaps& maps, Share share, int warpgroup) {
    // This warpgroup's part of the tile: kWaves x 64 rows by kColumns columns.
    constexpr int kColumns = Tile::kColumns / Tile::kAcross;
    constexpr int kValues = kColumns / 2;  // accumulators of a thread for 64 rows
    constexpr int kWaves = Tile::kWaves;
    constexpr bool kPingPong = Tile::kPipelines == 2;
    HopperPipeline<Tile>& smem = storage.pipelines[kPingPong ? warpgroup : 0];
    const int lane = arch::lane_id();
    const int part = kPingPong ? 0 : warpgroup;  // ping-pong: all of the tile
    const int first_row = Tile::kAcross == 1 ? part * 64 * kWaves : 0;
    const int first_column = Tile::kAcross == 1 ? 0 : part * kColumns;
    const int lane_row = first_row + static_cast<int>(threadIdx.x % 128) / 32 * 16 + lane / 4;
    tile::RingPosition<Tile::kStages> stage;
    tile::RingPosition<kTilesAhead> at;
    tile::RingPosition<1> turn;  // ping-pong: parity of this warpgroup's tiles

    for (; has_tile(smem, at); leave_tile(smem, at)) {
        const GemmTile& tile = smem.tiles[at.slot];
        float result[kWaves][kValues];  // promoted sums of the tile
        float sum[kValues];             // accumulators of wgmma: one stage, one wave
        // 1x128 scales of B: NaN for a group along K that begins inside a block of 128.
        const float nothing = Tile::kFine && tile.misplaced() ? soft::bits_float(0x7fffffff) : 0;
        K2K_UNROLL
        for (int wave = 0; wave < kWaves; ++wave) {
            K2K_UNROLL
            for (int i = 0; i < kValues; ++i) result[wave][i] = nothing;
        }
        // The scale of B changes at this column, if inside the warpgroup's part.
        const int boundary = 128 - (tile.column + first_column) % 128;
        const int middle = tile.k_begin + (tile.blocks() - 1) / 2 * kBlockK;
        if constexpr (kPingPong) {
            // ping-pong: wait until the other warpgroup is halfway through the preceding tile.
            // Order: tile 0 of warpgroup 0, tile 0 of warpgroup 1, tile 1 of warpgroup 0, ...
            // Warpgroup 0 has as many tiles as warpgroup 1, or one more.
            arch::mbarrier_wait(storage.pipelines[1 - warpgroup].halfway,
                                turn.parity ^ (warpgroup == 0));
            turn.advance();
        }

        const int k_end = tile.k_end;
        for (int k = tile.k_begin; k < k_end; k += kBlockK, stage.advance()) {
            // Wait for A, B and scales of this block of 128 of K.
            arch::mbarrier_wait(smem.full[stage.slot], stage.parity);
            if constexpr (Tile::kFine) {
                // Groups along K: zero what TMA read of the next group.
                if (p.groups.axis == GemmGroups::Axis::kK && k_end - k < kBlockK) {
                    clear_tail<64 * kWaves>(smem.a[stage.slot] + first_row * kBlockK, k_end - k);
                    clear_tail<kColumns>(smem.b[stage.slot] + first_column * kBlockK, k_end - k);
                    arch::fence_proxy_async();
                    arch::barrier_sync(kWarpgroupBarrier + warpgroup, 128);
                }
            }
            // Releases the stage to the producers (share: of both CTAs), after wgmma has read A and
            // B and the scales are in registers or used. ping-pong: after the middle block also
            // arrives at `halfway`.
            const auto release = [&] {
                arch::sync_warp();
                if (kPingPong && k == middle && lane == 0) arch::mbarrier_arrive(smem.halfway);
                if (share == Share::kNone) {
                    if (lane == 0) arch::mbarrier_arrive(smem.empty[stage.slot]);
                } else if (lane < 2) {
                    arch::mbarrier_arrive_remote(smem.empty[stage.slot], lane);
                }
            };
            // Read the stage's scales to registers; kFine reads those of B when it promotes.
            const float* b_scales = smem.b_scales[stage.slot];
            const float b0 = Tile::kFine ? 0 : b_scales[first_column / 128];
            const float b1 = Tile::kColumnScales == 2 ? b_scales[1] : 0;
            K2K_UNROLL
            for (int wave = 0; wave < kWaves; ++wave) {
                const float* a_scales = smem.a_scales[stage.slot] + lane_row + 64 * wave;
                const float2 a_scale = make_float2(a_scales[0], a_scales[8]);
                const uint64_t a_tile =
                    arch::matrix_descriptor(smem.a[stage.slot] + (first_row + 64 * wave) * kBlockK,
                                            arch::Swizzle::k128, 0, 8 * kBlockK);
                const uint64_t b_tile =
                    arch::matrix_descriptor(smem.b[stage.slot] + first_column * kBlockK,
                                            arch::Swizzle::k128, 0, 8 * kBlockK);
                // Multiply: 64 rows x kColumns, four wgmma of 32 of K, the first overwrites sum.
                arch::wgmma_fence();
                K2K_UNROLL
                for (int kk = 0; kk < kBlockK / 32; ++kk) {
                    const uint64_t step = kk * arch::descriptor_step(32);
                    arch::wgmma_ss<e4m3, kColumns>(sum, a_tile + step, b_tile + step, kk > 0);
                }
                arch::wgmma_commit();
                arch::wgmma_wait<0>(sum);
                // Release before promoting, so that the next copies start early.
                if (!Tile::kFine && wave == kWaves - 1) release();
                // Promote: result += sum * (a_scale * b_scale), in float32.
                if constexpr (Tile::kFine) {
                    // 1x128 scales of B: one for each column, from shared memory.
                    promote(result[wave], sum, a_scale, b_scales + first_column + lane % 4 * 2);
                } else if constexpr (Tile::kColumnScales == 1 || Tile::kAcross > 1) {
                    // 128x128 scales: one for the warpgroup's columns.
                    promote<kColumns>(result[wave], sum, a_scale, b0, b0);
                } else {
                    // 128x192: two, which change at column 64 or 128.
                    if (boundary == 128) {
                        promote<128>(result[wave], sum, a_scale, b0, b1);
                    } else {
                        promote<64>(result[wave], sum, a_scale, b0, b1);
                    }
                }
            }
            if (Tile::kFine) release();
        }

        // Epilogue.
        if constexpr (Tile::kSwiglu) {
            // SwiGLU: exchange halves with the other warpgroup, quantise, store codes and scales.
            finish_swiglu(smem.result, p, result[0], result[1], tile, warpgroup);
        } else {
            // Not unrolled, which would double the code: the second wave moves to result[0].
            K2K_NO_UNROLL
            for (int wave = 0; wave < kWaves; ++wave) {
                finish_wave(smem, p, maps, result[0], tile, warpgroup,
                            tile.row + first_row + 64 * wave, tile.column + first_column);
                K2K_UNROLL
                for (int i = 0; i < kValues; ++i) result[0][i] = result[kWaves - 1][i];
            }
        }
    }
    // Wait for the TMA stores that read this CTA's shared memory.
    if (threadIdx.x % 128 == 0) arch::bulk_wait<0>();
}

// ---- the kernel

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    fp8_gemm_sm90_kernel(const __grid_constant__ Fp8GemmParams p,
                         const __grid_constant__ HopperMaps maps, Share share) {
    using Storage = HopperStorage<Tile>;
    Storage& smem = arch::shared_storage<Storage>();
    // By shuffle, so that the compiler keeps it, and descriptors made of it, in uniform registers.
    const int warp = arch::shuffle(static_cast<int>(arch::warp_id()), 0);
    const bool shares = share != Share::kNone;

    // Prologue: one thread initialises the barriers and prefetches the tensor maps.
    if (threadIdx.x == 0) {
        for (HopperPipeline<Tile>& pipeline : smem.pipelines) {
            for (int stage = 0; stage < Tile::kStages; ++stage) {
                arch::mbarrier_init(pipeline.full[stage], 1 + 32);
                arch::mbarrier_init(pipeline.empty[stage], (shares ? 2 : 1) * pipeline.kWarps);
            }
            for (int tile = 0; tile < kTilesAhead; ++tile) {
                arch::mbarrier_init(pipeline.found[tile], 1);
                arch::mbarrier_init(pipeline.used[tile], 1 + pipeline.kWarps);
            }
            arch::mbarrier_init(pipeline.halfway, pipeline.kWarps);
        }
        arch::fence_mbarrier_init();
        arch::tma_prefetch(maps.a);
        arch::tma_prefetch(maps.b);
        if (maps.stores_by_tma) arch::tma_prefetch(maps.d);
    }
    // share: no CTA may arrive at the other's barriers before they are initialised.
    arch::sync_block();
    if (shares) arch::cluster_sync_relaxed();

    // Move registers from the producer warps to the consumer warps (setmaxnreg).
    if (warp < 4) {
        arch::registers_decrease<56>();
        const int pipeline = warp / 2;
        if (pipeline < Tile::kPipelines) {
            HopperPipeline<Tile>& of = smem.pipelines[pipeline];
            if (warp % 2 == 0) load_factors(of, p, maps, share, pipeline);
            if (warp % 2 == 1) load_scales(of, p);
        }
    } else {
        arch::registers_increase<224>();
        multiply_tiles(smem, p, maps, share, warp / 4 - 1);
    }
    arch::sync_warp();
    // share: do not exit while the other CTA may access this one's shared memory.
    if (shares) arch::cluster_sync_relaxed();
}

}  // namespace k2k
