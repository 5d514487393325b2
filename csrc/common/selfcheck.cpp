#include "common/selfcheck.h"

#include <cmath>
#include <limits>

namespace k2k {

void decode_e4m3(const std::uint8_t* codes, float* values, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
        const int exponent = (codes[i] >> 3) & 0xf;
        const int mantissa = codes[i] & 0x7;
        float magnitude;
        if (exponent == 0xf && mantissa == 0x7) {
            magnitude = std::numeric_limits<float>::quiet_NaN();
        } else if (exponent == 0) {  // subnormal: mantissa * 2^-9
            magnitude = std::ldexp(static_cast<float>(mantissa), -9);
        } else {
            magnitude = std::ldexp(static_cast<float>(8 + mantissa), exponent - 7 - 3);
        }
        values[i] = (codes[i] & 0x80) ? -magnitude : magnitude;
    }
}

}  // namespace k2k
