#pragma once

// Parameters of the products with 4-bit weights. Sizes and strides are in elements.

#include "common/dtypes.h"
#include "tile/groups.h"

namespace k2k {

enum class W4Kind : int32_t { kInt4, kInt4Wide, kMxfp4 };

// D = A W^T, or swiglu of it. Rows of A begin at multiples of 16 bytes.
struct W4GemmParams {
    W4Kind kind;
    bool swiglu;                        // W is gated, D has a column for each of its pairs of rows
    const bf16* a;                      // [slots, K]
    const uint8_t* w;                   // [groups, chunk_rows, chunk_columns, bytes of a chunk]
    bf16* d;                            // [slots, columns], columns contiguous
    int64_t rows, columns, depth;       // of D; K
    int64_t chunk_rows, chunk_columns;  // chunks of 64 x 64 weights of a group
    int64_t expected;                   // the host's estimate of slots in use: chooses the tile
    int split;  // parts of K, where the kernel for few rows on sm_90a serves
    int64_t a_row_stride, d_row_stride;
    tile::Groups groups;
};

}  // namespace k2k
