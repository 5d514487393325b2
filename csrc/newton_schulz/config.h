#pragma once

// Tiles, and the layout of the workspace.

#include "common/math.h"
#include "newton_schulz/params.h"

namespace k2k {

// ---- products
//
// 128 x 128 x 32 by eight warps of 64 x 32: 64 sums a thread and 8 + 16 words of operands leave
// room for two CTAs per SM (128 registers), so that one's epilogue overlaps the other's main loop.
// A stage is 16 KB; on an A100 it takes about 512 cycles of the tensor cores, 512 of shared memory
// and 470 of L2 (estimates). With three of them two are in flight, and two CTAs fit the 100 KB of
// sm_86 and sm_89 too. Wider tiles compute more at the diagonal: of 2048
// columns 0.53 of the square by tiles of 128, 0.56 by tiles of 256.
constexpr int kNsTile = 128, kNsDepth = 32, kNsStages = 3;
constexpr int kNsThreads = 256;
constexpr int kNsPanelBytes = kNsTile * kNsDepth * 2;
constexpr int kNsTileBytes = kNsTile * kNsTile * 2;
static_assert(kNsTileBytes <= kNsStages * 2 * kNsPanelBytes,
              "the epilogue's tile replaces the ring");
static_assert(2 * (kNsStages * 2 * kNsPanelBytes + 1024) <= 100 * 1024);

// On sm_90 the same tiles by two consumer warpgroups, and two producer warps that copy 64 of the
// summed axis at a time: 32 KB from L2 for 512 cycles of products, which L2 bounds at 0.55 to 0.62
// of the peak (an estimate, see README.md).
constexpr int kNsHopperDepth = 64, kNsHopperStages = 3;
constexpr int kNsHopperThreads = kNsThreads + 64;
constexpr int kNsHopperPanelBytes = kNsTile * kNsHopperDepth * 2;

// Whether products by tiles use wgmma. It depends on the chip alone: tensor cores may round the two
// kernels' sums differently, and a result must not depend on the list that its matrix is in.
constexpr bool ns_by_wgmma(int capability) { return capability == 90; }

constexpr int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

constexpr int64_t short_side(int64_t m, int64_t n) { return m < n ? m : n; }

constexpr int64_t triangle_tiles(int64_t m, int64_t n) {
    return triangle(ceil_div(short_side(m, n), kNsTile));
}
constexpr int64_t full_tiles(int64_t m, int64_t n) {
    return ceil_div(m, kNsTile) * ceil_div(n, kNsTile);
}

// ---- small matrices: the whole iteration in the shared memory of one CTA
//
// A side of up to 64, 128 or 192, in blocks of 64 x 64, with a warpgroup for each 64: that makes a
// warp for each 64 x 32 of a panel of 128 of the long side, and of the triangle. R, Z and Q are
// kept as triangles of blocks, and two panels reuse the memory of R and Z: 40, 88 or 144 KB, the
// last too much for the 99 KB of sm_86 and sm_89. A larger side would not fit: three triangles of
// 256 are 240 KB. Estimates, not measured: such a matrix has at most one SM, but no launch
// latencies and no squares to store and load; at 60 % of an SM's peak an H100 takes 98 us for
// 192 x 1536, and 17 launches of 4 us take 68 us.
constexpr int kNsSmallBlock = 64, kNsSmallPanel = 128, kNsSmallMost = 3;

constexpr int ns_small_threads(int blocks) { return blocks * 128; }
constexpr int ns_small_square_bytes(int blocks) {
    return blocks * (blocks + 1) / 2 * kNsSmallBlock * kNsSmallBlock * 2;
}
constexpr int ns_small_panel_bytes(int blocks) {
    return blocks * kNsSmallBlock * kNsSmallPanel * 2;
}
constexpr int ns_small_bytes(int blocks) {
    const int squares = 2 * ns_small_square_bytes(blocks),
              panels = 2 * ns_small_panel_bytes(blocks);
    return ns_small_square_bytes(blocks) + (squares > panels ? squares : panels);
}

// The number of blocks of 64 of such a matrix's short side; 0: it is computed by tiles.
constexpr int ns_small_blocks(int64_t m, int64_t n, int64_t shared_memory) {
    const int64_t blocks = ceil_div(short_side(m, n), kNsSmallBlock);
    if (blocks > kNsSmallMost || ns_small_bytes(static_cast<int>(blocks)) > shared_memory) return 0;
    return static_cast<int>(blocks);
}

// ---- the norm: a warp takes 512 neighbours of a row, a CTA 64 such segments

constexpr int kNsSegment = 512, kNsSegmentsPerChunk = 64;

constexpr int64_t norm_chunks(int64_t m, int64_t n) {
    return ceil_div(m * ceil_div(n, kNsSegment), kNsSegmentsPerChunk);
}

// ---- workspace: the table, the sums of the chunks, then each tensor's buffers

// Rows begin at multiples of 16 bytes; the padding behind their ends is zero.
K2K_HOST_DEVICE constexpr int64_t ns_pitch(int64_t columns) { return ceil_div(columns, 8) * 8; }

// Elements of the buffers that lie before `buffer`, for all matrices of a tensor.
K2K_HOST_DEVICE constexpr int64_t ns_offset(NsBuffer buffer, int64_t batch, int64_t m, int64_t n) {
    const int64_t s = m < n ? m : n;
    const int index = static_cast<int>(buffer);
    const int wide = index < 2 ? index : 2;
    return batch * (wide * m * ns_pitch(n) + (index - wide) * s * ns_pitch(s));
}

// Small matrices have X_0 alone, which is overwritten.
constexpr int64_t ns_buffer_bytes(int64_t batch, int64_t m, int64_t n, bool gram,
                                  bool small = false) {
    const NsBuffer end = small ? NsBuffer::kX1 : gram ? NsBuffer::kResult : NsBuffer::kProduct;
    return 2 * ns_offset(end, batch, m, n);
}

constexpr int64_t ns_tensor_bytes(bool updates) {
    return sizeof(NsTensor) + (updates ? sizeof(NsUpdate) : 0) + 16;  // and the sums, rounded up
}

// Of one matrix; each tensor takes ns_tensor_bytes besides.
constexpr int64_t ns_matrix_bytes(int64_t m, int64_t n, bool gram, bool small) {
    return ns_buffer_bytes(1, m, n, gram, small) + norm_chunks(m, n) * int64_t(sizeof(double));
}

}  // namespace k2k
