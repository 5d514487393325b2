#include "emulator/tensor_core.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// The inner loops are compiled twice; the wider version is chosen at load time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define K2K_WIDE __attribute__((target_clones("arch=haswell", "default")))
#else
#define K2K_WIDE
#endif

namespace k2k::emulator {

namespace {

float decode(Type type, const uint8_t* bytes) {
    uint16_t half;
    switch (type) {
        case Type::kE4m3:
            return soft::e4m3_to_float({*bytes});
        case Type::kFp16:
            std::memcpy(&half, bytes, sizeof half);
            return soft::fp16_to_float({half});
        default:
            std::memcpy(&half, bytes, sizeof half);
            return soft::bf16_to_float({half});
    }
}

// Rows of 4 at a time, so that b is read from memory a quarter as often.
K2K_WIDE void multiply_float(float* c, const float* a, const float* b, int m, int n, int k_count) {
    for (int i = 0; i < m; i += 4) {
        float* c0 = c + static_cast<long>(i) * n;
        for (int k = 0; k < k_count; ++k) {
            const float* row = b + static_cast<long>(k) * n;
            const float a0 = a[i * k_count + k], a1 = a[(i + 1) * k_count + k];
            const float a2 = a[(i + 2) * k_count + k], a3 = a[(i + 3) * k_count + k];
            for (int j = 0; j < n; ++j) {
                c0[j] += a0 * row[j];
                c0[n + j] += a1 * row[j];
                c0[2 * n + j] += a2 * row[j];
                c0[3 * n + j] += a3 * row[j];
            }
        }
    }
}

// An e4m3 value's exponent; subnormals have that of the smallest normal.
int e4m3_exponent(float value) { return std::max(std::ilogb(value), -6); }

// `value` truncated below 2^(exponent - 13).
double cut(double value, int exponent) {
    const double unit = std::ldexp(1.0, exponent - 13);
    return std::trunc(value / unit) * unit;
}

// H100's sum of 32 FP8 products and the accumulator: all are aligned to the largest exponent and
// truncated to 13 fraction bits, summed, and the sum is truncated again. As the package mmaemu
// models cuBLAS on H100 (mmaemu/model/chain.py, preset "hopper").
float hopper_sum(float accumulator, const float* a, const float* b, int n) {
    constexpr int kNone = -1000;
    int largest = accumulator != 0 ? std::ilogb(accumulator) : kNone;
    for (int k = 0; k < kMaxK; ++k) {
        const float b_k = b[static_cast<long>(k) * n];
        if (a[k] == 0 || b_k == 0) continue;
        largest = std::max(largest, e4m3_exponent(a[k]) + e4m3_exponent(b_k));
    }
    if (largest == kNone) return 0;
    double sum = cut(accumulator, largest);
    for (int k = 0; k < kMaxK; ++k) {
        sum += cut(double(a[k]) * b[static_cast<long>(k) * n], largest);
    }
    if (std::isnan(sum)) return soft::bits_float(0x7fffffff);
    return sum == 0 ? 0 : static_cast<float>(cut(sum, std::ilogb(sum)));
}

}  // namespace

void decode_rows(Type type, const void* bytes, int rows, float* values) {
    const auto* byte = static_cast<const uint8_t*>(bytes);
    const int k_count = k_of(type), width = static_cast<int>(bytes_of(type));
    for (int i = 0; i < rows * k_count; ++i) values[i] = decode(type, byte + i * width);
}

void decode_columns(Type type, const void* bytes, int columns, float* values) {
    const auto* byte = static_cast<const uint8_t*>(bytes);
    const int k_count = k_of(type), width = static_cast<int>(bytes_of(type));
    for (int n = 0; n < columns; ++n) {
        for (int k = 0; k < k_count; ++k) {
            values[k * columns + n] = decode(type, byte + (n * k_count + k) * width);
        }
    }
}

void multiply(Type type, float* c, const float* a, const float* b, int m, int n, bool as_hopper) {
    const int k_count = k_of(type);
    if (type != Type::kE4m3 || !as_hopper) {
        multiply_float(c, a, b, m, n, k_count);
        return;
    }
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j < n; ++j) {
            c[i * n + j] = hopper_sum(c[i * n + j], a + i * k_count, b + j, n);
        }
    }
}

}  // namespace k2k::emulator
