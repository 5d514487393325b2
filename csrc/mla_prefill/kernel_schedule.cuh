#pragma once

// Writes the tasks of tickets 0, 1, ...: for tests of the scheduler, which need no tensors.
//
// Grid      one warp.

#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "mla_prefill/schedule.cuh"

namespace k2k {

struct MlaPrefillScheduleStorage {
    MlaPrefillTask task;
};

// Entries after the last task have `last` set.
template <bool kOverKeys, int kRows>
__global__ void __launch_bounds__(32)
    mla_prefill_schedule_kernel(const __grid_constant__ MlaPrefillInputs in, MlaPrefillTask* tasks,
                                int capacity) {
    MlaPrefillTask& task = arch::shared_storage<MlaPrefillScheduleStorage>().task;
    constexpr TileAxis kAxis = kOverKeys ? TileAxis::kKeys : TileAxis::kQueries;
    LongestFirst<kAxis, kRows> finder(in);
    for (int ticket = 0; ticket < capacity; ++ticket) {
        finder.find(in, ticket, task);
        arch::sync_warp();
        if (arch::lane_id() == 0) tasks[ticket] = task;
        arch::sync_warp();
    }
}

}  // namespace k2k
