#pragma once

// Each row divided by its largest magnitude.
//
//     y[r, :] = x[r, :] / max |x[r, :]|
//
// CTA       one row, 16 neighbours of it for each of 128 threads, as often as the row needs.
// Shared    the maximum of each of 4 warps.
// Traffic   x once and y once, 4 bytes an element of bfloat16: the second reading of x finds it in
//           L2, to which a row is small.
// Limits    rows that do not begin on 16 bytes go element by element.

#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "scale_rows/config.h"
#include "scale_rows/params.h"
#include "tile/sixteen.cuh"

namespace k2k {

struct RowMaxima {
    float of_warp[kScaleRowsThreads / 32];
};

// The larger number, or NaN if one is.
K2K_DEVICE float larger(float a, float b) { return a > b || a != a ? a : b; }

template <class T>
__global__ void __launch_bounds__(kScaleRowsThreads)
    scale_rows_kernel(const __grid_constant__ ScaleRowsParams p) {
    RowMaxima& maxima = arch::shared_storage<RowMaxima>();
    const T* x = static_cast<const T*>(p.x) + blockIdx.x * p.x_row_stride;
    T* y = static_cast<T*>(p.y) + blockIdx.x * p.columns;
    const int64_t first = threadIdx.x * 16, step = kScaleRowsThreads * 16;
    float values[16];

    // The thread's largest magnitude, 16 columns at a time.
    float amax = 0;
    for (int64_t column = first; column < p.columns; column += step) {
        tile::widen(values, tile::load_sixteen(x, column, p.columns));
        K2K_UNROLL
        for (int i = 0; i < 16; ++i) amax = larger(amax, fabsf(values[i]));
    }
    // The row's: over the lanes of a warp by shuffles, over the warps by shared memory.
    K2K_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) amax = larger(amax, arch::shuffle_xor(amax, mask));
    if (arch::lane_id() == 0) maxima.of_warp[arch::warp_id()] = amax;
    arch::sync_block();
    K2K_UNROLL
    for (float of_warp : maxima.of_warp) amax = larger(amax, of_warp);

    // Read the row again, from L2, and write it divided.
    for (int64_t column = first; column < p.columns; column += step) {
        tile::widen(values, tile::load_sixteen(x, column, p.columns));
        K2K_UNROLL
        for (int i = 0; i < 16; ++i) values[i] /= amax;
        tile::Sixteen<T> sixteen;
        tile::narrow(sixteen, values);
        tile::store_sixteen(y, column, p.columns, sixteen);
    }
}

}  // namespace k2k
