#pragma once

// mbarrier: a barrier in shared memory that also counts bytes. A phase ends when all arrivals and
// all announced bytes have arrived; `parity` (0 for the first phase, then 1, 0, ...) selects the
// phase to wait for. On a new barrier a wait for parity 1 returns at once.
// PTX: #parallel-synchronization-and-communication-instructions-mbarrier

#include "arch/smem.cuh"

namespace k2k::arch {

struct alignas(8) Mbarrier {
    uint64_t state;
};

// Initialises the barrier; each phase takes `count` arrivals. Executed by one thread, followed by
// fence_mbarrier_init and a barrier of the CTA (or cluster).
// PTX: #parallel-synchronization-and-communication-instructions-mbarrier-init
K2K_DEVICE void mbarrier_init(Mbarrier& barrier, uint32_t count K2K_WHERE) {
    K2K_EMULATE(mbarrier_init(&barrier, count, where));
    K2K_PTX("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&barrier)),
            "r"(count) : "memory");
}

// Invalidates the barrier, so that its memory can be reused.
// PTX: #parallel-synchronization-and-communication-instructions-mbarrier-inval
K2K_DEVICE void mbarrier_inval(Mbarrier& barrier K2K_WHERE) {
    K2K_EMULATE(mbarrier_inval(&barrier, where));
    K2K_PTX("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(smem_address(&barrier)) : "memory");
}

// Arrives once, with release order in the CTA.
// PTX: #parallel-synchronization-and-communication-instructions-mbarrier-arrive
K2K_DEVICE void mbarrier_arrive(Mbarrier& barrier K2K_WHERE) {
    K2K_EMULATE(mbarrier_arrive(&barrier, 1, 0, where));
    K2K_PTX("{ .reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0]; }" ::"r"(
        smem_address(&barrier)) : "memory");
}

// Arrives at the same barrier of CTA `rank` of the cluster, after this thread's reads: a consumer
// releases a stage to its producer. It publishes no writes to other CTAs, so that it is one
// instruction; the producer waits with mbarrier_wait. sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-mbarrier-arrive
K2K_DEVICE void mbarrier_arrive_remote(Mbarrier& barrier, uint32_t rank K2K_WHERE) {
    K2K_EMULATE(mbarrier_arrive_remote(&barrier, rank, 1, "mbarrier_arrive_remote", where));
    K2K_PTX(
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
        " mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(smem_address(&barrier)),
        "r"(rank) : "memory");
}

// Arrives there `count` times with release order at cluster scope: for data that other CTAs read
// through cluster_pointer after mbarrier_wait_cluster. ptxas emits a GPU-wide fence for it
// (MEMBAR.ALL.GPU), an L2 round trip: not for inner loops. sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-mbarrier-arrive
K2K_DEVICE void mbarrier_arrive_cluster(Mbarrier& barrier, uint32_t rank,
                                        uint32_t count = 1 K2K_WHERE) {
    K2K_EMULATE(mbarrier_arrive_remote(&barrier, rank, count, "mbarrier_arrive_cluster", where));
    K2K_PTX(
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
        " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote], %2; }" ::"r"(
            smem_address(&barrier)),
        "r"(rank), "r"(count) : "memory");
}

// Announces `bytes` of copies to the current phase, then arrives once. sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-mbarrier-arrive
K2K_DEVICE void mbarrier_arrive_expect_tx(Mbarrier& barrier, uint32_t bytes K2K_WHERE) {
    K2K_EMULATE(mbarrier_arrive(&barrier, 1, bytes, where));
    K2K_PTX("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(&barrier)),
            "r"(bytes) : "memory");
}

// Announces `bytes` of copies to the current phase. sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-mbarrier-expect-tx-operation
K2K_DEVICE void mbarrier_expect_tx(Mbarrier& barrier, uint32_t bytes K2K_WHERE) {
    K2K_EMULATE(mbarrier_expect_tx(&barrier, bytes, where));
    K2K_PTX(
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&barrier)),
        "r"(bytes) : "memory");
}

// Arrives once, as one of the barrier's count, when this thread's earlier cp.async are complete.
// PTX: #data-movement-and-conversion-instructions-cp-async-mbarrier-arrive
K2K_DEVICE void cp_async_arrive(Mbarrier& barrier K2K_WHERE) {
    K2K_EMULATE(cp_async_arrive(&barrier, where));
    K2K_PTX("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(
        smem_address(&barrier)) : "memory");
}

// Whether the phase of that parity has ended; does not block.
// PTX: #parallel-synchronization-and-communication-instructions-mbarrier-test-wait-try-wait
K2K_DEVICE bool mbarrier_test_wait(Mbarrier& barrier, uint32_t parity K2K_WHERE) {
    K2K_EMULATE(mbarrier_test_wait(&barrier, parity, where));
#ifndef K2K_EMULATED
    uint32_t ended;
    K2K_PTX(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }" : "=r"(ended) : "r"(smem_address(&barrier)),
        "r"(parity) : "memory");
    return ended != 0;
#endif
}

// The same, but suspends the thread for a while before it returns false. sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-mbarrier-test-wait-try-wait
K2K_DEVICE bool mbarrier_try_wait(Mbarrier& barrier, uint32_t parity K2K_WHERE) {
    K2K_EMULATE(mbarrier_try_wait(&barrier, parity, where));
#ifndef K2K_EMULATED
    uint32_t ended;
    K2K_PTX(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }" : "=r"(ended) : "r"(smem_address(&barrier)),
        "r"(parity) : "memory");
    return ended != 0;
#endif
}

// Waits until the phase of that parity has ended; acquires what the arrivals released. sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-mbarrier-test-wait-try-wait
K2K_DEVICE void mbarrier_wait(Mbarrier& barrier, uint32_t parity K2K_WHERE) {
    K2K_EMULATE(mbarrier_wait(&barrier, parity, where));
#ifndef K2K_EMULATED
    while (!mbarrier_try_wait(barrier, parity)) {
    }
#endif
}

// The same with acquire order at cluster scope, for data published by mbarrier_arrive_cluster or
// store_async; invalidates the SM's L1 (CCTL.IVALL). sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-mbarrier-test-wait-try-wait
K2K_DEVICE void mbarrier_wait_cluster(Mbarrier& barrier, uint32_t parity K2K_WHERE) {
    K2K_EMULATE(mbarrier_wait(&barrier, parity, where));
#ifndef K2K_EMULATED
    uint32_t ended;
    do {
        K2K_PTX(
            "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], "
            "%2; selp.u32 %0, 1, 0, p; }" : "=r"(ended) : "r"(smem_address(&barrier)),
            "r"(parity) : "memory");
    } while (!ended);
#endif
}

}  // namespace k2k::arch
