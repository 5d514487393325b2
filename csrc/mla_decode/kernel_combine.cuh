#pragma once

// Combines partial results over disjoint sets of keys: the second kernel of split-KV.
//
//     lse = log sum_i exp(lse_i),  out = sum_i w_i out_i / sum_i w_i,  w_i = exp(lse_i - max lse)
//
// mla_combine_kernel      the parts of each split row of mla_decode, 512 floats each, from the
//                         workspace. Rows with one part are finished and skipped; rows that no
//                         sequence owns become 0 and -inf.
//   CTA     512 threads, `rows_per_block` rows one after the other. Four groups of 128 threads, a
//           thread has four columns; group g adds the parts g, g + 4, ... The order of additions
//           depends on the number of parts alone.
//   Why     a kernel of its own: in mla_decode the CTA that finishes last would have to read all
//           parts, 17 MB with one long sequence; here every SM reads a share.
// merge_attention_states  two results; one warp per row, 16 columns per lane at a time.
//
// Weights are divided by their sum: exp(lse_i - lse) would scale the result by the rounding error
// of lse. A part without keys has lse -inf, hence weight 0; its out is not used.

#include "arch/convert.cuh"
#include "arch/ldst.cuh"
#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "mla_decode/config.h"
#include "mla_decode/rows.cuh"
#include "mla_decode/schedule.cuh"
#include "tile/reduce.cuh"
#include "tile/sixteen.cuh"

namespace k2k {

struct MlaCombineStorage {
    float4 sums[kCombineGroups][kLatent / 4];  // [groups, 512]
};

// exp2(lse - maximum). The parts' maximum is -inf if no part has keys.
K2K_DEVICE float part_weight(float lse, float maximum) {
    return lse == -INFINITY ? 0 : arch::exp2_approx(lse - maximum);
}

template <class T>
K2K_DEVICE void combine_rows(const MlaDecodeParams& p, int rows_per_block) {
    MlaCombineStorage& storage = arch::shared_storage<MlaCombineStorage>();
    const int lane = arch::lane_id(), four = threadIdx.x % (kLatent / 4);
    const int group = threadIdx.x / (kLatent / 4);
    const int rows = static_cast<int>(p.tokens * p.heads);  // fits: q has 1,152 bytes a row
    // Ragged batch: the range of rows that sequences own.
    int first_owned = 0, end_owned = rows;
    if (p.cu_seqlens_q != nullptr) {
        first_owned = clamp_to(p.cu_seqlens_q[0], p.tokens) * p.heads;
        end_owned = clamp_to(p.cu_seqlens_q[p.batch], p.tokens) * p.heads;
    }
    for (int i = 0; i < rows_per_block; ++i) {
        // The row's parts: 0 if no sequence owns it; 1: mla_decode has stored the result.
        const int row = static_cast<int>(blockIdx.x) * rows_per_block + i;
        if (row >= rows) return;
        SplitRow split = {0, 0};
        if (row >= first_owned && row < end_owned) split = p.split_rows[row];
        if (split.parts == 1) continue;

        // Reduce the statistics of all parts; every warp does all of it, without a barrier.
        float maximum = -INFINITY, largest = -INFINITY, total = 0;
        bool is_nan = false;
        K2K_NO_UNROLL
        for (int part = lane; part < split.parts; part += 32) {
            const float2 stats = p.partial_stats[part_row(p.plan, split, part)];
            maximum = max_number(maximum, stats.x);
            largest = max_number(largest, stats.y);
            is_nan = is_nan || stats.y != stats.y;
        }
        maximum = tile::max_over_lanes(maximum);
        largest = tile::max_over_lanes(largest);
        is_nan = arch::any(is_nan);
        // Sum the weights.
        K2K_NO_UNROLL
        for (int part = lane; part < split.parts; part += 32) {
            total += part_weight(p.partial_stats[part_row(p.plan, split, part)].x, maximum);
        }
        total = tile::sum_over_lanes(total);
        const float lse = total == 0 ? -INFINITY : maximum + log2f(total);
        const float normalizer = total == 0 ? 0 : 1 / total;

        // Add up this group's parts, four loads in flight. A part without keys has weight 0 and an
        // undefined out: skip it.
        float4 sum = {};  // columns 4 `four` to 4 `four` + 3
        K2K_UNROLL_BY(4)
        for (int part = group; part < split.parts; part += kCombineGroups) {
            const int64_t from = part_row(p.plan, split, part);
            const float weight = part_weight(p.partial_stats[from].x, maximum);
            const float4 value =
                reinterpret_cast<const float4*>(p.partial_out + from * kLatent)[four];
            if (weight != 0) {
                sum = make_float4(fmaf(weight, value.x, sum.x), fmaf(weight, value.y, sum.y),
                                  fmaf(weight, value.z, sum.z), fmaf(weight, value.w, sum.w));
            }
        }
        // Epilogue: group 0 adds the sums of groups 1 to 3, in order, and stores the row.
        storage.sums[group][four] = sum;
        arch::sync_block();
        if (group == 0) {
            K2K_UNROLL
            for (int other = 1; other < kCombineGroups; ++other) {
                const float4 part = storage.sums[other][four];
                sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
            }
            const int token = row / p.heads, head = row - token * p.heads;
            *reinterpret_cast<uint2*>(out_at<T>(p, {token, head, 0}, 4 * four)) =
                make_uint2(pack<T>(sum.x * normalizer, sum.y * normalizer),
                           pack<T>(sum.z * normalizer, sum.w * normalizer));
        }
        // One thread stores the statistics.
        if (threadIdx.x == 0) {
            p.lse[row] = lse * kLn2;
            if (p.max_logits != nullptr) p.max_logits[row] = is_nan ? NAN : largest;
        }
        arch::sync_block();  // the sums have been read
    }
}

template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    mla_combine_kernel(const __grid_constant__ MlaDecodeParams p, int rows_per_block) {
    combine_rows<T>(p, rows_per_block);
}

template <class T>
__global__ void __launch_bounds__(kMergeThreads, kMergeBlocks)
    merge_attention_states_kernel(const __grid_constant__ MergeParams p) {
    const int64_t row = int64_t(blockIdx.x) * (kMergeThreads / 32) + arch::warp_id();
    if (row >= p.rows) return;
    const float lse_a = p.lse_a[row], lse_b = p.lse_b[row];
    // Compute the two weights: 0 for a side without keys, whose out is not loaded.
    const float maximum = lse_a > lse_b ? lse_a : lse_b;
    const float exp_a = lse_a == -INFINITY ? 0 : expf(lse_a - maximum);
    const float exp_b = lse_b == -INFINITY ? 0 : expf(lse_b - maximum);
    const float total = exp_a + exp_b;
    const float weight_a = total == 0 ? 0 : exp_a / total;
    const float weight_b = total == 0 ? 0 : exp_b / total;
    const T* out_a = static_cast<const T*>(p.out_a) + row * p.columns;
    const T* out_b = static_cast<const T*>(p.out_b) + row * p.columns;
    T* out = static_cast<T*>(p.out) + row * p.columns;
    // Merge the row, 16 columns per lane.
    for (int64_t column = arch::lane_id() * 16; column < p.columns; column += 512) {
        float a[16] = {}, b[16] = {};
        if (weight_a != 0) tile::widen(a, tile::load_sixteen(out_a, column, p.columns));
        if (weight_b != 0) tile::widen(b, tile::load_sixteen(out_b, column, p.columns));
        K2K_UNROLL
        for (int i = 0; i < 16; ++i) a[i] = fmaf(a[i], weight_a, b[i] * weight_b);
        tile::Sixteen<T> merged;
        tile::narrow(merged, a);
        tile::store_sixteen(out, column, p.columns, merged);
    }
    if (arch::lane_id() == 0) p.lse[row] = total == 0 ? -INFINITY : maximum + logf(total);
}

}  // namespace k2k
