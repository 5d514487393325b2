#pragma once

#include "common/macros.h"

namespace k2k {

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
