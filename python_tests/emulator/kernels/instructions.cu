// Every wrapper that no other test kernel uses, so that ptxas has seen its PTX. Not meant to be
// run.
#include "arch/cluster.cuh"
#include "arch/control.cuh"
#include "arch/convert.cuh"
#include "arch/cp_async.cuh"
#include "arch/fence.cuh"
#include "arch/matrix.cuh"
#include "arch/mma.cuh"
#include "arch/tma.cuh"
#include "arch/warp.cuh"
#include "support.h"

using arch::Mbarrier;
using arch::Scope;
using arch::TensorMap;

struct alignas(1024) Storage {
    float tile[1024];
    Mbarrier barrier;
};

__global__ void portable_kernel(float* x, uint32_t* flags, unsigned long long* counter) {
    Storage& smem = arch::shared_storage<Storage>();
    const uint32_t address = arch::smem_address(smem.tile);
    uint32_t r[4], pair[2], one[1], d[4] = {};
    arch::ldmatrix(r, address);
    arch::ldmatrix<2, true>(pair, address);
    arch::ldmatrix<1, true>(one, address);
    float acc[4] = {};
    arch::mma_sync<fp16>(acc, r, pair);
    arch::cp_async<4>(address, x);
    arch::cp_async<8>(address + 8, x, threadIdx.x < 3);
    arch::mbarrier_init(smem.barrier, 1);
    arch::cp_async_arrive(smem.barrier);
    arch::mbarrier_arrive(smem.barrier);
    while (!arch::mbarrier_test_wait(smem.barrier, 0)) arch::nanosleep(100);
    arch::mbarrier_inval(smem.barrier);

    d[0] = arch::redux_add(flags[0]) + arch::redux_min(flags[1]) + arch::redux_max(flags[2]);
    d[1] = arch::redux_add(int(flags[3])) + arch::redux_min(int(r[0])) + arch::redux_max(int(r[1]));
    if (arch::any(d[0] > 1) && arch::all(d[1] > 1)) arch::trap();
    double wide = arch::shuffle_up(double(acc[0]), 1) + arch::shuffle(double(acc[1]), 3);
    wide += arch::shuffle_down(acc[2], 2) + one[0];
    arch::store_streaming(reinterpret_cast<uint4*>(x),
                          arch::load_nc_no_allocate(reinterpret_cast<const uint4*>(x) + 9));
    arch::store_streaming(reinterpret_cast<uint2*>(x), arch::load_nc(reinterpret_cast<uint2*>(x)));
    arch::store_streaming(x + 64, arch::load_nc(x + 65) + float(wide));
    arch::reduce_add<Scope::kGpu>(x + 1, acc[3]);
    arch::atomic_add<Scope::kSystem>(flags, 1u);
    arch::atomic_max(flags, 4u);
    arch::reduce_add_release<Scope::kGpu>(flags + 1, 1u);
    arch::reduce_add_release<Scope::kSystem>(flags + 1, 1u);
    d[2] = arch::atomic_add_acq_rel<Scope::kGpu>(flags, 1) +
           arch::atomic_add_acq_rel<Scope::kSystem>(flags, 1) +
           arch::atomic_cas<Scope::kGpu>(flags, 0, 1) +
           arch::atomic_cas<Scope::kSystem>(flags, 0, 1);
    arch::store_release<Scope::kGpu>(counter, arch::load_acquire<Scope::kGpu>(counter) + d[2]);
    arch::store_release<Scope::kSystem>(counter, arch::load_acquire<Scope::kSystem>(counter));
    arch::fence_acq_rel<Scope::kGpu>();
    arch::fence_acq_rel<Scope::kSystem>();
    *counter += arch::globaltimer();

    flags[4] = arch::pack_bf16(acc[0], acc[1]) + arch::pack_fp16(acc[2], acc[3]);
    flags[5] = arch::pack_e4m3(acc[0], acc[1], acc[2], acc[3]);
    flags[6] = arch::to_bf16(acc[0]).bits + arch::to_fp16(acc[1]).bits;
    x[70] = arch::to_float(bf16{uint16_t(d[0])}) + arch::to_float(fp16{uint16_t(d[1])}) +
            arch::to_float(e4m3{uint8_t(d[2])}) + arch::exp2_approx(x[71]) +
            arch::reciprocal_approx(x[72]) + arch::rsqrt_approx(x[73]);
}

#ifndef PORTABLE_ONLY
__global__ void hopper_kernel(const __grid_constant__ TensorMap map, float* x) {
    Storage& smem = arch::shared_storage<Storage>();
    Mbarrier& barrier = smem.barrier;
    const uint32_t address = arch::smem_address(smem.tile);
    arch::grid_dependency_wait();
    arch::tma_prefetch(map);
    if (arch::elect_one()) {
        arch::mbarrier_expect_tx(barrier, 1024);
        arch::tma_load_1d(smem.tile, map, barrier, 1);
        arch::tma_load_3d(smem.tile, map, barrier, 1, 2, 3);
        arch::tma_load_1d_multicast(smem.tile, map, barrier, 3, 1);
        arch::tma_load_2d_multicast(smem.tile, map, barrier, 3, 1, 2);
        arch::tma_load_3d_multicast(smem.tile, map, barrier, 3, 1, 2, 3);
        arch::tma_store_1d(map, smem.tile, 1);
        arch::tma_store_3d(map, smem.tile, 1, 2, 3);
        arch::tma_reduce_add_1d(map, smem.tile, 1);
        arch::tma_reduce_add_2d(map, smem.tile, 1, 2);
        arch::tma_reduce_add_3d(map, smem.tile, 1, 2, 3);
        arch::bulk_load(smem.tile, x, 256, barrier);
        arch::bulk_load_multicast(smem.tile, x, 256, barrier, 3);
        arch::bulk_copy_to_cluster(smem.tile, smem.tile + 512, 256, barrier, 1);
        arch::bulk_store(x, smem.tile, 256);
        arch::bulk_reduce_add(x, smem.tile, 256);
        arch::bulk_commit();
        arch::bulk_wait<0>();
        arch::mbarrier_arrive_cluster(barrier, 1);
    }
    arch::mbarrier_wait_cluster(barrier, 0);
    arch::grid_dependency_launch();
    uint32_t r[4] = {1, 2, 3, arch::cluster_size()}, pair[2] = {4, 5}, one[1] = {6};
    arch::stmatrix(r, address);
    arch::stmatrix<2, true>(pair, address);
    arch::stmatrix(one, address);
    arch::stmatrix<4, true>(r, address);
    float acc[4] = {};
    arch::mma_sync<e4m3>(acc, r, pair);
    arch::reduce_add_vector(reinterpret_cast<float4*>(x),
                            make_float4(acc[0], acc[1], acc[2], acc[3]));
}
#endif
