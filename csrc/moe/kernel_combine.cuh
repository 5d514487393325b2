#pragma once

// Combine, and its gradient, which is the transpose of dispatch.
//
//     out[t, :]      = sum over k of w[t, k] * y[slot_of[t, k], :] + shared[t, :] + residual[t, :]
//     d_y[s, :]      = w[t, k] * grad[t, :]        for s = slot_of[t, k]; zeros in padding rows
//     d_w[t, k]      = sum over columns of grad[t, :] * y[slot_of[t, k], :]
//
// Order     of out: float32, in the order of k, product and sum rounded separately as in PyTorch,
//           then shared, then residual; one rounding. Independent of other tokens and of the grid.
// Warp      of combine: 512 columns of one token, 16 per lane; lane k has the k-th slot and weight.
//           4 rows (2 of float32) are in flight at once. Grid-stride over tasks.
// CTA       of the gradient: one token, grid-stride; of tokens received from other ranks, only
//           those that arrived. A warp takes pieces of 512 columns: loads the token's row once and
//           its slots' rows two (float32: one) at a time. Lane k of each warp accumulates d_w[t, k]
//           over the warp's pieces; lane k of warp 0 adds the warps: an order that depends on the
//           number of columns only. At the end the CTAs zero the padding rows, 32 slots per warp
//           and iteration.
// Barrier   of the gradient: one per token: the warps' sums of d_w are written. They are
//           double-buffered.
// Traffic   for T tokens, S slots. Combine: T K + T rows (T more for shared and for residual).
//           Gradient: T K + T rows read, S written. Slots and weights come from L2: 8 bytes per
//           pair and piece.
// Shared    gradient: 2 KiB.
// Limits    top-32. Rows that do not begin at multiples of 16 bytes are read element by element.

#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "moe/config.h"
#include "moe/params.h"
#include "moe/plan.cuh"
#include "tile/reduce.cuh"
#include "tile/sixteen.cuh"

namespace k2k {

// Loads sixteen contiguous elements of a row of any type, as float32.
K2K_DEVICE void load_floats(float (&values)[16], const FloatRows& rows, int64_t row, int64_t column,
                            int64_t columns) {
    const int64_t first = row * rows.row_stride;
    if (rows.type == Type::kBf16) {
        const bf16* from = static_cast<const bf16*>(rows.values) + first;
        tile::widen(values, tile::load_sixteen(from, column, columns));
    } else if (rows.type == Type::kFp16) {
        const fp16* from = static_cast<const fp16*>(rows.values) + first;
        tile::widen(values, tile::load_sixteen(from, column, columns));
    } else {
        const float* from = static_cast<const float*>(rows.values) + first;
        tile::widen(values, tile::load_sixteen(from, column, columns));
    }
}

// Rounds sixteen values to T and stores them in row `row` of a contiguous matrix.
template <class T>
K2K_DEVICE void store_floats(void* matrix, int64_t row, int64_t column, int64_t columns,
                             const float (&values)[16]) {
    tile::Sixteen<T> sixteen;
    tile::narrow(sixteen, values);
    tile::store_sixteen(static_cast<T*>(matrix) + row * columns, column, columns, sixteen);
}

// The slot of pair (token, lane), or -1: also for a number out of range, which no plan contains.
K2K_DEVICE int32_t lane_slot(const int32_t* slot_of, int64_t token, int top_k, int32_t slots) {
    if (int(arch::lane_id()) >= top_k) return -1;
    const int32_t slot = slot_of[token * top_k + arch::lane_id()];
    return slot >= 0 && slot < slots ? slot : -1;
}

K2K_DEVICE float lane_weight(const float* weights, int64_t token, int top_k) {
    if (weights == nullptr || int(arch::lane_id()) >= top_k) return 1.0f;
    return weights[token * top_k + arch::lane_id()];
}

template <class Y>
__global__ void __launch_bounds__(kMoeThreads, K2K_RESIDENT(kCombineBlocks))
    moe_combine_kernel(const __grid_constant__ MoeCombineParams p) {
    // y may be in either half of the exchange's double buffer; the kernel reads which.
    constexpr int kRows = rows_in_flight(type_of<Y>);
    const int lane = arch::lane_id();
    const Y* all = static_cast<const Y*>(p.y) + offset_of(p.y_half);
    const int64_t pieces = row_pieces(p.hidden);

    for (int64_t task = int64_t(blockIdx.x) * kMoeWarps + arch::warp_id(); task < p.tokens * pieces;
         task += int64_t(gridDim.x) * kMoeWarps) {
        const int64_t token = task / pieces;
        const int64_t column = (task - token * pieces) * kWarpColumns + lane * 16;
        const bool here = column < p.hidden;
        // Lane k: load the k-th slot and weight.
        const int32_t slot = lane_slot(p.slot_of, token, p.top_k, p.slots);
        const float weight = lane_weight(p.weights, token, p.top_k);

        float total[16] = {};  // this lane's 16 columns
        for (int first = 0; first < p.top_k; first += kRows) {
            // Load kRows experts' rows, all in flight.
            tile::Sixteen<Y> rows[kRows];
            K2K_UNROLL
            for (int i = 0; i < kRows; ++i) {
                const int64_t from = arch::shuffle(slot, first + i);
                if (from < 0 || !here) continue;
                const Y* y = all + from * p.y_row_stride;
                rows[i] = tile::load_sixteen(y, column, p.hidden);
            }
            // Add them in the order of k; no fused multiply-add, as in PyTorch.
            K2K_UNROLL
            for (int i = 0; i < kRows; ++i) {
                const bool taken = arch::shuffle(slot, first + i) >= 0 && here;
                const float factor = arch::shuffle(weight, first + i);
                if (!taken) continue;
                float values[16];
                tile::widen(values, rows[i]);
                K2K_UNROLL
                for (int j = 0; j < 16; ++j) total[j] += rounded_product(values[j], factor);
            }
        }
        if (!here) continue;

        // Add shared, then residual; a loop, to keep the code small.
        K2K_NO_UNROLL
        for (int i = 0; i < 2; ++i) {
            const FloatRows& term = i == 0 ? p.shared : p.residual;
            if (term.values == nullptr) continue;
            float values[16];
            load_floats(values, term, token, column, p.hidden);
            K2K_UNROLL
            for (int j = 0; j < 16; ++j) total[j] += values[j];
        }
        // Round once and store.
        if (p.out_type == Type::kBf16) {
            store_floats<bf16>(p.out, token, column, p.hidden, total);
        } else if (p.out_type == Type::kFp16) {
            store_floats<fp16>(p.out, token, column, p.hidden, total);
        } else {
            store_floats<float>(p.out, token, column, p.hidden, total);
        }
    }
}

struct WeightGradients {
    float of_warp[2][kMoeWarps][32];  // [buffer][warp][k]
};

template <class Y>
__global__ void __launch_bounds__(kMoeThreads, 3)
    moe_combine_backward_kernel(const __grid_constant__ MoeCombineBackwardParams p) {
    constexpr int kRows = rows_in_flight(type_of<Y>) / 2;  // half: results need registers too
    auto& smem = arch::shared_storage<WeightGradients>();
    const int lane = arch::lane_id(), warp = arch::warp_id(), warps = blockDim.x / 32;
    const int64_t step = int64_t(warps) * kWarpColumns;

    FloatRows all_grads = p.grad;
    all_grads.values =
        static_cast<const uint8_t*>(p.grad.values) + offset_of(p.grad_half) * bytes_of(p.grad.type);
    // A token per CTA; of other ranks' tokens only those that arrived.
    int round = 0;
    ArrivedTasks tasks(blockIdx.x);
    for (; tasks.find(p.arrived, 1); tasks.step(gridDim.x), round ^= 1) {
        const int64_t token = tasks.row(p.arrived, 1);
        const int32_t slot = lane_slot(p.slot_of, token, p.top_k, p.slots);
        const float weight = lane_weight(p.weights, token, p.top_k);
        const bool exists = p.arrived.counts == nullptr || arch::any(slot >= 0);
        float d_weight = 0;  // for k = lane
        for (int64_t first = int64_t(warp) * kWarpColumns; first < p.hidden; first += step) {
            const int64_t column = first + lane * 16;
            const bool here = column < p.hidden;
            // Load the token's gradient once for all its experts.
            float grad[16] = {};
            if (here && exists) load_floats(grad, all_grads, token, column, p.hidden);
            for (int k = 0; k < p.top_k; k += kRows) {
                // Load the experts' rows for d_w.
                tile::Sixteen<Y> rows[kRows];
                K2K_UNROLL
                for (int i = 0; i < kRows; ++i) {
                    const int64_t from = arch::shuffle(slot, k + i);
                    rows[i] = {};
                    if (p.d_weights == nullptr || from < 0 || !here) continue;
                    const Y* y = static_cast<const Y*>(p.y) + from * p.y_row_stride;
                    rows[i] = tile::load_sixteen(y, column, p.hidden);
                }
                K2K_UNROLL
                for (int i = 0; i < kRows; ++i) {
                    const int64_t to = arch::shuffle(slot, k + i);
                    const float factor = arch::shuffle(weight, k + i);
                    if (to < 0) continue;  // uniform in the warp
                    // d_w: dot product over 16 columns, then over the warp by butterfly.
                    float values[16];
                    if (p.d_weights != nullptr) {
                        tile::widen(values, rows[i]);
                        float dot = 0;
                        K2K_UNROLL
                        for (int j = 0; j < 16; ++j) dot = fmaf(grad[j], values[j], dot);
                        dot = tile::sum_over_lanes(dot);
                        if (lane == k + i) d_weight += dot;
                    }
                    if (!here) continue;
                    // d_y: the weighted gradient, to the pair's slot.
                    K2K_UNROLL
                    for (int j = 0; j < 16; ++j) values[j] = grad[j] * factor;
                    store_floats<Y>(p.d_y, to, column, p.hidden, values);
                }
            }
        }
        // Add the warps' parts of d_w, in order. The next token uses the other buffer, so one
        // barrier per token is enough.
        if (p.d_weights == nullptr) continue;
        smem.of_warp[round][warp][lane] = d_weight;
        arch::sync_block();
        if (warp == 0 && lane < p.top_k) {
            float sum = 0;
            for (int w = 0; w < warps; ++w) sum += smem.of_warp[round][w][lane];
            p.d_weights[token * p.top_k + lane] = sum;
        }
    }

    // Zero the padding rows: a lane per slot finds them, the warp writes them.
    for (int64_t first = (int64_t(blockIdx.x) * warps + warp) * 32; first < p.slots;
         first += int64_t(gridDim.x) * warps * 32) {
        const int64_t slot = first + lane;
        uint32_t pads = arch::ballot(slot < p.slots && p.token_of_slot[slot] < 0);
        for (int i = 0; i < 32 && pads >> i != 0; ++i) {
            if (!(pads >> i & 1)) continue;
            for (int64_t column = lane * 16; column < p.hidden; column += kWarpColumns) {
                store_floats<Y>(p.d_y, first + i, column, p.hidden, {});
            }
        }
    }
}

}  // namespace k2k
