#pragma once

// Kernel parameters. Letters as in README.md: X [m, n], short side s.

#include "common/dtypes.h"

namespace k2k {

// The matrices of the iteration, one each for every matrix of a tensor. X and Q are double
// buffered: other CTAs still read them while their successors are written.
enum class NsBuffer : int8_t {
    kX0,       // [m, n]
    kX1,       // [m, n]
    kGram,     // [s, s], like the following
    kZ,        // b R + c R^2
    kProduct,  // R Z + a R
    kQ0,       // standard iteration: up to kZ
    kQ1,
    kResult,  // the caller's tensor
    kNone,
};

// A tensor of the list. Strides are in elements.
struct NsTensor {
    const void* x;  // [batch, m, n], stride 1 along n; in an update, the gradient
    void* result;   // [batch, m, n], contiguous; in an update, none
    char* workspace;
    int64_t x_batch_stride, x_row_stride;
    int64_t first_triangle, first_tile;  // tiles of s x s triangles, of [m, n], before this tensor
    int64_t first_chunk;                 // of x, which the norm is summed up by
    int64_t first_matrix;                // among those of kernel_small.cuh that start with it
    int32_t batch, m, n;
    Type type;  // of x and result
    bool gram;  // which iteration
};

// [batch, m, n], stride 1 along n.
struct NsView {
    void* data;
    int64_t batch_stride, row_stride;
    Type type;
};

// What else belongs to a tensor in a step of the optimizer, where X is the momentum after it:
//
//     M <- M + (1 - mu) (G - M);  X = M, or G + mu (M - G)
//     W <- row_scale ((1 - rate weight_decay) W - rate scale NewtonSchulz(X));  copy <- W
struct NsUpdate {
    NsView momentum, weight, copy;  // copy.data may be null
    const float* row_scale;         // [batch, m], or null
    int64_t row_scale_stride;       // of a matrix
    float scale;
};

// The same for all tensors. What may change between replays of a captured graph is behind pointers.
struct NsRule {
    const uint8_t* skip;      // not 0: the step changes nothing; null: never
    const float* lr_tensor;   // a factor of lr, or null
    const float* grad_scale;  // which the gradients are divided by, or null
    double lr, weight_decay, momentum;
    bool nesterov;
};

// What every kernel reads.
struct NsTables {
    const NsTensor* tensors;
    const NsUpdate* updates;  // null: results are stored as they are
    NsRule rule;
};

enum class NsKind : int8_t {
    kGram,      // X X^T, or X^T X if m > n; a triangle
    kSquare,    // of two symmetric matrices that commute; a triangle
    kMultiply,  // square X, or X square if m > n
};

// d = alpha a b + beta c;  shifted = d + diagonal I
struct NsOp {
    NsKind kind;
    NsBuffer a, b, c, d, shifted;
    float alpha, beta, diagonal;
    int32_t begin, end;  // the tensors it is for
    int64_t tiles;       // of all of them
};

// One launch: a stage of the standard iteration, and of the Gram one with up to two products.
struct NsStage {
    NsTables tables;
    NsOp ops[3];
    int32_t num_ops;
};

struct NsStep {
    float a, b, c;  // X <- a X + b (X X^T) X + c (X X^T)^2 X
    bool restart;   // the Gram iteration recomputes X before it
};

constexpr int kNsMostSteps = 100;

// The whole iteration of small matrices.
struct NsSmall {
    NsTables tables;
    int32_t begin, end;  // the tensors
    int32_t num_steps;
    NsStep steps[kNsMostSteps];
};
static_assert(sizeof(NsSmall) <= 4096);

struct NsPrologue {
    NsTables tables;
    int32_t num_tensors;
    double* square_sums;  // of each chunk
};

// Kernel parameters have at most 4 KB: tables are passed in pieces.
constexpr int kNsTablePiece = 32;
template <class Row>
struct NsTablePiece {
    Row* target;
    int32_t count;
    Row rows[kNsTablePiece];
};
static_assert(sizeof(NsTablePiece<NsTensor>) <= 4096 && sizeof(NsTablePiece<NsUpdate>) <= 4096);

}  // namespace k2k
