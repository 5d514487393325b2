#pragma once

// Loads, stores and atomics with cache hints, vector width or memory order. Scopes: kGpu for
// threads of this GPU, kSystem for threads of all GPUs and the host.

#include <type_traits>

#include "arch/body.h"

namespace k2k::arch {

enum class Scope { kGpu, kSystem };

// A value of 4, 8 or 16 bytes that no thread writes during the kernel: through the read-only path.
// PTX: #data-movement-and-conversion-instructions-ld-global-nc
template <class T>
K2K_DEVICE T load_nc(const T* source K2K_WHERE);

// The same for data read once: not allocated in L1.
// PTX: #data-movement-and-conversion-instructions-ld-global-nc
template <class T>
K2K_DEVICE T load_nc_no_allocate(const T* source K2K_WHERE);

// Stores 4, 8 or 16 bytes that are not read again soon.
// PTX: #cache-operators
template <class T>
K2K_DEVICE void store_streaming(T* target, T value K2K_WHERE);

// Stores 16 bytes, aligned to 16, as one instruction. The compiler may split a plain
// `*pointer = value` into four stores if another branch stores the same elements one by one.
// PTX: #data-movement-and-conversion-instructions-st
K2K_DEVICE void store(uint4* target, uint4 value K2K_WHERE) {
    K2K_EMULATE(store(target, &value, sizeof value, where));
    K2K_PTX("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(value.x), "r"(value.y),
            "r"(value.z), "r"(value.w) : "memory");
}

#ifdef K2K_EMULATED
namespace detail {
template <class T>
T load(const T* source, Where where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    T value;
    emulator::load(&value, source, sizeof(T), where);
    return value;
}
}  // namespace detail

template <class T>
T load_nc(const T* source, Where where) {
    return detail::load(source, where);
}
template <class T>
T load_nc_no_allocate(const T* source, Where where) {
    return detail::load(source, where);
}
template <class T>
void store_streaming(T* target, T value, Where where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    emulator::store(target, &value, sizeof(T), where);
}

#else

// Register names of a value of 1, 2 or 4 words, in one place for all three instructions.
#define K2K_LOAD_BODY(instruction)                                                   \
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);              \
    union {                                                                          \
        uint32_t words[sizeof(T) / 4];                                               \
        T value;                                                                     \
    } u;                                                                             \
    if constexpr (sizeof(T) == 4) {                                                  \
        K2K_PTX(instruction ".b32 %0, [%1];" : "=r"(u.words[0]) : "l"(source));      \
    } else if constexpr (sizeof(T) == 8) {                                           \
        K2K_PTX(instruction ".v2.b32 {%0, %1}, [%2];" : "=r"(u.words[0]),            \
                "=r"(u.words[1]) : "l"(source));                                     \
    } else {                                                                         \
        K2K_PTX(instruction ".v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(u.words[0]),    \
                "=r"(u.words[1]), "=r"(u.words[2]), "=r"(u.words[3]) : "l"(source)); \
    }                                                                                \
    return u.value

template <class T>
K2K_DEVICE T load_nc(const T* source) {
    K2K_LOAD_BODY("ld.global.nc");
}
template <class T>
K2K_DEVICE T load_nc_no_allocate(const T* source) {
    K2K_LOAD_BODY("ld.global.nc.L1::no_allocate");
}
#undef K2K_LOAD_BODY

template <class T>
K2K_DEVICE void store_streaming(T* target, T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    const auto* words = reinterpret_cast<const uint32_t*>(&value);
    if constexpr (sizeof(T) == 4) {
        K2K_PTX("st.global.cs.b32 [%0], %1;" ::"l"(target), "r"(words[0]) : "memory");
    } else if constexpr (sizeof(T) == 8) {
        K2K_PTX("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(target), "r"(words[0]),
                "r"(words[1]) : "memory");
    } else {
        K2K_PTX("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(words[0]),
                "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
    }
}
#endif

// ---- flags and counters, 4 or 8 bytes, with release and acquire order

// Runs `gpu` or `system`, according to kScope.
#define K2K_BY_SCOPE(gpu, system)          \
    if constexpr (kScope == Scope::kGpu) { \
        gpu;                               \
    } else {                               \
        system;                            \
    }

// Reads a flag with acquire order: accesses before the matching release are visible afterwards. For
// polling loops.
// PTX: #data-movement-and-conversion-instructions-ld
template <Scope kScope, class T>
K2K_DEVICE T load_acquire(const T* source K2K_WHERE) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#ifdef K2K_EMULATED
    emulator::before_atomic(source, sizeof(T), emulator::Order::kAcquire, /*poll=*/true, where);
    const T value = *const_cast<const volatile T*>(source);
    emulator::after_atomic(source, emulator::Order::kAcquire);
    return value;
#else
    T value;
    if constexpr (sizeof(T) == 4) {
        auto& bits = reinterpret_cast<uint32_t&>(value);
        K2K_BY_SCOPE(K2K_PTX("ld.acquire.gpu.b32 %0, [%1];" : "=r"(bits) : "l"(source) : "memory"),
                     K2K_PTX("ld.acquire.sys.b32 %0, [%1];" : "=r"(bits) : "l"(source) : "memory"))
    } else {
        auto& bits = reinterpret_cast<uint64_t&>(value);
        K2K_BY_SCOPE(K2K_PTX("ld.acquire.gpu.b64 %0, [%1];" : "=l"(bits) : "l"(source) : "memory"),
                     K2K_PTX("ld.acquire.sys.b64 %0, [%1];" : "=l"(bits) : "l"(source) : "memory"))
    }
    return value;
#endif
}

// Writes a flag with release order: after all earlier accesses of this thread, and of threads it
// has synchronised with through a barrier.
// PTX: #data-movement-and-conversion-instructions-st
template <Scope kScope, class T>
K2K_DEVICE void store_release(T* target, T value K2K_WHERE) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#ifdef K2K_EMULATED
    emulator::atomic(target, sizeof(T), emulator::Order::kRelease, where, [&] {
        *const_cast<volatile T*>(target) = value;
        return 0;
    });
#else
    if constexpr (sizeof(T) == 4) {
        const auto bits = reinterpret_cast<const uint32_t&>(value);
        K2K_BY_SCOPE(K2K_PTX("st.release.gpu.b32 [%0], %1;" ::"l"(target), "r"(bits) : "memory"),
                     K2K_PTX("st.release.sys.b32 [%0], %1;" ::"l"(target), "r"(bits) : "memory"))
    } else {
        const auto bits = reinterpret_cast<const uint64_t&>(value);
        K2K_BY_SCOPE(K2K_PTX("st.release.gpu.b64 [%0], %1;" ::"l"(target), "l"(bits) : "memory"),
                     K2K_PTX("st.release.sys.b64 [%0], %1;" ::"l"(target), "l"(bits) : "memory"))
    }
#endif
}

// Adds and returns the old value; relaxed. T: int, unsigned, unsigned long long or float.
// PTX: #parallel-synchronization-and-communication-instructions-atom
template <Scope kScope, class T>
K2K_DEVICE T atomic_add(T* target, T value K2K_WHERE) {
#ifdef K2K_EMULATED
    return emulator::atomic(target, sizeof(T), emulator::Order::kRelaxed, where, [&] {
        const T old = *target;
        *target = old + value;
        return old;
    });
#else
    K2K_BY_SCOPE(return atomicAdd(target, value), return atomicAdd_system(target, value))
#endif
}

// Adds 32 bits and returns the old value; acquire-release.
// PTX: #parallel-synchronization-and-communication-instructions-atom
template <Scope kScope>
K2K_DEVICE uint32_t atomic_add_acq_rel(uint32_t* target, uint32_t value K2K_WHERE) {
#ifdef K2K_EMULATED
    return emulator::atomic(target, 4, emulator::Order::kAcqRel, where, [&] {
        const uint32_t old = *target;
        *target = old + value;
        return old;
    });
#else
    uint32_t old;
    K2K_BY_SCOPE(K2K_PTX("atom.add.acq_rel.gpu.u32 %0, [%1], %2;" : "=r"(old) : "l"(target),
                         "r"(value) : "memory"),
                 K2K_PTX("atom.add.acq_rel.sys.u32 %0, [%1], %2;" : "=r"(old) : "l"(target),
                         "r"(value) : "memory"))
    return old;
#endif
}

// Compare and swap: writes `value` if the old value is `expected`; returns the old value;
// acquire-release.
// PTX: #parallel-synchronization-and-communication-instructions-atom
template <Scope kScope>
K2K_DEVICE uint32_t atomic_cas(uint32_t* target, uint32_t expected, uint32_t value K2K_WHERE) {
#ifdef K2K_EMULATED
    return emulator::atomic(target, 4, emulator::Order::kAcqRel, where, [&] {
        const uint32_t old = *target;
        if (old == expected) *target = value;
        return old;
    });
#else
    uint32_t old;
    K2K_BY_SCOPE(K2K_PTX("atom.cas.acq_rel.gpu.b32 %0, [%1], %2, %3;" : "=r"(old) : "l"(target),
                         "r"(expected), "r"(value) : "memory"),
                 K2K_PTX("atom.cas.acq_rel.sys.b32 %0, [%1], %2, %3;" : "=r"(old) : "l"(target),
                         "r"(expected), "r"(value) : "memory"))
    return old;
#endif
}

// Maximum with `value`, compared as bits, which orders non-negative floats too; relaxed.
// PTX: #parallel-synchronization-and-communication-instructions-atom
template <class T>
K2K_DEVICE T atomic_max(T* target, T value K2K_WHERE) {
#ifdef K2K_EMULATED
    return emulator::atomic(target, sizeof(T), emulator::Order::kRelaxed, where, [&] {
        const T old = *target;
        if (value > old) *target = value;
        return old;
    });
#else
    return atomicMax(target, value);
#endif
}

// Adds without returning a value; relaxed. T as in atomic_add.
// PTX: #parallel-synchronization-and-communication-instructions-red
template <Scope kScope, class T>
K2K_DEVICE void reduce_add(T* target, T value K2K_WHERE) {
    atomic_add<kScope>(target, value K2K_PASS_WHERE);  // the compiler makes RED of an unused ATOM
}

// Adds 32 bits without returning a value; release.
// PTX: #parallel-synchronization-and-communication-instructions-red
template <Scope kScope>
K2K_DEVICE void reduce_add_release(uint32_t* target, uint32_t value K2K_WHERE) {
#ifdef K2K_EMULATED
    emulator::atomic(target, 4, emulator::Order::kRelease, where, [&] { return *target += value; });
#else
    K2K_BY_SCOPE(
        K2K_PTX("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(target), "r"(value) : "memory"),
        K2K_PTX("red.release.sys.global.add.u32 [%0], %1;" ::"l"(target), "r"(value) : "memory"))
#endif
}

// Adds four floats at a multiple of 16 bytes. sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-red
K2K_DEVICE void reduce_add_vector(float4* target, float4 value K2K_WHERE) {
#ifdef K2K_EMULATED
    emulator::enter_sm90("reduce_add_vector", where);
    emulator::atomic(target, 16, emulator::Order::kRelaxed, where, [&] {
        target->x += value.x;
        target->y += value.y;
        target->z += value.z;
        target->w += value.w;
        return 0;
    });
#else
    K2K_PTX("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(value.x),
            "f"(value.y), "f"(value.z), "f"(value.w) : "memory");
#endif
}

#undef K2K_BY_SCOPE

}  // namespace k2k::arch
