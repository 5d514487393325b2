#pragma once

// Parameters of the kernels of this folder. Sizes and strides are in elements.

#include "common/dtypes.h"

namespace k2k {

struct MlaCacheParams {
    void* rows;      // append reads, gather writes [tokens, columns]
    Type rows_type;  // float
    int64_t row_stride;
    void* cache;      // [pages, page_size, columns] floats or [pages, page_size, 656] bytes
    Type cache_type;  // float, or kU8 for the 656-byte rows
    int64_t page_stride, slot_stride;
    const int32_t* block_table;  // [tokens / tokens_per_sequence, max_pages]
    int64_t table_stride;
    const void* positions;  // [tokens], -1 for none; int64 if long_positions, else int32
    bool long_positions;
    int64_t tokens, tokens_per_sequence, columns, page_size;
    bool power_of_two;  // append to 656-byte rows
};

}  // namespace k2k
