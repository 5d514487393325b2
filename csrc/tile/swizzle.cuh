#pragma once

// The swizzle of shared memory, as TMA writes it and wgmma reads it (arch::Swizzle::k128, and k64
// for rows of 64 bytes); kernels with cp.async and ldmatrix lay their rows out in the same way.
//
//     In each 128 bytes of row r, the 16-byte chunk c is at place c ^ (r % 8):
//
//               place 0   1   2   3   4   5   6   7
//         row 0       0   1   2   3   4   5   6   7
//         row 1       1   0   3   2   5   4   7   6
//         row 2       2   3   0   1   6   7   4   5
//         ...
//
//     Rows of 64 bytes: at place c ^ (r / 2 % 4).
//
// So the same chunk of eight rows, which ldmatrix reads at once, covers all 32 banks. Rows are 64
// bytes or a multiple of 128 long; the first begins at a multiple of 1,024.

#include "arch/fence.cuh"
#include "arch/warp.cuh"

namespace k2k::tile {

// The place of chunk `chunk` in row `row`; kPitch: bytes of a row.
template <int kPitch = 128>
K2K_HOST_DEVICE constexpr uint32_t swizzled(uint32_t row, uint32_t chunk) {
    static_assert(kPitch == 64 || kPitch % 128 == 0);
    return chunk ^ (kPitch == 64 ? row / 2 % 4 : row % 8);
}

// Where chunk `chunk` of row `row` begins, in bytes.
template <int kPitch>
K2K_HOST_DEVICE constexpr uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
    return row * kPitch + swizzled<kPitch>(row, chunk) * 16;
}

// This lane's ldmatrix address for 16 x 16 two-byte elements, in rows of kPitch bytes, from `row`
// (a multiple of 8) and `chunk` on: a fragment of A (kLeft), or two of B side by side. kTransposed,
// for ldmatrix.trans: the rows in memory run along K, the summed axis.
template <bool kLeft, bool kTransposed, int kPitch>
K2K_DEVICE uint32_t ldmatrix_address(uint32_t base, int row, int chunk) {
    const int lane = arch::lane_id(), matrix = lane / 8;
    constexpr bool kRowsFirst = kLeft != kTransposed;
    row += (kRowsFirst ? matrix % 2 : matrix / 2) * 8 + lane % 8;
    chunk += kRowsFirst ? matrix / 2 : matrix % 2;
    return base + row * kPitch + swizzled<kPitch>(lane % 8, chunk) * 16;
}

// kRows rows of 64 two-byte elements: a TMA box or a wgmma operand.
template <int kRows>
struct alignas(1024) SwizzledBox {
    uint4 chunks[kRows * 8];
};

// Clears the rows of kBoxes consecutive boxes from `valid` on, before wgmma reads them. All threads
// of a warpgroup call it; they sync at named barrier `id` before and after.
template <int kBoxes, int kRows>
K2K_DEVICE void clear_rows(SwizzledBox<kRows>* boxes, int valid, uint32_t id K2K_WHERE) {
    const int thread = threadIdx.x % 128;
    arch::barrier_sync(id, 128 K2K_PASS_WHERE);
    for (int row = valid + thread / 8; row < kRows; row += 16) {
        K2K_UNROLL
        for (int i = 0; i < kBoxes; ++i) {
            boxes[i].chunks[row * 8 + thread % 8] = make_uint4(0, 0, 0, 0);
        }
    }
    arch::fence_proxy_async(K2K_PASS_WHERE_ONLY);
    arch::barrier_sync(id, 128 K2K_PASS_WHERE);
}

}  // namespace k2k::tile
