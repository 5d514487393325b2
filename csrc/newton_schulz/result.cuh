#pragma once

// The end of the last product's epilogue. A thread stores eight consecutive elements of a row of
// the product o: to the caller's result or, in a step of the optimizer, to the weights w and their
// copy:
//
//     w <- row_scale ((1 - rate weight_decay) w - rate scale o)      in float32, rounded once
//     rate = lr lr_tensor

#include "arch/ldst.cuh"
#include "newton_schulz/tensors.cuh"
#include "tile/pack.cuh"
#include "tile/sixteen.cuh"

namespace k2k {

// Eight consecutive elements, as stored.
template <class T>
struct alignas(16) NsEight {
    T values[8];
};

// Loads row[0 .. count - 1]; the others become 0. Plain loads, not ld.global.nc: the kernel also
// writes the weights.
template <class Y>
K2K_DEVICE void load_eight(float (&values)[8], const Y* row, int count) {
    NsEight<Y> eight = {};
    if (count == 8 && tile::on_16_bytes(row)) {
        K2K_UNROLL
        for (int j = 0; j < int(sizeof(Y)) / 2; ++j) {
            reinterpret_cast<uint4*>(&eight)[j] = reinterpret_cast<const uint4*>(row)[j];
        }
    } else {
        K2K_UNROLL
        for (int j = 0; j < 8; ++j) {
            if (j < count) eight.values[j] = row[j];
        }
    }
    K2K_UNROLL
    for (int j = 0; j < 8; ++j) values[j] = tile::as_float(eight.values[j]);
}

template <class Y>
K2K_DEVICE void store_eight(Y* row, const float (&values)[8], int count) {
    NsEight<Y> eight;
    K2K_UNROLL
    for (int j = 0; j < 8; ++j) eight.values[j] = tile::narrowed<Y>(values[j]);
    if (count == 8 && tile::on_16_bytes(row)) {
        K2K_UNROLL
        for (int j = 0; j < int(sizeof(Y)) / 2; ++j) {
            arch::store(reinterpret_cast<uint4*>(row) + j,
                        reinterpret_cast<const uint4*>(&eight)[j]);
        }
    } else {
        K2K_UNROLL
        for (int j = 0; j < 8; ++j) {
            if (j < count) row[j] = eight.values[j];
        }
    }
}

// Calls f with a null pointer to the type: dispatch.
template <class F>
K2K_DEVICE void by_type(Type type, F&& f) {
    if (type == Type::kF32) {
        f(static_cast<float*>(nullptr));
    } else if (type == Type::kBf16) {
        f(static_cast<bf16*>(nullptr));
    } else {
        f(static_cast<fp16*>(nullptr));
    }
}

// Stores the result of one matrix, or updates its weights.
class NsFinish {
  public:
    K2K_DEVICE NsFinish(const NsTables& p, int index, int matrix)
        : tensor_(p.tensors[index]), matrix_(matrix) {
        if (p.updates == nullptr) return;
        update_ = p.updates + index;
        const double rate = p.rule.lr * (p.rule.lr_tensor != nullptr ? *p.rule.lr_tensor : 1.0f);
        decay_ = static_cast<float>(1 - rate * p.rule.weight_decay);
        step_ = static_cast<float>(rate * update_->scale);
    }

    // Stores elements column .. column + 7 of `row`, as far as the matrix has them.
    K2K_DEVICE void operator()(int row, int column, float (&values)[8]) const {
        // newton_schulz: store the result.
        const int count = tensor_.n - column < 8 ? tensor_.n - column : 8;
        if (update_ == nullptr) {
            const int64_t offset = (int64_t(matrix_) * tensor_.m + row) * tensor_.n + column;
            by_type(tensor_.type, [&](auto* type) {
                using Y = std::remove_pointer_t<decltype(type)>;
                store_eight(static_cast<Y*>(tensor_.result) + offset, values, count);
            });
            return;
        }
        // muon_update: update the weights, in their dtype.
        const NsUpdate& u = *update_;
        const float scale =
            u.row_scale != nullptr ? u.row_scale[matrix_ * u.row_scale_stride + row] : 1.0f;
        by_type(u.weight.type, [&](auto* type) {
            using W = std::remove_pointer_t<decltype(type)>;
            W* weights = at<W>(u.weight, row, column);
            float old[8];
            load_eight(old, weights, count);
            K2K_UNROLL
            for (int j = 0; j < 8; ++j) {
                values[j] = scale * fmaf(-step_, values[j], decay_ * old[j]);
            }
            store_eight(weights, values, count);
        });
        // Store the copy, from the float32 values: rounded once.
        if (u.copy.data == nullptr) return;
        by_type(u.copy.type, [&](auto* type) {
            using C = std::remove_pointer_t<decltype(type)>;
            store_eight(at<C>(u.copy, row, column), values, count);
        });
    }

  private:
    template <class Y>
    K2K_DEVICE Y* at(const NsView& view, int row, int column) const {
        return static_cast<Y*>(view.data) + matrix_ * view.batch_stride + row * view.row_stride +
               column;
    }

    const NsTensor& tensor_;
    const NsUpdate* update_ = nullptr;
    int matrix_;
    float decay_ = 0, step_ = 0;
};

}  // namespace k2k
