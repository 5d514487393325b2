// What PTX leaves undefined although a chip may well do what was meant. Bugs 60 and up; see
// test_planted_bugs.py. Without a bug: y[block] = x[block before] + 0, 1, 2, ...
#include "arch/cluster.cuh"
#include "arch/control.cuh"
#include "arch/cp_async.cuh"
#include "arch/fence.cuh"
#include "arch/tma.cuh"
#include "arch/warp.cuh"
#include "support.h"

using arch::Mbarrier;

struct alignas(128) DefinedStorage {
    uint4 own[32], row[32];
    uint32_t words[32];
    Mbarrier landed, turn;
    uint64_t number;
};

__global__ void __launch_bounds__(128) defined_kernel(const uint4* x, uint4* y) {
    DefinedStorage& smem = arch::shared_storage<DefinedStorage>();
    const int thread = threadIdx.x;
    const uint32_t rank = arch::cluster_rank(), next = (rank + 1) % arch::cluster_size();
    if (thread == 0) {
        arch::mbarrier_init(smem.landed, 1);
        arch::mbarrier_init(smem.turn, 1);
        if (BUG == 62) arch::mbarrier_init(smem.turn, 1);  // @62: it is one already
        arch::fence_mbarrier_init();
        arch::mbarrier_arrive_expect_tx(smem.landed, sizeof smem.row + sizeof smem.words);
        for (int phase = 0; phase < 2; ++phase) {
            arch::mbarrier_arrive(smem.turn);                      // @63
            if (BUG != 63) arch::mbarrier_wait(smem.turn, phase);  // BUG 63: nobody looks
        }
        smem.number = uint64_t(0x9000) << 48 | 1;  // by its bits an mbarrier that awaits one
        if (BUG == 68) arch::mbarrier_arrive(reinterpret_cast<Mbarrier&>(smem.number));  // @68
    }
    arch::registers_decrease<232>();
    if (BUG == 66) arch::registers_decrease<224>();  // @66: other warps may be at the first
    arch::cluster_sync();
    if (BUG != 66) arch::registers_decrease<224>();

    if (thread < 32) {
        const uint4* source = x + blockIdx.x * 32 + thread;
        const uint32_t target = arch::smem_address(&smem.own[thread]);
        arch::cp_async_partial(target, source, BUG == 64 ? 17 : 16);  // @64: of 16
        if (BUG == 65) arch::cp_async(target, source);                // @65: both to one place
        arch::cp_async_commit();
        arch::cp_async_wait<0>();
        arch::fence_proxy_async();
        arch::sync_warp();
        const uint32_t to = BUG == 60 ? rank : next;  // BUG 60: to itself
        if (thread == 0 && BUG != 61) {
            arch::bulk_copy_to_cluster(smem.row, smem.own, 512, smem.landed, to);  // @60
        }
        const uint32_t word = thread;
        arch::store_async(&smem.words[thread], word, smem.landed, next);  // @61: no other block
    }
    if (BUG == 69) {
        arch::mbarrier_wait(*arch::cluster_pointer(&smem.landed, next), 0);  // @69: only here
    }
    arch::mbarrier_wait_cluster(smem.landed, 0);
    if (BUG == 67 && thread % 32 < 16) {
        arch::barrier_sync(1, 128);  // BUG 67: half of each warp
    } else {
        arch::barrier_sync(1, 128);  // @67
    }
    if (thread < 32) {
        uint4 value = smem.row[thread];
        value.x += smem.words[thread];
        y[blockIdx.x * 32 + thread] = value;
        if (BUG == 70 && thread == 0) {  // BUG 70: a store of what another block has
            const uint4* row = arch::cluster_pointer(smem.row, next);
            arch::bulk_store(y + next * 32, row, 512);  // @70
        }
    }
    arch::cluster_sync();
}

extern "C" int defined(const uint4* x, uint4* y) {
    return guard([=] {
        LaunchShape shape{2, 128, sizeof(DefinedStorage)};
        shape.cluster = BUG == 61 ? 1 : 2;
        launch(shape, defined_kernel, x, y);
    });
}
