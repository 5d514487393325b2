#pragma once

// MLA decode for every GPU from sm_80 on: attention of few query tokens over the paged cache.
//
//     S[r, k] = scale * q[r, :576] . row[k, :576]      r: query token x head, k: cached row
//     out[r, :512] = softmax_k(S[r, :]) row[k, :512],  lse[r], max_logits[r]
//
// Grid      persistent, one CTA of 8 warps per SM. Each CTA gets its tasks (tile_rows rows of q x a
//           range of keys of one sequence) from the split-KV tile scheduler of schedule.cuh.
// Warps     no roles: all 8 copy and multiply; warp 0 also runs the scheduler. They form kRowWarps
//           groups of kDimWarps: 4 x 2, 2 x 4 or 1 x 8. A group ("row warp") has 16 rows of the
//           tile. Each of its dim warps sums its part of the 576 dims of a score and owns its part
//           of the 512 columns of the output. Dim warps have the same scores and softmax.
// q         from global memory to registers, as operand A, once per task.
// Round     32 keys, copied by cp.async into a ring of 2 or 4 stages:
//             1. partial scores   mma.sync m16n8k16, q from registers, keys by ldmatrix
//             2. exchange         dim warps add their partial scores, all in the same order
//             3. softmax          online, base 2; the output is rescaled only if a maximum grew
//             4. output           P V: P has operand A's layout; the keys as V, by ldmatrix.trans
// Barriers  task_done, task_known  sync_block, before and after warp 0 writes the next task
//           round_landed   sync_block once a round: all threads' copies have landed, and the stage
//                          that is filled next has been read
//           scores_ready   named barrier 1 + row warp: its dim warps have written the exchange
//           decoded        sync_block, 656-byte rows only: the round is stored as bfloat16
// Epilogue  all warps, from registers: out / sum as T to out, or as floats to the workspace if the
//           keys are split. Dim warp 0 stores lse and max_logits.
// Shared    exchange 16 KB; ring 36 KB a stage (two: 90 KB, what sm_86 to sm_120 have). 656-byte
//           rows: 20.5 KB a stage and 36 KB for one decoded round (93 KB with two).
// Registers of a thread with 64 rows: output 128, q 72, scores 16: at the limit of 255.
// Layout    a key's row is nine times 128 bytes, each with the swizzle of tile/swizzle.cuh.
// Limits    bfloat16 or float16; 656-byte rows with bfloat16 q. Rows begin at multiples of 16
//           bytes; any page size.

#include "arch/convert.cuh"
#include "arch/cp_async.cuh"
#include "arch/ldst.cuh"
#include "arch/matrix.cuh"
#include "arch/mma.cuh"
#include "arch/smem.cuh"
#include "common/math.h"
#include "mla_decode/config.h"
#include "mla_decode/rows.cuh"
#include "mla_decode/schedule.cuh"
#include "tile/e4m3_decode.cuh"
#include "tile/swizzle.cuh"

namespace k2k {

constexpr int kKeyBytes = kKeyDim * 2;  // 1,152: nine times 128

// The first of the named barriers: row warp i has kScoresReady + i.
constexpr uint32_t kScoresReady = 1;

struct DecodedRound {
    uint4 chunks[kRoundBytes / 16];  // [32, 576] bfloat16
};
struct NothingDecoded {};

// In shared memory the ring follows it: [stages, 32, 576], or [stages, 32] rows of 656 bytes.
template <bool kQuantized>
struct alignas(128) MlaSm80Storage {
    float4 exchange[kPortableThreads / 32][4][32];  // partial scores [warp, group of 8 keys, lane]
    std::conditional_t<kQuantized, DecodedRound, NothingDecoded> decoded;
    MlaTasks tasks;  // warp 0's scheduler
    MlaTask task;
    bool bad_page;  // the task's block table names a page outside of the cache
};
static_assert(sizeof(MlaSm80Storage<false>) + 2 * kRoundBytes == portable_shared_memory(false, 2));
static_assert(sizeof(MlaSm80Storage<true>) + 2 * kQuantizedRoundBytes ==
              portable_shared_memory(true, 2));

// The page of this thread's key in the round that begins with `key`. A thread has one key of a
// round, and every eighth of its chunks.
K2K_DEVICE int page_of_round(const MlaDecodeParams& p, const MlaTask& task, int key) {
    key += threadIdx.x / 8;
    if (key >= task.end_key) return -1;
    return p.block_table[task.sequence * p.table_stride + key / p.page_size];
}

// Starts this thread's copies of that round to `stage`. Keys past the end are zero-filled: 0 * NaN
// would be NaN in the output.
template <bool kQuantized>
K2K_DEVICE void copy_round(const MlaDecodeParams& p, const MlaTask& task, bool& bad_page,
                           uint32_t stage, int key, int page) {
    // Eight threads copy a key's row, 128 contiguous bytes at a time.
    const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
    key += row;
    const bool valid = page >= 0 && page < p.pages;
    if (key < task.end_key && !valid) bad_page = true;
    constexpr int kBytes = kQuantized ? 1 : 2;
    const char* source = static_cast<const char*>(p.cache);
    if (valid) {
        source += (page * p.page_stride + key % p.page_size * p.slot_stride) * kBytes + chunk * 16;
    }
    const uint32_t target = stage + (kQuantized ? row * kQuantizedRow + chunk * 16
                                                : tile::chunk_offset<kKeyBytes>(row, chunk));
    constexpr int kChunks = kQuantized ? kQuantizedRow / 16 : kKeyBytes / 16;
    K2K_UNROLL
    for (int i = 0; i < ceil_div(kChunks, 8); ++i) {
        if (kChunks % 8 == 0 || chunk + i * 8 < kChunks) {
            arch::cp_async(target + i * 128, valid ? source + i * 128 : source, valid);
        }
    }
}

// Decodes the 656-byte rows of a stage to bfloat16. Eight threads per key: thread t has the chunks
// t, t + 8, ... of 16 codes; its i-th chunk has scale i.
K2K_DEVICE void decode_round(DecodedRound& decoded, const char* stage) {
    const int row = threadIdx.x / 8, lane = threadIdx.x % 8;
    const char* from = stage + row * kQuantizedRow;
    uint4* to = decoded.chunks + row * (kKeyBytes / 16);
    // Not unrolled: the accumulators of `out` leave few registers.
    K2K_NO_UNROLL
    for (int i = 0; i < 4; ++i) {
        const float scale = reinterpret_cast<const float*>(from + kScalesAt)[i];
        const uint4 codes = *reinterpret_cast<const uint4*>(from + (lane + i * 8) * 16);
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
        uint32_t pairs[8];
        K2K_UNROLL
        for (int j = 0; j < 4; ++j) {
            float values[4];
            tile::decode4(values, words[j], scale);
            pairs[2 * j] = arch::pack_bf16(values[0], values[1]);
            pairs[2 * j + 1] = arch::pack_bf16(values[2], values[3]);
        }
        K2K_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int chunk = 2 * (lane + i * 8) + half;
            to[tile::swizzled(row, chunk)] = make_uint4(pairs[4 * half], pairs[4 * half + 1],
                                                        pairs[4 * half + 2], pairs[4 * half + 3]);
        }
    }
    // The rope part is bfloat16 already.
    to[kLatent / 8 + tile::swizzled(row, lane)] =
        *reinterpret_cast<const uint4*>(from + kRopeAt + lane * 16);
}

template <class T, int kRowWarps, bool kQuantized>
__global__ void __launch_bounds__(kPortableThreads, 1)
    mla_decode_sm80_kernel(const __grid_constant__ MlaDecodeParams p) {
    constexpr int kDimWarps = 8 / kRowWarps;
    constexpr int kSteps = ceil_div(kKeyDim / 16, kDimWarps);  // k-steps of 16 dims, of this warp
    constexpr int kColumns = kLatent / kDimWarps;              // of the output, of this warp
    constexpr int kOutTiles = kColumns / 8;
    constexpr int kStageBytes = kQuantized ? kQuantizedRoundBytes : kRoundBytes;

    using Storage = MlaSm80Storage<kQuantized>;
    Storage& storage = arch::shared_storage<Storage>();
    const uint32_t ring = arch::smem_address(&storage) + sizeof(Storage);
    const uint32_t ring_end = ring + p.plan.stages * kStageBytes;
    const int lane = arch::lane_id(), warp = arch::warp_id();
    const int row_warp = warp / kDimWarps, dim_warp = warp % kDimWarps;
    // Accumulator layout of mma.sync: a thread has rows `row` and `row` + 8 of scores and output,
    // and of each 8 columns 2 `pair` and 2 `pair` + 1.
    const int row = row_warp * 16 + lane / 4, pair = lane % 4;

    // This lane's ldmatrix offsets. B of q K^T: 16 keys x 16 dims; step s has chunks 2 s and
    // 2 s + 1, and a warp has the steps dim_warp, dim_warp + kDimWarps, ... B of P V, transposed:
    // 16 keys x 16 columns. Both are `offset` plus the start of the warp's dims or columns.
    const uint32_t offset = tile::ldmatrix_address<false, false, kKeyBytes>(0, 0, 0);
    const uint32_t score_offset = (offset ^ dim_warp % 4 * 32) + dim_warp / 4 * 128;
    const uint32_t out_offset = offset + dim_warp * (kColumns * 2);

    // Scheduler: warp 0 computes the CTA's share. Its state is in shared memory: the main loop
    // needs the registers.
    const MlaTask& task = storage.task;
    if (warp == 0) {
        const MlaTasks tasks(p, blockIdx.x);
        if (lane == 0) storage.tasks = tasks;
    }
    for (;;) {
        // Warp 0 finds the next task.
        arch::sync_block();  // task_done: the previous task and its stages have been read
        if (warp == 0) {
            MlaTasks tasks = storage.tasks;
            tasks.next(p, storage.task);
            arch::sync_warp();
            if (lane == 0) storage.tasks = tasks, storage.bad_page = false;
        }
        arch::sync_block();  // task_known
        if (task.last) return;

        // Prologue: start the copies of the first `stages` - 1 rounds. Pages are looked up a round
        // before they are needed.
        const int stages = p.plan.stages;
        uint32_t stage = ring;
        int page = page_of_round(p, task, task.first_key);
        K2K_NO_UNROLL
        for (int i = 0; i < stages - 1; ++i) {
            const int key = task.first_key + i * kRoundKeys;
            if (key < task.end_key) {
                const uint32_t free_stage = ring + i * kStageBytes;
                copy_round<kQuantized>(p, task, storage.bad_page, free_stage, key, page);
                page = page_of_round(p, task, key + kRoundKeys);
            }
            arch::cp_async_commit();
        }

        // Load q, as operand A in registers; rows past num_rows are zeros.
        uint32_t q[kSteps][4];  // [16, 16] each
        K2K_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int tile_row = row + 8 * half;
            const bool real = tile_row < task.num_rows;
            const MlaRow place = mla_row(p, task, real ? tile_row : 0);
            const T* row_q = static_cast<const T*>(p.q) + place.token * p.q_token_stride +
                             place.head * p.q_head_stride;
            K2K_UNROLL
            for (int i = 0; i < kSteps; ++i) {
                const int step = dim_warp + i * kDimWarps;
                const bool has = real && (kKeyDim / 16 % kDimWarps == 0 || step < kKeyDim / 16);
                const uint32_t* from = reinterpret_cast<const uint32_t*>(row_q + step * 16) + pair;
                q[i][half] = has ? arch::load_nc(from) : 0;
                q[i][2 + half] = has ? arch::load_nc(from + 4) : 0;
            }
        }

        float out[kOutTiles][4];  // [16, kColumns] of the warp
        K2K_UNROLL
        for (int j = 0; j < kOutTiles; ++j) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0;
        tile::OnlineSoftmax softmax;
        softmax.reset();
        for (int key = task.first_key; key < task.end_key; key += kRoundKeys) {
            // Wait for the oldest round; with four stages, two later ones stay in flight.
            if (stages == 2) {
                arch::cp_async_wait<0>();
            } else {
                arch::cp_async_wait<2>();
            }
            arch::sync_block();  // round_landed
            // Refill the stage of the previous round.
            const int ahead = key + (stages - 1) * kRoundKeys;
            if (ahead < task.end_key) {
                const uint32_t free_stage = (stage == ring ? ring_end : stage) - kStageBytes;
                copy_round<kQuantized>(p, task, storage.bad_page, free_stage, ahead, page);
                page = page_of_round(p, task, ahead + kRoundKeys);
            }
            arch::cp_async_commit();
            uint32_t keys = stage;
            // 656-byte rows: decode the round once, for both products.
            if constexpr (kQuantized) {
                decode_round(storage.decoded,
                             reinterpret_cast<char*>(&storage + 1) + (stage - ring));
                arch::sync_block();  // decoded
                keys = arch::smem_address(&storage.decoded);
            }

            // 1. Partial scores of this warp's dims, q K^T.
            const uint32_t score_keys = keys + score_offset;
            float scores[4][4] = {};  // [16, 32]
            K2K_UNROLL
            for (int i = 0; i < kSteps; ++i) {
                if (kKeyDim / 16 % kDimWarps == 0 || dim_warp + i * kDimWarps < kKeyDim / 16) {
                    // Two steps of two dim warps share eight chunks.
                    const uint32_t address = kDimWarps == 2
                                                 ? (score_keys ^ i % 2 * 64) + i / 2 * 128
                                                 : score_keys + i * kDimWarps * 32;
                    K2K_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        uint32_t b[4];
                        arch::ldmatrix(b, address + half * 16 * kKeyBytes);
                        arch::mma_sync<T>(scores[2 * half], q[i], {b[0], b[1]});
                        arch::mma_sync<T>(scores[2 * half + 1], q[i], {b[2], b[3]});
                    }
                }
            }
            // 2. Exchange: each dim warp adds the parts of all, in the same order: equal bits.
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                storage.exchange[warp][j][lane] =
                    make_float4(scores[j][0], scores[j][1], scores[j][2], scores[j][3]);
            }
            arch::barrier_sync(kScoresReady + row_warp, kDimWarps * 32);  // scores_ready
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                float4 sum = storage.exchange[row_warp * kDimWarps][j][lane];
                K2K_UNROLL
                for (int other = 1; other < kDimWarps; ++other) {
                    const float4 part = storage.exchange[row_warp * kDimWarps + other][j][lane];
                    sum =
                        make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
                }
                scores[j][0] = sum.x, scores[j][1] = sum.y;
                scores[j][2] = sum.z, scores[j][3] = sum.w;
            }

            // 3. Mask keys that a row does not see, then online softmax: scores become P.
            if (key + kRoundKeys > task.border || key + kRoundKeys > task.end_key) {
                K2K_UNROLL
                for (int half = 0; half < 2; ++half) {
                    mask_row(scores, p, task, row + 8 * half, half, key + 2 * pair);
                }
            }
            float factor[2];
            const bool rescale = softmax.update(scores, factor, p.scale * kLog2E);
            // Rescale the output only if a row maximum of the warp grew.
            if (rescale) {
                K2K_UNROLL
                for (int j = 0; j < kOutTiles; ++j) {
                    out[j][0] *= factor[0], out[j][1] *= factor[0];
                    out[j][2] *= factor[1], out[j][3] *= factor[1];
                }
            }

            // 4. out += P V over this warp's columns.
            const uint32_t out_keys = keys + out_offset;
            K2K_UNROLL
            for (int half = 0; half < 2; ++half) {
                uint32_t probabilities[4];
                K2K_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const float* two = scores[2 * half + i / 2] + i % 2 * 2;
                    probabilities[i] = pack<T>(two[0], two[1]);
                }
                K2K_UNROLL
                for (int j = 0; j < kOutTiles / 2; ++j) {
                    uint32_t b[4];
                    arch::ldmatrix<4, true>(
                        b, (out_keys ^ j % 4 * 32) + j / 4 * 128 + half * 16 * kKeyBytes);
                    arch::mma_sync<T>(out[2 * j], probabilities, {b[0], b[2]});
                    arch::mma_sync<T>(out[2 * j + 1], probabilities, {b[1], b[3]});
                }
            }
            stage = stage + kStageBytes == ring_end ? ring : stage + kStageBytes;
        }

        // Epilogue: one thread per row stores statistics, all store their columns: to out, or for
        // split keys as floats to the workspace (kernel_combine.cuh).
        softmax.finish(storage.bad_page);
        const auto store_row = [&](int half) {
            const int tile_row = row + 8 * half;
            if (tile_row >= task.num_rows) return;
            const MlaRow place = mla_row(p, task, tile_row);
            if (dim_warp == 0 && pair == 0) store_stats(p, task, softmax, place, tile_row, half);
            const float by = softmax.normalizer(half);
            const int column = dim_warp * kColumns + 2 * pair;
            if (task.partial < 0) {
                T* to = out_at<T>(p, place, column);
                K2K_UNROLL
                for (int j = 0; j < kOutTiles; ++j) {
                    *reinterpret_cast<uint32_t*>(to + 8 * j) =
                        pack<T>(out[j][2 * half] * by, out[j][2 * half + 1] * by);
                }
            } else {
                float* to = p.partial_out + partial_row(p, task, tile_row) * kLatent + column;
                K2K_UNROLL
                for (int j = 0; j < kOutTiles; ++j) {
                    *reinterpret_cast<float2*>(to + 8 * j) =
                        make_float2(out[j][2 * half] * by, out[j][2 * half + 1] * by);
                }
            }
        };
        store_row(0);
        store_row(1);
    }
}

}  // namespace k2k
