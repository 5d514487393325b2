#pragma once

// The transpose, quantised along what were rows: weight gradients reduce over tokens, and 8-bit
// operands of Hopper's tensor cores must have the reduced axis contiguous.
//
//     codes[k, m], scales[k, m / 128] <- x[m, k]         the bits of quantize_1x128(x^T)
//
// Tile      128 rows (tokens) x 128 bytes of columns per CTA: 64 of two bytes, 32 of four.
//           Grid-stride over tiles, see config.h. All warps have the same role.
// Thread    Four adjacent rows of 16 bytes: the four codes of a column are one word.
// In flight 64 bytes per thread, 16 KiB per CTA.
// Stages    1. load; maximum of each column over a thread's rows and the lanes of the same columns
//           2. a thread per column: maximum over the warps, scale
//           3. codes; their words are written to a transposed tile in shared memory
//           4. whole rows of 128 codes are stored, 16 bytes per thread
// Barriers  after stages 1, 2 and 3; with groups, two per row tile in RealRows::find.
// Shared    8 KiB of codes, a row of 128 per column. Its 16-byte chunk c is at position
//           c ^ (column / kVector % 8), so that a warp's writes (8 columns, kVector apart, of one
//           chunk) and its reads (8 chunks of a column) both use every bank once. Maxima and
//           divisors, 3 KiB, are stored as [column % kVector][column / kVector] for the same
//           reason.
// Limits    rows that do not begin at multiples of 16 bytes, in or out, are moved element by
//           element.

#include "quant/kernel_rows.cuh"
#include "tile/swizzle.cuh"

namespace k2k {

constexpr int kTransposeWarps = kTransposeThreads / 32;

template <int kColumns>
struct TransposeStorage {
    uint4 codes[kColumns][kTransposeRows / 16];  // [column][chunk of 16 rows], swizzled
    tile::Divisor divisors[kColumns];
    float amax[kTransposeWarps][kColumns];
    RealRows<kTransposeRows, kTransposeWarps> real;
};

template <class T>
__global__ void __launch_bounds__(kTransposeThreads, 4)
    quantize_transposed_kernel(const __grid_constant__ QuantizeParams p) {
    constexpr int kColumns = transpose_columns(sizeof(T));
    constexpr int kVector = 16 / sizeof(T);  // columns of a thread
    auto& smem = arch::shared_storage<TransposeStorage<kColumns>>();

    const bool grouped = p.groups.offsets != nullptr || p.groups.counts != nullptr;
    const int64_t row_tiles = ceil_div(p.rows, kTransposeRows);
    const int vector = threadIdx.x % 8;  // of columns
    const int quad = threadIdx.x / 8;    // of rows

    for (int64_t tile = blockIdx.y; tile < p.batches * row_tiles; tile += gridDim.y) {
        const int64_t batch = p.batches == 1 ? 0 : tile / row_tiles;
        const int64_t row_tile = tile - batch * row_tiles;
        const int64_t first_row = row_tile * kTransposeRows;
        // Find which of the 128 rows belong to a group; the others become zeros.
        if (grouped) smem.real.find(p.groups, batch, first_row, p.rows);
        const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride;
        uint8_t* codes = p.codes + batch * p.columns * p.rows;

        for (int64_t first_column = int64_t(blockIdx.x) * kColumns; first_column < p.columns;
             first_column += int64_t(gridDim.x) * kColumns) {
            // 1. Load four rows x kVector columns, all in flight.
            const int64_t column = first_column + vector * kVector;
            alignas(16) T values[4][kVector] = {};
            K2K_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int64_t row = first_row + quad * 4 + i;
                if (row >= p.rows || (grouped && !smem.real.has(quad * 4 + i))) continue;
                const T* source = x + row * p.x_row_stride + column;
                if (tile::on_16_bytes(source) && column + kVector <= p.columns) {
                    reinterpret_cast<uint4&>(values[i]) =
                        arch::load_nc_no_allocate(reinterpret_cast<const uint4*>(source));
                } else {
                    K2K_UNROLL
                    for (int j = 0; j < kVector; ++j) {
                        if (column + j < p.columns) values[i][j] = source[j];
                    }
                }
            }
            // Maximum of each column: over the four rows, then over the warp's lanes of that
            // column.
            float columns[kVector][4];
            float amax[kVector];
            K2K_UNROLL
            for (int j = 0; j < kVector; ++j) {
                K2K_UNROLL
                for (int i = 0; i < 4; ++i) columns[j][i] = tile::as_float(values[i][j]);
                amax[j] = tile::thread_finite_amax(columns[j]);
                amax[j] = max_number(amax[j], arch::shuffle_xor(amax[j], 8));
                amax[j] = max_number(amax[j], arch::shuffle_xor(amax[j], 16));
            }
            if (arch::lane_id() < 8) {
                K2K_UNROLL
                for (int j = 0; j < kVector; ++j) {
                    smem.amax[arch::warp_id()][j * 8 + vector] = amax[j];
                }
            }
            arch::sync_block();

            // 2. Scale and divisor of each column, over the warps.
            if (threadIdx.x < kColumns) {
                float largest = 0;
                K2K_UNROLL
                for (int warp = 0; warp < kTransposeWarps; ++warp) {
                    largest = max_number(largest, smem.amax[warp][threadIdx.x]);
                }
                const float scale = tile::scale_of(largest, p.power_of_two);
                smem.divisors[threadIdx.x] = tile::divisor_of(scale);
                const int64_t c = first_column + threadIdx.x % 8 * kVector + threadIdx.x / 8;
                if (c < p.columns) {
                    p.scales[batch * p.scale_batch_stride + c * p.scale_row_stride +
                             row_tile * p.scale_column_stride] = scale;
                }
            }
            arch::sync_block();

            // 3. Codes of four adjacent rows, one word, to the transposed tile.
            K2K_UNROLL
            for (int j = 0; j < kVector; ++j) {
                const tile::Divisor divisor = smem.divisors[j * 8 + vector];
                const int chunk = tile::swizzled(vector, quad / 4);
                uint4& place = smem.codes[vector * kVector + j][chunk];
                reinterpret_cast<uint32_t*>(&place)[quad % 4] = tile::encode4(
                    columns[j][0], columns[j][1], columns[j][2], columns[j][3], divisor);
            }
            arch::sync_block();

            // 4. Store rows of codes, 8 threads per row.
            K2K_UNROLL
            for (int i = 0; i < kColumns / (kTransposeThreads / 8); ++i) {
                const int c = quad + i * (kTransposeThreads / 8);
                const int chunk = vector;
                const uint4 words = smem.codes[c][tile::swizzled(c / kVector, chunk)];
                if (first_column + c >= p.columns) continue;
                uint8_t* codes_row = codes + (first_column + c) * p.rows;
                tile::store_sixteen(codes_row, first_row + chunk * 16, p.rows,
                                    tile::sixteen_of(words));
            }
            // No barrier here: all threads have read the maxima before the last barrier. The next
            // tile writes divisors and codes after its own first barrier.
        }
    }
}

}  // namespace k2k
