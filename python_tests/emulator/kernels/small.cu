// Small kernels, each about one facility. Bugs 30 and up; see test_planted_bugs.py.
#include "arch/cluster.cuh"
#include "arch/control.cuh"
#include "arch/cp_async.cuh"
#include "arch/fence.cuh"
#include "arch/matrix.cuh"
#include "arch/mma.cuh"
#include "arch/tma.cuh"
#include "arch/warp.cuh"
#include "arch/wgmma.cuh"
#include "emulated_together.h"
#include "emulator/tensor_map.h"
#include "support.h"

using arch::Mbarrier;
using arch::Scope;
using arch::Swizzle;
using arch::TensorMap;

// ---- operands written by threads: C[64][64] = A[64][64] B[64][64]^T, the pattern of "P" in
// attention

struct alignas(1024) OperandStorage {
    uint8_t a[64 * 128], b[64 * 128];
};

__global__ void __launch_bounds__(128)
    thread_operands_kernel(const uint4* a, const uint4* b, float* c) {
    OperandStorage& smem = arch::shared_storage<OperandStorage>();
    for (int i = threadIdx.x; i < 2 * 64 * 8; i += 128) {
        const int row = i / 8 % 64, chunk = i % 8;
        uint8_t* tile = i < 64 * 8 ? smem.a : smem.b;
        const uint4 value = arch::load_nc((i < 64 * 8 ? a : b) + row * 8 + chunk);
        *reinterpret_cast<uint4*>(tile + row * 128 + (chunk ^ row % 8) * 16) = value;
    }
    if (BUG != 30) arch::fence_proxy_async();  // BUG 30: wgmma may read stale bytes
    if (BUG != 31) arch::sync_block();         // BUG 31: other warps still write
    float acc[32];
    const uint64_t tile_a = arch::matrix_descriptor(smem.a, Swizzle::k128, 0, 1024);
    const uint64_t tile_b = arch::matrix_descriptor(smem.b, Swizzle::k128, 0, 1024);
    arch::wgmma_fence();
    K2K_UNROLL
    for (int kk = 0; kk < 4; ++kk) {
        const uint64_t along_k = kk * arch::descriptor_step(32);
        arch::wgmma_ss<bf16, 64>(acc, tile_a + along_k, tile_b + along_k, kk != 0);  // @30 @31 @32
        if (BUG == 32) acc[0] = 1;  // BUG 32: registers of a wgmma in flight
    }
    arch::wgmma_commit();
    arch::wgmma_wait<0>();
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    K2K_UNROLL
    for (int i = 0; i < 32; ++i) {
        c[(row + i / 2 % 2 * 8) * 64 + column + i / 4 * 8 + i % 2] = acc[i];
    }
}

extern "C" int thread_operands(const uint4* a, const uint4* b, float* c) {
    return guard(
        [=] { launch({1, 128, sizeof(OperandStorage)}, thread_operands_kernel, a, b, c); });
}

// ---- a cluster: each of two blocks sums its half, block 0 reads the other's sum

struct DsmemStorage {
    float sum[2];
};

__global__ void __launch_bounds__(64) dsmem_kernel(const float* x, float* result, int n) {
    DsmemStorage& smem = arch::shared_storage<DsmemStorage>();
    float sum = 0;
    const int half = n / 2, first = blockIdx.x * half;
    for (int i = threadIdx.x; i < half; i += 64) sum += x[first + i];
    for (int mask = 16; mask > 0; mask /= 2) sum += arch::shuffle_xor(sum, mask);
    if (arch::lane_id() == 0) smem.sum[arch::warp_id()] = sum;
    arch::sync_block();
    if (BUG != 33) arch::cluster_sync();  // BUG 33: the other block may not have written
    if (arch::cluster_rank() == 0 && threadIdx.x == 0) {
        const float* other = arch::cluster_pointer(smem.sum, 1);  // @34
        if (BUG == 52)
            arch::smem_address(other);  // @52: ldmatrix reads the own block's memory only
        result[0] = smem.sum[0] + smem.sum[1] + other[0] + other[1];
    }
    if (BUG != 34) arch::cluster_sync();  // BUG 34: the other block may have ended
}

extern "C" int dsmem(const float* x, float* result, int n) {
    return guard([=] {
        LaunchShape shape{2, 64, sizeof(DsmemStorage)};
        shape.cluster = 2;
        launch(shape, dsmem_kernel, x, result, n);
    });
}

// ---- one warp turns 32 numbers round through shared memory

struct ReverseStorage {
    float x[32];
};

__global__ void __launch_bounds__(32) reverse_kernel(const float* x, float* y) {
    ReverseStorage& smem = arch::shared_storage<ReverseStorage>();
    const int lane = threadIdx.x;
    float* slot = smem.x;
    slot[lane + (BUG == 36 ? 4 : 0)] = x[lane];  // BUG 36: past the storage
    if (BUG != 35) arch::sync_warp();            // BUG 35: reads before the others write
    y[lane] = smem.x[31 - lane];
    if (BUG == 37) y[lane] += reinterpret_cast<const float4*>(x + 1)->x;  // BUG 37: misaligned
    if (BUG == 38 && lane < 16) arch::sync_warp();                        // @38: half a warp
}

extern "C" int reverse(const float* x, float* y) {
    return guard([=] { launch({1, 32, sizeof(ReverseStorage)}, reverse_kernel, x, y); });
}

// ---- tiles through TMA: load, double, store; box 8 x 32 floats, any tensor

struct alignas(1024) TileStorage {
    float tile[8 * 32];
    float result[8 * 32];
    Mbarrier full;
};

__global__ void __launch_bounds__(128)
    double_tiles_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y) {
    TileStorage& smem = arch::shared_storage<TileStorage>();
    const int column = blockIdx.x * 32, row = blockIdx.y * 8;
    if (threadIdx.x == 0) {
        arch::mbarrier_init(smem.full, 1);
        arch::fence_mbarrier_init();
        arch::mbarrier_arrive_expect_tx(smem.full, sizeof(smem.tile));
        arch::tma_load_2d(smem.tile, x, smem.full, column, row);
    }
    arch::sync_block();
    if (BUG != 39) arch::mbarrier_wait(smem.full, 0);  // BUG 39: the tile has not landed
    for (int i = threadIdx.x; i < 8 * 32; i += 128) smem.result[i] = 2 * smem.tile[i];
    if (BUG != 40) arch::fence_proxy_async();
    if (BUG != 41) arch::sync_block();  // BUG 41: stores what others have not written
    if (threadIdx.x == 0) {
        arch::tma_store_2d(y, smem.result, column, row);  // @40 @42 @43 @44
        if (BUG != 42) arch::bulk_commit();
        if (BUG == 44) smem.result[5] = 0;  // BUG 44: while it is read
        if (BUG != 43) arch::bulk_wait_read<0>();
    }
    if (BUG == 39) arch::mbarrier_wait(smem.full, 0);
}

extern "C" int double_tiles(const float* x, float* y, int rows, int columns) {
    return guard([=] {
        const auto map = [&](const float* base) {
            return arch::make_tensor_map(
                Type::kF32, base, {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)},
                {static_cast<uint64_t>(columns) * sizeof(float)}, {32, 8}, Swizzle::kNone);
        };
        const dim3 grid((columns + 31) / 32, (rows + 7) / 8);
        launch({grid, 128, sizeof(TileStorage)}, double_tiles_kernel, map(x), map(y));
    });
}

// ---- tensor maps, which are kept: more than there is room for, and such as differ in one argument
//
// wrong[0]: maps that are not those of their arguments; wrong[1]: maps that were asked for.

extern "C" int tensor_maps(uint32_t* wrong, int count) {
    return guard([=] {
        for (int i = 0; i < 2 * count; ++i) {
            const int n = i % count, one = n % 8;  // the argument that is another than usual
            const uint64_t base = 0x7f0000000000 + n / 8 * 4096ull + (one == 1 ? 16 : 0);
            const uint64_t sizes[3] = {64u + (one == 2), 8u + (one == 3),
                                       (one == 4) ? uint64_t(1) << 32 : 5};
            const uint64_t stride = 1024 + (one == 5 ? 16 : 0);
            const Type type = one == 6 ? Type::kF32 : Type::kBf16;
            const uint16_t rows = one == 7 ? 16 : 8;
            const TensorMap map = arch::make_tensor_map(
                type, reinterpret_cast<void*>(base), {sizes[0], sizes[1], sizes[2]}, {stride, 8192},
                {16, rows, 1}, n % 16 < 8 ? Swizzle::k64 : Swizzle::k128);
            emulator::TensorMapFields is;
            std::memcpy(&is, &map, sizeof is);
            const bool right = is.base == base && is.sizes[0] == sizes[0] &&
                               is.sizes[1] == sizes[1] && is.sizes[2] == sizes[2] &&
                               is.stride_bytes[0] == stride && is.stride_bytes[1] == 8192 &&
                               is.type == static_cast<uint8_t>(type) && is.box[1] == rows &&
                               is.rank == 3 && is.swizzle_bytes == (n % 16 < 8 ? 64 : 128);
            wrong[0] += !right;
            wrong[1] += 1;
        }
    });
}

// ---- blocks that wait for one another, within a grid or across grids ("ranks")
//
// Each block writes its number, raises its flag, and sums what all have written.

struct NoStorage {};

__global__ void __launch_bounds__(32)
    exchange_kernel(float* values, uint32_t* flags, float* sums, int first, int count) {
    const int own = first + blockIdx.x;
    if (threadIdx.x == 0) {
        if (BUG != 45) values[own] = own + 1;
        arch::store_release<Scope::kSystem>(&flags[own], 1u);
        if (BUG == 45) values[own] = own + 1;  // BUG 45: written after the flag is up
        float sum = 0;
        for (int i = 0; i < count; ++i) {
            const int awaited = BUG == 46 ? i + 1 : i;  // BUG 46: a flag nobody raises
            while (arch::load_acquire<Scope::kSystem>(&flags[awaited]) != 1) {  // @46 @56
            }
            sum += values[i];
        }
        sums[own] = sum;
    }
}

extern "C" int exchange(float* values, uint32_t* flags, float* sums, int count, int num_grids) {
    return guard([=] {
        EmulatedTogether together(num_grids > 1);
        LaunchShape shape{count / num_grids, 32};
        shape.cooperative = BUG != 56;  // BUG 56: waits for blocks that are not resident
        for (int grid = 0; grid < num_grids; ++grid) {
            const int first = grid * (count / num_grids);
            launch(shape, exchange_kernel, values, flags, sums, first, count);
        }
        together.run();
    });
}

// ---- a reduction whose last block merges: sums[row][64] of x[row][split][64], as of split keys
//
// Each block writes its part and takes a ticket; who has the row's last one adds all parts, in
// order.

struct SplitStorage {
    bool is_last;
};

__global__ void __launch_bounds__(64)
    split_sum_kernel(const float* x, float* parts, uint32_t* tickets, float* sums) {
    SplitStorage& smem = arch::shared_storage<SplitStorage>();
    const int thread = threadIdx.x, splits = gridDim.x, row = blockIdx.y;
    float* const row_parts = parts + row * splits * 64;
    const int own = blockIdx.x * 64 + thread;
    if (BUG != 54) row_parts[own] = x[row * splits * 64 + own];
    if (BUG != 53) arch::sync_block();  // BUG 53: the ticket is for all threads' parts
    if (thread == 0) {
        arch::fence_acq_rel<Scope::kGpu>();
        const uint32_t ticket = arch::atomic_add_acq_rel<Scope::kGpu>(&tickets[row], 1);
        smem.is_last = ticket + 1 == gridDim.x;
        if (smem.is_last && BUG != 55) tickets[row] = 0;  // BUG 55: the next launch finds no last
    }
    if (BUG == 54) row_parts[own] = x[row * splits * 64 + own];  // BUG 54: behind the ticket
    arch::sync_block();
    if (!smem.is_last) return;
    float sum = 0;
    for (int split = 0; split < splits; ++split) sum += row_parts[split * 64 + thread];
    sums[row * 64 + thread] = sum;
}

extern "C" int split_sum(
    const float* x, float* parts, uint32_t* tickets, float* sums, int rows, int splits) {
    return guard([=] {
        launch({dim3(splits, rows), 64, sizeof(SplitStorage)}, split_sum_kernel, x, parts, tickets,
               sums);
    });
}

// ---- a ring: each block of a cluster of four stores its rows to the next one's shared memory

struct RingStorage {
    float row[32];
    Mbarrier full, empty;
};

__global__ void __launch_bounds__(32) pass_on_kernel(const float* x, float* y, int rounds) {
    RingStorage& smem = arch::shared_storage<RingStorage>();
    const int lane = threadIdx.x, rank = arch::cluster_rank();
    const uint32_t next = (rank + 1) % 4, previous = (rank + 3) % 4;
    if (lane == 0) {
        arch::mbarrier_init(smem.full, 1);
        arch::mbarrier_init(smem.empty, 1);
        arch::fence_mbarrier_init();
    }
    if (BUG != 57) arch::cluster_sync_relaxed();  // BUG 57: the neighbour's barriers do not exist
    for (int i = 0; i < rounds; ++i) {
        const int parity = i % 2;
        if (lane == 0) arch::mbarrier_arrive_expect_tx(smem.full, sizeof smem.row);
        if (i > 0 && BUG != 58) arch::mbarrier_wait(smem.empty, parity ^ 1);
        const float value = x[(rank * rounds + i) * 32 + lane];
        arch::store_async(&smem.row[lane], value, smem.full, next);  // @57
        if (BUG != 59) arch::mbarrier_wait_cluster(smem.full, parity);
        y[(rank * rounds + i) * 32 + lane] = smem.row[lane];
        arch::sync_warp();
        if (lane == 0) arch::mbarrier_arrive_remote(smem.empty, previous);
    }
    arch::cluster_sync_relaxed();
}

extern "C" int pass_on(const float* x, float* y, int rounds) {
    return guard([=] {
        LaunchShape shape{4, 32, sizeof(RingStorage)};
        shape.cluster = 4;
        launch(shape, pass_on_kernel, x, y, rounds);
    });
}

// ---- a counter: every thread of every block adds one

__global__ void __launch_bounds__(64) count_kernel(uint32_t* counter) {
    if (BUG == 47) {  // BUG 47: reads, lets others run, writes
        const uint32_t old = arch::load_acquire<Scope::kGpu>(counter);
        arch::store_release<Scope::kGpu>(counter, old + 1);
    } else {
        arch::atomic_add<Scope::kGpu>(counter, 1u);
    }
}

extern "C" int count_threads(uint32_t* counter, int num_blocks) {
    return guard([=] { launch({num_blocks, 64}, count_kernel, counter); });
}

// ---- named barriers: one warp produces, one consumes, a buffer of one

struct HandoverStorage {
    float x[32];
};

__global__ void __launch_bounds__(64) handover_kernel(const float* x, float* y, int rounds) {
    HandoverStorage& smem = arch::shared_storage<HandoverStorage>();
    constexpr uint32_t kFull = 1, kEmpty = 2;
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        for (int i = 0; i < rounds; ++i) {
            if (i > 0 && BUG != 48)
                arch::barrier_sync(kEmpty, 64);  // BUG 48: overwrites what is read
            smem.x[lane] = x[i * 32 + lane];
            arch::barrier_arrive(kFull, 64);
        }
    } else {
        for (int i = 0; i < rounds; ++i) {
            arch::barrier_sync(kFull, BUG == 49 ? 32 : 64);  // @49: another count
            y[i * 32 + lane] = smem.x[31 - lane];
            if (i + 1 < rounds && BUG != 50)
                arch::barrier_arrive(kEmpty, 64);  // BUG 50: never emptied
        }
    }
}

extern "C" int handover(const float* x, float* y, int rounds) {
    return guard([=] { launch({1, 64, sizeof(HandoverStorage)}, handover_kernel, x, y, rounds); });
}
