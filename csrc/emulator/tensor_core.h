#pragma once

// The arithmetic of mma.sync and wgmma: C[m][n] += A[m][K] B[K][n] with 32 bytes of elements along
// K.

#include <cstdint>

#include "common/dtypes.h"

namespace k2k::emulator {

constexpr int kMaxK = 32;  // elements: 32 of one byte, 16 of two

constexpr int k_of(Type type) { return 32 / static_cast<int>(bytes_of(type)); }

// `rows` rows of 32 bytes to floats: values[row][k].
void decode_rows(Type type, const void* bytes, int rows, float* values);

// `columns` columns of 32 bytes (K is contiguous) to floats: values[k][column].
void decode_columns(Type type, const void* bytes, int columns, float* values);

// c[m][n] += a[m][K] b[K][n] in float, one product after the other; `as_hopper`: FP8 with the
// rounding of H100's wgmma.
void multiply(Type type, float* c, const float* a, const float* b, int m, int n,
              bool as_hopper = false);

}  // namespace k2k::emulator
