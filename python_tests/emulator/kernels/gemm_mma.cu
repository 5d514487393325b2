// C[M][N] = A[M][K] B[N][K]^T for sm_80 on: cp.async, two stages, ldmatrix, mma.sync.
//
// Grid: (N / 64, M / 64) blocks of 4 warps, each 32x32 of the tile. A row of a stage is 64 bytes:
// four chunks of 16, of which chunk c lies at c ^ (row / 2 % 4).
#include "arch/cp_async.cuh"
#include "arch/matrix.cuh"
#include "arch/mma.cuh"
#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "support.h"

constexpr int BLOCK_M = 64, BLOCK_N = 64, BLOCK_K = 32, kRowBytes = BLOCK_K * 2;

struct alignas(128) Storage {
    uint8_t tile[2][(BLOCK_M + BLOCK_N) * kRowBytes];
};

K2K_DEVICE int chunk_offset(int row, int chunk) {
    const int swizzle = BUG == 4 ? row / 4 % 4 : row / 2 % 4;  // BUG 4: reads by another pattern
    return row * kRowBytes + (chunk ^ swizzle) * 16;
}

__global__ void __launch_bounds__(128)
    gemm_mma_kernel(const bf16* a, const bf16* b, float* c, int m, int n, int k) {
    Storage& smem = arch::shared_storage<Storage>();
    const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 64, warp_n = threadIdx.x / 32 % 2;
    const int m0 = blockIdx.y * BLOCK_M, n0 = blockIdx.x * BLOCK_N;
    const int num_steps = (k + BLOCK_K - 1) / BLOCK_K;

    const auto load = [&](int stage, int k0) {
        for (int i = threadIdx.x; i < (BLOCK_M + BLOCK_N) * 4; i += 128) {
            const int row = i / 4, chunk = i % 4;
            const bool is_a = row < BLOCK_M;
            const int global_row = is_a ? m0 + row : n0 + row - BLOCK_M;
            bool valid = global_row < (is_a ? m : n) && k0 + chunk * 8 < k;
            if (BUG == 5) valid = true;  // BUG 5: rows beyond the matrix
            const bf16* source = is_a ? a : b;
            if (valid) source += static_cast<size_t>(global_row) * k + k0 + chunk * 8;
            const int offset = row * kRowBytes + (chunk ^ row / 2 % 4) * 16;
            uint32_t target = arch::smem_address(&smem.tile[stage][offset]);
            if (BUG == 8) target += 8;              // BUG 8: not at a multiple of 16
            arch::cp_async(target, source, valid);  // @5 @8
        }
        arch::cp_async_commit();
    };

    float acc[2][4][4] = {};
    load(0, 0);
    for (int step = 0; step < num_steps; ++step) {
        const int stage = step % 2;
        if (step + 1 < num_steps) {
            load(stage ^ 1, (step + 1) * BLOCK_K);
            if (BUG != 1) arch::cp_async_wait<1>();  // BUG 1: reads before the copy has landed
        } else if (BUG != 6) {                       // BUG 6: the last tile is not waited for
            arch::cp_async_wait<0>();
        }
        if (BUG != 2 && (BUG != 7 || threadIdx.x < 96 || step + 1 < num_steps)) {
            arch::sync_block();  // BUG 2: nobody waits for the others' copies; 7: one warp does not
        }

        const uint8_t* tile_a = smem.tile[stage];
        const uint8_t* tile_b = tile_a + BLOCK_M * kRowBytes;
        K2K_UNROLL
        for (int kk = 0; kk < BLOCK_K / 16; ++kk) {
            uint32_t frag_a[2][4], frag_b[4][2];
            K2K_UNROLL
            for (int i = 0; i < 2; ++i) {
                const int row = warp_m * 32 + i * 16 + lane % 16, chunk = kk * 2 + lane / 16;
                arch::ldmatrix(frag_a[i], arch::smem_address(tile_a + chunk_offset(row, chunk)));
            }
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                const int row = warp_n * 32 + j * 8 + lane % 8, chunk = kk * 2 + lane / 8 % 2;
                arch::ldmatrix(frag_b[j], arch::smem_address(tile_b + chunk_offset(row, chunk)));
            }
            K2K_UNROLL
            for (int i = 0; i < 2; ++i) {
                K2K_UNROLL
                for (int j = 0; j < 4; ++j) arch::mma_sync<bf16>(acc[i][j], frag_a[i], frag_b[j]);
            }
        }
        if (BUG != 3) arch::sync_block();  // @7  BUG 3: the next copies overtake slow readers
    }

    K2K_UNROLL
    for (int i = 0; i < 2; ++i) {
        K2K_UNROLL
        for (int j = 0; j < 4; ++j) {
            K2K_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int row = m0 + warp_m * 32 + i * 16 + lane / 4 + e / 2 * 8;
                const int column = n0 + warp_n * 32 + j * 8 + lane % 4 * 2 + e % 2;
                if (row < m && column < n) c[static_cast<size_t>(row) * n + column] = acc[i][j][e];
            }
        }
    }
}

extern "C" int gemm_mma(const bf16* a, const bf16* b, float* c, int m, int n, int k) {
    return guard([=] {
        const dim3 grid((n + BLOCK_N - 1) / BLOCK_N, (m + BLOCK_M - 1) / BLOCK_M);
        launch({grid, 128, sizeof(Storage)}, gemm_mma_kernel, a, b, c, m, n, k);
    });
}
