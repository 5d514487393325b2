#pragma once

// Tensor maps: TMA's description of a tensor. Made on the host, passed to the kernel as a
// `const __grid_constant__ TensorMap` parameter.
// PTX: #tensor-tensormap

#include <initializer_list>

#include "common/dtypes.h"

namespace k2k::arch {

// CUtensorMap, without its header.
struct alignas(128) TensorMap {
    uint64_t opaque[16];
};

// The permutation of the 16-byte chunks of a tile in shared memory by which reading a column of
// chunks touches all banks: chunk ^= (address / 128) % (bytes / 16), within rows of `bytes`.
enum class Swizzle : uint16_t { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

// A tensor of 1 to 5 dimensions, innermost first, which is contiguous; the strides in bytes are
// those of the others. `box` is the tile that one copy moves. Throws std::invalid_argument where
// TMA's rules do not hold: base and strides multiples of 16, no stride 0, box up to 256, inner box
// a multiple of 16 bytes and no wider than the swizzle. The driver's function is looked up through
// the runtime; libcuda is not linked. Each host thread caches the maps it made last.
TensorMap make_tensor_map(Type type, const void* base, std::initializer_list<uint64_t> sizes,
                          std::initializer_list<uint64_t> stride_bytes,
                          std::initializer_list<uint32_t> box, Swizzle swizzle);

}  // namespace k2k::arch
