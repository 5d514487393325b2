#pragma once

// The content of the 128 bytes of a tensor map in the emulator. Dimensions: innermost first.

#include <cstdint>

#include "common/dtypes.h"

namespace k2k::emulator {

struct TensorMapFields {
    static constexpr uint32_t kMark = 0x4d544b32;
    uint32_t mark;
    uint8_t type, rank;
    uint16_t swizzle_bytes;  // 0, 32, 64 or 128
    uint64_t base;
    uint64_t stride_bytes[4];  // of dimensions 1, 2, ...
    uint64_t sizes[5];
    uint16_t box[5];
};
static_assert(sizeof(TensorMapFields) <= 128);

// The swizzled address of the bytes at `address` of a tile: the 16-byte chunks of each group of 8
// (4, 2) rows of 128 bytes are permuted.
inline uint32_t swizzle(uint32_t address, unsigned swizzle_bytes) {
    const uint32_t mask = swizzle_bytes == 0 ? 0 : swizzle_bytes / 16 - 1;
    return address ^ (address >> 7 & mask) << 4;
}

}  // namespace k2k::emulator
