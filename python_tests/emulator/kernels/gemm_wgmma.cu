// C[M][N] = A[M][K] B[N][K]^T for sm_90a: a producer warpgroup feeds two consumer warpgroups by
// TMA.
//
// Grid: (N / 128, M / 128) blocks. | event | arrivals       | waiter   |
//                                  | full  | 1 + the bytes  | consumer |
//                                  | empty | 2 (warpgroups) | producer |
// Shared memory: 3 stages of 32 KB; rows of 128 bytes with the 128-byte swizzle.
#include "arch/control.cuh"
#include "arch/fence.cuh"
#include "arch/tma.cuh"
#include "arch/warp.cuh"
#include "arch/wgmma.cuh"
#include "support.h"

using arch::Mbarrier;
using arch::TensorMap;

constexpr int BLOCK_M = 128, BLOCK_N = 128, BLOCK_K = 64, kStages = 3;
constexpr uint32_t kStageBytes = (BLOCK_M + BLOCK_N) * BLOCK_K * sizeof(bf16);

struct alignas(1024) Storage {
    bf16 a[kStages][BLOCK_M * BLOCK_K], b[kStages][BLOCK_N * BLOCK_K];
    Mbarrier full[kStages], empty[kStages];
};

K2K_DEVICE void produce(Storage& smem, const TensorMap& map_a, const TensorMap& map_b, int steps) {
    for (int step = 0; step < steps; ++step) {
        const int stage = step % kStages, parity = step / kStages % 2;
        if (BUG != 3) arch::mbarrier_wait(smem.empty[stage], parity ^ 1);  // @11 @15 @20
        uint32_t bytes = kStageBytes;
        if (BUG == 5) bytes += 16;
        if (BUG == 6) bytes -= kStageBytes / 2;
        arch::mbarrier_arrive_expect_tx(smem.full[stage], bytes);  // @1 @3 @14
        const int k0 = step * BLOCK_K;
        bf16* tile_a = smem.a[stage] + (BUG == 18 ? 64 : 0);
        arch::tma_load_2d(tile_a, map_a, smem.full[stage], k0, blockIdx.y * BLOCK_M);  // @17 @18
        if (BUG == 19) return;  // BUG 19: half of the copies, and nobody waits for the rest
        arch::tma_load_2d(smem.b[stage], map_b, smem.full[stage], k0, blockIdx.x * BLOCK_N);  // @17
    }
}

K2K_DEVICE void consume(Storage& smem, float* c, int m, int n, int steps, int warpgroup) {
    const int thread = threadIdx.x % 128;
    float acc[BLOCK_N / 2];
    K2K_UNROLL
    for (int i = 0; i < BLOCK_N / 2; ++i) acc[i] = 0;

    for (int step = 0; step < steps; ++step) {
        const int stage = step % kStages;
        const int parity = (BUG == 2 ? 0 : step / kStages % 2) ^ (BUG == 14 ? 1 : 0);
        if (BUG != 1 || step == 0) arch::mbarrier_wait(smem.full[stage], parity);  // @2 @5 @12 @19
        const arch::Swizzle swizzle = arch::Swizzle::k128;
        const uint64_t tile_a =
            arch::matrix_descriptor(smem.a[stage] + warpgroup * 64 * BLOCK_K, swizzle, 0, 1024);
        const uint64_t tile_b = arch::matrix_descriptor(smem.b[stage], swizzle, 0, 1024);
        if (BUG != 9) arch::wgmma_fence();
        K2K_UNROLL
        for (int kk = 0; kk < BLOCK_K / 16; ++kk) {
            const uint64_t at = kk * arch::descriptor_step(BUG == 10 ? 64 : 32);
            arch::wgmma_ss<bf16, BLOCK_N>(acc, tile_a + at, tile_b + at, true);  // @7 @9 @10 @16
        }
        arch::wgmma_commit();
        if (BUG == 7 && thread == 0) arch::mbarrier_arrive(smem.empty[stage]);  // BUG 7: too early
        if (BUG != 8 || step + 1 < steps)
            arch::wgmma_wait<0>();                              // BUG 8: the last is not waited for
        if (BUG != 16) arch::barrier_sync(1 + warpgroup, 128);  // BUG 16: one warp speaks for four
        const bool releases = BUG == 15 ? step == 0 || thread == 0 : thread == 0;
        const bool lost = BUG == 20 && step == 1 && warpgroup == 0;
        if (releases && BUG != 7 && !lost) arch::mbarrier_arrive(smem.empty[stage]);
    }

    const int row0 = blockIdx.y * BLOCK_M + warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
    const int column0 = blockIdx.x * BLOCK_N + thread % 4 * 2;
    K2K_UNROLL
    for (int i = 0; i < BLOCK_N / 2; ++i) {
        const int row = row0 + i / 2 % 2 * 8, column = column0 + i / 4 * 8 + i % 2;
        if ((row < m && column < n) || BUG == 13) c[static_cast<size_t>(row) * n + column] = acc[i];
    }
}

__global__ void __launch_bounds__(384, 1) gemm_wgmma_kernel(const __grid_constant__ TensorMap map_a,
                                                            const __grid_constant__ TensorMap map_b,
                                                            float* c,
                                                            int m,
                                                            int n,
                                                            int k) {
    Storage& smem = arch::shared_storage<Storage>();
    const int steps = (k + BLOCK_K - 1) / BLOCK_K, role = threadIdx.x / 128;

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            arch::mbarrier_init(smem.full[stage], 1);
            arch::mbarrier_init(smem.empty[stage], BUG == 11 ? 3 : 2);
        }
        arch::fence_mbarrier_init();
    }
    if (BUG != 12) arch::sync_block();  // BUG 12: barriers are used before they are made

    if (role == 0) {
        // BUG 21: nobody gives registers back; 22: one warp of four does
        if (BUG != 21 && (BUG != 22 || threadIdx.x < 32)) arch::registers_decrease<40>();  // @22
        if (threadIdx.x == 0) produce(smem, map_a, map_b, steps);
    } else {
        if (BUG != 22) arch::registers_increase<232>();  // @21
        consume(smem, c, m, n, steps, role - 1);
    }
}

static TensorMap make_map(const bf16* base, int rows, int k, int box_rows) {
    const auto swizzle = BUG == 4 ? arch::Swizzle::k64 : arch::Swizzle::k128;
    const uint64_t size = rows + (BUG == 17 ? 8 : 0);  // BUG 17: the map is taller than the matrix
    const uint32_t width = BUG == 4 ? 32 : BLOCK_K;
    return arch::make_tensor_map(Type::kBf16, base, {static_cast<uint64_t>(k), size},
                                 {static_cast<uint64_t>(k) * sizeof(bf16)},
                                 {width, static_cast<uint32_t>(box_rows) * (BUG == 4 ? 2 : 1)},
                                 swizzle);
}

extern "C" int gemm_wgmma(const bf16* a, const bf16* b, float* c, int m, int n, int k) {
    return guard([=] {
        const TensorMap map_a = make_map(a, m, k, BLOCK_M), map_b = make_map(b, n, k, BLOCK_N);
        const dim3 grid((n + BLOCK_N - 1) / BLOCK_N, (m + BLOCK_M - 1) / BLOCK_M);
        launch({grid, 384, sizeof(Storage)}, gemm_wgmma_kernel, map_a, map_b, c, m, n, k);
    });
}
