#pragma once

// TMA and bulk copies: one thread starts an asynchronous copy. Loads complete on an mbarrier, to
// which their bytes were announced; stores are committed in groups and waited for. Tiles are
// aligned to 128 bytes, with a swizzle of 32 / 64 / 128 to 256 / 512 / 1024. Elements outside the
// tensor are read as zeros and not written. sm_90.

#include "arch/mbarrier.cuh"
#include "arch/tensor_map.h"

namespace k2k::arch {

// Fetches the tensor map itself ahead of its first use.
// PTX: #data-movement-and-conversion-instructions-prefetch-prefetchu
K2K_DEVICE void tma_prefetch(const TensorMap& map K2K_WHERE) {
    K2K_EMULATE(tma_prefetch(&map, where));
    K2K_PTX("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// L2 eviction priority of a load, the last parameter of the loads below. The values are those of
// createpolicy.fractional with fraction 1 (as in CUTLASS's TMA::CacheHintSm90).
// PTX: #data-movement-and-conversion-instructions-createpolicy
enum class CacheHint : uint64_t {
    kNone = 0,
    kEvictFirst = 0x12f0000000000000,  // read once
    kEvictLast = 0x14f0000000000000,   // read by many CTAs
};

// ---- tensor tiles: the same five functions for 1, 2 and 3 dimensions
//
// tma_prefetch_<rank>d        fetches the box that starts at the coordinates (innermost first) into
//                             L2
// tma_load_<rank>d            fills the tile at `target` with the box and completes its bytes at
//                             `barrier`
// tma_load_<rank>d_multicast  the same into the same place of every CTA whose bit is in cta_mask,
//                             and completes at each one's barrier
// tma_store_<rank>d           writes the tile at `source` to the box
// tma_reduce_add_<rank>d      adds it
// PTX: #data-movement-and-conversion-instructions-cp-async-bulk-tensor
//      #data-movement-and-conversion-instructions-cp-async-bulk-prefetch-tensor
//      #data-movement-and-conversion-instructions-cp-reduce-async-bulk-tensor

#ifdef K2K_EMULATED
#define K2K_TMA(rank, parameters, prefetch_names, load_names, multicast_names, store_names, ...) \
    inline void tma_prefetch_##rank##d(const TensorMap& map, parameters K2K_WHERE) {             \
        const int coordinates[] = {__VA_ARGS__};                                                 \
        emulator::tma_prefetch_box(rank, &map, coordinates, where);                              \
    }                                                                                            \
    inline void tma_load_##rank##d(void* target, const TensorMap& map, Mbarrier& barrier,        \
                                   parameters, CacheHint = CacheHint::kNone K2K_WHERE) {         \
        const int coordinates[] = {__VA_ARGS__};                                                 \
        emulator::tma_load(rank, target, &map, &barrier, coordinates, 0, where);                 \
    }                                                                                            \
    inline void tma_load_##rank##d_multicast(void* target, const TensorMap& map,                 \
                                             Mbarrier& barrier, uint16_t cta_mask, parameters,   \
                                             CacheHint = CacheHint::kNone K2K_WHERE) {           \
        const int coordinates[] = {__VA_ARGS__};                                                 \
        emulator::tma_load(rank, target, &map, &barrier, coordinates, cta_mask, where);          \
    }                                                                                            \
    inline void tma_store_##rank##d(const TensorMap& map, const void* source,                    \
                                    parameters K2K_WHERE) {                                      \
        const int coordinates[] = {__VA_ARGS__};                                                 \
        emulator::tma_store(rank, &map, source, coordinates, where);                             \
    }                                                                                            \
    inline void tma_reduce_add_##rank##d(const TensorMap& map, const void* source,               \
                                         parameters K2K_WHERE) {                                 \
        const int coordinates[] = {__VA_ARGS__};                                                 \
        emulator::tma_reduce_add(rank, &map, source, coordinates, where);                        \
    }
#define K2K_COORDINATE(c) c
#else
#define K2K_TMA(rank, parameters, prefetch_names, load_names, multicast_names, store_names, ...)   \
    K2K_DEVICE void tma_prefetch_##rank##d(const TensorMap& map, parameters) {                     \
        K2K_PTX("cp.async.bulk.prefetch.tensor." #rank "d.L2.global.tile [%0, " prefetch_names     \
                "];" ::"l"(&map),                                                                  \
                __VA_ARGS__ : "memory");                                                           \
    }                                                                                              \
    K2K_DEVICE void tma_load_##rank##d(void* target, const TensorMap& map, Mbarrier& barrier,      \
                                       parameters, CacheHint hint = CacheHint::kNone) {            \
        if (hint == CacheHint::kNone) {                                                            \
            K2K_PTX("cp.async.bulk.tensor." #rank                                                  \
                    "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "            \
                    "[%1, " load_names "], [%2];" ::"r"(smem_address(target)),                     \
                    "l"(&map), "r"(smem_address(&barrier)), "l"(static_cast<uint64_t>(hint)),      \
                    __VA_ARGS__ : "memory");                                                       \
        } else {                                                                                   \
            K2K_PTX("cp.async.bulk.tensor." #rank                                                  \
                    "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "   \
                    "[%0], [%1, " load_names "], [%2], %3;" ::"r"(smem_address(target)),           \
                    "l"(&map), "r"(smem_address(&barrier)), "l"(static_cast<uint64_t>(hint)),      \
                    __VA_ARGS__ : "memory");                                                       \
        }                                                                                          \
    }                                                                                              \
    K2K_DEVICE void tma_load_##rank##d_multicast(void* target, const TensorMap& map,               \
                                                 Mbarrier& barrier, uint16_t cta_mask, parameters, \
                                                 CacheHint hint = CacheHint::kNone) {              \
        if (hint == CacheHint::kNone) {                                                            \
            K2K_PTX("cp.async.bulk.tensor." #rank                                                  \
                    "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"                   \
                    ".multicast::cluster [%0], [%1, " multicast_names                              \
                    "], [%2], %3;" ::"r"(smem_address(target)),                                    \
                    "l"(&map), "r"(smem_address(&barrier)), "h"(cta_mask),                         \
                    "l"(static_cast<uint64_t>(hint)), __VA_ARGS__ : "memory");                     \
        } else {                                                                                   \
            K2K_PTX("cp.async.bulk.tensor." #rank                                                  \
                    "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"                   \
                    ".multicast::cluster.L2::cache_hint [%0], [%1, " multicast_names               \
                    "], [%2], %3, %4;" ::"r"(smem_address(target)),                                \
                    "l"(&map), "r"(smem_address(&barrier)), "h"(cta_mask),                         \
                    "l"(static_cast<uint64_t>(hint)), __VA_ARGS__ : "memory");                     \
        }                                                                                          \
    }                                                                                              \
    K2K_DEVICE void tma_store_##rank##d(const TensorMap& map, const void* source, parameters) {    \
        K2K_PTX("cp.async.bulk.tensor." #rank                                                      \
                "d.global.shared::cta.tile.bulk_group [%0, " store_names "], [%1];" ::"l"(&map),   \
                "r"(smem_address(source)), __VA_ARGS__ : "memory");                                \
    }                                                                                              \
    K2K_DEVICE void tma_reduce_add_##rank##d(const TensorMap& map, const void* source,             \
                                             parameters) {                                         \
        K2K_PTX("cp.reduce.async.bulk.tensor." #rank                                               \
                "d.global.shared::cta.add.tile.bulk_group [%0, " store_names                       \
                "], [%1];" ::"l"(&map),                                                            \
                "r"(smem_address(source)), __VA_ARGS__ : "memory");                                \
    }
#define K2K_COORDINATE(c) "r"(c)
#endif
#define K2K_COMMA ,
K2K_TMA(1, int c0, "{%1}", "{%4}", "{%5}", "{%2}", K2K_COORDINATE(c0))
K2K_TMA(2, int c0 K2K_COMMA int c1, "{%1, %2}", "{%4, %5}", "{%5, %6}", "{%2, %3}",
        K2K_COORDINATE(c0), K2K_COORDINATE(c1))
K2K_TMA(3, int c0 K2K_COMMA int c1 K2K_COMMA int c2, "{%1, %2, %3}", "{%4, %5, %6}", "{%5, %6, %7}",
        "{%2, %3, %4}", K2K_COORDINATE(c0), K2K_COORDINATE(c1), K2K_COORDINATE(c2))
#undef K2K_COMMA
#undef K2K_COORDINATE
#undef K2K_TMA

// ---- bulk copies: contiguous bytes; addresses and size are multiples of 16

// Fetches global memory into L2.
// PTX: #data-movement-and-conversion-instructions-cp-async-bulk-prefetch
K2K_DEVICE void bulk_prefetch(const void* source, uint32_t bytes K2K_WHERE) {
    K2K_EMULATE(bulk_prefetch(source, bytes, where));
    K2K_PTX("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

// Global to shared memory; completes `bytes` at `barrier`.
// PTX: #data-movement-and-conversion-instructions-cp-async-bulk
K2K_DEVICE void bulk_load(void* target, const void* source, uint32_t bytes, Mbarrier& barrier,
                          [[maybe_unused]] CacheHint hint = CacheHint::kNone K2K_WHERE) {
#ifdef K2K_EMULATED
    emulator::bulk_load(target, source, bytes, &barrier, 0, where);
#else
    if (hint == CacheHint::kNone) {
        K2K_PTX(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
            "[%3];" ::"r"(smem_address(target)),
            "l"(source), "r"(bytes), "r"(smem_address(&barrier)) : "memory");
    } else {
        K2K_PTX(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
            "[%0], [%1], %2, [%3], %4;" ::"r"(smem_address(target)),
            "l"(source), "r"(bytes), "r"(smem_address(&barrier)),
            "l"(static_cast<uint64_t>(hint)) : "memory");
    }
#endif
}

// The same into every CTA of the cluster whose bit is in cta_mask.
// PTX: #data-movement-and-conversion-instructions-cp-async-bulk
K2K_DEVICE void bulk_load_multicast(void* target, const void* source, uint32_t bytes,
                                    Mbarrier& barrier, uint16_t cta_mask,
                                    [[maybe_unused]] CacheHint hint = CacheHint::kNone K2K_WHERE) {
#ifdef K2K_EMULATED
    emulator::bulk_load(target, source, bytes, &barrier, cta_mask, where);
#else
    if (hint == CacheHint::kNone) {
        K2K_PTX(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1], %2, [%3], %4;" ::"r"(smem_address(target)),
            "l"(source), "r"(bytes), "r"(smem_address(&barrier)), "h"(cta_mask) : "memory");
    } else {
        K2K_PTX(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
            ".L2::cache_hint [%0], [%1], %2, [%3], %4, %5;" ::"r"(smem_address(target)),
            "l"(source), "r"(bytes), "r"(smem_address(&barrier)), "h"(cta_mask),
            "l"(static_cast<uint64_t>(hint)) : "memory");
    }
#endif
}

// Own shared memory to that of CTA `rank` of the cluster, where `target` and `barrier` name the
// same places as here; completes at the barrier there.
// PTX: #data-movement-and-conversion-instructions-cp-async-bulk
K2K_DEVICE void bulk_copy_to_cluster(void* target, const void* source, uint32_t bytes,
                                     Mbarrier& barrier, uint32_t rank K2K_WHERE) {
    K2K_EMULATE(bulk_copy_to_cluster(target, source, bytes, &barrier, rank, where));
    K2K_PTX(
        "{ .reg .b32 target, barrier; mapa.shared::cluster.u32 target, %0, %4;"
        " mapa.shared::cluster.u32 barrier, %3, %4;"
        " cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [target], "
        "[%1], %2, [barrier]; }" ::"r"(smem_address(target)),
        "r"(smem_address(source)), "r"(bytes), "r"(smem_address(&barrier)), "r"(rank) : "memory");
}

// Shared to global memory.
// PTX: #data-movement-and-conversion-instructions-cp-async-bulk
K2K_DEVICE void bulk_store(void* target, const void* source, uint32_t bytes K2K_WHERE) {
    K2K_EMULATE(bulk_store(target, source, bytes, where));
    K2K_PTX("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target),
            "r"(smem_address(source)), "r"(bytes) : "memory");
}

// Adds floats of shared memory to global memory.
// PTX: #data-movement-and-conversion-instructions-cp-reduce-async-bulk
K2K_DEVICE void bulk_reduce_add(float* target, const float* source, uint32_t bytes K2K_WHERE) {
    K2K_EMULATE(bulk_reduce_add(Type::kF32, target, source, bytes, where));
    K2K_PTX(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target),
        "r"(smem_address(source)), "r"(bytes) : "memory");
}

// Makes a group of this thread's stores and reductions (tiles too) since the last one.
// PTX: #data-movement-and-conversion-instructions-cp-async-bulk-commit-group
K2K_DEVICE void bulk_commit(K2K_WHERE_ONLY) {
    K2K_EMULATE(bulk_commit(where));
    K2K_PTX("cp.async.bulk.commit_group;" :: : "memory");
}

// Waits until all but kPending groups have read shared memory: it may be written again.
// PTX: #data-movement-and-conversion-instructions-cp-async-bulk-wait-group
template <int kPending>
K2K_DEVICE void bulk_wait_read(K2K_WHERE_ONLY) {
    K2K_EMULATE(bulk_wait(kPending, true, where));
    K2K_PTX("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until all but kPending groups are complete: their writes are visible to this thread.
// PTX: #data-movement-and-conversion-instructions-cp-async-bulk-wait-group
template <int kPending>
K2K_DEVICE void bulk_wait(K2K_WHERE_ONLY) {
    K2K_EMULATE(bulk_wait(kPending, false, where));
    K2K_PTX("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace k2k::arch
