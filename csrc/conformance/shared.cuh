#pragma once

// Shared by the kernels for every chip and those for sm_90a.

#include "arch/mma.cuh"
#include "arch/warp.cuh"

namespace k2k::conformance {

K2K_DEVICE uint32_t bits_of(uint32_t value) { return value; }
K2K_DEVICE uint32_t bits_of(int32_t value) { return static_cast<uint32_t>(value); }
K2K_DEVICE uint32_t bits_of(float value) { return soft::float_bits(value); }
K2K_DEVICE uint32_t bits_of(bool value) { return value ? 1 : 0; }

// Rows of one word per thread of the CTA.
class Rows {
  public:
    K2K_DEVICE explicit Rows(uint32_t* output) : next_(output + threadIdx.x) {}
    template <class T>
    K2K_DEVICE void operator()(T value) {
        *next_ = bits_of(value);
        next_ += blockDim.x;
    }

  private:
    uint32_t* next_;
};

// Rows of four 16-bit 8x8 matrices.
struct alignas(16) MatrixStorage {
    uint32_t words[32 * 4];
};

// Input: rows of a word per lane: a[4], b[2], d[4]; output: d[4].
template <class T>
__global__ void __launch_bounds__(32) mma_kernel(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = arch::lane_id();
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = input[i * 32 + lane];
    for (int i = 0; i < 2; ++i) b[i] = input[(4 + i) * 32 + lane];
    for (int i = 0; i < 4; ++i) d[i] = soft::bits_float(input[(6 + i) * 32 + lane]);
    arch::mma_sync<T>(d, a, b);
    Rows out(output);
    for (const float value : d) out(value);
}

}  // namespace k2k::conformance
