#pragma once

// 4-bit codes as bf16: bf16(q * s), rounded once.
//
// A word of codes has eight weights of one row and one group of 32 along K, which share a scale.
// Pair i of it is two neighbours along K, 16 bits apart. A bf16 with bits at 7 to 0 only is their
// number times 2^-133, subnormal or not; one with bits at 8 to 6 only, as an E2M1 magnitude, is
// 2^-126 times its value. So fields of a word are numbers as they are, and one fused multiply-add
// scales them: value * factor + offset. Factors are large: that is what is stored.
//
// int4   The nibble u = q + 8 at bits 7 to 4 is u 2^-129. Times 2^129 s, less 8 s, it is q s: both
//        terms are exact, their sum is rounded once. A word takes 3 shifts, 4 LOP3 and 4 FMAs.
// int4_wide: any s, stored as it is. The nibble under the exponent of 128, whose last place is 1, is
//        128 + u; less 136 it is q, exactly; times s it is rounded once. 4 FMAs more.
// mxfp4  Sign at bit 15, magnitude at bits 8 to 6; times 2^126 s, exactly. Three pairs lie so that
//        a shift or rotation brings each to these places, the bits that are left are the fourth's.
//        A word takes 4 shifts, 5 LOP3 and 4 products.
//
// Which shifts: csrc/w4_gemm/README.md. To the left is better: multiply-adds can do it, too.

#include <type_traits>

#include "arch/packed.cuh"
#include "w4_gemm/config.h"

namespace k2k {

// Of a word, each number twice. The halves of one register, which instructions select.
struct W4Scale {
    uint32_t factor, offset;
};
// The scales of a lane's four words: [row g, g + 8][group].
using W4Scales = W4Scale[2][kChunkGroups];

template <class Kind>
K2K_DEVICE void read_scales(W4Scales& scales, const uint8_t* source) {
    if constexpr (std::is_same_v<Kind, Int4Wide>) {
        const uint2 rows = *reinterpret_cast<const uint2*>(source);
        K2K_UNROLL
        for (int r = 0; r < 2; ++r) {
            const uint32_t factors = r == 0 ? rows.x : rows.y;
            scales[r][0] = {arch::low_twice(factors), 0};
            scales[r][1] = {arch::high_twice(factors), 0};
        }
    } else if constexpr (std::is_same_v<Kind, Int4>) {
        const uint2 rows = *reinterpret_cast<const uint2*>(source);
        K2K_UNROLL
        for (int r = 0; r < 2; ++r) {
            const uint32_t factors = r == 0 ? rows.x : rows.y;               // 2^129 s
            const uint32_t offsets = arch::mul_bf16x2(factors, 0x80808080);  // * -2^-126: -8 s
            scales[r][0] = {arch::low_twice(factors), arch::low_twice(offsets)};
            scales[r][1] = {arch::high_twice(factors), arch::high_twice(offsets)};
        }
    } else {
        // Bytes [r][group] are exponents of 2^126 s.
        const uint32_t exponents = *reinterpret_cast<const uint32_t*>(source);
        K2K_UNROLL
        for (int group = 0; group < 2; ++group) {
            const uint32_t moved = group == 0 ? exponents << 7 : exponents >> 1;
            const uint32_t factors = moved & 0x7f807f80;
            scales[0][group] = {arch::low_twice(factors), 0x80008000};
            scales[1][group] = {arch::high_twice(factors), 0x80008000};
        }
    }
}

// Pair i (a constant) of a word, times its scale.
template <class Kind>
K2K_DEVICE uint32_t decode_pair(uint32_t word, int i, const W4Scale& scale) {
    uint32_t value;
    if constexpr (std::is_same_v<Kind, Int4Wide>) {
        const uint32_t above = arch::and_or(word >> 4 * i, 0x000f000f, 0x43004300);  // 128 + u
        const uint32_t q = arch::fma_bf16x2(above, 0x3f803f80, 0xc308c308);          // * 1 - 136
        return arch::mul_bf16x2(q, scale.factor);
    } else if constexpr (std::is_same_v<Kind, Int4>) {
        value = (i == 0 ? word << 4 : word >> (4 * i - 4)) & 0x00f000f0;
    } else {
        constexpr uint32_t kSignAndMagnitude = 0x81c081c0;
        if (i == 0) value = (word << 6) & kSignAndMagnitude;
        if (i == 1) value = (word << 2) & kSignAndMagnitude;
        if (i == 2) value = (word >> 4 | word << 28) & kSignAndMagnitude;
        if (i == 3) value = arch::and_or(word >> 8, 0x00400040, word & 0x81808180);
    }
    return arch::fma_bf16x2(value, scale.factor, scale.offset);
}

}  // namespace k2k
