#pragma once

// The online softmax of a thread's rows, as both kernels keep it, and where a row's results go.
// Scores are laid out as mma.sync and wgmma give them: a thread has scores[j][2h], [2h + 1] of its
// row h in keys 8j + 2 (lane % 4) and the next; four neighbouring lanes share a row.

#include "arch/convert.cuh"
#include "arch/warp.cuh"
#include "common/math.h"
#include "mla_decode/config.h"
#include "mla_decode/schedule.cuh"

namespace k2k {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <class T>
K2K_DEVICE uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, bf16>) {
        return arch::pack_bf16(low, high);
    } else {
        return arch::pack_fp16(low, high);
    }
}

// A row of a task's tile.
struct MlaRow {
    int64_t token;  // in q
    int head;
    int border;  // it sees the keys before this one
};

K2K_DEVICE MlaRow mla_row(const MlaDecodeParams& p, const MlaTask& task, int tile_row) {
    const int row = task.first_row + tile_row, query = row / p.heads;
    const int border = p.causal ? task.seq_len - task.queries + query + 1 : task.seq_len;
    return {task.first_token + query, row - query * p.heads, border};
}

// Takes the scores of one row, scores[j][2h] and [2h + 1], out of the running from `border` on;
// `key` is that of scores[0][2h].
template <int kTiles>
K2K_DEVICE void mask_row(float (&scores)[kTiles][4], int h, int key, int border) {
    K2K_UNROLL
    for (int j = 0; j < kTiles; ++j) {
        if (key + 8 * j >= border) scores[j][2 * h] = -INFINITY;
        if (key + 8 * j + 1 >= border) scores[j][2 * h + 1] = -INFINITY;
    }
}

// What exponents of a row are relative to, base 2: its largest score, scaled and rounded. Were the
// product fused into a subtraction, the unrounded one would be taken there, and
// exp2(base - base) would not be 1: an error that grows with the number of blocks.
// A row that sees nothing yet has no maximum to be relative to.
K2K_DEVICE float softmax_base(float maximum, float scale2) {
    return maximum == -INFINITY ? 0 : rounded_product(maximum, scale2);
}

// A thread's two rows.
struct MlaRowState {
    float maximum[2];  // largest score so far, unscaled; -inf: none seen
    float total[2];    // of exponentials, of this thread's keys until finish()

    K2K_DEVICE void reset() {
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) maximum[h] = -INFINITY, total[h] = 0;
    }

    // Turns scores into exponentials relative to the new maximum; `factor` turns older ones into
    // such: 1 exactly if the maximum has not grown. False if that holds for the whole warp.
    // `scale2` is the softmax's scale times log2(e).
    template <int kTiles>
    K2K_DEVICE bool update(float (&scores)[kTiles][4], float (&factor)[2], float scale2 K2K_WHERE) {
        bool grew = false;
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            float largest = maximum[h];
            K2K_UNROLL
            for (int j = 0; j < kTiles; ++j) {
                largest = max_number(largest, max_number(scores[j][2 * h], scores[j][2 * h + 1]));
            }
            largest = max_number(largest, arch::shuffle_xor(largest, 1 K2K_PASS_WHERE));
            largest = max_number(largest, arch::shuffle_xor(largest, 2 K2K_PASS_WHERE));
            const float base = softmax_base(largest, scale2);
            // A first maximum makes 0 of the factor.
            factor[h] = arch::exp2_approx(rounded_product(maximum[h], scale2) - base);
            grew = grew || largest != maximum[h];
            maximum[h] = largest;
            total[h] *= factor[h];
            K2K_UNROLL
            for (int j = 0; j < kTiles; ++j) {
                K2K_UNROLL
                for (int i = 2 * h; i < 2 * h + 2; ++i) {
                    scores[j][i] = arch::exp2_approx(fmaf(scores[j][i], scale2, -base));
                    total[h] += scores[j][i];
                }
            }
        }
        return arch::any(grew K2K_PASS_WHERE);
    }

    // Adds up the four lanes' totals. A row of a sequence whose keys could not be found is NaN.
    K2K_DEVICE void finish(bool bad K2K_WHERE) {
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            total[h] += arch::shuffle_xor(total[h], 1 K2K_PASS_WHERE);
            total[h] += arch::shuffle_xor(total[h], 2 K2K_PASS_WHERE);
            if (bad) total[h] = NAN;
        }
    }

    // What the sums of keys are multiplied by; 0 for a row that sees nothing.
    K2K_DEVICE float normalizer(int h) const { return total[h] == 0 ? 0 : 1 / total[h]; }

    K2K_DEVICE float lse2(float scale2, int h) const {
        return total[h] == 0 ? -INFINITY : softmax_base(maximum[h], scale2) + log2f(total[h]);
    }

    // A NaN among the scores is passed over by the maximum, but not by the total.
    K2K_DEVICE float max_logit(float scale, int h) const {
        return total[h] != total[h] && maximum[h] < INFINITY ? NAN : maximum[h] * scale;
    }

    // By one of the threads that have the row.
    K2K_DEVICE void store_stats(const MlaDecodeParams& p,
                                const MlaTask& task,
                                const MlaRow& place,
                                int tile_row,
                                int h) const {
        const int64_t row = place.token * p.heads + place.head;
        const float lse = lse2(p.scale * kLog2E, h), largest = max_logit(p.scale, h);
        const int64_t part = int64_t(task.partial) * p.plan.tile_rows + tile_row;
        if (task.partial < 0) {
            p.lse[row] = lse * kLn2;
            if (p.max_logits != nullptr) p.max_logits[row] = largest;
        } else {
            p.partial_stats[part] = make_float2(lse, largest);
        }
        if (task.split == 0) p.split_rows[row] = {task.num_splits, static_cast<int>(part)};
    }
};

}  // namespace k2k
