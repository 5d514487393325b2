#pragma once

// A ring of slots in shared memory that mbarriers guard: pipeline stages, tiles, tasks.

#include "arch/mbarrier.cuh"
#include "arch/warp.cuh"

namespace k2k::tile {

// A warp's position in a ring of kSlots, and the parity of the phase that its barriers are in. Who
// waits for a slot to be filled waits for `parity`; who waits for it to be free, for `parity ^ 1`,
// which in the first round passes at once. (CUTLASS: PipelineState.)
template <int kSlots>
struct RingPosition {
    int slot = 0;
    uint32_t parity = 0;

    K2K_DEVICE void advance() {
        if (++slot == kSlots) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// One arrival for the warp, when all of its lanes have come here.
K2K_DEVICE void warp_arrive(arch::Mbarrier& barrier K2K_WHERE) {
    arch::sync_warp(arch::kFullWarp K2K_PASS_WHERE);
    if (arch::lane_id() == 0) arch::mbarrier_arrive(barrier K2K_PASS_WHERE);
}

}  // namespace k2k::tile
