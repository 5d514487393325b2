#pragma once

// MLA decode for Hopper: the work of kernel_sm80.cuh on wgmma and TMA, 64 rows of q at a time.
//
//     S[r, k] = scale * q[r, :576] . row[k, :576]      r: query token x head, k: cached row
//     out[r, :512] = softmax_k(S[r, :]) row[k, :512],  lse[r], max_logits[r]
//
// The output of a tile, 64 x 512 floats, is half of a multiprocessor's registers: two warpgroups
// have half of its columns each. Left also computes the scores and the softmax, Right is handed the
// probabilities. (FlashAttention-3 divides a head dimension of 512 this way:
// hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp, LargeHeadDimV.)
//
// Grid      one block a multiprocessor; each takes its tasks as schedule.cuh finds them. Where
//           several tiles read the same keys, blocks form pairs, clusters of two.
// Roles     Left    warps 0 to 3: S = q K^T, softmax, out[:, :256] += P V[:, :256]
//           Right   warps 4 to 7: out[:, 256:] += P V[:, 256:]
//           Loader  warp 8: brings the keys of this task, then of the next, and q; in a pair every
//                   other box of keys, for both blocks
//           Finder  warp 9: finds the tasks, up to four ahead
// Block     64 keys: nine boxes of 64 columns, each in its own 8 KB of a stage with the swizzle of
//           128 bytes. The same bytes are K (rows contiguous) and V (columns contiguous). A box
//           comes in as many copies as pages have a part in it. L2 is told to give it up first:
//           blocks that share keys read them at about the same time, and nobody again.
// Order     Left: scores, softmax, hand over, its half of P V, next block. Right's half runs beside
//           Left's. Scores of the next block never come first: they would have to wait for its
//           keys while this block still holds the stage that further keys wait for.
// Barriers  event            arrivals                  waited for by
//           task_known[4]    Finder                    Loader, Left, Right
//           task_done[4]     Loader, 8 warps           Finder: the slot may hold another task
//           q_landed         Loader + bytes            Left
//           q_read           4 warps of Left           Loader: after the task's last scores
//           landed[2][9]     Loader + bytes            Left, box by box
//           read[2]          8 warps, of both blocks   Loader: the stage is free
//           handed_over      4 warps of Left           Right: probabilities and factors; at the end
//                                                      of a task, its normalizers
//           taken_over       4 warps of Right          Left: before it hands over again
//           All that Right reads of a stage has landed before Left hands over. Named barriers 1
//           (Left) and 2 (Right) stand around the clearing of rows behind the end.
// Behind the end  keys of the last block that no row sees are not copied, or hold whatever lies in
//           their slots: scores are masked, and their rows of V become zeros, as 0 * NaN is NaN.
//           A page that does not exist is not copied; the task's rows become NaN.
// Shared    q 72 KB, two stages of 72 KB, probabilities 8 KB, the rest 1 KB: 225 KB of 227.
// Registers launched with 168 a thread; Left and Right take 216 (output 128, scores 32,
//           probabilities 16), the others keep 72.
// Limits    bfloat16 or float16. The cache's strides are not 0; pages have a multiple of 16 slots;
//           rows of q follow one another at one stride.

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
#include "mla_decode/schedule.cuh"
#include "mla_decode/softmax.cuh"

namespace k2k {

using arch::Mbarrier;
using arch::TensorMap;

constexpr int kHalfLatent = kLatent / 2;
constexpr int kHalfBoxes = kHalfLatent / kHopperColumns;  // that hold one half of V

// 64 rows of 128 bytes; chunk c of row r is at c ^ (r % 8).
struct alignas(1024) MlaBox {
    uint4 chunks[kHopperRows * 8];
};

struct MlaSm90Storage {
    MlaBox q[kHopperBoxes];
    MlaBox keys[kHopperStages][kHopperBoxes];
    MlaBox probabilities;
    float factors[kHopperRows];  // of what Right has summed so far; in the end, normalizers
    MlaTask tasks[kHopperTaskSlots];
    bool bad_page[kHopperTaskSlots];  // the task's block table names a page that does not exist
    Mbarrier task_known[kHopperTaskSlots], task_done[kHopperTaskSlots];
    Mbarrier q_landed, q_read;
    Mbarrier landed[kHopperStages][kHopperBoxes], read[kHopperStages];
    Mbarrier handed_over, taken_over;
};
static_assert(sizeof(MlaSm90Storage) <= 232448 && kKeyDim % kHopperColumns == 0);

constexpr uint32_t kBoxBytes = sizeof(MlaBox), kStageBytes = kHopperBoxes * kBoxBytes;

// Which of a ring's stages is next, and the parity of its phase.
template <int kStages>
struct RingPlace {
    int stage = 0;
    uint32_t parity = 0;

    K2K_DEVICE void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};
using TaskPlace = RingPlace<kHopperTaskSlots>;
using KeysPlace = RingPlace<kHopperStages>;

// Who loads what: a block for itself, or a pair of blocks, in a cluster, every other box for both.
template <bool kPair>
K2K_DEVICE uint32_t rank_of_pair() {
    if constexpr (kPair) return arch::cluster_rank();
    return 0;
}

// The warp's arrival, once all its lanes are done.
K2K_DEVICE void warp_arrives(Mbarrier& barrier K2K_WHERE) {
    arch::sync_warp(arch::kFullWarp K2K_PASS_WHERE);
    if (arch::lane_id() == 0) arch::mbarrier_arrive(barrier K2K_PASS_WHERE);
}

// The same for a stage of keys, which is free once both blocks of a pair have read it.
template <bool kPair>
K2K_DEVICE void warp_has_read(Mbarrier& read K2K_WHERE) {
    if constexpr (kPair) {
        arch::sync_warp(arch::kFullWarp K2K_PASS_WHERE);
        const uint32_t lane = arch::lane_id();
        if (lane < 2) arch::mbarrier_arrive_remote(read, lane K2K_PASS_WHERE);
    } else {
        warp_arrives(read K2K_PASS_WHERE);
    }
}

template <bool kPair>
K2K_DEVICE void make_barriers(MlaSm90Storage& smem) {
    for (int i = 0; i < kHopperTaskSlots; ++i) {
        arch::mbarrier_init(smem.task_known[i], 1);
        arch::mbarrier_init(smem.task_done[i], 9);
    }
    arch::mbarrier_init(smem.q_landed, 1);
    arch::mbarrier_init(smem.q_read, 4);
    for (int stage = 0; stage < kHopperStages; ++stage) {
        for (Mbarrier& landed : smem.landed[stage]) arch::mbarrier_init(landed, 1);
        arch::mbarrier_init(smem.read[stage], kPair ? 16 : 8);
    }
    arch::mbarrier_init(smem.handed_over, 4);
    arch::mbarrier_init(smem.taken_over, 4);
    arch::fence_mbarrier_init();
}

// ---- Finder and Loader

K2K_DEVICE void find_tasks(MlaSm90Storage& smem, const MlaDecodeParams& p) {
    MlaTasks tasks(p, blockIdx.x);
    for (TaskPlace place;; place.advance()) {
        arch::mbarrier_wait(smem.task_done[place.stage], place.parity ^ 1);
        MlaTask& task = smem.tasks[place.stage];
        tasks.next(p, task);
        if (arch::lane_id() == 0) smem.bad_page[place.stage] = false;
        warp_arrives(smem.task_known[place.stage]);
        if (task.last) return;
    }
}

// The pages of a task's keys, box by box. Each lane looks one up, 32 boxes ahead of their use.
class PagesOfTask {
  public:
    K2K_DEVICE PagesOfTask(const MlaDecodeParams& p, const MlaTask& task, int box_rows)
        : table_(p.block_table + task.sequence * p.table_stride),
          page_size_(p.page_size),
          key_(task.first_key + static_cast<int>(arch::lane_id()) * box_rows),
          step_(32 * box_rows),
          end_(task.end_key),
          ahead_(look_up()) {}

    // Goes on to the next 32 boxes; true if the pages of some of them do not exist. A page that
    // does not, or is not wanted, becomes -1.
    K2K_DEVICE bool advance(int64_t pages K2K_WHERE) {
        const bool wanted = key_ < end_, exists = wanted && ahead_ >= 0 && ahead_ < pages;
        page_ = exists ? ahead_ : -1;
        key_ += step_;
        ahead_ = look_up();
        return arch::any(wanted && !exists K2K_PASS_WHERE);
    }

    K2K_DEVICE int operator()(int box K2K_WHERE) const {
        return arch::shuffle(page_, box K2K_PASS_WHERE);
    }

  private:
    K2K_DEVICE int look_up() const { return key_ < end_ ? table_[key_ / page_size_] : -1; }

    const int* table_;
    int page_size_, key_, step_, end_;
    int ahead_, page_ = -1;
};

template <bool kPair>
K2K_DEVICE void load_tasks(MlaSm90Storage& smem,
                           const MlaDecodeParams& p,
                           const TensorMap& q_map,
                           const TensorMap& cache_map) {
    // Elected, so that the compiler can prove that one lane alone starts the copies.
    const bool leader = arch::elect_one();
    const uint32_t rank = rank_of_pair<kPair>();
    const int box_rows = hopper_box_rows(p.page_size);
    const int parts = kBlockKeys / box_rows;  // of a box, each from its page
    KeysPlace keys;
    uint32_t q_parity = 1;
    for (TaskPlace place;; place.advance()) {
        arch::mbarrier_wait(smem.task_known[place.stage], place.parity);
        const MlaTask& task = smem.tasks[place.stage];
        if (task.last) {
            // Each stage is free: the other CTA's arrivals here have landed before this one ends.
            if (kPair && leader) {
                for (int i = 0; i < kHopperStages; ++i, keys.advance()) {
                    arch::mbarrier_wait(smem.read[keys.stage], keys.parity ^ 1);
                }
            }
            arch::sync_warp();
            return;
        }
        PagesOfTask pages(p, task, box_rows);
        const int first_key = task.first_key, end_key = task.end_key;
        int box = 0;  // of the 32 whose pages are known
        for (int key = first_key; key < end_key; key += kBlockKeys, keys.advance()) {
            if (box == 0 && pages.advance(p.pages) && leader) smem.bad_page[place.stage] = true;
            int page[kBlockKeys / kHopperMinBoxRows], slot[kBlockKeys / kHopperMinBoxRows];
            uint32_t bytes = 0;
            K2K_UNROLL
            for (int i = 0; i < kBlockKeys / kHopperMinBoxRows; ++i) {
                page[i] = i < parts ? pages(box + i) : -1;
                slot[i] = i == 0 ? key % p.page_size : slot[i - 1] + box_rows;
                if (slot[i] == p.page_size) slot[i] = 0;
                if (page[i] >= 0) bytes += box_rows * (kBoxBytes / kBlockKeys);
            }
            box = (box + parts) % 32;

            // The leader alone waits: a lane that looked later might miss a whole phase.
            if (!leader) continue;
            arch::mbarrier_wait(smem.read[keys.stage], keys.parity ^ 1);
            K2K_NO_UNROLL
            for (uint32_t i = 0; i < kHopperBoxes; ++i) {
                Mbarrier& landed = smem.landed[keys.stage][i];
                arch::mbarrier_arrive_expect_tx(landed, bytes);
                if (kPair && i % 2 != rank) continue;
                K2K_UNROLL
                for (int j = 0; j < kBlockKeys / kHopperMinBoxRows; ++j) {
                    if (page[j] < 0) continue;
                    uint4* target = smem.keys[keys.stage][i].chunks + j * box_rows * 8;
                    const int column = i * kHopperColumns;
                    const auto hint = arch::CacheHint::kEvictFirst;
                    if constexpr (kPair) {
                        arch::tma_load_3d_multicast(target, cache_map, landed, 3, column, slot[j],
                                                    page[j], hint);
                    } else {
                        arch::tma_load_3d(target, cache_map, landed, column, slot[j], page[j],
                                          hint);
                    }
                }
            }
            if (key != first_key) continue;
            // The first keys do not wait for the last scores of the task before, but q must.
            arch::mbarrier_wait(smem.q_read, q_parity);
            q_parity ^= 1;
            const int row = task.first_token * p.heads + task.first_row;
            arch::mbarrier_arrive_expect_tx(smem.q_landed, kStageBytes);
            K2K_NO_UNROLL
            for (int i = 0; i < kHopperBoxes; ++i) {
                arch::tma_load_2d(&smem.q[i], q_map, smem.q_landed, i * kHopperColumns, row);
            }
        }
        warp_arrives(smem.task_done[place.stage]);
    }
}

// ---- what Left and Right have in common: a half of the output

// A thread has rows `row` and `row` + 8 of the tile, as wgmma lays them out: out[4 j + 2 h + e] is
// in row h's column 8 j + 2 (lane % 4) + e of the half.
using HalfOutput = float[kHalfLatent / 2];

K2K_DEVICE void clear(HalfOutput& out) {
    K2K_UNROLL
    for (int i = 0; i < kHalfLatent / 2; ++i) out[i] = 0;
}

K2K_DEVICE void scale(HalfOutput& out, const float (&factor)[2]) {
    K2K_UNROLL
    for (int i = 0; i < kHalfLatent / 2; ++i) out[i] *= factor[i / 2 % 2];
}

// Makes zeros of half a V's rows from `valid` on; by its warpgroup, which meets at barrier `id`.
K2K_DEVICE void clear_rows(MlaBox* half, int valid, int id) {
    const int thread = threadIdx.x % 128;
    arch::barrier_sync(id, 128);
    for (int row = valid + thread / 8; row < kBlockKeys; row += 16) {
        K2K_UNROLL
        for (int i = 0; i < kHalfBoxes; ++i) {
            half[i].chunks[row * 8 + thread % 8] = make_uint4(0, 0, 0, 0);
        }
    }
    arch::fence_proxy_async();
    arch::barrier_sync(id, 128);
}

// 4 x 4 words among four neighbouring lanes: words[i] of lane j becomes words[j] of lane i.
K2K_DEVICE void transpose_words(uint32_t (&words)[4] K2K_WHERE) {
    K2K_UNROLL
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = arch::lane_id() & bit;
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            const uint32_t sent = upper ? words[i] : words[i + bit];
            const uint32_t got = arch::shuffle_xor(sent, bit K2K_PASS_WHERE);
            (upper ? words[i] : words[i + bit]) = got;
        }
    }
}

// Row h of this thread, from column `first` of the output on. Four lanes write 64 bytes side by
// side.
template <class T>
K2K_DEVICE void store_half_row(const MlaDecodeParams& p,
                               const MlaTask& task,
                               const HalfOutput& out,
                               int tile_row,
                               int h,
                               int first,
                               float by) {
    const bool real = tile_row < task.num_rows;  // its four lanes agree, all 32 need not
    const int lane = arch::lane_id() % 4;
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
    const MlaRow place = mla_row(p, task, real ? tile_row : 0);
    T* to = static_cast<T*>(p.out) + place.token * p.out_token_stride +
            place.head * p.out_head_stride + first + 8 * lane;
    K2K_UNROLL
    for (int j = 0; j < kHalfLatent / 8; j += 4) {
        uint32_t words[4];
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float* two = out + 4 * (j + i) + 2 * h;
            words[i] = pack<T>(two[0] * by, two[1] * by);
        }
        transpose_words(words);
        uint4* chunk = reinterpret_cast<uint4*>(to + 8 * j);
        if (real) arch::store(chunk, make_uint4(words[0], words[1], words[2], words[3]));
    }
}

// ---- Left

template <class T, bool kPair>
K2K_DEVICE void attend_left(MlaSm90Storage& smem, const MlaDecodeParams& p) {
    const int lane = arch::lane_id(), warp = arch::warp_id();
    const int row = warp * 16 + lane / 4, pair = lane % 4;
    const arch::Swizzle swizzle = arch::Swizzle::k128;
    const uint64_t q = arch::matrix_descriptor(smem.q, swizzle, 0, 1024);
    const uint64_t keys = arch::matrix_descriptor(smem.keys, swizzle, 0, 1024);
    const uint64_t values = arch::matrix_descriptor(smem.keys, swizzle, kBoxBytes, 1024);
    // Which row of which 8x8 matrix this lane addresses for stmatrix: two of rows, then of keys.
    const uint32_t probabilities =
        arch::smem_address(&smem.probabilities) + (warp * 16 + lane % 16) * 128;
    const uint32_t chunk = lane / 16 ^ lane % 8;

    KeysPlace at;
    uint32_t q_parity = 0, taken_parity = 1;
    const auto hand_over = [&] {
        arch::fence_proxy_async();
        warp_arrives(smem.handed_over);
    };
    const auto wait_taken_over = [&] {
        arch::mbarrier_wait(smem.taken_over, taken_parity);
        taken_parity ^= 1;
    };
    for (TaskPlace place;; place.advance()) {
        arch::mbarrier_wait(smem.task_known[place.stage], place.parity);
        const MlaTask& task = smem.tasks[place.stage];
        if (task.last) return;
        HalfOutput out;
        clear(out);
        MlaRowState state;
        state.reset();
        if (task.first_key < task.end_key) {
            arch::mbarrier_wait(smem.q_landed, q_parity);
            q_parity ^= 1;
        }
        for (int key = task.first_key; key < task.end_key; key += kBlockKeys, at.advance()) {
            const int end_key = task.end_key;
            const uint64_t stage = at.stage * arch::descriptor_step(kStageBytes);
            float scores[kBlockKeys / 8][4];
            K2K_UNROLL
            for (int box = 0; box < kHopperBoxes; ++box) {
                arch::mbarrier_wait(smem.landed[at.stage][box], at.parity);
                arch::wgmma_fence();
                K2K_UNROLL
                for (int k = 0; k < kHopperColumns / 16; ++k) {
                    const uint64_t step = arch::descriptor_step(box * kBoxBytes + k * 32);
                    arch::wgmma_ss<T, kBlockKeys>(
                        reinterpret_cast<float (&)[kBlockKeys / 2]>(scores), q + step,
                        keys + stage + step, box + k > 0);
                }
            }
            arch::wgmma_commit();
            arch::wgmma_wait<0>(reinterpret_cast<float (&)[kBlockKeys / 2]>(scores));
            if (key + kBlockKeys >= end_key) warp_arrives(smem.q_read);

            if (key + kBlockKeys > task.border || key + kBlockKeys > end_key) {
                K2K_UNROLL
                for (int h = 0; h < 2; ++h) {
                    const int border = mla_row(p, task, row + 8 * h).border;
                    mask_row(scores, h, key + 2 * pair, border < end_key ? border : end_key);
                }
            }
            float factor[2];
            const bool rescale = state.update(scores, factor, p.scale * kLog2E);

            uint32_t a[kBlockKeys / 16][4];
            K2K_UNROLL
            for (int k = 0; k < kBlockKeys / 16; ++k) {
                K2K_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const float* two = scores[2 * k + i / 2] + i % 2 * 2;
                    a[k][i] = pack<T>(two[0], two[1]);
                }
            }
            wait_taken_over();
            K2K_UNROLL
            for (int k = 0; k < kBlockKeys / 16; ++k) {
                arch::stmatrix(a[k], probabilities + (chunk ^ 2 * k) * 16);
            }
            if (pair == 0) {
                smem.factors[row] = rescale ? factor[0] : 1;
                smem.factors[row + 8] = rescale ? factor[1] : 1;
            }
            hand_over();

            if (rescale) scale(out, factor);
            if (key + kBlockKeys > end_key) clear_rows(smem.keys[at.stage], end_key - key, 1);
            arch::wgmma_fence();
            K2K_UNROLL
            for (int k = 0; k < kBlockKeys / 16; ++k) {
                arch::wgmma_rs<T, kHalfLatent, arch::Major::kMN>(
                    out, a[k], values + stage + arch::descriptor_step(k * 2048), true);
            }
            arch::wgmma_commit();
            arch::wgmma_wait<0>(out);
            warp_has_read<kPair>(smem.read[at.stage]);
        }

        state.finish(smem.bad_page[place.stage]);
        wait_taken_over();
        if (pair == 0) {
            smem.factors[row] = state.normalizer(0);
            smem.factors[row + 8] = state.normalizer(1);
        }
        hand_over();
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int tile_row = row + 8 * h;
            if (pair == 0 && tile_row < task.num_rows) {
                state.store_stats(p, task, mla_row(p, task, tile_row), tile_row, h);
            }
            store_half_row<T>(p, task, out, tile_row, h, 0, state.normalizer(h));
        }
        warp_arrives(smem.task_done[place.stage]);
    }
}

// ---- Right

template <class T, bool kPair>
K2K_DEVICE void attend_right(MlaSm90Storage& smem, const MlaDecodeParams& p) {
    const int row = arch::warp_id() % 4 * 16 + arch::lane_id() / 4;
    const arch::Swizzle swizzle = arch::Swizzle::k128;
    const uint64_t probabilities = arch::matrix_descriptor(&smem.probabilities, swizzle, 0, 1024);
    const uint64_t values =
        arch::matrix_descriptor(&smem.keys[0][kHalfBoxes], swizzle, kBoxBytes, 1024);

    KeysPlace at;
    uint32_t handed_parity = 0;
    const auto take_factors = [&](float (&factor)[2]) {
        arch::mbarrier_wait(smem.handed_over, handed_parity);
        handed_parity ^= 1;
        factor[0] = smem.factors[row], factor[1] = smem.factors[row + 8];
    };
    for (TaskPlace place;; place.advance()) {
        arch::mbarrier_wait(smem.task_known[place.stage], place.parity);
        const MlaTask& task = smem.tasks[place.stage];
        if (task.last) return;
        HalfOutput out;
        clear(out);
        float factor[2];
        for (int key = task.first_key; key < task.end_key; key += kBlockKeys, at.advance()) {
            take_factors(factor);
            if (arch::any(factor[0] != 1 || factor[1] != 1)) scale(out, factor);
            const int valid = task.end_key - key;
            if (valid < kBlockKeys) clear_rows(&smem.keys[at.stage][kHalfBoxes], valid, 2);
            const uint64_t stage = at.stage * arch::descriptor_step(kStageBytes);
            arch::wgmma_fence();
            K2K_UNROLL
            for (int k = 0; k < kBlockKeys / 16; ++k) {
                arch::wgmma_ss<T, kHalfLatent, arch::Major::kK, arch::Major::kMN>(
                    out, probabilities + arch::descriptor_step(k * 32),
                    values + stage + arch::descriptor_step(k * 2048), true);
            }
            arch::wgmma_commit();
            arch::wgmma_wait<0>(out);
            warp_arrives(smem.taken_over);
            warp_has_read<kPair>(smem.read[at.stage]);
        }
        take_factors(factor);
        warp_arrives(smem.taken_over);
        store_half_row<T>(p, task, out, row, 0, kHalfLatent, factor[0]);
        store_half_row<T>(p, task, out, row + 8, 1, kHalfLatent, factor[1]);
        warp_arrives(smem.task_done[place.stage]);
    }
}

template <class T, bool kPair>
__global__ void __launch_bounds__(kHopperThreads, 1)
    mla_decode_sm90_kernel(const __grid_constant__ MlaDecodeParams p,
                           const __grid_constant__ TensorMap q_map,
                           const __grid_constant__ TensorMap cache_map) {
    MlaSm90Storage& smem = arch::shared_storage<MlaSm90Storage>();
    const int warp = arch::warp_id();
    if (threadIdx.x == 0) make_barriers<kPair>(smem);
    arch::grid_dependency_launch();
    const auto meet = [] {
        if constexpr (kPair) {
            arch::cluster_sync_relaxed();
        } else {
            arch::sync_block();
        }
    };
    meet();
    if (warp < 4) {
        arch::registers_increase<216>();
        attend_left<T, kPair>(smem, p);
    } else if (warp < 8) {
        arch::registers_increase<216>();
        attend_right<T, kPair>(smem, p);
    } else {
        arch::registers_decrease<72>();
        if (warp == 8) {
            if (arch::lane_id() == 0) {
                arch::tma_prefetch(q_map);
                arch::tma_prefetch(cache_map);
            }
            load_tasks<kPair>(smem, p, q_map, cache_map);
        } else if (warp == 9) {
            find_tasks(smem, p);
        }
    }
    if constexpr (kPair) arch::cluster_sync_relaxed();  // the other CTA's copies still land here
}

// The joining of parts, whose blocks take the places of mla_decode's as these end.
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    mla_combine_sm90_kernel(const __grid_constant__ MlaDecodeParams p, int rows_per_block) {
    arch::grid_dependency_wait();
    combine_rows<T>(p, rows_per_block);
}

}  // namespace k2k
