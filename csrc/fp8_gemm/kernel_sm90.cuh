#pragma once

// D[m, n] = w[m] (sum over blocks of 128 of K of
//                 (sum of A[m, k] B[n, k]) a_scale[m, block] b_scale[n, block]) + bias[n] + C[m, n]
//
// for each group, w, bias and C as there are, on sm_90a.
//
// Grid      one block on each multiprocessor, alone or in clusters of two; cluster i takes tiles i,
//           i + clusters, ... of schedule.cuh. Two blocks of a cluster have neighbouring tiles of a
//           row (or of a column): each loads half of the A (or B) that they share into both.
// Roles     warp 0          finds tiles; copies A and B by TMA, 128 of K at a time
//           warp 1          copies scales by cp.async: any strides, no scale beyond the group
//           warps 4 to 11   two warpgroups, with rows (or columns) of a tile each: products of a
//                           block of K into `sum`, then sum * (a_scale * b_scale) is added to
//                           `result`. While one adds, the tensor cores work for the other.
// Ping-pong (for short K) two pipelines: warps 0, 1, 4 to 7 take tiles i, i + 2 clusters, ...,
// warps
//           2, 3, 8 to 11 the others, each with stages of its own. A warpgroup begins a tile when
//           the other is halfway through its own, so that the ends of one's tile, which the tensor
//           cores have nothing of, lie in the middle of the other's.
// SwiGLU    128 columns of gate are a warpgroup's, the same of up the other's: swiglu_sm90.cuh.
//
//   barrier      arrivals (of a pipeline)                        bytes      waiters
//   full[s]      warp 0 once, each lane of warp 1 by its copies  A and B    warps 4 to 11
//   empty[s]     warps 4 to 11 of each block of the cluster      -          warps 0 and 1
//   found[t]     warp 0 once                                     -          warps 1, 4 to 11
//   used[t]      warps 1, 4 to 11                                -          warp 0
//   halfway      the pipeline's warps 4 to 7, once a tile        -          the other pipeline's
//   named 1, 2   the 4 warps of a warpgroup: the panel of D is free; it is written
//   named 3 - 6  a warp of each warpgroup: sums are there to be fetched; they are fetched (SwiGLU)
//
// Stage     tile_rows + tile_columns rows of 128 bytes with the 128-byte swizzle, and their scales.
// Result    leaves a warpgroup 64 columns at a time through shared memory by TMA; 32 columns at a
//           time and row by row where a group's rows end inside, for float32, with bias or C, and
//           where rows of D do not begin at multiples of 16 bytes.
// Registers 56 a thread for warps 0 to 3, 224 for the others, of which sum and result take
//           columns / 2 x (1 + waves): 128 to 192.
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
    uint8_t panels[2 / Tile::kPipelines][Tile::kPanels][64 * 128];  // 64 rows of 128 bytes of D
};

// What one pipeline has: two warpgroups', or in ping-pong one's.
template <class Tile>
struct alignas(1024) HopperPipeline {
    static constexpr int kWarps = 8 / Tile::kPipelines;  // that multiply

    uint8_t a[Tile::kStages][Tile::kRows * kBlockK];
    uint8_t b[Tile::kStages][Tile::kColumns * kBlockK];
    std::conditional_t<Tile::kSwiglu, SwigluExchange, Panels<Tile>> result;
    float a_scales[Tile::kStages][Tile::kRows];
    float b_scales[Tile::kStages][Tile::kColumnScales];
    GemmTile tiles[kTilesAhead];  // group: -1 behind the last
    arch::Mbarrier full[Tile::kStages], empty[Tile::kStages];
    arch::Mbarrier found[kTilesAhead], used[kTilesAhead];
    arch::Mbarrier halfway;
};

template <class Tile>
struct HopperStorage {
    HopperPipeline<Tile> pipelines[Tile::kPipelines];
};

// ---- warp 0 (and 2)

// Loads `rows` rows of a factor from `row` on; shared: its half of them, into both blocks.
K2K_DEVICE void load_factor(uint8_t* target,
                            const arch::TensorMap& map,
                            arch::Mbarrier& full,
                            int rows,
                            bool shared,
                            int k,
                            int row,
                            int matrix K2K_WHERE) {
    if (shared) {
        const int half = rows / 2, first = static_cast<int>(arch::cluster_rank()) * half;
        arch::tma_load_3d_multicast(target + first * kBlockK, map, full, /*cta_mask=*/3, k,
                                    row + first, matrix, arch::CacheHint::kNone K2K_PASS_WHERE);
    } else {
        arch::tma_load_3d(target, map, full, k, row, matrix, arch::CacheHint::kNone K2K_PASS_WHERE);
    }
}

template <class Tile>
K2K_DEVICE void load_factors(HopperPipeline<Tile>& smem,
                             const Fp8GemmParams& p,
                             const HopperMaps& maps,
                             Share share,
                             int pipeline) {
    // A cluster that shares a factor takes two neighbouring tiles at a time.
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
        GemmTile tile;
        more = tiles.find(index, tile);
        if (share == Share::kA) tile.column += rank * Tile::kColumns;
        if (Tile::kSwiglu) tile.column /= 2;  // of gate, and of up
        if (share == Share::kB) tile.row += rank * Tile::kRows;
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
            arch::Mbarrier& full = smem.full[stage.slot];
            arch::mbarrier_wait(smem.empty[stage.slot], stage.parity ^ 1);
            arch::mbarrier_arrive_expect_tx(full, (Tile::kRows + Tile::kColumns) * kBlockK);
            load_factor(smem.a[stage.slot], maps.a, full, Tile::kRows, share == Share::kA, k,
                        static_cast<int>(tile.first_row) + tile.row, a_matrix);
            if constexpr (Tile::kSwiglu) {
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
    // Each stage is free: the other CTA's arrivals here have landed, and its copies too.
    if (shares && arch::lane_id() == 0) {
        for (int i = 0; i < Tile::kStages; ++i, stage.advance()) {
            arch::mbarrier_wait(smem.empty[stage.slot], stage.parity ^ 1);
        }
    }
    arch::sync_warp();
}

// ---- warp 1 (and 3)

template <class Tile>
K2K_DEVICE void load_scales(HopperPipeline<Tile>& smem, const Fp8GemmParams& p) {
    constexpr int kStep = Tile::kFine ? 1 : 128;  // columns for which a scale is loaded
    const int lane_step = Tile::kSwiglu ? static_cast<int>(p.b.rows) / 2 : kStep;
    tile::RingPosition<Tile::kStages> stage;
    tile::RingPosition<kTilesAhead> at;
    const int lane = arch::lane_id();
    for (; has_tile(smem, at); leave_tile(smem, at)) {
        const GemmTile& tile = smem.tiles[at.slot];
        const int k_end = tile.k_end;
        const int a_left = tile.rows - tile.row - lane;  // from this lane's first row on
        const int column = tile.column / kStep * kStep + lane * lane_step;
        const int b_left = static_cast<int>(p.b.rows) - column;
        const float* a = p.a.scales + tile.group * p.a.scale_matrix_stride +
                         (tile.first_row + tile.row + lane) * p.a.scale_row_stride;
        const float* b = p.b.scales + tile.group * p.b.scale_matrix_stride;
        for (int k = tile.k_begin; k < k_end; k += kBlockK, stage.advance()) {
            arch::mbarrier_wait(smem.empty[stage.slot], stage.parity ^ 1);
            const int block = k / kBlockK;
            const float* source = a + block * p.a.scale_column_stride;
            K2K_NO_UNROLL
            for (int i = 0; i < Tile::kRows; i += 32) {
                load_scale(smem.a_scales[stage.slot][lane + i], source, i < a_left, p.a.scales);
                source += 32 * p.a.scale_row_stride;
            }
            source = b + block * p.b.scale_column_stride;
            K2K_NO_UNROLL
            for (int i = 0; lane + i < Tile::kColumnScales; i += 32) {
                const int64_t row = (column + i * kStep + p.b.block_offset) >> p.b.block_shift;
                load_scale(smem.b_scales[stage.slot][lane + i], source + row * p.b.scale_row_stride,
                           i * kStep < b_left, p.b.scales);
            }
            arch::cp_async_arrive(smem.full[stage.slot]);
        }
    }
    finish_scales();
}

// ---- warps 4 to 11

// Zeros the bytes of a stage's rows from `valid` of 128 on: tokens behind a group's last.
template <int kRows>
K2K_DEVICE void clear_tail(uint8_t* rows, int valid) {
    for (int row = threadIdx.x % 128; row < kRows; row += 128) {
        for (int k = valid; k < kBlockK; ++k) {
            rows[tile::chunk_offset<kBlockK>(row, k / 16) + k % 16] = 0;
        }
    }
}

// result += sum * (a_scale * b_scale), where the first kBoundary columns have scale b0.
template <int kBoundary, int kValues>
K2K_DEVICE void promote(
    float (&result)[kValues], const float (&sum)[kValues], float2 a_scale, float b0, float b1) {
    const float scales[2][2] = {{a_scale.x * b0, a_scale.y * b0}, {a_scale.x * b1, a_scale.y * b1}};
    K2K_UNROLL
    for (int i = 0; i < kValues; ++i) {
        result[i] = fmaf(sum[i], scales[i / 4 * 8 >= kBoundary][i / 2 % 2], result[i]);
    }
}

// Stores 64 rows of two-byte results by TMA, in panels of 64 columns (128 bytes).
template <class Tile, class T, int kValues>
K2K_DEVICE void store_panels(HopperPipeline<Tile>& smem,
                             const HopperMaps& maps,
                             const float (&values)[kValues],
                             int warpgroup,
                             int column,
                             int row,
                             int matrix) {
    static_assert(kValues / 32 % Tile::kPanels == 0, "a panel's last store was kPanels ago");
    const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    K2K_UNROLL
    for (int first = 0; first < kValues / 32; ++first) {
        uint8_t* panel =
            smem.result.panels[Tile::kPipelines == 1 ? warpgroup : 0][first % Tile::kPanels];
        if (thread == 0) arch::bulk_wait_read<Tile::kPanels - 1>();
        arch::barrier_sync(1 + warpgroup, 128);
        K2K_UNROLL
        for (int j = 0; j < 8;
             j += 2) {  // 16 columns: rows 0-7 and 8-15 of group j, of group j + 1
            uint32_t words[4];
            K2K_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int at = 4 * (8 * first + j + i / 2) + 2 * (i % 2);
                words[i] = pack<T>(values[at], values[at + 1]);
            }
            const int r = 16 * warp + lane % 16, chunk = j + lane / 16;
            arch::stmatrix(words, arch::smem_address(panel + tile::chunk_offset<128>(r, chunk)));
        }
        arch::fence_proxy_async();
        arch::barrier_sync(1 + warpgroup, 128);
        if (thread == 0) {
            arch::tma_store_3d(maps.d, panel, column + 64 * first, row, matrix);
            arch::bulk_commit();
        }
    }
}

// Four neighbours of a row, of which `left` are in the matrix; by one access where they lie on a
// multiple of their size.
template <class T>
struct alignas(4 * sizeof(T)) Four {
    T values[4];
};
template <class T>
K2K_DEVICE bool is_four(const T* first, int64_t left) {
    return left >= 4 && reinterpret_cast<uintptr_t>(first) % sizeof(Four<T>) == 0;
}

// Adds bias or C, if any, to four neighbours of a row (of all groups' rows) from `column` on.
K2K_DEVICE void add_four(
    float (&four)[4], const Addend& addend, int group, int64_t row, int column, int64_t left) {
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

// Adds bias and C to 64 rows and stores them, as far as they are within the group's D: what TMA
// cannot. 32 columns at a time go through the warpgroup's panel, where each warp has 16 rows, so
// that a row's come out of it side by side; in loops, so that the code is small.
template <class Tile, int kValues>
K2K_DEVICE void store_by_rows(HopperPipeline<Tile>& smem,
                              const Fp8GemmParams& p,
                              float (&values)[kValues],
                              const GemmTile& tile,
                              int warpgroup,
                              int row,
                              int column) {
    const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    auto* panel =
        reinterpret_cast<float*>(smem.result.panels[Tile::kPipelines == 1 ? warpgroup : 0][0]) +
        warp * 16 * 32;
    const int group = tile.group, rows = tile.rows - (row + 16 * warp);
    const int64_t first_row = tile.first_row + row + 16 * warp;
    if (thread == 0) arch::bulk_wait_read<0>();
    arch::barrier_sync(1 + warpgroup, 128);
    K2K_NO_UNROLL
    for (int first = 0; first < 2 * kValues; first += 32) {
        K2K_UNROLL
        for (int i = 0; i < 8; ++i) {  // 8 columns, of row lane / 4 or of the eighth after it
            const int r = lane / 4 + i % 2 * 8, chunk = i / 2 * 2 + lane % 4 / 2;
            *reinterpret_cast<float2*>(panel + r * 32 + (chunk ^ r % 8) * 4 + lane % 2 * 2) =
                make_float2(values[2 * i], values[2 * i + 1]);
        }
        arch::sync_warp();
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
        K2K_UNROLL
        for (int i = 0; i < kValues - 16; ++i) values[i] = values[i + 16];  // the next 32
    }
}

// Bias, C and stores of a warpgroup's 64 rows from `row` on, from `column` on.
template <class Tile, int kValues>
K2K_DEVICE void finish_wave(HopperPipeline<Tile>& smem,
                            const Fp8GemmParams& p,
                            const HopperMaps& maps,
                            float (&values)[kValues],
                            const GemmTile& tile,
                            int warpgroup,
                            int row,
                            int column) {
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

template <class Tile>
K2K_DEVICE void multiply_tiles(HopperStorage<Tile>& storage,
                               const Fp8GemmParams& p,
                               const HopperMaps& maps,
                               Share share,
                               int warpgroup) {
    constexpr int kColumns = Tile::kColumns / Tile::kAcross;  // of a warpgroup
    constexpr int kValues = kColumns / 2;
    constexpr int kWaves = Tile::kWaves;
    constexpr bool kPingPong = Tile::kPipelines == 2;
    HopperPipeline<Tile>& smem = storage.pipelines[kPingPong ? warpgroup : 0];
    const int lane = arch::lane_id();
    const int part = kPingPong ? 0 : warpgroup;  // of the tile
    const int first_row = Tile::kAcross == 1 ? part * 64 * kWaves : 0;
    const int first_column = Tile::kAcross == 1 ? 0 : part * kColumns;
    const int lane_row = first_row + static_cast<int>(threadIdx.x % 128) / 32 * 16 + lane / 4;
    tile::RingPosition<Tile::kStages> stage;
    tile::RingPosition<kTilesAhead> at;
    tile::RingPosition<1> turn;  // in ping-pong: the warpgroup's tiles, counted

    for (; has_tile(smem, at); leave_tile(smem, at)) {
        const GemmTile& tile = smem.tiles[at.slot];
        float result[kWaves][kValues], sum[kValues];
        const float nothing =  // groups along K are for fine tiles alone
            Tile::kFine && tile.misplaced() ? soft::bits_float(0x7fffffff) : 0;
        K2K_UNROLL
        for (int wave = 0; wave < kWaves; ++wave) {
            K2K_UNROLL
            for (int i = 0; i < kValues; ++i) result[wave][i] = nothing;
        }
        const int boundary = 128 - (tile.column + first_column) % 128;
        const int middle = tile.k_begin + (tile.blocks() - 1) / 2 * kBlockK;
        if constexpr (kPingPong) {
            // Tile n of warpgroup 1 comes after half of tile n of warpgroup 0, whose tile n + 1
            // comes after half of that. Warpgroup 0 has as many tiles as 1, or one more.
            arch::mbarrier_wait(storage.pipelines[1 - warpgroup].halfway,
                                turn.parity ^ (warpgroup == 0));
            turn.advance();
        }

        const int k_end = tile.k_end;
        for (int k = tile.k_begin; k < k_end; k += kBlockK, stage.advance()) {
            arch::mbarrier_wait(smem.full[stage.slot], stage.parity);
            if constexpr (Tile::kFine) {
                if (p.groups.axis == GemmGroups::Axis::kK && k_end - k < kBlockK) {
                    clear_tail<64 * kWaves>(smem.a[stage.slot] + first_row * kBlockK, k_end - k);
                    clear_tail<kColumns>(smem.b[stage.slot] + first_column * kBlockK, k_end - k);
                    arch::fence_proxy_async();
                    arch::barrier_sync(1 + warpgroup, 128);
                }
            }
            // Hands the stage back: its codes and, in registers or used, its scales were read.
            const auto release = [&] {
                arch::sync_warp();
                if (kPingPong && k == middle && lane == 0) arch::mbarrier_arrive(smem.halfway);
                if (share == Share::kNone) {
                    if (lane == 0) arch::mbarrier_arrive(smem.empty[stage.slot]);
                } else if (lane < 2) {
                    arch::mbarrier_arrive_remote(smem.empty[stage.slot], lane);
                }
            };
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
                arch::wgmma_fence();
                K2K_UNROLL
                for (int kk = 0; kk < kBlockK / 32; ++kk) {
                    const uint64_t step = kk * arch::descriptor_step(32);
                    arch::wgmma_ss<e4m3, kColumns>(sum, a_tile + step, b_tile + step, kk > 0);
                }
                arch::wgmma_commit();
                arch::wgmma_wait<0>(sum);
                if (!Tile::kFine && wave == kWaves - 1) release();
                if constexpr (Tile::kFine) {
                    promote(result[wave], sum, a_scale, b_scales + first_column + lane % 4 * 2);
                } else if constexpr (Tile::kColumnScales == 1 || Tile::kAcross > 1) {
                    promote<kColumns>(result[wave], sum, a_scale, b0, b0);
                } else {
                    if (boundary == 128) {
                        promote<128>(result[wave], sum, a_scale, b0, b1);
                    } else {
                        promote<64>(result[wave], sum, a_scale, b0, b1);
                    }
                }
            }
            if (Tile::kFine) release();
        }

        if constexpr (Tile::kSwiglu) {
            finish_swiglu(smem.result, p, result[0], result[1], tile, warpgroup);
        } else {
            K2K_NO_UNROLL  // moving 64 registers is cheaper than twice the code
                for (int wave = 0; wave < kWaves; ++wave) {
                finish_wave(smem, p, maps, result[0], tile, warpgroup,
                            tile.row + first_row + 64 * wave, tile.column + first_column);
                K2K_UNROLL
                for (int i = 0; i < kValues; ++i) result[0][i] = result[kWaves - 1][i];
            }
        }
    }
    if (threadIdx.x % 128 == 0) arch::bulk_wait<0>();
}

// ---- the kernel

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    fp8_gemm_sm90_kernel(const __grid_constant__ Fp8GemmParams p,
                         const __grid_constant__ HopperMaps maps,
                         Share share) {
    using Storage = HopperStorage<Tile>;
    Storage& smem = arch::shared_storage<Storage>();
    // From a shuffle, so that it, and with it descriptors, are in uniform registers.
    const int warp = arch::shuffle(static_cast<int>(arch::warp_id()), 0);
    const bool shares = share != Share::kNone;

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
    arch::sync_block();
    if (shares) arch::cluster_sync_relaxed();

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
    if (shares) arch::cluster_sync_relaxed();  // the other CTA's copies still land here
}

}  // namespace k2k
