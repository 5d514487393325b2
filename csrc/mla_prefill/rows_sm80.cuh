#pragma once

// What the portable kernels of prefill share: rows of q, k, v or grad_out in shared memory, and
// products with them by mma.sync.
//
// Layout    a row is kPitch bytes, each 128 of them with the swizzle of tile/swizzle.cuh.
// Products  a warp has 16 rows of the result. Operand A is fragments [16, 16] in registers, B comes
//           by ldmatrix: its rows are columns of the result (A B^T), or the summed axis (A B).

#include "arch/cp_async.cuh"
#include "arch/ldst.cuh"
#include "arch/matrix.cuh"
#include "arch/mma.cuh"
#include "mla_prefill/config.h"
#include "tile/pack.cuh"
#include "tile/swizzle.cuh"

namespace k2k {

constexpr int kQkBytes = kQkDim * 2, kVBytes = kVDim * 2;  // of a row

// Whether so many CTAs fit on each SM: sm_86, sm_89 and sm_120 have 100 KB, of which 1 KB is reserved
// for each CTA.
constexpr bool fits_sm(std::size_t shared_bytes, int ctas) {
    return ctas * (shared_bytes + 1024) <= 100 * 1024;
}

// Where element 0 of a token's row is.
template <class T>
K2K_DEVICE const T* row_of(const void* x, int64_t token, int64_t token_stride, int head,
                           int64_t head_stride) {
    return static_cast<const T*>(x) + token * token_stride + head * head_stride;
}

// Starts this thread's copies of kRows rows of kColumns elements to `target`, which is in row 0 at a
// multiple of 128 bytes. Rows from `valid` on are zero-filled: 0 * NaN would be NaN in a sum over
// rows. Eight threads copy 128 contiguous bytes.
template <int kThreads, int kRows, int kColumns, int kPitch, class T>
K2K_DEVICE void copy_rows(uint32_t target, const T* source, int64_t stride, int valid) {
    constexpr int kRowsAtOnce = kThreads / 8;
    static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0 && kColumns % 64 == 0);
    const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
    target += tile::chunk_offset<kPitch>(row, chunk);
    K2K_UNROLL
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
        const bool real = row + i < valid;
        const T* from = real ? source + (row + i) * stride + chunk * 8 : source;
        K2K_UNROLL
        for (int j = 0; j < kColumns / 64; ++j) {
            arch::cp_async(target + i * kPitch + j * 128, real ? from + j * 64 : from, real);
        }
    }
}

// Rows `key` to `key` + kRows of a head's k, its two parts side by side, or of its v.
template <class T, int kThreads, int kRows>
K2K_DEVICE void copy_k(uint32_t target, const MlaPrefillInputs& in, const MlaPrefillTask& task,
                       int key) {
    const int64_t token = task.first_key + key;
    copy_rows<kThreads, kRows, kNope, kQkBytes>(
        target, row_of<T>(in.k, token, in.k_token_stride, task.head, in.k_head_stride),
        in.k_token_stride, task.keys - key);
    copy_rows<kThreads, kRows, kRopeDims, kQkBytes>(
        target + kNope * 2,
        row_of<T>(in.k_rope, token, in.k_rope_token_stride, task.head, in.k_rope_head_stride),
        in.k_rope_token_stride, task.keys - key);
}
template <class T, int kThreads, int kRows>
K2K_DEVICE void copy_v(uint32_t target, const MlaPrefillInputs& in, const MlaPrefillTask& task,
                       int key) {
    copy_rows<kThreads, kRows, kVDim, kVBytes>(
        target,
        row_of<T>(in.v, task.first_key + key, in.v_token_stride, task.head, in.v_head_stride),
        in.v_token_stride, task.keys - key);
}

// Row h (0: lane / 4, 1: 8 below) of kSteps fragments of A, from global memory; `row` begins at its
// column 2 (lane % 4). Without a row: zeros.
template <int kSteps, class T>
K2K_DEVICE void load_fragments(uint32_t (&a)[kSteps][4], int h, const T* row, bool real) {
    K2K_UNROLL
    for (int i = 0; i < kSteps; ++i) {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(row + i * 16);
        a[i][h] = real ? arch::load_nc(from) : 0;
        a[i][2 + h] = real ? arch::load_nc(from + 4) : 0;
    }
}

// Columns 16 `k` to 16 `k` + 15 of an accumulator, rounded, as a fragment of A.
template <class T, int kTiles>
K2K_DEVICE void to_fragment(uint32_t (&a)[4], const float (&d)[kTiles][4], int k) {
    K2K_UNROLL
    for (int i = 0; i < 4; ++i) {
        const float* two = d[2 * k + i / 2] + i % 2 * 2;
        a[i] = tile::pack<T>(two[0], two[1]);
    }
}

// An address of ldmatrix_address() for chunk 0, moved by 16 `step` columns: two chunks, bits 5 and 6
// under the swizzle, and 128 bytes for each 64 columns.
K2K_DEVICE uint32_t move_columns(uint32_t address, int step) {
    return (address ^ step % 4 * 32) + step / 4 * 128;
}

// d [16, 8 kTiles] += A B^T over 16 columns, number `step`; `b`: ldmatrix_address<false, false>.
template <class T, int kPitch, int kTiles>
K2K_DEVICE void multiply_by_rows(float (&d)[kTiles][4], const uint32_t (&a)[4], uint32_t b,
                                 int step) {
    K2K_UNROLL
    for (int j = 0; j < kTiles; j += 2) {
        uint32_t two[4];
        arch::ldmatrix(two, move_columns(b, step) + j * 8 * kPitch);
        arch::mma_sync<T>(d[j], a, {two[0], two[1]});
        arch::mma_sync<T>(d[j + 1], a, {two[2], two[3]});
    }
}

// d [16, 8 kTiles] += A B over 16 rows of B; `b`: ldmatrix_address<false, true> of the first.
template <class T, int kTiles>
K2K_DEVICE void multiply_by_columns(float (*d)[4], const uint32_t (&a)[4], uint32_t b) {
    K2K_UNROLL
    for (int j = 0; j < kTiles; j += 2) {
        uint32_t two[4];
        arch::ldmatrix<4, true>(two, move_columns(b, j / 2));
        arch::mma_sync<T>(d[j], a, {two[0], two[1]});
        arch::mma_sync<T>(d[j + 1], a, {two[2], two[3]});
    }
}

// Clears an accumulator.
template <int kTiles>
K2K_DEVICE void clear(float (&d)[kTiles][4]) {
    K2K_UNROLL
    for (int j = 0; j < kTiles; ++j) d[j][0] = d[j][1] = d[j][2] = d[j][3] = 0;
}

// The results times `by`, for tile::store_row.
template <int kTiles>
K2K_DEVICE void scaled(float (&values)[4 * kTiles], const float (*d)[4], float by) {
    K2K_UNROLL
    for (int i = 0; i < 4 * kTiles; ++i) values[i] = d[i / 4][i % 4] * by;
}

}  // namespace k2k
