#pragma once

// Shared memory. A kernel's shared memory is one struct, sized and laid out by the compiler:
//
//     struct alignas(1024) Storage { bf16 a[kStages][128 * 64]; Mbarrier full[kStages]; };
//     Storage& smem = arch::shared_storage<Storage>();
//
// launched as launch<kernel, sizeof(Storage)>(shape, ...).

#include "arch/body.h"

namespace k2k::arch {

// The CTA's dynamic shared memory, as the kernel's storage struct.
// PTX: #state-spaces-shared
template <class Storage>
K2K_DEVICE Storage& shared_storage(K2K_WHERE_ONLY) {
    static_assert(alignof(Storage) <= 1024, "shared memory starts at a multiple of 1024 bytes");
#ifdef K2K_EMULATED
    return *static_cast<Storage*>(emulator::shared_storage(sizeof(Storage), where));
#else
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    return *reinterpret_cast<Storage*>(dynamic_shared_memory);
#endif
}

// The 32-bit shared-space address of a pointer into this CTA's shared memory.
// PTX: #data-movement-and-conversion-instructions-cvta
K2K_DEVICE uint32_t smem_address(const void* pointer K2K_WHERE) {
    K2K_EMULATE(smem_address(pointer, where));
#ifndef K2K_EMULATED
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

}  // namespace k2k::arch
