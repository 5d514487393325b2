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
