#pragma once

// Which matrix of which tensor a CTA works on, and where it is in memory.

#include "newton_schulz/config.h"
#include "newton_schulz/params.h"

namespace k2k {

// The tensor of tensors begin .. end - 1 that work unit `index` belongs to: the last one with
// `first` <= index. A binary search; neighbouring CTAs read the same few cache lines.
K2K_DEVICE int find_tensor(const NsTensor* tensors, int64_t NsTensor::* first, int begin, int end,
                           int64_t index) {
    while (end - begin > 1) {
        const int middle = (begin + end) / 2;
        if (tensors[middle].*first <= index) {
            begin = middle;
        } else {
            end = middle;
        }
    }
    return begin;
}

K2K_DEVICE bool is_square(NsBuffer buffer) {
    return buffer >= NsBuffer::kGram && buffer < NsBuffer::kResult;
}

// A matrix of the workspace, in the iteration's dtype.
template <class T>
struct NsMatrix {
    T* data;  // null: none
    int rows, columns;
    int64_t pitch;

    K2K_DEVICE NsMatrix(const NsTensor& t, int matrix, NsBuffer buffer) {
        const int s = t.m < t.n ? t.m : t.n;
        rows = is_square(buffer) ? s : t.m;
        columns = is_square(buffer) ? s : t.n;
        pitch = ns_pitch(columns);
        data = nullptr;
        if (buffer < NsBuffer::kResult) {
            data = reinterpret_cast<T*>(t.workspace) + ns_offset(buffer, t.batch, t.m, t.n) +
                   int64_t(matrix) * rows * pitch;
        }
    }
};

// Whether the optimizer skips this step.
K2K_DEVICE bool is_skipped(const NsTables& p) {
    return p.rule.skip != nullptr && *p.rule.skip != 0;
}

}  // namespace k2k
