#pragma once

// Gradient of the queries of MLA prefill for Hopper, by wgmma and TMA. For each sequence and head,
// queries q and keys k, with lse2 and delta of the preprocess kernel:
//
//     P[q, k]  = exp2(scale log2(e) Q[q, :192] . K[k, :192] - lse2[q])
//     dP[q, k] = dO[q, :128] . V[k, :128]
//     dS[q, k] = P[q, k] (dP[q, k] - delta[q])       0 where q does not see k
//     dQ[q, :] = scale dS[q, :] K[k, :192]
//
// Grid, roles and tasks are those of kernel_forward_sm90.cuh, and so is the order of keys: ascending
// in blocks of 96 from the sequence's first, so that a row's bits depend on its own query and its
// keys alone.
//
// Stage     K of a block is three boxes of 96 keys x 64 columns, read K-major for S and MN-major for
//           dQ; V is two. K and V have barriers of their own: V is free half a step earlier. Wider
//           blocks do not fit; narrower ones read more shared memory for a product, S and dP of 64
//           keys all that there is.
// Overlap   exponentials run during dP. The warpgroups take turns: one starts S and dP when the other
//           has its S, so that one computes dS while the other multiplies. (Without turns the ring
//           of two stages brings them into phase.)
//
//               warpgroup 0    S(0)  dP(0)  .     dQ(0)  S(1)  dP(1)  .     dQ(1)  ...
//                                    P(0)   dS(0)              P(1)   dS(1)
//               warpgroup 1          S(0)   dP(0)  .     dQ(0)  S(1)  dP(1)  .     ...
//                                           P(0)   dS(0)              P(1)   dS(1)
//
// Barriers  event          arrivals                     waited for by
//           known, done[2] task_queue.cuh               readers: the producer, 8 consumer warps
//           q_full         producer + bytes             consumers
//           q_empty        8 consumer warps, after the  producer: before it loads the next tile's
//                          tile's last scores
//           grad_out_full, grad_out_empty               the same of dO, after the tile's last dP
//           k_full[2]      producer + bytes             consumers
//           k_empty[2]     8 consumer warps, after dQ   producer: K of the stage is free
//           v_full[2]      producer + bytes             consumers
//           v_empty[2]     8 consumer warps, after dP   producer: V of the stage is free
//           named 1, 2: the threads of a warpgroup, 3: of both, while they clear rows of K
//           named 4, 5     the other warpgroup, when it    warpgroup 0, 1: before it starts S
//                          has its S
// Tail      boxes in the last block reach beyond the sequence. dS is selected to 0 there: V may hold
//           NaN, P = 0 is not enough. Rows of K are cleared, as 0 times NaN is NaN.
// Epilogue  from registers, row by row, 16 bytes per lane: rows beyond the sequence are not stored.
// Shared    Q 48 KB, dO 32 KB, two stages of K 36 KB and V 24 KB: 200 KB of 227.
// Registers 168 per thread at launch; setmaxnreg: consumers 224 (S and dP 48 each, dS 24, dQ 96),
//           the other warps 56.
// Limits    bfloat16 or float16; strides that TMA can copy.

#include "arch/control.cuh"
#include "arch/fence.cuh"
#include "arch/ldst.cuh"
#include "mla_prefill/pipeline_sm90.cuh"
#include "mla_prefill/task_queue.cuh"
#include "tile/online_softmax.cuh"
#include "tile/store_row.cuh"

namespace k2k {

constexpr int kHopperDqKeys = 96;  // of a block

struct DqMaps {
    arch::TensorMap q, grad_out;
    KeyMaps keys;
};

struct MlaDqSm90Storage {
    tile::SwizzledBox<kHopperRows> q[kQkBoxes];        // [128 queries, 192]
    tile::SwizzledBox<kHopperRows> grad_out[kVBoxes];  // [128 queries, 128]
    KeyRing<kHopperDqKeys> ring;
    PrefillTasks tasks;
    arch::Mbarrier q_full, q_empty, grad_out_full, grad_out_empty;
};
static_assert(sizeof(MlaDqSm90Storage) <= 232448);

K2K_DEVICE void make_barriers(MlaDqSm90Storage& smem) {
    make_barriers(smem.ring);
    make_task_barriers(smem.tasks, 9);
    arch::mbarrier_init(smem.q_full, 1);
    arch::mbarrier_init(smem.q_empty, 8);
    arch::mbarrier_init(smem.grad_out_full, 1);
    arch::mbarrier_init(smem.grad_out_empty, 8);
    arch::fence_mbarrier_init();
}

// ---- producer

// One thread calls it.
K2K_DEVICE void load_dq(MlaDqSm90Storage& smem, const MlaPrefillInputs& in, const DqMaps& maps) {
    constexpr auto kHint = arch::CacheHint::kEvictFirst;  // of what is read once
    HopperStage stage;
    uint32_t parity = 1;  // of q_empty and grad_out_empty
    for (TaskPosition at;; at.advance()) {
        const MlaPrefillTask& task = next_task(smem.tasks, at);
        if (task.last) return;
        const int head = task.head, end_key = end_of_keys(task);
        const int query = task.first_query + task.tile;
        for (int key = 0; key < end_key; key += kHopperDqKeys, stage.advance()) {
            const int token = task.first_key + key;
            load_v(smem.ring, stage, maps.keys, head, token);
            load_k(smem.ring, stage, maps.keys, head, rope_head(in, head), token);
            // Q and dO of the tile, after its first keys: only they wait for the last tile.
            if (key > 0) continue;
            arch::mbarrier_wait(smem.q_empty, parity);
            arch::mbarrier_arrive_expect_tx(smem.q_full, sizeof smem.q);
            for (int i = 0; i < kQkBoxes; ++i) {
                arch::tma_load_3d(&smem.q[i], maps.q, smem.q_full, i * kBoxColumns, head, query,
                                  kHint);
            }
            arch::mbarrier_wait(smem.grad_out_empty, parity);
            arch::mbarrier_arrive_expect_tx(smem.grad_out_full, sizeof smem.grad_out);
            for (int i = 0; i < kVBoxes; ++i) {
                arch::tma_load_3d(&smem.grad_out[i], maps.grad_out, smem.grad_out_full,
                                  i * kBoxColumns, head, query, kHint);
            }
            parity ^= 1;
        }
        arch::mbarrier_arrive(smem.tasks.done[at.slot]);
    }
}

// ---- consumers

using DqScores = float[kHopperDqKeys / 8][4];

// Zeros row h from key `border` on, counted from the thread's first.
K2K_DEVICE void zero_unseen(DqScores& scores, int h, int border) {
    K2K_UNROLL
    for (int j = 0; j < kHopperDqKeys / 8; ++j) {
        K2K_UNROLL
        for (int e = 0; e < 2; ++e) {
            if (8 * j + e >= border) scores[j][2 * h + e] = 0;
        }
    }
}

template <class T>
K2K_DEVICE void compute_dq(MlaDqSm90Storage& smem, const MlaPrefillBackwardParams& p) {
    const int warp = arch::warp_id(), pair = arch::lane_id() % 4;
    const int warpgroup = arch::shuffle(warp / 4, 0);  // uniform, as descriptors have to be
    const int row = warp * 16 + arch::lane_id() / 4;   // of the tile
    auto& ring = smem.ring;
    const arch::Swizzle swizzle = arch::Swizzle::k128;
    const auto rows_of_warpgroup = [&](const tile::SwizzledBox<kHopperRows>* boxes) {
        return arch::matrix_descriptor(&boxes->chunks[warpgroup * 64 * 8], swizzle, 0, 1024);
    };
    const uint64_t q = rows_of_warpgroup(smem.q), grad_out = rows_of_warpgroup(smem.grad_out);
    const uint64_t k = arch::matrix_descriptor(ring.k, swizzle, 0, 1024);
    const uint64_t k_columns = arch::matrix_descriptor(ring.k, swizzle, sizeof ring.k[0][0], 1024);
    const uint64_t v = arch::matrix_descriptor(ring.v, swizzle, 0, 1024);
    constexpr uint64_t kKStage = arch::descriptor_step(sizeof ring.k[0]);
    constexpr uint64_t kVStage = arch::descriptor_step(sizeof ring.v[0]);
    const float scale2 = p.in.scale * tile::kLog2E;

    HopperStage stage;
    uint32_t parity = 0;  // of q_full and grad_out_full
    // The first turn is warpgroup 0's; at the end it takes the turn that is left over.
    if (warpgroup == 1) arch::barrier_arrive(kTurn, 256);
    for (TaskPosition at;; at.advance()) {
        const MlaPrefillTask& task = next_task(smem.tasks, at);
        if (task.last) {
            if (warpgroup == 0) arch::barrier_sync(kTurn, 256);
            return;
        }
        const int end_key = end_of_keys(task);
        const Borders sees = borders_of(task, row);

        // Prologue of a task: lse2 and delta of the thread's rows.
        float lse2[2], delta[2];
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int64_t from =
                int64_t(task.head) * p.in.q_tokens + task.first_query + task.tile + row + 8 * h;
            const bool real = row + 8 * h < task.rows;
            lse2[h] = real ? arch::load_nc(p.lse2 + from) : INFINITY;
            delta[h] = real ? arch::load_nc(p.delta + from) : 0;
        }
        float dq[kQkDim / 2];  // [4 j + 2 h + e]: column 8 j + 2 (lane % 4) + e of row h
        K2K_UNROLL
        for (int i = 0; i < kQkDim / 2; ++i) dq[i] = 0;

        for (int key = 0; key < end_key; key += kHopperDqKeys, stage = stage_after(stage)) {
            // In the last block, clear the rows of K beyond the sequence: one warpgroup the nope
            // part, the other the rope part.
            arch::mbarrier_wait(ring.k_full[stage.slot], stage.parity);
            const int valid = task.keys - key;
            if (valid < kHopperDqKeys) {
                auto* boxes = ring.k[stage.slot];
                if (warpgroup == 0) {
                    tile::clear_rows<kNopeBoxes>(boxes, valid, kOneWarpgroup);
                } else {
                    tile::clear_rows<1>(boxes + kNopeBoxes, valid, kOneWarpgroup + 1);
                }
                arch::barrier_sync(kBothWarpgroups, 256);
            }
            // Start S, when the other warpgroup has its own, and dP.
            if (key == 0) arch::mbarrier_wait(smem.q_full, parity);
            DqScores scores, grads;
            arch::barrier_sync(kTurn + warpgroup, 256);
            start_scores<T, kQkDim>(scores, q, k + stage.slot * kKStage);
            if (key == 0) {
                arch::mbarrier_wait(smem.grad_out_full, parity);
                parity ^= 1;
            }
            arch::mbarrier_wait(ring.v_full[stage.slot], stage.parity);
            start_scores<T, kVDim>(grads, grad_out, v + stage.slot * kVStage);
            // P, while dP runs.
            arch::wgmma_wait<1>(flat(scores));
            arch::barrier_arrive(kTurn + (warpgroup ^ 1), 256);
            K2K_UNROLL
            for (int j = 0; j < kHopperDqKeys / 8; ++j) {
                K2K_UNROLL
                for (int i = 0; i < 4; ++i) {
                    scores[j][i] = arch::exp2_approx(fmaf(scores[j][i], scale2, -lse2[i / 2]));
                }
            }
            // Release Q after the tile's last scores. (Without a branch here, ptxas moves the wait
            // for dP up, before the exponentials.)
            const bool last = key + kHopperDqKeys >= end_key;
            if (last) tile::warp_arrive(smem.q_empty);
            // Release V, and dO after the tile's last dP.
            arch::wgmma_wait<0>(flat(grads));
            tile::warp_arrive(ring.v_empty[stage.slot]);
            if (last) tile::warp_arrive(smem.grad_out_empty);
            // dS = P (dP - delta), without what a row does not see; round it.
            K2K_UNROLL
            for (int j = 0; j < kHopperDqKeys / 8; ++j) {
                K2K_UNROLL
                for (int i = 0; i < 4; ++i) {
                    grads[j][i] = scores[j][i] * (grads[j][i] - delta[i / 2]);
                }
            }
            if (key + kHopperDqKeys > sees.warp) {
                zero_unseen(grads, 0, sees.row[0] - key);
                zero_unseen(grads, 1, sees.row[1] - key);
            }
            Operands<kHopperDqKeys> rounded;
            round_scores<T>(rounded, grads);
            // dQ += dS K; release K.
            start_sums<T, kQkDim>(dq, rounded, k_columns + stage.slot * kKStage);
            arch::wgmma_wait<0>(dq);
            tile::warp_arrive(ring.k_empty[stage.slot]);
        }

        // Epilogue.
        K2K_UNROLL
        for (int i = 0; i < kQkDim / 2; ++i) dq[i] *= p.in.scale;
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int64_t token = int64_t(task.first_query) + task.tile + row + 8 * h;
            T* to = static_cast<T*>(p.grad_q) + (token * p.in.heads + task.head) * kQkDim;
            tile::store_row(to + 2 * pair, dq, h, row + 8 * h < task.rows ? kQkDim - 2 * pair : 0,
                            /*aligned=*/true);
        }
        tile::warp_arrive(smem.tasks.done[at.slot]);
    }
}

template <class T>
__global__ void __launch_bounds__(kHopperThreads, 1)
    mla_prefill_dq_sm90_kernel(const __grid_constant__ MlaPrefillBackwardParams p,
                               const __grid_constant__ DqMaps maps) {
    MlaDqSm90Storage& smem = arch::shared_storage<MlaDqSm90Storage>();
    const int warp = arch::warp_id();
    if (threadIdx.x == 0) make_barriers(smem);
    arch::sync_block();

    // Roles.
    if (warp < 8) {
        arch::registers_increase<224>();
        compute_dq<T>(smem, p);
    } else {
        arch::registers_decrease<56>();
        if (warp == 8) {
            if (arch::elect_one()) load_dq(smem, p.in, maps);
        } else if (warp == 9) {
            find_tasks<TileAxis::kQueries, kHopperRows>(smem.tasks, p.in, p.tickets + 1);
        }
    }
}

}  // namespace k2k
