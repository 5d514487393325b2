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
// Padding   tokens after the last sequence are a sequence that sees nothing, level 0: their results
//           are written as zeros.

#include "arch/ldst.cuh"
#include "arch/warp.cuh"
#include "common/math.h"
#include "mla_prefill/params.h"
#include "tile/reduce.cuh"

namespace k2k {

enum class TileAxis { kQueries, kKeys };

// The next number of a counter in device memory. Warp-uniform.
K2K_DEVICE int take_ticket(int32_t* counter) {
    int ticket = 0;
    if (arch::lane_id() == 0) ticket = arch::atomic_add<arch::Scope::kGpu>(counter, 1);
    return arch::shuffle(ticket, 0);
}

// Tasks of tiles of kRows queries or keys. All lanes of a warp make and use one; all of its state is
// warp-uniform.
template <TileAxis kAxis, int kRows>
class LongestFirst {
  public:
    K2K_DEVICE explicit LongestFirst(const MlaPrefillInputs& in) {
        for (int first = 0; first <= in.batch; first += 32) {
            const Levels levels = levels_of(in, first + lane());
            tiles_ += arch::redux_add(levels.tiles);
            const int highest =
                arch::redux_max(levels.top < levels.high ? levels.top : levels.high);
            if (highest > highest_) highest_ = highest;
        }
    }

    // The next task of this CTA. Its first ticket is its index; later ones come from the counter.
    K2K_DEVICE void next(const MlaPrefillInputs& in, int32_t* counter, MlaPrefillTask& task) {
        const int first = static_cast<int>(blockIdx.x), others = static_cast<int>(gridDim.x);
        const int ticket = started_ ? others + take_ticket(counter) : first;
        started_ = true;
        find(in, ticket, task);
    }

    // The task of ticket number `ticket`. Numbers must not decrease from call to call.
    K2K_DEVICE void find(const MlaPrefillInputs& in, int ticket, MlaPrefillTask& task) {
        const int group_tasks = tiles_ * in.plan.heads_per_group;
        const int group = group_tasks == 0 ? 0 : ticket / group_tasks;
        const int first_head = group * in.plan.heads_per_group, heads_left = in.heads - first_head;
        const int heads =
            heads_left < in.plan.heads_per_group ? heads_left : in.plan.heads_per_group;
        // Which tile of a head, the longest first. Of the last group, which can have fewer heads,
        // some tickets have no tile.
        const int in_group = ticket - group * group_tasks;
        const int index = heads > 0 ? in_group / heads : 0;
        if (heads <= 0 || index >= tiles_) {
            if (lane() == 0) task.last = true;
            return;
        }
        if (group != group_) {
            group_ = group;
            level_ = highest_ + 1, level_begin_ = level_end_ = 0;
        }
        if (index >= level_end_) find_level(in, index);
        // Which tile of the level, counted over the sequences, and which sequence has it.
        const int rank = index - level_begin_;
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
                    task.head = first_head + in_group % heads;
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
            const int count = level >= high ? 0 : level < low ? tiles : top - level;
            return count < 0 ? 0 : count < tiles ? count : tiles;
        }
        K2K_DEVICE int at(int level) const { return above(level - 1) - above(level); }
    };

    struct Sequence {
        int first_query, queries, first_key, keys, diagonal;
    };

    K2K_DEVICE static int lane() { return static_cast<int>(arch::lane_id()); }

    // Sequence `index`; in.batch: the tokens after the last. The host has not checked the numbers:
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
        const bool queries = kAxis == TileAxis::kQueries;
        const int tiles = tiles_of(queries ? s.queries : s.keys);
        const int other = tiles_of(queries ? s.keys : s.queries);
        if (!in.causal) return {tiles, other, other, other};  // all at one level
        // The last query sees so many keys, and as many queries see key 0.
        const int most = s.queries + s.diagonal;
        return {tiles, tiles_of(most > 0 ? most : 0), 0, other};
    }

    // Tiles of a head above a level.
    K2K_DEVICE static int all_above(const MlaPrefillInputs& in, int level) {
        int tiles = 0;
        for (int first = 0; first <= in.batch; first += 32) {
            tiles += arch::redux_add(levels_of(in, first + lane()).above(level));
        }
        return tiles;
    }

    // Finds the level of tile `index` of a head, which is below the present one: the highest under
    // which no tile has a smaller index. Looks 1, 2, 4 ... levels down, then between.
    K2K_DEVICE void find_level(const MlaPrefillInputs& in, int index) {
        int high = level_ - 1, above_high = level_end_;  // at most `index` tiles are above `high`
        int low = high, above_low = above_high;          // more are above `low`
        for (int step = 1; above_low <= index; step *= 2) {
            high = low, above_high = above_low;
            low = high - step < -1 ? -1 : high - step;
            above_low = all_above(in, low);
        }
        while (high - low > 1) {
            const int middle = (low + high) / 2, above = all_above(in, middle);
            if (above <= index) {
                high = middle, above_high = above;
            } else {
                low = middle, above_low = above;
            }
        }
        level_ = high, level_begin_ = above_high, level_end_ = above_low;
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

    int tiles_ = 0;                        // of a head
    int highest_ = 0;                      // level
    int group_ = -1;                       // of heads
    int level_, level_begin_, level_end_;  // its tiles, by index
    int first_sequence_, tiles_before_;    // tiles of the level in the sequences before that one
    bool started_ = false;
};

// For kernels without a scheduler warp: warp 0 makes the scheduler, whose state is in shared memory,
// and finds the CTA's next task. All warps call both; the main loop keeps its registers.
template <class Tasks>
K2K_DEVICE void make_scheduler(Tasks& shared, const MlaPrefillInputs& in) {
    if (arch::warp_id() != 0) return;
    const Tasks tasks(in);
    if (arch::lane_id() == 0) shared = tasks;
}

template <class Tasks>
K2K_DEVICE void find_next_task(Tasks& shared, MlaPrefillTask& task, const MlaPrefillInputs& in,
                               int32_t* counter) {
    arch::sync_block();  // task_done: the previous task and its stages have been read
    if (arch::warp_id() == 0) {
        Tasks tasks = shared;
        tasks.next(in, counter, task);
        arch::sync_warp();
        if (arch::lane_id() == 0) shared = tasks;
    }
    arch::sync_block();  // task_known
}

// The keys [0, end) that some query of a tile sees.
K2K_DEVICE int end_of_keys(const MlaPrefillTask& task) {
    const int end = task.tile + task.rows + task.diagonal;
    return end < 0 ? 0 : end < task.keys ? end : task.keys;
}

// The keys that row `tile_row` of a tile of queries sees end here.
K2K_DEVICE int border_of(const MlaPrefillTask& task, int tile_row) {
    const int border = task.tile + tile_row + task.diagonal + 1;
    return border < task.keys ? border : task.keys;
}

// The first query that sees a key of a tile of keys; task.queries if none does.
K2K_DEVICE int first_of_queries(const MlaPrefillTask& task) {
    const int first = task.tile - task.diagonal;
    return first < 0 ? 0 : first < task.queries ? first : task.queries;
}

}  // namespace k2k
