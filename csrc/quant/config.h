#pragma once

// Tiles and grids, as pure functions of the sizes.

#include "common/math.h"

namespace k2k {

// Row kernels (quantize_1x128, swiglu, swiglu_quantize, dequantize): a tile is 8 rows of 4 blocks
// of 128, 16 elements for each of 256 threads. Four blocks of a row are 1 KiB of bfloat16, enough
// for DRAM to stream; eight rows let the scales of a column leave as whole 16-byte runs.
constexpr int kRowThreads = 256;
constexpr int kTileRows = 8;
constexpr int kTileBlocks = 4;

// Transposing: a tile is 128 rows, which share a scale, of 128 bytes each: whole cache lines.
constexpr int kTransposeThreads = 256;
constexpr int kTransposeRows = 128;
constexpr int transpose_columns(int element_bytes) { return 128 / element_bytes; }

// 128x128: the block is held in registers between its maximum and its codes: 32 elements a thread.
constexpr int kBlockThreads = 512;

// RMSNorm: a row stays in shared memory between the sum of its squares and its codes, in the care
// of warps of its own, 16 neighbours a lane, once or twice. Twice leaves the 7,168 columns of
// Kimi-K2's hidden state to 7 warps; short rows get more lanes instead, and share a block: its rows
// are neighbours, so that their scales in a column are too.
constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;
constexpr int64_t kNormMostColumns = 2 * 512 * kNormWarps;
constexpr int64_t kNormMostBlocks = 4096;  // at once; then the tail of the last wave is short

struct NormShape {
    int sixteens;  // of a row in one lane
    int warps;     // of a row
    int rows;      // of a block
};

constexpr NormShape norm_shape(int64_t columns) {
    const int sixteens = columns <= 2048 ? 1 : 2;
    const int warps = static_cast<int>(ceil_div(columns, 512 * sixteens));
    return {sixteens, warps, kNormWarps / warps};
}
static_assert(norm_shape(7168).warps == 7 && norm_shape(7168).rows == 1, "hidden state");
static_assert(norm_shape(1536).warps == 3 && norm_shape(1536).rows == 2, "latent of q");
static_assert(norm_shape(512).warps == 1 && norm_shape(512).rows == 8, "latent of the cache");
static_assert(norm_shape(kNormMostColumns).warps == kNormWarps, "the longest row");

// How many blocks a multiprocessor must hold to have 40 KiB of rows in flight, and more where
// registers allow it.
constexpr int norm_blocks(int thread_bytes) {
    return thread_bytes <= 32 ? 5 : thread_bytes <= 64 ? 4 : 2;
}

// A grid that walks tiles: y over those of rows, x over those of columns, each a stride of its
// extent. Rows get blocks first, so that what a block learns of its rows (which of them are real)
// serves many columns; columns are split only as far as the GPU would stand idle otherwise.
struct Walk {
    unsigned x, y;
};
constexpr int64_t kEnoughBlocks = 2048;  // 132 SMs of 8 blocks, twice over
constexpr int64_t kMostRowTiles = 8192;  // at once; then the tail of the last wave is short

constexpr Walk walk(int64_t row_tiles, int64_t column_tiles) {
    const int64_t y = row_tiles < kMostRowTiles ? row_tiles : kMostRowTiles;
    int64_t x = ceil_div(kEnoughBlocks, y);
    if (x > column_tiles) x = column_tiles;
    return {static_cast<unsigned>(x), static_cast<unsigned>(y)};
}
static_assert(walk(1, 14).x == 14 && walk(1, 14).y == 1, "one token: all columns at once");
static_assert(walk(8192, 14).x == 1 && walk(8192, 14).y == 8192, "many tokens: a block per rows");
static_assert(walk(int64_t(1) << 40, 14).y == 8192, "more rows than a grid: blocks go on");

}  // namespace k2k
