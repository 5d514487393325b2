#pragma once

// What the sm_90a kernels over tiles of queries share (forward and dQ): the ring of K and V, its
// producer, the products of a warpgroup.

#include "arch/smem.cuh"
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "mla_prefill/maps.h"
#include "mla_prefill/schedule.cuh"
#include "tile/pack.cuh"
#include "tile/ring.cuh"
#include "tile/swizzle.cuh"

namespace k2k {

constexpr int kHopperRows = 128;         // queries of a tile
constexpr int kHopperStages = 2;         // of keys
constexpr int kHopperThreads = 3 * 128;  // two consumer warpgroups, a third for producer and tasks

// Named barriers. (0 is sync_block.)
enum HopperBarrier : uint32_t { kOneWarpgroup = 1, kBothWarpgroups = 3, kTurn = 4 };

using HopperStage = tile::RingPosition<kHopperStages>;

K2K_DEVICE HopperStage stage_after(HopperStage stage) {
    static_assert(kHopperStages == 2);
    return {stage.slot ^ 1, stage.parity ^ stage.slot};
}

struct KeyMaps {
    arch::TensorMap k, k_rope, v;
};

inline KeyMaps key_maps(const MlaPrefillInputs& in, int rows) {
    return {k_map(in, rows), k_rope_map(in, rows), v_map(in, rows)};
}

// Blocks of keys in boxes of 64 columns: of K two of the nope part and one of the rope part.
template <int kKeys>
struct KeyRing {
    using Box = tile::SwizzledBox<kKeys>;

    Box k[kHopperStages][kQkBoxes];  // [stage, keys, 192]
    Box v[kHopperStages][kVBoxes];   // [stage, keys, 128]
    arch::Mbarrier k_full[kHopperStages], k_empty[kHopperStages];
    arch::Mbarrier v_full[kHopperStages], v_empty[kHopperStages];
};

template <int kKeys>
K2K_DEVICE void make_barriers(KeyRing<kKeys>& ring) {
    for (int stage = 0; stage < kHopperStages; ++stage) {
        arch::mbarrier_init(ring.k_full[stage], 1);
        arch::mbarrier_init(ring.k_empty[stage], 8);
        arch::mbarrier_init(ring.v_full[stage], 1);
        arch::mbarrier_init(ring.v_empty[stage], 8);
    }
}

// Loads K of the block that begins at `token`, once the stage's last one has been read.
template <int kKeys>
K2K_DEVICE void load_k(KeyRing<kKeys>& ring, HopperStage stage, const KeyMaps& maps, int head,
                       int head_of_rope, int token) {
    arch::mbarrier_wait(ring.k_empty[stage.slot], stage.parity ^ 1);
    auto& k = ring.k[stage.slot];
    arch::Mbarrier& full = ring.k_full[stage.slot];
    arch::mbarrier_arrive_expect_tx(full, sizeof k);
    for (int i = 0; i < kNopeBoxes; ++i) {
        arch::tma_load_3d(&k[i], maps.k, full, i * kBoxColumns, head, token);
    }
    arch::tma_load_3d(&k[kNopeBoxes], maps.k_rope, full, 0, head_of_rope, token);
}

// The same of V.
template <int kKeys>
K2K_DEVICE void load_v(KeyRing<kKeys>& ring, HopperStage stage, const KeyMaps& maps, int head,
                       int token) {
    arch::mbarrier_wait(ring.v_empty[stage.slot], stage.parity ^ 1);
    auto& v = ring.v[stage.slot];
    arch::Mbarrier& full = ring.v_full[stage.slot];
    arch::mbarrier_arrive_expect_tx(full, sizeof v);
    for (int i = 0; i < kVBoxes; ++i) {
        arch::tma_load_3d(&v[i], maps.v, full, i * kBoxColumns, head, token);
    }
}

// ---- products of a warpgroup: 64 queries, as wgmma lays accumulators out. A thread has the rows
// lane / 4 (h = 0) and lane / 4 + 8 (h = 1) of its warp's 16: scores[j][2 h + e] is that of key
// 8 j + 2 (lane % 4) + e.

// [64 queries, kKeys] as A operands of 16 keys each.
template <int kKeys>
using Operands = uint32_t[kKeys / 16][4];

template <int kTiles>
K2K_DEVICE auto& flat(float (&scores)[kTiles][4]) {
    return reinterpret_cast<float (&)[kTiles * 4]>(scores);
}

// Starts scores = A B^T over kColumns columns: `queries` and `keys` are K-major.
template <class T, int kColumns, int kTiles>
K2K_DEVICE void start_scores(float (&scores)[kTiles][4], uint64_t queries, uint64_t keys) {
    constexpr int kKeys = kTiles * 8;
    arch::wgmma_fence();
    K2K_UNROLL
    for (uint32_t i = 0; i < kColumns / 16; ++i) {
        const uint32_t box = i / 4, inside = i % 4 * 32;
        arch::wgmma_ss<T, kKeys>(
            flat(scores),
            queries + arch::descriptor_step(box * sizeof(tile::SwizzledBox<kHopperRows>) + inside),
            keys + arch::descriptor_step(box * sizeof(tile::SwizzledBox<kKeys>) + inside), i > 0);
    }
    arch::wgmma_commit();
}

// Starts sums += A B, over 16 keys for each operand: `columns` is MN-major.
template <class T, int kColumns, int kOperands>
K2K_DEVICE void start_sums(float (&sums)[kColumns / 2], const uint32_t (&a)[kOperands][4],
                           uint64_t columns) {
    arch::wgmma_fence();
    K2K_UNROLL
    for (int i = 0; i < kOperands; ++i) {
        arch::wgmma_rs<T, kColumns, arch::Major::kMN>(
            sums, a[i], columns + arch::descriptor_step(i * 16 * 128), true);
    }
    arch::wgmma_commit();
}

template <class T, int kTiles>
K2K_DEVICE void round_scores(uint32_t (&a)[kTiles / 2][4], const float (&scores)[kTiles][4]) {
    K2K_UNROLL
    for (int i = 0; i < kTiles / 2; ++i) {
        K2K_UNROLL
        for (int j = 0; j < 4; ++j) {
            const float* two = scores[2 * i + j / 2] + j % 2 * 2;
            a[i][j] = tile::pack<T>(two[0], two[1]);
        }
    }
}

// What the two rows of a thread see of the keys, counted from the thread's first one in a block;
// and the keys that all rows of the warp see.
struct Borders {
    int row[2], warp;
};

K2K_DEVICE Borders borders_of(const MlaPrefillTask& task, int tile_row) {
    const int lane = arch::lane_id(), first = 2 * (lane % 4);
    return {{border_of(task, tile_row) - first, border_of(task, tile_row + 8) - first},
            border_of(task, tile_row - lane / 4)};
}

}  // namespace k2k
