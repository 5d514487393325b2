#pragma once

// e4m3 codes as floats, without the conversion that sm_80 lacks. A code's exponent and mantissa,
// moved to a float's positions, are its value times 2^-120, subnormal codes included.

#include "common/dtypes.h"

namespace k2k::tile {

// values[i] = the number of byte i of `codes`, times `scale`, rounded once.
K2K_DEVICE void decode4(float (&values)[4], uint32_t codes, float scale) {
    K2K_UNROLL
    for (int i = 0; i < 4; ++i) {
        // The shift fills with the sign, of which the mask keeps one bit.
        const int32_t spread = static_cast<int32_t>(codes << (24 - 8 * i)) >> 4;
        // Two products, because scale * 2^120 may be more than a float holds.
        values[i] = soft::bits_float(spread & 0x87f00000) * 0x1p120f * scale;
    }
    if (((codes & 0x7f7f7f7f) + 0x01010101) & 0x80808080) {  // 0x7f and 0xff are NaN, not 480
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            if ((codes >> (8 * i) & 0x7f) == 0x7f) values[i] = soft::bits_float(0x7fffffff);
        }
    }
}

}  // namespace k2k::tile
