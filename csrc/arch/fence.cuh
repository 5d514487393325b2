#pragma once

// Fences: they order this thread's accesses for other threads and for the async proxy.

#include "arch/body.h"
#include "arch/ldst.cuh"

namespace k2k::arch {

// Earlier accesses come before later ones, for all threads of the scope.
// PTX: #parallel-synchronization-and-communication-instructions-membar-fence
template <Scope kScope>
K2K_DEVICE void fence_acq_rel(K2K_WHERE_ONLY) {
    K2K_EMULATE(fence(where));
    if constexpr (kScope == Scope::kGpu) {
        K2K_PTX("fence.acq_rel.gpu;" :: : "memory");
    } else {
        K2K_PTX("fence.acq_rel.sys;" :: : "memory");
    }
}

// What this thread wrote to shared memory becomes visible to asynchronous instructions (TMA stores,
// bulk copies, wgmma operands). Between the stores and the barrier that precedes them. sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-membar-fence
K2K_DEVICE void fence_proxy_async(K2K_WHERE_ONLY) {
    K2K_EMULATE(fence_proxy_async(where));
    K2K_PTX("fence.proxy.async.shared::cta;" :: : "memory");
}

// Initialised mbarriers become visible to the cluster and to the async proxy. sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-membar-fence
K2K_DEVICE void fence_mbarrier_init(K2K_WHERE_ONLY) {
    K2K_EMULATE(enter_sm90("fence_mbarrier_init", where));
    K2K_PTX("fence.mbarrier_init.release.cluster;" :: : "memory");
}

}  // namespace k2k::arch
