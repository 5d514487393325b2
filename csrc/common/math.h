#pragma once

#include "common/macros.h"

namespace k2k {

K2K_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The larger number, ignoring NaN, also signalling NaN, for which libm's fmaxf returns NaN.
K2K_DEVICE float max_number(float a, float b) {
#ifdef K2K_EMULATED
    return b > a || a != a ? b : a;
#else
    return fmaxf(a, b);
#endif
}

// a * b, rounded: nvcc does not contract it into a fused multiply-add.
K2K_DEVICE float rounded_product(float a, float b) {
#ifdef __CUDACC__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

// The number of set bits.
K2K_DEVICE int count_bits(uint32_t bits) {
#ifdef __CUDACC__
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
}

}  // namespace k2k
