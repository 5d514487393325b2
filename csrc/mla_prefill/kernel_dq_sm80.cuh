#pragma once

// MLA prefill, backward: gradients of queries, for every GPU from sm_80 on.
//
//     P[q, k]  = exp2(scale2 Q K^T - lse2[q])          scale2 = scale log2(e)
//     dS[q, k] = P * (dO V^T - delta[q])
//     dQ = scale dS K                                  of one head, sums over its keys
//
// Grid      persistent, two CTAs of 4 warps per SM. Tasks (64 queries of one head) come from the
//           longest-first scheduler of schedule.cuh, by tickets.
// Warps     no roles: all copy and multiply; warp 0 also finds the tasks. A warp has 16 queries.
// q, dO     from global memory to registers, as operand A, once per task.
// Step      32 keys, in blocks from key 0 of the sequence on, ascending; 16 keys at a time:
//             1. scores     S = Q K^T and dP = dO V^T: mma.sync, K and V by ldmatrix
//             2. dS         P is computed again from lse2; dS has operand A's layout
//             3. dQ         dS K, the same K by ldmatrix.trans
// Copies    cp.async into two stages of K and V, one step ahead.
// Barriers  task_done, task_known  sync_block, before and after warp 0 writes the next task
//           step_landed    sync_block: the step has landed; the stage of the one before has been read
// Tails     dS is selected to 0 where a query does not see a key: 0 * NaN would be NaN; rows of K
//           and V after the sequence are zero-filled. Rows of q and dO after it are zeros and are
//           not stored.
// Bits      of a row depend on its own q, dO and keys alone, as in the forward.
// Shared    two stages of K 12 KB and V 8 KB: two CTAs in 99 KB.
// Registers of a thread: dQ 96, q 48, dO 32, S 8, dP 8.
// Limits    bfloat16 or float16; 192/128 dims. Rows begin at multiples of 16 bytes.

#include "arch/convert.cuh"
#include "arch/smem.cuh"
#include "mla_prefill/config.h"
#include "mla_prefill/rows_sm80.cuh"
#include "mla_prefill/schedule.cuh"
#include "tile/online_softmax.cuh"
#include "tile/store_row.cuh"

namespace k2k {

constexpr int kDqRows = 64, kDqKeys = 32, kDqThreads = 128;
constexpr int kDqCtas = 2;  // per SM

using DqTasks = LongestFirst<TileAxis::kQueries, kDqRows>;

struct alignas(128) MlaDqSm80Storage {
    struct Stage {
        uint4 k[kDqKeys * kQkBytes / 16];  // [32, 192]
        uint4 v[kDqKeys * kVBytes / 16];   // [32, 128]
    } stages[2];
    DqTasks tasks;  // warp 0's scheduler
    MlaPrefillTask task;
};
static_assert(fits_sm(sizeof(MlaDqSm80Storage), kDqCtas));

template <class T>
__global__ void __launch_bounds__(kDqThreads, kDqCtas)
    mla_prefill_dq_sm80_kernel(const __grid_constant__ MlaPrefillBackwardParams p) {
    auto& storage = arch::shared_storage<MlaDqSm80Storage>();
    const int lane = arch::lane_id(), warp = arch::warp_id();
    // Accumulator layout of mma.sync: a thread has queries `row` and `row` + 8, and of each 8 keys
    // or columns 2 `pair` and 2 `pair` + 1.
    const int row = warp * 16 + lane / 4, pair = lane % 4;
    const float scale2 = p.in.scale * tile::kLog2E;

    const MlaPrefillTask& task = storage.task;
    make_scheduler(storage.tasks, p.in);
    for (;;) {
        find_next_task(storage.tasks, storage.task, p.in, p.tickets + 1);
        if (task.last) return;

        // Prologue: start the copies of the first step.
        const auto copy_step = [&](int place, int key) {
            auto& stage = storage.stages[place];
            copy_k<T, kDqThreads, kDqKeys>(arch::smem_address(stage.k), p.in, task, key);
            copy_v<T, kDqThreads, kDqKeys>(arch::smem_address(stage.v), p.in, task, key);
        };
        const int end = end_of_keys(task);
        if (end > 0) copy_step(0, 0);
        arch::cp_async_commit();

        // Load q and dO, as operand A in registers, and the rows' numbers.
        uint32_t q[kQkDim / 16][4], grad_out[kVDim / 16][4];
        float lse2[2], delta[2];
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            const bool real = row + 8 * h < task.rows;
            const int64_t token = task.first_query + task.tile + (real ? row + 8 * h : 0);
            load_fragments(
                q, h,
                row_of<T>(p.in.q, token, p.in.q_token_stride, task.head, p.in.q_head_stride) +
                    2 * pair,
                real);
            load_fragments(grad_out, h,
                           row_of<T>(p.grad_out, token, p.grad_out_token_stride, task.head,
                                     p.grad_out_head_stride) +
                               2 * pair,
                           real);
            const int64_t at = task.head * int64_t(p.in.q_tokens) + token;
            lse2[h] = real ? p.lse2[at] : INFINITY;
            delta[h] = real ? p.delta[at] : 0;
        }
        float sums[kQkDim / 8][4];  // dQ / scale [16, 192] of the warp
        clear(sums);

        const auto border = [&](int h) { return border_of(task, row + 8 * h); };
        int place = 0;
        for (int first = 0; first < end; first += kDqKeys, place ^= 1) {
            arch::cp_async_wait<0>();
            arch::sync_block();  // step_landed
            if (first + kDqKeys < end) copy_step(place ^ 1, first + kDqKeys);
            arch::cp_async_commit();
            const uint32_t k_shared = arch::smem_address(storage.stages[place].k);
            const uint32_t v_shared = arch::smem_address(storage.stages[place].v);

            K2K_UNROLL
            for (int key = 0; key < kDqKeys; key += 16) {
                // 1. S = Q K^T and dP = dO V^T of 16 keys, in turn: four sums in flight.
                float s[2][4] = {}, grad[2][4] = {};  // [16, 16]
                const uint32_t k = tile::ldmatrix_address<false, false, kQkBytes>(k_shared, key, 0);
                const uint32_t v = tile::ldmatrix_address<false, false, kVBytes>(v_shared, key, 0);
                K2K_UNROLL
                for (int i = 0; i < kQkDim / 16; ++i) {
                    multiply_by_rows<T, kQkBytes>(s, q[i], k, i);
                    if (i < kVDim / 16) multiply_by_rows<T, kVBytes>(grad, grad_out[i], v, i);
                }
                // 2. dS = P (dP - delta), 0 where the query does not see the key.
                K2K_UNROLL
                for (int j = 0; j < 2; ++j) {
                    K2K_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        s[j][i] = arch::exp2_approx(fmaf(s[j][i], scale2, -lse2[i / 2])) *
                                  (grad[j][i] - delta[i / 2]);
                    }
                }
                if (first + key + 16 > border(0)) {
                    K2K_UNROLL
                    for (int h = 0; h < 2; ++h) {
                        const int end_of_row = border(h);
                        K2K_UNROLL
                        for (int i = 0; i < 4; ++i) {
                            const int of_key = first + key + 8 * (i / 2) + 2 * pair + i % 2;
                            if (of_key >= end_of_row) s[i / 2][2 * h + i % 2] = 0;
                        }
                    }
                }
                // 3. dQ += dS K.
                uint32_t grad_scores[4];
                to_fragment<T>(grad_scores, s, 0);
                multiply_by_columns<T, kQkDim / 8>(
                    sums, grad_scores,
                    tile::ldmatrix_address<false, true, kQkBytes>(k_shared, key, 0));
            }
        }

        // Epilogue: round and store from registers.
        float values[kQkDim / 2];
        scaled<kQkDim / 8>(values, sums, p.in.scale);
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            const bool real = row + 8 * h < task.rows;
            const int64_t token = task.first_query + task.tile + row + 8 * h;
            T* to = static_cast<T*>(p.grad_q) + (token * p.in.heads + task.head) * kQkDim;
            tile::store_row(to + 2 * pair, values, h, real ? kQkDim - 2 * pair : 0,
                            /*aligned=*/true);
        }
    }
}

}  // namespace k2k
