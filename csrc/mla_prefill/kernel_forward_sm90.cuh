#pragma once

// MLA prefill for Hopper, by wgmma and TMA. For each sequence and head, queries q and keys k:
//
//     S[q, k] = scale * Q[q, :192] . K[k, :192]      -inf where q does not see k
//     O[q, :128] = softmax_k(S[q, :]) V[k, :128],  lse[q], max_logits[q]
//
// Grid      persistent, one CTA per SM; tiles of 128 queries of one head, the longest first, by
//           tickets (schedule.cuh).
// Roles     warps 0 to 3, 4 to 7  consumer warpgroups, 64 queries each: S, softmax, O
//           warp 8                producer: TMA loads of Q, K and V
//           warp 9                scheduler: finds the tasks, one ahead
//           warps 10, 11          idle: setmaxnreg applies to whole warpgroups
// Keys      in blocks of 128, ascending from the sequence's first. A row's bits then depend on its
//           own query and its keys alone: a block that it does not see multiplies its sums by 1 and
//           adds 0.
// Stage     K of a block is three boxes of 128 keys x 64 columns with the 128-byte swizzle: two of
//           the nope part, one of the rope part, by a map of its own. V is two, read MN-major. K
//           and V of a stage have barriers of their own: K is free a step earlier.
// Overlap   in a warpgroup, the scores of a block are issued before P V of the one before, whose
//           products run during the softmax:
//
//               tensor cores   S(0)            S(1)  P V(0)      S(2)  P V(1)      ...
//               CUDA cores           softmax(0)      softmax(1)        softmax(2)  ...
//
//           While one warpgroup waits, the other multiplies. The last P V comes after the loop: a
//           wgmma under a condition would make the compiler wait for each one.
// Barriers  event          arrivals                     waited for by
//           known, done[2] task_queue.cuh               readers: the producer, 8 consumer warps
//           q_full         producer + bytes             consumers
//           q_empty        8 consumer warps, after the  producer: before it loads the next tile's
//                          tile's last scores
//           k_full[2]      producer + bytes             consumers
//           k_empty[2]     8 consumer warps             producer: K of the stage is free
//           v_full[2], v_empty[2]                       the same of V
//           named 1, 2: the threads of a warpgroup, 3: of both, while they clear rows of V
// Tail      boxes in the last block reach beyond the sequence. Scores there are masked by select;
//           rows of V are cleared, as P = 0 times NaN is NaN.
// Pieces    with state_in, sums begin with those of the pieces before; with state_out they are
//           stored as they are. Pieces of multiples of 128 keys make the same bits as one call.
// Epilogue  from registers, row by row, 16 bytes per lane: rows beyond the sequence are not stored.
// Shared    Q 48 KB, two stages of K 48 KB and V 32 KB: 208 KB of 227.
// Registers 168 per thread at launch; setmaxnreg: consumers 216 (scores 64, P 32, output 64), the
//           other warps 72.
// Limits    bfloat16 or float16; strides that TMA can copy.

#include "arch/control.cuh"
#include "arch/fence.cuh"
#include "arch/smem.cuh"
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "mla_prefill/maps.h"
#include "mla_prefill/task_queue.cuh"
#include "tile/online_softmax.cuh"
#include "tile/store_row.cuh"
#include "tile/swizzle.cuh"

namespace k2k {

constexpr int kForwardRows = 128, kForwardKeys = 128;  // of a tile and of a block
constexpr int kForwardStages = 2;
constexpr int kForwardThreads = 3 * 128;

using ForwardBox = tile::SwizzledBox<128>;

struct ForwardMaps {
    arch::TensorMap q, k, k_rope, v;
};

struct MlaPrefillForwardStorage {
    ForwardBox q[kQkBoxes];                  // [128 queries, 192]
    ForwardBox k[kForwardStages][kQkBoxes];  // [stage, 128 keys, 192]
    ForwardBox v[kForwardStages][kVBoxes];   // [stage, 128 keys, 128]
    PrefillTasks tasks;
    arch::Mbarrier q_full, q_empty;
    arch::Mbarrier k_full[kForwardStages], k_empty[kForwardStages];
    arch::Mbarrier v_full[kForwardStages], v_empty[kForwardStages];
};
static_assert(sizeof(MlaPrefillForwardStorage) <= 232448);

// Named barriers. (0 is sync_block.)
enum ForwardBarrier : uint32_t { kWarpgroupClears = 1, kBothCleared = 3 };

using ForwardStage = tile::RingPosition<kForwardStages>;

K2K_DEVICE ForwardStage stage_after(ForwardStage stage) {
    static_assert(kForwardStages == 2);
    return {stage.slot ^ 1, stage.parity ^ stage.slot};
}

K2K_DEVICE void make_barriers(MlaPrefillForwardStorage& smem) {
    make_task_barriers(smem.tasks, 9);
    arch::mbarrier_init(smem.q_full, 1);
    arch::mbarrier_init(smem.q_empty, 8);
    for (int stage = 0; stage < kForwardStages; ++stage) {
        arch::mbarrier_init(smem.k_full[stage], 1);
        arch::mbarrier_init(smem.k_empty[stage], 8);
        arch::mbarrier_init(smem.v_full[stage], 1);
        arch::mbarrier_init(smem.v_empty[stage], 8);
    }
    arch::fence_mbarrier_init();
}

// ---- producer

// One thread calls it.
K2K_DEVICE void load_forward(MlaPrefillForwardStorage& smem, const MlaPrefillInputs& in,
                             const ForwardMaps& maps) {
    ForwardStage stage;
    uint32_t q_parity = 1;
    for (TaskPosition at;; at.advance()) {
        const MlaPrefillTask& task = next_task(smem.tasks, at);
        if (task.last) return;
        const int head = task.head, k_rope_head = rope_head(in, head);
        const int end_key = end_of_keys(task);
        for (int key = 0; key < end_key; key += kForwardKeys, stage.advance()) {
            const int token = task.first_key + key;
            // K of the block, once the stage's last scores have been computed.
            arch::mbarrier_wait(smem.k_empty[stage.slot], stage.parity ^ 1);
            arch::Mbarrier& k_full = smem.k_full[stage.slot];
            ForwardBox(&k)[kQkBoxes] = smem.k[stage.slot];
            arch::mbarrier_arrive_expect_tx(k_full, sizeof k);
            for (int i = 0; i < kNopeBoxes; ++i) {
                arch::tma_load_3d(&k[i], maps.k, k_full, i * kBoxColumns, head, token);
            }
            arch::tma_load_3d(&k[kNopeBoxes], maps.k_rope, k_full, 0, k_rope_head, token);
            // Q of the tile, after its first K: only Q waits for the scores of the last tile.
            if (key == 0) {
                arch::mbarrier_wait(smem.q_empty, q_parity);
                q_parity ^= 1;
                arch::mbarrier_arrive_expect_tx(smem.q_full, sizeof smem.q);
                for (int i = 0; i < kQkBoxes; ++i) {
                    arch::tma_load_3d(&smem.q[i], maps.q, smem.q_full, i * kBoxColumns, head,
                                      task.first_query + task.tile, arch::CacheHint::kEvictFirst);
                }
            }
            // V of the block.
            arch::mbarrier_wait(smem.v_empty[stage.slot], stage.parity ^ 1);
            arch::Mbarrier& v_full = smem.v_full[stage.slot];
            ForwardBox(&v)[kVBoxes] = smem.v[stage.slot];
            arch::mbarrier_arrive_expect_tx(v_full, sizeof v);
            for (int i = 0; i < kVBoxes; ++i) {
                arch::tma_load_3d(&v[i], maps.v, v_full, i * kBoxColumns, head, token);
            }
        }
        arch::mbarrier_arrive(smem.tasks.done[at.slot]);
    }
}

// ---- consumers

// [64, 128] of a warpgroup in wgmma's accumulator layout. A thread has the rows `row` (h = 0) and
// `row` + 8 (h = 1): output[4 j + 2 h + e] is column 8 j + 2 (lane % 4) + e.
using ForwardOutput = float[kVDim / 2];
using ForwardScores = float[kForwardKeys / 8][4];
using ForwardP = uint32_t[kForwardKeys / 16][4];  // the A operand of 16 keys each

K2K_DEVICE void scale(ForwardOutput& out, const float (&factor)[2]) {
    K2K_UNROLL
    for (int i = 0; i < kVDim / 2; ++i) out[i] *= factor[i / 2 % 2];
}

// Starts S = Q K^T.
template <class T>
K2K_DEVICE void start_scores(ForwardScores& scores, uint64_t q, uint64_t k) {
    auto& accumulators = reinterpret_cast<float (&)[kForwardKeys / 2]>(scores);
    arch::wgmma_fence();
    K2K_UNROLL
    for (int i = 0; i < kQkDim / 16; ++i) {
        const uint64_t dims =
            arch::descriptor_step(i / 4 * static_cast<uint32_t>(sizeof(ForwardBox)) + i % 4 * 32);
        arch::wgmma_ss<T, kForwardKeys>(accumulators, q + dims, k + dims, i > 0);
    }
    arch::wgmma_commit();
}

// Starts O += P V.
template <class T>
K2K_DEVICE void start_output(ForwardOutput& out, const ForwardP& p, uint64_t v) {
    arch::wgmma_fence();
    K2K_UNROLL
    for (int i = 0; i < kForwardKeys / 16; ++i) {
        arch::wgmma_rs<T, kVDim, arch::Major::kMN>(out, p[i], v + arch::descriptor_step(i * 2048),
                                                   true);
    }
    arch::wgmma_commit();
}

template <class T>
K2K_DEVICE void round_scores(ForwardP& p, const ForwardScores& scores) {
    K2K_UNROLL
    for (int i = 0; i < kForwardKeys / 16; ++i) {
        K2K_UNROLL
        for (int j = 0; j < 4; ++j) {
            const float* two = scores[2 * i + j / 2] + j % 2 * 2;
            p[i][j] = tile::pack<T>(two[0], two[1]);
        }
    }
}

// Row `row` of [q_tokens, heads] is this thread's row h of the tile; `real`: it is one of the
// sequence's.
struct ForwardRow {
    int64_t row;
    bool real;
};

K2K_DEVICE ForwardRow forward_row(const MlaPrefillInputs& in, const MlaPrefillTask& task,
                                  int tile_row) {
    const int64_t token = int64_t(task.first_query) + task.tile + tile_row;
    return {token * in.heads + task.head, tile_row < task.rows};
}

// The sums of the pieces before.
K2K_DEVICE void load_state(const float* state, const ForwardRow& place, int h, ForwardOutput& out,
                           tile::OnlineSoftmax& softmax) {
    if (!place.real) return;
    const int pair = arch::lane_id() % 4;
    const float* from = state + place.row * kStateFloats;
    K2K_UNROLL
    for (int j = 0; j < kVDim / 8; ++j) {
        const float2 two = *reinterpret_cast<const float2*>(from + 8 * j + 2 * pair);
        out[4 * j + 2 * h] = two.x, out[4 * j + 2 * h + 1] = two.y;
    }
    softmax.maximum[h] = from[kStateMaximum];
    softmax.total[h] = from[kStateTotals + pair];
}

K2K_DEVICE void store_state(float* state, const ForwardRow& place, int h, const ForwardOutput& out,
                            const tile::OnlineSoftmax& softmax) {
    const int pair = arch::lane_id() % 4;
    float* to = state + place.row * kStateFloats;
    tile::store_row(to + 2 * pair, out, h, place.real ? kVDim - 2 * pair : 0, /*aligned=*/true);
    if (!place.real) return;
    to[kStateTotals + pair] = softmax.total[h];
    if (pair == 0) to[kStateMaximum] = softmax.maximum[h];
}

template <class T>
K2K_DEVICE void attend(MlaPrefillForwardStorage& smem, const MlaPrefillParams& p) {
    const int lane = arch::lane_id(), warp = arch::warp_id(), warpgroup = warp / 4;
    const int row = warp * 16 + lane / 4, pair = lane % 4;  // of the tile
    const arch::Swizzle swizzle = arch::Swizzle::k128;
    const uint64_t q =
        arch::matrix_descriptor(&smem.q[0].chunks[warpgroup * 64 * 8], swizzle, 0, 1024);
    const uint64_t k_stages = arch::matrix_descriptor(smem.k, swizzle, 0, 1024);
    const uint64_t v_stages = arch::matrix_descriptor(smem.v, swizzle, sizeof(ForwardBox), 1024);
    const float scale2 = p.in.scale * tile::kLog2E;

    ForwardStage stage;
    uint32_t q_parity = 0;
    for (TaskPosition at;; at.advance()) {
        const MlaPrefillTask& task = next_task(smem.tasks, at);
        if (task.last) return;
        const int keys = task.keys, end_key = end_of_keys(task);
        // This thread's first row sees the keys below `border`, the next row one more.
        const int border = task.tile + row + task.diagonal + 1;
        const int warp_border = border - lane / 4;

        // Prologue of a task: begin with nothing, or with the sums of the pieces before.
        ForwardOutput out;
        tile::OnlineSoftmax softmax;
        softmax.reset();
        K2K_UNROLL
        for (float& value : out) value = 0;
        if (p.state_in != nullptr) {
            load_state(p.state_in, forward_row(p.in, task, row), 0, out, softmax);
            load_state(p.state_in, forward_row(p.in, task, row + 8), 1, out, softmax);
        }

        if (end_key > 0) {
            float factor[2];  // of the output before the next P V
            bool rescale;     // whether one of them is not 1, in the warp
            ForwardP probabilities;
            // Releases K, and Q after the tile's last scores; masks what a row does not see; turns
            // scores into probabilities.
            const auto scores_to_probabilities = [&](ForwardScores& scores, int key) {
                tile::warp_arrive(smem.k_empty[stage.slot]);
                if (key + kForwardKeys >= end_key) tile::warp_arrive(smem.q_empty);
                if (key + kForwardKeys > warp_border || key + kForwardKeys > keys) {
                    K2K_UNROLL
                    for (int h = 0; h < 2; ++h) {
                        const int sees = border + 8 * h < keys ? border + 8 * h : keys;
                        tile::mask_row(scores, h, key + 2 * pair, sees);
                    }
                }
                rescale = softmax.update(scores, factor, scale2);
            };
            const auto k = [&] {
                return k_stages + stage.slot * arch::descriptor_step(sizeof smem.k[0]);
            };
            const auto v = [&](int slot) {
                return v_stages + slot * arch::descriptor_step(sizeof smem.v[0]);
            };

            const auto wait_for_next_k = [&](int key) {
                const ForwardStage next = stage_after(stage);
                if (key + kForwardKeys >= end_key) return;
                arch::mbarrier_wait(smem.k_full[next.slot], next.parity);
            };

            // The first block's scores and softmax.
            arch::mbarrier_wait(smem.q_full, q_parity);
            q_parity ^= 1;
            arch::mbarrier_wait(smem.k_full[stage.slot], stage.parity);
            {
                ForwardScores scores;
                start_scores<T>(scores, q, k());
                arch::wgmma_wait<0>(reinterpret_cast<float (&)[kForwardKeys / 2]>(scores));
                scores_to_probabilities(scores, 0);
                round_scores<T>(probabilities, scores);
            }
            wait_for_next_k(0);
            int key = kForwardKeys;
            for (; key < end_key; key += kForwardKeys) {
                const ForwardStage before = stage;
                stage = stage_after(stage);
                // Start this block's scores.
                ForwardScores scores;
                start_scores<T>(scores, q, k());
                // Rescale the output if a row maximum of the warp grew in the block before; start
                // that block's P V.
                if (rescale) scale(out, factor);
                arch::mbarrier_wait(smem.v_full[before.slot], before.parity);
                start_output<T>(out, probabilities, v(before.slot));
                // Softmax of this block, while P V runs.
                arch::wgmma_wait<1>(reinterpret_cast<float (&)[kForwardKeys / 2]>(scores));
                scores_to_probabilities(scores, key);
                // Wait for the next K. (Without a branch here, ptxas moves the wait for P V up,
                // before the softmax.)
                wait_for_next_k(key);
                // Release V; round the probabilities.
                arch::wgmma_wait<0>(out);
                tile::warp_arrive(smem.v_empty[before.slot]);
                round_scores<T>(probabilities, scores);
            }
            // The last block's P V, without its rows beyond the sequence.
            if (rescale) scale(out, factor);
            arch::mbarrier_wait(smem.v_full[stage.slot], stage.parity);
            if (key > keys) {
                tile::clear_rows<1>(&smem.v[stage.slot][warpgroup], keys - key + kForwardKeys,
                                    kWarpgroupClears + warpgroup);
                arch::barrier_sync(kBothCleared, 256);
            }
            start_output<T>(out, probabilities, v(stage.slot));
            arch::wgmma_wait<0>(out);
            tile::warp_arrive(smem.v_empty[stage.slot]);
            stage = stage_after(stage);
        }

        // Epilogue: the sums as they are, for the next piece, or the results.
        if (p.state_out != nullptr) {
            store_state(p.state_out, forward_row(p.in, task, row), 0, out, softmax);
            store_state(p.state_out, forward_row(p.in, task, row + 8), 1, out, softmax);
        } else {
            softmax.finish(/*bad=*/false);
            const float normalizer[2] = {softmax.normalizer(0), softmax.normalizer(1)};
            scale(out, normalizer);
            K2K_UNROLL
            for (int h = 0; h < 2; ++h) {
                const ForwardRow place = forward_row(p.in, task, row + 8 * h);
                T* to = static_cast<T*>(p.out) + place.row * kVDim + 2 * pair;
                tile::store_row(to, out, h, place.real ? kVDim - 2 * pair : 0, /*aligned=*/true);
                if (pair != 0 || !place.real) continue;
                p.lse[place.row] = softmax.lse2(scale2, h) * tile::kLn2;
                if (p.max_logits != nullptr) {
                    p.max_logits[place.row] = softmax.max_logit(p.in.scale, h);
                }
            }
        }
        tile::warp_arrive(smem.tasks.done[at.slot]);
    }
}

template <class T>
__global__ void __launch_bounds__(kForwardThreads, 1)
    mla_prefill_sm90_kernel(const __grid_constant__ MlaPrefillParams p,
                            const __grid_constant__ ForwardMaps maps) {
    MlaPrefillForwardStorage& smem = arch::shared_storage<MlaPrefillForwardStorage>();
    const int warp = arch::warp_id();
    if (threadIdx.x == 0) make_barriers(smem);
    arch::sync_block();

    // Roles.
    if (warp < 8) {
        arch::registers_increase<216>();
        attend<T>(smem, p);
    } else {
        arch::registers_decrease<72>();
        if (warp == 8) {
            if (arch::elect_one()) load_forward(smem, p.in, maps);
        } else if (warp == 9) {
            find_tasks<TileAxis::kQueries, kForwardRows>(smem.tasks, p.in, p.ticket);
        }
    }
}

}  // namespace k2k
