#pragma once

// The products of the iteration on sm_90a, by wgmma. Stages of the iteration, tables, tiles and
// epilogue are those of kernel_sm80.cuh.
//
//     kGram       D[s, s] = X X^T                        X^T X if m > n
//     kSquare     D[s, s] = alpha A B + beta C           A, B, C symmetric; a second result D + a I
//     kMultiply   D[m, n] = A X + beta X                 X A if m > n
//
// Grid      one CTA per tile of 128 x 128; two CTAs per SM: one's prologue and epilogue overlap the
//           other's main loop. tile.cuh has the tile scheduler and the epilogue.
// Roles     warps 0 to 7  two consumer warpgroups with 64 rows of the tile each: wgmma m64n128k16
//                         on operands in shared memory, then the epilogue
//           warps 8, 9    producer: cp.async of both panels, 64 of the K axis (the summed axis) per
//                         stage. TMA would need a tensor map for each matrix shape of the list,
//                         made on the host and kept for a captured graph.
// Operands  both K-major (by rows) or both MN-major (by columns): a bit of the instruction;
//           nothing is transposed.
// Stage     two panels, A and B, of 128 rows of 128 bytes with the 128-byte swizzle of
//           tile/swizzle.cuh. By rows: [128, 64], row r of the operand. By columns: two halves of
//           [64 of K, 64 columns]. A warpgroup's A is one half of the panel, 8 KB, either way.
//
//   barrier      arrivals                                              waiters
//   full[s]      each of the 64 producer threads, as its copies land   consumers
//   empty[s]     8 consumer warps, when their products have read it    producer
//   kTileBarrier the 8 consumer warps: the last stage has been read, and the tile may overwrite the
//                ring; then the barriers of tile.cuh
//
// Proxies   cp.async writes by the generic proxy, wgmma reads by the async proxy: consumers issue a
//           proxy fence after each wait for full[s].
// Epilogue  consumers, in tile.cuh: accumulators to a tile in shared memory, which replaces the
//           ring, then whole rows to memory. Not the producer.
// Order     each sum runs along K in steps of 16, whatever else the launch computes.
// Shared    97 KB: three stages of 32 KB, two in flight while one is multiplied; the epilogue's
//           tile of 32 KB reuses them. Two CTAs fit the 227 KB.
// Registers at most 96 per thread (two CTAs of 320 threads), 64 of them accumulators. No
//           setmaxnreg: it applies to whole warpgroups, and the producer has two warps.
// Edges     chunks outside of an operand are zero-filled; the padding of rows in memory is zero.
//           Tiles on the diagonal are computed whole.
// Limits    L2: a stage reads 32 KB, which at the measured 35 to 40 bytes per cycle and SM take 820
//           to 940 cycles; its products take 512: at most 0.55 to 0.62 of the peak. Shared memory,
//           32 KB written and 48 KB read, takes 640 cycles. Estimates; README.md lists remedies.

#include "arch/fence.cuh"
#include "arch/mbarrier.cuh"
#include "arch/smem.cuh"
#include "arch/wgmma.cuh"
#include "newton_schulz/tile.cuh"
#include "tile/ring.cuh"
#include "tile/swizzle.cuh"

namespace k2k {

struct alignas(1024) NsHopperStorage {
    union {
        uint8_t ring[kNsHopperStages][2][kNsHopperPanelBytes];  // A, B [128, 64] (or [64, 128])
        uint8_t tile[kNsTileBytes];                             // D [128, 128]
    };
    arch::Mbarrier full[kNsHopperStages], empty[kNsHopperStages];
};
static_assert(2 * (sizeof(NsHopperStorage) + 1024) <= 228 * 1024);

using NsRingPosition = tile::RingPosition<kNsHopperStages>;

// ---- producer: warps 8 and 9

// One operand. This thread copies 16 chunks per stage: one of every eight rows of the panel.
template <class T, bool kByColumns>
struct NsHopperPanel {
    const T* source;
    int64_t eight, step;  // elements to the row eight further, and to the next stage
    int depth_at;         // of the first chunk, along K
    int left;             // rows (by columns: columns) of the operand from the first chunk on
    uint32_t target;

    K2K_DEVICE NsHopperPanel(const NsMatrix<T>& x, int first, int thread) {
        const int row = thread / 8, chunk = thread % 8;
        target = tile::chunk_offset<128>(row, chunk);
        eight = 8 * x.pitch;
        if constexpr (kByColumns) {
            source = x.data + row * x.pitch + first + chunk * 8;
            step = kNsHopperDepth * x.pitch;
            depth_at = row;
            left = x.columns - (first + chunk * 8);
        } else {
            source = x.data + (first + row) * x.pitch + chunk * 8;
            step = kNsHopperDepth;
            depth_at = chunk * 8;
            left = x.rows - (first + row);
        }
    }

    // Starts the copies of a stage to `panel`; `depth_left` of K are left. Chunks outside of the
    // operand are zero-filled; their source is `any`, a valid address.
    K2K_DEVICE void copy(uint32_t panel, const T* any, int depth_left) {
        K2K_UNROLL
        for (int i = 0; i < kNsTile / 8; ++i) {
            const int k = kByColumns ? i % 8 * 8 : 0, across = kByColumns ? i / 8 * 64 : i * 8;
            const bool valid = across < left && depth_at + k < depth_left;
            const T* from = kByColumns ? source + i % 8 * eight + across : source + i * eight;
            arch::cp_async(panel + target + i * 1024, valid ? from : any, valid);
        }
        source += step;
    }
};

template <class T, bool kByColumns>
K2K_DEVICE void copy_panels(NsHopperStorage& smem, const NsWork<T>& work, int thread) {
    NsHopperPanel<T, kByColumns> a(work.a, work.place.row, thread);
    NsHopperPanel<T, kByColumns> b(work.b, work.place.column, thread);
    NsRingPosition at;
    K2K_NO_UNROLL
    for (int left = work.depth; left > 0; left -= kNsHopperDepth, at.advance()) {
        // Wait for a free stage, start its copies; full[] completes when all have landed.
        arch::mbarrier_wait(smem.empty[at.slot], at.parity ^ 1);
        a.copy(arch::smem_address(smem.ring[at.slot][0]), work.a.data, left);
        b.copy(arch::smem_address(smem.ring[at.slot][1]), work.b.data, left);
        arch::cp_async_arrive(smem.full[at.slot]);
    }
    // Do not exit while copies are in flight.
    arch::cp_async_commit();
    arch::cp_async_wait<0>();
}

// ---- consumers: warps 0 to 7

// sums += a warpgroup's 64 rows of A times B; sums [64, 128].
template <class T, bool kByColumns>
K2K_DEVICE void multiply_panels(float (&sums)[kNsTile / 2], NsHopperStorage& smem, int depth) {
    constexpr arch::Major kMajor = kByColumns ? arch::Major::kMN : arch::Major::kK;
    // Next 16 of K: 32 bytes further in each row, or by columns 16 rows.
    constexpr uint64_t kStep = arch::descriptor_step(kByColumns ? 16 * 128 : 32);
    constexpr uint32_t kHalf = kNsHopperPanelBytes / 2;
    constexpr uint32_t kLeading = kByColumns ? kHalf : 0;  // leading byte offset: next 64 columns
    const int warpgroup = arch::warp_id() / 4;
    NsRingPosition at, last;
    K2K_NO_UNROLL
    for (int left = depth; left > 0; left -= kNsHopperDepth, at.advance()) {
        const uint64_t a = arch::matrix_descriptor(smem.ring[at.slot][0] + warpgroup * kHalf,
                                                   arch::Swizzle::k128, kLeading, 1024);
        const uint64_t b =
            arch::matrix_descriptor(smem.ring[at.slot][1], arch::Swizzle::k128, kLeading, 1024);
        // Wait for both panels; make cp.async's writes visible to wgmma.
        arch::mbarrier_wait(smem.full[at.slot], at.parity);
        arch::fence_proxy_async();
        // Issue this stage's products; those of the previous stage may still run.
        arch::wgmma_fence();
        K2K_UNROLL
        for (int i = 0; i < kNsHopperDepth / 16; ++i) {
            arch::wgmma_ss<T, kNsTile, kMajor, kMajor>(sums, a + i * kStep, b + i * kStep, true);
        }
        arch::wgmma_commit();
        if (left == depth) continue;
        // Release the previous stage: all products but the newest have finished.
        arch::wgmma_wait<1>();
        if (arch::lane_id() == 0) arch::mbarrier_arrive(smem.empty[last.slot]);
        last.advance();
    }
    arch::wgmma_wait<0>(sums);
}

// ---- the kernel

template <class T>
__global__ void __launch_bounds__(kNsHopperThreads, 2)
    newton_schulz_sm90_kernel(const __grid_constant__ NsStage p) {
    if (is_skipped(p.tables)) return;
    NsHopperStorage& smem = arch::shared_storage<NsHopperStorage>();
    // Prologue: initialize the barriers, find this CTA's product and tile.
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kNsHopperStages; ++stage) {
            arch::mbarrier_init(smem.full[stage], kNsHopperThreads - kNsThreads);
            arch::mbarrier_init(smem.empty[stage], kNsThreads / 32);
        }
        arch::fence_mbarrier_init();
    }
    const auto work = find_work<T>(p, blockIdx.x);
    arch::sync_block();

    // Producer warps.
    if (threadIdx.x >= kNsThreads) {
        const int thread = threadIdx.x - kNsThreads;
        if (work.by_columns) {
            copy_panels<T, true>(smem, work, thread);
        } else {
            copy_panels<T, false>(smem, work, thread);
        }
        return;
    }
    // Consumer warpgroups: main loop, then the epilogue in the memory of the ring.
    float sums[kNsTile / 2] = {};  // [64, 128] of a warpgroup
    if (work.by_columns) {
        multiply_panels<T, true>(sums, smem, work.depth);
    } else {
        multiply_panels<T, false>(sums, smem, work.depth);
    }
    sync_tile();
    finish_product(work, smem.tile, [&](auto&& take) {
        const int row = arch::warp_id() * 16 + arch::lane_id() / 4;
        K2K_UNROLL
        for (int i = 0; i < kNsTile / 4; ++i) {  // pairs of rows `row`, `row` + 8
            take(row + i % 2 * 8, i / 2, sums[2 * i], sums[2 * i + 1]);
        }
    });
}

}  // namespace k2k
