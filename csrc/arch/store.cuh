#pragma once

// A vector store that stays one. Of a plain `*pointer = value` the compiler may make four stores,
// where another branch stores the elements one by one to the same place.

#include "arch/body.h"

namespace k2k::arch {

// Stores 16 bytes at a multiple of 16.
// PTX: #data-movement-and-conversion-instructions-st
K2K_DEVICE void store(uint4* target, uint4 value K2K_WHERE) {
    K2K_EMULATE(store(target, &value, sizeof value, where));
    K2K_PTX("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(value.x), "r"(value.y),
            "r"(value.z), "r"(value.w) : "memory");
}

}  // namespace k2k::arch
