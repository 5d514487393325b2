#pragma once

// Parameters of the kernels of this folder. Sizes and strides are in elements.

#include "common/dtypes.h"

namespace k2k {

// The rows that exist: groups of one matrix (offsets), or the first rows of each matrix (counts
// alone), or all rows (both null). Other rows are neither read nor written.
struct RowGroups {
    // [num_groups + 1]: first row of each group; null if each matrix is a group.
    const int32_t* offsets;
    // [num_groups]: rows of each group; null if it ends where the next one begins.
    const int32_t* counts;
    int32_t num_groups;
};

// quantize_1x128 (also transposing), quantize_128x128 and swiglu_quantize.
struct QuantizeParams {
    const void* x;         // [batches, rows, columns]; swiglu: [batches, rows, 2 * columns]
    Type type;             // of x
    uint8_t* codes;        // [batches, rows, columns], or [batches, columns, rows]; contiguous
    float* scales;         // at scale_strides
    const float* weights;  // swiglu: [batches, rows], one factor per row; or null
    int64_t batches, rows, columns;
    int64_t x_batch_stride, x_row_stride;
    int64_t scale_batch_stride, scale_row_stride, scale_column_stride;
    RowGroups groups;
    bool power_of_two;
};

struct RmsNormQuantizeParams {
    const void* x;       // [batches, rows, columns]
    const void* weight;  // [columns], contiguous
    Type type;           // of both
    uint8_t* codes;      // [batches, rows, columns], contiguous
    float* scales;       // at scale_strides
    int64_t batches, rows, columns;
    int64_t x_batch_stride, x_row_stride;
    int64_t scale_batch_stride, scale_row_stride, scale_column_stride;
    float eps;
    bool power_of_two;
};

struct DequantizeParams {
    const uint8_t* codes;  // [batches, rows, columns], contiguous
    const float* scales;   // [batches, ceil(rows / block_rows), ceil(columns / 128)]
    void* values;          // as codes
    Type type;             // of values
    int64_t batches, rows, columns;
    int64_t codes_batch_stride, codes_row_stride;
    int64_t scale_batch_stride, scale_row_stride, scale_column_stride;
    int64_t block_rows;  // 1 or 128
};

struct SwigluParams {
    const void* gate_up;  // [rows, 2 * columns]
    void* hidden;         // [rows, columns], contiguous
    Type type;            // of both
    int64_t rows, columns;
    int64_t row_stride;  // of gate_up
};

struct SwigluBackwardParams {
    const void* grad;     // [rows, columns]
    const void* gate_up;  // [rows, 2 * columns]
    void* d_gate_up;      // as gate_up, contiguous
    Type type;            // of all three
    int64_t rows, columns;
    int64_t grad_row_stride, gate_up_row_stride;
};

}  // namespace k2k
