#pragma once

// 4-bit codes as bf16: bf16(q * s), rounded once.
//
// A word of codes has eight weights of one row and one group of 32 along K, which share a scale.
// Pair i of it is in nibbles i and i + 4, 16 bits apart: two neighbours along K.
//
// int4   The nibble u = q + 8 under the exponent of 128, whose last place is 1, is 128 + u; minus
//        136 it is q, exactly; times s it is rounded once. A word takes 3 shifts, 4 LOP3 and 8
//        fused multiply-adds.
// mxfp4  The three bits of an E2M1 magnitude, at bits 8 to 6 of a bf16, are its value times 2^-126,
//        that of 0.5, a subnormal number, too. The scale is stored as the exponent field of
//        2^126 s. The product is exact. A word takes 7 shifts, 8 LOP3 and 4 products.

#include <type_traits>

#include "arch/packed.cuh"
#include "w4_gemm/config.h"

namespace k2k {

// The scales of a lane's four words, each twice in a word: [row g, g + 8][group].
using W4Scales = uint32_t[2][kChunkGroups];

template <class Kind>
K2K_DEVICE void read_scales(W4Scales& scales, const uint8_t* source) {
    if constexpr (std::is_same_v<Kind, Int4>) {
        const uint2 rows = *reinterpret_cast<const uint2*>(source);
        scales[0][0] = arch::byte_permute(rows.x, 0, 0x1010);
        scales[0][1] = arch::byte_permute(rows.x, 0, 0x3232);
        scales[1][0] = arch::byte_permute(rows.y, 0, 0x1010);
        scales[1][1] = arch::byte_permute(rows.y, 0, 0x3232);
    } else {
        const uint32_t exponents = *reinterpret_cast<const uint32_t*>(source);
        scales[0][0] = arch::byte_permute(exponents, 0, 0x0404) >> 1;
        scales[0][1] = arch::byte_permute(exponents, 0, 0x1414) >> 1;
        scales[1][0] = arch::byte_permute(exponents, 0, 0x2424) >> 1;
        scales[1][1] = arch::byte_permute(exponents, 0, 0x3434) >> 1;
    }
}

// Pair i (a constant) of a word, times its scale.
template <class Kind>
K2K_DEVICE uint32_t decode_pair(uint32_t word, int i, uint32_t scale) {
    if constexpr (std::is_same_v<Kind, Int4>) {
        const uint32_t above = arch::and_or(word >> 4 * i, 0x000f000f, 0x43004300);  // 128 + u
        const uint32_t q = arch::fma_bf16x2(above, 0x3f803f80, 0xc308c308);          // * 1 - 136
        return arch::mul_bf16x2(q, scale);
    } else {
        const uint32_t moved = i < 2 ? word << (6 - 4 * i) : word >> (4 * i - 6);
        const uint32_t value = arch::and_or(word << (12 - 4 * i), 0x80008000, moved & 0x01c001c0);
        return arch::mul_bf16x2(value, scale);
    }
}

}  // namespace k2k
