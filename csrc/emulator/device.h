#pragma once

// The interface of the emulator for csrc/arch: one function per instruction, named as its wrapper.
// Each takes the wrapper's source line, and may run other CUDA threads before it returns.
// Shared-space addresses are 32-bit numbers, as on a GPU (see memory.cpp).

#include <cstddef>
#include <cstdint>

#include "common/dtypes.h"
#include "emulator/where.h"

namespace k2k::emulator {

// launch.cpp
int capability();  // compute capability x 10 of the emulated chip

// warp.cpp
enum class Shuffle { kIndex, kUp, kDown, kXor };
void sync_warp(uint32_t mask, Where where);
uint32_t ballot(bool predicate, Where where);
uint32_t match_any(uint32_t value, Where where);
bool elect_one(Where where);
uint64_t shuffle(Shuffle kind, uint64_t value, uint32_t lane, Where where);
uint32_t redux(const char* kind, uint32_t value, Where where);
int32_t redux(const char* kind, int32_t value, Where where);
void ldmatrix(int count, bool transposed, uint32_t* registers, uint32_t address, Where where);
void stmatrix(int count, bool transposed, const uint32_t* registers, uint32_t address, Where where);
void mma_sync(Type type, float* d, const uint32_t* a, const uint32_t* b, Where where);
void set_max_registers(int count, bool increase, Where where);

// barrier.cpp
void sync_block(Where where);
void barrier_sync(uint32_t id, uint32_t num_threads, Where where);
void barrier_arrive(uint32_t id, uint32_t num_threads, Where where);
void cluster_arrive(Where where);
void cluster_arrive_relaxed(Where where);
void cluster_wait(Where where);
uint32_t cluster_size();

// memory.cpp
void* shared_storage(std::size_t bytes, Where where);
uint32_t smem_address(const void* pointer, Where where);
void* cluster_pointer(const void* pointer, uint32_t rank, Where where);
void load(void* value, const void* source, std::size_t bytes, Where where);
void store(void* target, const void* value, std::size_t bytes, Where where);
void fence_proxy_async(Where where);

// Around a memory operation that other threads can observe or wait for.
enum class Order { kRelaxed, kAcquire, kRelease, kAcqRel };
void before_atomic(const void* address, std::size_t bytes, Order order, bool poll, Where where);
void after_atomic(const void* address, Order order);
void fence(Where where);
template <class Operation>
auto atomic(const void* address, std::size_t bytes, Order order, Where where, Operation operation) {
    before_atomic(address, bytes, order, /*poll=*/false, where);
    const auto result = operation();
    after_atomic(address, order);
    return result;
}
void nanosleep(Where where);
uint64_t globaltimer();
[[noreturn]] void trap(Where where);
void enter_sm90(const char* doing, Where where);  // for instructions without effect in the emulator

// async_copy.cpp
void cp_async(uint32_t target, const void* source, int bytes, int source_bytes, Where where);
void cp_async_commit(Where where);
void cp_async_wait(int pending_groups, Where where);
void cp_async_arrive(void* barrier, Where where);
void bulk_prefetch(const void* source, uint32_t bytes, Where where);
void bulk_load(void* target, const void* source, uint32_t bytes, void* barrier, uint32_t cta_mask,
               Where where);
void bulk_store(void* target, const void* source, uint32_t bytes, Where where);
void bulk_reduce_add(Type type, void* target, const void* source, uint32_t bytes, Where where);
void bulk_copy_to_cluster(void* target, const void* source, uint32_t bytes, void* barrier,
                          uint32_t rank, Where where);
void store_async(void* target, const void* value, std::size_t bytes, void* barrier, uint32_t rank,
                 Where where);
void bulk_commit(Where where);
void bulk_wait(int pending_groups, bool only_read, Where where);

// tma.cpp
void tma_prefetch(const void* map, Where where);
void tma_prefetch_box(int rank, const void* map, const int* coordinates, Where where);
void tma_load(int rank, void* target, const void* map, void* barrier, const int* coordinates,
              uint32_t cta_mask, Where where);
void tma_store(int rank, const void* map, const void* source, const int* coordinates, Where where);
void tma_reduce_add(int rank, const void* map, const void* source, const int* coordinates,
                    Where where);

// mbarrier.cpp
void mbarrier_init(void* barrier, uint32_t count, Where where);
void mbarrier_inval(void* barrier, Where where);
void mbarrier_arrive(void* barrier, uint32_t count, uint32_t expect_bytes, Where where);
void mbarrier_arrive_remote(void* barrier, uint32_t rank, uint32_t count, const char* name,
                            Where where);
void mbarrier_expect_tx(void* barrier, uint32_t bytes, Where where);
bool mbarrier_test_wait(void* barrier, uint32_t parity, Where where);
bool mbarrier_try_wait(void* barrier, uint32_t parity, Where where);
void mbarrier_wait(void* barrier, uint32_t parity, Where where);

// wgmma.cpp
struct WgmmaShape {
    Type type;
    int n;
    bool a_mn_major, b_mn_major;
};
void wgmma_fence(Where where);
void wgmma_ss(WgmmaShape shape, float* d, uint64_t a, uint64_t b, bool accumulate, Where where);
void wgmma_rs(WgmmaShape shape, float* d, const uint32_t* a, uint64_t b, bool accumulate,
              Where where);
void wgmma_commit(Where where);
void wgmma_wait(int pending_groups, Where where);

}  // namespace k2k::emulator
