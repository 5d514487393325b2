#pragma once

// The persistent tile scheduler of prefill, forward and backward: tiles of all sequences and heads,
// the longest first. CTAs take tasks by tickets of a counter in device memory, so that no SM waits
// for another at the end; results do not depend on who takes which.
//
// Level     of a tile: about how many tiles of the other axis it visits. In a causal sequence the
//           levels of its tiles fall by one from tile to tile, between bounds, so which tile has
//           the ticket i follows from sums over the sequences, in closed form: no plan kernel, no
//           sort, and lengths are read on the device alone.
//
//               tiles of queries, s_k - s_q = 2 tiles     tiles of keys, the same sequence
//               keys:    0 1 2 3 4                        queries: 0 1 2
//               tile 0   x x x          level 3           keys 0   x x x   level 3
//               tile 1   x x x x        level 4           keys 1   x x x   level 3
//               tile 2   x x x x x      level 5           keys 2   x x x   level 3
//                                                         keys 3     x x   level 2
//                                                         keys 4       x   level 1
//
// Order     groups of heads; in a group levels, falling; in a level sequences; last heads. CTAs that
//           run at the same time then read the same few heads from L2.
// Padding   tokens behind the last sequence are a sequence that sees nothing, level 0: their results
//           are written as zeros.

#include "arch/ldst.cuh"
#include "arch/warp.cuh"
#include "common/math.h"
#include "mla_prefill/params.h"
#include "tile/reduce.cuh"

namespace k2k {

enum class TileAxis { kQueries, kKeys };

// Tasks of tiles of kRows queries or keys. All lanes of a warp make and use one.
template <TileAxis kAxis, int kRows>
class LongestFirst {
  public:
    K2K_DEVICE explicit LongestFirst(const MlaPrefillInputs& in) {
        int tiles = 0;
        for (int first = 0; first <= in.batch; first += 32) {
            tiles += arch::redux_add(levels_of(in, first + lane()).tiles);
        }
        tiles_ = tiles;
        group_ = -1;
    }

    // The task of ticket number `ticket`. Numbers must not decrease from call to call.
    K2K_DEVICE void find(const MlaPrefillInputs& in, int ticket, MlaPrefillTask& task) {
        const int group_tasks = tiles_ * in.plan.heads_per_group;
        const int group = group_tasks == 0 ? 0 : ticket / group_tasks;
        const int first_head = group * in.plan.heads_per_group;
        if (group_tasks == 0 || first_head >= in.heads) {
            if (lane() == 0) task.last = true;
            return;
        }
        if (group != group_) {
            group_ = group;
            level_end_ = group * group_tasks;
            look_at_level(in, INT32_MAX, 0);
        }
        const int heads = in.heads - first_head < in.plan.heads_per_group ? in.heads - first_head
                                                                          : in.plan.heads_per_group;
        // The last group can have fewer heads than its share of tickets has.
        while (ticket >= level_end_) {
            if (next_level_ < 0) {
                if (lane() == 0) task.last = true;
                return;
            }
            look_at_level(in, next_level_, heads);
        }
        // Which tile of the level, counted over the sequences, and which sequence has it.
        const int in_level = ticket - level_begin_, rank = in_level / heads;
        for (;;) {
            const int tiles = levels_of(in, first_sequence_ + lane()).at(level_);
            const int end = tiles_before_ + tile::inclusive_sum(tiles);
            const uint32_t found = arch::redux_min(rank < end ? arch::lane_id() : 32u);
            if (found < 32) {
                const int sequence = first_sequence_ + static_cast<int>(found);
                const int begin = arch::shuffle(end - tiles, found);
                const Levels levels = levels_of(in, sequence);
                const int place = levels.above(level_) + rank - begin;
                if (lane() == 0) {
                    write(in, sequence, place, levels.tiles, task);
                    task.head = first_head + in_level % heads;
                }
                return;
            }
            tiles_before_ = arch::shuffle(end, 31);
            first_sequence_ += 32;
        }
    }

  private:
    // The levels of a sequence's tiles, the longest first: tile r has clamp(top - r, low, high).
    struct Levels {
        int tiles, top, low, high;

        // Tiles above a level, and at it.
        K2K_DEVICE int above(int level) const {
            const int some = level >= high ? 0 : level < low ? tiles : top - level;
            return some < 0 ? 0 : some < tiles ? some : tiles;
        }
        K2K_DEVICE int at(int level) const { return above(level - 1) - above(level); }
        // The highest level below `level` that a tile has; -1 if none has.
        K2K_DEVICE int below(int level) const {
            const int highest = clamped(top), lowest = clamped(top - tiles + 1);
            return tiles == 0 || level <= lowest ? -1 : level - 1 < highest ? level - 1 : highest;
        }
        K2K_DEVICE int clamped(int level) const {
            return level < low ? low : level > high ? high : level;
        }
    };

    struct Sequence {
        int first_query, queries, first_key, keys, diagonal;
    };

    K2K_DEVICE static int lane() { return static_cast<int>(arch::lane_id()); }

    // Sequence `index`; in.batch: the tokens behind the last. The host has not checked the numbers:
    // they are kept inside the tensors.
    K2K_DEVICE static Sequence sequence_at(const MlaPrefillInputs& in, int index) {
        const bool real = index < in.batch;
        Sequence s;
        s.first_query = clamp_to(in.cu_seqlens_q[index], in.q_tokens);
        s.first_key = clamp_to(in.cu_seqlens_k[index], in.k_tokens);
        const int end_query =
            real ? clamp_to(in.cu_seqlens_q[index + 1], in.q_tokens) : in.q_tokens;
        const int end_key = real ? clamp_to(in.cu_seqlens_k[index + 1], in.k_tokens) : in.k_tokens;
        s.queries = end_query > s.first_query ? end_query - s.first_query : 0;
        s.keys = end_key > s.first_key ? end_key - s.first_key : 0;
        // Padding sees nothing, and nothing sees it.
        if (!real) (kAxis == TileAxis::kQueries ? s.keys : s.queries) = 0;
        s.diagonal = !in.causal                       ? s.keys
                     : real && in.diagonal != nullptr ? clamp_diagonal(in.diagonal[index])
                                                      : s.keys - s.queries;
        return s;
    }

    // Sums with numbers of tokens do not overflow.
    K2K_DEVICE static int clamp_diagonal(int diagonal) {
        constexpr int kMost = 1 << 30;
        return diagonal > kMost ? kMost : diagonal < -kMost ? -kMost : diagonal;
    }

    K2K_DEVICE static int tiles_of(int rows) {
        return static_cast<int>((static_cast<uint32_t>(rows) + kRows - 1) / kRows);
    }

    K2K_DEVICE static Levels levels_of(const MlaPrefillInputs& in, int index) {
        if (index > in.batch) return {0, 0, 0, 0};
        const Sequence s = sequence_at(in, index);
        if (kAxis == TileAxis::kQueries) {
            // The last query sees `most` keys, each one before it one less.
            const int most = s.queries + s.diagonal;
            return {tiles_of(s.queries),
                    in.causal ? tiles_of(most > 0 ? most : 0) : tiles_of(s.keys),
                    in.causal ? 0 : tiles_of(s.keys), tiles_of(s.keys)};
        }
        // Key 0 is seen by the queries from -diagonal on.
        const int most = s.queries + s.diagonal;
        return {tiles_of(s.keys), in.causal ? tiles_of(most > 0 ? most : 0) : tiles_of(s.queries),
                in.causal ? 0 : tiles_of(s.queries), tiles_of(s.queries)};
    }

    // Enters `level`, whose tickets follow those of the one before, and finds the next one.
    K2K_DEVICE void look_at_level(const MlaPrefillInputs& in, int level, int heads) {
        int tiles = 0, next = -1;
        for (int first = 0; first <= in.batch; first += 32) {
            const Levels levels = levels_of(in, first + lane());
            tiles += arch::redux_add(levels.at(level));
            const int below = arch::redux_max(levels.below(level));
            next = below > next ? below : next;
        }
        level_ = level, next_level_ = next;
        level_begin_ = level_end_;
        level_end_ += tiles * heads;
        first_sequence_ = tiles_before_ = 0;
    }

    // Queries: the last tile is the longest. Keys: the first is.
    K2K_DEVICE static void write(const MlaPrefillInputs& in, int index, int place, int tiles,
                                 MlaPrefillTask& task) {
        const Sequence s = sequence_at(in, index);
        const bool queries = kAxis == TileAxis::kQueries;
        task.first_query = s.first_query, task.queries = s.queries;
        task.first_key = s.first_key, task.keys = s.keys;
        task.diagonal = s.diagonal;
        task.tile = (queries ? tiles - 1 - place : place) * kRows;
        const int left = (queries ? s.queries : s.keys) - task.tile;
        task.rows = left < kRows ? left : kRows;
        task.last = false;
    }

    int tiles_;                          // of one head
    int group_;                          // of heads
    int level_, next_level_;             // -1: there is none
    int level_begin_, level_end_;        // its tickets
    int first_sequence_, tiles_before_;  // tiles of the level in the sequences before that one
};

// The number of the next task of this CTA; `counter` starts at 0. Warp-uniform.
K2K_DEVICE int take_ticket(int32_t* counter) {
    int ticket = 0;
    if (arch::lane_id() == 0) ticket = arch::atomic_add<arch::Scope::kGpu>(counter, 1);
    return arch::shuffle(ticket, 0);
}

// How many keys the rows of a tile of queries see, the rows of each block together: [0, end).
K2K_DEVICE int end_of_keys(const MlaPrefillTask& task) {
    const int end = task.tile + task.rows + task.diagonal;
    return end < 0 ? 0 : end < task.keys ? end : task.keys;
}

// The first query that sees a key of a tile of keys; task.queries if none does.
K2K_DEVICE int first_of_queries(const MlaPrefillTask& task) {
    const int first = task.tile - task.diagonal;
    return first < 0 ? 0 : first < task.queries ? first : task.queries;
}

}  // namespace k2k
