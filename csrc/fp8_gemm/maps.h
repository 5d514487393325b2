#pragma once

// Tensor maps of A and B.

#include "arch/tensor_map.h"
#include "fp8_gemm/config.h"

namespace k2k {

// Boxes of `box_rows` rows of 128 codes.
inline arch::TensorMap codes_map(const Fp8Matrix& m, int64_t k, int box_rows) {
    const auto unsign = [](int64_t n) { return static_cast<uint64_t>(n); };
    const int64_t matrix_stride = m.matrices > 1 ? m.matrix_stride : m.rows * m.row_stride;
    return arch::make_tensor_map(
        Type::kE4m3, m.codes, {unsign(k), unsign(m.rows), unsign(m.matrices)},
        {unsign(m.row_stride), unsign(matrix_stride)},
        {kBlockK, static_cast<uint32_t>(box_rows), 1}, arch::Swizzle::k128);
}

}  // namespace k2k
