#pragma once

// Tensor cores, one warp at a time: D[16][8] += A[16][K] B[K][8], accumulated in float. With
// g = lane / 4, t = lane % 4, in units of 4 bytes (2 or 4 neighbours along K), lane l holds
// A[g + 8 (i % 2)][t + 4 (i / 2)] in a[i], B[t + 4 i][g] in b[i], D[g + 8 (i / 2)][2 t + i % 2] in
// d[i].
// PTX: #warp-level-matrix-instructions-mma

#include <type_traits>

#include "arch/body.h"
#include "common/dtypes.h"

namespace k2k::arch {

// Whether this chip's mma_sync takes e4m3.
#ifdef K2K_EMULATED
inline bool has_mma_e4m3() { return emulator::capability() >= 89; }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
K2K_DEVICE constexpr bool has_mma_e4m3() { return false; }
#else
K2K_DEVICE constexpr bool has_mma_e4m3() { return true; }
#endif

// K = 16 of bf16 or fp16; K = 32 of e4m3 (where has_mma_e4m3()).
template <class T>
K2K_DEVICE void mma_sync(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] K2K_WHERE) {
#ifdef K2K_EMULATED
    emulator::mma_sync(type_of<T>, d, a, b, where);
#else
#define K2K_MMA(shape, type)                                                                 \
    K2K_PTX("mma.sync.aligned." shape ".row.col.f32." type "." type                          \
            ".f32 {%0, %1, %2, %3}, "                                                        \
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),                    \
            "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), \
            "r"(b[0]), "r"(b[1]))
    if constexpr (std::is_same_v<T, bf16>) {
        K2K_MMA("m16n8k16", "bf16");
    } else if constexpr (std::is_same_v<T, fp16>) {
        K2K_MMA("m16n8k16", "f16");
    } else {
        static_assert(std::is_same_v<T, e4m3>, "bf16, fp16 or e4m3");
        if constexpr (has_mma_e4m3()) K2K_MMA("m16n8k32", "e4m3");
    }
#undef K2K_MMA
#endif
}

}  // namespace k2k::arch
