#pragma once

// Sixteen neighbours of a row: what one thread of a memory-bound kernel loads, holds in registers
// and stores. Sixteen one-byte elements are one 16-byte access, the widest there is; sixteen
// two-byte elements are two neighbouring ones: whole 32-byte sectors.
//
// They are held as the words of those accesses, also when they were loaded one by one (rows that do
// not begin on 16 bytes). If that path had separate elements, the compiler would split the words of
// the other path into elements too, right behind each load: it would wait for every load at once,
// with only one in flight.

#include "arch/convert.cuh"
#include "arch/ldst.cuh"

namespace k2k::tile {

template <class T>
struct alignas(16) Sixteen {
    static constexpr int kVectors = sizeof(T);  // of 16 bytes
    uint32_t words[4 * kVectors];
};

K2K_DEVICE bool on_16_bytes(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Whether row[column .. column + 15] exist and can be moved in vectors.
template <class T>
K2K_DEVICE bool in_vectors(const T* row, int64_t column, int64_t columns) {
    return on_16_bytes(row) && column + 16 <= columns;
}

// ---- vectors and elements

template <class T>
K2K_DEVICE uint4 vector_of(const Sixteen<T>& sixteen, int i) {
    const uint32_t* words = sixteen.words + 4 * i;
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class T>
K2K_DEVICE void set_vector(Sixteen<T>& sixteen, int i, uint4 vector) {
    uint32_t* words = sixteen.words + 4 * i;
    words[0] = vector.x;
    words[1] = vector.y;
    words[2] = vector.z;
    words[3] = vector.w;
}

K2K_DEVICE Sixteen<uint8_t> sixteen_of(uint4 vector) {
    Sixteen<uint8_t> result;
    set_vector(result, 0, vector);
    return result;
}

K2K_DEVICE uint32_t bits_of(float value) { return soft::float_bits(value); }
K2K_DEVICE uint32_t bits_of(bf16 value) { return value.bits; }
K2K_DEVICE uint32_t bits_of(fp16 value) { return value.bits; }
K2K_DEVICE uint32_t bits_of(uint8_t value) { return value; }

K2K_DEVICE void set_bits(float& value, uint32_t bits) { value = soft::bits_float(bits); }
K2K_DEVICE void set_bits(bf16& value, uint32_t bits) { value.bits = uint16_t(bits); }
K2K_DEVICE void set_bits(fp16& value, uint32_t bits) { value.bits = uint16_t(bits); }
K2K_DEVICE void set_bits(uint8_t& value, uint32_t bits) { value = uint8_t(bits); }

template <class T>
K2K_DEVICE T element_of(const Sixteen<T>& sixteen, int i) {
    constexpr int kEach = 4 / sizeof(T);  // of a word
    T value;
    set_bits(value, sixteen.words[i / kEach] >> i % kEach * 8 * sizeof(T));
    return value;
}

// ---- loads and stores

// row[column .. column + 15], zeros beyond `columns`, one by one.
template <class T>
K2K_DEVICE Sixteen<T> load_elements(const T* row, int64_t column, int64_t columns) {
    constexpr int kEach = 4 / sizeof(T);
    Sixteen<T> result;
    K2K_UNROLL
    for (int w = 0; w < 16 / kEach; ++w) {
        result.words[w] = 0;
        K2K_UNROLL
        for (int i = 0; i < kEach; ++i) {
            const int64_t at = column + w * kEach + i;
            if (at < columns) result.words[w] |= bits_of(row[at]) << i * 8 * sizeof(T);
        }
    }
    return result;
}

// Sixteen elements inside the row, the first of them on 16 bytes. `kReused`: other CTAs read the
// same, so they are allocated in L1.
template <class T, bool kReused = false>
K2K_DEVICE Sixteen<T> load_vectors(const T* first K2K_WHERE) {
    Sixteen<T> result;
    const auto* source = reinterpret_cast<const uint4*>(first);
    K2K_UNROLL
    for (int i = 0; i < Sixteen<T>::kVectors; ++i) {
        set_vector(result, i,
                   kReused ? arch::load_nc(source + i K2K_PASS_WHERE)
                           : arch::load_nc_no_allocate(source + i K2K_PASS_WHERE));
    }
    return result;
}

// row[column .. column + 15], zeros beyond `columns`; by 16-byte loads if the row begins on 16
// bytes.
template <class T, bool kReused = false>
K2K_DEVICE Sixteen<T> load_sixteen(const T* row, int64_t column, int64_t columns K2K_WHERE) {
    return in_vectors(row, column, columns) ? load_vectors<T, kReused>(row + column K2K_PASS_WHERE)
                                            : load_elements(row, column, columns);
}

// Stores the elements that lie before `columns`, in the same way.
template <class T>
K2K_DEVICE void store_sixteen(T* row, int64_t column, int64_t columns,
                              const Sixteen<T>& sixteen K2K_WHERE) {
    if (in_vectors(row, column, columns)) {
        auto* target = reinterpret_cast<uint4*>(row + column);
        K2K_UNROLL
        for (int i = 0; i < Sixteen<T>::kVectors; ++i) {
            arch::store(target + i, vector_of(sixteen, i) K2K_PASS_WHERE);
        }
    } else {
        K2K_UNROLL
        for (int i = 0; i < 16; ++i) {
            if (column + i < columns) row[column + i] = element_of(sixteen, i);
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
    for (int i = 0; i < 16; ++i) values[i] = as_float(element_of(sixteen, i));
}

// A pair of one word is converted in place, without extracting its halves first.
K2K_DEVICE void widen(float (&values)[16], const Sixteen<bf16>& sixteen) {
    const uint32_t* pairs = sixteen.words;
    K2K_UNROLL
    for (int i = 0; i < 8; ++i) {
        values[2 * i] = soft::bits_float(pairs[i] << 16);
        values[2 * i + 1] = soft::bits_float(pairs[i] & 0xffff0000);
    }
}

K2K_DEVICE void widen(float (&values)[16], const Sixteen<fp16>& sixteen) {
    const uint32_t* pairs = sixteen.words;
    K2K_UNROLL
    for (int i = 0; i < 8; ++i) {
        values[2 * i] = arch::to_float(fp16{static_cast<uint16_t>(pairs[i])});
        values[2 * i + 1] = arch::to_float(fp16{static_cast<uint16_t>(pairs[i] >> 16)});
    }
}

K2K_DEVICE void narrow(Sixteen<float>& sixteen, const float (&values)[16]) {
    K2K_UNROLL
    for (int i = 0; i < 16; ++i) sixteen.words[i] = soft::float_bits(values[i]);
}
K2K_DEVICE void narrow(Sixteen<bf16>& sixteen, const float (&values)[16]) {
    K2K_UNROLL
    for (int i = 0; i < 8; ++i) {
        sixteen.words[i] = arch::pack_bf16(values[2 * i], values[2 * i + 1]);
    }
}
K2K_DEVICE void narrow(Sixteen<fp16>& sixteen, const float (&values)[16]) {
    K2K_UNROLL
    for (int i = 0; i < 8; ++i) {
        sixteen.words[i] = arch::pack_fp16(values[2 * i], values[2 * i + 1]);
    }
}

}  // namespace k2k::tile
