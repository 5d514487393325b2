#pragma once

// Before and after the two large kernels of the backward; all archs.
//
//     delta[h, q] = rowsum(grad_out[q, h, :] * out[q, h, :]) - grad_lse[q, h]
//     lse2[h, q]  = lse[q, h] log2(e)
//
// A row without keys has delta 0 and lse2 +inf, so that its P is 0: finite
// gradients of such a row have no effect.
//
//     grad_k_rope[k, :] = sum over h of rope_parts[h, k, :]      in ascending order, rounded once
//
// Grid      rows: 64 tokens of one head per CTA, heads first: CTAs that run at the same time read
//           memory that is contiguous. 16 lanes per row, 16 bytes each; four rows in flight.
//           rope: 16 threads per token, four columns each; four heads in flight.
// Traffic   rows: 520 bytes read per row, 8 written. rope: 256 bytes read per token and head.

#include "arch/ldst.cuh"
#include "mla_prefill/config.h"
#include "mla_prefill/params.h"
#include "tile/online_softmax.cuh"
#include "tile/pack.cuh"
#include "tile/reduce.cuh"

namespace k2k {

constexpr int kPreprocessThreads = 256, kPreprocessTokens = 64;
constexpr int kRopeSumThreads = 256, kRopeSumTokens = kRopeSumThreads / 16;

template <class T>
__global__ void __launch_bounds__(kPreprocessThreads)
    mla_prefill_preprocess_kernel(const __grid_constant__ MlaPrefillBackwardParams p) {
    constexpr int kAtOnce = kPreprocessThreads / 16, kRounds = kPreprocessTokens / kAtOnce;
    const int head = blockIdx.x % p.in.heads, lane = threadIdx.x % 16;
    const int first = blockIdx.x / p.in.heads * kPreprocessTokens + threadIdx.x / 16;

    // Load the thread's 8 columns of four rows.
    uint4 grad_out[kRounds], out[kRounds];
    K2K_UNROLL
    for (int i = 0; i < kRounds; ++i) {
        const int64_t token = first + i * kAtOnce;
        grad_out[i] = out[i] = make_uint4(0, 0, 0, 0);
        if (token >= p.in.q_tokens) continue;
        const T* of_grad = static_cast<const T*>(p.grad_out) + token * p.grad_out_token_stride +
                           head * p.grad_out_head_stride + lane * 8;
        const T* of_out = static_cast<const T*>(p.out) + (token * p.in.heads + head) * kVDim;
        grad_out[i] = arch::load_nc(reinterpret_cast<const uint4*>(of_grad));
        out[i] = arch::load_nc(reinterpret_cast<const uint4*>(of_out + lane * 8));
    }
    K2K_UNROLL
    for (int i = 0; i < kRounds; ++i) {
        // The row's sum: over 8 columns, then over 16 lanes.
        const uint32_t left[4] = {grad_out[i].x, grad_out[i].y, grad_out[i].z, grad_out[i].w};
        const uint32_t right[4] = {out[i].x, out[i].y, out[i].z, out[i].w};
        float sum = 0;
        K2K_UNROLL
        for (int j = 0; j < 8; ++j) {
            sum = fmaf(tile::unpack<T>(left[j / 2], j % 2), tile::unpack<T>(right[j / 2], j % 2),
                       sum);
        }
        sum = tile::sum_over_lanes<16>(sum);
        // One lane stores lse2 and delta.
        const int64_t token = first + i * kAtOnce;
        if (lane != 0 || token >= p.in.q_tokens) continue;
        const int64_t from = token * p.in.heads + head, to = head * int64_t(p.in.q_tokens) + token;
        const float lse = p.lse[from];
        const bool sees_nothing = lse == -INFINITY;
        p.lse2[to] = sees_nothing ? INFINITY : lse * tile::kLog2E;
        p.delta[to] = sees_nothing ? 0 : sum - p.grad_lse[from];
    }
}

template <class T>
__global__ void __launch_bounds__(kRopeSumThreads)
    mla_prefill_rope_sum_kernel(const __grid_constant__ MlaPrefillBackwardParams p) {
    constexpr int kColumns = kRopeDims / 16;
    const int64_t token = int64_t(blockIdx.x) * kRopeSumTokens + threadIdx.x / 16;
    if (token >= p.in.k_tokens) return;
    const int64_t at = token * kRopeDims + threadIdx.x % 16 * kColumns;
    const int64_t of_head = int64_t(p.in.k_tokens) * kRopeDims;
    float4 sum = make_float4(0, 0, 0, 0);
    K2K_UNROLL_BY(4)
    for (int head = 0; head < p.in.heads; ++head) {
        const float4* from = reinterpret_cast<const float4*>(p.rope_parts + head * of_head + at);
        const float4 part = arch::load_nc_no_allocate(from);
        sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    *reinterpret_cast<uint2*>(static_cast<T*>(p.grad_k_rope) + at) =
        make_uint2(tile::pack<T>(sum.x, sum.y), tile::pack<T>(sum.z, sum.w));
}

}  // namespace k2k
