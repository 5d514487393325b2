#pragma once

#include "common/macros.h"

namespace k2k {

K2K_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The larger number; a NaN is passed over, even a signalling one, of which libm's fmaxf makes a
// NaN.
K2K_DEVICE float max_number(float a, float b) {
#ifdef K2K_EMULATED
    return b > a || a != a ? b : a;
#else
    return fmaxf(a, b);
#endif
}

// a * b, rounded before anything is added to it: nvcc makes no fused multiply-add of the two.
K2K_DEVICE float rounded_product(float a, float b) {
#ifdef __CUDACC__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

// How many bits are set.
K2K_DEVICE int count_bits(uint32_t bits) {
#ifdef __CUDACC__
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
}

}  // namespace k2k
