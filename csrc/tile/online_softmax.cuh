#pragma once

// Online softmax of rows of scores, block of keys by block, in base 2 (FlashAttention-2):
//
//     maximum' = max(maximum, max_k s[k])                    exact, unscaled
//     factor   = exp2(base(maximum) - base(maximum'))        of all sums so far; base(m) = m scale2
//     p[k]     = exp2(s[k] scale2 - base(maximum'))
//     total'   = total factor + sum_k p[k]
//
// Scores have the accumulator layout of mma.sync and wgmma: of its row h (0, 1), a thread has
// scores[j][2 h] and [2 h + 1], of keys 8 j + 2 (lane % 4) and the next. The four lanes of a quad
// share a row. scale2 is the softmax's scale times log2(e).

#include "arch/convert.cuh"
#include "arch/warp.cuh"
#include "common/math.h"

namespace k2k::tile {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Masks row h from key `border` on; `key` is that of scores[0][2 h].
//
//     key       0 1 2 3 4 5 6 7 8     causal: each query sees one key more than the one before it
//     query 0   . . . . . x x x x     border 5
//     query 1   . . . . . . x x x     border 6
template <int kTiles>
K2K_DEVICE void mask_row(float (&scores)[kTiles][4], int h, int key, int border) {
    K2K_UNROLL
    for (int j = 0; j < kTiles; ++j) {
        if (key + 8 * j >= border) scores[j][2 * h] = -INFINITY;
        if (key + 8 * j + 1 >= border) scores[j][2 * h + 1] = -INFINITY;
    }
}

// base(maximum). The product is rounded before it is used: fused into the subtraction it would be
// exact there, exp2(base - base) would not be 1, and the error would grow with the number of
// blocks. A row that has seen no key has base 0.
K2K_DEVICE float softmax_base(float maximum, float scale2) {
    return maximum == -INFINITY ? 0 : rounded_product(maximum, scale2);
}

// The state of a thread's two rows.
struct OnlineSoftmax {
    float maximum[2];  // largest score so far, unscaled; -inf: none seen
    float total[2];    // of exponentials; of this thread's keys alone until finish()

    K2K_DEVICE void reset() {
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) maximum[h] = -INFINITY, total[h] = 0;
    }

    // Replaces scores by exponentials relative to the new maximum. The output so far must be
    // multiplied by factor[h], which is exactly 1 if the row's maximum has not grown. False if no
    // maximum of the warp has grown. All lanes of the warp call it.
    template <int kTiles>
    K2K_DEVICE bool update(float (&scores)[kTiles][4], float (&factor)[2], float scale2 K2K_WHERE) {
        bool grew = false;
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            // The row's maximum, over this thread's keys, then over the quad.
            float largest = maximum[h];
            K2K_UNROLL
            for (int j = 0; j < kTiles; ++j) {
                largest = max_number(largest, max_number(scores[j][2 * h], scores[j][2 * h + 1]));
            }
            largest = max_number(largest, arch::shuffle_xor(largest, 1 K2K_PASS_WHERE));
            largest = max_number(largest, arch::shuffle_xor(largest, 2 K2K_PASS_WHERE));
            // The factor; 0 when there was no maximum before.
            const float base = softmax_base(largest, scale2);
            factor[h] = arch::exp2_approx(rounded_product(maximum[h], scale2) - base);
            grew = grew || largest != maximum[h];
            maximum[h] = largest;
            // Exponentials and their sum.
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

    // Adds up the totals of a quad. `bad`: the results of both rows become NaN.
    K2K_DEVICE void finish(bool bad K2K_WHERE) {
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            total[h] += arch::shuffle_xor(total[h], 1 K2K_PASS_WHERE);
            total[h] += arch::shuffle_xor(total[h], 2 K2K_PASS_WHERE);
            if (bad) total[h] = NAN;
        }
    }

    // The last factor of the output; 0 for a row that has seen no key.
    K2K_DEVICE float normalizer(int h) const { return total[h] == 0 ? 0 : 1 / total[h]; }

    // log2 of the sum of exp2(s scale2).
    K2K_DEVICE float lse2(float scale2, int h) const {
        return total[h] == 0 ? -INFINITY : softmax_base(maximum[h], scale2) + log2f(total[h]);
    }

    // The largest scaled score. max_number skips a NaN among the scores, the total does not.
    K2K_DEVICE float max_logit(float scale, int h) const {
        return total[h] != total[h] && maximum[h] < INFINITY ? NAN : maximum[h] * scale;
    }
};

}  // namespace k2k::tile
