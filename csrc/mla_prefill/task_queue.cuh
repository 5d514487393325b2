#pragma once

// Tasks of a CTA on their way from the warp that finds them to the warps that work on them.

#include "mla_prefill/schedule.cuh"
#include "tile/ring.cuh"

namespace k2k {

// Two slots: the next task is known before the last one is done, so that its loads begin early. A
// third would be taken from an SM that is free sooner.
constexpr int kTaskSlots = 2;

struct PrefillTasks {
    MlaPrefillTask slots[kTaskSlots];
    arch::Mbarrier known[kTaskSlots];  // one arrival
    arch::Mbarrier done[kTaskSlots];   // one of each warp that reads the slot
};

using TaskPosition = tile::RingPosition<kTaskSlots>;

// One thread calls it.
K2K_DEVICE void make_task_barriers(PrefillTasks& queue, int readers) {
    for (int i = 0; i < kTaskSlots; ++i) {
        arch::mbarrier_init(queue.known[i], 1);
        arch::mbarrier_init(queue.done[i], readers);
    }
}

// Fills the queue up to the task with `last` set. A warp calls it.
template <TileAxis kAxis, int kRows>
K2K_DEVICE void find_tasks(PrefillTasks& queue, const MlaPrefillInputs& in, int32_t* counter) {
    LongestFirst<kAxis, kRows> finder(in);
    for (TaskPosition at;; at.advance()) {
        // Draw the ticket when the slot is free, not before.
        arch::mbarrier_wait(queue.done[at.slot], at.parity ^ 1);
        MlaPrefillTask& task = queue.slots[at.slot];
        finder.next(in, counter, task);
        tile::warp_arrive(queue.known[at.slot]);
        if (task.last) return;
    }
}

// The task at this position. The warp arrives at `done` when it needs the slot no longer.
K2K_DEVICE const MlaPrefillTask& next_task(PrefillTasks& queue, TaskPosition at) {
    arch::mbarrier_wait(queue.known[at.slot], at.parity);
    return queue.slots[at.slot];
}

}  // namespace k2k
