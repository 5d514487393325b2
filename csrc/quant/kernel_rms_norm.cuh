#pragma once

// RMSNorm of rows, quantised 1x128 in the same pass.
//
//     r[m]                            = 1 / sqrt(sum_k x[m, k]^2 / K + eps)            in float32
//     y[m, k]                         = x[m, k] * r[m] * weight[k]     rounded once, to x's type
//     codes[m, k], scales[m, k / 128] <- y[m, k]                       by tile/e4m3_block.cuh
//
// Grid      A CTA per row, or per up to 8 short ones (norm_shape in config.h); grid-stride over
//           rows.
// Warp      512 contiguous columns of one row, 16 per lane, so that eight lanes have a block of
//           128; of rows of more than 2,048 columns twice 512, the row's warps interleaved.
// One pass  cp.async copies x to shared memory, where it stays until the sum of its squares is
//           known. A thread reads back only what it copied: this needs no barrier, and no registers
//           hold x meanwhile. With 64 registers per thread four rows of 7,168 bfloat16 fit on an
//           SM, 56 KiB in flight; bandwidth x latency of DRAM needs 20 to 36.
// Order     of the sum: a lane's squares in order, the lanes by butterfly, the warps by butterfly.
//           It depends on K only: a row has equal bits in any batch.
// Barrier   One per iteration of the CTA: its warps' sums are written. They are double-buffered: a
//           buffer is written again after the next iteration's barrier, when all warps have read
//           it.
// Loops     over a lane's two pieces of 16 columns, but for the sum, are not unrolled: both at once
//           would take more registers.
// Shared    x and weight, 32 bytes of bfloat16 per thread and piece each, as [16-byte vector]
//           [thread], so that each phase of a 16-byte access uses every bank once; the sums of 8
//           warps, twice: 32.1 KiB for 7,168 columns, 16.1 KiB up to 2,048.
// Weight    Loaded once per CTA while the first row is in flight, through L1, which may hold it
//           from earlier CTAs, to shared memory: in registers the compiler would keep it as
//           float32.
// Limits    8,192 columns; rows that do not begin at multiples of 16 bytes are read element by
//           element.

#include "arch/cp_async.cuh"
#include "arch/smem.cuh"
#include "quant/config.h"
#include "quant/params.h"
#include "tile/e4m3_block.cuh"
#include "tile/reduce.cuh"
#include "tile/sixteen.cuh"

namespace k2k {

// Sixteen elements of each thread, in vectors of 16 bytes: [vector][thread].
template <class T>
using SharedSixteens = uint4[tile::Sixteen<T>::kVectors][kNormThreads];

template <class T, int kSixteens>
struct NormStorage {
    SharedSixteens<T> x[kSixteens];  // first 512 columns of a warp, second 512
    SharedSixteens<T> weight[kSixteens];
    float square_sums[2][kNormWarps];  // [buffer][warp]
};

// Writes sixteen elements to this thread's place.
template <class T>
K2K_DEVICE void put(SharedSixteens<T>& place, const tile::Sixteen<T>& sixteen) {
    K2K_UNROLL
    for (int i = 0; i < tile::Sixteen<T>::kVectors; ++i) {
        place[i][threadIdx.x] = tile::vector_of(sixteen, i);
    }
}

// Starts the copy of row[column .. column + 15] to this thread's place, zeros beyond `columns`.
template <class T>
K2K_DEVICE void start_copy(SharedSixteens<T>& place, const T* row, int64_t column,
                           int64_t columns) {
    if (tile::in_vectors(row, column, columns)) {
        const auto* source = reinterpret_cast<const uint4*>(row + column);
        K2K_UNROLL
        for (int i = 0; i < tile::Sixteen<T>::kVectors; ++i) {
            arch::cp_async(arch::smem_address(&place[i][threadIdx.x]), source + i, true);
        }
    } else {
        put<T>(place, tile::load_elements(row, column, columns));
    }
}

// Reads this thread's place as float32.
template <class T>
K2K_DEVICE void get(float (&values)[16], const SharedSixteens<T>& place) {
    tile::Sixteen<T> sixteen;
    K2K_UNROLL
    for (int i = 0; i < tile::Sixteen<T>::kVectors; ++i) {
        tile::set_vector(sixteen, i, place[i][threadIdx.x]);
    }
    tile::widen(values, sixteen);
}

template <class T, int kSixteens>
__global__ void __launch_bounds__(kNormThreads, norm_blocks(kSixteens * 16 * sizeof(T)))
    rms_norm_quantize_kernel(const __grid_constant__ RmsNormQuantizeParams p) {
    auto& smem = arch::shared_storage<NormStorage<T, kSixteens>>();
    // This warp's row in the CTA, this lane's first column in the row.
    const int warps = static_cast<int>(ceil_div(p.columns, 512 * kSixteens));  // of a row
    const int rows_per_block = blockDim.x / 32 / warps;
    const int row_in_block = arch::warp_id() / warps, lane = arch::lane_id();
    const int first_warp = row_in_block * warps;
    const int64_t first_column = (arch::warp_id() - first_warp) * 512 + lane * 16;
    const int64_t step = warps * 512;
    const int64_t all_rows = p.batches * p.rows;

    int64_t first_row = int64_t(blockIdx.x) * rows_per_block;
    for (int round = 0; first_row < all_rows;
         ++round, first_row += int64_t(gridDim.x) * rows_per_block) {
        // Beyond the last row a warp computes on zeros, because it must reach the barrier.
        const int64_t index = first_row + row_in_block;
        const int64_t batch = p.batches == 1 ? 0 : index / p.rows;
        const int64_t row = index - batch * p.rows;
        const bool here = index < all_rows;

        // Start the copies of the row; beyond the last row, of zeros.
        const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride + row * p.x_row_stride;
        K2K_NO_UNROLL
        for (int i = 0; i < kSixteens; ++i) {
            start_copy<T>(smem.x[i], x, first_column + i * step, here ? p.columns : 0);
        }
        arch::cp_async_commit();
        // Load the weight while the first row is in flight.
        if (round == 0) {
            const T* weight = static_cast<const T*>(p.weight);
            K2K_NO_UNROLL
            for (int i = 0; i < kSixteens; ++i) {
                put<T>(smem.weight[i], tile::load_sixteen<T, /*kReused=*/true>(
                                           weight, first_column + i * step, p.columns));
            }
        }
        // Wait for this thread's own copies only.
        arch::cp_async_wait<0>();

        // Sum the squares: lane, warp, then the warps of the row.
        float sum = 0;
        K2K_UNROLL
        for (int i = 0; i < kSixteens; ++i) {
            float values[16];
            get<T>(values, smem.x[i]);
            K2K_UNROLL
            for (float value : values) sum = fmaf(value, value, sum);
        }
        sum = tile::sum_over_lanes<32>(sum);
        if (lane == 0) smem.square_sums[round % 2][arch::warp_id()] = sum;
        arch::sync_block();
        // Each warp adds the sums of the row's warps, by butterfly: equal bits in all threads.
        const int other = lane % kNormWarps;
        sum = tile::sum_over_lanes<kNormWarps>(
            other < warps ? smem.square_sums[round % 2][first_warp + other] : 0.0f);
        const float inverse = 1.0f / sqrtf(sum / static_cast<float>(p.columns) + p.eps);

        // Normalise and quantise, with x read again from shared memory.
        uint8_t* codes = p.codes + index * p.columns;
        float* scales = p.scales + batch * p.scale_batch_stride + row * p.scale_row_stride;
        K2K_NO_UNROLL
        for (int i = 0; i < kSixteens; ++i) {
            const int64_t column = first_column + i * step;
            float values[16], weights[16];
            get<T>(values, smem.x[i]);
            get<T>(weights, smem.weight[i]);
            K2K_UNROLL
            for (int j = 0; j < 16; ++j) values[j] = values[j] * inverse * weights[j];
            // Round to x's type, as the norm alone would.
            tile::Sixteen<T> rounded;
            tile::narrow(rounded, values);
            tile::widen(values, rounded);

            // One scale per block of 128 (8 lanes); encode and store.
            const float amax = tile::block_amax<8>(values);
            if (!here || column >= p.columns) continue;
            const float scale = tile::scale_of(amax, p.power_of_two);
            const uint4 words = tile::encode16(values, tile::divisor_of(scale));
            tile::store_sixteen(codes, column, p.columns, tile::sixteen_of(words));
            if (lane % 8 == 0) scales[column / 128 * p.scale_column_stride] = scale;
        }
    }
}

}  // namespace k2k
