#pragma once

// Stores of accumulators as mma and wgmma leave them: 16 rows of a warp, in groups of 8 columns;
// lane 4 g + t holds rows g and g + 8, columns 2 t and 2 t + 1 of group j in values[4 j + 2 h + e].

#include "arch/ldst.cuh"
#include "arch/warp.cuh"
#include "tile/pack.cuh"

namespace k2k::tile {

// words[i] of lane 4 g + t becomes words[t] of lane 4 g + i.
K2K_DEVICE void transpose_quad(uint32_t (&words)[4] K2K_WHERE) {
    const uint32_t lane = arch::lane_id();
    K2K_UNROLL
    for (uint32_t mask = 1; mask < 4; mask *= 2) {
        const bool upper = lane & mask;
        K2K_UNROLL
        for (uint32_t i = 0; i < 4; ++i) {
            if (i & mask) continue;
            const uint32_t sent = upper ? words[i] : words[i | mask];
            const uint32_t got = arch::shuffle_xor(sent, mask K2K_PASS_WHERE);
            (upper ? words[i] : words[i | mask]) = got;
        }
    }
}

// Stores the values of row g (h = 0) or g + 8 (h = 1) from d on, where `left` columns are left
// (none or less: the row is not stored). `aligned`: rows of D begin at multiples of 16 bytes.
// Floats: the lanes of a quad store 32 contiguous bytes.
template <int kValues>
K2K_DEVICE void store_row(float* d, const float (&values)[kValues], int h, int64_t left,
                          bool aligned) {
    K2K_UNROLL
    for (int j = 0; j < kValues / 4; ++j) {
        const float low = values[4 * j + 2 * h], high = values[4 * j + 2 * h + 1];
        if (aligned && 8 * j + 1 < left) {
            *reinterpret_cast<float2*>(d + 8 * j) = make_float2(low, high);
        } else {
            if (8 * j < left) d[8 * j] = low;
            if (8 * j + 1 < left) d[8 * j + 1] = high;
        }
    }
}

// Two-byte results: a quad transposes four groups of columns, so that each lane stores 16 bytes and
// the quad 64 contiguous ones. All lanes of the warp call it.
template <class T, int kValues>
K2K_DEVICE void store_row(T* d, const float (&values)[kValues], int h, int64_t left, bool aligned) {
    if (kValues % 16 != 0 || !aligned) {
        K2K_UNROLL
        for (int j = 0; j < kValues / 4; ++j) {
            K2K_UNROLL
            for (int e = 0; e < 2; ++e) {
                if (8 * j + e < left) d[8 * j + e] = narrowed<T>(values[4 * j + 2 * h + e]);
            }
        }
        return;
    }
    const int t = arch::lane_id() % 4;
    K2K_UNROLL
    for (int first = 0; first < kValues / 4; first += 4) {
        uint32_t words[4];
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int at = (4 * (first + i) + 2 * h) % kValues;
            words[i] = pack<T>(values[at], values[at + 1]);
        }
        transpose_quad(words);
        const int at = 8 * (first + t) - 2 * t;  // from this lane's column
        if (at + 8 <= left) {
            arch::store(reinterpret_cast<uint4*>(d + at),
                        make_uint4(words[0], words[1], words[2], words[3]));
        } else {
            K2K_UNROLL
            for (int i = 0; i < 8; ++i) {
                const auto bits = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
                if (at + i < left) d[at + i] = T{bits};
            }
        }
    }
}

}  // namespace k2k::tile
