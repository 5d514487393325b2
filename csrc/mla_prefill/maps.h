#pragma once

// Tensor maps of what prefill reads: boxes of 64 columns of one head, `rows` tokens, with the
// 128-byte swizzle. Coordinates: column, head, token. A box may start at any token; after the
// tensor's end it brings zeros, after a sequence's end the rows of the next one.

#include "arch/tensor_map.h"
#include "mla_prefill/config.h"

namespace k2k {

constexpr int kBoxColumns = 64;  // 128 bytes
constexpr int kNopeBoxes = kNope / kBoxColumns, kQkBoxes = kQkDim / kBoxColumns;
constexpr int kVBoxes = kVDim / kBoxColumns;
static_assert(kRopeDims == kBoxColumns);

inline arch::TensorMap prefill_map(Type type, const void* base, int columns, int heads, int tokens,
                                   int64_t head_stride, int64_t token_stride, int rows) {
    const auto bytes = [](int64_t stride) { return static_cast<uint64_t>(stride) * 2; };
    return arch::make_tensor_map(type, base,
                                 {static_cast<uint64_t>(columns), static_cast<uint64_t>(heads),
                                  static_cast<uint64_t>(tokens)},
                                 {bytes(head_stride), bytes(token_stride)},
                                 {kBoxColumns, 1, static_cast<uint32_t>(rows)},
                                 arch::Swizzle::k128);
}

inline arch::TensorMap q_map(const MlaPrefillInputs& in, int rows) {
    return prefill_map(in.type, in.q, kQkDim, in.heads, in.q_tokens, in.q_head_stride,
                       in.q_token_stride, rows);
}

inline arch::TensorMap k_map(const MlaPrefillInputs& in, int rows) {
    return prefill_map(in.type, in.k, kNope, in.heads, in.k_tokens, in.k_head_stride,
                       in.k_token_stride, rows);
}

// The rope part of k: of one head if all share it. (TMA takes no stride of 0.)
inline arch::TensorMap k_rope_map(const MlaPrefillInputs& in, int rows) {
    const bool shared = in.k_rope_head_stride == 0;
    return prefill_map(in.type, in.k_rope, kRopeDims, shared ? 1 : in.heads, in.k_tokens,
                       shared ? in.k_rope_token_stride : in.k_rope_head_stride,
                       in.k_rope_token_stride, rows);
}

// The coordinate of `head` in it.
K2K_HOST_DEVICE constexpr int rope_head(const MlaPrefillInputs& in, int head) {
    return in.k_rope_head_stride == 0 ? 0 : head;
}

inline arch::TensorMap v_map(const MlaPrefillInputs& in, int rows) {
    return prefill_map(in.type, in.v, kVDim, in.heads, in.k_tokens, in.v_head_stride,
                       in.v_token_stride, rows);
}

inline arch::TensorMap grad_out_map(const MlaPrefillBackwardParams& p, int rows) {
    return prefill_map(p.in.type, p.grad_out, kVDim, p.in.heads, p.in.q_tokens,
                       p.grad_out_head_stride, p.grad_out_token_stride, rows);
}

}  // namespace k2k
