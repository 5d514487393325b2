#pragma once

// The built-ins of nvcc, for a host compiler: qualifiers, vector types and the coordinates of the
// running thread. The emulator needs no CUDA header.
//
// `__shared__` is deliberately undefined: a kernel's shared memory is one storage struct, from
// arch/smem.cuh, so that the emulator can bound, poison and place it.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "emulator/where.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __restrict__ __restrict

#define K2K_VECTOR_TYPE(name, element, bytes)                                            \
    struct alignas(2 * sizeof(element)) name##2 { element x, y; };                       \
    struct name##3 { element x, y, z; };                                                 \
    struct alignas(bytes) name##4 { element x, y, z, w; };                               \
    inline name##2 make_##name##2(element x, element y) { return {x, y}; }               \
    inline name##3 make_##name##3(element x, element y, element z) { return {x, y, z}; } \
    inline name##4 make_##name##4(element x, element y, element z, element w) {          \
        return {x, y, z, w};                                                             \
    }
K2K_VECTOR_TYPE(uchar, unsigned char, 4)
K2K_VECTOR_TYPE(ushort, unsigned short, 8)
K2K_VECTOR_TYPE(int, int, 16)
K2K_VECTOR_TYPE(uint, unsigned, 16)
K2K_VECTOR_TYPE(float, float, 16)
#undef K2K_VECTOR_TYPE

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr std::size_t count() const { return std::size_t(x) * y * z; }
};

namespace k2k::emulator {

// The built-in variables of a CUDA thread.
struct Builtins {
    uint3 thread_idx, block_idx;
    dim3 block_dim, grid_dim;
    unsigned lane, warp, cluster_rank;
};

// The CUDA thread that is running on this OS thread.
extern __thread Builtins* g_current;

}  // namespace k2k::emulator

#define threadIdx (::k2k::emulator::g_current->thread_idx)
#define blockIdx (::k2k::emulator::g_current->block_idx)
#define blockDim (::k2k::emulator::g_current->block_dim)
#define gridDim (::k2k::emulator::g_current->grid_dim)
