#pragma once

// The two bodies of a wrapper: a call into the emulator, or the PTX. A wrapper reads
//
//     K2K_DEVICE void sync_warp(K2K_WHERE_ONLY) {
//         K2K_EMULATE(sync_warp(kFullWarp, where));
//         K2K_PTX("bar.warp.sync 0xffffffff;" ::: "memory");
//     }
//
// K2K_PTX is volatile: the compiler neither moves nor drops it. It may do so with K2K_PTX_PURE,
// whose result depends on its operands alone.

#include "common/macros.h"

#ifdef K2K_EMULATED
#include "emulator/device.h"
#define K2K_EMULATE(call) return ::k2k::emulator::call
#define K2K_PTX(...)
#define K2K_PTX_PURE(...)
#else
#define K2K_EMULATE(call)
#define K2K_PTX(...) asm volatile(__VA_ARGS__)
#define K2K_PTX_PURE(...) asm(__VA_ARGS__)
#endif
