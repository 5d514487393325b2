#pragma once

// The grouped matrix products of unquantised experts, and both gradients, from sm_80 on:
//
//     forward   D[s, n]    = sum over k of A[s, k] B[g, n, k]       s: the slots of group g
//     dgrad     D[s, k]    = sum over n of A[s, n] B[g, n, k]
//     wgrad     D[g, n, k] = sum over s of A[s, n] B[s, k]          zeros for an empty group
//
// Grid      Persistent CTAs, as many as fit; CTA i takes tiles i, i + grid, ... of the tile
//           scheduler tile/group_tiles.cuh, which reads the groups' sizes on the device.
// Warps     All warps load, multiply and store. 128 x 128: 2 x 4 warps of 64 x 32; 16 x 128: 4
//           warps of 16 x 32.
// Operands  "By rows" if the summed axis is contiguous (A and B of the forward pass, A of dgrad),
//           "by columns" if the tile's axis is: these are read by ldmatrix.trans.
// Ring      Stages of kDepth of the summed axis, filled by cp.async. By rows a panel has 64 or 128
//           bytes for each row of the tile, by columns 256 bytes for each step of the summed axis;
//           16-byte chunk c of row r is at c ^ (r % 8), or c ^ (r / 2 % 4) in rows of 64 bytes.
// Barriers  One sync_block per stage: all threads' copies of the stage have landed, and the stage
//           that is filled next is no longer read.
// Tiles     The ring continues across tiles: the next tile's first stages load during this one's
//           epilogue. They overwrite stages that were read before the last sync_block.
// Order     of a sum: 16 of the summed axis at a time, from the group's first on, independent of
//           the rest of the batch.
// Edges     Chunks outside an operand or a group become zeros and are not read; rows and columns
//           outside D are not stored.
// Shared    64 KB for 128 x 128 (4 stages of 32), 72 KB for 16 x 128 (4 stages of 64).
// Registers at most 128: two CTAs per SM.
// Limits    rows of A and B begin at multiples of 16 bytes; bfloat16 and float16.

#include "arch/cp_async.cuh"
#include "arch/matrix.cuh"
#include "arch/mma.cuh"
#include "arch/smem.cuh"
#include "grouped_gemm/config.h"
#include "tile/group_tiles.cuh"
#include "tile/store_row.cuh"
#include "tile/swizzle.cuh"

namespace k2k {

// One operand's part of a stage in shared memory, kOuter of the tile's axis by kDepth of the summed
// axis, and the copies of a thread into it.
template <class T, int kOuter, int kDepth, int kThreads, bool kByColumns>
class GroupedPanel {
  public:
    static constexpr int kRows = kByColumns ? kDepth : kOuter;
    static constexpr int kRowChunks = (kByColumns ? kOuter : kDepth) / 8;  // of 16 bytes
    static constexpr int kRowBytes = kRowChunks * 16;
    static constexpr int kBytes = kRows * kRowBytes;
    static_assert(kRowChunks == 4 || kRowChunks == 8 || kRowChunks == 16);

    K2K_HOST_DEVICE static constexpr uint32_t offset(int row, int chunk) {
        return tile::chunk_offset<kRowBytes>(row, chunk);
    }

    // Sets the first chunk of this thread in the matrix at `source`: position `outer` of the tile's
    // axis, where `outer_left` remain, and `depth` of the summed axis.
    K2K_DEVICE void begin(const T* source, int64_t stride, int64_t outer, int64_t outer_left,
                          int64_t depth) {
        static_assert(in_all_banks(),
                      "the eight rows that ldmatrix reads at once must not collide");
        const int row = threadIdx.x / kRowChunks, column = threadIdx.x % kRowChunks * 8;
        stride_ = stride;
        if constexpr (kByColumns) {
            source_ = source + (depth + row) * stride + outer + column;
            outer_left_ = bytes(outer_left - column);
        } else {
            source_ = source + (outer + row) * stride + depth + column;
            const int64_t rows = outer_left - row;
            outer_left_ = rows < kRows ? static_cast<int>(rows) : kRows;
        }
    }

    // Starts the copies of the next stage, with `depth_left` of the summed axis remaining. `any` is
    // a valid address for copies that read nothing.
    K2K_DEVICE void copy(uint32_t panel, int depth_left, const T* any) {
        const int row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
        const uint32_t target = panel + offset(row, chunk);
        const int size = kByColumns ? outer_left_ : bytes(depth_left - 8 * chunk);
        const int rows = kByColumns ? depth_left - row : outer_left_;
        K2K_UNROLL
        for (int i = 0; i < kCopies; ++i) {
            const bool valid = i * kStep < rows && size > 0;
            arch::cp_async_partial(target + i * kStep * kRowBytes,
                                   valid ? source_ + i * kStep * stride_ : any, valid ? size : 0);
        }
        source_ += kByColumns ? kDepth * stride_ : kDepth;
    }

  private:
    static constexpr int kStep = kThreads / kRowChunks;  // rows between a thread's chunks
    static constexpr int kCopies = kRows / kStep;
    static_assert(kCopies * kStep == kRows && kStep % 8 == 0, "the swizzle is that of row 0");

    // Whether the same chunk of eight rows, from a multiple of 8 on, is in eight different banks.
    static constexpr bool in_all_banks() {
        for (int chunk = 0; chunk < kRowChunks; ++chunk) {
            for (int first = 0; first < kRows; first += 8) {
                unsigned places = 0;
                for (int row = first; row < first + 8; ++row)
                    places |= 1u << offset(row, chunk) / 16 % 8;
                if (places != 0xff) return false;
            }
        }
        return true;
    }

    // Valid bytes of a chunk of which `elements` elements exist.
    K2K_DEVICE static int bytes(int64_t elements) {
        return elements <= 0 ? 0 : elements < 8 ? static_cast<int>(elements) * 2 : 16;
    }

    const T* source_;
    int64_t stride_;
    int outer_left_;  // by rows: rows that exist; by columns: valid bytes of the chunk
};

template <class T, class Tile, bool kAByColumns, bool kBByColumns>
struct GroupedGemmPanels {
    using A = GroupedPanel<T, Tile::kRows, Tile::kDepth, Tile::kThreads, kAByColumns>;
    using B = GroupedPanel<T, Tile::kColumns, Tile::kDepth, Tile::kThreads, kBByColumns>;
    struct alignas(128) Storage {
        struct Stage {
            uint8_t a[A::kBytes], b[B::kBytes];
        } stages[Tile::kStages];
    };
};

// sums += A B of a stage, for the warp's kWarpRows x 32: [16 rows][8 columns][fragment].
template <class T, class Tile, bool kAByColumns, bool kBByColumns>
K2K_DEVICE void multiply_stage(float (&sums)[Tile::kWarpRows / 16][4][4], uint32_t stage,
                               int warp_row, int warp_column) {
    using Panels = GroupedGemmPanels<T, Tile, kAByColumns, kBByColumns>;
    using A = typename Panels::A;
    using B = typename Panels::B;
    // ldmatrix: lane l addresses row l % 8 of 8 x 8 matrix l / 8.
    const int lane = arch::lane_id(), matrix = lane / 8, row = lane % 8;
    const uint32_t a =
        stage + (kAByColumns ? A::offset(matrix / 2 * 8 + row, warp_row / 8 + matrix % 2)
                             : A::offset(warp_row + matrix % 2 * 8 + row, matrix / 2));
    const uint32_t b = stage + A::kBytes +
                       (kBByColumns ? B::offset(matrix % 2 * 8 + row, warp_column / 8 + matrix / 2)
                                    : B::offset(warp_column + matrix / 2 * 8 + row, matrix % 2));
    // Address 16 further along the tile's axis (outer) or the summed axis (depth): one of them
    // moves to other rows, the other to other chunks of the same rows.
    const auto at = [](uint32_t base, bool by_columns, int row_bytes, int outer, int depth) {
        return by_columns ? (base ^ outer * 32) + depth * 16 * row_bytes
                          : (base ^ depth * 32) + outer * 16 * row_bytes;
    };
    K2K_UNROLL
    for (int depth = 0; depth < Tile::kDepth / 16; ++depth) {
        // Load fragments of B: 16 of the summed axis x 32 columns.
        uint32_t b_words[2][4];
        K2K_UNROLL
        for (int j = 0; j < 2; ++j) {
            arch::ldmatrix<4, kBByColumns>(b_words[j], at(b, kBByColumns, B::kRowBytes, j, depth));
        }
        K2K_UNROLL
        for (int i = 0; i < Tile::kWarpRows / 16; ++i) {
            // Load a fragment of A, 16 rows, and multiply it with all columns.
            uint32_t a_words[4];
            arch::ldmatrix<4, kAByColumns>(a_words, at(a, kAByColumns, A::kRowBytes, i, depth));
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                const uint32_t* pair = b_words[j / 2] + j % 2 * 2;
                arch::mma_sync<T>(sums[i][j], a_words, {pair[0], pair[1]});
            }
        }
    }
}

template <class T, class Tile, bool kAByColumns, bool kBByColumns>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas)
    grouped_gemm_kernel(const __grid_constant__ GroupedGemmParams p) {
    using Panels = GroupedGemmPanels<T, Tile, kAByColumns, kBByColumns>;
    using Stage = typename Panels::Storage::Stage;
    constexpr uint32_t kRingBytes = sizeof(typename Panels::Storage);
    const uint32_t ring = arch::smem_address(&arch::shared_storage<typename Panels::Storage>());
    // This warp's part of the tile.
    constexpr int kWarpsAcross = Tile::kColumns / Tile::kWarpColumns;
    const int warp_row = arch::warp_id() / kWarpsAcross * Tile::kWarpRows;
    const int warp_column = arch::warp_id() % kWarpsAcross * Tile::kWarpColumns;
    const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);

    typename Panels::A a_panel;
    typename Panels::B b_panel;
    uint32_t filled = 0, read = 0;  // offsets of the stages that are filled and read next
    int left = 0;                   // of the summed axis, not yet loaded
    const auto next = [](uint32_t& stage) {
        stage = stage + sizeof(Stage) == kRingBytes ? 0 : stage + uint32_t(sizeof(Stage));
    };
    // Fills the next stage of the ring; at a tile's end commits an empty cp.async group, so that
    // cp_async_wait counts stages.
    const auto fill = [&] {
        if (left > 0) {
            a_panel.copy(ring + filled, left, a);
            b_panel.copy(ring + filled + Panels::A::kBytes, left, b);
            next(filled);
            left -= Tile::kDepth;
        }
        arch::cp_async_commit();
    };

    tile::GroupTiles tiles({p.groups, p.rows, p.columns, p.depth}, Tile::kRows, Tile::kColumns,
                           kBandRows);
    tile::GroupTile found;
    int index = blockIdx.x;
    const auto find = [&] {
        // Find the next tile of this CTA from the groups' sizes in device memory.
        const bool is_one = tiles.find(index, found);
        index += gridDim.x;
        if (!is_one) return false;
        a_panel.begin(a, p.a_row_stride, found.first_row + found.row, found.rows - found.row,
                      found.k_begin);
        b_panel.begin(b + found.group * p.b_matrix_stride, p.b_row_stride, found.column,
                      p.columns - found.column, found.k_begin);
        // Prologue: start the loads of all stages but one.
        left = found.k_end - found.k_begin;
        K2K_NO_UNROLL
        for (int i = 0; i < Tile::kStages - 1; ++i) fill();
        return true;
    };

    for (bool more = find(); more;) {
        // Main loop over the summed axis.
        const tile::GroupTile tile = found;
        float sums[Tile::kWarpRows / 16][4][4] = {};
        K2K_NO_UNROLL
        for (int depth = tile.k_begin; depth < tile.k_end; depth += Tile::kDepth) {
            // Wait for the oldest stage of all threads; refill the stage that was read before it.
            arch::cp_async_wait<Tile::kStages - 2>();
            arch::sync_block();
            fill();
            multiply_stage<T, Tile, kAByColumns, kBByColumns>(sums, ring + read, warp_row,
                                                              warp_column);
            next(read);
        }
        // Start the loads of the next tile before this tile's epilogue.
        more = find();

        // Epilogue: round, transpose in quads of lanes, store 16 bytes per lane.
        const int row = tile.row + warp_row + static_cast<int>(arch::lane_id()) / 4;
        const int column = tile.column + warp_column + static_cast<int>(arch::lane_id()) % 4 * 2;
        T* d = static_cast<T*>(p.d) + tile.group * p.d_matrix_stride +
               (tile.first_row + row) * p.columns + column;
        const bool aligned = p.columns % 8 == 0 && reinterpret_cast<uintptr_t>(p.d) % 16 == 0;
        K2K_UNROLL
        for (int i = 0; i < Tile::kWarpRows / 16; ++i) {
            float values[16];
            K2K_UNROLL
            for (int j = 0; j < 16; ++j) values[j] = sums[i][j / 4][j % 4];
            K2K_UNROLL
            for (int h = 0; h < 2; ++h) {
                const int below = 16 * i + 8 * h;
                const int64_t columns = row + below < tile.rows ? p.columns - column : 0;
                tile::store_row(d + below * p.columns, values, h, columns, aligned);
            }
        }
    }
    // Do not exit with copies in flight.
    arch::cp_async_wait<0>();
}

}  // namespace k2k
