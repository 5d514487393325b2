#pragma once

// Who works on which keys: found out inside the kernel, from the lengths as they are when it runs.
// There is no plan on the host that could go stale, in a CUDA graph or elsewhere.
//
// The rows of a sequence (query tokens x heads) are cut into tiles; a team's blocks take as many
// tiles at a time, a *turn*. All turns of all sequences, in order, are laid on one line:
//
//     auto    a turn is kTileOverhead + (blocks of 64 keys) long; each team takes an equal share
//             of the line, so a turn is split where a share ends;
//     fixed   a turn is as long as it has splits; team t takes the places t, t + teams, ...
//             Splits, and their order, depend on nothing but the sequence's own length.
//
// One warp of a block computes it, 32 sequences a step.

#include "arch/warp.cuh"
#include "mla_decode/config.h"

namespace k2k {

// Some keys of one tile of rows.
struct MlaTask {
    int sequence;
    int first_token;  // of the sequence, in q
    int queries;      // of the sequence
    int seq_len;
    int first_row, num_rows;  // of the tile; rows of the sequence are query * heads + head
    int first_key, end_key;
    int border;  // all rows see the keys before it; later rows may see more
    int split, num_splits;
    int partial;  // tile of the workspace; -1 if the tile is not split
    bool last;    // there is none any more: nothing of the above holds
};

// Values of query offsets and lengths are not known to the host: they are kept inside q and the
// block table.
K2K_DEVICE int clamp_to(int value, int64_t most) {
    return value < 0 ? 0 : value < most ? value : static_cast<int>(most);
}

class MlaTasks {
  public:
    MlaTasks() = default;
    K2K_DEVICE MlaTasks(const MlaDecodeParams& p, int block K2K_WHERE)
        : team_(block / p.plan.team_size), member_(block % p.plan.team_size) {
        if (p.plan.split_blocks > 0) {
            position_ = team_;
            return;
        }
        int length = 0;  // of the line
        for (int first = 0; first < p.batch; first += 32) {
            length += sequence(p, first + arch::lane_id()).length();
        }
        length = arch::redux_add(length K2K_PASS_WHERE);
        const int even = static_cast<int>(ceil_div(length, p.plan.teams));
        share_ = even > kTileOverhead + kMinShareBlocks ? even : kTileOverhead + kMinShareBlocks;
        position_ = team_ * share_;
        end_ = position_ + share_ < length ? position_ + share_ : length;
    }

    // This block's next task, written by lane 0. All lanes of the warp call it.
    K2K_DEVICE void next(const MlaDecodeParams& p, MlaTask& task K2K_WHERE) {
        const bool found = p.plan.split_blocks > 0 ? next_fixed(p, task K2K_PASS_WHERE)
                                                   : next_of_share(p, task K2K_PASS_WHERE);
        if (arch::lane_id() == 0) task.last = !found;
    }

  private:
    struct Sequence {
        int index, first_token, queries, seq_len;
        int turns;  // rounds of the team over its tiles
        int turn;   // length of one on the line

        K2K_DEVICE int length() const { return turns * turn; }
    };

    // What a GPU's caller put into the lengths is not known before: they are kept inside q and the
    // block table.
    K2K_DEVICE static Sequence sequence(const MlaDecodeParams& p, int index) {
        Sequence s = {index, 0, 0, 0, 0, 1};
        if (index >= p.batch) return s;
        if (p.cu_seqlens_q == nullptr) {
            s.queries = p.queries_per_sequence;
            s.first_token = index * s.queries;
        } else {
            const int tokens = static_cast<int>(p.tokens);
            s.first_token = clamp_to(p.cu_seqlens_q[index], tokens);
            s.queries = clamp_to(p.cu_seqlens_q[index + 1], tokens) - s.first_token;
        }
        s.seq_len = clamp_to(p.seq_lens[index], p.capacity);
        const int blocks = s.seq_len > 0 ? (s.seq_len + kBlockKeys - 1) / kBlockKeys : 1;
        const int split_blocks = p.plan.split_blocks;
        const int tiles = num_tiles(p, s.queries);
        s.turns = (tiles + p.plan.team_size - 1) / p.plan.team_size;
        s.turn =
            split_blocks > 0 ? (blocks + split_blocks - 1) / split_blocks : kTileOverhead + blocks;
        return s;
    }

    K2K_DEVICE static int num_tiles(const MlaDecodeParams& p, int queries) {
        return queries <= 0 ? 0 : (queries * p.heads + p.plan.tile_rows - 1) / p.plan.tile_rows;
    }

    // Finds the sequence in whose stretch of the line the position lies, and where that begins;
    // false behind the last one.
    K2K_DEVICE bool find(const MlaDecodeParams& p, Sequence& found, int& start K2K_WHERE) {
        for (; chunk_ < p.batch; chunk_ += 32) {
            const Sequence mine = sequence(p, chunk_ + arch::lane_id());
            int end = mine.length();
            K2K_UNROLL
            for (uint32_t distance = 1; distance < 32; distance *= 2) {
                const int before = arch::shuffle_up(end, distance K2K_PASS_WHERE);
                if (arch::lane_id() >= distance) end += before;
            }
            const int total = arch::shuffle(end, 31 K2K_PASS_WHERE);
            if (position_ < chunk_start_ + total) {
                const uint32_t ends_behind = chunk_start_ + end > position_ ? arch::lane_id() : 32u;
                const int lane = arch::redux_min(ends_behind K2K_PASS_WHERE);
                start = chunk_start_ + arch::shuffle(end - mine.length(), lane K2K_PASS_WHERE);
                found = sequence(p, chunk_ + lane);
                return true;
            }
            chunk_start_ += total;
        }
        return false;
    }

    K2K_DEVICE bool next_of_share(const MlaDecodeParams& p, MlaTask& task K2K_WHERE) {
        Sequence found;
        int start;
        while (position_ < end_ && find(p, found, start K2K_PASS_WHERE)) {
            const int turn = (position_ - start) / found.turn;
            const int first = start + turn * found.turn, last = first + found.turn;
            const int stop = end_ < last ? end_ : last;
            const int keys_from = first + kTileOverhead;
            const int begin_block = position_ > keys_from ? position_ - keys_from : 0;
            position_ = stop;
            if (stop <= keys_from) continue;  // another team begins with the keys
            const int first_team = keys_from / share_;
            const int split = team_ - first_team, splits = (last - 1) / share_ - first_team + 1;
            // A team has at most one split tile that began before its share, and one that begins
            // in it.
            const int partial = (2 * team_ + (split == 0)) * p.plan.team_size + member_;
            if (fill(p, task, found, turn,
                     {begin_block, stop - keys_from, split, splits, partial})) {
                return true;
            }
        }
        return false;
    }

    K2K_DEVICE bool next_fixed(const MlaDecodeParams& p, MlaTask& task K2K_WHERE) {
        Sequence found;
        int start;
        while (find(p, found, start K2K_PASS_WHERE)) {
            const int turn = (position_ - start) / found.turn;
            const int split = (position_ - start) % found.turn;
            const int partial = position_ * p.plan.team_size + member_;
            position_ += p.plan.teams;
            const int begin = split * p.plan.split_blocks, end = begin + p.plan.split_blocks;
            if (fill(p, task, found, turn, {begin, end, split, found.turn, partial})) return true;
        }
        return false;
    }

    struct Keys {
        int begin_block, end_block;
        int split, num_splits, partial;
    };

    // Writes the task down; false if this member has no tile in the turn. A pair that has but one
    // tile works together all the same, the other block on no rows.
    K2K_DEVICE bool fill(const MlaDecodeParams& p,
                         MlaTask& task,
                         const Sequence& of,
                         int turn,
                         const Keys& keys) const {
        const int tile = turn * p.plan.team_size + member_;
        const int first_of_pair = in_pairs(p.plan) ? tile - member_ % 2 : tile;
        if (first_of_pair >= num_tiles(p, of.queries)) return false;
        if (arch::lane_id() != 0) return true;
        const int first_row = tile * p.plan.tile_rows;
        const int rows_left = of.queries * p.heads - first_row;
        const int end_key = keys.end_block * kBlockKeys;
        task.sequence = of.index;
        task.first_token = of.first_token;
        task.queries = of.queries;
        task.seq_len = of.seq_len;
        task.first_row = first_row;
        task.num_rows = clamp_to(rows_left, p.plan.tile_rows);
        task.first_key = keys.begin_block * kBlockKeys;
        task.end_key = end_key < of.seq_len ? end_key : of.seq_len;
        task.border = p.causal ? of.seq_len - of.queries + first_row / p.heads + 1 : of.seq_len;
        task.split = keys.split;
        task.num_splits = keys.num_splits;
        task.partial = keys.num_splits == 1 ? -1 : keys.partial;
        return true;
    }

    int team_, member_;
    int share_ = 0, position_ = 0, end_ = 0;  // on the line
    int chunk_ = 0, chunk_start_ = 0;         // 32 sequences, and where they begin on the line
};

// The row of the workspace where part `part` of a split row lies; see MlaTask::partial.
K2K_DEVICE int64_t part_row(const MlaDecodePlan& plan, const SplitRow& row, int part) {
    const int teams = part == 0 ? 0 : plan.split_blocks > 0 ? part : 2 * part - 1;
    return row.first + int64_t(teams) * plan.team_size * plan.tile_rows;
}

}  // namespace k2k
