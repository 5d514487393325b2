#pragma once

// The router: K experts for each token, their weights, and how often each expert was selected.
//
//     s = sigmoid(z) or softmax(z)       z: NaN as -inf, +inf as the largest finite number
//     choice        = s + b; the lowest finite number if z or choice is NaN or -inf
//     group[g]      = sum of the two best choices of a group, without b its best; only experts of
//                     the kept_groups best groups are selected
//     indices[t, :] = top K of choice, descending, equals to the lowest index
//     weights[t, k] = s / (sum over k of s + 1e-20) * scale; s * scale if not normalised
//     counts[e]     = number of indices equal to e
//
//     g = scale * grad, w = weights / scale; if not normalised, without the sum over j:
//     d_log[e] = (g_k - sum_j g_j w_j) w_k                        for e = indices[t, k], else 0
//     d_z[e]   = d_log[e] sigmoid(-z[e]), or d_log[e] - s[e] sum(d_log)
//
// Grid      CTAs of 8 warps, grid-stride over tokens. All warps have the same role.
// Warp      One token. Lane l has experts 4 (32 v + l) + j in element 4 v + j: kVectors vectors of
//           4 contiguous experts. Lane k has the k-th selected expert.
// Keys      Choices as integers of the same order. 0 is below all of them and marks experts already
//           selected, in a group not kept, or beyond E. K times: the lane's best key, the warp's,
//           and the lowest index that has it (two redux); its key becomes 0.
// Scores    of the K selected are computed again from their logits: keeping all would double the
//           registers, and a key does not determine its score.
// Counts    One histogram per CTA, in shared memory, added to the global one at the end: integers,
//           so the order does not matter. A grid of one CTA writes them and needs no zeros.
// Barriers  histogram zeroed | all tokens of the CTA counted. The gradient has none.
// Shared    4 KiB: 1,024 counters. The gradient uses none.
// Limits    1,024 experts, top-32, 32 groups. Rows that do not begin at a multiple of 4 elements
//           are read one by one.

#include <cfloat>

#include "arch/ldst.cuh"
#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "moe/config.h"
#include "moe/params.h"
#include "tile/reduce.cuh"
#include "tile/sixteen.cuh"

namespace k2k {

// Maps floats to integers of the same order, all above 0; not for NaN.
K2K_DEVICE uint32_t order_of(float value) {
    const uint32_t bits = soft::float_bits(value);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}
K2K_DEVICE float number_at(uint32_t order) {
    return soft::bits_float(order >> 31 ? order & 0x7fffffff : ~order);
}

// A row of logits, or the bias.
struct Floats {
    const void* row;
    Type type;
    int experts;

    K2K_DEVICE float at(int expert) const {
        if (type == Type::kBf16) return arch::to_float(static_cast<const bf16*>(row)[expert]);
        if (type == Type::kFp16) return arch::to_float(static_cast<const fp16*>(row)[expert]);
        return static_cast<const float*>(row)[expert];
    }

    // Loads four contiguous elements, by one access if aligned; NaN beyond the last.
    K2K_DEVICE void load_four(float* values, int first) const {
        const int bytes = type == Type::kF32 ? 4 : 2;
        const char* source = static_cast<const char*>(row) + int64_t(first) * bytes;
        if (first + 4 > experts || reinterpret_cast<uintptr_t>(source) % (4 * bytes) != 0) {
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                values[j] = first + j < experts ? at(first + j) : soft::bits_float(0x7fffffff);
            }
        } else if (type == Type::kF32) {
            const auto words = arch::load_nc(reinterpret_cast<const float4*>(source));
            values[0] = words.x, values[1] = words.y, values[2] = words.z, values[3] = words.w;
        } else {
            const auto words = arch::load_nc(reinterpret_cast<const uint2*>(source));
            const uint32_t pairs[2] = {words.x, words.y};
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                const auto bits = static_cast<uint16_t>(pairs[j / 2] >> 16 * (j % 2));
                values[j] =
                    type == Type::kBf16 ? arch::to_float(bf16{bits}) : arch::to_float(fp16{bits});
            }
        }
    }
};

// Scores of a row of logits.
struct Scores {
    bool softmax;
    float largest = 0, sum = 0;  // softmax: the largest logit, and the sum of exp(z - largest)

    // Neither NaN nor -inf.
    K2K_DEVICE static bool good(float logit) { return logit >= -FLT_MAX; }

    // Softmax: computes largest and sum of the row, which the warp's lanes have in logits.
    template <int kCount>
    K2K_DEVICE void prepare(const float (&logits)[kCount]) {
        if (!softmax) return;
        // Maximum over the lane, then over the warp; NaN and -inf are left out.
        largest = -FLT_MAX;
        K2K_UNROLL
        for (float logit : logits) {
            if (good(logit)) largest = max_number(largest, fminf(logit, FLT_MAX));
        }
        largest = tile::max_over_lanes(largest);
        // Sum of exponentials.
        sum = 0;
        K2K_UNROLL
        for (float logit : logits) sum += exponential(logit);
        sum = tile::sum_over_lanes(sum);
    }

    K2K_DEVICE float of(float logit) const {
        if (!good(logit)) return 0;
        return softmax ? exponential(logit) / sum : 1.0f / (1.0f + expf(-logit));
    }

  private:
    K2K_DEVICE float exponential(float logit) const {
        return good(logit) ? expf(fminf(logit, FLT_MAX) - largest) : 0.0f;
    }
};

struct RouteStorage {
    uint32_t histogram[kMostExperts];
};

// The position of the lowest bit of a mask that is not 0.
K2K_DEVICE int lowest_lane(uint32_t mask) { return count_bits((mask & -mask) - 1); }

// Sets the keys of experts outside the kept groups to 0.
template <int kCount>
K2K_DEVICE void keep_best_groups(uint32_t (&keys)[kCount], const MoeRouteParams& p) {
    const int size = p.experts / p.groups, lane = arch::lane_id();
    uint32_t group_key = 0;  // of group `lane`
    for (int g = 0; g < p.groups; ++g) {
        // Find this lane's two best keys in group g.
        uint32_t best = 0, second = 0;
        K2K_UNROLL
        for (int i = 0; i < kCount; ++i) {
            const int expert = 128 * (i / 4) + 4 * lane + i % 4;
            if (expert < g * size || expert >= (g + 1) * size) continue;
            const uint32_t other = keys[i] < best ? keys[i] : best;
            best = keys[i] > best ? keys[i] : best;
            second = other > second ? other : second;
        }
        // Score the group: the warp's best choice; if there is a bias, plus the second best.
        const uint32_t first = arch::redux_max(best);
        float quality = number_at(first);
        if (p.bias != nullptr && size > 1) {
            const uint32_t holders = arch::ballot(best == first);
            if (lane == lowest_lane(holders)) best = second;
            quality += number_at(arch::redux_max(best));
        }
        if (lane == g) group_key = order_of(quality < -FLT_MAX ? -FLT_MAX : quality);
    }
    // Select the best groups, one at a time; lane g has group g, equals go to the lowest.
    uint32_t kept = 0;
    for (int i = 0; i < p.kept_groups; ++i) {
        const uint32_t best = arch::redux_max(group_key);
        const int winner = lowest_lane(arch::ballot(group_key == best));
        kept |= 1u << winner;
        if (lane == winner) group_key = 0;
    }
    // Clear the keys of the other groups.
    K2K_UNROLL
    for (int i = 0; i < kCount; ++i) {
        const int group = (128 * (i / 4) + 4 * lane + i % 4) / size;
        if (group < 32 && !(kept >> group & 1)) keys[i] = 0;
    }
}

template <int kVectors>
__global__ void __launch_bounds__(kRouteThreads, route_blocks_resident(kVectors))
    moe_route_kernel(const __grid_constant__ MoeRouteParams p) {
    constexpr int kCount = 4 * kVectors;
    RouteStorage& smem = arch::shared_storage<RouteStorage>();
    const int lane = arch::lane_id();
    // Zero the CTA's histogram.
    for (int e = threadIdx.x; e < p.experts; e += kRouteThreads) smem.histogram[e] = 0;
    arch::sync_block();

    for (int64_t token = int64_t(blockIdx.x) * kRouteWarps + arch::warp_id(); token < p.tokens;
         token += int64_t(gridDim.x) * kRouteWarps) {
        // Load the token's logits.
        const int64_t bytes = p.type == Type::kF32 ? 4 : 2;
        const Floats logits{static_cast<const char*>(p.logits) + token * p.row_stride * bytes,
                            p.type, p.experts};
        float row[kCount];
        K2K_UNROLL
        for (int v = 0; v < kVectors; ++v) logits.load_four(row + 4 * v, 128 * v + 4 * lane);
        Scores scores{p.softmax};
        scores.prepare(row);

        // Compute keys of score + bias; 0 beyond the last expert.
        const Floats bias{p.bias, Type::kF32, p.experts};
        uint32_t keys[kCount];
        K2K_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            const int first = 128 * v + 4 * lane;
            float added[4] = {};
            if (p.bias != nullptr) bias.load_four(added, first);
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                float choice = scores.of(row[4 * v + j]) + added[j];
                // The comparison is also false for a NaN choice.
                if (!Scores::good(row[4 * v + j]) || !(choice >= -FLT_MAX)) choice = -FLT_MAX;
                keys[4 * v + j] = first + j < p.experts ? order_of(fminf(choice, FLT_MAX)) : 0;
            }
        }
        if (p.groups > 1) keep_best_groups(keys, p);

        // Select K experts, one at a time.
        int chosen = 0;  // for k = lane
        for (int k = 0; k < p.top_k; ++k) {
            // This lane's best key, at its lowest index.
            uint32_t best = 0;
            int where = 0;
            K2K_UNROLL
            for (int i = 0; i < kCount; ++i) {
                if (keys[i] <= best) continue;
                best = keys[i];
                where = 128 * (i / 4) + 4 * lane + i % 4;
            }
            // The warp's best key, then the lowest index that has it; clear its key.
            const uint32_t best_of_all = arch::redux_max(best);
            const uint32_t lowest = arch::redux_min(best == best_of_all ? uint32_t(where) : ~0u);
            K2K_UNROLL
            for (int i = 0; i < kCount; ++i) {
                if (uint32_t(128 * (i / 4) + 4 * lane + i % 4) == lowest) keys[i] = 0;
            }
            if (lane == k) chosen = static_cast<int>(lowest);
        }

        // Lane k: compute the k-th weight, store index and weight, count the expert.
        const bool mine = lane < p.top_k;
        float weight = mine ? scores.of(logits.at(chosen)) : 0.0f;
        if (p.normalize) weight /= tile::sum_over_lanes(weight) + 1e-20f;
        if (mine) {
            p.indices[token * p.top_k + lane] = chosen;
            p.weights[token * p.top_k + lane] = weight * p.scale;
            arch::atomic_add<arch::Scope::kGpu>(&smem.histogram[chosen], 1u);
        }
    }

    // Add the histogram to the global counts; a single CTA writes them.
    arch::sync_block();
    for (int e = threadIdx.x; e < p.experts; e += kRouteThreads) {
        const unsigned long long count = smem.histogram[e];
        if (gridDim.x == 1) {
            p.counts[e] = count;
        } else if (count > 0) {
            arch::atomic_add<arch::Scope::kGpu>(p.counts + e, count);
        }
    }
}

// Stores four contiguous elements of a row of `type`, as far as they exist.
K2K_DEVICE void store_four(void* row, Type type, int first, int experts, const float* values) {
    const int bytes = type == Type::kF32 ? 4 : 2;
    char* target = static_cast<char*>(row) + int64_t(first) * bytes;
    const bool vector =
        first + 4 <= experts && reinterpret_cast<uintptr_t>(target) % (4 * bytes) == 0;
    if (type == Type::kF32) {
        if (vector) {
            *reinterpret_cast<float4*>(target) =
                make_float4(values[0], values[1], values[2], values[3]);
            return;
        }
        K2K_UNROLL
        for (int j = 0; j < 4; ++j) {
            if (first + j < experts) reinterpret_cast<float*>(target)[j] = values[j];
        }
        return;
    }
    uint32_t pairs[2];
    K2K_UNROLL
    for (int i = 0; i < 2; ++i) {
        pairs[i] = type == Type::kBf16 ? arch::pack_bf16(values[2 * i], values[2 * i + 1])
                                       : arch::pack_fp16(values[2 * i], values[2 * i + 1]);
    }
    if (vector) {
        *reinterpret_cast<uint2*>(target) = make_uint2(pairs[0], pairs[1]);
        return;
    }
    K2K_UNROLL
    for (int j = 0; j < 4; ++j) {
        if (first + j < experts) {
            reinterpret_cast<uint16_t*>(target)[j] =
                static_cast<uint16_t>(pairs[j / 2] >> 16 * (j % 2));
        }
    }
}

template <int kVectors>
__global__ void __launch_bounds__(kRouteThreads, route_blocks_resident(kVectors))
    moe_route_backward_kernel(const __grid_constant__ MoeRouteBackwardParams p) {
    constexpr int kCount = 4 * kVectors;
    const int lane = arch::lane_id();
    const int64_t bytes = p.type == Type::kF32 ? 4 : 2;

    for (int64_t token = int64_t(blockIdx.x) * kRouteWarps + arch::warp_id(); token < p.tokens;
         token += int64_t(gridDim.x) * kRouteWarps) {
        const Floats logits{static_cast<const char*>(p.logits) + token * p.row_stride * bytes,
                            p.type, p.experts};
        // Softmax: load the row for its maximum and sum; sigmoid needs only the K logits.
        Scores scores{p.softmax};
        float row[kCount] = {};
        if (p.softmax) {
            K2K_UNROLL
            for (int v = 0; v < kVectors; ++v) logits.load_four(row + 4 * v, 128 * v + 4 * lane);
            scores.prepare(row);
        }

        // Lane k: recompute the k-th weight from its logit.
        const int64_t pair = token * p.top_k + lane;
        const int expert = lane < p.top_k ? p.indices[pair] : -1;
        const bool mine = expert >= 0 && expert < p.experts;
        const float logit = mine ? logits.at(expert) : 0.0f;
        float weight = mine ? scores.of(logit) : 0.0f;
        float grad = mine ? p.grad[pair] * p.scale : 0.0f;
        if (p.normalize) {
            weight /= tile::sum_over_lanes(weight) + 1e-20f;
            grad -= tile::sum_over_lanes(grad * weight);
        }
        // Gradient of the logarithm of the score: no division by a score that may be 0.
        float d_logit = grad * weight;
        float sum = 0;
        if (p.softmax) {
            sum = tile::sum_over_lanes(d_logit);
        } else if (Scores::good(logit)) {
            d_logit *= 1.0f / (1.0f + expf(logit));  // sigmoid(-z)
        }

        // Distribute the K gradients over the lanes of their experts; zeros elsewhere.
        float values[kCount] = {};
        for (int k = 0; k < p.top_k; ++k) {
            const int taken = arch::shuffle(expert, k);
            const float value = arch::shuffle(d_logit, k);
            K2K_UNROLL
            for (int i = 0; i < kCount; ++i) {
                if (128 * (i / 4) + 4 * lane + i % 4 == taken) values[i] = value;
            }
        }
        if (p.softmax) {
            K2K_UNROLL
            for (int i = 0; i < kCount; ++i) values[i] -= scores.of(row[i]) * sum;
        }
        // Store the row.
        void* d_row = static_cast<char*>(p.d_logits) + token * p.experts * bytes;
        K2K_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            store_four(d_row, p.type, 128 * v + 4 * lane, p.experts, values + 4 * v);
        }
    }
}

}  // namespace k2k
