#pragma once

// Clusters: neighbouring blocks that run at once and reach one another's shared memory. sm_90.

#include "arch/smem.cuh"

namespace k2k::arch {

// The block's rank in its cluster.
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

// The number of blocks in the cluster.
// PTX: #special-registers-cluster-nctarank
K2K_DEVICE uint32_t cluster_size() {
    K2K_EMULATE(cluster_size());
    uint32_t size = 0;
    K2K_PTX_PURE("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// Arrives at the cluster's barrier, having released what this thread did before.
// PTX: #parallel-synchronization-and-communication-instructions-barrier-cluster
K2K_DEVICE void cluster_arrive(K2K_WHERE_ONLY) {
    K2K_EMULATE(cluster_arrive(where));
    K2K_PTX("barrier.cluster.arrive.release.aligned;" :: : "memory");
}

// Waits for all threads of the cluster to have arrived.
// PTX: #parallel-synchronization-and-communication-instructions-barrier-cluster
K2K_DEVICE void cluster_wait(K2K_WHERE_ONLY) {
    K2K_EMULATE(cluster_wait(where));
    K2K_PTX("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}

// Both. The last one of a kernel comes before any block ends whose shared memory others still use.
// PTX: #parallel-synchronization-and-communication-instructions-barrier-cluster
K2K_DEVICE void cluster_sync(K2K_WHERE_ONLY) {
    cluster_arrive(K2K_PASS_WHERE_ONLY);
    cluster_wait(K2K_PASS_WHERE_ONLY);
}

// The same object in the shared memory of block `rank`.
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

}  // namespace k2k::arch
