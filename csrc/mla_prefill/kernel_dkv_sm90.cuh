#pragma once

// dK and dV of MLA prefill for Hopper, by wgmma and TMA, in tiles of 64 keys. For the queries q that
// see a key k of the tile, with P and dS computed again:
//
//     P^T[k, q] = exp2(scale2 K[k, :192] . Q[q, :192] - lse2[q])      scale2 = scale log2(e)
//     dV[k, :128] = P^T dO
//     dS^T[k, q] = P^T[k, q] (V[k, :128] . dO[q, :128] - delta[q])
//     dK[k, :192] = scale dS^T Q
//
// dK and dV of a tile, 64 x 320 floats, and S^T and dP^T beside them do not fit in the registers of
// one warpgroup. The products divide into two equal halves (192 + 128 = 128 + 192 columns), so a
// pair of warpgroups shares a tile, and P^T crosses from one to the other.
//
// Grid      persistent, one CTA per SM; tiles of 64 keys of one head, the longest first, by tickets
//           (schedule.cuh).
// Roles     warps 0 to 3  "Score", consumer warpgroup 0: S^T = K Q^T, P^T, dV += P^T dO
//           warps 4 to 7  "Grad", consumer warpgroup 1: dP^T = V dO^T, dS^T, dK += dS^T Q
//           warp 8        producer: K, Q and lse2
//           warp 9        producer: V, dO and delta
//           warp 10       scheduler: finds the tasks, one ahead
//           warp 11       idle: setmaxnreg applies to whole warpgroups
// Queries   in blocks of 128, ascending from the block of the first query that sees a key of the
//           tile. Blocks begin at multiples of 128 of the sequence, and no other CTA adds to the
//           tile: the bits of dK and dV depend on the tile's keys and the sequence's queries alone.
// Stage     a block of Q is three boxes of 128 queries x 64 columns with the 128-byte swizzle, of dO
//           two. The same bytes are K-major in the first product and MN-major in the second. Q and
//           dO have barriers of their own: dO is free before Q is. Q is released and loaded by
//           halves of 64 queries: the first is in flight while dK reads the second.
// Overlap   Score issues S^T of the next block before dV of this one, whose products run during the
//           exponentials. Grad runs about a block behind.
//
//               Score   S(0) P(0)  S(1) [dV(0) P(1)]      S(2) [dV(1) P(2)]     ...  dV(n)
//               Grad    dP(0)         dS(0) dK(0) dP(1)     dS(1) dK(1) dP(2)   ...  dS(n) dK(n)
//
//           The last dV comes after the loop: a wgmma under a condition would make the compiler wait
//           for each one.
// Exchange  both accumulators have the same layout, so thread i of Grad reads the 16-byte vectors
//           that thread i of Score wrote: P^T as T, the A operands of dV.
// Barriers  event            arrivals                       waited for by
//           known, done[2]   task_queue.cuh                 readers: 2 producer, 8 consumer warps
//           score, grad: of K, Q and lse2; of V, dO and delta
//           keys_full        producer + bytes               Score; Grad
//           keys_empty       4 warps of it, after their     the producer: before it loads the next
//                            last S^T or dP^T of the tile   tile's keys
//           full[2]          producer + bytes, 32 lanes'    Score and Grad, both
//                            copies of lse2 or delta
//           empty[2][parts]  8 consumer warps               the producer: the part of the stage is
//                                                           free
//           tail             producer + bytes               the producer
//           p_full           4 warps of Score               Grad
//           p_empty          4 warps of Grad                Score: before it overwrites P^T
// Tail      the boxes of a sequence's last block can reach beyond it. They arrive at `tail`, the
//           producer clears the rows that do not exist, and only then arrives at `full`: 0 times NaN
//           would be NaN. Rows of K and V beyond the tile only reach rows of dK and dV that are not
//           stored. P^T and dS^T are 0 by select where q does not see k.
// Epilogue  from registers, row by row, 16 bytes per lane: dV, and scale dK as T; the rope columns
//           of a shared k_rope as floats to rope_parts, which another kernel adds up over heads.
//           Keys that no query sees, and those of no sequence, get zeros.
// Cost      of a block: 10.5 MFLOP, 2,560 clocks at 4,096 FLOPs per clock; 80 KB from L2, 32 bytes
//           per clock. Shared memory: wgmma reads 200 KB, P^T 32 KB, 80 KB arrive: 2,500 clocks at
//           128 bytes. 8,192 exponentials take 512 clocks. All are estimates.
// Shared    K 24 KB, V 16 KB, two stages of Q 48 KB and dO 32 KB, P^T 16 KB, the rest 5 KB: 221 KB
//           of 227.
// Registers 168 per thread at launch; setmaxnreg: Score 216 (dV 64, S^T 64, P^T 32), Grad 240
//           (dK 96, dP^T 64, dS^T 32), the other warps 48.
// Limits    bfloat16 or float16; strides that TMA can copy; rows of the gradients begin at multiples
//           of 16 bytes.

#include "arch/control.cuh"
#include "arch/cp_async.cuh"
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

constexpr int kDkvKeys = 64, kDkvQueries = 128;  // of a tile and of a block
constexpr int kDkvStages = 2, kDkvQParts = 2;
constexpr int kDkvThreads = 3 * 128;

using DkvKeyBox = tile::SwizzledBox<kDkvKeys>;
using DkvQueryBox = tile::SwizzledBox<kDkvQueries>;
using DkvStage = tile::RingPosition<kDkvStages>;

struct DkvMaps {
    arch::TensorMap q, grad_out, k, k_rope, v;
};

// What one producer loads: K, Q and lse2 (three boxes of columns), or V, dO and delta (two). Blocks
// are loaded in kParts parts of rows.
template <int kBoxes, int kParts>
struct DkvOperands {
    static constexpr uint32_t kTileBytes = kBoxes * sizeof(DkvKeyBox);
    static constexpr uint32_t kBlockBytes = kBoxes * sizeof(DkvQueryBox);

    DkvQueryBox blocks[kDkvStages][kBoxes];  // [stage, 128 queries, 64 kBoxes]
    DkvKeyBox keys[kBoxes];                  // [64 keys, 64 kBoxes]
    float of_row[kDkvStages][kDkvQueries];   // lse2 or delta
    arch::Mbarrier keys_full, keys_empty;
    arch::Mbarrier full[kDkvStages], empty[kDkvStages][kParts], tail;
};

struct DkvStorage {
    DkvOperands<kQkBoxes, kDkvQParts> score;  // Q, K, lse2
    DkvOperands<kVBoxes, 1> grad;             // dO, V, delta
    uint4 p[kDkvQueries / 16][128];           // P^T: vector i of thread t
    PrefillTasks tasks;
    arch::Mbarrier p_full, p_empty;
};
static_assert(sizeof(DkvStorage) <= 232448);

template <int kBoxes, int kParts>
K2K_DEVICE void make_dkv_barriers(DkvOperands<kBoxes, kParts>& operands) {
    arch::mbarrier_init(operands.keys_full, 1);
    arch::mbarrier_init(operands.keys_empty, 4);
    for (int stage = 0; stage < kDkvStages; ++stage) {
        arch::mbarrier_init(operands.full[stage], 1 + 32);
        for (auto& empty : operands.empty[stage]) arch::mbarrier_init(empty, 8);
    }
    arch::mbarrier_init(operands.tail, 1);
}

// The first block of queries that a tile of keys visits; task.queries if there is none.
K2K_DEVICE int first_block(const MlaPrefillTask& task) {
    const int first = first_of_queries(task);
    return first < task.queries ? first / kDkvQueries * kDkvQueries : task.queries;
}

// ---- producer warps

// Loads the operands of one side, task after task. `rows`: lse2 or delta [heads, q_tokens];
// load_keys(task) starts the copies of the tile's keys.
template <int kBoxes, int kParts, class LoadKeys>
K2K_DEVICE void load_dkv_operands(DkvOperands<kBoxes, kParts>& to, PrefillTasks& tasks,
                                  const arch::TensorMap& map, const float* rows, int q_tokens,
                                  LoadKeys&& load_keys) {
    // elect_one: the compiler then knows that a single lane issues the copies.
    const bool leader = arch::elect_one();
    const int lane = arch::lane_id();
    DkvStage stage;
    uint32_t keys_parity = 1, tail_parity = 0;
    for (TaskPosition at;; at.advance()) {
        const MlaPrefillTask& task = next_task(tasks, at);
        if (task.last) break;
        const int head = task.head, first_query = task.first_query, queries = task.queries;
        int block = first_block(task);
        // Load the keys once the last tile's have been read.
        if (block < queries) {
            if (leader) {
                arch::mbarrier_wait(to.keys_empty, keys_parity);
                arch::mbarrier_arrive_expect_tx(to.keys_full, to.kTileBytes);
                load_keys(task);
            }
            keys_parity ^= 1;
        }
        const float* source = rows + int64_t(head) * q_tokens + first_query + block + lane;
        for (; block < queries; block += kDkvQueries, stage.advance()) {
            const int valid = queries - block;
            const bool tail = valid < kDkvQueries;
            // Wait until a part of the stage is free; start its copies.
            arch::Mbarrier& landed = tail ? to.tail : to.full[stage.slot];
            K2K_UNROLL
            for (int part = 0; part < kParts; ++part) {
                constexpr int kRows = kDkvQueries / kParts;
                arch::mbarrier_wait(to.empty[stage.slot][part], stage.parity ^ 1);
                if (!leader) continue;
                if (part == 0) arch::mbarrier_arrive_expect_tx(landed, to.kBlockBytes);
                K2K_UNROLL
                for (int i = 0; i < kBoxes; ++i) {
                    arch::tma_load_3d(to.blocks[stage.slot][i].chunks + part * kRows * 8, map,
                                      landed, i * kBoxColumns, head,
                                      first_query + block + part * kRows);
                }
            }
            // Each lane copies four numbers of rows, zeros beyond the last; it arrives when they
            // have landed.
            K2K_UNROLL
            for (int i = 0; i < kDkvQueries; i += 32) {
                const bool exists = lane + i < valid;
                arch::cp_async<4>(arch::smem_address(&to.of_row[stage.slot][lane + i]),
                                  exists ? source + i : rows, exists);
            }
            arch::cp_async_arrive(to.full[stage.slot]);
            source += kDkvQueries;
            // Tail: clear the rows beyond the last query before a consumer reads them.
            if (tail) {
                arch::mbarrier_wait(to.tail, tail_parity);
                tail_parity ^= 1;
                for (int row = valid + lane / 8; row < kDkvQueries; row += 4) {
                    K2K_UNROLL
                    for (int i = 0; i < kBoxes; ++i) {
                        to.blocks[stage.slot][i].chunks[row * 8 + lane % 8] =
                            make_uint4(0, 0, 0, 0);
                    }
                }
                arch::fence_proxy_async();
                tile::warp_arrive(to.full[stage.slot]);
            }
        }
        tile::warp_arrive(tasks.done[at.slot]);
    }
    // A warp must not exit before its copies have landed.
    arch::cp_async_commit();
    arch::cp_async_wait<0>();
}

K2K_DEVICE void load_dkv_score(DkvStorage& smem, const MlaPrefillBackwardParams& p,
                               const DkvMaps& maps) {
    auto& to = smem.score;
    load_dkv_operands(to, smem.tasks, maps.q, p.lse2, p.in.q_tokens, [&](const auto& task) {
        const int token = task.first_key + task.tile;
        K2K_UNROLL
        for (int i = 0; i < kNopeBoxes; ++i) {
            arch::tma_load_3d(&to.keys[i], maps.k, to.keys_full, i * kBoxColumns, task.head, token);
        }
        arch::tma_load_3d(&to.keys[kNopeBoxes], maps.k_rope, to.keys_full, 0,
                          rope_head(p.in, task.head), token);
    });
}

K2K_DEVICE void load_dkv_grad(DkvStorage& smem, const MlaPrefillBackwardParams& p,
                              const DkvMaps& maps) {
    auto& to = smem.grad;
    load_dkv_operands(to, smem.tasks, maps.grad_out, p.delta, p.in.q_tokens, [&](const auto& task) {
        const int token = task.first_key + task.tile;
        K2K_UNROLL
        for (int i = 0; i < kVBoxes; ++i) {
            arch::tma_load_3d(&to.keys[i], maps.v, to.keys_full, i * kBoxColumns, task.head, token);
        }
    });
}

// ---- both consumers

// [64 keys, 128 queries] of a warpgroup, in wgmma's accumulator layout. A thread has the keys `row`
// (h = 0) and `row` + 8 (h = 1) of the tile: [j][2 h + e] is of query 8 j + 2 (lane % 4) + e.
using DkvPairs = float[kDkvQueries / 8][4];
// The same as T, as A operands of 16 queries each.
using DkvFactors = uint32_t[kDkvQueries / 16][4];

// What a consumer thread reads from a task.
struct DkvTile {
    int block, queries;  // the first block; queries of the sequence
    // The first query that sees this thread's key `row`, less its own first column; and the first
    // from which on all keys of the tile are seen.
    int first_seen, all_seen;

    K2K_DEVICE DkvTile(const MlaPrefillTask& task, int row, int pair)
        : block(first_block(task)),
          queries(task.queries),
          first_seen(task.tile + row - task.diagonal - 2 * pair),
          all_seen(task.tile + task.rows - 1 - task.diagonal) {}
};

// x = 0 where the query does not see the key. Most blocks are seen by all.
K2K_DEVICE void clear_unseen(DkvPairs& x, const DkvTile& tile, int block) {
    if (block >= tile.all_seen) return;
    const int first = tile.first_seen - block;
    K2K_UNROLL
    for (int j = 0; j < kDkvQueries / 8; ++j) {
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (8 * j + i % 2 < first + i / 2 * 8) x[j][i] = 0;
        }
    }
}

template <class T>
K2K_DEVICE void pack_factors(DkvFactors& to, const DkvPairs& from) {
    K2K_UNROLL
    for (int k = 0; k < kDkvQueries / 16; ++k) {
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float* two = from[2 * k + i / 2] + i % 2 * 2;
            to[k][i] = tile::pack<T>(two[0], two[1]);
        }
    }
}

template <int kValues>
K2K_DEVICE void clear(float (&x)[kValues]) {
    K2K_UNROLL
    for (float& value : x) value = 0;
}

// pairs = keys block^T: [64, 64 kBoxes] by [64 kBoxes, 128].
template <class T, int kBoxes>
K2K_DEVICE void multiply_pairs(DkvPairs& pairs, uint64_t keys, uint64_t block) {
    auto& accumulators = reinterpret_cast<float (&)[kDkvQueries / 2]>(pairs);
    K2K_UNROLL
    for (int box = 0; box < kBoxes; ++box) {
        K2K_UNROLL
        for (int k = 0; k < kBoxColumns / 16; ++k) {
            arch::wgmma_ss<T, kDkvQueries>(
                accumulators, keys + arch::descriptor_step(box * sizeof(DkvKeyBox) + k * 32),
                block + arch::descriptor_step(box * sizeof(DkvQueryBox) + k * 32), box + k > 0);
        }
    }
}

// sums += factors block: [64, 128] by [128, kColumns]; of kParts parts of the queries, the one.
template <class T, int kColumns, int kParts>
K2K_DEVICE void multiply_block(float (&sums)[kColumns / 2], const DkvFactors& factors,
                               uint64_t block, int part) {
    constexpr int kSteps = kDkvQueries / 16 / kParts;
    K2K_UNROLL
    for (int k = part * kSteps; k < (part + 1) * kSteps; ++k) {
        arch::wgmma_rs<T, kColumns, arch::Major::kMN>(
            sums, factors[k], block + arch::descriptor_step(k * 2048), true);
    }
}

// ---- Score: consumer warpgroup 0

template <class T>
K2K_DEVICE void compute_grad_v(DkvStorage& smem, const MlaPrefillBackwardParams& p) {
    const int thread = threadIdx.x % 128, lane = thread % 32, pair = lane % 4;
    const int row = thread / 32 * 16 + lane / 4;
    const arch::Swizzle swizzle = arch::Swizzle::k128;
    const uint64_t keys = arch::matrix_descriptor(smem.score.keys, swizzle, 0, 1024);
    const uint64_t q = arch::matrix_descriptor(smem.score.blocks, swizzle, 0, 1024);
    const uint64_t grad_out =
        arch::matrix_descriptor(smem.grad.blocks, swizzle, sizeof(DkvQueryBox), 1024);
    const float scale2 = p.in.scale * tile::kLog2E;

    DkvStage q_at, grad_out_at;
    uint32_t keys_parity = 0, p_parity = 1;
    DkvPairs pairs;
    DkvFactors factors;
    // Issues S^T = K Q^T of the stage q_at.
    const auto issue_scores = [&] {
        arch::mbarrier_wait(smem.score.full[q_at.slot], q_at.parity);
        arch::wgmma_fence();
        multiply_pairs<T, kQkBoxes>(
            pairs, keys, q + q_at.slot * arch::descriptor_step(sizeof(smem.score.blocks[0])));
        arch::wgmma_commit();
    };
    // Issues dV += P^T dO of the stage grad_out_at.
    const auto issue_grad_v = [&](float (&grad_v)[kVDim / 2]) {
        arch::mbarrier_wait(smem.grad.full[grad_out_at.slot], grad_out_at.parity);
        arch::wgmma_fence();
        multiply_block<T, kVDim, 1>(
            grad_v, factors,
            grad_out + grad_out_at.slot * arch::descriptor_step(sizeof(smem.grad.blocks[0])), 0);
        arch::wgmma_commit();
    };
    // Waits for S^T, while kPending groups run on, and makes P^T of it; releases Q and, after the
    // tile's last block, K.
    const auto exponentiate = [&](auto pending, const DkvTile& tile, int block) {
        arch::wgmma_wait<decltype(pending)::value>(
            reinterpret_cast<float (&)[kDkvQueries / 2]>(pairs));
        if (block + kDkvQueries >= tile.queries) tile::warp_arrive(smem.score.keys_empty);
        const float* lse2 = smem.score.of_row[q_at.slot] + 2 * pair;
        K2K_UNROLL
        for (int j = 0; j < kDkvQueries / 8; ++j) {
            const float2 two = *reinterpret_cast<const float2*>(lse2 + 8 * j);
            K2K_UNROLL
            for (int i = 0; i < 4; ++i) {
                pairs[j][i] =
                    arch::exp2_approx(fmaf(pairs[j][i], scale2, i % 2 == 0 ? -two.x : -two.y));
            }
        }
        for (auto& empty : smem.score.empty[q_at.slot]) tile::warp_arrive(empty);
        q_at.advance();
        clear_unseen(pairs, tile, block);
    };
    // Rounds P^T to T, as operands of dV, and hands it to Grad.
    const auto hand_over = [&] {
        pack_factors<T>(factors, pairs);
        arch::mbarrier_wait(smem.p_empty, p_parity);
        p_parity ^= 1;
        K2K_UNROLL
        for (int k = 0; k < kDkvQueries / 16; ++k) {
            smem.p[k][thread] =
                make_uint4(factors[k][0], factors[k][1], factors[k][2], factors[k][3]);
        }
        tile::warp_arrive(smem.p_full);
    };
    // Waits for dV; releases dO.
    const auto finish_grad_v = [&](float (&grad_v)[kVDim / 2]) {
        arch::wgmma_wait<0>(grad_v);
        tile::warp_arrive(smem.grad.empty[grad_out_at.slot][0]);
        grad_out_at.advance();
    };
    for (TaskPosition at;; at.advance()) {
        const MlaPrefillTask& task = next_task(smem.tasks, at);
        if (task.last) return;
        const DkvTile tile(task, row, pair);
        float grad_v[kVDim / 2];
        clear(grad_v);
        int block = tile.block;
        if (block < tile.queries) {
            // Prologue: P^T of the first block.
            arch::mbarrier_wait(smem.score.keys_full, keys_parity);
            keys_parity ^= 1;
            issue_scores();
            exponentiate(std::integral_constant<int, 0>{}, tile, block);
            hand_over();
            // Main loop: S^T of the next block, dV of this one.
            for (block += kDkvQueries; block < tile.queries; block += kDkvQueries) {
                issue_scores();
                issue_grad_v(grad_v);
                exponentiate(std::integral_constant<int, 1>{}, tile, block);
                finish_grad_v(grad_v);
                hand_over();
            }
            // Last step: dV of the last block.
            issue_grad_v(grad_v);
            finish_grad_v(grad_v);
        }
        // Epilogue: store the rows that exist.
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int64_t token = task.first_key + task.tile + row + 8 * h;
            const int left = row + 8 * h < task.rows ? kVDim - 2 * pair : 0;
            tile::store_row<T>(static_cast<T*>(p.grad_v) + token * p.grad_v_token_stride +
                                   task.head * p.grad_v_head_stride + 2 * pair,
                               grad_v, h, left, /*aligned=*/true);
        }
        tile::warp_arrive(smem.tasks.done[at.slot]);
    }
}

// ---- Grad: consumer warpgroup 1

template <class T>
K2K_DEVICE void compute_grad_k(DkvStorage& smem, const MlaPrefillBackwardParams& p) {
    const int thread = threadIdx.x % 128, lane = thread % 32, pair = lane % 4;
    const int row = thread / 32 * 16 + lane / 4;
    const arch::Swizzle swizzle = arch::Swizzle::k128;
    const uint64_t keys = arch::matrix_descriptor(smem.grad.keys, swizzle, 0, 1024);
    const uint64_t grad_out = arch::matrix_descriptor(smem.grad.blocks, swizzle, 0, 1024);
    const uint64_t q =
        arch::matrix_descriptor(smem.score.blocks, swizzle, sizeof(DkvQueryBox), 1024);

    DkvStage stage;
    uint32_t keys_parity = 0, p_parity = 0;
    for (TaskPosition at;; at.advance()) {
        const MlaPrefillTask& task = next_task(smem.tasks, at);
        if (task.last) return;
        const DkvTile tile(task, row, pair);
        float grad_k[kQkDim / 2];
        clear(grad_k);
        if (tile.block < tile.queries) {
            arch::mbarrier_wait(smem.grad.keys_full, keys_parity);
            keys_parity ^= 1;
        }
        for (int block = tile.block; block < tile.queries; block += kDkvQueries, stage.advance()) {
            // dP^T = V dO^T.
            DkvPairs pairs;
            arch::mbarrier_wait(smem.grad.full[stage.slot], stage.parity);
            arch::wgmma_fence();
            multiply_pairs<T, kVBoxes>(
                pairs, keys,
                grad_out + stage.slot * arch::descriptor_step(sizeof(smem.grad.blocks[0])));
            arch::wgmma_commit();
            arch::wgmma_wait<0>(reinterpret_cast<float (&)[kDkvQueries / 2]>(pairs));
            // Release V after the tile's last dP^T.
            if (block + kDkvQueries >= tile.queries) tile::warp_arrive(smem.grad.keys_empty);

            // dS^T = P^T (dP^T - delta), with P^T from Score.
            arch::mbarrier_wait(smem.p_full, p_parity);
            p_parity ^= 1;
            const float* delta = smem.grad.of_row[stage.slot] + 2 * pair;
            K2K_UNROLL
            for (int k = 0; k < kDkvQueries / 16; ++k) {
                const uint4 vector = smem.p[k][thread];
                const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
                K2K_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const int j = 2 * k + i / 2;
                    const float2 two = *reinterpret_cast<const float2*>(delta + 8 * j);
                    float* x = pairs[j] + i % 2 * 2;
                    x[0] = tile::unpack<T>(words[i], 0) * (x[0] - two.x);
                    x[1] = tile::unpack<T>(words[i], 1) * (x[1] - two.y);
                }
            }
            // Release P^T and dO.
            tile::warp_arrive(smem.p_empty);
            tile::warp_arrive(smem.grad.empty[stage.slot][0]);
            clear_unseen(pairs, tile, block);
            DkvFactors factors;
            pack_factors<T>(factors, pairs);

            // dK += dS^T Q, a part of Q at a time; release each part. (Q has landed: this wait makes
            // the writes of TMA visible to this warp, too.)
            arch::mbarrier_wait(smem.score.full[stage.slot], stage.parity);
            arch::wgmma_fence();
            K2K_UNROLL
            for (int part = 0; part < kDkvQParts; ++part) {
                multiply_block<T, kQkDim, kDkvQParts>(
                    grad_k, factors,
                    q + stage.slot * arch::descriptor_step(sizeof(smem.score.blocks[0])), part);
                arch::wgmma_commit();
            }
            static_assert(kDkvQParts == 2);
            arch::wgmma_wait<1>();
            tile::warp_arrive(smem.score.empty[stage.slot][0]);
            arch::wgmma_wait<0>(grad_k);
            tile::warp_arrive(smem.score.empty[stage.slot][1]);
        }
        // Epilogue: store the rows that exist, nope and rope columns.
        K2K_UNROLL
        for (float& x : grad_k) x *= p.in.scale;
        auto& nope = reinterpret_cast<float (&)[kNope / 2]>(grad_k);
        auto& rope = reinterpret_cast<float (&)[kRopeDims / 2]>(grad_k[kNope / 2]);
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int64_t token = task.first_key + task.tile + row + 8 * h;
            const bool exists = row + 8 * h < task.rows;
            T* to = static_cast<T*>(p.grad_k) + token * p.grad_k_token_stride +
                    task.head * p.grad_k_head_stride + 2 * pair;
            tile::store_row<T>(to, nope, h, exists ? kNope - 2 * pair : 0,
                               /*aligned=*/true);
            if (p.rope_parts == nullptr) {
                tile::store_row<T>(to + kNope, rope, h, exists ? kRopeDims - 2 * pair : 0,
                                   /*aligned=*/true);
            } else {
                tile::store_row(p.rope_parts +
                                    (int64_t(task.head) * p.in.k_tokens + token) * kRopeDims +
                                    2 * pair,
                                rope, h, exists ? kRopeDims - 2 * pair : 0,
                                /*aligned=*/true);
            }
        }
        tile::warp_arrive(smem.tasks.done[at.slot]);
    }
}

template <class T>
__global__ void __launch_bounds__(kDkvThreads, 1)
    mla_prefill_dkv_sm90_kernel(const __grid_constant__ MlaPrefillBackwardParams p,
                                const __grid_constant__ DkvMaps maps) {
    DkvStorage& smem = arch::shared_storage<DkvStorage>();
    const int warp = arch::warp_id();
    if (threadIdx.x == 0) {
        make_dkv_barriers(smem.score);
        make_dkv_barriers(smem.grad);
        make_task_barriers(smem.tasks, /*readers=*/10);
        arch::mbarrier_init(smem.p_full, 4);
        arch::mbarrier_init(smem.p_empty, 4);
        arch::fence_mbarrier_init();
    }
    arch::sync_block();

    // Roles.
    if (warp < 4) {
        arch::registers_increase<216>();
        compute_grad_v<T>(smem, p);
    } else if (warp < 8) {
        arch::registers_increase<240>();
        compute_grad_k<T>(smem, p);
    } else {
        arch::registers_decrease<48>();
        if (warp == 8) {
            load_dkv_score(smem, p, maps);
        } else if (warp == 9) {
            load_dkv_grad(smem, p, maps);
        } else if (warp == 10) {
            find_tasks<TileAxis::kKeys, kDkvKeys>(smem.tasks, p.in, p.tickets);
        }
    }
}

}  // namespace k2k
