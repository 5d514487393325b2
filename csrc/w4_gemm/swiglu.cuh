#pragma once

// SwiGLU of sums, with the bits of the unfused op: gate and up are rounded to bf16 before.

#include "arch/convert.cuh"
#include "tile/silu.cuh"

namespace k2k {

// silu(gate) * up of two neighbours, from the sums of both.
K2K_DEVICE uint32_t swiglu_pair(const float* gate, const float* up) {
    float hidden[2];
    K2K_UNROLL
    for (int e = 0; e < 2; ++e) {
        const float rounded = arch::to_float(arch::to_bf16(gate[e]));
        hidden[e] = tile::silu(rounded) * arch::to_float(arch::to_bf16(up[e]));
    }
    return arch::pack_bf16(hidden[0], hidden[1]);
}

}  // namespace k2k
