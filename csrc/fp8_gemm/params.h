#pragma once

// What the kernels of this folder are told. Sizes and strides are in elements.

#include "common/dtypes.h"
#include "tile/groups.h"

namespace k2k {

// One factor: rows of e4m3 codes along K, and a float scale for each block of 1 or 128 rows and 128
// of K. Rows begin at multiples of 16 bytes.
struct Fp8Matrix {
    const uint8_t* codes;  // [matrices, rows, K]
    const float* scales;   // [matrices, blocks of rows, ceil(K / 128)]
    int64_t matrices, rows;
    int64_t matrix_stride, row_stride;
    int64_t scale_matrix_stride, scale_row_stride, scale_column_stride;
    int32_t block_shift;   // a block has 1 << block_shift rows: 1 (A always) or 128
    int32_t block_offset;  // of row 0 in its block: a shard may begin inside one
};

// What is added to the result, if anything: the bias [columns] or C [matrices, rows, columns].
struct Addend {
    const void* values;
    Type type;
    int64_t matrix_stride, row_stride;
};

using GemmGroups = tile::Groups;

// Scales of D where it is quantised: codes of silu(gate) * up, which are the halves of the columns.
struct ResultScales {
    float* values;  // [matrices, rows of A, columns / 128]; null: D is the product itself
    int64_t matrix_stride, row_stride, column_stride;
    bool power_of_two;
};

// D = (row_weights *) A B^T (+ bias) (+ C), for each group.
struct Fp8GemmParams {
    Fp8Matrix a, b;
    int64_t k;
    void* d;  // [matrices, rows of A, rows of B, or half of them if it is quantised]
    Type d_type;
    ResultScales d_scales;
    int64_t d_matrix_stride, d_row_stride;
    const float* row_weights;  // [matrices, rows of A], a factor for each row of D; or null
    int64_t row_weights_matrix_stride;
    Addend bias, c;
    GemmGroups groups;
};

}  // namespace k2k
