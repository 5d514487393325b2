#pragma once

// A block of numbers as e4m3 codes and one float32 scale, x ~ code * scale, by the rules of
// csrc/quant/README.md, bit for bit:
//
//     amax  = largest |x| of the block's finite elements
//     scale = max(amax / 448, 2^-126), rounded up to a power of two if asked
//     code  = e4m3(float32(x / scale)), to nearest, ties to even; NaN and infinities: 0x7f
//
// Infinities are rare and cost one vote per warp: a maximum that is infinite is computed again over
// the finite elements. NaN costs nothing: max_number ignores it, and its code is 0x7f.

#include <cfloat>

#include "arch/convert.cuh"
#include "common/math.h"
#include "tile/reduce.cuh"

namespace k2k::tile {

// The largest |value|; infinite if one is.
template <int kCount>
K2K_DEVICE float thread_amax(const float (&values)[kCount]) {
    float amax = 0;
    K2K_UNROLL
    for (int i = 0; i < kCount; ++i) amax = max_number(amax, fabsf(values[i]));
    return amax;
}

// The largest finite |value|.
template <int kCount>
K2K_DEVICE float thread_finite_amax(const float (&values)[kCount]) {
    float amax = 0;
    K2K_UNROLL
    for (int i = 0; i < kCount; ++i) {
        if (fabsf(values[i]) <= FLT_MAX) amax = max_number(amax, fabsf(values[i]));
    }
    return amax;
}

// The amax of a block that lies in `kLanes` neighbouring lanes. All lanes of the warp call it.
template <int kLanes, int kCount>
K2K_DEVICE float block_amax(const float (&values)[kCount] K2K_WHERE) {
    float amax = max_over_lanes<kLanes>(thread_amax(values) K2K_PASS_WHERE);
    if (arch::any(amax > FLT_MAX K2K_PASS_WHERE)) {
        amax = max_over_lanes<kLanes>(thread_finite_amax(values) K2K_PASS_WHERE);
    }
    return amax;
}

K2K_DEVICE float scale_of(float amax, bool power_of_two) {
    const float scale = max_number(amax / 448.0f, FLT_MIN);
    if (!power_of_two) return scale;
    // All ones carry into the exponent unless the mantissa is zero.
    return soft::bits_float((soft::float_bits(scale) + 0x7fffff) & 0x7f800000);
}

// A scale, prepared for divisions. A division costs about ten instructions and a branch; here the
// elements of a block share one reciprocal: q = x * (1 / scale) is off by an ulp or two, and
// q + (x - q * scale) * (1 / scale), the remainder being exact in a fused multiply-add, is
// float32(x / scale) wherever a code could depend on it. (Checked for every scale's mantissa and
// every quotient within two ulps of a code or of a middle between codes.) Remainders of tiny
// numbers would be denormal, hence inexact: there both sides are multiplied by 2^64.
struct alignas(16) Divisor {
    float reciprocal;
    float lift;
    float lifted_scale;
    float correction;  // of the quotient, times the lifted remainder, which has the opposite sign
};

K2K_DEVICE Divisor divisor_of(float scale) {
    const bool tiny = scale < 0x1p-60f;
    const float lift = tiny ? 0x1p64f : 1.0f, unlift = tiny ? -0x1p-64f : -1.0f;
    const float reciprocal = 1.0f / scale;
    return {reciprocal, lift, scale * lift, reciprocal * unlift};
}

// x / scale. The remainder has the opposite sign so that -0 stays -0.
K2K_DEVICE float divide(float x, const Divisor& by) {
    const float quotient = x * by.reciprocal;
    const float remainder = fmaf(quotient, by.lifted_scale, -x * by.lift);
    return fmaf(remainder, by.correction, quotient);
}

// Four neighbours as codes.
K2K_DEVICE uint32_t encode4(float x0, float x1, float x2, float x3, const Divisor& by) {
    return arch::pack_e4m3(divide(x0, by), divide(x1, by), divide(x2, by), divide(x3, by));
}

// Sixteen neighbours as codes.
K2K_DEVICE uint4 encode16(const float (&values)[16], const Divisor& by) {
    return make_uint4(encode4(values[0], values[1], values[2], values[3], by),
                      encode4(values[4], values[5], values[6], values[7], by),
                      encode4(values[8], values[9], values[10], values[11], by),
                      encode4(values[12], values[13], values[14], values[15], by));
}

}  // namespace k2k::tile
