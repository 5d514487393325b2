#pragma once

// Weights: one scale per block of 128x128.
//
//     codes[n, k], scales[n / 128, k / 128] <- w[n, k]
//
// Grid      A CTA of 512 threads per 128x128 block, adjacent CTAs along a row of blocks;
//           grid-stride. All warps have the same role.
// Thread    16 contiguous elements of two rows, 64 rows apart, loaded once and kept in registers
//           between the block's maximum and the codes: 64 bytes of bfloat16 in flight, 32 KiB per
//           CTA; 64 registers allow two CTAs per SM.
// Barriers  the warps' maxima are written | read.
// Shared    the maxima of 16 warps.
// Limits    as in kernel_rows.cuh.

#include "quant/kernel_rows.cuh"

namespace k2k {

struct BlockMaxima {
    float of_warp[kBlockThreads / 32];
};

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    quantize_128x128_kernel(const __grid_constant__ QuantizeParams p) {
    constexpr int kRowsAtOnce = kBlockThreads / 8;
    BlockMaxima& maxima = arch::shared_storage<BlockMaxima>();
    const int64_t row_blocks = ceil_div(p.rows, 128), column_blocks = ceil_div(p.columns, 128);
    const int64_t num_blocks = p.batches * row_blocks * column_blocks;

    for (int64_t index = blockIdx.x; index < num_blocks; index += gridDim.x) {
        // Thread t has 16 columns of row t / 8, and of the row 64 below it.
        const int64_t column_block = index % column_blocks;
        const int64_t row_block = index / column_blocks % row_blocks;
        const int64_t batch = index / column_blocks / row_blocks;
        const int64_t first_row = row_block * 128 + threadIdx.x / 8;
        const int64_t column = column_block * 128 + threadIdx.x % 8 * 16;
        const T* w = static_cast<const T*>(p.x) + batch * p.x_batch_stride;
        uint8_t* codes = p.codes + batch * p.rows * p.columns;

        // Load both rows before the first is used; zeros beyond the last row.
        tile::Sixteen<T> sixteens[2];
        K2K_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int64_t row = first_row + i * kRowsAtOnce;
            const T* w_row = w + row * p.x_row_stride;
            sixteens[i] =
                row < p.rows ? tile::load_sixteen(w_row, column, p.columns) : tile::Sixteen<T>{};
        }

        float values[2][16];
        tile::widen(values[0], sixteens[0]);
        tile::widen(values[1], sixteens[1]);
        // Maximum over the thread, the warp, then the CTA's 16 warps.
        const float amax =
            max_number(tile::block_amax<32>(values[0]), tile::block_amax<32>(values[1]));
        if (arch::lane_id() == 0) maxima.of_warp[arch::warp_id()] = amax;
        arch::sync_block();
        const float of_warp = maxima.of_warp[arch::lane_id() % (kBlockThreads / 32)];
        const float scale =
            tile::scale_of(tile::max_over_lanes<kBlockThreads / 32>(of_warp), p.power_of_two);
        const tile::Divisor divisor = tile::divisor_of(scale);
        // Wait until the maxima have been read, before the next block overwrites them.
        arch::sync_block();

        // Encode from registers and store; one thread stores the scale.
        K2K_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int64_t row = first_row + i * kRowsAtOnce;
            if (row >= p.rows) continue;
            const uint4 words = tile::encode16(values[i], divisor);
            uint8_t* codes_row = codes + row * p.columns;
            tile::store_sixteen(codes_row, column, p.columns, tile::sixteen_of(words));
        }
        if (threadIdx.x == 0) {
            p.scales[batch * p.scale_batch_stride + row_block * p.scale_row_stride +
                     column_block * p.scale_column_stride] = scale;
        }
    }
}

}  // namespace k2k
