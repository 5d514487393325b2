#pragma once

// Tiles, and the places of things in the workspace.

#include "common/math.h"
#include "newton_schulz/params.h"

namespace k2k {

// ---- products
//
// 128 x 128 x 32 by eight warps of 64 x 32: 64 sums a thread and 8 + 16 words of operands leave
// room for two blocks a multiprocessor (128 registers), so that one block's epilogue hides behind
// the other's products. A stage is 16 KB and takes the tensor cores of an A100 about 512 cycles;
// with three of them two are in flight, and two blocks fit the 100 KB of sm_86 and sm_89 too.
// Wider tiles would waste more at the diagonal: of 2048 columns 0.53 of the square is computed by
// tiles of 128, 0.56 by tiles of 256.
constexpr int kNsTile = 128, kNsDepth = 32, kNsStages = 3;
constexpr int kNsThreads = 256;
constexpr int kNsPanelBytes = kNsTile * kNsDepth * 2;
constexpr int kNsTileBytes = kNsTile * kNsTile * 2;
static_assert(kNsTileBytes <= kNsStages * 2 * kNsPanelBytes,
              "the epilogue's tile lies in the ring");
static_assert(2 * (kNsStages * 2 * kNsPanelBytes + 1024) <= 100 * 1024);

constexpr int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

constexpr int64_t short_side(int64_t m, int64_t n) { return m < n ? m : n; }

constexpr int64_t triangle_tiles(int64_t m, int64_t n) {
    return triangle(ceil_div(short_side(m, n), kNsTile));
}
constexpr int64_t full_tiles(int64_t m, int64_t n) {
    return ceil_div(m, kNsTile) * ceil_div(n, kNsTile);
}

// ---- the norm: a warp takes 512 neighbours of a row, a block 64 such segments

constexpr int kNsSegment = 512, kNsSegmentsPerChunk = 64;

constexpr int64_t norm_chunks(int64_t m, int64_t n) {
    return ceil_div(m * ceil_div(n, kNsSegment), kNsSegmentsPerChunk);
}

// ---- workspace: the table, the sums of the chunks, then each tensor's buffers

// Rows begin at multiples of 16 bytes; what lies behind their ends is zero.
K2K_HOST_DEVICE constexpr int64_t ns_pitch(int64_t columns) { return ceil_div(columns, 8) * 8; }

// Elements of the buffers that lie before `buffer`, for all matrices of a tensor.
K2K_HOST_DEVICE constexpr int64_t ns_offset(NsBuffer buffer, int64_t batch, int64_t m, int64_t n) {
    const int64_t s = m < n ? m : n;
    const int index = static_cast<int>(buffer);
    const int wide = index < 2 ? index : 2;
    return batch * (wide * m * ns_pitch(n) + (index - wide) * s * ns_pitch(s));
}

constexpr int64_t ns_buffer_bytes(int64_t batch, int64_t m, int64_t n, bool gram) {
    return 2 * ns_offset(gram ? NsBuffer::kResult : NsBuffer::kProduct, batch, m, n);
}

constexpr int64_t kNsTensorBytes = sizeof(NsTensor) + 16;  // and the sums, rounded up

// Of one matrix; each tensor takes kNsTensorBytes besides.
constexpr int64_t ns_matrix_bytes(int64_t m, int64_t n, bool gram) {
    return ns_buffer_bytes(1, m, n, gram) + norm_chunks(m, n) * int64_t(sizeof(double));
}

}  // namespace k2k
