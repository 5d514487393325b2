#pragma once

// 8x8 matrices of 16-bit elements between shared memory and registers.

#include "arch/body.h"

namespace k2k::arch {

// Loads 1, 2 or 4 matrices; lane 8m + i gives the address of row i of matrix m; lane l gets
// elements (l / 4, 2 (l % 4)) and the next, of each matrix or (kTransposed) of its transpose.
// PTX: #warp-level-matrix-instructions-ldmatrix
template <int kCount, bool kTransposed = false>
K2K_DEVICE void ldmatrix(uint32_t (&r)[kCount], uint32_t address K2K_WHERE) {
    static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#ifdef K2K_EMULATED
    emulator::ldmatrix(kCount, kTransposed, r, address, where);
#else
#define K2K_LDMATRIX(trans)                                                                       \
    if constexpr (kCount == 1) {                                                                  \
        K2K_PTX("ldmatrix.sync.aligned.m8n8.x1" trans                                             \
                ".shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");                \
    } else if constexpr (kCount == 2) {                                                           \
        K2K_PTX("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), \
                "=r"(r[1]) : "r"(address) : "memory");                                            \
    } else {                                                                                      \
        K2K_PTX("ldmatrix.sync.aligned.m8n8.x4" trans                                             \
                ".shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),                               \
                "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");                    \
    }
    if constexpr (kTransposed) {
        K2K_LDMATRIX(".trans")
    } else {
        K2K_LDMATRIX("")
    }
#undef K2K_LDMATRIX
#endif
}

// Stores 1, 2 or 4 matrices, the other way round. sm_90.
// PTX: #warp-level-matrix-instructions-stmatrix
template <int kCount, bool kTransposed = false>
K2K_DEVICE void stmatrix(const uint32_t (&r)[kCount], uint32_t address K2K_WHERE) {
    static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#ifdef K2K_EMULATED
    emulator::stmatrix(kCount, kTransposed, r, address, where);
#else
#define K2K_STMATRIX(trans)                                                                     \
    if constexpr (kCount == 1) {                                                                \
        K2K_PTX("stmatrix.sync.aligned.m8n8.x1" trans ".shared.b16 [%0], {%1};" ::"r"(address), \
                "r"(r[0]) : "memory");                                                          \
    } else if constexpr (kCount == 2) {                                                         \
        K2K_PTX("stmatrix.sync.aligned.m8n8.x2" trans                                           \
                ".shared.b16 [%0], {%1, %2};" ::"r"(address),                                   \
                "r"(r[0]), "r"(r[1]) : "memory");                                               \
    } else {                                                                                    \
        K2K_PTX("stmatrix.sync.aligned.m8n8.x4" trans                                           \
                ".shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),                           \
                "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");                         \
    }
    if constexpr (kTransposed) {
        K2K_STMATRIX(".trans")
    } else {
        K2K_STMATRIX("")
    }
#undef K2K_STMATRIX
#endif
}

}  // namespace k2k::arch
