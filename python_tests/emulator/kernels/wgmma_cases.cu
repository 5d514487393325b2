// C[64][N] = A[64][K] B[N][K]^T with 128 bytes of K: tiles brought by TMA with the 128-byte
// swizzle, and four wgmma whose descriptors advance inside its rows. MN-major operands come as
// [K][64] and [K][N], 16-bit only. (Every wgmma there is a wrapper for: csrc/conformance.)
#include "arch/fence.cuh"
#include "arch/tma.cuh"
#include "arch/warp.cuh"
#include "arch/wgmma.cuh"
#include "support.h"

using arch::Major;
using arch::Swizzle;
using arch::TensorMap;

template <class T>
constexpr int kDepth = 128 / sizeof(T);

template <class T, int N>
struct alignas(1024) Storage {
    uint8_t a[64 * 128], b[(N * 128 + 1023) / 1024 * 1024];
    arch::Mbarrier full;
};

template <class T, int N, bool kRegisters, Major kMajorA, Major kMajorB>
__global__ void __launch_bounds__(128) wgmma_case_kernel(const __grid_constant__ TensorMap map_a,
                                                         const __grid_constant__ TensorMap map_b,
                                                         float* c) {
    Storage<T, N>& smem = arch::shared_storage<Storage<T, N>>();
    if (threadIdx.x == 0) {
        arch::mbarrier_init(smem.full, 1);
        arch::fence_mbarrier_init();
        arch::mbarrier_arrive_expect_tx(smem.full, 64 * 128 + N * 128);
        arch::tma_load_2d(smem.a, map_a, smem.full, 0, 0);
        for (int n = 0; n < N; n += kMajorB == Major::kK ? N : 64) {
            arch::tma_load_2d(smem.b + n * 128, map_b, smem.full, n, 0);
        }
    }
    arch::sync_block();
    arch::mbarrier_wait(smem.full, 0);

    float d[N / 2];
    uint32_t a[4];
    const int warp_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
    const uint64_t tile_a = arch::matrix_descriptor(smem.a, Swizzle::k128, 0, 1024);
    const uint64_t tile_b =
        arch::matrix_descriptor(smem.b, Swizzle::k128, kMajorB == Major::kK ? 0 : 64 * 128, 1024);
    K2K_UNROLL
    for (int kk = 0; kk < 4; ++kk) {
        // 32 bytes along a row, or 16 rows of 128.
        const auto step = [&](Major major) {
            return kk * arch::descriptor_step(major == Major::kK ? 32 : 16 * 128);
        };
        if constexpr (kRegisters) {
            K2K_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int row = warp_row + lane / 4 + i % 2 * 8, chunk = kk * 2 + i / 2;
                const uint8_t* place = smem.a + row * 128 + (chunk ^ row % 8) * 16 + lane % 4 * 4;
                a[i] = *reinterpret_cast<const uint32_t*>(place);
            }
            arch::wgmma_fence();
            arch::wgmma_rs<T, N, kMajorB>(d, a, tile_b + step(kMajorB), kk != 0);
            arch::wgmma_commit();
            arch::wgmma_wait<0>();
        } else {
            arch::wgmma_fence();
            arch::wgmma_ss<T, N, kMajorA, kMajorB>(d, tile_a + step(kMajorA),
                                                   tile_b + step(kMajorB), kk != 0);
            arch::wgmma_commit();
        }
    }
    arch::wgmma_wait<0>();
    K2K_UNROLL
    for (int i = 0; i < N / 2; ++i) {
        const int row = warp_row + lane / 4 + i / 2 % 2 * 8;
        c[row * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
    }
}

template <class T, int N, bool kRegisters, Major kMajorA, Major kMajorB>
static int run_case(const void* a, const void* b, float* c) {
    const auto map = [](const void* base, int mn, Major major) {
        const auto columns = static_cast<uint64_t>(major == Major::kK ? kDepth<T> : mn);
        const auto rows = static_cast<uint64_t>(major == Major::kK ? mn : kDepth<T>);
        const uint32_t box_columns = major == Major::kK ? kDepth<T> : 64;
        return arch::make_tensor_map(type_of<T>, base, {columns, rows}, {columns * sizeof(T)},
                                     {box_columns, static_cast<uint32_t>(rows)}, Swizzle::k128);
    };
    return guard([=] {
        launch({1, 128, sizeof(Storage<T, N>)},
               wgmma_case_kernel<T, N, kRegisters, kMajorA, kMajorB>, map(a, 64, kMajorA),
               map(b, N, kMajorB), c);
    });
}

template <class T>
static int run_k_major(int registers, const void* a, const void* b, float* c) {
    return registers ? run_case<T, 64, true, Major::kK, Major::kK>(a, b, c)
                     : run_case<T, 64, false, Major::kK, Major::kK>(a, b, c);
}

// N = 64; `type` as in k2k::Type; both operands K-major.
extern "C" int wgmma_k_major(const void* a, const void* b, float* c, int type, int registers) {
    switch (static_cast<Type>(type)) {
        case Type::kBf16:
            return run_k_major<bf16>(registers, a, b, c);
        case Type::kFp16:
            return run_k_major<fp16>(registers, a, b, c);
        default:
            return run_k_major<e4m3>(registers, a, b, c);
    }
}

// bf16, N = 128; form 0: A is MN-major, 1: B is, 2: both, 3: B, with A in registers.
extern "C" int wgmma_mn_major(const void* a, const void* b, float* c, int form) {
    switch (form) {
        case 0:
            return run_case<bf16, 128, false, Major::kMN, Major::kK>(a, b, c);
        case 1:
            return run_case<bf16, 128, false, Major::kK, Major::kMN>(a, b, c);
        case 2:
            return run_case<bf16, 128, false, Major::kMN, Major::kMN>(a, b, c);
        default:
            return run_case<bf16, 128, true, Major::kK, Major::kMN>(a, b, c);
    }
}
