#pragma once

// From accumulators to D: + bias, + C, one rounding, stores. Accumulators lie as mma and wgmma
// leave them: 16 rows of a warp, in groups of 8 columns; lane 4 g + t holds rows g and g + 8,
// columns 2 t and 2 t + 1 of group j in values[4 j + 2 h + e].

#include "arch/convert.cuh"
#include "arch/ldst.cuh"
#include "arch/warp.cuh"
#include "fp8_gemm/schedule.cuh"

namespace k2k {

K2K_DEVICE float widened(float value) { return value; }
K2K_DEVICE float widened(bf16 value) { return arch::to_float(value); }
K2K_DEVICE float widened(fp16 value) { return arch::to_float(value); }

// Calls f with a null pointer of the type, on the device.
template <class F>
K2K_DEVICE void by_result_type(Type type, F&& f) {
    if (type == Type::kBf16) {
        f(static_cast<bf16*>(nullptr));
    } else if (type == Type::kFp16) {
        f(static_cast<fp16*>(nullptr));
    } else {
        f(static_cast<float*>(nullptr));
    }
}

// Two neighbours from `source`: by one load if the pair lies on a multiple of its size.
template <class T>
K2K_DEVICE void load_pair(float (&pair)[2], const T* source, bool second) {
    struct alignas(2 * sizeof(T)) Pair {
        T values[2];
    };
    pair[1] = 0;
    if (reinterpret_cast<uintptr_t>(source) % sizeof(Pair) == 0 && second) {
        const Pair both = *reinterpret_cast<const Pair*>(source);
        pair[0] = widened(both.values[0]);
        pair[1] = widened(both.values[1]);
    } else {
        pair[0] = widened(source[0]);
        if (second) pair[1] = widened(source[1]);
    }
}

// Adds bias or C to the values of rows row and row + 8, from `column` on.
template <int kValues>
K2K_DEVICE void add(float (&values)[kValues],
                    const Addend& addend,
                    const GemmTile& tile,
                    int row,
                    int column,
                    int64_t columns) {
    const int64_t first =
        tile.group * addend.matrix_stride + (tile.first_row + row) * addend.row_stride + column;
    by_result_type(addend.type, [&](auto* type) {
        const auto* source = static_cast<decltype(type)>(const_cast<void*>(addend.values)) + first;
        K2K_UNROLL
        for (int j = 0; j < kValues / 4; ++j) {
            K2K_UNROLL
            for (int h = 0; h < 2; ++h) {
                if (row + 8 * h >= tile.rows || column + 8 * j >= columns) continue;
                float pair[2];
                load_pair(pair, source + 8 * h * addend.row_stride + 8 * j,
                          column + 8 * j + 1 < columns);
                values[4 * j + 2 * h] += pair[0];
                values[4 * j + 2 * h + 1] += pair[1];
            }
        }
    });
}

// words[i] of lane 4 g + t becomes words[t] of lane 4 g + i.
K2K_DEVICE void transpose_quad(uint32_t (&words)[4]) {
    const uint32_t lane = arch::lane_id();
    K2K_UNROLL
    for (uint32_t mask = 1; mask < 4; mask *= 2) {
        const bool upper = lane & mask;
        K2K_UNROLL
        for (uint32_t i = 0; i < 4; ++i) {
            if (i & mask) continue;
            const uint32_t sent = upper ? words[i] : words[i | mask];
            const uint32_t got = arch::shuffle_xor(sent, mask);
            (upper ? words[i] : words[i | mask]) = got;
        }
    }
}

K2K_DEVICE float narrowed(float value, float*) { return value; }
K2K_DEVICE bf16 narrowed(float value, bf16*) { return arch::to_bf16(value); }
K2K_DEVICE fp16 narrowed(float value, fp16*) { return arch::to_fp16(value); }
K2K_DEVICE uint32_t packed(float low, float high, bf16*) { return arch::pack_bf16(low, high); }
K2K_DEVICE uint32_t packed(float low, float high, fp16*) { return arch::pack_fp16(low, high); }

// Stores the values of row g (h = 0) or g + 8 (h = 1) from d on, where `left` columns are left
// (none or less: the row is not stored). `aligned`: rows of D begin at multiples of 16 bytes.
// Floats: the lanes of a quad have 32 bytes side by side.
template <int kValues>
K2K_DEVICE void store_row(
    float* d, const float (&values)[kValues], int h, int64_t left, bool aligned) {
    K2K_UNROLL
    for (int j = 0; j < kValues / 4; ++j) {
        const float low = values[4 * j + 2 * h], high = values[4 * j + 2 * h + 1];
        if (aligned && 8 * j + 1 < left) {
            *reinterpret_cast<float2*>(d + 8 * j) = make_float2(low, high);
        } else {
            if (8 * j < left) d[8 * j] = low;
            if (8 * j + 1 < left) d[8 * j + 1] = high;
        }
    }
}

// Two-byte results: four groups of columns change places within a quad, so that each lane has 16
// bytes and the quad 64 side by side. All lanes of the warp call it.
template <class T, int kValues>
K2K_DEVICE void store_row(T* d, const float (&values)[kValues], int h, int64_t left, bool aligned) {
    if (kValues % 16 != 0 || !aligned) {
        K2K_UNROLL
        for (int j = 0; j < kValues / 4; ++j) {
            K2K_UNROLL
            for (int e = 0; e < 2; ++e) {
                if (8 * j + e < left) d[8 * j + e] = narrowed(values[4 * j + 2 * h + e], d);
            }
        }
        return;
    }
    const int t = arch::lane_id() % 4;
    K2K_UNROLL
    for (int first = 0; first < kValues / 4; first += 4) {
        uint32_t words[4];
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int at = (4 * (first + i) + 2 * h) % kValues;
            words[i] = packed(values[at], values[at + 1], d);
        }
        transpose_quad(words);
        const int at = 8 * (first + t) - 2 * t;  // from this lane's column
        if (at + 8 <= left) {
            arch::store(reinterpret_cast<uint4*>(d + at),
                        make_uint4(words[0], words[1], words[2], words[3]));
        } else {
            K2K_UNROLL
            for (int i = 0; i < 8; ++i) {
                const auto bits = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
                if (at + i < left) d[at + i] = T{bits};
            }
        }
    }
}

// Adds bias and C to a warp's 16 rows from `row` on and its columns from `column` on, both in the
// group's D.
template <int kValues>
K2K_DEVICE void add_addends(
    float (&values)[kValues], const Fp8GemmParams& p, const GemmTile& tile, int row, int column) {
    row += arch::lane_id() / 4;
    column += arch::lane_id() % 4 * 2;
    if (p.bias.values != nullptr) add(values, p.bias, tile, row, column, p.b.rows);
    if (p.c.values != nullptr) add(values, p.c, tile, row, column, p.b.rows);
}

// Stores them, as far as they are within the group's D.
template <int kValues>
K2K_DEVICE void store_rows(const float (&values)[kValues],
                           const Fp8GemmParams& p,
                           const GemmTile& tile,
                           int row,
                           int column) {
    const int64_t columns = p.b.rows;
    row += arch::lane_id() / 4;
    column += arch::lane_id() % 4 * 2;
    by_result_type(p.d_type, [&](auto* type) {
        const int64_t size = sizeof *type;
        const bool aligned =
            (reinterpret_cast<int64_t>(p.d) | p.d_matrix_stride * size | p.d_row_stride * size) %
                16 ==
            0;
        auto* d = static_cast<decltype(type)>(p.d) + tile.group * p.d_matrix_stride +
                  (tile.first_row + row) * p.d_row_stride + column;
        K2K_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int64_t left = row + 8 * h < tile.rows ? columns - column : 0;
            store_row(d + 8 * h * p.d_row_stride, values, h, left, aligned);
        }
    });
}

}  // namespace k2k
