#pragma once

// What the two kernels of the products share: which tile of which product a block has, and what
// becomes of its sums. They come from 256 threads, which are threads 0 to 255 of the block.

#include "arch/convert.cuh"
#include "arch/cp_async.cuh"
#include "arch/matrix.cuh"
#include "arch/warp.cuh"
#include "newton_schulz/result.cuh"

namespace k2k {

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

// What a block computes: a tile of A B.
template <class T>
struct NsWork {
    const NsStage& stage;
    const NsOp& op;
    int tensor_index, matrix;
    const NsTensor& tensor;
    bool triangular;
    bool by_columns;    // both operands lie with the tile's axis contiguous
    int rows, columns;  // of the result
    int depth;          // the summed axis
    NsTile place;
    NsMatrix<T> a, b;
};

// The work of tile `index` of a stage.
template <class T>
K2K_DEVICE NsWork<T> find_work(const NsStage& p, int64_t index) {
    int op_index = 0;
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

    // X stands on the right of a product, but on its left if m > n.
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

// A rendezvous of the threads that have the sums.
K2K_DEVICE void sync_tile(K2K_WHERE_ONLY) { arch::barrier_sync(1, kNsThreads K2K_PASS_WHERE); }

// Rounds alpha A B + beta C into `tile` and stores it where it belongs. `for_each_pair` calls its
// argument with (row, chunk of 8 columns, low, high) for each pair of this thread's sums, which are
// those of columns 2 (lane % 4) and the next of the chunk. Nobody reads or writes `tile` any more.
template <class T, class ForEachPair>
K2K_DEVICE void finish_product(const NsWork<T>& work, uint8_t* tile, ForEachPair&& for_each_pair) {
    const NsOp& op = work.op;
    const NsTile& place = work.place;
    const uint32_t tile_address = arch::smem_address(tile);
    const NsMatrix<T> c(work.tensor, work.matrix, op.c);
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
    for_each_pair([&](int row, int chunk, float low, float high) {
        auto* pair =
            reinterpret_cast<uint32_t*>(tile + tile_offset(row, chunk)) + arch::lane_id() % 4;
        low *= op.alpha;
        high *= op.alpha;
        if (op.c != NsBuffer::kNone) {
            low = fmaf(op.beta, ns_unpack<T>(*pair, 0), low);
            high = fmaf(op.beta, ns_unpack<T>(*pair, 1), high);
        }
        *pair = ns_pack<T>(low, high);
    });
    sync_tile();  // result_ready

    if (op.d == NsBuffer::kResult) {
        const NsFinish finish(work.stage.tables, work.tensor_index, work.matrix);
        finish_tile<T>(tile, finish, work.tensor.m, work.tensor.n, place);
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
        sync_tile();  // mirrored
    }
    const NsMatrix<T> d(work.tensor, work.matrix, op.d);
    if (op.d != NsBuffer::kNone) {
        store_tile(tile, d, place);
        if (work.triangular) store_mirrored(tile_address, d, place);
    }
    if (op.shifted != NsBuffer::kNone) {
        if (place.diagonal) {
            sync_tile();
            if (threadIdx.x < kNsTile) {
                uint16_t& element = diagonal_row[threadIdx.x % 8];
                const uint32_t sum = ns_pack<T>(ns_unpack<T>(element, 0) + op.diagonal, 0.0f);
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
