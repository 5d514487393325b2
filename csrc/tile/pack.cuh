#pragma once

// Floats as a tensor's dtype, one or two in a word, and back.

#include "arch/convert.cuh"

namespace k2k::tile {

// The nearest T, ties to even.
template <class T>
K2K_DEVICE T narrowed(float value) {
    if constexpr (std::is_same_v<T, float>) {
        return value;
    } else if constexpr (std::is_same_v<T, bf16>) {
        return arch::to_bf16(value);
    } else {
        return arch::to_fp16(value);
    }
}

// Two neighbours of a row, `low` first.
template <class T>
K2K_DEVICE uint32_t pack(float low, float high) {
    static_assert(sizeof(T) == 2);
    return std::is_same_v<T, bf16> ? arch::pack_bf16(low, high) : arch::pack_fp16(low, high);
}

// The first (0) or second (1) of two neighbours.
template <class T>
K2K_DEVICE float unpack(uint32_t pair, int which) {
    return arch::to_float(T{static_cast<uint16_t>(pair >> 16 * which)});
}

}  // namespace k2k::tile
