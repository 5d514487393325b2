#pragma once

// Which rows of a tile belong to a group. The others are padding, which must not be read.

#include "arch/warp.cuh"
#include "quant/params.h"

namespace k2k {

template <int kRows, int kWarps>
struct RealRows {
    static constexpr int kWords = (kRows + 31) / 32;

    uint32_t of_warp[kWarps][kWords];
    uint32_t bits[kWords];  // bit r: row r of the tile is real

    K2K_DEVICE bool has(int row) const { return bits[row / 32] >> (row % 32) & 1; }
    K2K_DEVICE bool none() const {
        uint32_t all = 0;
        K2K_UNROLL
        for (int word = 0; word < kWords; ++word) all |= bits[word];
        return all == 0;
    }

    // Finds the rows of groups among first_row .. first_row + kRows - 1 of matrix `batch`. All
    // threads of the CTA call it.
    K2K_DEVICE void find(const RowGroups& groups, int64_t batch, int64_t first_row, int64_t rows) {
        // Each thread takes every 32 * kWarps-th group. Groups are disjoint, so adding their bits
        // is a union.
        uint32_t words[kWords] = {};
        if (groups.offsets != nullptr) {
            for (int g = threadIdx.x; g < groups.num_groups; g += 32 * kWarps) {
                const int64_t start = groups.offsets[g];
                const int64_t end =
                    groups.counts == nullptr ? groups.offsets[g + 1] : start + groups.counts[g];
                add(words, start - first_row, end - first_row);
            }
        } else if (threadIdx.x == 0) {
            const int64_t end = groups.counts == nullptr ? rows : groups.counts[batch];
            add(words, -first_row, end - first_row);
        }
        // Add over the warp, then over the warps.
        K2K_UNROLL
        for (int word = 0; word < kWords; ++word) words[word] = arch::redux_add(words[word]);
        if (arch::lane_id() == 0) {
            K2K_UNROLL
            for (int word = 0; word < kWords; ++word) of_warp[arch::warp_id()][word] = words[word];
        }
        arch::sync_block();
        if (threadIdx.x < kWords) {
            uint32_t sum = 0;
            K2K_UNROLL
            for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[warp][threadIdx.x];
            bits[threadIdx.x] = sum;
        }
        arch::sync_block();
    }

  private:
    // Adds rows start .. end - 1 of the tile.
    K2K_DEVICE static void add(uint32_t (&words)[kWords], int64_t start, int64_t end) {
        K2K_UNROLL
        for (int word = 0; word < kWords; ++word) {
            words[word] += below(end - 32 * word) & ~below(start - 32 * word);
        }
    }
    // The bits of rows 0 .. row - 1.
    K2K_DEVICE static uint32_t below(int64_t row) {
        return row <= 0 ? 0 : row >= 32 ? ~0u : (1u << row) - 1;
    }
};

}  // namespace k2k
