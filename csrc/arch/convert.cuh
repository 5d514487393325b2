#pragma once

// Conversions between float and the small types, and fast approximations. Rounding is to nearest
// even; e4m3 saturates at 448. In the emulator the approximations are exact, so results differ from
// a GPU's within the error the PTX pages state.

#include "arch/body.h"
#include "common/dtypes.h"

namespace k2k::arch {

// PTX: #data-movement-and-conversion-instructions-cvt
K2K_DEVICE float to_float(bf16 value) { return soft::bf16_to_float(value); }
K2K_DEVICE float to_float(fp16 value) {
#ifdef K2K_EMULATED
    return soft::fp16_to_float(value);
#else
    float result;
    K2K_PTX_PURE("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#endif
}
K2K_DEVICE float to_float(e4m3 value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint32_t halves;
    K2K_PTX_PURE("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(value.bits)));
    return to_float(fp16{static_cast<uint16_t>(halves)});
#else
    return soft::e4m3_to_float(value);
#endif
}

// PTX: #data-movement-and-conversion-instructions-cvt
K2K_DEVICE bf16 to_bf16(float value) {
#ifdef K2K_EMULATED
    return soft::float_to_bf16(value);
#else
    bf16 result;
    K2K_PTX_PURE("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#endif
}
K2K_DEVICE fp16 to_fp16(float value) {
#ifdef K2K_EMULATED
    return soft::float_to_fp16(value);
#else
    fp16 result;
    K2K_PTX_PURE("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#endif
}

// Two neighbours in 4 bytes, `low` at the lower address.
// PTX: #data-movement-and-conversion-instructions-cvt
K2K_DEVICE uint32_t pack_bf16(float low, float high) {
#ifdef K2K_EMULATED
    return soft::float_to_bf16(low).bits | uint32_t(soft::float_to_bf16(high).bits) << 16;
#else
    uint32_t result;
    K2K_PTX_PURE("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
#endif
}
K2K_DEVICE uint32_t pack_fp16(float low, float high) {
#ifdef K2K_EMULATED
    return soft::float_to_fp16(low).bits | uint32_t(soft::float_to_fp16(high).bits) << 16;
#else
    uint32_t result;
    K2K_PTX_PURE("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
#endif
}

// Four neighbours in 4 bytes. One instruction for two from sm_89 on, integer arithmetic before.
// PTX: #data-movement-and-conversion-instructions-cvt
K2K_DEVICE uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t low, high;
    K2K_PTX_PURE("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(x1), "f"(x0));
    K2K_PTX_PURE("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(x3), "f"(x2));
    return low | uint32_t(high) << 16;
#else
    return soft::float_to_e4m3(x0).bits | uint32_t(soft::float_to_e4m3(x1).bits) << 8 |
           uint32_t(soft::float_to_e4m3(x2).bits) << 16 |
           uint32_t(soft::float_to_e4m3(x3).bits) << 24;
#endif
}

// 2^x, to about 2 units in the last place; 2^-inf is 0.
// PTX: #floating-point-instructions-ex2
K2K_DEVICE float exp2_approx(float x) {
#ifdef K2K_EMULATED
    return std::exp2(x);
#else
    float result;
    K2K_PTX_PURE("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

// 1 / x, to about 1 unit in the last place.
// PTX: #floating-point-instructions-rcp
K2K_DEVICE float reciprocal_approx(float x) {
#ifdef K2K_EMULATED
    return 1.0f / x;
#else
    float result;
    K2K_PTX_PURE("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

// 1 / sqrt(x), to about 2 units in the last place.
// PTX: #floating-point-instructions-rsqrt
K2K_DEVICE float rsqrt_approx(float x) {
#ifdef K2K_EMULATED
    return 1.0f / std::sqrt(x);
#else
    float result;
    K2K_PTX_PURE("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

}  // namespace k2k::arch
