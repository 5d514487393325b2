#pragma once

// The tasks of all blocks of mla_decode, as they find them themselves, written down: for tests of
// how work is shared out, which need neither queries nor a cache.
//
// Block     one warp, for the block of the same index.

#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "mla_decode/schedule.cuh"

namespace k2k {

struct MlaScheduleStorage {
    MlaTask task;
};

// tasks[block, i] is the block's i-th task; those behind the last are left as they are.
__global__ void __launch_bounds__(32)
    mla_schedule_kernel(const __grid_constant__ MlaDecodeParams p, MlaTask* tasks, int capacity) {
    MlaTask& task = arch::shared_storage<MlaScheduleStorage>().task;
    MlaTasks finder(p, blockIdx.x);
    for (int i = 0;; ++i) {
        finder.next(p, task);
        arch::sync_warp();
        if (task.last || i == capacity) return;
        if (arch::lane_id() == 0) tasks[int64_t(blockIdx.x) * capacity + i] = task;
        arch::sync_warp();
    }
}

}  // namespace k2k
