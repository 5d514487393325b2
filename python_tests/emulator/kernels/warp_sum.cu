// The smallest kernel of the suite: each block sums 1,024 numbers; one warp's sums meet in shared
// memory. Read it to see what a kernel takes from csrc/arch and csrc/common.
#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "support.h"

struct Storage {
    float warp_sum[4];
};

__global__ void __launch_bounds__(128) warp_sum_kernel(const float* x, float* sums) {
    Storage& smem = arch::shared_storage<Storage>();

    float sum = 0;
    for (int i = threadIdx.x; i < 1024; i += blockDim.x) sum += x[blockIdx.x * 1024 + i];
    for (int mask = 16; mask > 0; mask /= 2) sum += arch::shuffle_xor(sum, mask);
    if (arch::lane_id() == 0) smem.warp_sum[arch::warp_id()] = sum;

    if (BUG != 51) arch::sync_block();  // BUG 51: sums are read before they are written
    if (threadIdx.x == 0) {
        sums[blockIdx.x] =
            smem.warp_sum[0] + smem.warp_sum[1] + smem.warp_sum[2] + smem.warp_sum[3];
    }
}

extern "C" int warp_sum(const float* x, float* sums, int num_blocks) {
    return guard([=] { launch({num_blocks, 128, sizeof(Storage)}, warp_sum_kernel, x, sums); });
}
