#pragma once

// Writes the tasks that the CTAs of mla_decode find: for tests of the scheduler, which need neither
// queries nor a cache.
//
// Grid      one warp for each CTA of mla_decode, of the same index.

#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "mla_decode/schedule.cuh"

namespace k2k {

struct MlaScheduleStorage {
    MlaTask task;
};

// tasks[cta, i] is the CTA's i-th task; entries behind the last are not written.
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
