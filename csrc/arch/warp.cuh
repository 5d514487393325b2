#pragma once

// Warps and CTA barriers: indices, votes, shuffles, reductions, synchronisation.

#include "arch/body.h"

namespace k2k::arch {

constexpr uint32_t kFullWarp = 0xffffffffu;

// The lane, 0 to 31 (CTAs are one-dimensional).
K2K_DEVICE uint32_t lane_id() { return threadIdx.x % 32; }

// The warp's index in its CTA.
K2K_DEVICE uint32_t warp_id() { return threadIdx.x / 32; }

// Waits for the lanes of `mask` and makes their writes visible to each other.
// PTX: #parallel-synchronization-and-communication-instructions-bar-warp-sync
K2K_DEVICE void sync_warp(uint32_t mask = kFullWarp K2K_WHERE) {
    K2K_EMULATE(sync_warp(mask, where));
    K2K_PTX("bar.warp.sync %0;" ::"r"(mask) : "memory");
}

// Waits for all threads of the CTA, which must all call it from the same source line.
// PTX: #parallel-synchronization-and-communication-instructions-bar
K2K_DEVICE void sync_block(K2K_WHERE_ONLY) {
    K2K_EMULATE(sync_block(where));
    K2K_PTX("barrier.cta.sync.aligned 0;" :: : "memory");
}

// Waits at named barrier `id` (1 to 15) until `num_threads` threads have arrived or waited there.
// PTX: #parallel-synchronization-and-communication-instructions-bar
K2K_DEVICE void barrier_sync(uint32_t id, uint32_t num_threads K2K_WHERE) {
    K2K_EMULATE(barrier_sync(id, num_threads, where));
    K2K_PTX("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Arrives at named barrier `id` without waiting.
// PTX: #parallel-synchronization-and-communication-instructions-bar
K2K_DEVICE void barrier_arrive(uint32_t id, uint32_t num_threads K2K_WHERE) {
    K2K_EMULATE(barrier_arrive(id, num_threads, where));
    K2K_PTX("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// A full warp's ballot: bit l is lane l's predicate.
// PTX: #parallel-synchronization-and-communication-instructions-vote-sync
K2K_DEVICE uint32_t ballot(bool predicate K2K_WHERE) {
    K2K_EMULATE(ballot(predicate, where));
#ifndef K2K_EMULATED
    return __ballot_sync(kFullWarp, predicate);
#endif
}

// Whether any lane's predicate holds.
// PTX: #parallel-synchronization-and-communication-instructions-vote-sync
K2K_DEVICE bool any(bool predicate K2K_WHERE) { return ballot(predicate K2K_PASS_WHERE) != 0; }

// Whether every lane's predicate holds.
// PTX: #parallel-synchronization-and-communication-instructions-vote-sync
K2K_DEVICE bool all(bool predicate K2K_WHERE) {
    return ballot(predicate K2K_PASS_WHERE) == kFullWarp;
}

// The lanes of a full warp whose value equals this lane's, itself included.
// PTX: #parallel-synchronization-and-communication-instructions-match-sync
K2K_DEVICE uint32_t match_any(uint32_t value K2K_WHERE) {
    K2K_EMULATE(match_any(value, where));
#ifndef K2K_EMULATED
    return __match_any_sync(kFullWarp, value);
#endif
}

// True in one lane of a converged warp, for instructions that one thread issues, such as TMA
// copies. sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-elect-sync
K2K_DEVICE bool elect_one(K2K_WHERE_ONLY) {
    K2K_EMULATE(elect_one(where));
    uint32_t elected = 0;
    K2K_PTX("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(
        elected)::"memory");
    return elected != 0;
}

#ifdef K2K_EMULATED
namespace detail {
template <class T>
T shuffle(emulator::Shuffle kind, T value, uint32_t lane, Where where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = emulator::shuffle(kind, bits, lane, where);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
}  // namespace detail
#endif

// The value of lane `lane`. Shuffles take 4- and 8-byte arithmetic types and a whole warp.
// PTX: #data-movement-and-conversion-instructions-shfl-sync
template <class T>
K2K_DEVICE T shuffle(T value, uint32_t lane K2K_WHERE) {
#ifdef K2K_EMULATED
    return detail::shuffle(emulator::Shuffle::kIndex, value, lane, where);
#else
    return __shfl_sync(kFullWarp, value, lane);
#endif
}

// The value of lane (own lane ^ mask).
// PTX: #data-movement-and-conversion-instructions-shfl-sync
template <class T>
K2K_DEVICE T shuffle_xor(T value, uint32_t mask K2K_WHERE) {
#ifdef K2K_EMULATED
    return detail::shuffle(emulator::Shuffle::kXor, value, mask, where);
#else
    return __shfl_xor_sync(kFullWarp, value, mask);
#endif
}

// The value of lane (own lane - delta); own value if there is none.
// PTX: #data-movement-and-conversion-instructions-shfl-sync
template <class T>
K2K_DEVICE T shuffle_up(T value, uint32_t delta K2K_WHERE) {
#ifdef K2K_EMULATED
    return detail::shuffle(emulator::Shuffle::kUp, value, delta, where);
#else
    return __shfl_up_sync(kFullWarp, value, delta);
#endif
}

// The value of lane (own lane + delta); own value if there is none.
// PTX: #data-movement-and-conversion-instructions-shfl-sync
template <class T>
K2K_DEVICE T shuffle_down(T value, uint32_t delta K2K_WHERE) {
#ifdef K2K_EMULATED
    return detail::shuffle(emulator::Shuffle::kDown, value, delta, where);
#else
    return __shfl_down_sync(kFullWarp, value, delta);
#endif
}

// Sum, minimum and maximum of an integer over the warp, in every lane.
// PTX: #parallel-synchronization-and-communication-instructions-redux-sync
#ifdef K2K_EMULATED
#define K2K_REDUX(kind, T, type) return static_cast<T>(emulator::redux(kind, value, where))
#else
#define K2K_REDUX(kind, T, type)                                                             \
    T result;                                                                                \
    K2K_PTX("redux.sync." kind "." type " %0, %1, 0xffffffff;" : "=r"(result) : "r"(value)); \
    return result
#endif
K2K_DEVICE uint32_t redux_add(uint32_t value K2K_WHERE) { K2K_REDUX("add", uint32_t, "u32"); }
K2K_DEVICE uint32_t redux_min(uint32_t value K2K_WHERE) { K2K_REDUX("min", uint32_t, "u32"); }
K2K_DEVICE uint32_t redux_max(uint32_t value K2K_WHERE) { K2K_REDUX("max", uint32_t, "u32"); }
K2K_DEVICE int32_t redux_add(int32_t value K2K_WHERE) { K2K_REDUX("add", int32_t, "s32"); }
K2K_DEVICE int32_t redux_min(int32_t value K2K_WHERE) { K2K_REDUX("min", int32_t, "s32"); }
K2K_DEVICE int32_t redux_max(int32_t value K2K_WHERE) { K2K_REDUX("max", int32_t, "s32"); }
#undef K2K_REDUX

}  // namespace k2k::arch
