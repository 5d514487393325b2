#pragma once

// Arithmetic on two bf16 in a word, the first in its low half; bits and registers of words.

#include <cmath>

#include "arch/body.h"
#include "common/dtypes.h"

namespace k2k::arch {

#ifdef K2K_EMULATED
namespace detail {

// a * b + c with one rounding, to nearest even.
inline uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) {
    const auto widened = [](uint16_t bits) { return double{soft::bf16_to_float({bits})}; };
    const auto odd = [](auto value, auto& bits) {  // the last bit says that it is not exact
        memcpy(&bits, &value, sizeof bits);
        bits |= 1;
        memcpy(&value, &bits, sizeof bits);
        return value;
    };
    // The product is exact. The sum's remainder, and what a float cannot hold, go into the last
    // bit: then rounding in steps is the same as rounding once.
    const double product = widened(a) * widened(b), addend = widened(c);
    double sum = product + addend;
    if (!(std::fabs(sum) < INFINITY)) return soft::float_to_bf16(static_cast<float>(sum)).bits;
    const double part = sum - product;
    const double remainder = (product - (sum - part)) + (addend - part);
    uint64_t wide;
    if (remainder != 0) {
        if ((remainder < 0) == (sum > 0)) sum = std::nextafter(sum, 0.0);
        sum = odd(sum, wide);
    }
    float narrow = static_cast<float>(sum);
    if (narrow != sum) {
        if (std::fabs(double{narrow}) > std::fabs(sum)) narrow = std::nextafter(narrow, 0.0f);
        uint32_t bits;
        narrow = odd(std::copysign(narrow, static_cast<float>(std::copysign(1.0, sum))), bits);
    }
    return soft::float_to_bf16(narrow).bits;
}

}  // namespace detail
#endif

// a * b + c of each half with one rounding, to nearest even. Subnormal numbers count.
// PTX: #half-precision-floating-point-instructions-fma
K2K_DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef K2K_EMULATED
    const auto half = [&](int at) {
        return uint32_t(detail::fma_bf16(static_cast<uint16_t>(a >> at),
                                         static_cast<uint16_t>(b >> at),
                                         static_cast<uint16_t>(c >> at)))
               << at;
    };
    return half(0) | half(16);
#else
    uint32_t result;
    K2K_PTX_PURE("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
#endif
}

// a * b of each half, rounded to nearest even: a * b + (-0), which sm_80 has, too.
// PTX: #half-precision-floating-point-instructions-fma
K2K_DEVICE uint32_t mul_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(a, b, 0x80008000); }

// The low (high) half of a word, twice. As an operand of the arithmetic above it takes no
// instruction of its own.
// PTX: #data-movement-and-conversion-instructions-mov
K2K_DEVICE uint32_t low_twice(uint32_t a) {
#ifdef K2K_EMULATED
    return (a & 0xffff) * 0x10001;
#else
    uint32_t result;
    K2K_PTX_PURE("{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low}; }" : "=r"(
        result) : "r"(a));
    return result;
#endif
}
K2K_DEVICE uint32_t high_twice(uint32_t a) {
#ifdef K2K_EMULATED
    return (a >> 16) * 0x10001;
#else
    uint32_t result;
    K2K_PTX_PURE(
        "{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high}; }" : "=r"(
            result) : "r"(a));
    return result;
#endif
}

// Byte i of the result is byte (selector >> 4 i & 7) of the eight bytes of a (0 to 3) and b (4 to
// 7). Bit 4 i + 3 of the selector must be 0.
// PTX: #data-movement-and-conversion-instructions-prmt
K2K_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef K2K_EMULATED
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    }
    return result;
#else
    uint32_t result;
    K2K_PTX_PURE("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
    return result;
#endif
}

// (value & mask) | bits, as one instruction.
// PTX: #logic-and-shift-instructions-lop3
K2K_DEVICE uint32_t and_or(uint32_t value, uint32_t mask, uint32_t bits) {
#ifdef K2K_EMULATED
    return (value & mask) | bits;
#else
    uint32_t result;
    K2K_PTX_PURE("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "r"(mask),
                 "r"(bits));
    return result;
#endif
}

// The value, about which the compiler knows nothing: it stays in a register, where the compiler
// would compute it again in each iteration of a loop.
// PTX: #data-movement-and-conversion-instructions-mov
K2K_DEVICE uint32_t kept(uint32_t value) {
#ifdef K2K_EMULATED
    return value;
#else
    uint32_t result;
    K2K_PTX("mov.b32 %0, %1;" : "=r"(result) : "r"(value));
    return result;
#endif
}

}  // namespace k2k::arch
