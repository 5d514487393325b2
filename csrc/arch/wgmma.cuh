#pragma once

// Tensor cores, a warpgroup at a time: D[64][N] += A[64][K] B[K][N], accumulated in float, started
// asynchronously. B, and A in the _ss form, are tiles in shared memory named by descriptors; in the
// _rs form A is in registers, laid out as for mma_sync, 16 rows per warp. Lane 4 g + t of warp w
// holds D[16 w + g + 8 h][8 j + 2 t + e] in d[4 j + 2 h + e]. K = 16 of bf16 or fp16, 32 of e4m3.
// sm_90a.
//
//     wgmma_fence();                         registers and shared memory are ready
//     wgmma_ss<bf16, N>(d, a, b, false);     any number of these
//     wgmma_commit();                        commits them as a group
//     wgmma_wait<0>(d);                      d may be read
//
// PTX: #asynchronous-warpgroup-level-matrix-instructions

#include <type_traits>

#include "arch/smem.cuh"
#include "arch/tensor_map.h"

namespace k2k::arch {

// Which dimension of an operand is contiguous. e4m3 takes K only.
enum class Major { kK, kMN };

// The descriptor of a tile in shared memory. K-major: `stride_bytes` from one group of 8 rows to
// the next (8 x the swizzle's width if they are packed); `leading_bytes` between the two 16-byte
// halves of K without swizzle, else unused. MN-major: see for_each_chunk in emulator/wgmma.cpp. The
// tile starts at a multiple of 8 x the swizzle's width; a step along K inside it adds
// descriptor_step(bytes).
// PTX: #asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
K2K_DEVICE uint64_t matrix_descriptor(const void* tile, Swizzle swizzle, uint32_t leading_bytes,
                                      uint32_t stride_bytes K2K_WHERE) {
    const uint64_t address = smem_address(tile K2K_PASS_WHERE);
    const uint64_t mode = swizzle == Swizzle::k128  ? 1
                          : swizzle == Swizzle::k64 ? 2
                          : swizzle == Swizzle::k32 ? 3
                                                    : 0;
    return (address & 0x3ffff) >> 4 | uint64_t(leading_bytes & 0x3ffff) >> 4 << 16 |
           uint64_t(stride_bytes & 0x3ffff) >> 4 << 32 | mode << 62;
}

// What to add to a descriptor to start `bytes` further on.
K2K_HOST_DEVICE constexpr uint64_t descriptor_step(uint32_t bytes) { return bytes >> 4; }

// Orders register and shared-memory accesses before the wgmma that follow. Needed before the first
// one and after any access to registers of d or a.
// PTX: #asynchronous-warpgroup-level-matrix-instructions-wgmma-fence
K2K_DEVICE void wgmma_fence(K2K_WHERE_ONLY) {
    K2K_EMULATE(wgmma_fence(where));
    K2K_PTX("wgmma.fence.sync.aligned;" :: : "memory");
}

// Makes a group of the wgmma since the last one.
// PTX: #asynchronous-warpgroup-level-matrix-instructions-wgmma-commit-group
K2K_DEVICE void wgmma_commit(K2K_WHERE_ONLY) {
    K2K_EMULATE(wgmma_commit(where));
    K2K_PTX("wgmma.commit_group.sync.aligned;" :: : "memory");
}

// Waits until at most kPending groups are in flight. The d of completed groups may be used, their
// tiles overwritten.
// PTX: #asynchronous-warpgroup-level-matrix-instructions-wgmma-wait-group
template <int kPending>
K2K_DEVICE void wgmma_wait(K2K_WHERE_ONLY) {
    K2K_EMULATE(wgmma_wait(kPending, where));
    K2K_PTX("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The same, for a `d` that is read next: the empty asm statement marks d as written, so that the
// compiler moves no read of it before the wait.
template <int kPending, int kValues>
K2K_DEVICE void wgmma_wait(float (&d)[kValues] K2K_WHERE) {
    wgmma_wait<kPending>(K2K_PASS_WHERE_ONLY);
#ifndef K2K_EMULATED
    K2K_UNROLL
    for (float& value : d) K2K_PTX("" : "+f"(value)::"memory");
#endif
}

#ifndef K2K_EMULATED

// Operand lists of the PTX. K2K_NAMES_<r>: names of r accumulators; K2K_OUT_<r>: the accumulators;
// K2K_FOR_EACH_N(f): f(N, r, the indices of the next seven operands) for all N.
#define K2K_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define K2K_D16(i) K2K_D4(i), K2K_D4(i + 4), K2K_D4(i + 8), K2K_D4(i + 12)
#define K2K_NAMES_4 "%0, %1, %2, %3"
#define K2K_OUT_4 K2K_D4(0)
#define K2K_NAMES_8 \
    K2K_NAMES_4     \
    ", %4, %5, %6, %7"
#define K2K_OUT_8 K2K_OUT_4, K2K_D4(4)
#define K2K_NAMES_12 \
    K2K_NAMES_8      \
    ", %8, %9, %10, %11"
#define K2K_OUT_12 K2K_OUT_8, K2K_D4(8)
#define K2K_NAMES_16 \
    K2K_NAMES_12     \
    ", %12, %13, %14, %15"
#define K2K_OUT_16 K2K_OUT_12, K2K_D4(12)
#define K2K_NAMES_32 \
    K2K_NAMES_16     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define K2K_OUT_32 K2K_OUT_16, K2K_D16(16)
#define K2K_NAMES_48 \
    K2K_NAMES_32     \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define K2K_OUT_48 K2K_OUT_32, K2K_D16(32)
#define K2K_NAMES_64 \
    K2K_NAMES_48     \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define K2K_OUT_64 K2K_OUT_48, K2K_D16(48)
#define K2K_NAMES_80 \
    K2K_NAMES_64     \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define K2K_OUT_80 K2K_OUT_64, K2K_D16(64)
#define K2K_NAMES_96 \
    K2K_NAMES_80     \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define K2K_OUT_96 K2K_OUT_80, K2K_D16(80)
#define K2K_NAMES_128                                                                              \
    K2K_NAMES_96                                                                                   \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
    "%127"
#define K2K_OUT_128 K2K_OUT_96, K2K_D16(96), K2K_D16(112)
#define K2K_FOR_EACH_N(f)                                                                     \
    f(8, 4, 4, 5, 6, 7, 8, 9, 10) f(16, 8, 8, 9, 10, 11, 12, 13, 14)                          \
        f(24, 12, 12, 13, 14, 15, 16, 17, 18) f(32, 16, 16, 17, 18, 19, 20, 21, 22)           \
            f(64, 32, 32, 33, 34, 35, 36, 37, 38) f(96, 48, 48, 49, 50, 51, 52, 53, 54)       \
                f(128, 64, 64, 65, 66, 67, 68, 69, 70) f(160, 80, 80, 81, 82, 83, 84, 85, 86) \
                    f(192, 96, 96, 97, 98, 99, 100, 101, 102)                                 \
                        f(256, 128, 128, 129, 130, 131, 132, 133, 134)

// d, descriptors a and b, scale-d; then, for 16-bit types, which operands are MN-major.
#define K2K_WGMMA_SS(n, k, type, r, a, b, scale, flags, ...)                                      \
    K2K_PTX("{ .reg .pred p; setp.ne.b32 p, %" #scale ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
            "k" k ".f32." type "." type " {" K2K_NAMES_##r "}, %" #a ", %" #b ", p, 1, 1" flags   \
                                                           "; }" : K2K_OUT_##r : "l"(a_tile),     \
            "l"(b_tile), "r"(int(accumulate))__VA_ARGS__)
#define K2K_COMMA ,
#define K2K_SS_CASE(n, r, p0, p1, p2, p3, p4, p5, p6)                         \
    if constexpr (N == n && std::is_same_v<T, bf16>) {                        \
        K2K_WGMMA_SS(n, "16", "bf16", r, p0, p1, p2, ", %" #p3 ", %" #p4,     \
                     K2K_COMMA "n"(int(kMajorA))K2K_COMMA "n"(int(kMajorB))); \
    } else if constexpr (N == n && std::is_same_v<T, fp16>) {                 \
        K2K_WGMMA_SS(n, "16", "f16", r, p0, p1, p2, ", %" #p3 ", %" #p4,      \
                     K2K_COMMA "n"(int(kMajorA))K2K_COMMA "n"(int(kMajorB))); \
    } else if constexpr (N == n) {                                            \
        K2K_WGMMA_SS(n, "32", "e4m3", r, p0, p1, p2, "", );                   \
    }

#define K2K_WGMMA_RS(n, k, type, r, a0, a1, a2, a3, b, scale, flags, ...)                         \
    K2K_PTX("{ .reg .pred p; setp.ne.b32 p, %" #scale ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
            "k" k ".f32." type "." type " {" K2K_NAMES_##r "}, {%" #a0 ", %" #a1 ", %" #a2        \
                                                           ", %" #a3 "}, %" #b ", p, 1, 1" flags  \
                                                           "; }" : K2K_OUT_##r : "r"(a[0]),       \
            "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_tile), "r"(int(accumulate))__VA_ARGS__)
#define K2K_RS_CASE(n, r, p0, p1, p2, p3, p4, p5, p6)                       \
    if constexpr (N == n && std::is_same_v<T, bf16>) {                      \
        K2K_WGMMA_RS(n, "16", "bf16", r, p0, p1, p2, p3, p4, p5, ", %" #p6, \
                     K2K_COMMA "n"(int(kMajorB)));                          \
    } else if constexpr (N == n && std::is_same_v<T, fp16>) {               \
        K2K_WGMMA_RS(n, "16", "f16", r, p0, p1, p2, p3, p4, p5, ", %" #p6,  \
                     K2K_COMMA "n"(int(kMajorB)));                          \
    } else if constexpr (N == n) {                                          \
        K2K_WGMMA_RS(n, "32", "e4m3", r, p0, p1, p2, p3, p4, p5, "", );     \
    }
#endif

// The N that have wrappers.
template <class T, int N, Major kMajorA, Major kMajorB>
K2K_HOST_DEVICE constexpr void check_wgmma() {
    static_assert(N == 8 || N == 16 || N == 24 || N == 32 || N == 64 || N == 96 || N == 128 ||
                      N == 160 || N == 192 || N == 256,
                  "add this N to K2K_FOR_EACH_N");
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16> || std::is_same_v<T, e4m3>);
    static_assert(!std::is_same_v<T, e4m3> || (kMajorA == Major::kK && kMajorB == Major::kK),
                  "e4m3 operands are K-major");
}

// D = A B, or D += A B where `accumulate`; both tiles in shared memory.
// PTX: #asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
template <class T, int N, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
K2K_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a_tile, uint64_t b_tile,
                         bool accumulate K2K_WHERE) {
    check_wgmma<T, N, kMajorA, kMajorB>();
#ifdef K2K_EMULATED
    const emulator::WgmmaShape shape{type_of<T>, N, kMajorA == Major::kMN, kMajorB == Major::kMN};
    emulator::wgmma_ss(shape, d, a_tile, b_tile, accumulate, where);
#else
    K2K_FOR_EACH_N(K2K_SS_CASE)
#endif
}

// The same with A in registers, which may not be written before wgmma_wait.
// PTX: #asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
template <class T, int N, Major kMajorB = Major::kK>
K2K_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_tile,
                         bool accumulate K2K_WHERE) {
    check_wgmma<T, N, Major::kK, kMajorB>();
#ifdef K2K_EMULATED
    const emulator::WgmmaShape shape{type_of<T>, N, false, kMajorB == Major::kMN};
    emulator::wgmma_rs(shape, d, a, b_tile, accumulate, where);
#else
    K2K_FOR_EACH_N(K2K_RS_CASE)
#endif
}

#ifndef K2K_EMULATED
#undef K2K_RS_CASE
#undef K2K_WGMMA_RS
#undef K2K_SS_CASE
#undef K2K_COMMA
#undef K2K_WGMMA_SS
#undef K2K_FOR_EACH_N
#undef K2K_D16
#undef K2K_D4
#endif

}  // namespace k2k::arch
