#pragma once

// RMSNorm of rows, quantised 1x128 in the same pass.
//
//     r[m]                            = 1 / sqrt(sum_k x[m, k]^2 / K + eps)            in float32
//     y[m, k]                         = x[m, k] * r[m] * weight[k]     rounded once, to x's type
//     codes[m, k], scales[m, k / 128] <- y[m, k]                       by tile/e4m3_block.cuh
//
// Grid      a block for each row, or for up to 8 short ones (norm_shape in config.h); blocks walk
//           on where there are more.
// Warp      512 neighbours of one row, 16 a lane, so that eight lanes hold a block of 128; in rows
//           of more than 2,048 columns another 512, with the other warps' between them.
// One pass  x comes by cp.async and waits in shared memory for the sum of its squares. A thread
//           reads what it copied itself, so that nobody else need wait for it, and no register is
//           taken meanwhile: with 64 of them four rows of 7,168 bfloat16 share a multiprocessor, 56
//           KiB in flight, where bandwidth x latency of DRAM ask for 20 to 36.
// Order     of the sum: the squares of a lane one after another, the lanes by butterfly, the warps
//           by butterfly. It depends on K alone, so a row has the same bits in any batch.
// Barrier   of the block, one a row. The sums have two places, taken in turns: who still reads the
//           last row's has not come to this row's barrier, behind which its place is written again.
// Loops     over a lane's two sixteens are not unrolled: both at once would take more registers.
// Shared    row and weight, 32 bytes of bfloat16 a thread and sixteen each, the threads' vectors
//           side by side, so that each phase of a 16-byte access touches every bank once; the sums
//           of 8 warps, twice: 32.1 KiB for 7,168 columns, 16.1 KiB up to 2,048.
// Weight    loaded once a block while the first row is on its way, through L1, where earlier blocks
//           left it, into shared memory: in registers the compiler would hold it widened.
// Limits    8,192 columns; rows that do not begin on 16 bytes go element by element.

#include "arch/cp_async.cuh"
#include "arch/smem.cuh"
#include "quant/config.h"
#include "quant/params.h"
#include "tile/e4m3_block.cuh"
#include "tile/reduce.cuh"
#include "tile/sixteen.cuh"

namespace k2k {

// Sixteen neighbours of each thread, in vectors of 16 bytes.
template <class T>
using SharedSixteens = uint4[tile::Sixteen<T>::kVectors][kNormThreads];

template <class T, int kSixteens>
struct NormStorage {
    SharedSixteens<T> x[kSixteens];
    SharedSixteens<T> weight[kSixteens];
    float square_sums[2][kNormWarps];
};

// Into this thread's place.
template <class T>
K2K_DEVICE void put(SharedSixteens<T>& place, const tile::Sixteen<T>& sixteen) {
    K2K_UNROLL
    for (int i = 0; i < tile::Sixteen<T>::kVectors; ++i) {
        place[i][threadIdx.x] = tile::vector_of(sixteen, i);
    }
}

// Starts to copy row[column .. column + 15] to this thread's place, zeros beyond `columns`.
template <class T>
K2K_DEVICE void start_copy(SharedSixteens<T>& place,
                           const T* row,
                           int64_t column,
                           int64_t columns K2K_WHERE) {
    if (tile::in_vectors(row, column, columns)) {
        const auto* source = reinterpret_cast<const uint4*>(row + column);
        K2K_UNROLL
        for (int i = 0; i < tile::Sixteen<T>::kVectors; ++i) {
            arch::cp_async(arch::smem_address(&place[i][threadIdx.x]), source + i,
                           true K2K_PASS_WHERE);
        }
    } else {
        put<T>(place, tile::load_elements(row, column, columns));
    }
}

// What lies in this thread's place.
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
        const int64_t index = first_row + row_in_block;
        const int64_t batch = p.batches == 1 ? 0 : index / p.rows;
        const int64_t row = index - batch * p.rows;
        const bool here = index < all_rows;

        const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride + row * p.x_row_stride;
        K2K_NO_UNROLL
        for (int i = 0; i < kSixteens; ++i) {
            start_copy<T>(smem.x[i], x, first_column + i * step, here ? p.columns : 0);
        }
        arch::cp_async_commit();
        if (round == 0) {
            const T* weight = static_cast<const T*>(p.weight);
            K2K_NO_UNROLL
            for (int i = 0; i < kSixteens; ++i) {
                put<T>(smem.weight[i], tile::load_sixteen<T, /*kReused=*/true>(
                                           weight, first_column + i * step, p.columns));
            }
        }
        arch::cp_async_wait<0>();

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
        const int other = lane % kNormWarps;
        sum = tile::sum_over_lanes<kNormWarps>(
            other < warps ? smem.square_sums[round % 2][first_warp + other] : 0.0f);
        const float inverse = 1.0f / sqrtf(sum / static_cast<float>(p.columns) + p.eps);

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
            tile::Sixteen<T> rounded;
            tile::narrow(rounded, values);
            tile::widen(values, rounded);

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
