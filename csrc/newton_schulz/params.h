#pragma once

// What the kernels of this folder are told. Letters as in README.md: X [m, n], short side s.

#include "common/dtypes.h"

namespace k2k {

// The matrices of the iteration, each once for every matrix of a tensor. X and Q change places
// with their successors, since other blocks still read them while these are written.
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
    const void* x;  // [batch, m, n], neighbouring columns side by side
    void* result;   // [batch, m, n], contiguous
    char* workspace;
    int64_t x_batch_stride, x_row_stride;
    int64_t first_triangle, first_tile;  // tiles of s x s triangles, of [m, n], before this tensor
    int64_t first_chunk;                 // of x, which the norm is summed up by
    int32_t batch, m, n;
    Type type;  // of x and result
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

// One launch. Standard and Gram iteration go side by side, the latter with two products at a time.
struct NsStage {
    const NsTensor* tensors;
    NsOp ops[3];
    int32_t num_ops;
};

struct NsPrologue {
    const NsTensor* tensors;
    int32_t num_tensors;
    double* square_sums;  // of each chunk
};

// Kernel parameters hold 4 KB: the table of tensors travels in pieces.
constexpr int kNsTablePiece = 32;
struct NsTablePiece {
    NsTensor* target;
    int32_t count;
    NsTensor tensors[kNsTablePiece];
};
static_assert(sizeof(NsTablePiece) <= 4096);

}  // namespace k2k
