#pragma once

// Parameters of the kernel. Sizes and strides are in elements.

#include "common/dtypes.h"

namespace k2k {

struct ScaleRowsParams {
    const void* x;  // [rows, columns], stride 1 along columns
    void* y;        // [rows, columns], contiguous
    Type type;      // of both
    int64_t rows, columns;
    int64_t x_row_stride;
};

}  // namespace k2k
