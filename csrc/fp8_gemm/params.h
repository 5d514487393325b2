#pragma once

// Parameters of the kernels of this folder. Sizes and strides are in elements.

#include "common/dtypes.h"
#include "tile/groups.h"

namespace k2k {

// One operand: rows of e4m3 codes along K, and a float32 scale per 1x128 or 128x128 block. Rows
// begin at multiples of 16 bytes.
struct Fp8Matrix {
    const uint8_t* codes;  // [matrices, rows, K]
    const float* scales;   // [matrices, blocks of rows, ceil(K / 128)]
    int64_t matrices, rows;
    int64_t matrix_stride, row_stride;
    int64_t scale_matrix_stride, scale_row_stride, scale_column_stride;
    int32_t block_shift;   // a block has 1 << block_shift rows: 1 (always for A) or 128
    int32_t block_offset;  // position of row 0 in its block: a shard may begin inside one
};

// An optional addend of the result: the bias [columns] or C [matrices, rows, columns].
struct Addend {
    const void* values;
    Type type;
    int64_t matrix_stride, row_stride;
};

using GemmGroups = tile::Groups;

// Scales of D if it is quantised SwiGLU: codes of silu(gate) * up, the two halves of the columns.
struct ResultScales {
    float* values;  // [matrices, rows of A, columns / 128]; null: D is the product itself
    int64_t matrix_stride, row_stride, column_stride;
    bool power_of_two;
};

// D = (row_weights *) A B^T (+ bias) (+ C), for each group.
struct Fp8GemmParams {
    Fp8Matrix a, b;
    int64_t k;
    void* d;  // [matrices, rows of A, rows of B (half of them if quantised)]
    Type d_type;
    ResultScales d_scales;
    int64_t d_matrix_stride, d_row_stride;
    const float* row_weights;  // [matrices, rows of A]: factors of the rows of D; or null
    int64_t row_weights_matrix_stride;
    Addend bias, c;
    GemmGroups groups;
};

}  // namespace k2k
