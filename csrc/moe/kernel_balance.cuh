#pragma once

// Load balance: the sequence-wise loss, its gradient, and a step of the router's bias.
//
//     hits[b, e] = number of indices equal to e in sequence b, of L tokens
//     share[t,e] = s[t, e] / (sum over e of s + 1e-20), s = sigmoid(z) or softmax(z)
//     slope[b,e] = alpha E hits[b, e] / (K L L B'), B' the number of sequences with tokens
//     loss       = sum over t of sum over e of slope[b of t, e] share[t, e]
//     d_z[t, e]  = grad share (slope - sum over e of slope share) (1 - s); softmax: without (1 - s)
//     bias[e]   += rate sign(sum of counts - E counts[e]), or
//                  rate (experts busier than e - experts idler) / (E - 1)
//
// Launches  loss: hits, sequence_loss, loss_total. Gradient: hits, sequence_loss_backward. Bias:
//           update_bias.
// Hits      a thread per pair; integer atomics: the order does not matter.
// Warp      of sequence_loss and its gradient: one token (grid-stride). The lanes read its experts
//           four at a time, in one pass each for softmax's maximum, for the sums and for the
//           gradient; passes after the first read from L1.
// Rounding  Sums use hits - mean, not hits: in the gradient the two sums nearly cancel, and float32
//           would keep few digits of the difference.
// Order     of the loss: over a lane's experts, the lanes by butterfly, a warp's tokens, a CTA's
//           warps, then the CTAs' sums in loss_total (one CTA): it depends on the number of
//           tokens only.
// Sequence  of a token: a binary search among the ends, which skips empty sequences.
// Barriers  sequence_loss: the warps' sums are written. block_sum: the warps' sums are written |
//           read. update_bias by quantile: the counts are written.
// Shared    32 to 8,448 bytes.
// Limits    the bias: 1,024 experts, one per thread of the only CTA.

#include "arch/ldst.cuh"
#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "moe/config.h"
#include "moe/kernel_route.cuh"
#include "moe/params.h"

namespace k2k {

// Bounds of the sequences.
struct Sequences {
    const MoeLossParams& p;

    K2K_DEVICE int64_t begin(int64_t sequence) const {
        if (p.cu_seqlens == nullptr) return sequence == 0 ? 0 : p.tokens;
        return p.wide_seqlens ? static_cast<const int64_t*>(p.cu_seqlens)[sequence]
                              : static_cast<const int32_t*>(p.cu_seqlens)[sequence];
    }

    // The first sequence that ends after the token; the last one if none does.
    K2K_DEVICE int64_t of(int64_t token) const {
        int64_t low = 0, high = p.sequences - 1;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (begin(middle + 1) > token) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        return low;
    }

    K2K_DEVICE int64_t length(int64_t sequence) const {
        const int64_t length = begin(sequence + 1) - begin(sequence);
        return length > 1 ? length : 1;
    }
};

// The sum over all threads of the CTA, in each of them.
template <int kThreads, class T>
K2K_DEVICE T block_sum(T (&of_warp)[kThreads / 32], T value) {
    // Over the warp by butterfly, then over the warps in order.
    value = tile::sum_over_lanes(value);
    if (arch::lane_id() == 0) of_warp[arch::warp_id()] = value;
    arch::sync_block();
    T sum = 0;
    K2K_UNROLL
    for (T part : of_warp) sum += part;
    arch::sync_block();
    return sum;
}

// The number of sequences with tokens, at least 1; all threads of the CTA call it.
template <int kThreads>
K2K_DEVICE int64_t count_sequences(const Sequences& sequences, int64_t (&of_warp)[kThreads / 32]) {
    int64_t count = 0;
    for (int64_t b = threadIdx.x; b < sequences.p.sequences; b += kThreads) {
        count += sequences.begin(b + 1) > sequences.begin(b);
    }
    count = block_sum<kThreads>(of_warp, count);
    return count > 0 ? count : 1;
}

// A thread per pair (grid-stride).
__global__ void __launch_bounds__(kMoeThreads)
    moe_hits_kernel(const __grid_constant__ MoeLossParams p) {
    const Sequences sequences{p};
    const int64_t pairs = p.tokens * p.top_k;
    for (int64_t pair = int64_t(blockIdx.x) * kMoeThreads + threadIdx.x; pair < pairs;
         pair += int64_t(gridDim.x) * kMoeThreads) {
        const int64_t expert = p.wide_indices ? static_cast<const int64_t*>(p.indices)[pair]
                                              : static_cast<const int32_t*>(p.indices)[pair];
        if (expert < 0 || expert >= p.experts) continue;
        // Count the expert in the pair's sequence.
        const int64_t sequence = sequences.of(pair / p.top_k);
        arch::atomic_add<arch::Scope::kGpu>(p.hits + sequence * p.experts + expert, 1u);
    }
}

// A token's row of logits and its sequence's row of hits.
struct TokenShares {
    Floats logits;
    const uint32_t* hits;
    float largest = 0;  // softmax: the largest logit
    float inverse;      // share = raw * inverse
    float mean;         // of the hits
    float excess = 0;   // sum over e of (hits - mean) * share
    float lost;         // 1 - sum of the shares
    float unit;         // slope = hits * unit, without alpha and the number of sequences

    // An expert's score, before softmax's division, and the derivative of its logarithm.
    struct Raw {
        float value, slope;
    };
    K2K_DEVICE Raw raw(float logit, bool softmax) const {
        if (!Scores::good(logit)) return {0, 0};
        if (softmax) return {expf(fminf(logit, FLT_MAX) - largest), 1};
        // sigmoid(z) and sigmoid(-z), from exp(-|z|): no overflow.
        const float small = expf(-fabsf(logit)), inverse = 1.0f / (1.0f + small);
        return logit < 0 ? Raw{small * inverse, inverse} : Raw{inverse, small * inverse};
    }

    K2K_DEVICE void load(float (&row)[4], float (&counts)[4], int first) const {
        logits.load_four(row, first);
        // The row of hits is aligned only if the number of experts is a multiple of 4.
        if (first + 4 <= logits.experts && reinterpret_cast<uintptr_t>(hits + first) % 16 == 0) {
            const uint4 four = arch::load_nc(reinterpret_cast<const uint4*>(hits + first));
            counts[0] = four.x, counts[1] = four.y, counts[2] = four.z, counts[3] = four.w;
            return;
        }
        K2K_UNROLL
        for (int j = 0; j < 4; ++j) counts[j] = first + j < logits.experts ? hits[first + j] : 0;
    }

    // Computes the token's sums; all lanes of the warp call it.
    K2K_DEVICE TokenShares(const MoeLossParams& p, int64_t token)
        : logits{static_cast<const char*>(p.logits) +
                     token * p.row_stride * (p.type == Type::kF32 ? 4 : 2),
                 p.type, p.experts} {
        // Find the token's sequence.
        const Sequences sequences{p};
        const int64_t sequence = sequences.of(token);
        const auto length = static_cast<float>(sequences.length(sequence));
        hits = p.hits + sequence * p.experts;
        mean = length * p.top_k / p.experts;
        unit = 1 / (mean * length);
        const int lane = arch::lane_id();
        if (p.softmax) {
            // First pass: the largest logit of the row.
            largest = -FLT_MAX;
            for (int first = 4 * lane; first < p.experts; first += 128) {
                float row[4];
                logits.load_four(row, first);
                K2K_UNROLL
                for (float logit : row) {
                    if (Scores::good(logit)) largest = max_number(largest, fminf(logit, FLT_MAX));
                }
            }
            largest = tile::max_over_lanes(largest);
        }
        // Sum scores, and scores weighted by (hits - mean).
        float total = 0;
        K2K_UNROLL_BY(2)
        for (int first = 4 * lane; first < p.experts; first += 128) {
            float row[4], counts[4];
            load(row, counts, first);
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                const float value = raw(row[j], p.softmax).value;
                total += value;
                excess += (counts[j] - mean) * value;
            }
        }
        // Normalise over the warp.
        inverse = 1.0f / (tile::sum_over_lanes(total) + 1e-20f);
        excess = tile::sum_over_lanes(excess) * inverse;
        lost = 1e-20f * inverse;
    }
};

struct LossSums {
    float of_warp[kMoeWarps];
};

// The sum over a CTA's tokens, without alpha and the number of sequences. A warp per token.
__global__ void __launch_bounds__(kMoeThreads, 4)
    moe_sequence_loss_kernel(const __grid_constant__ MoeLossParams p) {
    LossSums& smem = arch::shared_storage<LossSums>();
    float sum = 0;
    for (int64_t token = int64_t(blockIdx.x) * kMoeWarps + arch::warp_id(); token < p.tokens;
         token += int64_t(gridDim.x) * kMoeWarps) {
        // sum over e of hits * share, from the sum of (hits - mean) * share.
        const TokenShares shares(p, token);
        sum += (shares.excess + shares.mean * (1 - shares.lost)) * shares.unit;
    }
    // Add the warps' sums in order.
    if (arch::lane_id() == 0) smem.of_warp[arch::warp_id()] = sum;
    arch::sync_block();
    if (threadIdx.x != 0) return;
    float total = 0;
    K2K_UNROLL
    for (float part : smem.of_warp) total += part;
    p.sums[blockIdx.x] = total;
}

struct LossTotal {
    float of_warp[kMoeWarps];
    int64_t sequences_of_warp[kMoeWarps];
};

// One CTA: adds the sums of `blocks` CTAs.
__global__ void __launch_bounds__(kMoeThreads)
    moe_loss_total_kernel(const __grid_constant__ MoeLossParams p, int blocks) {
    LossTotal& smem = arch::shared_storage<LossTotal>();
    const int64_t sequences = count_sequences<kMoeThreads>({p}, smem.sequences_of_warp);
    // Each thread adds every 256th CTA's sum, then all threads: equal bits for equal grids.
    float sum = 0;
    for (int block = threadIdx.x; block < blocks; block += kMoeThreads) sum += p.sums[block];
    sum = block_sum<kMoeThreads>(smem.of_warp, sum);
    if (threadIdx.x == 0) *p.loss = p.alpha * (sum / static_cast<float>(sequences));
}

struct CountOfSequences {
    int64_t of_warp[kMoeWarps];
};

// A warp per token: a row of d_logits.
__global__ void __launch_bounds__(kMoeThreads, 4)
    moe_sequence_loss_backward_kernel(const __grid_constant__ MoeLossParams p) {
    auto& smem = arch::shared_storage<CountOfSequences>();
    // Every CTA counts the sequences itself: it saves a launch.
    const auto sequences = static_cast<float>(count_sequences<kMoeThreads>({p}, smem.of_warp));
    const float factor = *p.grad * p.alpha / sequences;
    const int64_t bytes = p.type == Type::kF32 ? 4 : 2;
    for (int64_t token = int64_t(blockIdx.x) * kMoeWarps + arch::warp_id(); token < p.tokens;
         token += int64_t(gridDim.x) * kMoeWarps) {
        // First passes over the row: its sums. Then its gradient, four experts per lane.
        const TokenShares shares(p, token);
        void* d_row = static_cast<char*>(p.d_logits) + token * p.experts * bytes;
        for (int first = 4 * arch::lane_id(); first < p.experts; first += 128) {
            float row[4], counts[4];
            shares.load(row, counts, first);
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                const TokenShares::Raw raw = shares.raw(row[j], p.softmax);
                const float above =  // hits - sum over e of hits * share
                    counts[j] - shares.mean - shares.excess + shares.mean * shares.lost;
                row[j] = factor * shares.unit * above * (raw.value * shares.inverse) * raw.slope;
            }
            store_four(d_row, p.type, first, p.experts, row);
        }
    }
}

struct BiasCounts {
    int64_t counts[kMostExperts];
    int64_t of_warp[kScanThreads / 32];
};

// One CTA, a thread per expert. Counts are compared as integers: floats would tie from 2^24 on.
__global__ void __launch_bounds__(kScanThreads)
    moe_update_bias_kernel(const __grid_constant__ MoeBiasParams p) {
    BiasCounts& smem = arch::shared_storage<BiasCounts>();
    const int expert = threadIdx.x;
    int64_t count = 0;
    if (expert < p.experts) {
        count = p.wide_counts ? static_cast<const int64_t*>(p.counts)[expert]
                              : static_cast<const int32_t*>(p.counts)[expert];
    }
    float step;
    if (p.quantile) {
        // Quantile: the number of busier experts minus that of idler ones.
        smem.counts[expert] = count;
        arch::sync_block();
        int busier = 0;
        for (int other = 0; other < p.experts; ++other) {
            busier += (smem.counts[other] > count) - (smem.counts[other] < count);
        }
        const int others = p.experts > 1 ? p.experts - 1 : 1;
        step = p.rate * static_cast<float>(busier) / static_cast<float>(others);
    } else {
        // Sign of E (mean - count), in integers.
        const int64_t missing = block_sum<kScanThreads>(smem.of_warp, count) - p.experts * count;
        step = p.rate * static_cast<float>((missing > 0) - (missing < 0));
    }
    // Threads beyond the last expert only took part in the barriers.
    if (expert < p.experts) p.result[expert] = p.bias[expert] + step;
}

}  // namespace k2k
