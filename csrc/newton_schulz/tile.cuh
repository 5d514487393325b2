#pragma once

// What kernel_sm80.cuh and kernel_sm90.cuh share: the tile scheduler and the epilogue. Threads 0 to
// 255 of the CTA hold the accumulators of a tile and run the epilogue.
//
// Scheduler find_work: one CTA per tile. Op and tensor by prefix sums; the row in a triangle by a
//           square root. Neighbouring CTAs follow the short side: they share a panel of X in L2.
// Epilogue  finish_product: rounds alpha A B + beta C into a tile in shared memory and stores it by
//           whole rows, 16 bytes a thread; of a symmetric result the transposed tile, too.
// Barriers  kTileBarrier, of the 256 threads:
//           c_landed      C is in the tile
//           result_ready  every thread has replaced its elements of C by those of the result
//           mirrored      tiles on the diagonal: the 8 x 8 blocks on it are complete
//           shifted       a I has been added to the diagonal

#include "arch/cp_async.cuh"
#include "arch/matrix.cuh"
#include "arch/warp.cuh"
#include "newton_schulz/result.cuh"
#include "tile/pack.cuh"

namespace k2k {

// 16-byte chunks of a tile per thread; the threads store 16 rows at a time.
constexpr int kNsChunks = kNsTileBytes / 16 / kNsThreads;
static_assert(kNsChunks * 16 == kNsTile && kNsThreads == 256);

// Byte offset of a chunk in the tile. Free of bank conflicts for eight rows from a multiple of 8 on
// and for the eight that store_mirrored reads at once.
K2K_DEVICE uint32_t tile_offset(int row, int chunk) {
    return row * 256 + (chunk ^ row % 8 ^ row / 8 % 4 * 2) * 16;
}

// A tile of a result.
struct NsTile {
    int row, column;  // first row and column
    bool diagonal;    // only its lower triangle is used
};

// Tile `index` of an op's result.
K2K_DEVICE NsTile find_tile(bool triangular, int m, int n, int index) {
    if (!triangular) {
        const int rows = ceil_div(m, kNsTile), columns = ceil_div(n, kNsTile);
        const bool wide = m <= n;
        return {(wide ? index % rows : index / columns) * kNsTile,
                (wide ? index / rows : index % columns) * kNsTile, false};
    }
    // Lower triangle, row by row: row (row + 1) / 2 tiles come before a row.
    int row = static_cast<int>((sqrtf(8.0f * index + 1) - 1) / 2);
    while (triangle(row) > index) --row;  // the root was rounded
    while (triangle(row + 1) <= index) ++row;
    const int column = index - static_cast<int>(triangle(row));
    return {row * kNsTile, column * kNsTile, row == column};
}

// Stores the tile in rows of `to` [rows, columns], 16 bytes a thread.
template <class T>
K2K_DEVICE void store_tile(const uint8_t* tile, const NsMatrix<T>& to, const NsTile& place) {
    K2K_UNROLL_BY(2)
    for (int round = 0; round < kNsChunks; ++round) {
        // Half a warp stores 256 contiguous bytes; on the diagonal only the lower triangle, whose
        // 8 x 8 blocks on the diagonal are complete.
        const int row = round * 16 + threadIdx.x / 16, chunk = threadIdx.x % 16;
        if (place.diagonal && chunk > row / 8) continue;
        if (place.row + row >= to.rows || place.column + chunk * 8 >= to.columns) continue;
        T* target = to.data + (place.row + row) * to.pitch + place.column + chunk * 8;
        arch::store(reinterpret_cast<uint4*>(target),
                    *reinterpret_cast<const uint4*>(tile + tile_offset(row, chunk)));
    }
}

// Stores the transposed tile across the diagonal: 16 bytes a thread, 8 rows of a column.
template <class T>
K2K_DEVICE void store_mirrored(uint32_t tile, const NsMatrix<T>& to, const NsTile& place) {
    const int lane = arch::lane_id(), matrix = lane / 8, row = lane % 8;
    K2K_UNROLL_BY(2)
    for (int round = 0; round < kNsChunks; ++round) {
        // 32 rows of the tile and 8 of its columns: lane l gets the 8 rows from 8 (l % 4) on, of
        // column l / 4.
        const int first_row = round % 4 * 32, chunk = arch::warp_id() * 2 + round / 4;
        uint32_t words[4];
        arch::ldmatrix<4, true>(
            words, tile + tile_offset(first_row + row / 2 * 8 + matrix * 2 + row % 2, chunk));
        // They are 16 contiguous bytes of row `target_row` of D.
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

// The last product: stores the tile to the caller's result or weights.
template <class T>
K2K_DEVICE void finish_tile(const uint8_t* tile, const NsFinish& finish, int m, int n,
                            const NsTile& place) {
    K2K_NO_UNROLL
    for (int round = 0; round < kNsChunks; ++round) {
        // The caller's rows have any alignment: `finish` stores vectors or elements.
        const int row = round * 16 + threadIdx.x / 16, chunk = threadIdx.x % 16;
        const int column = place.column + chunk * 8;
        if (place.row + row >= m || column >= n) continue;
        float values[8];
        load_eight(values, reinterpret_cast<const T*>(tile + tile_offset(row, chunk)), 8);
        finish(place.row + row, column, values);
    }
}

// What a CTA computes: a tile of A B.
template <class T>
struct NsWork {
    const NsStage& stage;
    const NsOp& op;
    int tensor_index, matrix;
    const NsTensor& tensor;
    bool triangular;
    bool by_columns;    // both operands are MN-major, else K-major
    int rows, columns;  // of the result
    int depth;          // length of K, the summed axis
    NsTile place;
    NsMatrix<T> a, b;
};

// The work of tile `index` of a stage.
template <class T>
K2K_DEVICE NsWork<T> find_work(const NsStage& p, int64_t index) {
    // Find op, tensor and matrix; tiles are numbered in this order.
    int op_index = 0;
    while (index >= p.ops[op_index].tiles) index -= p.ops[op_index++].tiles;
    const NsOp& op = p.ops[op_index];
    const bool triangular = op.kind != NsKind::kMultiply;
    const auto first = triangular ? &NsTensor::first_triangle : &NsTensor::first_tile;
    const int tensor_index = find_tensor(p.tables.tensors, first, op.begin, op.end, index);
    const NsTensor& tensor = p.tables.tensors[tensor_index];
    const int m = tensor.m, n = tensor.n;
    // 32 bits, as the grid is smaller than 2^31: a shorter division.
    const auto at = static_cast<uint32_t>(index - tensor.*first);
    const auto tiles = static_cast<uint32_t>(triangular ? triangle_tiles(m, n) : full_tiles(m, n));
    const int matrix = at / tiles;

    // X is the right factor of kMultiply, but the left one if m > n.
    const bool swap = op.kind == NsKind::kMultiply && m > n;
    const int short_side = m < n ? m : n, long_side = m < n ? n : m;
    return {p,
            op,
            tensor_index,
            matrix,
            tensor,
            triangular,
            op.kind == NsKind::kGram ? m > n : op.kind == NsKind::kMultiply && m <= n,
            triangular ? short_side : m,
            triangular ? short_side : n,
            op.kind == NsKind::kGram ? long_side : short_side,
            find_tile(triangular, m, n, at % tiles),
            NsMatrix<T>(tensor, matrix, swap ? op.b : op.a),
            NsMatrix<T>(tensor, matrix, swap ? op.a : op.b)};
}

// Waits for the 256 threads that have the accumulators. (Barrier 0 is sync_block.)
constexpr uint32_t kTileBarrier = 1;
K2K_DEVICE void sync_tile(K2K_WHERE_ONLY) {
    arch::barrier_sync(kTileBarrier, kNsThreads K2K_PASS_WHERE);
}

// The epilogue: rounds alpha A B + beta C into `tile` and stores it. `for_each_pair` calls its
// argument with (row, chunk of 8 columns, low, high) for each pair of this thread's accumulators,
// columns 2 (lane % 4) and the next of the chunk. `tile` overlaps the ring, which has been read.
template <class T, class ForEachPair>
K2K_DEVICE void finish_product(const NsWork<T>& work, uint8_t* tile, ForEachPair&& for_each_pair) {
    const NsOp& op = work.op;
    const NsTile& place = work.place;
    const uint32_t tile_address = arch::smem_address(tile);
    const NsMatrix<T> c(work.tensor, work.matrix, op.c);
    // Copy C into the tile by whole rows: in accumulator layout, loads would be 4 bytes each.
    if (op.c != NsBuffer::kNone) {
        K2K_UNROLL_BY(4)
        for (int round = 0; round < kNsChunks; ++round) {
            const int row = round * 16 + threadIdx.x / 16, chunk = threadIdx.x % 16;
            const bool valid =
                place.row + row < work.rows && place.column + chunk * 8 < work.columns;
            const T* source = c.data;
            if (valid) source += (place.row + row) * c.pitch + place.column + chunk * 8;
            arch::cp_async(tile_address + tile_offset(row, chunk), source, valid);
        }
        arch::cp_async_commit();
        arch::cp_async_wait<0>();
        sync_tile();  // c_landed
    }
    // Replace each pair of C by alpha A B + beta C, rounded once.
    for_each_pair([&](int row, int chunk, float low, float high) {
        auto* pair =
            reinterpret_cast<uint32_t*>(tile + tile_offset(row, chunk)) + arch::lane_id() % 4;
        low *= op.alpha;
        high *= op.alpha;
        if (op.c != NsBuffer::kNone) {
            low = fmaf(op.beta, tile::unpack<T>(*pair, 0), low);
            high = fmaf(op.beta, tile::unpack<T>(*pair, 1), high);
        }
        *pair = tile::pack<T>(low, high);
    });
    sync_tile();  // result_ready

    // The last product: to the caller's result or weights.
    if (op.d == NsBuffer::kResult) {
        const NsFinish finish(work.stage.tables, work.tensor_index, work.matrix);
        finish_tile<T>(tile, finish, work.tensor.m, work.tensor.n, place);
        return;
    }
    // On the diagonal: complete the 8 x 8 blocks from below it, so that D is symmetric to the bit.
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
        sync_tile();  // mirrored
    }
    // Store D, and its other triangle from the transposed tile.
    const NsMatrix<T> d(work.tensor, work.matrix, op.d);
    if (op.d != NsBuffer::kNone) {
        store_tile(tile, d, place);
        if (work.triangular) store_mirrored(tile_address, d, place);
    }
    // The second result, D + a I.
    if (op.shifted != NsBuffer::kNone) {
        if (place.diagonal) {
            sync_tile();
            if (threadIdx.x < kNsTile) {
                uint16_t& element = diagonal_row[threadIdx.x % 8];
                const uint32_t sum = tile::pack<T>(tile::unpack<T>(element, 0) + op.diagonal, 0.0f);
                element = static_cast<uint16_t>(sum);
            }
            sync_tile();  // shifted
        }
        const NsMatrix<T> shifted(work.tensor, work.matrix, op.shifted);
        store_tile(tile, shifted, place);
        store_mirrored(tile_address, shifted, place);
    }
}

}  // namespace k2k
