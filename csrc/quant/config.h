#pragma once

// Tiles and grids: pure functions of the sizes.

#include "common/math.h"

namespace k2k {

// Row kernels (quantize_1x128, swiglu, swiglu_quantize, dequantize): a tile is 8 rows of 4 blocks
// of 128, 16 elements for each of 256 threads. Four blocks of a row are 1 KiB of bfloat16, enough
// for DRAM to stream; with eight rows the scales of a column are stored as whole 16-byte runs.
constexpr int kRowThreads = 256;
constexpr int kTileRows = 8;
constexpr int kTileBlocks = 4;

// Transposing: a tile is 128 rows, which share a scale, of 128 bytes each: whole cache lines.
constexpr int kTransposeThreads = 256;
constexpr int kTransposeRows = 128;
constexpr int transpose_columns(int element_bytes) { return 128 / element_bytes; }

// 128x128: the block stays in registers between its maximum and its codes: 32 elements per thread.
constexpr int kBlockThreads = 512;

// RMSNorm: a row stays in shared memory between the sum of its squares and its codes. It has warps
// of its own, 16 contiguous elements per lane, once or twice. Twice gives the 7,168 columns of
// Kimi-K2's hidden state to 7 warps; short rows have them once, and several rows share a CTA: they
// are adjacent, so that their scales in a column are contiguous.
constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;
constexpr int64_t kNormMostColumns = 2 * 512 * kNormWarps;
constexpr int64_t kNormMostBlocks = 4096;  // CTAs of a grid: enough to keep the last wave short

struct NormShape {
    int sixteens;  // per lane
    int warps;     // per row
    int rows;      // per CTA
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

// CTAs per SM: enough for 40 KiB of rows in flight, and more if registers allow it.
constexpr int norm_blocks(int thread_bytes) {
    return thread_bytes <= 32 ? 5 : thread_bytes <= 64 ? 4 : 2;
}

// A grid-stride grid over tiles: y over rows, x over columns. Rows get CTAs first, so that a CTA
// finds the rows of groups once for many columns; columns are divided only as far as the GPU would
// otherwise be idle.
struct TileGrid {
    unsigned x, y;
};
constexpr int64_t kEnoughBlocks = 2048;  // two waves of 8 CTAs on 132 SMs
constexpr int64_t kMostRowTiles = 8192;  // of a grid: enough to keep the last wave short

constexpr TileGrid tile_grid(int64_t row_tiles, int64_t column_tiles) {
    const int64_t y = row_tiles < kMostRowTiles ? row_tiles : kMostRowTiles;
    int64_t x = ceil_div(kEnoughBlocks, y);
    if (x > column_tiles) x = column_tiles;
    return {static_cast<unsigned>(x), static_cast<unsigned>(y)};
}
static_assert(tile_grid(1, 14).x == 14 && tile_grid(1, 14).y == 1,
              "one token: all columns at once");
static_assert(tile_grid(8192, 14).x == 1 && tile_grid(8192, 14).y == 8192,
              "many tokens: a CTA per row tile");
static_assert(tile_grid(int64_t(1) << 40, 14).y == 8192, "more rows than a grid: grid-stride");

}  // namespace k2k
