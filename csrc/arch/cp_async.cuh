#pragma once

// cp.async: 4, 8 or 16 bytes from global to shared memory without passing through registers. Copies
// are committed in groups. Waiting makes a thread's own copies visible to it; the other threads of
// the CTA need a barrier as well.

#include "arch/body.h"

namespace k2k::arch {

// Copies kBytes (4, 8: through L1; 16: past it); writes zeros instead where `valid` is false (the
// source is not read, but must be a multiple of kBytes).
// PTX: #data-movement-and-conversion-instructions-cp-async
template <int kBytes = 16>
K2K_DEVICE void cp_async(uint32_t target, const void* source, bool valid = true K2K_WHERE) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
    K2K_EMULATE(cp_async(target, source, kBytes, valid ? kBytes : 0, where));
#ifndef K2K_EMULATED
    const int source_bytes = valid ? kBytes : 0;
    if constexpr (kBytes == 16) {
        K2K_PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                "r"(source_bytes) : "memory");
    } else {
        K2K_PTX("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(source),
                "n"(kBytes), "r"(source_bytes) : "memory");
    }
#endif
}

// Copies the first `bytes` (0 to 16) of 16 and writes zeros for the rest, which is not read.
// PTX: #data-movement-and-conversion-instructions-cp-async
K2K_DEVICE void cp_async_partial(uint32_t target, const void* source, int bytes K2K_WHERE) {
    K2K_EMULATE(cp_async(target, source, 16, bytes, where));
    K2K_PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
            "r"(bytes) : "memory");
}

// Makes a group of this thread's copies since the last one.
// PTX: #data-movement-and-conversion-instructions-cp-async-commit-group
K2K_DEVICE void cp_async_commit(K2K_WHERE_ONLY) {
    K2K_EMULATE(cp_async_commit(where));
    K2K_PTX("cp.async.commit_group;" :: : "memory");
}

// Waits until at most kPending groups of this thread are in flight.
// PTX: #data-movement-and-conversion-instructions-cp-async-wait-group
template <int kPending>
K2K_DEVICE void cp_async_wait(K2K_WHERE_ONLY) {
    K2K_EMULATE(cp_async_wait(kPending, where));
    K2K_PTX("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace k2k::arch
