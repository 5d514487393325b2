#pragma once

// Kernel parameters. Sizes and strides are in elements of the tensor.

#include "common/dtypes.h"

namespace k2k {

enum class MlaPrefillKernel : int32_t { kSm80, kSm90 };  // kernel_*_sm80.cuh, kernel_*_sm90.cuh

// How a call is served; config.h makes it.
struct MlaPrefillPlan {
    MlaPrefillKernel kernel;
    int multiprocessors;
    int heads_per_group;  // tiles of so many heads run at the same time: their keys stay in L2
};

// What forward and backward read. A row of q and k is [nope 128 | rope 64]; the rope part of k has a
// base of its own, so that all heads can share it.
struct MlaPrefillInputs {
    const void* q;                // [q_tokens, heads, 192]
    const void* k;                // [k_tokens, heads, 128]: the nope part
    const void* k_rope;           // [k_tokens, heads, 64]; shared: k_rope_head_stride 0
    const void* v;                // [k_tokens, heads, 128]
    const int32_t* cu_seqlens_q;  // [batch + 1]
    const int32_t* cu_seqlens_k;  // [batch + 1]
    const int32_t* diagonal;      // [batch], for causal calls; null: s_k - s_q, the ends aligned
    Type type;                    // of q, k, k_rope and v
    int64_t q_token_stride, q_head_stride;
    int64_t k_token_stride, k_head_stride;
    int64_t k_rope_token_stride, k_rope_head_stride;
    int64_t v_token_stride, v_head_stride;
    int32_t q_tokens, k_tokens, heads, batch;
    float scale;
    bool causal;  // query i of a sequence sees its keys < i + diagonal + 1; otherwise all of them
    MlaPrefillPlan plan;
};

struct MlaPrefillParams {
    MlaPrefillInputs in;
    void* out;          // [q_tokens, heads, 128], contiguous
    float* lse;         // [q_tokens, heads], natural
    float* max_logits;  // [q_tokens, heads], or null
    // A sequence's keys may come in pieces, one call each: `state` [q_tokens, heads, kStateFloats] holds
    // a row's sums in between, and out, lse and max_logits are written by the call that has them.
    const float* state_in;  // of the pieces before; null: this is the first
    float* state_out;       // null: this is the last
    int32_t* ticket;        // counter of tasks taken; zero before the launch
};

struct MlaPrefillBackwardParams {
    MlaPrefillInputs in;
    const void* grad_out;  // [q_tokens, heads, 128]
    int64_t grad_out_token_stride, grad_out_head_stride;
    const void* out;        // [q_tokens, heads, 128], contiguous
    const float* lse;       // [q_tokens, heads], natural
    const float* grad_lse;  // [q_tokens, heads]
    float* lse2;            // [heads, q_tokens]: lse in base 2; +inf for a row without keys
    float* delta;           // [heads, q_tokens]: rowsum(grad_out * out) - grad_lse
    void* grad_q;           // [q_tokens, heads, 192], contiguous
    void* grad_k;           // [k_tokens, heads, 128], or 192 with its rope part
    void* grad_v;           // [k_tokens, heads, 128]
    int64_t grad_k_token_stride, grad_k_head_stride;
    int64_t grad_v_token_stride, grad_v_head_stride;
    float* rope_parts;  // [heads, k_tokens, 64]: of shared rope, by head; null: it is not shared
    void* grad_k_rope;  // [k_tokens, 64]: their sum
    int32_t* tickets;   // [2]: the same, of dK/dV and dQ
};

// A tile of one head: of queries (forward, dQ) or of keys (dK/dV), and the sequence that it lies in.
struct MlaPrefillTask {
    int head;
    int first_query, queries;  // of the sequence: its first token in q, and how many
    int first_key, keys;       // likewise in k
    int tile, rows;            // of the tile: its first row in the sequence, and how many
    int diagonal;              // query i sees the keys < min(i + diagonal + 1, keys)
    bool last;                 // there are no more tasks: the other fields are undefined
};

}  // namespace k2k
