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
//           and V of a stage have barriers of their own: K is free a step earlier, and its next
//           block is loaded before V of the present one.
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
#include "mla_prefill/pipeline_sm90.cuh"
#include "mla_prefill/task_queue.cuh"
#include "tile/online_softmax.cuh"
#include "tile/store_row.cuh"

namespace k2k {

constexpr int kHopperForwardKeys = 128;  // of a block

struct ForwardMaps {
    arch::TensorMap q;
    KeyMaps keys;
};

struct MlaForwardSm90Storage {
    tile::SwizzledBox<kHopperRows> q[kQkBoxes];  // [128 queries, 192]
    KeyRing<kHopperForwardKeys> ring;
    PrefillTasks tasks;
    arch::Mbarrier q_full, q_empty;
};
static_assert(sizeof(MlaForwardSm90Storage) <= 232448);

K2K_DEVICE void make_barriers(MlaForwardSm90Storage& smem) {
    make_barriers(smem.ring);
    make_task_barriers(smem.tasks, 9);
    arch::mbarrier_init(smem.q_full, 1);
    arch::mbarrier_init(smem.q_empty, 8);
    arch::fence_mbarrier_init();
}

// ---- producer

// One thread calls it.
K2K_DEVICE void load_forward(MlaForwardSm90Storage& smem, const MlaPrefillInputs& in,
                             const ForwardMaps& maps) {
    HopperStage stage;
    uint32_t q_parity = 1;
    for (TaskPosition at;; at.advance()) {
        const MlaPrefillTask& task = next_task(smem.tasks, at);
        if (task.last) return;
        const int head = task.head, end_key = end_of_keys(task);
        const auto load_k_of = [&](HopperStage of, int key) {
            load_k(smem.ring, of, maps.keys, head, rope_head(in, head), task.first_key + key);
        };
        if (end_key > 0) {
            load_k_of(stage, 0);
            // Q of the tile, after its first K: only Q waits for the scores of the last tile.
            arch::mbarrier_wait(smem.q_empty, q_parity);
            q_parity ^= 1;
            arch::mbarrier_arrive_expect_tx(smem.q_full, sizeof smem.q);
            for (int i = 0; i < kQkBoxes; ++i) {
                arch::tma_load_3d(&smem.q[i], maps.q, smem.q_full, i * kBoxColumns, head,
                                  task.first_query + task.tile, arch::CacheHint::kEvictFirst);
            }
        }
        for (int key = 0; key < end_key; key += kHopperForwardKeys, stage.advance()) {
            // K of the next block before V of this one: it is free earlier, and needed earlier.
            const int next = key + kHopperForwardKeys;
            if (next < end_key) load_k_of(stage_after(stage), next);
            load_v(smem.ring, stage, maps.keys, head, task.first_key + key);
        }
        arch::mbarrier_arrive(smem.tasks.done[at.slot]);
    }
}

// ---- consumers

// [64, 128] of a warpgroup in wgmma's accumulator layout: output[4 j + 2 h + e] is column
// 8 j + 2 (lane % 4) + e of the thread's row h.
using ForwardOutput = float[kVDim / 2];
using ForwardScores = float[kHopperForwardKeys / 8][4];

K2K_DEVICE void scale(ForwardOutput& out, const float (&factor)[2]) {
    K2K_UNROLL
    for (int i = 0; i < kVDim / 2; ++i) out[i] *= factor[i / 2 % 2];
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
K2K_DEVICE void attend(MlaForwardSm90Storage& smem, const MlaPrefillParams& p) {
    const int warp = arch::warp_id(), pair = arch::lane_id() % 4;
    const int warpgroup = arch::shuffle(warp / 4, 0);  // uniform, as descriptors have to be
    const int row = warp * 16 + arch::lane_id() / 4;   // of the tile
    auto& ring = smem.ring;
    const arch::Swizzle swizzle = arch::Swizzle::k128;
    const uint64_t q =
        arch::matrix_descriptor(&smem.q[0].chunks[warpgroup * 64 * 8], swizzle, 0, 1024);
    const uint64_t k = arch::matrix_descriptor(ring.k, swizzle, 0, 1024);
    const uint64_t v = arch::matrix_descriptor(ring.v, swizzle, sizeof ring.v[0][0], 1024);
    constexpr uint64_t kKStage = arch::descriptor_step(sizeof ring.k[0]);
    constexpr uint64_t kVStage = arch::descriptor_step(sizeof ring.v[0]);
    const float scale2 = p.in.scale * tile::kLog2E;

    HopperStage stage;
    uint32_t q_parity = 0;
    for (TaskPosition at;; at.advance()) {
        const MlaPrefillTask& task = next_task(smem.tasks, at);
        if (task.last) return;
        const int end_key = end_of_keys(task);
        const Borders sees = borders_of(task, row);

        // Prologue of a task: begin with nothing, or with the sums of the pieces before.
        ForwardOutput out;
        tile::OnlineSoftmax softmax;
        softmax.reset();
        K2K_UNROLL
        for (int i = 0; i < kVDim / 2; ++i) out[i] = 0;
        if (p.state_in != nullptr) {
            load_state(p.state_in, forward_row(p.in, task, row), 0, out, softmax);
            load_state(p.state_in, forward_row(p.in, task, row + 8), 1, out, softmax);
        }

        if (end_key > 0) {
            float factor[2];  // of the output before the next P V
            bool rescale;     // whether one of them is not 1, in the warp
            Operands<kHopperForwardKeys> probabilities;
            // Releases K, and Q after the tile's last scores; masks what a row does not see; turns
            // scores into probabilities.
            const auto soften = [&](ForwardScores& scores, int key) {
                tile::warp_arrive(ring.k_empty[stage.slot]);
                if (key + kHopperForwardKeys >= end_key) tile::warp_arrive(smem.q_empty);
                if (key + kHopperForwardKeys > sees.warp) {
                    tile::mask_row(scores, 0, key, sees.row[0]);
                    tile::mask_row(scores, 1, key, sees.row[1]);
                }
                rescale = softmax.update(scores, factor, scale2);
            };
            const auto wait_for_next_k = [&](int key) {
                const HopperStage next = stage_after(stage);
                if (key + kHopperForwardKeys >= end_key) return;
                arch::mbarrier_wait(ring.k_full[next.slot], next.parity);
            };

            // The first block's scores and softmax.
            arch::mbarrier_wait(smem.q_full, q_parity);
            q_parity ^= 1;
            arch::mbarrier_wait(ring.k_full[stage.slot], stage.parity);
            {
                ForwardScores scores;
                start_scores<T, kQkDim>(scores, q, k + stage.slot * kKStage);
                arch::wgmma_wait<0>(flat(scores));
                soften(scores, 0);
                round_scores<T>(probabilities, scores);
            }
            wait_for_next_k(0);
            int key = kHopperForwardKeys;
            for (; key < end_key; key += kHopperForwardKeys) {
                const HopperStage before = stage;
                stage = stage_after(stage);
                // Start this block's scores.
                ForwardScores scores;
                start_scores<T, kQkDim>(scores, q, k + stage.slot * kKStage);
                // Rescale the output if a row maximum of the warp grew in the block before; start
                // that block's P V.
                if (rescale) scale(out, factor);
                arch::mbarrier_wait(ring.v_full[before.slot], before.parity);
                start_sums<T, kVDim>(out, probabilities, v + before.slot * kVStage);
                // Softmax of this block, while P V runs.
                arch::wgmma_wait<1>(flat(scores));
                soften(scores, key);
                // Wait for the next K. (Without a branch here, ptxas moves the wait for P V up,
                // before the softmax.)
                wait_for_next_k(key);
                // Release V; round the probabilities.
                arch::wgmma_wait<0>(out);
                tile::warp_arrive(ring.v_empty[before.slot]);
                round_scores<T>(probabilities, scores);
            }
            // The last block's P V, without its rows beyond the sequence.
            if (rescale) scale(out, factor);
            arch::mbarrier_wait(ring.v_full[stage.slot], stage.parity);
            const int valid = task.keys - (key - kHopperForwardKeys);
            if (valid < kHopperForwardKeys) {
                tile::clear_rows<1>(&ring.v[stage.slot][warpgroup], valid,
                                    kOneWarpgroup + warpgroup);
                arch::barrier_sync(kBothWarpgroups, 256);
            }
            start_sums<T, kVDim>(out, probabilities, v + stage.slot * kVStage);
            arch::wgmma_wait<0>(out);
            tile::warp_arrive(ring.v_empty[stage.slot]);
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
__global__ void __launch_bounds__(kHopperThreads, 1)
    mla_prefill_forward_sm90_kernel(const __grid_constant__ MlaPrefillParams p,
                                    const __grid_constant__ ForwardMaps maps) {
    MlaForwardSm90Storage& smem = arch::shared_storage<MlaForwardSm90Storage>();
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
            find_tasks<TileAxis::kQueries, kHopperRows>(smem.tasks, p.in, p.ticket);
        }
    }
}

}  // namespace k2k
