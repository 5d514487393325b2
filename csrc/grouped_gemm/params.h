#pragma once

// Parameters of the grouped matrix products. Sizes and strides are in elements.

#include "common/dtypes.h"
#include "tile/groups.h"

namespace k2k {

// The product of unquantised experts: see kernel_sm80.cuh.
enum class GroupedGemm : int32_t { kForward, kDgrad, kWgrad };

// D = A B of one kind. Rows of A and B begin at multiples of 16 bytes.
struct GroupedGemmParams {
    GroupedGemm kind;
    Type type;      // of all three
    const void* a;  // [slots, summed axis], for wgrad [slots, rows]
    const void* b;  // [groups, columns, K]; dgrad: [groups, N, columns]; wgrad: [slots, columns]
    void* d;        // [slots, columns] or [groups, rows, columns], contiguous
    int64_t rows, columns;  // of D: of all slots, or (wgrad) of a group
    int64_t depth;          // length of the summed axis; for wgrad all slots
    int64_t expected;       // the host's estimate of slots in use: chooses the tile
    int64_t a_row_stride, b_row_stride, b_matrix_stride, d_matrix_stride;
    tile::Groups groups;
};

}  // namespace k2k
