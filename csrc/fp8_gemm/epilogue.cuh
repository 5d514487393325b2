#pragma once

// Epilogue of the kernels that store from registers: accumulators * row weight, + bias, + C, one
// rounding, stores. tile/store_row.cuh defines the layout of the accumulators.

#include "fp8_gemm/schedule.cuh"
#include "tile/store_row.cuh"

namespace k2k {

using tile::narrowed;
using tile::pack;
using tile::store_row;

K2K_DEVICE float widened(float value) { return value; }
K2K_DEVICE float widened(bf16 value) { return arch::to_float(value); }
K2K_DEVICE float widened(fp16 value) { return arch::to_float(value); }

// Calls f with a null pointer to the type.
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

// Loads two contiguous elements, by one access if the pair is aligned; the second only if it
// exists.
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

// Adds bias or C to the accumulators of rows row and row + 8, from `column` on.
template <int kValues>
K2K_DEVICE void add(float (&values)[kValues], const Addend& addend, const GemmTile& tile, int row,
                    int column, int64_t columns) {
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

// The weight of row `row` of the group's D.
K2K_DEVICE float row_weight(const Fp8GemmParams& p, const GemmTile& tile, int row) {
    return p.row_weights[tile.group * p.row_weights_matrix_stride + tile.first_row + row];
}

// Multiplies a warp's 16 rows from `row` on by their weights, if any. Each product is rounded by
// itself (no fused multiply-add with bias or C), so that all kernels give equal bits.
template <int kValues>
K2K_DEVICE void weigh(float (&values)[kValues], const Fp8GemmParams& p, const GemmTile& tile,
                      int row) {
    if (p.row_weights == nullptr) return;
    row += arch::lane_id() / 4;
    K2K_UNROLL
    for (int h = 0; h < 2; ++h) {
        if (row + 8 * h >= tile.rows) continue;
        const float weight = row_weight(p, tile, row + 8 * h);
        K2K_UNROLL
        for (int i = 0; i < kValues; ++i) {
            if (i / 2 % 2 == h) values[i] = rounded_product(values[i], weight);
        }
    }
}

// weigh(), then adds bias and C, from `column` on.
template <int kValues>
K2K_DEVICE void weigh_and_add(float (&values)[kValues], const Fp8GemmParams& p,
                              const GemmTile& tile, int row, int column) {
    weigh(values, p, tile, row);
    row += arch::lane_id() / 4;
    column += arch::lane_id() % 4 * 2;
    if (p.bias.values != nullptr) add(values, p.bias, tile, row, column, p.b.rows);
    if (p.c.values != nullptr) add(values, p.c, tile, row, column, p.b.rows);
}

// Rounds and stores a warp's 16 rows, as far as they are within the group's D.
template <int kValues>
K2K_DEVICE void store_rows(const float (&values)[kValues], const Fp8GemmParams& p,
                           const GemmTile& tile, int row, int column) {
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
