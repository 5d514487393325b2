#pragma once

// Sixteen neighbours of a row: what one thread of a memory-bound kernel loads, holds in registers
// and stores. Sixteen one-byte elements are one 16-byte access, the widest there is; sixteen
// two-byte elements are two, which lie side by side, so that whole 32-byte sectors move.

#include "arch/convert.cuh"
#include "arch/ldst.cuh"

namespace k2k::tile {

template <class T>
struct alignas(16) Sixteen {
    static constexpr int kVectors = sizeof(T);  // of 16 bytes
    T values[16];
};

K2K_DEVICE bool on_16_bytes(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Whether row[column .. column + 15] exist and can be moved in vectors.
template <class T>
K2K_DEVICE bool in_vectors(const T* row, int64_t column, int64_t columns) {
    return on_16_bytes(row) && column + 16 <= columns;
}

// row[column .. column + 15], zeros beyond `columns`, one by one.
template <class T>
K2K_DEVICE Sixteen<T> load_elements(const T* row, int64_t column, int64_t columns) {
    Sixteen<T> result;
    K2K_UNROLL
    for (int i = 0; i < 16; ++i) result.values[i] = column + i < columns ? row[column + i] : T{};
    return result;
}

// The same, by 16-byte loads if the row begins on 16 bytes. `kReused`: other blocks read the same,
// so that it is worth room in L1.
template <class T, bool kReused = false>
K2K_DEVICE Sixteen<T> load_sixteen(const T* row, int64_t column, int64_t columns K2K_WHERE) {
    if (!in_vectors(row, column, columns)) return load_elements(row, column, columns);
    Sixteen<T> result;
    const auto* source = reinterpret_cast<const uint4*>(row + column);
    auto* target = reinterpret_cast<uint4*>(result.values);
    K2K_UNROLL
    for (int i = 0; i < Sixteen<T>::kVectors; ++i) {
        target[i] = kReused ? arch::load_nc(source + i K2K_PASS_WHERE)
                            : arch::load_nc_no_allocate(source + i K2K_PASS_WHERE);
    }
    return result;
}

// Stores the elements that lie before `columns`, in the same way.
template <class T>
K2K_DEVICE void store_sixteen(T* row,
                              int64_t column,
                              int64_t columns,
                              const Sixteen<T>& sixteen K2K_WHERE) {
    if (in_vectors(row, column, columns)) {
        auto* target = reinterpret_cast<uint4*>(row + column);
        const auto* source = reinterpret_cast<const uint4*>(sixteen.values);
        K2K_UNROLL
        for (int i = 0; i < Sixteen<T>::kVectors; ++i) {
            arch::store(target + i, source[i] K2K_PASS_WHERE);
        }
    } else {
        K2K_UNROLL
        for (int i = 0; i < 16; ++i) {
            if (column + i < columns) row[column + i] = sixteen.values[i];
        }
    }
}

// ---- as floats

K2K_DEVICE float as_float(float value) { return value; }
K2K_DEVICE float as_float(bf16 value) { return arch::to_float(value); }
K2K_DEVICE float as_float(fp16 value) { return arch::to_float(value); }

template <class T>
K2K_DEVICE void widen(float (&values)[16], const Sixteen<T>& sixteen) {
    K2K_UNROLL
    for (int i = 0; i < 16; ++i) values[i] = as_float(sixteen.values[i]);
}

// A pair in one word: neither half is cut out of it first.
K2K_DEVICE void widen(float (&values)[16], const Sixteen<bf16>& sixteen) {
    const auto* pairs = reinterpret_cast<const uint32_t*>(sixteen.values);
    K2K_UNROLL
    for (int i = 0; i < 8; ++i) {
        values[2 * i] = soft::bits_float(pairs[i] << 16);
        values[2 * i + 1] = soft::bits_float(pairs[i] & 0xffff0000);
    }
}

K2K_DEVICE void widen(float (&values)[16], const Sixteen<fp16>& sixteen) {
    const auto* pairs = reinterpret_cast<const uint32_t*>(sixteen.values);
    K2K_UNROLL
    for (int i = 0; i < 8; ++i) {
        values[2 * i] = arch::to_float(fp16{static_cast<uint16_t>(pairs[i])});
        values[2 * i + 1] = arch::to_float(fp16{static_cast<uint16_t>(pairs[i] >> 16)});
    }
}

K2K_DEVICE void narrow(Sixteen<float>& sixteen, const float (&values)[16]) {
    K2K_UNROLL
    for (int i = 0; i < 16; ++i) sixteen.values[i] = values[i];
}
K2K_DEVICE void narrow(Sixteen<bf16>& sixteen, const float (&values)[16]) {
    auto* pairs = reinterpret_cast<uint32_t*>(sixteen.values);
    K2K_UNROLL
    for (int i = 0; i < 8; ++i) pairs[i] = arch::pack_bf16(values[2 * i], values[2 * i + 1]);
}
K2K_DEVICE void narrow(Sixteen<fp16>& sixteen, const float (&values)[16]) {
    auto* pairs = reinterpret_cast<uint32_t*>(sixteen.values);
    K2K_UNROLL
    for (int i = 0; i < 8; ++i) pairs[i] = arch::pack_fp16(values[2 * i], values[2 * i + 1]);
}

}  // namespace k2k::tile
