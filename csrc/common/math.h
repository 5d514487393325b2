#pragma once

#include <type_traits>

#include "common/macros.h"

namespace k2k {

// In the wider of the two types: a device divides 32 bits much faster than 64.
template <class A, class B>
K2K_HOST_DEVICE constexpr std::common_type_t<A, B> ceil_div(A a, B b) {
    return (a + b - 1) / b;
}

// A size or offset that was read on the device, kept inside 0 .. most.
K2K_DEVICE int clamp_to(int value, int64_t most) {
    return value < 0 ? 0 : value < most ? value : static_cast<int>(most);
}

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
