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

}  // namespace k2k
