#pragma once

// The products of the iteration, for every GPU from sm_80 on; one launch a stage, for all matrices
// of a list.
//
//     kGram       D[s, s] = X X^T                        X^T X if m > n
//     kSquare     D[s, s] = alpha A B + beta C           A, B, C symmetric; a second result D + a I
//     kMultiply   D[m, n] = A X + beta X                 X A if m > n
//
// Grid      a block of 8 warps for each tile of 128 x 128 of a result; the hardware hands tiles to
//           multiprocessors as they become free. Of a symmetric result there are the tiles of the
//           lower triangle, row by row; of the others those along the short side come first, which
//           share a panel of X. Which op, tensor, matrix and tile: prefix sums, a binary search, a
//           triangular root.
// Warps     2 x 4 of 64 x 32; those whose part is not wanted compute nothing.
// Operands  either both lie with the summed axis contiguous, or both with the tile's axis so,
//           which ldmatrix transposes. Symmetric operands are both, so this serves all without a
//           transposed copy: X X^T and X A by rows, X^T X and A X by columns.
// Ring      three stages of 32 of the summed axis, by cp.async: two are on their way while the
//           third is multiplied. By rows a panel's row is 64 bytes, chunk c of 16 at
//           c ^ (row / 2 % 4); by columns 256 bytes, chunk c at c ^ (row % 8).
// Barriers  stage_landed   sync_block a round: all threads' copies are there, and nobody reads the
//                          stage that is filled next
//           ring_read      the tile of the epilogue lies where the ring was
//           c_landed       C, copied whole rows at a time, is there
//           result_ready   each thread has put its sums in the place of its elements of C
//           mirrored       8 x 8 blocks on the diagonal, shifted: the diagonal, before it is stored
// Mirror    the other triangle is a copy: ldmatrix.trans of the tile, with rows chosen such that
//           a thread gets eight neighbours of a row. So results are symmetric to the bit.
// Order     of a sum: along the summed axis, 16 by 16, whatever else the launch computes.
// Shared    48 KB.
// Registers at most 128: two blocks a multiprocessor.
// Edges     chunks outside of an operand arrive as zeros, and so do the ends of padded rows.

#include "arch/convert.cuh"
#include "arch/cp_async.cuh"
#include "arch/matrix.cuh"
#include "arch/mma.cuh"
#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "newton_schulz/result.cuh"

namespace k2k {

union alignas(1024) NsStorage {
    uint8_t ring[kNsStages][2][kNsPanelBytes];
    uint8_t tile[kNsTileBytes];  // in rows of 256 bytes
};

// Of a tile, for each thread; the threads of a round have 16 rows.
constexpr int kNsChunks = kNsTileBytes / 16 / kNsThreads;
static_assert(kNsChunks * 16 == kNsTile && kNsThreads == 256);

template <class T>
K2K_DEVICE uint32_t ns_pack(float low, float high) {
    return std::is_same_v<T, bf16> ? arch::pack_bf16(low, high) : arch::pack_fp16(low, high);
}
template <class T>
K2K_DEVICE float ns_unpack(uint32_t pair, int which) {
    return arch::to_float(T{static_cast<uint16_t>(pair >> 16 * which)});
}

// Where the tile keeps 16 bytes: any eight rows in a multiple of 8, and the eight that
// `store_mirrored` reads at once, have a chunk in eight different places.
K2K_DEVICE uint32_t tile_offset(int row, int chunk) {
    return row * 256 + (chunk ^ row % 8 ^ row / 8 % 4 * 2) * 16;
}

// One operand: 128 rows of it (columns, if kByColumns) along the summed axis, of which each thread
// copies two chunks a stage.
template <class T, bool kByColumns>
struct NsPanel {
    const T* source;
    int64_t other, step;  // from a chunk to the thread's other one, and to the next stage
    int depth_at[2];      // where the chunks stand on the summed axis; far beyond it: not at all
    uint32_t target;

    K2K_DEVICE NsPanel(const NsMatrix<T>& x, int first) {
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
            target = row * 256 + (chunk ^ row % 8) * 16;
        } else {
            source = x.data + (first + row) * x.pitch + chunk * 8;
            other = 64 * x.pitch;
            step = kNsDepth;
            depth_at[0] = first + row < x.rows ? chunk * 8 : kNowhere;
            depth_at[1] = first + row + 64 < x.rows ? chunk * 8 : kNowhere;
            target = row * 64 + (chunk ^ row / 2 % 4) * 16;
        }
    }

    // Starts the copies of the stage at `panel`, with `depth_left` of the summed axis still to
    // come.
    K2K_DEVICE void copy(uint32_t panel, const T* any, int depth_left K2K_WHERE) {
        K2K_UNROLL
        for (int i = 0; i < 2; ++i) {
            const bool valid = depth_at[i] < depth_left;
            arch::cp_async(panel + target + i * (kNsPanelBytes / 2),
                           valid ? source + i * other : any, valid K2K_PASS_WHERE);
        }
        source += step;
    }
};

// sums += A[first_row ..][:] B[:][first_column ..], both panels as NsPanel says.
template <class T, bool kByColumns>
K2K_DEVICE void multiply_tile(float (&sums)[4][4][4],
                              uint32_t ring,
                              const NsMatrix<T>& a,
                              const NsMatrix<T>& b,
                              int first_row,
                              int first_column,
                              int depth,
                              bool active K2K_WHERE) {
    NsPanel<T, kByColumns> panel_a(a, first_row), panel_b(b, first_column);
    constexpr uint32_t kStageBytes = 2 * kNsPanelBytes;
    const auto copy_stage = [&](uint32_t stage, int depth_left) {
        panel_a.copy(stage, a.data, depth_left K2K_PASS_WHERE);
        panel_b.copy(stage + kNsPanelBytes, b.data, depth_left K2K_PASS_WHERE);
    };

    // Which row of which 8 x 8 matrix this lane addresses for ldmatrix.
    const int lane = arch::lane_id(), matrix = lane / 8, row = lane % 8;
    const int warp_row = arch::warp_id() / 4, warp_column = arch::warp_id() % 4;
    uint32_t offset_a, offset_b;
    if constexpr (kByColumns) {
        offset_a = (matrix / 2 * 8 + row) * 256 + warp_row * 128 + (matrix % 2 ^ row) * 16;
        offset_b = (matrix % 2 * 8 + row) * 256 + warp_column / 2 * 128 +
                   ((warp_column % 2 * 4 + matrix / 2) ^ row) * 16;
    } else {
        offset_a = (warp_row * 64 + matrix % 2 * 8 + row) * 64 + (matrix / 2 ^ row / 2) * 16;
        offset_b = (warp_column * 32 + matrix / 2 * 8 + row) * 64 + (matrix % 2 ^ row / 2) * 16;
    }
    // 16 of the tile's axis further, and 16 of the summed one: of these two, one goes to other rows
    // and one to other chunks of the same.
    const auto at = [](uint32_t base, int tile_step, int depth_step) {
        return kByColumns ? (base ^ tile_step * 32) + depth_step * 4096
                          : (base ^ depth_step * 32) + tile_step * 1024;
    };

    uint32_t filled = ring;
    const uint32_t ring_end = ring + kNsStages * kStageBytes;
    K2K_UNROLL
    for (int i = 0; i < kNsStages - 1; ++i) {
        copy_stage(filled, depth - i * kNsDepth);
        arch::cp_async_commit(K2K_PASS_WHERE_ONLY);
        filled += kStageBytes;
    }
    uint32_t stage = ring;
    K2K_NO_UNROLL
    for (int left = depth; left > 0; left -= kNsDepth) {
        arch::cp_async_wait<kNsStages - 2>(K2K_PASS_WHERE_ONLY);
        arch::sync_block(K2K_PASS_WHERE_ONLY);  // stage_landed
        if (left > (kNsStages - 1) * kNsDepth) {
            copy_stage(filled, left - (kNsStages - 1) * kNsDepth);
        }
        arch::cp_async_commit(K2K_PASS_WHERE_ONLY);
        filled = filled + kStageBytes == ring_end ? ring : filled + kStageBytes;
        if (active) {
            K2K_UNROLL
            for (int step = 0; step < kNsDepth / 16; ++step) {
                uint32_t fragment_b[2][4];
                K2K_UNROLL
                for (int j = 0; j < 2; ++j) {
                    arch::ldmatrix<4, kByColumns>(fragment_b[j],
                                                  at(stage + kNsPanelBytes + offset_b, j, step)
                                                      K2K_PASS_WHERE);
                }
                K2K_UNROLL
                for (int i = 0; i < 4; ++i) {
                    uint32_t fragment_a[4];
                    arch::ldmatrix<4, kByColumns>(fragment_a,
                                                  at(stage + offset_a, i, step) K2K_PASS_WHERE);
                    K2K_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        const uint32_t* pair = fragment_b[j / 2] + j % 2 * 2;
                        arch::mma_sync<T>(sums[i][j], fragment_a,
                                          {pair[0], pair[1]} K2K_PASS_WHERE);
                    }
                }
            }
        }
        stage = stage + kStageBytes == ring_end ? ring : stage + kStageBytes;
    }
    arch::cp_async_wait<0>(K2K_PASS_WHERE_ONLY);
}

// A tile of a result.
struct NsTile {
    int row, column;  // its first
    bool mirrored;    // it stands for the one beyond the diagonal too
    bool diagonal;    // only what is below the diagonal counts
};

// Tile `index` of an op's result.
K2K_DEVICE NsTile find_tile(bool triangular, int m, int n, int index) {
    if (!triangular) {
        const int rows = static_cast<int>(ceil_div(m, kNsTile));
        const int columns = static_cast<int>(ceil_div(n, kNsTile));
        const bool wide = m <= n;
        return {(wide ? index % rows : index / columns) * kNsTile,
                (wide ? index / rows : index % columns) * kNsTile, false, false};
    }
    int row = static_cast<int>((sqrtf(8.0f * index + 1) - 1) / 2);
    while (triangle(row) > index) --row;  // the root was rounded
    while (triangle(row + 1) <= index) ++row;
    const int column = index - static_cast<int>(triangle(row));
    return {row * kNsTile, column * kNsTile, row != column, row == column};
}

// Stores the tile in rows of `to` [rows, columns], 16 bytes a thread.
template <class T>
K2K_DEVICE void store_tile(const uint8_t* tile, const NsMatrix<T>& to, const NsTile& place) {
    K2K_UNROLL_BY(2)
    for (int round = 0; round < kNsChunks; ++round) {
        const int row = round * 16 + threadIdx.x / 16, chunk = threadIdx.x % 16;
        if (place.diagonal && chunk > row / 8) continue;
        if (place.row + row >= to.rows || place.column + chunk * 8 >= to.columns) continue;
        T* target = to.data + (place.row + row) * to.pitch + place.column + chunk * 8;
        arch::store(reinterpret_cast<uint4*>(target),
                    *reinterpret_cast<const uint4*>(tile + tile_offset(row, chunk)));
    }
}

// Stores its transpose on the other side of the diagonal.
template <class T>
K2K_DEVICE void store_mirrored(uint32_t tile,
                               const NsMatrix<T>& to,
                               const NsTile& place K2K_WHERE) {
    const int lane = arch::lane_id(), matrix = lane / 8, row = lane % 8;
    K2K_UNROLL_BY(2)
    for (int round = 0; round < kNsChunks; ++round) {
        // 32 rows of the tile and 8 of its columns: lane l gets the 8 rows from 8 (l % 4) on, of
        // column l / 4.
        const int first_row = round % 4 * 32, chunk = arch::warp_id() * 2 + round / 4;
        uint32_t words[4];
        arch::ldmatrix<4, true>(
            words, tile + tile_offset(first_row + row / 2 * 8 + matrix * 2 + row % 2, chunk)
                              K2K_PASS_WHERE);
        const int from = first_row + lane % 4 * 8;
        const int target_row = place.column + chunk * 8 + lane / 4,
                  target_column = place.row + from;
        if (place.diagonal && from / 8 <= chunk) continue;
        if (target_row >= to.rows || target_column >= to.columns) continue;
        T* target = to.data + target_row * to.pitch + target_column;
        arch::store(reinterpret_cast<uint4*>(target),
                    make_uint4(words[0], words[1], words[2], words[3]));
    }
}

// The last product: the tile goes where `finish` says.
template <class T>
K2K_DEVICE void finish_tile(
    const uint8_t* tile, const NsFinish& finish, int m, int n, const NsTile& place K2K_WHERE) {
    K2K_NO_UNROLL
    for (int round = 0; round < kNsChunks; ++round) {
        const int row = round * 16 + threadIdx.x / 16, chunk = threadIdx.x % 16;
        const int column = place.column + chunk * 8;
        if (place.row + row >= m || column >= n) continue;
        float values[8];
        load_eight(values, reinterpret_cast<const T*>(tile + tile_offset(row, chunk)), 8);
        finish(place.row + row, column, values K2K_PASS_WHERE);
    }
}

template <class T>
__global__ void __launch_bounds__(kNsThreads, 2)
    newton_schulz_sm80_kernel(const __grid_constant__ NsStage p) {
    if (is_skipped(p.tables)) return;
    NsStorage& storage = arch::shared_storage<NsStorage>();
    uint8_t* tile = storage.tile;

    int op_index = 0;
    int64_t index = blockIdx.x;
    while (index >= p.ops[op_index].tiles) index -= p.ops[op_index++].tiles;
    const NsOp& op = p.ops[op_index];
    const bool triangular = op.kind != NsKind::kMultiply;
    const auto first = triangular ? &NsTensor::first_triangle : &NsTensor::first_tile;
    const int tensor_index = find_tensor(p.tables.tensors, first, op.begin, op.end, index);
    const NsTensor& tensor = p.tables.tensors[tensor_index];
    const int m = tensor.m, n = tensor.n;
    // Below 2^31, like the grid: a short division.
    const auto at = static_cast<uint32_t>(index - tensor.*first);
    const auto tiles = static_cast<uint32_t>(triangular ? triangle_tiles(m, n) : full_tiles(m, n));
    const int matrix = at / tiles;
    const NsTile place = find_tile(triangular, m, n, at % tiles);

    // X stands on the right of a product, but on its left if m > n.
    const bool swap = op.kind == NsKind::kMultiply && m > n;
    const NsMatrix<T> a(tensor, matrix, swap ? op.b : op.a);
    const NsMatrix<T> b(tensor, matrix, swap ? op.a : op.b);
    const int short_side = m < n ? m : n, long_side = m < n ? n : m;
    const int rows = triangular ? short_side : m, columns = triangular ? short_side : n;
    const int warp_row = arch::warp_id() / 4 * 64, warp_column = arch::warp_id() % 4 * 32;
    const bool active = place.row + warp_row < rows && place.column + warp_column < columns &&
                        !(place.diagonal && warp_column >= warp_row + 64);
    const bool by_columns =
        op.kind == NsKind::kGram ? m > n : op.kind == NsKind::kMultiply && m <= n;
    const int depth = op.kind == NsKind::kGram ? long_side : short_side;

    float sums[4][4][4] = {};
    const uint32_t ring = arch::smem_address(&storage);
    if (by_columns) {
        multiply_tile<T, true>(sums, ring, a, b, place.row, place.column, depth, active);
    } else {
        multiply_tile<T, false>(sums, ring, a, b, place.row, place.column, depth, active);
    }
    arch::sync_block();  // ring_read

    const NsMatrix<T> c(tensor, matrix, op.c);
    if (op.c != NsBuffer::kNone) {
        K2K_UNROLL_BY(4)
        for (int round = 0; round < kNsChunks; ++round) {
            const int row = round * 16 + threadIdx.x / 16, chunk = threadIdx.x % 16;
            const bool valid = place.row + row < rows && place.column + chunk * 8 < columns;
            const T* source = c.data;
            if (valid) source += (place.row + row) * c.pitch + place.column + chunk * 8;
            arch::cp_async(ring + tile_offset(row, chunk), source, valid);
        }
        arch::cp_async_commit();
        arch::cp_async_wait<0>();
        arch::sync_block();  // c_landed
    }
    const int lane = arch::lane_id();
    if (active) {
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                K2K_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int row = warp_row + i * 16 + half * 8 + lane / 4;
                    auto* pair =
                        reinterpret_cast<uint32_t*>(tile + tile_offset(row, warp_column / 8 + j)) +
                        lane % 4;
                    float low = op.alpha * sums[i][j][2 * half];
                    float high = op.alpha * sums[i][j][2 * half + 1];
                    if (op.c != NsBuffer::kNone) {
                        low = fmaf(op.beta, ns_unpack<T>(*pair, 0), low);
                        high = fmaf(op.beta, ns_unpack<T>(*pair, 1), high);
                    }
                    *pair = ns_pack<T>(low, high);
                }
            }
        }
    }
    arch::sync_block();  // result_ready

    if (op.d == NsBuffer::kResult) {
        finish_tile<T>(tile, NsFinish(p.tables, tensor_index, matrix), m, n, place);
        return;
    }
    auto* diagonal_row = reinterpret_cast<uint16_t*>(
        tile + tile_offset(threadIdx.x % kNsTile, threadIdx.x % kNsTile / 8));
    if (place.diagonal) {
        if (threadIdx.x < kNsTile) {
            const int at = threadIdx.x % 8;
            for (int j = at + 1; j < 8; ++j) {
                const int below = threadIdx.x - at + j;
                diagonal_row[j] =
                    reinterpret_cast<const uint16_t*>(tile + tile_offset(below, below / 8))[at];
            }
        }
        arch::sync_block();  // mirrored
    }
    const NsMatrix<T> d(tensor, matrix, op.d);
    if (op.d != NsBuffer::kNone) {
        store_tile(tile, d, place);
        if (triangular) store_mirrored(ring, d, place);
    }
    if (op.shifted != NsBuffer::kNone) {
        if (place.diagonal) {
            arch::sync_block();
            if (threadIdx.x < kNsTile) {
                uint16_t& element = diagonal_row[threadIdx.x % 8];
                const uint32_t sum = ns_pack<T>(ns_unpack<T>(element, 0) + op.diagonal, 0.0f);
                element = static_cast<uint16_t>(sum);
            }
            arch::sync_block();  // shifted
        }
        const NsMatrix<T> shifted(tensor, matrix, op.shifted);
        store_tile(tile, shifted, place);
        store_mirrored(ring, shifted, place);
    }
}

}  // namespace k2k
