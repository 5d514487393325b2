#pragma once

// MLA decode for Hopper, by wgmma and TMA, in tiles of 64 rows of q. Same formula as
// kernel_sm80.cuh:
//
//     S[r, k] = scale * q[r, :576] . row[k, :576]      r: query token x head, k: cached row
//     out[r, :512] = softmax_k(S[r, :]) row[k, :512],  lse[r], max_logits[r]
//
// The accumulators of a tile, 64 x 512 floats, take half of an SM's registers, so two consumer
// warpgroups hold 256 columns each. (FlashAttention-3 splits a head dimension of 512 this way:
// hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp, LargeHeadDimV.)
//
// Grid      persistent, one CTA per SM. Each CTA gets its tasks (tile of rows x range of keys) from
//           the split-KV tile scheduler of schedule.cuh. If an even number of CTAs reads the same
//           keys, they form pairs: clusters of two.
// Roles     warps 0 to 3  "Left", consumer warpgroup 0: S = q K^T, softmax, P V[:, :256]
//           warps 4 to 7  "Right", consumer warpgroup 1: P V[:, 256:], with Left's P
//           warp 8        producer: TMA loads of q and the keys, task after task; in a pair it
//                         loads every other box of keys, multicast to both CTAs
//           warp 9        scheduler: finds the tasks, up to four ahead
//           warps 10, 11  idle: setmaxnreg applies to whole warpgroups
// Stage     one block of 64 keys, as nine boxes of 64 keys x 64 columns, 8 KB each, with the
//           128-byte swizzle. The same bytes are K (K-major) and V (MN-major). One TMA copy has 16,
//           32 or 64 keys of a page (hopper_box_rows), so a box takes one to four. Loads have the
//           evict-first hint: CTAs that share keys read them at about the same time, and nothing
//           reads them again.
// Order     within a block: Left's scores and softmax, then both halves of P V in parallel.
//
//               Left     S(0) softmax(0)  P V(0)  S(1) softmax(1)  P V(1)  ...
//               Right                     P V(0)                   P V(1)  ...
//
//           S(1) is not issued before P V(0): Left would then occupy both stages, and no load
//           could be in flight.
// Barriers  event            arrivals                  waited for by
//           task_known[4]    scheduler                 producer, Left, Right
//           task_done[4]     producer, 8 consumer      scheduler: the slot may be reused
//                            warps
//           q_landed         producer + bytes          Left
//           q_read           4 warps of Left, after    producer: before it loads the next q
//                            the task's last scores
//           landed[2][9]     producer + bytes          Left, box by box
//           read[2]          8 consumer warps, in a    producer: the stage is free
//                            pair 16 of both CTAs
//           p_full           4 warps of Left           Right: P and the rescale factors are stored;
//                                                      at the end of a task, the normalizers
//           p_empty          4 warps of Right          Left: before it overwrites them
//           Right needs no wait of its own for the keys: Left has waited for all nine boxes.
// Tail      in the last block, rows of the stage past the end of the task are stale or other rows
//           of the page. Their scores are masked and their rows of V cleared, as 0 * NaN is NaN.
// Epilogue  both consumers, from registers: their half times the normalizer, as T to out, or as
//           floats to the workspace if the keys are split. Left stores lse and max_logits.
// Bad page  an index outside of the cache is not loaded; the task's rows become NaN.
// Shared    q 72 KB, two stages of 72 KB, probabilities 8 KB, the rest 1 KB: 225 KB of 227.
// Registers 168 per thread at launch; setmaxnreg: consumers 216 (output 128, scores 32,
//           probabilities 16), the other warps 72.
// Limits    bfloat16 or float16. The cache's strides are not 0; pages have a multiple of 16 slots;
//           rows of q are equally far apart.

#include "arch/cluster.cuh"
#include "arch/control.cuh"
#include "arch/fence.cuh"
#include "arch/ldst.cuh"
#include "arch/matrix.cuh"
#include "arch/smem.cuh"
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "common/math.h"
#include "mla_decode/config.h"
#include "mla_decode/kernel_combine.cuh"
#include "mla_decode/rows.cuh"
#include "mla_decode/schedule.cuh"
#include "tile/ring.cuh"
#include "tile/store_row.cuh"
#include "tile/swizzle.cuh"

namespace k2k {

using arch::Mbarrier;
using arch::TensorMap;
using tile::warp_arrive;

constexpr int kHalfLatent = kLatent / 2;
constexpr int kHalfBoxes = kHalfLatent / kHopperColumns;    // of one half of V
constexpr int kMostParts = kBlockKeys / kHopperMinBoxRows;  // TMA copies of a box

using MlaBox = tile::SwizzledBox<kBlockKeys>;
static_assert(kHopperRows == kBlockKeys);

// Barriers of a consumer warpgroup while it clears rows of V. (0 is sync_block.)
enum MlaNamedBarrier : uint32_t { kLeftClears = 1, kRightClears = 2 };

struct MlaSm90Storage {
    MlaBox q[kHopperBoxes];                    // [64, 576]
    MlaBox keys[kHopperStages][kHopperBoxes];  // [stage, 64, 576]
    MlaBox probabilities;                      // P [64 rows, 64 keys]
    float factors[kHopperRows];                // rescale factors; at a task's end, normalizers
    MlaTask tasks[kHopperTaskSlots];
    bool bad_page[kHopperTaskSlots];  // the task's block table names a page that does not exist
    Mbarrier task_known[kHopperTaskSlots], task_done[kHopperTaskSlots];
    Mbarrier q_landed, q_read;
    Mbarrier landed[kHopperStages][kHopperBoxes], read[kHopperStages];
    Mbarrier p_full, p_empty;
};
static_assert(sizeof(MlaSm90Storage) <= 232448 && kKeyDim % kHopperColumns == 0);

constexpr uint32_t kBoxBytes = sizeof(MlaBox), kStageBytes = kHopperBoxes * kBoxBytes;

using TaskPosition = tile::RingPosition<kHopperTaskSlots>;
using KeysPosition = tile::RingPosition<kHopperStages>;

// The CTAs that share loaded keys: one, or a pair. In a pair, each CTA loads the boxes rank,
// rank + 2, ... for both.
template <bool kPair>
struct MlaCtas {
    static constexpr uint32_t kCount = kPair ? 2 : 1;

    K2K_DEVICE static uint32_t rank() { return kPair ? arch::cluster_rank() : 0; }

    // Starts one TMA copy: hopper_box_rows() keys of a box.
    K2K_DEVICE static void load(uint4* target, const TensorMap& cache, Mbarrier& landed, int column,
                                int slot, int page) {
        constexpr auto kHint = arch::CacheHint::kEvictFirst;
        if constexpr (kPair) {
            arch::tma_load_3d_multicast(target, cache, landed, 3, column, slot, page, kHint);
        } else {
            arch::tma_load_3d(target, cache, landed, column, slot, page, kHint);
        }
    }

    // Releases a stage that the warp has read: one arrival in each CTA.
    K2K_DEVICE static void release(Mbarrier& read) {
        if constexpr (kPair) {
            arch::sync_warp();
            const uint32_t lane = arch::lane_id();
            if (lane < 2) arch::mbarrier_arrive_remote(read, lane);
        } else {
            warp_arrive(read);
        }
    }
};

template <class Ctas>
K2K_DEVICE void make_barriers(MlaSm90Storage& smem) {
    for (int i = 0; i < kHopperTaskSlots; ++i) {
        arch::mbarrier_init(smem.task_known[i], 1);
        arch::mbarrier_init(smem.task_done[i], 9);
    }
    arch::mbarrier_init(smem.q_landed, 1);
    arch::mbarrier_init(smem.q_read, 4);
    for (int stage = 0; stage < kHopperStages; ++stage) {
        for (Mbarrier& landed : smem.landed[stage]) arch::mbarrier_init(landed, 1);
        arch::mbarrier_init(smem.read[stage], 8 * Ctas::kCount);
    }
    arch::mbarrier_init(smem.p_full, 4);
    arch::mbarrier_init(smem.p_empty, 4);
    arch::fence_mbarrier_init();
}

// ---- scheduler warp and producer warp

K2K_DEVICE void find_tasks(MlaSm90Storage& smem, const MlaDecodeParams& p) {
    // Compute this CTA's share, then write its tasks one by one, as slots become free.
    MlaTasks tasks(p, blockIdx.x);
    for (TaskPosition at;; at.advance()) {
        arch::mbarrier_wait(smem.task_done[at.slot], at.parity ^ 1);
        MlaTask& task = smem.tasks[at.slot];
        tasks.next(p, task);
        if (arch::lane_id() == 0) smem.bad_page[at.slot] = false;
        warp_arrive(smem.task_known[at.slot]);
        if (task.last) return;
    }
}

// The pages of a task's keys, one per TMA copy of `box_rows` keys. Each lane looks one up; the next
// 32 are loaded ahead of their use.
class PagesOfTask {
  public:
    K2K_DEVICE PagesOfTask(const MlaDecodeParams& p, const MlaTask& task, int box_rows)
        : table_(p.block_table + task.sequence * p.table_stride),
          page_size_(p.page_size),
          key_(task.first_key + static_cast<int>(arch::lane_id()) * box_rows),
          step_(32 * box_rows),
          end_(task.end_key),
          ahead_(look_up()) {}

    // Advances to the next 32 copies; true if one of their pages is outside of the cache. Such a
    // page, and one past the task's end, becomes -1.
    K2K_DEVICE bool advance(int64_t pages) {
        const bool used = key_ < end_, exists = used && ahead_ >= 0 && ahead_ < pages;
        page_ = exists ? ahead_ : -1;
        key_ += step_;
        ahead_ = look_up();
        return arch::any(used && !exists);
    }

    K2K_DEVICE int operator()(int box) const { return arch::shuffle(page_, box); }

  private:
    K2K_DEVICE int look_up() const { return key_ < end_ ? table_[key_ / page_size_] : -1; }

    const int* table_;
    int page_size_, key_, step_, end_;
    int ahead_, page_ = -1;
};

template <class Ctas>
K2K_DEVICE void load_tasks(MlaSm90Storage& smem, const MlaDecodeParams& p, const TensorMap& q_map,
                           const TensorMap& cache_map) {
    // elect_one: the compiler then knows that a single lane issues the copies.
    const bool leader = arch::elect_one();
    const uint32_t rank = Ctas::rank();
    const int box_rows = hopper_box_rows(p.page_size);
    const int parts = kBlockKeys / box_rows;  // TMA copies of a box
    KeysPosition keys;
    uint32_t q_parity = 1;
    for (TaskPosition at;; at.advance()) {
        arch::mbarrier_wait(smem.task_known[at.slot], at.parity);
        const MlaTask& task = smem.tasks[at.slot];
        if (task.last) {
            // pair: wait for the other CTA's last arrivals at both stages; then this CTA may exit.
            if (Ctas::kCount > 1 && leader) {
                for (int i = 0; i < kHopperStages; ++i, keys.advance()) {
                    arch::mbarrier_wait(smem.read[keys.slot], keys.parity ^ 1);
                }
            }
            arch::sync_warp();
            return;
        }
        PagesOfTask pages(p, task, box_rows);
        const int first_key = task.first_key, end_key = task.end_key;
        int box = 0;  // index of the next of the 32 pages
        for (int key = first_key; key < end_key; key += kBlockKeys, keys.advance()) {
            // Compute page and slot of each copy, the same for all nine boxes, before the wait.
            if (box == 0 && pages.advance(p.pages) && leader) smem.bad_page[at.slot] = true;
            int page[kMostParts], slot[kMostParts];
            uint32_t bytes = 0;  // per box
            K2K_UNROLL
            for (int i = 0; i < kMostParts; ++i) {
                page[i] = i < parts ? pages(box + i) : -1;
                slot[i] = i == 0 ? key % p.page_size : slot[i - 1] + box_rows;
                if (slot[i] == p.page_size) slot[i] = 0;
                if (page[i] >= 0) bytes += box_rows * (kBoxBytes / kBlockKeys);
            }
            box = (box + parts) % 32;

            // Wait for a free stage. Only the leader waits: a lane that polled late could see the
            // parity of a later phase.
            if (!leader) continue;
            arch::mbarrier_wait(smem.read[keys.slot], keys.parity ^ 1);
            // Load the nine boxes. In a pair, this CTA's landed[] expects the bytes of all nine.
            K2K_NO_UNROLL
            for (uint32_t i = 0; i < kHopperBoxes; ++i) {
                Mbarrier& landed = smem.landed[keys.slot][i];
                arch::mbarrier_arrive_expect_tx(landed, bytes);
                if (i % Ctas::kCount != rank) continue;
                K2K_UNROLL
                for (int j = 0; j < kMostParts; ++j) {
                    if (page[j] < 0) continue;
                    Ctas::load(smem.keys[keys.slot][i].chunks + j * box_rows * 8, cache_map, landed,
                               i * kHopperColumns, slot[j], page[j]);
                }
            }
            if (key != first_key) continue;
            // Load q after the task's first keys: only q waits for the last task's scores.
            arch::mbarrier_wait(smem.q_read, q_parity);
            q_parity ^= 1;
            const int row = task.first_token * p.heads + task.first_row;
            arch::mbarrier_arrive_expect_tx(smem.q_landed, kStageBytes);
            K2K_NO_UNROLL
            for (int i = 0; i < kHopperBoxes; ++i) {
                arch::tma_load_2d(&smem.q[i], q_map, smem.q_landed, i * kHopperColumns, row);
            }
        }
        warp_arrive(smem.task_done[at.slot]);
    }
}

// ---- both consumers: a half of the output

// [64, 256] of a warpgroup, in wgmma's accumulator layout. A thread has rows `row` (h = 0) and
// `row` + 8 (h = 1) of the tile: out[4 j + 2 h + e] is column 8 j + 2 (lane % 4) + e of the half.
using HalfOutput = float[kHalfLatent / 2];

K2K_DEVICE void clear(HalfOutput& out) {
    K2K_UNROLL
    for (int i = 0; i < kHalfLatent / 2; ++i) out[i] = 0;
}

K2K_DEVICE void scale(HalfOutput& out, const float (&factor)[2]) {
    K2K_UNROLL
    for (int i = 0; i < kHalfLatent / 2; ++i) out[i] *= factor[i / 2 % 2];
}

// Stores this thread's row h times `by` to columns `first` and up of the output.
template <class T>
K2K_DEVICE void store_half_row(const MlaDecodeParams& p, const MlaTask& task, const HalfOutput& out,
                               int tile_row, int h, int first, float by) {
    const bool real = tile_row < task.num_rows;  // the same in a quad, not in the warp
    const int lane = arch::lane_id() % 4;
    // Split keys: floats to the workspace, for kernel_combine.cuh.
    if (task.partial >= 0) {
        float* to = p.partial_out + (int64_t(task.partial) * kHopperRows + tile_row) * kLatent +
                    first + 2 * lane;
        if (!real) return;
        K2K_UNROLL
        for (int j = 0; j < kHalfLatent / 8; ++j) {
            *reinterpret_cast<float2*>(to + 8 * j) =
                make_float2(out[4 * j + 2 * h] * by, out[4 * j + 2 * h + 1] * by);
        }
        return;
    }
    // All keys: T to out. The quad exchanges words, so that each lane stores 16 bytes.
    const MlaRow place = mla_row(p, task, real ? tile_row : 0);
    T* to = out_at<T>(p, place, first + 8 * lane);
    K2K_UNROLL
    for (int j = 0; j < kHalfLatent / 8; j += 4) {
        uint32_t words[4];
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float* two = out + 4 * (j + i) + 2 * h;
            words[i] = pack<T>(two[0] * by, two[1] * by);
        }
        tile::transpose_quad(words);
        uint4* chunk = reinterpret_cast<uint4*>(to + 8 * j);
        if (real) arch::store(chunk, make_uint4(words[0], words[1], words[2], words[3]));
    }
}

// ---- Left: consumer warpgroup 0

template <class T, class Ctas>
K2K_DEVICE void attend_left(MlaSm90Storage& smem, const MlaDecodeParams& p) {
    const int lane = arch::lane_id(), warp = arch::warp_id();
    const int row = warp * 16 + lane / 4, pair = lane % 4;
    const arch::Swizzle swizzle = arch::Swizzle::k128;
    const uint64_t q = arch::matrix_descriptor(smem.q, swizzle, 0, 1024);
    const uint64_t keys = arch::matrix_descriptor(smem.keys, swizzle, 0, 1024);
    const uint64_t values = arch::matrix_descriptor(smem.keys, swizzle, kBoxBytes, 1024);
    // stmatrix: the row of P and the chunk of 8 keys that this lane addresses. Matrices 0 and 1
    // are rows 0 to 7 and 8 to 15 of the first 8 keys, 2 and 3 the same rows of the next 8.
    const uint32_t probabilities =
        arch::smem_address(&smem.probabilities) + (warp * 16 + lane % 16) * 128;
    const uint32_t chunk = tile::swizzled(lane, lane / 16) * 16;

    KeysPosition stage;
    uint32_t q_parity = 0, empty_parity = 1;
    const auto hand_over = [&] {
        arch::fence_proxy_async();
        warp_arrive(smem.p_full);
    };
    const auto wait_p_empty = [&] {
        arch::mbarrier_wait(smem.p_empty, empty_parity);
        empty_parity ^= 1;
    };
    for (TaskPosition at;; at.advance()) {
        arch::mbarrier_wait(smem.task_known[at.slot], at.parity);
        const MlaTask& task = smem.tasks[at.slot];
        if (task.last) return;
        // Prologue of a task: clear accumulators and statistics; wait for q, if there are keys.
        HalfOutput out;
        clear(out);
        tile::OnlineSoftmax softmax;
        softmax.reset();
        if (task.first_key < task.end_key) {
            arch::mbarrier_wait(smem.q_landed, q_parity);
            q_parity ^= 1;
        }
        for (int key = task.first_key; key < task.end_key; key += kBlockKeys, stage.advance()) {
            const int end_key = task.end_key;
            const uint64_t step = stage.slot * arch::descriptor_step(kStageBytes);

            // S = q K^T, 64 dims at a time, as each box lands.
            float scores[kBlockKeys / 8][4];  // [64, 64]
            auto& accumulators = reinterpret_cast<float (&)[kBlockKeys / 2]>(scores);
            K2K_UNROLL
            for (int box = 0; box < kHopperBoxes; ++box) {
                arch::mbarrier_wait(smem.landed[stage.slot][box], stage.parity);
                arch::wgmma_fence();
                K2K_UNROLL
                for (int k = 0; k < kHopperColumns / 16; ++k) {
                    const uint64_t dims = arch::descriptor_step(box * kBoxBytes + k * 32);
                    arch::wgmma_ss<T, kBlockKeys>(accumulators, q + dims, keys + step + dims,
                                                  box + k > 0);
                }
            }
            arch::wgmma_commit();
            arch::wgmma_wait<0>(accumulators);
            // Release q after the task's last scores.
            if (key + kBlockKeys >= end_key) warp_arrive(smem.q_read);

            // Mask keys that a row does not see; only the last blocks have them.
            if (key + kBlockKeys > task.border || key + kBlockKeys > end_key) {
                K2K_UNROLL
                for (int h = 0; h < 2; ++h) {
                    mask_row(scores, p, task, row + 8 * h, h, key + 2 * pair);
                }
            }
            // Online softmax: scores become P; `factor` rescales the output so far.
            float factor[2];
            const bool rescale = softmax.update(scores, factor, p.scale * kLog2E);

            // Round P to T, as wgmma's A operand in registers, 16 keys each.
            uint32_t a[kBlockKeys / 16][4];  // [64, 16] each
            K2K_UNROLL
            for (int k = 0; k < kBlockKeys / 16; ++k) {
                K2K_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const float* two = scores[2 * k + i / 2] + i % 2 * 2;
                    a[k][i] = pack<T>(two[0], two[1]);
                }
            }
            // Store P and the factors for Right, once it has read the last block's.
            wait_p_empty();
            K2K_UNROLL
            for (int k = 0; k < kBlockKeys / 16; ++k) {
                arch::stmatrix(a[k], probabilities + (chunk ^ k * 32));
            }
            if (pair == 0) {
                smem.factors[row] = rescale ? factor[0] : 1;
                smem.factors[row + 8] = rescale ? factor[1] : 1;
            }
            hand_over();

            // Rescale the output only if a row maximum of the warp grew.
            if (rescale) scale(out, factor);
            // Tail: clear rows of V past the end; they may hold NaN, and 0 * NaN is NaN.
            if (key + kBlockKeys > end_key) {
                tile::clear_rows<kHalfBoxes>(smem.keys[stage.slot], end_key - key, kLeftClears);
            }
            // out += P V, P from registers, V from boxes 0 to 3.
            arch::wgmma_fence();
            K2K_UNROLL
            for (int k = 0; k < kBlockKeys / 16; ++k) {
                arch::wgmma_rs<T, kHalfLatent, arch::Major::kMN>(
                    out, a[k], values + step + arch::descriptor_step(k * 2048), true);
            }
            arch::wgmma_commit();
            arch::wgmma_wait<0>(out);
            // Release the stage.
            Ctas::release(smem.read[stage.slot]);
        }

        // Epilogue: pass the normalizers to Right, then store statistics and the left half.
        softmax.finish(smem.bad_page[at.slot]);
        wait_p_empty();
        if (pair == 0) {
            smem.factors[row] = softmax.normalizer(0);
            smem.factors[row + 8] = softmax.normalizer(1);
        }
        hand_over();
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int tile_row = row + 8 * h;
            if (pair == 0 && tile_row < task.num_rows) {
                store_stats(p, task, softmax, mla_row(p, task, tile_row), tile_row, h);
            }
            store_half_row<T>(p, task, out, tile_row, h, 0, softmax.normalizer(h));
        }
        warp_arrive(smem.task_done[at.slot]);
    }
}

// ---- Right: consumer warpgroup 1

template <class T, class Ctas>
K2K_DEVICE void attend_right(MlaSm90Storage& smem, const MlaDecodeParams& p) {
    const int row = arch::warp_id() % 4 * 16 + arch::lane_id() / 4;
    const arch::Swizzle swizzle = arch::Swizzle::k128;
    const uint64_t probabilities = arch::matrix_descriptor(&smem.probabilities, swizzle, 0, 1024);
    const uint64_t values =
        arch::matrix_descriptor(&smem.keys[0][kHalfBoxes], swizzle, kBoxBytes, 1024);

    KeysPosition stage;
    uint32_t full_parity = 0;
    const auto take_factors = [&](float (&factor)[2]) {
        arch::mbarrier_wait(smem.p_full, full_parity);
        full_parity ^= 1;
        factor[0] = smem.factors[row], factor[1] = smem.factors[row + 8];
    };
    for (TaskPosition at;; at.advance()) {
        arch::mbarrier_wait(smem.task_known[at.slot], at.parity);
        const MlaTask& task = smem.tasks[at.slot];
        if (task.last) return;
        HalfOutput out;
        clear(out);
        float factor[2];
        for (int key = task.first_key; key < task.end_key; key += kBlockKeys, stage.advance()) {
            // Wait for Left's P and factors; the keys have then landed, too.
            take_factors(factor);
            if (arch::any(factor[0] != 1 || factor[1] != 1)) scale(out, factor);
            // Tail: clear rows of V past the end.
            const int valid = task.end_key - key;
            if (valid < kBlockKeys) {
                tile::clear_rows<kHalfBoxes>(&smem.keys[stage.slot][kHalfBoxes], valid,
                                             kRightClears);
            }
            // out += P V, P from shared memory, V from boxes 4 to 7. (Box 8 is rope: K alone.)
            const uint64_t step = stage.slot * arch::descriptor_step(kStageBytes);
            arch::wgmma_fence();
            K2K_UNROLL
            for (int k = 0; k < kBlockKeys / 16; ++k) {
                arch::wgmma_ss<T, kHalfLatent, arch::Major::kK, arch::Major::kMN>(
                    out, probabilities + arch::descriptor_step(k * 32),
                    values + step + arch::descriptor_step(k * 2048), true);
            }
            arch::wgmma_commit();
            arch::wgmma_wait<0>(out);
            // Release P and the factors to Left, the stage to the producer.
            warp_arrive(smem.p_empty);
            Ctas::release(smem.read[stage.slot]);
        }
        // Epilogue: take the normalizers, store the right half.
        take_factors(factor);
        warp_arrive(smem.p_empty);
        store_half_row<T>(p, task, out, row, 0, kHalfLatent, factor[0]);
        store_half_row<T>(p, task, out, row + 8, 1, kHalfLatent, factor[1]);
        warp_arrive(smem.task_done[at.slot]);
    }
}

template <class T, bool kPair>
__global__ void __launch_bounds__(kHopperThreads, 1)
    mla_decode_sm90_kernel(const __grid_constant__ MlaDecodeParams p,
                           const __grid_constant__ TensorMap q_map,
                           const __grid_constant__ TensorMap cache_map) {
    using Ctas = MlaCtas<kPair>;
    // Initialize the barriers; in a pair both CTAs sync before one arrives at the other's.
    MlaSm90Storage& smem = arch::shared_storage<MlaSm90Storage>();
    const int warp = arch::warp_id();
    if (threadIdx.x == 0) make_barriers<Ctas>(smem);
    // Programmatic dependent launch of mla_combine_sm90_kernel, which waits for this grid's end.
    arch::grid_dependency_launch();
    const auto meet = [] {
        if constexpr (kPair) {
            arch::cluster_sync_relaxed();
        } else {
            arch::sync_block();
        }
    };
    meet();

    // Roles.
    if (warp < 4) {
        arch::registers_increase<216>();
        attend_left<T, Ctas>(smem, p);
    } else if (warp < 8) {
        arch::registers_increase<216>();
        attend_right<T, Ctas>(smem, p);
    } else {
        arch::registers_decrease<72>();
        if (warp == 8) {
            if (arch::lane_id() == 0) {
                arch::tma_prefetch(q_map);
                arch::tma_prefetch(cache_map);
            }
            load_tasks<Ctas>(smem, p, q_map, cache_map);
        } else if (warp == 9) {
            find_tasks(smem, p);
        }
    }
    // pair: do not exit while the other CTA's multicast copies may land here.
    if constexpr (kPair) arch::cluster_sync_relaxed();
}

// combine_rows, launched early: its CTAs start on SMs whose mla_decode CTA has exited.
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    mla_combine_sm90_kernel(const __grid_constant__ MlaDecodeParams p, int rows_per_block) {
    arch::grid_dependency_wait();
    combine_rows<T>(p, rows_per_block);
}

}  // namespace k2k
