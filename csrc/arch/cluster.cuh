#pragma once

// Clusters: neighbouring CTAs, resident together, that access each other's shared memory. sm_90.

#include "arch/mbarrier.cuh"

namespace k2k::arch {

// The CTA's rank in its cluster.
// PTX: #special-registers-cluster-ctarank
K2K_DEVICE uint32_t cluster_rank() {
#ifdef K2K_EMULATED
    return emulator::g_current->cluster_rank;
#else
    uint32_t rank;
    K2K_PTX_PURE("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#endif
}

// The number of CTAs in the cluster.
// PTX: #special-registers-cluster-nctarank
K2K_DEVICE uint32_t cluster_size() {
    K2K_EMULATE(cluster_size());
    uint32_t size = 0;
    K2K_PTX_PURE("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// Arrives at the cluster's barrier and releases this thread's earlier accesses.
// PTX: #parallel-synchronization-and-communication-instructions-barrier-cluster
K2K_DEVICE void cluster_arrive(K2K_WHERE_ONLY) {
    K2K_EMULATE(cluster_arrive(where));
    K2K_PTX("barrier.cluster.arrive.release.aligned;" :: : "memory");
}

// Arrives without releasing anything (no MEMBAR.ALL.GPU). Use it after fence_mbarrier_init, to let
// the other CTAs use the mbarriers, and before a CTA ends whose shared memory has no outstanding
// access by another CTA: no read, no copy, no arrival at its mbarriers (wait at these first).
// sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-barrier-cluster
K2K_DEVICE void cluster_arrive_relaxed(K2K_WHERE_ONLY) {
    K2K_EMULATE(cluster_arrive_relaxed(where));
    K2K_PTX("barrier.cluster.arrive.relaxed.aligned;" :: : "memory");
}

// Waits for all threads of the cluster to have arrived.
// PTX: #parallel-synchronization-and-communication-instructions-barrier-cluster
K2K_DEVICE void cluster_wait(K2K_WHERE_ONLY) {
    K2K_EMULATE(cluster_wait(where));
    K2K_PTX("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}

// Arrives and waits. Needed before the end of a CTA whose shared memory other CTAs still access.
// PTX: #parallel-synchronization-and-communication-instructions-barrier-cluster
K2K_DEVICE void cluster_sync(K2K_WHERE_ONLY) {
    cluster_arrive(K2K_PASS_WHERE_ONLY);
    cluster_wait(K2K_PASS_WHERE_ONLY);
}

// The same with cluster_arrive_relaxed.
// PTX: #parallel-synchronization-and-communication-instructions-barrier-cluster
K2K_DEVICE void cluster_sync_relaxed(K2K_WHERE_ONLY) {
    cluster_arrive_relaxed(K2K_PASS_WHERE_ONLY);
    cluster_wait(K2K_PASS_WHERE_ONLY);
}

// The same object in the shared memory of CTA `rank`: for loads, stores and atomics. It has no
// shared-space address here, so ldmatrix, wgmma and copies do not reach it.
// PTX: #data-movement-and-conversion-instructions-mapa
template <class T>
K2K_DEVICE T* cluster_pointer(T* pointer, uint32_t rank K2K_WHERE) {
#ifdef K2K_EMULATED
    return static_cast<T*>(emulator::cluster_pointer(pointer, rank, where));
#else
    T* peer;
    K2K_PTX_PURE("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(pointer), "r"(rank));
    return peer;
#endif
}

// Stores 4, 8 or 16 bytes, at a multiple of their number, to the shared memory of CTA `rank`,
// where `target` and `barrier` name the same places as here; completes those bytes at the barrier
// there. A store by a thread, not by the async proxy: wgmma and TMA there need fence_proxy_async.
// PTX: #data-movement-and-conversion-instructions-st-async
template <class T>
K2K_DEVICE void store_async(T* target, T value, Mbarrier& barrier, uint32_t rank K2K_WHERE) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#ifdef K2K_EMULATED
    emulator::store_async(target, &value, sizeof(T), &barrier, rank, where);
#else
#define K2K_STORE_ASYNC(type, names, rank_name, ...)                                       \
    K2K_PTX("{ .reg .b32 target, barrier; mapa.shared::cluster.u32 target, %0, " rank_name \
            "; mapa.shared::cluster.u32 barrier, %1, " rank_name                           \
            "; st.async.weak.shared::cluster.mbarrier::complete_tx::bytes" type            \
            " [target], " names ", [barrier]; }" ::"r"(smem_address(target)),              \
            "r"(smem_address(&barrier)), __VA_ARGS__, "r"(rank) : "memory")
    const auto* words = reinterpret_cast<const uint32_t*>(&value);
    if constexpr (sizeof(T) == 4) {
        K2K_STORE_ASYNC(".b32", "%2", "%3", "r"(words[0]));
    } else if constexpr (sizeof(T) == 8) {
        K2K_STORE_ASYNC(".v2.b32", "{%2, %3}", "%4", "r"(words[0]), "r"(words[1]));
    } else {
        K2K_STORE_ASYNC(".v4.b32", "{%2, %3, %4, %5}", "%6", "r"(words[0]), "r"(words[1]),
                        "r"(words[2]), "r"(words[3]));
    }
#undef K2K_STORE_ASYNC
#endif
}

}  // namespace k2k::arch
