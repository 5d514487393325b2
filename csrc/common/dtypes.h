#pragma once

// Storage types of the 16- and 8-bit floats, and their conversions in integer arithmetic, which
// give the same bits on every machine. Device code uses arch/convert.cuh, by instructions where
// they exist.

#include <cstring>

#include "common/macros.h"

namespace k2k {

struct bf16 {  // 1 sign, 8 exponent, 7 mantissa bits
    uint16_t bits;
};
struct fp16 {  // 1, 5, 10
    uint16_t bits;
};
struct e4m3 {  // 1, 4, 3; no infinity; NaN is 0x7f and 0xff; the largest is 448
    uint8_t bits;
};

// The element types that the wrappers of arch/ take.
enum class Type { kF32, kBf16, kFp16, kE4m3, kU8, kS32, kU32 };

template <class T>
struct TypeOf;
template <>
struct TypeOf<float> {
    static constexpr Type value = Type::kF32;
};
template <>
struct TypeOf<bf16> {
    static constexpr Type value = Type::kBf16;
};
template <>
struct TypeOf<fp16> {
    static constexpr Type value = Type::kFp16;
};
template <>
struct TypeOf<e4m3> {
    static constexpr Type value = Type::kE4m3;
};
template <>
struct TypeOf<uint8_t> {
    static constexpr Type value = Type::kU8;
};
template <>
struct TypeOf<int32_t> {
    static constexpr Type value = Type::kS32;
};
template <>
struct TypeOf<uint32_t> {
    static constexpr Type value = Type::kU32;
};
template <class T>
constexpr Type type_of = TypeOf<T>::value;

constexpr uint32_t bytes_of(Type type) {
    return type == Type::kU8 || type == Type::kE4m3     ? 1
           : type == Type::kBf16 || type == Type::kFp16 ? 2
                                                        : 4;
}

namespace soft {

K2K_HOST_DEVICE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

K2K_HOST_DEVICE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

K2K_HOST_DEVICE float bf16_to_float(bf16 value) { return bits_float(uint32_t(value.bits) << 16); }

// Rounds to nearest, ties to even. A NaN becomes 0x7fff, as `cvt.rn.bf16.f32` makes it.
K2K_HOST_DEVICE bf16 float_to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

K2K_HOST_DEVICE float fp16_to_float(fp16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400) return bits_float(sign | ((magnitude << 13) + ((127 - 15) << 23)));
    const float subnormal = static_cast<float>(magnitude) * (1.0f / 16777216.0f);  // 2^-24 each
    return sign ? -subnormal : subnormal;
}

// Rounds |value| to a float of `mantissa` explicit bits and exponent bias `bias`, ties to even;
// returns its bits without sign. Carries run into the exponent, so overflow shows as large bits.
K2K_HOST_DEVICE uint32_t round_magnitude(uint32_t magnitude_bits, int mantissa, int bias) {
    const int exponent = static_cast<int>(magnitude_bits >> 23) - 127;
    int dropped = 23 - mantissa;
    uint32_t significand = magnitude_bits;
    if (exponent < 1 - bias) {  // subnormal there: more bits are dropped, the leading one is kept
        dropped += 1 - bias - exponent;
        if (dropped > 25) return 0;
        significand = (magnitude_bits & 0x7fffff) | 0x800000;
    } else {
        significand = magnitude_bits - (static_cast<uint32_t>(127 - bias) << 23);
    }
    const uint32_t half = (1u << (dropped - 1)) - 1, odd = significand >> dropped & 1;
    return (significand + half + odd) >> dropped;
}

K2K_HOST_DEVICE fp16 float_to_fp16(float value) {
    const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {0x7fff};
    if (magnitude >= 0x47800000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65536 and above
    return {static_cast<uint16_t>(sign | round_magnitude(magnitude, 10, 15))};
}

K2K_HOST_DEVICE float e4m3_to_float(e4m3 value) {
    const uint32_t sign = uint32_t(value.bits & 0x80) << 24, magnitude = value.bits & 0x7f;
    if (magnitude == 0x7f) return bits_float(0x7fffffff);
    if (magnitude >= 8) return bits_float(sign | ((magnitude << 20) + ((127 - 7) << 23)));
    const float subnormal = static_cast<float>(magnitude) * (1.0f / 512.0f);  // 2^-9 each
    return sign ? -subnormal : subnormal;
}

// Rounds to nearest, ties to even; beyond 448 saturates, as `cvt.rn.satfinite.e4m3x2.f32` does.
// Branch-free, about 15 instructions, for GPUs without the e4m3 conversion.
K2K_HOST_DEVICE e4m3 float_to_e4m3(float value) {
    const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffff;
    const uint32_t odd = magnitude >> 20 & 1;
    // Keeps 3 of 23 bits of mantissa; 120 is the difference of the exponents' biases.
    const uint32_t normal = (magnitude - (120u << 23) + 0x7ffff + odd) >> 20;
    // Below 2^-6 the step is 2^-9, the step of floats from 2^14 on: the addition rounds.
    const uint32_t subnormal = float_bits(bits_float(magnitude) + 0x1p14f) - 0x46800000;
    uint32_t code = magnitude < 0x3c800000 ? subnormal : normal;
    code = code > 0x7e ? 0x7e : code;
    if (magnitude > 0x7f800000) return {0x7f};
    return {static_cast<uint8_t>(code | (bits >> 24 & 0x80))};
}

}  // namespace soft

}  // namespace k2k
