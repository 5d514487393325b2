#pragma once

// The tile scheduler of grouped matrix products: one numbering of the tiles of all groups.
//
// Tiles are numbered group by group. Inside a group they go in bands of `band` tiles of rows: down
// the band, then one column on, so that CTAs that run at the same time share rows of A and of B in
// L2. How many rows (or how much of K) a group has is read here, on the device, 32 groups at a time
// (one per lane): a warp passes over all groups once, in ceil(groups / 32) steps, and empty groups
// have no tiles.

#include "arch/warp.cuh"
#include "common/math.h"
#include "tile/groups.h"
#include "tile/reduce.cuh"

namespace k2k::tile {

struct GroupTile {
    int group;
    int row, column;    // the first, in the group's D
    int rows;           // of the group: D ends there
    int64_t first_row;  // of the group, in A and D
    int k_begin, k_end;
};

// Of D: rows (a group's are at most all of A's), columns, and K, or the axis that groups share.
struct GroupSizes {
    const Groups& groups;
    const int64_t& rows;
    const int64_t& columns;
    const int64_t& k;
};

class GroupTiles {
  public:
    // Tiles of tile_rows x tile_columns. All lanes of a warp make and use one.
    K2K_DEVICE GroupTiles(const GroupSizes& sizes, int tile_rows, int tile_columns,
                          int band K2K_WHERE)
        : sizes_(sizes), tile_rows_(tile_rows), tile_columns_(tile_columns), band_(band) {
        look_at_groups(0, 0 K2K_PASS_WHERE);
    }

    // Tile number `index`; false behind the last tile. Numbers must not decrease from call to call.
    K2K_DEVICE bool find(int index, GroupTile& tile K2K_WHERE) {
        // Find the group: the first lane whose group ends behind the tile, else 32 groups on.
        const uint32_t own_lane = arch::lane_id();
        uint32_t lane;
        while ((lane = arch::redux_min(index < end_ ? own_lane : 32u K2K_PASS_WHERE)) == 32) {
            if (first_group_ + 32 >= sizes_.groups.number) return false;
            look_at_groups(first_group_ + 32,
                           arch::shuffle(end_, 31 K2K_PASS_WHERE) K2K_PASS_WHERE);
        }
        tile.group = first_group_ + static_cast<int>(lane);
        const int start = arch::shuffle(start_, lane K2K_PASS_WHERE);
        const int size = arch::shuffle(size_, lane K2K_PASS_WHERE);
        const bool along_k = sizes_.groups.axis == Groups::Axis::kK;
        tile.first_row = along_k ? 0 : start;
        tile.rows = along_k ? static_cast<int>(sizes_.rows) : size;
        tile.k_begin = along_k ? start : 0;
        tile.k_end = along_k ? start + size : static_cast<int>(sizes_.k);

        // Place the tile in its band of the group.
        const int row_tiles = ceil_div<uint32_t, uint32_t>(tile.rows, tile_rows_);
        const int column_tiles = static_cast<int>(ceil_div(sizes_.columns, tile_columns_));
        const int end = arch::shuffle(end_, lane K2K_PASS_WHERE);
        const int in_group = index - (end - row_tiles * column_tiles);
        const int first = in_group / (band_ * column_tiles) * band_;  // row tile of the band
        const int height = row_tiles - first < band_ ? row_tiles - first : band_;
        const int in_band = in_group - first * column_tiles;
        tile.row = (first + in_band % height) * tile_rows_;
        tile.column = in_band / height * tile_columns_;
        return true;
    }

  private:
    // Each lane one of 32 groups, of which `tiles_before` tiles come before the first.
    K2K_DEVICE void look_at_groups(int first, int tiles_before K2K_WHERE) {
        const Groups& groups = sizes_.groups;
        const int group = first + static_cast<int>(arch::lane_id());
        first_group_ = first;
        start_ = size_ = 0;
        int rows = 0;
        if (group < groups.number) {
            // The host has not checked these numbers: they are kept inside A.
            const int64_t space = groups.axis == Groups::Axis::kK ? sizes_.k : sizes_.rows;
            if (groups.offsets != nullptr) start_ = clamp_to(groups.offsets[group], space);
            int64_t end = space;
            if (groups.counts != nullptr) {
                end = start_ + clamp_to(groups.counts[group], space - start_);
            } else if (groups.offsets != nullptr) {
                end = clamp_to(groups.offsets[group + 1], space);
            }
            size_ = end > start_ ? static_cast<int>(end) - start_ : 0;
            rows = groups.axis == Groups::Axis::kK ? static_cast<int>(sizes_.rows) : size_;
        }
        const auto tiles = static_cast<int>(ceil_div<uint32_t, uint32_t>(rows, tile_rows_) *
                                            ceil_div(sizes_.columns, tile_columns_));
        end_ = tiles_before + inclusive_sum(tiles K2K_PASS_WHERE);
    }

    const GroupSizes sizes_;
    int tile_rows_, tile_columns_, band_;
    int first_group_;
    // Of this lane's group: where it begins, how long it is, the number behind its last tile.
    int start_, size_, end_;
};

}  // namespace k2k::tile
