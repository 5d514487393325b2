#pragma once

// The persistent tile scheduler of all kernels of this folder: see tile/group_tiles.cuh.

#include "fp8_gemm/params.h"
#include "tile/group_tiles.cuh"

namespace k2k {

struct GemmTile : tile::GroupTile {
    // A group along K begins inside a block of 128, whose scales belong to another group too:
    // nothing is loaded and the result is NaN.
    K2K_DEVICE bool misplaced() const { return k_end < 0; }

    // Blocks of 128 of K; one block of zeros if there is no K.
    K2K_DEVICE int blocks() const {
        return k_end > k_begin ? static_cast<int>(ceil_div(k_end - k_begin, 128)) : 1;
    }
};

class GemmTiles : public tile::GroupTiles {
  public:
    K2K_DEVICE GemmTiles(const Fp8GemmParams& p, int tile_rows, int tile_columns, int band)
        : GroupTiles({p.groups, p.a.rows, p.b.rows, p.k}, tile_rows, tile_columns, band) {}

    K2K_DEVICE bool find(int index, GemmTile& tile) {
        if (!GroupTiles::find(index, tile)) return false;
        if (tile.k_begin % 128 != 0 && tile.k_end > tile.k_begin) {
            tile.k_begin = 0;
            tile.k_end = -1;
        }
        return true;
    }
};

}  // namespace k2k
