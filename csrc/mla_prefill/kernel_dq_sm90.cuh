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
//           dQ; V is two. K and V have barriers of their own: V is free half a step earlier.
// Overlap   in a warpgroup, exponentials run during dP. The scores of a block are issued with dQ of
//           the one before:
//
//               tensor cores   S(0)  dP(0)           S(1) dQ(0)  dP(1)           S(2) dQ(1)  ...
//               CUDA cores           P(0)   dS(0)                P(1)   dS(1)                ...
//
//           While one warpgroup computes dS, the other multiplies. The last step, which has no next
//           scores, comes after the loop.
// Barriers  event          arrivals                     waited for by
//           known, done[2] task_queue.cuh               readers: the producer, 8 consumer warps
//           q_full         producer + bytes of Q, dO    consumers
//           q_empty        8 consumer warps, after the  producer: before it loads the next tile's
//                          tile's last dP
//           k_full[2]      producer + bytes             consumers
//           k_empty[2]     8 consumer warps, after dQ   producer: K of the stage is free
//           v_full[2]      producer + bytes             consumers
//           v_empty[2]     8 consumer warps, after dP   producer: V of the stage is free
//           named 1, 2: the threads of a warpgroup, 3: of both, while they clear rows of K
// Tail      boxes in the last block reach beyond the sequence. dS is selected to 0 there: V may hold
//           NaN, so that P = 0 were not enough. Rows of K are cleared, as 0 times NaN is NaN, once
//           both warpgroups have their scores.
// Epilogue  from registers, row by row, 16 bytes per lane: rows beyond the sequence are not stored.
// Shared    Q 48 KB, dO 32 KB, two stages of K 36 KB and V 24 KB: 200 KB of 227.
// Registers 168 per thread at launch; setmaxnreg: consumers 232 (S and dP 48 each, dS 24, dQ 96),
//           the other warps 40.
// Limits    bfloat16 or float16; strides that TMA can copy.

#include "arch/control.cuh"
#include "arch/fence.cuh"
#include "arch/ldst.cuh"
#include "arch/smem.cuh"
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "mla_prefill/maps.h"
#include "mla_prefill/task_queue.cuh"
#include "tile/online_softmax.cuh"
#include "tile/store_row.cuh"
#include "tile/swizzle.cuh"

namespace k2k {

constexpr int kDqRows = 128, kDqKeys = 96;  // of a tile and of a block
constexpr int kDqStages = 2;
constexpr int kDqThreads = 3 * 128;

struct DqMaps {
    arch::TensorMap q, grad_out, k, k_rope, v;
};

struct MlaPrefillDqStorage {
    tile::SwizzledBox<kDqRows> q[kQkBoxes];             // [128 queries, 192]
    tile::SwizzledBox<kDqRows> grad_out[kVBoxes];       // [128 queries, 128]
    tile::SwizzledBox<kDqKeys> k[kDqStages][kQkBoxes];  // [stage, 96 keys, 192]
    tile::SwizzledBox<kDqKeys> v[kDqStages][kVBoxes];   // [stage, 96 keys, 128]
    PrefillTasks tasks;
    arch::Mbarrier q_full, q_empty;
    arch::Mbarrier k_full[kDqStages], k_empty[kDqStages];
    arch::Mbarrier v_full[kDqStages], v_empty[kDqStages];
};
static_assert(sizeof(MlaPrefillDqStorage) <= 232448);

// Named barriers. (0 is sync_block.)
enum DqBarrier : uint32_t { kDqWarpgroup = 1, kDqBoth = 3 };

using DqStage = tile::RingPosition<kDqStages>;

K2K_DEVICE DqStage dq_stage_after(DqStage stage) {
    static_assert(kDqStages == 2);
    return {stage.slot ^ 1, stage.parity ^ stage.slot};
}

K2K_DEVICE void make_barriers(MlaPrefillDqStorage& smem) {
    make_task_barriers(smem.tasks, 9);
    arch::mbarrier_init(smem.q_full, 1);
    arch::mbarrier_init(smem.q_empty, 8);
    for (int stage = 0; stage < kDqStages; ++stage) {
        arch::mbarrier_init(smem.k_full[stage], 1);
        arch::mbarrier_init(smem.k_empty[stage], 8);
        arch::mbarrier_init(smem.v_full[stage], 1);
        arch::mbarrier_init(smem.v_empty[stage], 8);
    }
    arch::fence_mbarrier_init();
}

// ---- producer

// One thread calls it.
K2K_DEVICE void load_dq(MlaPrefillDqStorage& smem, const MlaPrefillInputs& in, const DqMaps& maps) {
    DqStage stage;
    uint32_t q_parity = 1;
    for (TaskPosition at;; at.advance()) {
        const MlaPrefillTask& task = next_task(smem.tasks, at);
        if (task.last) return;
        const int head = task.head, k_rope_head = rope_head(in, head);
        const int end_key = end_of_keys(task);
        for (int key = 0; key < end_key; key += kDqKeys, stage.advance()) {
            const int token = task.first_key + key;
            // V of the block, once the stage's last dP has been computed.
            arch::mbarrier_wait(smem.v_empty[stage.slot], stage.parity ^ 1);
            arch::Mbarrier& v_full = smem.v_full[stage.slot];
            auto& v = smem.v[stage.slot];
            arch::mbarrier_arrive_expect_tx(v_full, sizeof v);
            for (int i = 0; i < kVBoxes; ++i) {
                arch::tma_load_3d(&v[i], maps.v, v_full, i * kBoxColumns, head, token);
            }
            // K of the block, once the stage's last dQ has been computed.
            arch::mbarrier_wait(smem.k_empty[stage.slot], stage.parity ^ 1);
            arch::Mbarrier& k_full = smem.k_full[stage.slot];
            auto& k = smem.k[stage.slot];
            arch::mbarrier_arrive_expect_tx(k_full, sizeof k);
            for (int i = 0; i < kNopeBoxes; ++i) {
                arch::tma_load_3d(&k[i], maps.k, k_full, i * kBoxColumns, head, token);
            }
            arch::tma_load_3d(&k[kNopeBoxes], maps.k_rope, k_full, 0, k_rope_head, token);
            // Q and dO of the tile, after its first keys: only they wait for the last tile.
            if (key > 0) continue;
            arch::mbarrier_wait(smem.q_empty, q_parity);
            q_parity ^= 1;
            const int query = task.first_query + task.tile;
            arch::mbarrier_arrive_expect_tx(smem.q_full, sizeof smem.q + sizeof smem.grad_out);
            for (int i = 0; i < kQkBoxes; ++i) {
                arch::tma_load_3d(&smem.q[i], maps.q, smem.q_full, i * kBoxColumns, head, query,
                                  arch::CacheHint::kEvictFirst);
            }
            for (int i = 0; i < kVBoxes; ++i) {
                arch::tma_load_3d(&smem.grad_out[i], maps.grad_out, smem.q_full, i * kBoxColumns,
                                  head, query, arch::CacheHint::kEvictFirst);
            }
        }
        arch::mbarrier_arrive(smem.tasks.done[at.slot]);
    }
}

// ---- consumers

// Of a warpgroup, in wgmma's accumulator layout. A thread has the rows `row` (h = 0) and `row` + 8
// (h = 1): dq[4 j + 2 h + e] is column 8 j + 2 (lane % 4) + e, scores[j][2 h + e] the key there.
using DqOutput = float[kQkDim / 2];
using DqScores = float[kDqKeys / 8][4];
using DqGradScores = uint32_t[kDqKeys / 16][4];  // the A operand of 16 keys each

template <int kTiles>
K2K_DEVICE auto& flat(float (&values)[kTiles][4]) {
    return reinterpret_cast<float (&)[kTiles * 4]>(values);
}

// Starts A B^T of `kColumns` columns: S = Q K^T and dP = dO V^T.
template <class T, int kColumns>
K2K_DEVICE void start_scores(DqScores& scores, uint64_t queries, uint64_t keys) {
    arch::wgmma_fence();
    K2K_UNROLL
    for (uint32_t i = 0; i < kColumns / 16; ++i) {
        arch::wgmma_ss<T, kDqKeys>(
            flat(scores), queries + arch::descriptor_step(i / 4 * kDqRows * 128 + i % 4 * 32),
            keys + arch::descriptor_step(i / 4 * kDqKeys * 128 + i % 4 * 32), i > 0);
    }
    arch::wgmma_commit();
}

// Starts dQ += dS K.
template <class T>
K2K_DEVICE void start_dq(DqOutput& dq, const DqGradScores& grad_scores, uint64_t k) {
    arch::wgmma_fence();
    K2K_UNROLL
    for (int i = 0; i < kDqKeys / 16; ++i) {
        arch::wgmma_rs<T, kQkDim, arch::Major::kMN>(dq, grad_scores[i],
                                                    k + arch::descriptor_step(i * 2048), true);
    }
    arch::wgmma_commit();
}

// Zeros row h from key `border` on, counted from the thread's first.
K2K_DEVICE void zero_unseen(DqScores& scores, int h, int border) {
    K2K_UNROLL
    for (int j = 0; j < kDqKeys / 8; ++j) {
        K2K_UNROLL
        for (int e = 0; e < 2; ++e) {
            if (8 * j + e >= border) scores[j][2 * h + e] = 0;
        }
    }
}

K2K_DEVICE int least(int a, int b) { return a < b ? a : b; }

template <class T>
K2K_DEVICE void compute_dq(MlaPrefillDqStorage& smem, const MlaPrefillBackwardParams& p) {
    const int lane = arch::lane_id(), warp = arch::warp_id(), warpgroup = warp / 4;
    const int row = warp * 16 + lane / 4, pair = lane % 4;  // of the tile
    const arch::Swizzle swizzle = arch::Swizzle::k128;
    constexpr uint32_t kKeyBox = sizeof smem.k[0][0];
    const uint64_t q =
        arch::matrix_descriptor(&smem.q[0].chunks[warpgroup * 64 * 8], swizzle, 0, 1024);
    const uint64_t grad_out =
        arch::matrix_descriptor(&smem.grad_out[0].chunks[warpgroup * 64 * 8], swizzle, 0, 1024);
    const uint64_t k_stages = arch::matrix_descriptor(smem.k, swizzle, 0, 1024);
    const uint64_t k_columns = arch::matrix_descriptor(smem.k, swizzle, kKeyBox, 1024);
    const uint64_t v_stages = arch::matrix_descriptor(smem.v, swizzle, 0, 1024);
    constexpr uint64_t kKStep = arch::descriptor_step(sizeof smem.k[0]);
    constexpr uint64_t kVStep = arch::descriptor_step(sizeof smem.v[0]);
    const float scale2 = p.in.scale * tile::kLog2E;

    DqStage stage;
    uint32_t q_parity = 0;
    for (TaskPosition at;; at.advance()) {
        const MlaPrefillTask& task = next_task(smem.tasks, at);
        if (task.last) return;
        const int end_key = end_of_keys(task);
        // What this thread's rows see, counted from its first key of a block; and the keys that all
        // rows of the warp see.
        const int border = task.tile + row + task.diagonal + 1;
        const int sees[2] = {least(border, task.keys) - 2 * pair,
                             least(border + 8, task.keys) - 2 * pair};
        const int all_see = least(border - lane / 4, task.keys);

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
        DqOutput dq;
        K2K_UNROLL
        for (int i = 0; i < kQkDim / 2; ++i) dq[i] = 0;

        if (end_key > 0) {
            // The first block's scores.
            DqScores scores;
            arch::mbarrier_wait(smem.q_full, q_parity);
            q_parity ^= 1;
            arch::mbarrier_wait(smem.k_full[stage.slot], stage.parity);
            start_scores<T, kQkDim>(scores, q, k_stages + stage.slot * kKStep);
            arch::wgmma_wait<0>(flat(scores));

            const auto step = [&](int key, auto is_last) {
                constexpr bool kLast = decltype(is_last)::value;
                const DqStage next = dq_stage_after(stage);
                // Start dP.
                DqScores grads;
                arch::mbarrier_wait(smem.v_full[stage.slot], stage.parity);
                start_scores<T, kVDim>(grads, grad_out, v_stages + stage.slot * kVStep);
                // P, while dP runs.
                K2K_UNROLL
                for (auto& four : scores) {
                    K2K_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        four[i] = arch::exp2_approx(fmaf(four[i], scale2, -lse2[i / 2]));
                    }
                }
                // Wait for the next K. (Without a branch here, ptxas moves the wait for dP up,
                // before the exponentials.)
                if (!kLast) arch::mbarrier_wait(smem.k_full[next.slot], next.parity);
                // Release V, and Q and dO after the tile's last dP.
                arch::wgmma_wait<0>(flat(grads));
                tile::warp_arrive(smem.v_empty[stage.slot]);
                if (kLast) tile::warp_arrive(smem.q_empty);
                // dS = P (dP - delta), without what a row does not see; round it.
                K2K_UNROLL
                for (int j = 0; j < kDqKeys / 8; ++j) {
                    K2K_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        grads[j][i] = scores[j][i] * (grads[j][i] - delta[i / 2]);
                    }
                }
                if (key + kDqKeys > all_see) {
                    zero_unseen(grads, 0, sees[0] - key);
                    zero_unseen(grads, 1, sees[1] - key);
                }
                DqGradScores rounded;
                K2K_UNROLL
                for (int i = 0; i < kDqKeys / 16; ++i) {
                    K2K_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        const float* two = grads[2 * i + j / 2] + j % 2 * 2;
                        rounded[i][j] = tile::pack<T>(two[0], two[1]);
                    }
                }
                // Start the next block's scores and this one's dQ.
                if constexpr (!kLast) {
                    start_scores<T, kQkDim>(scores, q, k_stages + next.slot * kKStep);
                }
                start_dq<T>(dq, rounded, k_columns + stage.slot * kKStep);
                arch::wgmma_wait<0>(dq);
                if constexpr (!kLast) arch::wgmma_wait<0>(flat(scores));
                // Release K.
                tile::warp_arrive(smem.k_empty[stage.slot]);
                stage = next;
            };
            int key = 0;
            for (; key + kDqKeys < end_key; key += kDqKeys) step(key, std::false_type{});
            // The last step, without the rows of K beyond the sequence.
            const int valid = task.keys - key;
            if (valid < kDqKeys) {
                arch::barrier_sync(kDqBoth, 256);
                const uint32_t id = kDqWarpgroup + warpgroup;
                if (warpgroup == 0) {
                    tile::clear_rows<kNopeBoxes>(smem.k[stage.slot], valid, id);
                } else {
                    tile::clear_rows<1>(&smem.k[stage.slot][kNopeBoxes], valid, id);
                }
                arch::barrier_sync(kDqBoth, 256);
            }
            step(key, std::true_type{});
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
__global__ void __launch_bounds__(kDqThreads, 1)
    mla_prefill_dq_sm90_kernel(const __grid_constant__ MlaPrefillBackwardParams p,
                               const __grid_constant__ DqMaps maps) {
    MlaPrefillDqStorage& smem = arch::shared_storage<MlaPrefillDqStorage>();
    const int warp = arch::warp_id();
    if (threadIdx.x == 0) make_barriers(smem);
    arch::sync_block();

    // Roles.
    if (warp < 8) {
        arch::registers_increase<232>();
        compute_dq<T>(smem, p);
    } else {
        arch::registers_decrease<40>();
        if (warp == 8) {
            if (arch::elect_one()) load_dq(smem, p.in, maps);
        } else if (warp == 9) {
            find_tasks<TileAxis::kQueries, kDqRows>(smem.tasks, p.in, p.tickets + 1);
        }
    }
}

}  // namespace k2k
