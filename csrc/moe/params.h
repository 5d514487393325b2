#pragma once

// Parameters of the kernels of this folder. Sizes and strides are in elements; -1 means "no slot",
// "no token", "no expert".

#include "common/dtypes.h"
#include "tile/arrived_rows.cuh"

namespace k2k {

// A matrix of any of the three float types, read as float32.
struct FloatRows {
    const void* values;  // [rows, columns], columns contiguous; or null
    Type type;
    int64_t row_stride;
};

// Rows in a double buffer (csrc/exchange): they begin `stride` elements after the given address if
// *half is 1. Null: at the address.
struct Half {
    const int32_t* half;  // in device memory
    int64_t stride;
};

struct MoeRouteParams {
    const void* logits;  // [tokens, experts], experts contiguous
    Type type;           // of logits
    int64_t row_stride;
    const float* bias;  // [experts], or null
    int64_t tokens;
    int experts, top_k;
    int groups, kept_groups;  // 1, 1: no groups
    bool softmax;             // else sigmoid
    bool normalize;
    float scale;
    int32_t* indices;            // [tokens, top_k]
    float* weights;              // [tokens, top_k]
    unsigned long long* counts;  // [experts]; must be zeros if the grid has more than one CTA
};

struct MoeRouteBackwardParams {
    const float* grad;       // [tokens, top_k]
    const void* logits;      // [tokens, experts]
    const int32_t* indices;  // [tokens, top_k]
    void* d_logits;          // [tokens, experts], contiguous
    Type type;               // of logits and d_logits
    int64_t row_stride;      // of logits
    int64_t tokens;
    int experts, top_k;
    bool softmax;
    bool normalize;
    float scale;
};

struct MoeDispatchParams {
    const void* x;  // [tokens, hidden]
    Type type;      // of x, and of data if it is not quantised
    int64_t x_row_stride;
    Half x_half;
    // The tokens that arrived, with sources * capacity = tokens. Indices of the others are -1; x is
    // read neither there nor for tokens without an expert. counts null: all tokens exist.
    ArrivedRows arrived;
    const void* indices;  // [tokens, top_k], contiguous: int32, or int64
    bool wide_indices;
    int64_t tokens, hidden;
    int top_k, experts;
    uint32_t alignment;
    int32_t capacity;  // slots
    void* data;        // [capacity, hidden], contiguous; e4m3 codes if quantised
    bool quantize, power_of_two;
    float* scales;  // [capacity, ceil(hidden / 128)] at its strides
    int64_t scale_row_stride, scale_column_stride;
    int32_t* slot_of;        // [tokens, top_k]
    int32_t* token_of_slot;  // [capacity]
    int32_t* offsets;        // [experts + 1]
    int32_t* counts;         // [experts]
    int64_t* overflow;       // one number: pairs dropped for lack of capacity
    // Workspace for more than kPlanTile pairs: a pair's rank among those of its expert in its tile,
    // and the pairs of each expert before each tile.
    uint16_t* ranks;       // [tokens * top_k]
    int32_t* before_tile;  // [tiles, experts]
};

struct MoeCombineParams {
    const void* y;  // [slots, hidden]
    Type type;      // of y
    int64_t y_row_stride;
    Half y_half;
    const int32_t* slot_of;      // [tokens, top_k]
    const float* weights;        // [tokens, top_k], or null: ones
    FloatRows shared, residual;  // [tokens, hidden]
    void* out;                   // [tokens, hidden], contiguous
    Type out_type;
    int64_t tokens, hidden;
    int32_t slots;
    int top_k;
};

// The gradients of combine; with neither d_weights nor weights, rows moved to their slots.
struct MoeCombineBackwardParams {
    FloatRows grad;  // [tokens, hidden]
    Half grad_half;
    ArrivedRows arrived;  // as in MoeDispatchParams; d_weights of other tokens are not written
    const void* y;        // [slots, hidden]; not read if d_weights is null
    void* d_y;            // [slots, hidden], contiguous
    Type type;            // of y and d_y
    int64_t y_row_stride;
    const int32_t* slot_of;        // [tokens, top_k]
    const int32_t* token_of_slot;  // [slots]
    const float* weights;          // [tokens, top_k], or null: ones
    float* d_weights;              // [tokens, top_k], or null: no gradient of the weights
    int64_t tokens, hidden;
    int32_t slots;
    int top_k;
};

// The sequence-wise balance loss, or its gradient.
struct MoeLossParams {
    const void* logits;  // [tokens, experts], experts contiguous
    Type type;           // of logits and d_logits
    int64_t row_stride;
    const void* indices;  // [tokens, top_k], contiguous: int32, or int64
    bool wide_indices;
    const void* cu_seqlens;  // [sequences + 1]: int32, or int64; null: one sequence
    bool wide_seqlens;
    int64_t tokens, sequences;
    int experts, top_k;
    float alpha;
    bool softmax;       // else sigmoid
    uint32_t* hits;     // [sequences, experts]: must be zeros; the indices are counted in it
    float* sums;        // [kMostRouteBlocks]: workspace of the loss
    float* loss;        // one number; null: compute the gradient
    const float* grad;  // one number
    void* d_logits;     // [tokens, experts], contiguous
};

struct MoeBiasParams {
    const float* bias;   // [experts]
    const void* counts;  // [experts]: int32, or int64
    bool wide_counts;
    int experts;
    float rate;
    bool quantile;  // else sign
    float* result;  // [experts]
};

}  // namespace k2k
