#pragma once

// The same for instructions of sm_90 and sm_90a (and for mma of e4m3, of sm_89).

#include "arch/cluster.cuh"
#include "arch/control.cuh"
#include "arch/fence.cuh"
#include "arch/ldst.cuh"
#include "arch/matrix.cuh"
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "conformance/shared.cuh"

namespace k2k::conformance {

using arch::CacheHint;
using arch::Major;
using arch::Mbarrier;
using arch::Swizzle;
using arch::TensorMap;

// ---- warps, stores, matrices

// The number of elected lanes. Input: none.
__global__ void __launch_bounds__(64) elect_kernel(const uint32_t*, uint32_t* output) {
    Rows out(output);
    out(arch::redux_add(uint32_t(arch::elect_one())));
}

// Every lane adds its four floats to one of two vectors. Input: 32 x 4 floats; output: 2 x 4.
__global__ void __launch_bounds__(32) add_vector_kernel(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = arch::lane_id();
    if (lane < 8) output[lane] = 0;
    arch::sync_block();
    const float4 value = reinterpret_cast<const float4*>(input)[lane];
    arch::reduce_add_vector(reinterpret_cast<float4*>(output) + lane % 2, value);
}

// The counterpart of ldmatrix_kernel. Input: four words per lane; output: 32 x 4 words, zeros
// before, after a store of 1, 2 and 4 matrices, and the same transposed.
template <int kCount, bool kTransposed>
K2K_DEVICE void show_stmatrix(MatrixStorage& smem, const uint32_t* input, uint32_t* output) {
    const uint32_t lane = arch::lane_id();
    for (int i = 0; i < 4; ++i) smem.words[lane * 4 + i] = 0;
    uint32_t r[kCount];
    for (int i = 0; i < kCount; ++i) r[i] = input[i * 32 + lane];
    arch::sync_warp();
    arch::stmatrix<kCount, kTransposed>(r, arch::smem_address(&smem.words[lane * 5 % 32 * 4]));
    arch::sync_warp();
    for (int i = 0; i < 4; ++i) output[lane * 4 + i] = smem.words[lane * 4 + i];
    arch::sync_warp();
}
__global__ void __launch_bounds__(32) stmatrix_kernel(const uint32_t* input, uint32_t* output) {
    MatrixStorage& smem = arch::shared_storage<MatrixStorage>();
    show_stmatrix<1, false>(smem, input, output);
    show_stmatrix<2, false>(smem, input, output + 128);
    show_stmatrix<4, false>(smem, input, output + 256);
    show_stmatrix<1, true>(smem, input, output + 384);
    show_stmatrix<2, true>(smem, input, output + 512);
    show_stmatrix<4, true>(smem, input, output + 640);
}

// ---- mbarriers

// The results of try_wait for both parities before and after: an arrival that announces bytes, the
// other arrival, half of the bytes, all of them. Input: 2 x 16 words; output: thread 0's ten
// answers, then the words.
struct alignas(128) TransactionStorage {
    uint32_t words[32];
    Mbarrier barrier, half;
};
__global__ void __launch_bounds__(32) transaction_kernel(const uint32_t* input, uint32_t* output) {
    TransactionStorage& smem = arch::shared_storage<TransactionStorage>();
    if (threadIdx.x == 0) {
        arch::mbarrier_init(smem.barrier, 2);
        arch::mbarrier_init(smem.half, 1);
        arch::fence_mbarrier_init();
        const auto show = [&] {
            for (const uint32_t parity : {0, 1}) {
                *output++ = arch::mbarrier_try_wait(smem.barrier, parity);
            }
        };
        show();
        arch::mbarrier_arrive_expect_tx(smem.barrier, 64);
        show();
        arch::mbarrier_expect_tx(smem.barrier, 64);
        arch::mbarrier_arrive(smem.barrier);
        show();
        arch::bulk_load(smem.words, input, 64, smem.barrier);
        arch::mbarrier_arrive_expect_tx(smem.half, 64);
        arch::bulk_load(smem.words + 16, input + 16, 64, smem.half);
        arch::mbarrier_wait(smem.half, 0);
        show();
        arch::bulk_load(smem.words + 16, input + 16, 64, smem.barrier);
        arch::mbarrier_wait(smem.barrier, 0);
        show();
        for (const uint32_t word : smem.words) *output++ = word;
    }
}

// ---- TMA

constexpr int kNumBoxes = 3;  // one inside the tensor, two partly outside
constexpr int kTileBytes = 2048;

struct Boxes {
    int first[kNumBoxes][3];  // coordinates
    uint32_t bytes;           // of each
};

struct alignas(1024) TilesStorage {
    uint8_t tiles[kNumBoxes][kTileBytes];
    Mbarrier full;
};

template <int kRank>
K2K_DEVICE void prefetch_box(const TensorMap& map, const int (&c)[3]) {
    if constexpr (kRank == 1) arch::tma_prefetch_1d(map, c[0]);
    if constexpr (kRank == 2) arch::tma_prefetch_2d(map, c[0], c[1]);
    if constexpr (kRank == 3) arch::tma_prefetch_3d(map, c[0], c[1], c[2]);
}
template <int kRank>
K2K_DEVICE void load_box(void* target, const TensorMap& map, Mbarrier& full, const int (&c)[3],
                         CacheHint hint) {
    if constexpr (kRank == 1) arch::tma_load_1d(target, map, full, c[0], hint);
    if constexpr (kRank == 2) arch::tma_load_2d(target, map, full, c[0], c[1], hint);
    if constexpr (kRank == 3) arch::tma_load_3d(target, map, full, c[0], c[1], c[2], hint);
}
template <int kRank>
K2K_DEVICE void load_box_multicast(void* target, const TensorMap& map, Mbarrier& full,
                                   uint16_t mask, const int (&c)[3], CacheHint hint) {
    if constexpr (kRank == 1) arch::tma_load_1d_multicast(target, map, full, mask, c[0], hint);
    if constexpr (kRank == 2) {
        arch::tma_load_2d_multicast(target, map, full, mask, c[0], c[1], hint);
    }
    if constexpr (kRank == 3) {
        arch::tma_load_3d_multicast(target, map, full, mask, c[0], c[1], c[2], hint);
    }
}
template <int kRank>
K2K_DEVICE void store_box(const TensorMap& map, const void* source, const int (&c)[3]) {
    if constexpr (kRank == 1) arch::tma_store_1d(map, source, c[0]);
    if constexpr (kRank == 2) arch::tma_store_2d(map, source, c[0], c[1]);
    if constexpr (kRank == 3) arch::tma_store_3d(map, source, c[0], c[1], c[2]);
}
template <int kRank>
K2K_DEVICE void add_box(const TensorMap& map, const void* source, const int (&c)[3]) {
    if constexpr (kRank == 1) arch::tma_reduce_add_1d(map, source, c[0]);
    if constexpr (kRank == 2) arch::tma_reduce_add_2d(map, source, c[0], c[1]);
    if constexpr (kRank == 3) arch::tma_reduce_add_3d(map, source, c[0], c[1], c[2]);
}

// The tiles as they are in shared memory, one after the other.
K2K_DEVICE void show_tiles(const TilesStorage& smem, uint32_t bytes, uint32_t* output) {
    for (int box = 0; box < kNumBoxes; ++box) {
        const auto* words = reinterpret_cast<const uint32_t*>(smem.tiles[box]);
        for (uint32_t i = threadIdx.x; i < bytes / 4; i += blockDim.x) {
            output[box * (bytes / 4) + i] = words[i];
        }
    }
}

// With every cache hint; the box inside the tensor is prefetched too.
template <int kRank>
__global__ void __launch_bounds__(128)
    tma_load_kernel(const __grid_constant__ TensorMap map, const __grid_constant__ Boxes boxes,
                    uint32_t* output) {
    TilesStorage& smem = arch::shared_storage<TilesStorage>();
    if (threadIdx.x == 0) {
        arch::tma_prefetch(map);
        arch::mbarrier_init(smem.full, 1);
        arch::fence_mbarrier_init();
        arch::mbarrier_arrive_expect_tx(smem.full, kNumBoxes * boxes.bytes);
        prefetch_box<kRank>(map, boxes.first[0]);
        for (int box = 0; box < kNumBoxes; ++box) {
            const CacheHint hint = box == 0   ? CacheHint::kNone
                                   : box == 1 ? CacheHint::kEvictFirst
                                              : CacheHint::kEvictLast;
            load_box<kRank>(smem.tiles[box], map, smem.full, boxes.first[box], hint);
        }
    }
    arch::sync_block();
    arch::mbarrier_wait(smem.full, 0);
    show_tiles(smem, boxes.bytes, output);
}

// A cluster of two: CTA 0 loads the first box for both CTAs, CTA 1 the second one for both
// and the third for itself; CTA 0's third tile is the first box again.
template <int kRank>
__global__ void __launch_bounds__(128)
    tma_multicast_kernel(const __grid_constant__ TensorMap map, const __grid_constant__ Boxes boxes,
                         uint32_t* output) {
    TilesStorage& smem = arch::shared_storage<TilesStorage>();
    const uint32_t rank = arch::cluster_rank();
    if (threadIdx.x == 0) {
        arch::mbarrier_init(smem.full, 1);
        arch::fence_mbarrier_init();
        arch::mbarrier_arrive_expect_tx(smem.full, kNumBoxes * boxes.bytes);
    }
    arch::cluster_sync();
    if (threadIdx.x == 0) {
        load_box_multicast<kRank>(smem.tiles[rank], map, smem.full, 3,
                                  boxes.first[rank == 0 ? 0 : 1], CacheHint::kEvictLast);
        load_box_multicast<kRank>(smem.tiles[2], map, smem.full, uint16_t(1 << rank),
                                  boxes.first[rank == 0 ? 0 : 2], CacheHint::kNone);
    }
    arch::mbarrier_wait(smem.full, 0);
    show_tiles(smem, boxes.bytes, output + rank * kNumBoxes * (boxes.bytes / 4));
    arch::cluster_sync();
}

// One tile, from the input, is stored to all boxes, or added to them.
template <int kRank, bool kAdd>
__global__ void __launch_bounds__(128)
    tma_store_kernel(const __grid_constant__ TensorMap map, const __grid_constant__ Boxes boxes,
                     const uint32_t* input) {
    TilesStorage& smem = arch::shared_storage<TilesStorage>();
    auto* words = reinterpret_cast<uint32_t*>(smem.tiles[0]);
    for (uint32_t i = threadIdx.x; i < boxes.bytes / 4; i += blockDim.x) words[i] = input[i];
    arch::fence_proxy_async();
    arch::sync_block();
    if (threadIdx.x == 0) {
        for (int box = 0; box < kNumBoxes; ++box) {
            if constexpr (kAdd) {
                add_box<kRank>(map, smem.tiles[0], boxes.first[box]);
            } else {
                store_box<kRank>(map, smem.tiles[0], boxes.first[box]);
            }
            arch::bulk_commit();
        }
        arch::bulk_wait_read<1>();
        arch::bulk_wait<0>();
    }
}

// Input: 64 floats; output: the same, and 64 floats to which they were added twice. The halves are
// loaded with different cache hints.
struct alignas(128) BulkStorage {
    float values[64];
    Mbarrier full;
};
__global__ void __launch_bounds__(32) bulk_kernel(const uint32_t* input, uint32_t* output) {
    BulkStorage& smem = arch::shared_storage<BulkStorage>();
    if (threadIdx.x == 0) {
        arch::mbarrier_init(smem.full, 1);
        arch::fence_mbarrier_init();
        arch::mbarrier_arrive_expect_tx(smem.full, sizeof smem.values);
        arch::bulk_prefetch(input, sizeof smem.values);
        arch::bulk_load(smem.values, input, 128, smem.full, CacheHint::kEvictFirst);
        arch::bulk_load(smem.values + 32, input + 32, 128, smem.full);
        arch::mbarrier_wait(smem.full, 0);
        arch::bulk_store(output, smem.values, sizeof smem.values);
        for (int i = 0; i < 2; ++i) {
            arch::bulk_reduce_add(reinterpret_cast<float*>(output + 64), smem.values,
                                  sizeof smem.values);
        }
        arch::bulk_commit();
        arch::bulk_wait<0>();
    }
}

// ---- clusters

// Four CTAs. Each stores its rank and the cluster's size, the words its neighbour wrote to it,
// those its neighbour copied to it, those CTA 0 multicast to all but CTA 2, and those its neighbour
// published. Input: 4 x 32 words, then 32; output: six rows of 32 per CTA, the fifth of CTA 2 being
// its own words.
struct alignas(128) ClusterStorage {
    uint32_t own[32], copied[32], multicast[32], published[32];
    Mbarrier published_all, read_all, landed;
};
__global__ void __launch_bounds__(32) cluster_kernel(const uint32_t* input, uint32_t* output) {
    ClusterStorage& smem = arch::shared_storage<ClusterStorage>();
    const uint32_t lane = arch::lane_id(), rank = arch::cluster_rank();
    const uint32_t size = arch::cluster_size(), next = (rank + 1) % size;
    constexpr uint32_t kBytes = sizeof smem.own, kReceivers = 0b1011;
    const bool receives = kReceivers >> rank & 1;
    smem.own[lane] = smem.multicast[lane] = input[rank * 32 + lane];
    if (lane == 0) {
        arch::mbarrier_init(smem.published_all, size * (size + 1) / 2);
        arch::mbarrier_init(smem.read_all, size);
        arch::mbarrier_init(smem.landed, 1);
        arch::fence_mbarrier_init();
        arch::mbarrier_arrive_expect_tx(smem.landed, receives ? 2 * kBytes : kBytes);
    }
    arch::fence_proxy_async();
    arch::cluster_arrive();
    arch::cluster_wait();

    if (lane == 0) {
        arch::bulk_copy_to_cluster(smem.copied, smem.own, kBytes, smem.landed, next);
        if (rank == 0) {
            arch::bulk_load_multicast(smem.multicast, input + 128, kBytes / 2, smem.landed,
                                      kReceivers);
            arch::bulk_load_multicast(smem.multicast + 16, input + 144, kBytes / 2, smem.landed,
                                      kReceivers, CacheHint::kEvictLast);
        }
    }
    Rows out(output + rank * 6 * 32);
    out(rank);
    out(size);
    out(arch::cluster_pointer(smem.own, next)[lane]);
    arch::mbarrier_wait(smem.landed, 0);
    out(smem.copied[lane]);
    out(smem.multicast[lane]);

    // CTA r publishes by r + 1 arrivals at every CTA's barrier; one more arrival releases what it
    // has read, which may then be overwritten.
    smem.published[lane] = smem.own[lane] + 1;
    arch::sync_warp();
    if (lane < size) arch::mbarrier_arrive_cluster(smem.published_all, lane, rank + 1);
    arch::mbarrier_wait_cluster(smem.published_all, 0);
    out(arch::cluster_pointer(smem.published, next)[lane]);
    arch::sync_warp();
    if (lane < size) arch::mbarrier_arrive_remote(smem.read_all, lane);
    arch::mbarrier_wait(smem.read_all, 0);
    smem.published[lane] = 0;
    arch::cluster_arrive_relaxed();
    arch::cluster_wait();
}

// Four CTAs. Each lane sends its word w, then w + 1 and w + 2, then w + 3 to w + 6 to the next
// CTA. Input: 4 x 32 words; output: seven rows of 32 per CTA, the received words.
struct alignas(16) StoreAsyncStorage {
    uint4 sixteen[32];
    uint2 eight[32];
    uint32_t four[32];
    Mbarrier landed;
};
__global__ void __launch_bounds__(32) store_async_kernel(const uint32_t* input, uint32_t* output) {
    StoreAsyncStorage& smem = arch::shared_storage<StoreAsyncStorage>();
    const uint32_t lane = arch::lane_id(), rank = arch::cluster_rank();
    const uint32_t next = (rank + 1) % arch::cluster_size();
    if (lane == 0) {
        arch::mbarrier_init(smem.landed, 1);
        arch::fence_mbarrier_init();
        arch::mbarrier_arrive_expect_tx(smem.landed, 32 * (4 + 8 + 16));
    }
    arch::cluster_sync_relaxed();
    const uint32_t w = input[rank * 32 + lane];
    arch::store_async(&smem.four[lane], w, smem.landed, next);
    arch::store_async(&smem.eight[lane], make_uint2(w + 1, w + 2), smem.landed, next);
    arch::store_async(&smem.sixteen[lane], make_uint4(w + 3, w + 4, w + 5, w + 6), smem.landed,
                      next);
    arch::mbarrier_wait_cluster(smem.landed, 0);
    Rows out(output + rank * 7 * 32);
    out(smem.four[lane]);
    out(smem.eight[lane].x);
    out(smem.eight[lane].y);
    out(smem.sixteen[lane].x);
    out(smem.sixteen[lane].y);
    out(smem.sixteen[lane].z);
    out(smem.sixteen[lane].w);
}

// ---- wgmma

// The layout of an operand of two K steps in shared memory, see arch::matrix_descriptor.
struct OperandLayout {
    uint32_t leading_bytes, stride_bytes, step_bytes;
};

template <int N>
struct alignas(1024) WgmmaStorage {
    uint8_t a[64 * 128], b[N * 128];
};

// Input: the bytes of A and B as in shared memory, then A's fragments [step][register][thread];
// output: rows d[N / 2] of the product with A in shared memory, then, of a K-major A, in registers.
template <class T, int N, Major kMajorA, Major kMajorB>
__global__ void __launch_bounds__(128)
    wgmma_kernel(const uint32_t* input, uint32_t* output, Swizzle swizzle, OperandLayout a,
                 OperandLayout b) {
    using Storage = WgmmaStorage<N>;
    Storage& smem = arch::shared_storage<Storage>();
    for (uint32_t i = threadIdx.x; i < sizeof(Storage) / 4; i += 128) {
        reinterpret_cast<uint32_t*>(&smem)[i] = i < (64 + N) * 32 ? input[i] : 0;
    }
    const uint32_t* fragments = input + (64 + N) * 32 + threadIdx.x;
    arch::fence_proxy_async();
    arch::sync_block();

    const uint64_t tile_a =
        arch::matrix_descriptor(smem.a, swizzle, a.leading_bytes, a.stride_bytes);
    const uint64_t tile_b =
        arch::matrix_descriptor(smem.b, swizzle, b.leading_bytes, b.stride_bytes);
    const uint64_t next_a = arch::descriptor_step(a.step_bytes);
    const uint64_t next_b = arch::descriptor_step(b.step_bytes);
    Rows out(output);
    float d[N / 2];
    arch::wgmma_fence();
    arch::wgmma_ss<T, N, kMajorA, kMajorB>(d, tile_a, tile_b, false);
    arch::wgmma_ss<T, N, kMajorA, kMajorB>(d, tile_a + next_a, tile_b + next_b, true);
    arch::wgmma_commit();
    arch::wgmma_wait<0>();
    K2K_UNROLL
    for (int i = 0; i < N / 2; ++i) out(d[i]);

    if constexpr (kMajorA == Major::kK) {
        uint32_t first[4], second[4];
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            first[i] = fragments[i * 128];
            second[i] = fragments[(4 + i) * 128];
        }
        arch::wgmma_fence();
        arch::wgmma_rs<T, N, kMajorB>(d, first, tile_b, false);
        arch::wgmma_rs<T, N, kMajorB>(d, second, tile_b + next_b, true);
        arch::wgmma_commit();
        arch::wgmma_wait<0>();
        K2K_UNROLL
        for (int i = 0; i < N / 2; ++i) out(d[i]);
    }
}

// ---- registers, launches

// Three warpgroups; the first releases registers to the others. Input: a word per thread.
__global__ void __launch_bounds__(384, 1)
    registers_kernel(const uint32_t* input, uint32_t* output) {
    const uint32_t value = input[threadIdx.x];
    if (arch::warp_id() < 4) {
        arch::registers_decrease<40>();
        output[threadIdx.x] = value + 1;
    } else {
        arch::registers_increase<232>();
        output[threadIdx.x] = value + 2;
    }
}

// The second kernel is launched early (PDL) and waits for the first one's writes. Input: 32 words.
__global__ void __launch_bounds__(32) first_kernel(const uint32_t* input, uint32_t* output) {
    arch::grid_dependency_launch();
    arch::nanosleep(1000);
    output[threadIdx.x] = input[threadIdx.x] + 1;
}
__global__ void __launch_bounds__(32) second_kernel(const uint32_t*, uint32_t* output) {
    arch::grid_dependency_wait();
    output[32 + threadIdx.x] = output[31 - threadIdx.x] + 1;
}

}  // namespace k2k::conformance
