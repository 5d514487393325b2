#pragma once

// The products of the iteration, for every GPU from sm_80 on (Hopper has kernel_sm90.cuh). One
// launch per stage of the iteration (program.h), for all matrices of a list.
//
//     kGram       D[s, s] = X X^T                        X^T X if m > n
//     kSquare     D[s, s] = alpha A B + beta C           A, B, C symmetric; a second result D + a I
//     kMultiply   D[m, n] = A X + beta X                 X A if m > n
//
// Grid      one CTA of 8 warps per tile of 128 x 128 of a result (symmetric results: tiles of the
//           lower triangle); two CTAs per SM: one's prologue and epilogue overlap the other's main
//           loop. tile.cuh has the tile scheduler and the epilogue.
// Warps     no roles: all 8 copy and multiply. 2 x 4 of them, 64 x 32 of the tile each; a warp
//           whose part is outside of the result, or above the diagonal, only copies.
// Operands  both K-major (by rows; K is the summed axis) or both MN-major (by columns, transposed
//           by ldmatrix). A symmetric operand is both, so two loops serve all products without a
//           transposed copy: X X^T, X A and squares by rows; X^T X, A X by columns.
// Ring      three stages of 32 of K, by cp.async: two are in flight while the third is multiplied.
//           A panel's rows are 64 bytes (by rows) or 256 (by columns), with the swizzle of
//           tile/swizzle.cuh.
// Barriers  stage_landed   sync_block once a stage: all threads' copies have landed, and the stage
//                          that is filled next has been read
//           ring_read      sync_block: the last stage has been read, and the epilogue's tile may
//                          overwrite the ring; then the barriers of tile.cuh
// Epilogue  all warps, in tile.cuh: accumulators to a tile in shared memory, then whole rows to
//           memory. The other triangle is the tile by ldmatrix.trans: symmetric to the bit.
// Order     each sum runs along K in steps of 16, whatever else the launch computes.
// Shared    48 KB.
// Registers at most 128: two CTAs per SM.
// Edges     chunks outside of an operand are zero-filled; the padding of rows in memory is zero.

#include "arch/mma.cuh"
#include "arch/smem.cuh"
#include "newton_schulz/tile.cuh"
#include "tile/swizzle.cuh"

namespace k2k {

union alignas(1024) NsStorage {
    uint8_t ring[kNsStages][2][kNsPanelBytes];  // A, B [128, 32] by rows, [32, 128] by columns
    uint8_t tile[kNsTileBytes];                 // D [128, 128], in rows of 256 bytes
};

// One operand: a panel of 128 rows (columns, if kByColumns) x 32 of K per stage. Each thread copies
// two of its chunks.
template <class T, bool kByColumns>
struct NsPanel {
    const T* source;
    int64_t other, step;  // elements from the first chunk to the second, and to the next stage
    int depth_at[2];      // of the chunks, along K; kNowhere: outside of the operand
    uint32_t target;

    K2K_DEVICE NsPanel(const NsMatrix<T>& x, int first) {
        // A row of the panel is 16 chunks (by columns) or 4.
        const int row = threadIdx.x / (kByColumns ? 16 : 4);
        const int chunk = threadIdx.x % (kByColumns ? 16 : 4);
        constexpr int kNowhere = 1 << 30;
        if constexpr (kByColumns) {
            source = x.data + row * x.pitch + first + chunk * 8;
            other = 16 * x.pitch;
            step = kNsDepth * x.pitch;
            const bool inside = first + chunk * 8 < x.columns;
            depth_at[0] = inside ? row : kNowhere;
            depth_at[1] = inside ? row + 16 : kNowhere;
            target = tile::chunk_offset<256>(row, chunk);
        } else {
            source = x.data + (first + row) * x.pitch + chunk * 8;
            other = 64 * x.pitch;
            step = kNsDepth;
            depth_at[0] = first + row < x.rows ? chunk * 8 : kNowhere;
            depth_at[1] = first + row + 64 < x.rows ? chunk * 8 : kNowhere;
            target = tile::chunk_offset<64>(row, chunk);
        }
    }

    // Starts the copies of a stage to `panel`; `depth_left` of K are left. Chunks outside of the
    // operand are zero-filled; their source is `any`, a valid address.
    K2K_DEVICE void copy(uint32_t panel, const T* any, int depth_left) {
        K2K_UNROLL
        for (int i = 0; i < 2; ++i) {
            const bool valid = depth_at[i] < depth_left;
            arch::cp_async(panel + target + i * (kNsPanelBytes / 2),
                           valid ? source + i * other : any, valid);
        }
        source += step;
    }
};

// sums += the tile of A B at (first_row, first_column); sums: [64, 32] of a warp, in fragments of
// 16 x 8. `active`: the warp has a part of the result.
template <class T, bool kByColumns>
K2K_DEVICE void multiply_tile(float (&sums)[4][4][4], uint32_t ring, const NsMatrix<T>& a,
                              const NsMatrix<T>& b, int first_row, int first_column, int depth,
                              bool active) {
    NsPanel<T, kByColumns> panel_a(a, first_row), panel_b(b, first_column);
    constexpr uint32_t kStageBytes = 2 * kNsPanelBytes;
    const auto copy_stage = [&](uint32_t stage, int depth_left) {
        panel_a.copy(stage, a.data, depth_left);
        panel_b.copy(stage + kNsPanelBytes, b.data, depth_left);
    };

    // This lane's addresses for ldmatrix, in the first 16 x 16 of the warp's part of each panel.
    const int warp_row = arch::warp_id() / 4, warp_column = arch::warp_id() % 4;
    uint32_t offset_a, offset_b;
    if constexpr (kByColumns) {
        offset_a = tile::ldmatrix_address<true, true, 256>(0, 0, warp_row * 8);
        offset_b = tile::ldmatrix_address<false, true, 256>(0, 0, warp_column * 4);
    } else {
        offset_a = tile::ldmatrix_address<true, false, 64>(0, warp_row * 64, 0);
        offset_b = tile::ldmatrix_address<false, false, 64>(0, warp_column * 32, 0);
    }
    // The address 16 `tile_step` further along M or N and 16 `depth_step` along K. One of the two
    // moves to other rows, the other to other chunks of the same rows (an XOR, by the swizzle).
    const auto at = [](uint32_t base, int tile_step, int depth_step) {
        return kByColumns ? (base ^ tile_step * 32) + depth_step * 4096
                          : (base ^ depth_step * 32) + tile_step * 1024;
    };

    // Prologue: fill all stages but one.
    uint32_t filled = ring;
    const uint32_t ring_end = ring + kNsStages * kStageBytes;
    K2K_UNROLL
    for (int i = 0; i < kNsStages - 1; ++i) {
        copy_stage(filled, depth - i * kNsDepth);
        arch::cp_async_commit();
        filled += kStageBytes;
    }
    uint32_t stage = ring;
    K2K_NO_UNROLL
    for (int left = depth; left > 0; left -= kNsDepth) {
        // Wait for the oldest stage, then refill the one of the previous step.
        arch::cp_async_wait<kNsStages - 2>();
        arch::sync_block();  // stage_landed
        if (left > (kNsStages - 1) * kNsDepth) {
            copy_stage(filled, left - (kNsStages - 1) * kNsDepth);
        }
        arch::cp_async_commit();
        filled = filled + kStageBytes == ring_end ? ring : filled + kStageBytes;
        // Multiply: keep B's fragments in registers, load those of A one at a time.
        if (active) {
            K2K_UNROLL
            for (int step = 0; step < kNsDepth / 16; ++step) {
                uint32_t fragment_b[2][4];  // [16, 16] each
                K2K_UNROLL
                for (int j = 0; j < 2; ++j) {
                    arch::ldmatrix<4, kByColumns>(fragment_b[j],
                                                  at(stage + kNsPanelBytes + offset_b, j, step));
                }
                K2K_UNROLL
                for (int i = 0; i < 4; ++i) {
                    uint32_t fragment_a[4];  // [16, 16]
                    arch::ldmatrix<4, kByColumns>(fragment_a, at(stage + offset_a, i, step));
                    K2K_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        const uint32_t* pair = fragment_b[j / 2] + j % 2 * 2;
                        arch::mma_sync<T>(sums[i][j], fragment_a, {pair[0], pair[1]});
                    }
                }
            }
        }
        stage = stage + kStageBytes == ring_end ? ring : stage + kStageBytes;
    }
    // Wait for zero fills past the end: the epilogue reuses their memory.
    arch::cp_async_wait<0>();
}

template <class T>
__global__ void __launch_bounds__(kNsThreads, 2)
    newton_schulz_sm80_kernel(const __grid_constant__ NsStage p) {
    // Find this CTA's product and tile, and whether this warp has a part of the result.
    if (is_skipped(p.tables)) return;
    NsStorage& storage = arch::shared_storage<NsStorage>();
    const auto work = find_work<T>(p, blockIdx.x);
    const NsTile& place = work.place;
    const int warp_row = arch::warp_id() / 4 * 64, warp_column = arch::warp_id() % 4 * 32;
    const bool active = place.row + warp_row < work.rows &&
                        place.column + warp_column < work.columns &&
                        !(place.diagonal && warp_column >= warp_row + 64);

    // Main loop.
    float sums[4][4][4] = {};  // [64, 32] of the warp
    const uint32_t ring = arch::smem_address(&storage);
    if (work.by_columns) {
        multiply_tile<T, true>(sums, ring, work.a, work.b, place.row, place.column, work.depth,
                               active);
    } else {
        multiply_tile<T, false>(sums, ring, work.a, work.b, place.row, place.column, work.depth,
                                active);
    }
    arch::sync_block();  // ring_read

    // Epilogue: each thread's accumulators, pair by pair.
    finish_product(work, storage.tile, [&](auto&& take) {
        if (!active) return;
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                K2K_UNROLL
                for (int half = 0; half < 2; ++half) {
                    take(warp_row + i * 16 + half * 8 + arch::lane_id() / 4, warp_column / 8 + j,
                         sums[i][j][2 * half], sums[i][j][2 * half + 1]);
                }
            }
        }
    });
}

}  // namespace k2k
