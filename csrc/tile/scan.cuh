#pragma once

// Prefix sums over the lanes of a warp.

#include "arch/warp.cuh"

namespace k2k::tile {

// The sum of `value` over the lanes up to this one. All lanes of the warp call it.
template <class T>
K2K_DEVICE T inclusive_sum(T value K2K_WHERE) {
    K2K_UNROLL
    for (uint32_t delta = 1; delta < 32; delta *= 2) {
        const T before = arch::shuffle_up(value, delta K2K_PASS_WHERE);
        if (arch::lane_id() >= delta) value += before;
    }
    return value;
}

}  // namespace k2k::tile
