#pragma once

// A ring of slots in shared memory, guarded by mbarriers: pipeline stages, tiles, tasks.

#include "arch/mbarrier.cuh"
#include "arch/warp.cuh"

namespace k2k::tile {

// A warp's slot in a ring of kSlots, and the phase parity of the slot's barriers. A consumer waits
// on the full barrier with `parity`; a producer waits on the empty barrier with `parity ^ 1`, which
// passes at once in the first round. (CUTLASS: PipelineState.)
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

// One arrival per warp, after all of its lanes have reached this point.
K2K_DEVICE void warp_arrive(arch::Mbarrier& barrier K2K_WHERE) {
    arch::sync_warp(arch::kFullWarp K2K_PASS_WHERE);
    if (arch::lane_id() == 0) arch::mbarrier_arrive(barrier K2K_PASS_WHERE);
}

}  // namespace k2k::tile
