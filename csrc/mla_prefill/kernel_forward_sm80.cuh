#pragma once

// MLA prefill, forward, for every GPU from sm_80 on: attention of whole sequences with expanded
// keys and values.
//
//     S[q, k] = scale * Q[q, :192] . K[k, :192]        of one head; K = [nope 128 | rope 64]
//     out[q, :128] = softmax_k(S[q, :]) V[k, :128],  lse[q], max_logits[q]
//
// Grid      persistent, two CTAs of 4 warps per SM. Tasks (64 queries of one head) come from the
//           longest-first scheduler of schedule.cuh, by tickets.
// Warps     no roles: all copy and multiply; warp 0 also finds the tasks. A warp has 16 queries.
// q         from global memory to registers, as operand A, once per task.
// Step      64 keys, in blocks from key 0 of the sequence on, ascending:
//             1. scores     mma.sync m16n8k16, q from registers, K by ldmatrix
//             2. softmax    online, base 2; the output is rescaled only if a maximum grew
//             3. output     P V: P has operand A's layout; V by ldmatrix.trans
// Copies    cp.async, one buffer each: V of a step arrives during its scores, K of the next step
//           during softmax and P V. The other CTA of the SM hides the remaining latency.
// Barriers  task_done, task_known  sync_block, before and after warp 0 writes the next task
//           keys_landed    sync_block: K of the step has landed; V of the one before has been read
//           values_landed  sync_block: V of the step has landed; its K has been read
// Tails     keys that a row does not see are masked by selection; rows of K and V after the
//           sequence are zero-filled; rows of q after it are zeros and are not stored.
// Bits      of a row depend on its own q and keys alone: a block of which it sees nothing changes
//           nothing (factor 1, P 0). So they do not depend on the batch, on its place in a tile, on
//           the number of SMs, nor on whether keys come in one call or in pieces of whole blocks
//           (state_in, state_out: the sums of a row before normalisation, the total as the
//           four lanes of a quad have it: pieces keep the order of additions).
// Shared    K 24 KB + V 16 KB: two CTAs in 99 KB.
// Registers of a thread: output 64, q 48, scores 32, P 4.
// Limits    bfloat16 or float16; 192/128 dims. Rows begin at multiples of 16 bytes.

#include "arch/smem.cuh"
#include "mla_prefill/config.h"
#include "mla_prefill/rows_sm80.cuh"
#include "mla_prefill/schedule.cuh"
#include "tile/online_softmax.cuh"
#include "tile/store_row.cuh"

namespace k2k {

constexpr int kForwardRows = 64, kForwardKeys = 64, kForwardThreads = 128;
constexpr int kForwardCtas = 2;  // per SM

using ForwardTasks = LongestFirst<TileAxis::kQueries, kForwardRows>;

struct alignas(128) MlaForwardSm80Storage {
    uint4 k[kForwardKeys * kQkBytes / 16];  // [64, 192]
    uint4 v[kForwardKeys * kVBytes / 16];   // [64, 128]
    ForwardTasks tasks;                     // warp 0's scheduler
    MlaPrefillTask task;
};
static_assert(fits_sm(sizeof(MlaForwardSm80Storage), kForwardCtas));

template <class T>
__global__ void __launch_bounds__(kForwardThreads, kForwardCtas)
    mla_prefill_forward_sm80_kernel(const __grid_constant__ MlaPrefillParams p) {
    auto& storage = arch::shared_storage<MlaForwardSm80Storage>();
    const uint32_t k_shared = arch::smem_address(storage.k);
    const uint32_t v_shared = arch::smem_address(storage.v);
    const int lane = arch::lane_id(), warp = arch::warp_id();
    // Accumulator layout of mma.sync: a thread has rows `row` and `row` + 8 of scores and output,
    // and of each 8 columns 2 `pair` and 2 `pair` + 1.
    const int row = warp * 16 + lane / 4, pair = lane % 4;
    const uint32_t k_lane = tile::ldmatrix_address<false, false, kQkBytes>(k_shared, 0, 0);
    const uint32_t v_lane = tile::ldmatrix_address<false, true, kVBytes>(v_shared, 0, 0);
    const float scale2 = p.in.scale * tile::kLog2E;

    const MlaPrefillTask& task = storage.task;
    make_scheduler(storage.tasks, p.in);
    for (;;) {
        find_next_task(storage.tasks, storage.task, p.in, p.ticket);
        if (task.last) return;

        // Prologue: start the copies of the first block of K.
        const int end = end_of_keys(task);
        if (end > 0) copy_k<T, kForwardThreads, kForwardKeys>(k_shared, p.in, task, 0);
        arch::cp_async_commit();

        // Load q, as operand A in registers; rows after the tile are zeros.
        uint32_t q[kQkDim / 16][4];
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            const bool real = row + 8 * h < task.rows;
            const int64_t token = task.first_query + task.tile + (real ? row + 8 * h : 0);
            load_fragments(
                q, h,
                row_of<T>(p.in.q, token, p.in.q_token_stride, task.head, p.in.q_head_stride) +
                    2 * pair,
                real);
        }
        // Begin with nothing, or with the sums of the keys before.
        float out[kVDim / 8][4];  // [16, 128] of the warp
        tile::OnlineSoftmax softmax;
        clear(out);
        softmax.reset();
        const auto state_row = [&](int h) {
            const int64_t token = task.first_query + task.tile + row + 8 * h;
            return (token * p.in.heads + task.head) * kStateFloats;
        };
        if (p.state_in != nullptr) {
            K2K_UNROLL
            for (int h = 0; h < 2; ++h) {
                if (row + 8 * h >= task.rows) continue;
                const float* state = p.state_in + state_row(h);
                K2K_UNROLL
                for (int j = 0; j < kVDim / 8; ++j) {
                    const float2 two = *reinterpret_cast<const float2*>(state + 8 * j + 2 * pair);
                    out[j][2 * h] = two.x, out[j][2 * h + 1] = two.y;
                }
                softmax.maximum[h] = state[kStateMaximum];
                softmax.total[h] = state[kStateTotals + pair];
            }
        }

        const auto border = [&](int h) { return border_of(task, row + 8 * h); };
        for (int key = 0; key < end; key += kForwardKeys) {
            arch::cp_async_wait<0>();
            arch::sync_block();  // keys_landed
            copy_v<T, kForwardThreads, kForwardKeys>(v_shared, p.in, task, key);
            arch::cp_async_commit();

            // 1. Scores: q K^T.
            float scores[kForwardKeys / 8][4] = {};  // [16, 64]
            K2K_UNROLL
            for (int i = 0; i < kQkDim / 16; ++i) {
                multiply_by_rows<T, kQkBytes>(scores, q[i], k_lane, i);
            }

            arch::cp_async_wait<0>();
            arch::sync_block();  // values_landed
            if (key + kForwardKeys < end) {
                copy_k<T, kForwardThreads, kForwardKeys>(k_shared, p.in, task, key + kForwardKeys);
            }
            arch::cp_async_commit();

            // 2. Mask keys that a row does not see, then online softmax: scores become P.
            if (key + kForwardKeys > border(0)) {
                K2K_UNROLL
                for (int h = 0; h < 2; ++h) {
                    tile::mask_row(scores, h, key + 2 * pair, border(h));
                }
            }
            float factor[2];
            // Rescale the output only if a row maximum of the warp grew.
            if (softmax.update(scores, factor, scale2)) {
                K2K_UNROLL
                for (int j = 0; j < kVDim / 8; ++j) {
                    out[j][0] *= factor[0], out[j][1] *= factor[0];
                    out[j][2] *= factor[1], out[j][3] *= factor[1];
                }
            }

            // 3. out += P V.
            K2K_UNROLL
            for (int i = 0; i < kForwardKeys / 16; ++i) {
                uint32_t probabilities[4];
                to_fragment<T>(probabilities, scores, i);
                multiply_by_columns<T, kVDim / 8>(out, probabilities, v_lane + i * 16 * kVBytes);
            }
        }

        // Epilogue, if more keys are to come: store the sums.
        if (p.state_out != nullptr) {
            arch::sync_warp();  // state_out may be state_in: all lanes have read it
            K2K_UNROLL
            for (int h = 0; h < 2; ++h) {
                if (row + 8 * h >= task.rows) continue;
                float* state = p.state_out + state_row(h);
                K2K_UNROLL
                for (int j = 0; j < kVDim / 8; ++j) {
                    *reinterpret_cast<float2*>(state + 8 * j + 2 * pair) =
                        make_float2(out[j][2 * h], out[j][2 * h + 1]);
                }
                if (pair == 0) state[kStateMaximum] = softmax.maximum[h];
                state[kStateTotals + pair] = softmax.total[h];
            }
            continue;
        }
        // Otherwise normalise, round and store; one thread per row stores the statistics.
        softmax.finish(false);
        float values[kVDim / 2];
        K2K_UNROLL
        for (int i = 0; i < kVDim / 2; ++i) {
            values[i] = out[i / 4][i % 4] * softmax.normalizer(i % 4 / 2);
        }
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            const bool real = row + 8 * h < task.rows;
            const int64_t token = task.first_query + task.tile + row + 8 * h;
            const int64_t at = token * p.in.heads + task.head;
            tile::store_row(static_cast<T*>(p.out) + at * kVDim + 2 * pair, values, h,
                            real ? kVDim - 2 * pair : 0, /*aligned=*/true);
            if (real && pair == 0) {
                p.lse[at] = softmax.lse2(scale2, h) * tile::kLn2;
                if (p.max_logits != nullptr) p.max_logits[at] = softmax.max_logit(p.in.scale, h);
            }
        }
    }
}

}  // namespace k2k
