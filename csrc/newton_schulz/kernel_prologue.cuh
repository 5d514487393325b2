#pragma once

// X_0 = X / |X|_F, rounded to the iteration's dtype, in a workspace whose rows begin on 16 bytes.
// Two kernels, one after the other:
//
//     norm    sums[chunk] = sum of x[i, j]^2 over the chunk                   in float64
//     cast    x0[i, j]    = round(x[i, j] / sqrt(sum over chunks of sums))
//
// In a step of the optimizer (kUpdates), x is computed from the gradient g and the momentum m:
//
//     norm    m <- round(m + (1 - mu) (g - m));  x = m, or g + mu (m - g) (Nesterov)
//     cast                                       x = m, or g + mu (m - g)
//
// Grid      both kernels: one CTA of 8 warps per chunk of a matrix. A chunk is 64 segments; a
//           segment is 512 consecutive elements of a row, for one warp, 16 per lane.
// Float64   squares of floats are exact in it, without overflow or underflow, so there is neither a
//           search for the largest element nor an epsilon. One addition per element, at 64 per
//           cycle on an H100, takes less time than loading the element.
// Order     of the sum: a lane's segments, lanes by butterfly, warps in order. cast adds the chunks
//           in the same way. The order depends on the shape of the matrix alone.
// Scaling   1/|X| as two float factors: 2^h, h half its exponent, and the rest. Neither overflows
//           for tiny X nor loses bits for huge X.
// NaN       a sum that is not finite makes the whole matrix NaN; a zero matrix has the factor 0.
// Traffic   x twice, x0 once; of the optimizer, gradient and momentum twice, momentum and x0 once.
// Shared    one sum per warp.
// Limits    rows of x that do not begin on 16 bytes are read element by element.

#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "newton_schulz/tensors.cuh"
#include "tile/reduce.cuh"
#include "tile/sixteen.cuh"

namespace k2k {

// Copies part of the table of tensors from the kernel parameters to memory, for find_tensor.
template <class Row>
__global__ void __launch_bounds__(kNsTablePiece)
    newton_schulz_table_kernel(const __grid_constant__ NsTablePiece<Row> p) {
    const int i = threadIdx.x;
    if (i < p.count) p.target[i] = p.rows[i];
}

struct NsSums {
    double of_warp[kNsThreads / 32];
};

// The sum over the CTA, the same bits in all of its threads.
K2K_DEVICE double sum_over_block(NsSums& sums, double value) {
    // A butterfly, then the warps' sums in order.
    value = tile::sum_over_lanes(value);
    if (arch::lane_id() == 0) sums.of_warp[arch::warp_id()] = value;
    arch::sync_block();
    double sum = 0;
    K2K_UNROLL
    for (double of_warp : sums.of_warp) sum += of_warp;
    return sum;
}

// The CTA's chunk of one matrix of x; kUpdates: x is computed from gradient and momentum.
template <bool kUpdates>
struct NsChunk {
    const NsTables& tables;
    int tensor_index;
    const NsTensor& tensor;
    int64_t first;  // first chunk of the matrix
    int matrix;
    uint32_t index;  // of this chunk in the matrix

    K2K_DEVICE explicit NsChunk(const NsPrologue& p)
        : tables(p.tables),
          tensor_index(
              find_tensor(p.tables.tensors, &NsTensor::first_chunk, 0, p.num_tensors, blockIdx.x)),
          tensor(p.tables.tensors[tensor_index]) {
        // Divide in 32 bits: faster.
        const auto chunks = static_cast<uint32_t>(norm_chunks(tensor.m, tensor.n));
        const auto at = static_cast<uint32_t>(blockIdx.x - tensor.first_chunk);
        matrix = at / chunks;
        index = at % chunks;
        first = blockIdx.x - index;
    }

    // Calls f(row, column) for each 16 elements of this lane.
    template <class F>
    K2K_DEVICE void for_each_sixteen(F&& f) const {
        const uint32_t per_row = ceil_div(int64_t(tensor.n), kNsSegment);
        const uint32_t end = tensor.m * per_row;
        // A warp takes every eighth segment of the chunk.
        K2K_NO_UNROLL
        for (int i = 0; i < kNsSegmentsPerChunk; i += kNsThreads / 32) {
            const uint32_t segment = index * kNsSegmentsPerChunk + i + arch::warp_id();
            if (segment >= end) return;
            const int row = segment / per_row;
            const int column = segment % per_row * kNsSegment + arch::lane_id() * 16;
            if (column < tensor.n) f(row, column);
        }
    }

    // Loads or computes 16 elements of x. kFirst: norm kernel, updates the momentum.
    template <bool kFirst>
    K2K_DEVICE void load(float (&values)[16], int row, int column) const {
        load_x(values, row, column);
        if constexpr (kUpdates) {
            // Unscale the gradient.
            const NsRule& rule = tables.rule;
            if (rule.grad_scale != nullptr) {
                const float scale = *rule.grad_scale;
                K2K_UNROLL
                for (float& value : values) value /= scale;
            }
            // Load the updated momentum, as stored.
            const NsView& view = tables.updates[tensor_index].momentum;
            const int64_t offset = matrix * view.batch_stride + row * view.row_stride;
            float average[16];
            if (view.type == Type::kF32) {
                momentum<float, kFirst>(average, values, view, offset, column);
            } else {
                momentum<bf16, kFirst>(average, values, view, offset, column);
            }
            // Nesterov: g + mu (m - g); else m.
            const float share = rule.nesterov ? static_cast<float>(1 - rule.momentum) : 0.0f;
            K2K_UNROLL
            for (int i = 0; i < 16; ++i) {
                values[i] = fmaf(share, values[i] - average[i], average[i]);
            }
        }
    }

  private:
    K2K_DEVICE void load_x(float (&values)[16], int row, int column) const {
        const int64_t offset = matrix * tensor.x_batch_stride + row * tensor.x_row_stride;
        if (tensor.type == Type::kF32) {
            load_as<float>(values, offset, column);
        } else if (tensor.type == Type::kBf16) {
            load_as<bf16>(values, offset, column);
        } else {
            load_as<fp16>(values, offset, column);
        }
    }

    // Loads 16 elements of the momentum; kFirst: averages `grad` into them and stores them. Plain
    // loads, not ld.global.nc: this kernel writes the momentum.
    template <class M, bool kFirst>
    K2K_DEVICE void momentum(float (&average)[16], const float (&grad)[16], const NsView& view,
                             int64_t offset, int column) const {
        M* row = static_cast<M*>(view.data) + offset;
        tile::Sixteen<M> stored;
        if (tile::in_vectors(row, column, tensor.n)) {
            K2K_UNROLL
            for (int i = 0; i < tile::Sixteen<M>::kVectors; ++i) {
                tile::set_vector(stored, i, reinterpret_cast<const uint4*>(row + column)[i]);
            }
        } else {
            stored = tile::load_elements(row, column, tensor.n);
        }
        tile::widen(average, stored);
        // norm: average, round, store; return the rounded values, as cast will load them.
        if constexpr (kFirst) {
            const auto share = static_cast<float>(1 - tables.rule.momentum);
            K2K_UNROLL
            for (int i = 0; i < 16; ++i) {
                average[i] = fmaf(share, grad[i] - average[i], average[i]);
            }
            tile::narrow(stored, average);
            tile::store_sixteen(row, column, tensor.n, stored);
            tile::widen(average, stored);
        }
    }

    template <class X>
    K2K_DEVICE void load_as(float (&values)[16], int64_t offset, int column) const {
        const X* row = static_cast<const X*>(tensor.x) + offset;
        tile::widen(values, tile::load_sixteen(row, column, tensor.n));
    }
};

template <bool kUpdates>
__global__ void __launch_bounds__(kNsThreads)
    newton_schulz_norm_kernel(const __grid_constant__ NsPrologue p) {
    if (kUpdates && is_skipped(p.tables)) return;
    NsSums& sums = arch::shared_storage<NsSums>();
    const NsChunk<kUpdates> chunk(p);
    // Sum the squares of this lane's elements, then over the CTA.
    double sum = 0;
    chunk.for_each_sixteen([&](int row, int column) {
        float values[16];
        chunk.template load<true>(values, row, column);
        K2K_UNROLL
        for (float value : values) sum += static_cast<double>(value) * value;
    });
    sum = sum_over_block(sums, sum);
    if (threadIdx.x == 0) p.square_sums[blockIdx.x] = sum;
}

template <class T, bool kUpdates>
__global__ void __launch_bounds__(kNsThreads)
    newton_schulz_cast_kernel(const __grid_constant__ NsPrologue p) {
    if (kUpdates && is_skipped(p.tables)) return;
    NsSums& sums = arch::shared_storage<NsSums>();
    const NsChunk<kUpdates> chunk(p);
    const int64_t chunks = norm_chunks(chunk.tensor.m, chunk.tensor.n);
    // Sum over the chunks of the matrix; every CTA of it does so, in the same order.
    double sum = 0;
    for (int64_t i = threadIdx.x; i < chunks; i += kNsThreads) {
        sum += p.square_sums[chunk.first + i];
    }
    sum = sum_over_block(sums, sum);

    // Split 1/|X| into two factors.
    float first = 0, second = 0;
    if (sum > 0 && sum < INFINITY) {
        const double factor = 1 / sqrt(sum);
        const int half = ilogb(factor) / 2;
        first = ldexpf(1.0f, half);
        second = static_cast<float>(ldexp(factor, -half));
    } else if (!(sum == 0)) {
        first = second = NAN;
    }
    // Scale, round and store; columns up to the pitch become zeros.
    const NsMatrix<T> x0(chunk.tensor, chunk.matrix, NsBuffer::kX0);
    chunk.for_each_sixteen([&](int row, int column) {
        float values[16];
        chunk.template load<false>(values, row, column);
        K2K_UNROLL
        for (float& value : values) value = value * first * second;
        tile::Sixteen<T> sixteen;
        tile::narrow(sixteen, values);
        tile::store_sixteen(x0.data + row * x0.pitch, column, x0.pitch, sixteen);
    });
}

}  // namespace k2k
