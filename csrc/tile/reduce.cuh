#pragma once

// Reductions and prefix sums over the lanes of a warp, all of which call them.

#include "arch/warp.cuh"
#include "common/math.h"

namespace k2k::tile {

// The sum over kLanes neighbouring lanes (a power of two), the same bits in each of them.
template <int kLanes = 32, class T>
K2K_DEVICE T sum_over_lanes(T value K2K_WHERE) {
    K2K_UNROLL
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
        value += arch::shuffle_xor(value, mask K2K_PASS_WHERE);
    }
    return value;
}

// The largest number of kLanes neighbouring lanes, in each of them; NaN is ignored.
template <int kLanes = 32>
K2K_DEVICE float max_over_lanes(float value K2K_WHERE) {
    K2K_UNROLL
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
        value = max_number(value, arch::shuffle_xor(value, mask K2K_PASS_WHERE));
    }
    return value;
}

// The sum of `value` over the lanes up to this one.
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
