#pragma once

// MLA prefill, backward: gradients of keys and values, for every GPU from sm_80 on.
//
//     P^T[k, q]  = exp2(scale2 K Q^T - lse2[q])          scale2 = scale log2(e)
//     dS^T[k, q] = P^T * (V dO^T - delta[q])
//     dV = P^T dO      dK = scale dS^T Q                 of one head, sums over its queries
//
// Grid      persistent, one CTA of 8 warps per SM. Tasks (64 keys of one head) come from the
//           longest-first scheduler of schedule.cuh, by tickets.
// Roles     four pairs of warps, each with 16 keys; dK and dV of them are too many registers for
//           one warp, and the products divide evenly:
//             Score   S^T = K Q^T (192 dims), P^T = exp2, dV += P^T dO (128 columns)
//             Grad    dP^T = V dO^T (128 dims), dS^T,     dK += dS^T Q (192 columns)
//           Grad is one step behind Score. A warp of each shares a quarter of the SM: one
//           multiplies while the other computes P^T or dS^T. P^T crosses through shared memory,
//           rounded; both have the same layout, so each thread reads what the same thread of the
//           other role wrote. All warps copy; warp 0 also finds the tasks.
// K, V      from global memory to registers, as operand A, once per task: K of Score, V of Grad.
// Step      32 queries, in blocks from query 0 of the sequence on, ascending; the first is that of
//           the first query which sees a key of the tile. Fixed order, no atomics: the bits of a
//           key's gradients depend on its sequence alone.
// Copies    cp.async into a ring of four stages of Q, dO, lse2 and delta: Score reads one, Grad the
//           one before, two are in flight.
// Barriers  task_done, task_known  sync_block, before and after warp 0 writes the next task
//           step_landed    sync_block once a step: Score's stage has landed, P^T of Grad's step is
//                          written; the stage that is filled next and the P^T that is written next
//                          have been read
// Tails     P^T and dS^T are both selected to 0 where a query does not see a key: 0 * NaN would be
//           NaN. Rows of Q and dO after the sequence are zero-filled. A NaN in dO of a query
//           that does not see a key still reaches the key's dV, if a step has both: 0 * NaN.
// Epilogue  from registers. The rope part of dK goes to grad_k, or, if all heads share it, as
//           floats to rope_parts, which kernel_preprocess.cuh adds up.
// Shared    four stages of 20.25 KB, two P^T of 4 KB: 89 KB.
// Registers of a thread: dV 64 and K 48, or dK 96 and V 32; S^T or dP^T 16.
// Limits    bfloat16 or float16; 192/128 dims. Rows begin at multiples of 16 bytes.

#include "arch/convert.cuh"
#include "arch/smem.cuh"
#include "mla_prefill/config.h"
#include "mla_prefill/rows_sm80.cuh"
#include "mla_prefill/schedule.cuh"
#include "tile/online_softmax.cuh"
#include "tile/store_row.cuh"

namespace k2k {

constexpr int kDkvKeys = 64, kDkvQueries = 32, kDkvThreads = 256;
constexpr int kDkvStages = 4;

using DkvTasks = LongestFirst<TileAxis::kKeys, kDkvKeys>;

struct alignas(128) MlaDkvSm80Storage {
    struct Stage {
        uint4 q[kDkvQueries * kQkBytes / 16];        // [32, 192]
        uint4 grad_out[kDkvQueries * kVBytes / 16];  // [32, 128]
        float lse2[kDkvQueries], delta[kDkvQueries];
    } stages[kDkvStages];
    uint4 p[2][kDkvQueries / 16][kDkvThreads / 2];  // fragments of P^T, by 16 queries and thread
    DkvTasks tasks;                                 // warp 0's scheduler
    MlaPrefillTask task;
};
static_assert(fits_sm(sizeof(MlaDkvSm80Storage), /*ctas=*/1));
static_assert(sizeof(MlaDkvSm80Storage::Stage) % 128 == 0);

// Starts this thread's copies of the step that begins with `query`.
template <class T>
K2K_DEVICE void copy_step(MlaDkvSm80Storage::Stage& stage, const MlaPrefillBackwardParams& p,
                          const MlaPrefillTask& task, int query) {
    const int64_t token = task.first_query + query;
    const int left = task.queries - query;
    copy_rows<kDkvThreads, kDkvQueries, kQkDim, kQkBytes>(
        arch::smem_address(stage.q),
        row_of<T>(p.in.q, token, p.in.q_token_stride, task.head, p.in.q_head_stride),
        p.in.q_token_stride, left);
    copy_rows<kDkvThreads, kDkvQueries, kVDim, kVBytes>(
        arch::smem_address(stage.grad_out),
        row_of<T>(p.grad_out, token, p.grad_out_token_stride, task.head, p.grad_out_head_stride),
        p.grad_out_token_stride, left);
    // Warp 0 copies lse2, warp 1 delta: 4 bytes each, sequences begin anywhere.
    const int row = arch::lane_id(), warp = arch::warp_id();
    if (warp < 2) {
        const float* from = (warp == 0 ? p.lse2 : p.delta) + task.head * int64_t(p.in.q_tokens) +
                            token + (row < left ? row : 0);
        float* to = (warp == 0 ? stage.lse2 : stage.delta) + row;
        arch::cp_async<4>(arch::smem_address(to), from, row < left);
    }
}

template <class T>
__global__ void __launch_bounds__(kDkvThreads, 1)
    mla_prefill_dkv_sm80_kernel(const __grid_constant__ MlaPrefillBackwardParams p) {
    auto& storage = arch::shared_storage<MlaDkvSm80Storage>();
    const int lane = arch::lane_id(), warp = arch::warp_id() % 4;
    const bool scores = arch::warp_id() < 4;
    const int thread = threadIdx.x % (kDkvThreads / 2);
    // Accumulator layout of mma.sync: a thread has keys `row` and `row` + 8, and of each 8 queries
    // or columns 2 `pair` and 2 `pair` + 1.
    const int row = warp * 16 + lane / 4, pair = lane % 4;
    const float scale2 = p.in.scale * tile::kLog2E;

    const MlaPrefillTask& task = storage.task;
    make_scheduler(storage.tasks, p.in);
    for (;;) {
        find_next_task(storage.tasks, storage.task, p.in, p.tickets);
        if (task.last) return;

        // Prologue: start the copies of two steps.
        const int first = first_of_queries(task) / kDkvQueries * kDkvQueries;
        const int steps = ceil_div(task.queries - first, kDkvQueries);
        K2K_NO_UNROLL
        for (int i = 0; i < 2; ++i) {
            if (i < steps) copy_step<T>(storage.stages[i], p, task, first + i * kDkvQueries);
            arch::cp_async_commit();
        }
        // Load K or V, as operand A in registers; rows after the tile are zeros.
        uint32_t keys[kQkDim / 16][4];  // Score: K [16, 192]; Grad: V [16, 128]
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            const bool real = row + 8 * h < task.rows && steps > 0;
            const int64_t token = task.first_key + task.tile + (real ? row + 8 * h : 0);
            const auto load = [&](auto& fragments, const T* from) {
                load_fragments(fragments, h, from + 2 * pair, real);
            };
            if (scores) {
                load(reinterpret_cast<uint32_t (&)[kNope / 16][4]>(keys),
                     row_of<T>(p.in.k, token, p.in.k_token_stride, task.head, p.in.k_head_stride));
                load(reinterpret_cast<uint32_t (&)[kRopeDims / 16][4]>(keys[kNope / 16]),
                     row_of<T>(p.in.k_rope, token, p.in.k_rope_token_stride, task.head,
                               p.in.k_rope_head_stride));
            } else {
                load(reinterpret_cast<uint32_t (&)[kVDim / 16][4]>(keys),
                     row_of<T>(p.in.v, token, p.in.v_token_stride, task.head, p.in.v_head_stride));
            }
        }

        float sums[kQkDim / 8][4];  // Score: dV [16, 128]; Grad: dK / scale [16, 192]
        clear(sums);
        K2K_NO_UNROLL
        for (int step = 0; step < (steps > 0 ? steps + 1 : 0); ++step) {
            arch::cp_async_wait<1>();
            arch::sync_block();  // step_landed
            if (step + 2 < steps) {
                copy_step<T>(storage.stages[(step + 2) % kDkvStages], p, task,
                             first + (step + 2) * kDkvQueries);
            }
            arch::cp_async_commit();

            float s[kDkvQueries / 8][4] = {};  // [16, 32]
            if (scores && step < steps) {
                const auto& stage = storage.stages[step % kDkvStages];
                const uint32_t q_shared = arch::smem_address(stage.q);
                const uint32_t grad_out_shared = arch::smem_address(stage.grad_out);
                // 1. S^T = K Q^T.
                K2K_UNROLL
                for (int i = 0; i < kQkDim / 16; ++i) {
                    multiply_by_rows<T, kQkBytes>(
                        s, keys[i], tile::ldmatrix_address<false, false, kQkBytes>(q_shared, 0, 0),
                        i);
                }
                // 2. P^T, 0 where the query does not see the key.
                K2K_UNROLL
                for (int j = 0; j < kDkvQueries / 8; ++j) {
                    const float2 lse2 =
                        *reinterpret_cast<const float2*>(stage.lse2 + 8 * j + 2 * pair);
                    K2K_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        const float shift = i % 2 == 0 ? lse2.x : lse2.y;
                        s[j][i] = arch::exp2_approx(fmaf(s[j][i], scale2, -shift));
                    }
                }
                const int query = first + step * kDkvQueries;
                if (task.tile + warp * 16 + 15 > query + task.diagonal ||
                    query + kDkvQueries > task.queries) {
                    K2K_UNROLL
                    for (int h = 0; h < 2; ++h) {
                        // The queries that see the thread's key: [first_seen, end).
                        const int first_seen = task.tile + row + 8 * h - task.diagonal;
                        const int end = task.queries;
                        K2K_UNROLL
                        for (int i = 0; i < kDkvQueries / 4; ++i) {
                            const int of_query = query + 8 * (i / 2) + 2 * pair + i % 2;
                            const bool seen = (of_query >= first_seen) & (of_query < end);
                            float& probability = s[i / 2][2 * h + i % 2];
                            probability = seen ? probability : 0;
                        }
                    }
                }
                K2K_UNROLL
                for (int i = 0; i < kDkvQueries / 16; ++i) {
                    // 3. Hand P^T to the Grad warp.
                    uint32_t words[4];
                    to_fragment<T>(words, s, i);
                    storage.p[step % 2][i][thread] =
                        make_uint4(words[0], words[1], words[2], words[3]);
                    // 4. dV += P^T dO.
                    multiply_by_columns<T, kVDim / 8>(
                        sums, words,
                        tile::ldmatrix_address<false, true, kVBytes>(grad_out_shared, i * 16, 0));
                }
            }
            if (!scores && step > 0) {
                const auto& stage = storage.stages[(step - 1) % kDkvStages];
                const uint32_t q_shared = arch::smem_address(stage.q);
                const uint32_t grad_out_shared = arch::smem_address(stage.grad_out);
                // 1. dP^T = V dO^T.
                K2K_UNROLL
                for (int i = 0; i < kVDim / 16; ++i) {
                    multiply_by_rows<T, kVBytes>(
                        s, keys[i],
                        tile::ldmatrix_address<false, false, kVBytes>(grad_out_shared, 0, 0), i);
                }
                K2K_UNROLL
                for (int i = 0; i < kDkvQueries / 16; ++i) {
                    // 2. dS^T = P^T (dP^T - delta), 0 where P^T is 0.
                    const uint4 fragment = storage.p[(step - 1) % 2][i][thread];
                    uint32_t words[4] = {fragment.x, fragment.y, fragment.z, fragment.w};
                    K2K_UNROLL
                    for (int w = 0; w < 4; ++w) {
                        const int j = 2 * i + w / 2;
                        const float2 delta =
                            *reinterpret_cast<const float2*>(stage.delta + 8 * j + 2 * pair);
                        const float p0 = tile::unpack<T>(words[w], 0);
                        const float p1 = tile::unpack<T>(words[w], 1);
                        const float* two = s[j] + w % 2 * 2;
                        const float d0 = p0 == 0 ? 0 : p0 * (two[0] - delta.x);
                        const float d1 = p1 == 0 ? 0 : p1 * (two[1] - delta.y);
                        words[w] = tile::pack<T>(d0, d1);
                    }
                    // 3. dK += dS^T Q.
                    multiply_by_columns<T, kQkDim / 8>(
                        sums, words,
                        tile::ldmatrix_address<false, true, kQkBytes>(q_shared, i * 16, 0));
                }
            }
        }

        // Epilogue: round and store from registers.
        const int64_t token = task.first_key + task.tile + row;
        const auto columns = [&](int h, int of_row) {
            return row + 8 * h < task.rows ? of_row - 2 * pair : 0;
        };
        if (scores) {
            T* to = static_cast<T*>(p.grad_v) + token * p.grad_v_token_stride +
                    task.head * p.grad_v_head_stride + 2 * pair;
            float values[kVDim / 2];
            scaled<kVDim / 8>(values, sums, 1);
            K2K_UNROLL
            for (int h = 0; h < 2; ++h) {
                tile::store_row(to + 8 * h * p.grad_v_token_stride, values, h, columns(h, kVDim),
                                /*aligned=*/true);
            }
        } else {
            T* to = static_cast<T*>(p.grad_k) + token * p.grad_k_token_stride +
                    task.head * p.grad_k_head_stride + 2 * pair;
            float nope[kNope / 2], rope[kRopeDims / 2];
            scaled<kNope / 8>(nope, sums, p.in.scale);
            scaled<kRopeDims / 8>(rope, sums + kNope / 8, p.in.scale);
            K2K_UNROLL
            for (int h = 0; h < 2; ++h) {
                T* of_row = to + 8 * h * p.grad_k_token_stride;
                tile::store_row(of_row, nope, h, columns(h, kNope), /*aligned=*/true);
                if (p.rope_parts == nullptr) {
                    tile::store_row(of_row + kNope, rope, h, columns(h, kRopeDims),
                                    /*aligned=*/true);
                } else {
                    float* part = p.rope_parts + 2 * pair +
                                  (task.head * int64_t(p.in.k_tokens) + token + 8 * h) * kRopeDims;
                    tile::store_row(part, rope, h, columns(h, kRopeDims), /*aligned=*/true);
                }
            }
        }
    }
}

}  // namespace k2k
