#pragma once

// Which block works on which keys, found inside the kernel from the lengths at the time it runs:
// there is no plan on the host that could be stale, in a CUDA graph or elsewhere.
//
// The rows of a sequence (query tokens x heads) are cut into tiles. A team's blocks take as many
// tiles at a time: a *turn*, of at least one block of 64 keys.
//
//   auto    A turn of n blocks is cut into full pieces of piece_blocks() and a rest of 1 to
//           piece_blocks(). The first teams take one full piece each. The other teams take the
//           rests: the same number of whole rests each if that makes no team late, else equal
//           shares of the line of all rests, on which each is kTileOverhead longer than its keys.
//           Only there a share's end cuts a rest. No team has more to do than piece_blocks() +
//           kTileOverhead, which is FlashMLA's bound too.
//   fixed   A turn has as many splits as its length says, and team t takes the splits t, t + teams,
//           ... of all turns. Splits, and their order, depend on nothing but the sequence's own
//           length.
//
// One warp of a block computes it, 32 sequences a step.

#include "arch/warp.cuh"
#include "mla_decode/config.h"

namespace k2k {

// Values of query offsets and lengths are not known to the host: they are kept inside q and the
// block table.
K2K_DEVICE int clamp_to(int value, int64_t most) {
    return value < 0 ? 0 : value < most ? value : static_cast<int>(most);
}

class MlaTasks {
  public:
    MlaTasks() = default;
    K2K_DEVICE MlaTasks(const MlaDecodeParams& p, int block K2K_WHERE)
        : team_(block / p.plan.team_size), member_(block % p.plan.team_size), position_(team_) {
        start(p);
        same_turns_ = turns_of(p, p.queries_per_sequence);
        if (p.plan.split_blocks == 0) share_out(p K2K_PASS_WHERE);
    }

    // This block's next task, written by lane 0. All lanes of the warp call it.
    K2K_DEVICE void next(const MlaDecodeParams& p, MlaTask& task K2K_WHERE) {
        bool done = true;
        Found found;
        while (position_ < end_ && find(p, found K2K_PASS_WHERE)) {
            const Piece piece = p.plan.split_blocks > 0 ? fixed_split(p, found)
                                : team_ < full_pieces_  ? full_piece(found)
                                                        : piece_of_rest(found);
            done = !fill(p, task, found, piece);
            if (!done) break;
        }
        if (arch::lane_id() == 0) task.last = done;
    }

  private:
    struct Sequence {
        int index, first_token, queries, seq_len;
        int blocks;
        int turns;  // of the team, over its tiles
    };

    // A sequence, and what lies before it.
    struct Found : Sequence {
        int line;              // rests (auto) or splits (fixed)
        uint32_t full_pieces;  // number_and_turns()
    };

    K2K_DEVICE static int turns_of(const MlaDecodeParams& p, int queries) {
        const int tiles = num_tiles(p, queries);
        return (tiles + p.plan.team_size - 1) / p.plan.team_size;
    }

    K2K_DEVICE static int num_tiles(const MlaDecodeParams& p, int queries) {
        return queries <= 0 ? 0 : (queries * p.heads + p.plan.tile_rows - 1) / p.plan.tile_rows;
    }

    // Before the first sequence.
    K2K_DEVICE void start(const MlaDecodeParams& p) {
        chunk_ = chunk_line_ = 0;
        chunk_full_pieces_ = 0;
        chunk_token_ = p.cu_seqlens_q == nullptr ? 0 : clamp_to(p.cu_seqlens_q[0], p.tokens);
    }

    // This lane's sequence of the chunk. Offsets of queries that fall are taken for the largest
    // before them, so that no two sequences have a row in common.
    K2K_DEVICE Sequence sequence(const MlaDecodeParams& p, int& chunk_token K2K_WHERE) const {
        const int lane = arch::lane_id(), index = chunk_ + lane;
        const bool exists = index < p.batch;
        Sequence s = {index, 0, 0, exists ? clamp_to(p.seq_lens[index], p.capacity) : 0, 1, 0};
        if (p.cu_seqlens_q == nullptr) {
            s.queries = exists ? p.queries_per_sequence : 0;
            s.first_token = index * s.queries;
            s.turns = exists ? same_turns_ : 0;
        } else {
            int end = exists ? clamp_to(p.cu_seqlens_q[index + 1], p.tokens) : 0;
            end = end > chunk_token ? end : chunk_token;
            K2K_UNROLL
            for (uint32_t distance = 1; distance < 32; distance *= 2) {
                const int before = arch::shuffle_up(end, distance K2K_PASS_WHERE);
                if (lane >= static_cast<int>(distance) && before > end) end = before;
            }
            const int before = arch::shuffle_up(end, 1 K2K_PASS_WHERE);
            s.first_token = lane > 0 ? before : chunk_token;
            s.queries = end - s.first_token;
            s.turns = turns_of(p, s.queries);
            chunk_token = arch::shuffle(end, 31 K2K_PASS_WHERE);
        }
        s.blocks = blocks_of(s.seq_len);
        return s;
    }

    // Of keys; a turn without keys counts as one with a block: its results must be written.
    K2K_DEVICE static int blocks_of(int seq_len) {
        return seq_len > 0 ? (seq_len + kBlockKeys - 1) / kBlockKeys : 1;
    }

    K2K_DEVICE int full_pieces(const Sequence& s) const { return (s.blocks - 1) / piece_; }

    K2K_DEVICE int rest(const Sequence& s) const { return s.blocks - full_pieces(s) * piece_; }

    // How long a turn's rest is on the line.
    K2K_DEVICE int rest_length(const Sequence& s) const {
        return whole_rests_ ? 1 : kTileOverhead + rest(s);
    }

    // Full pieces of the sequence's turns, and in the upper half the turns that have any. There are
    // fewer full pieces than teams.
    K2K_DEVICE uint32_t number_and_turns(const Sequence& s) const {
        const int full = full_pieces(s);
        return full > 0 && s.turns > 0 ? s.turns * (full + 65536u) : 0;
    }

    // Fixed splits of a turn.
    K2K_DEVICE static int splits(const MlaDecodeParams& p, const Sequence& s) {
        return (s.blocks + p.plan.split_blocks - 1) / p.plan.split_blocks;
    }

    K2K_DEVICE void share_out(const MlaDecodeParams& p K2K_WHERE) {
        int turns = 0, blocks = 0, longest = 1;
        if (p.cu_seqlens_q == nullptr) {
            turns = p.batch * same_turns_;
            K2K_UNROLL_BY(4)  // of the loads, to wait but once
            for (int index = arch::lane_id(); index < p.batch; index += 32) {
                const int of_turn = blocks_of(clamp_to(p.seq_lens[index], p.capacity));
                blocks += same_turns_ * of_turn;
                if (of_turn > longest) longest = of_turn;
            }
        } else {
            K2K_NO_UNROLL
            for (; chunk_ < p.batch; chunk_ += 32) {
                const Sequence s = sequence(p, chunk_token_ K2K_PASS_WHERE);
                turns += s.turns;
                blocks += s.turns * s.blocks;
                if (s.turns > 0 && s.blocks > longest) longest = s.blocks;
            }
            turns = arch::redux_add(turns K2K_PASS_WHERE);
            start(p);
        }
        blocks = arch::redux_add(blocks K2K_PASS_WHERE);
        longest = arch::redux_max(longest K2K_PASS_WHERE);
        piece_ = piece_blocks(turns, blocks, longest, p.plan.teams);

        int longest_rest = longest;
        if (longest > piece_) {
            longest_rest = 1;
            K2K_NO_UNROLL
            for (; chunk_ < p.batch; chunk_ += 32) {
                const Sequence s = sequence(p, chunk_token_ K2K_PASS_WHERE);
                full_pieces_ += s.turns * full_pieces(s);
                if (s.turns > 0 && rest(s) > longest_rest) longest_rest = rest(s);
            }
            full_pieces_ = arch::redux_add(full_pieces_ K2K_PASS_WHERE);
            longest_rest = arch::redux_max(longest_rest K2K_PASS_WHERE);
            start(p);
        }
        const int teams = p.plan.teams - full_pieces_;  // of rests
        const int apiece = (turns + teams - 1) / teams;
        whole_rests_ = apiece * (longest_rest + kTileOverhead) <= piece_ + kTileOverhead;
        const int line =
            whole_rests_ ? turns : blocks - full_pieces_ * piece_ + kTileOverhead * turns;
        share_ = whole_rests_ ? apiece : (line + teams - 1) / teams;
        if (share_ == 0) share_ = 1;
        if (team_ < full_pieces_) {
            end_ = position_ + 1;
        } else {
            position_ = (team_ - full_pieces_) * share_;
            end_ = position_ + share_ < line ? position_ + share_ : line;
        }
    }

    // Sums of the lanes before and with this one.
    template <class T>
    K2K_DEVICE static T sum_up(T value K2K_WHERE) {
        K2K_UNROLL
        for (uint32_t distance = 1; distance < 32; distance *= 2) {
            const T before = arch::shuffle_up(value, distance K2K_PASS_WHERE);
            if (arch::lane_id() >= distance) value += before;
        }
        return value;
    }

    // Finds the sequence that position_ lies in, if those before it are passed over: by splits, by
    // full pieces, or on the line of rests. False behind the last one.
    K2K_DEVICE bool find(const MlaDecodeParams& p, Found& found K2K_WHERE) {
        const bool fixed = p.plan.split_blocks > 0, by_full = team_ < full_pieces_;
        K2K_NO_UNROLL
        for (; chunk_ < p.batch; chunk_ += 32) {
            int next_token = chunk_token_;
            const Sequence mine = sequence(p, next_token K2K_PASS_WHERE);
            const int line = mine.turns * (fixed ? splits(p, mine) : rest_length(mine));
            const int line_end = chunk_line_ + sum_up(line K2K_PASS_WHERE);
            uint32_t full = 0, full_end = chunk_full_pieces_;
            if (full_pieces_ > 0) {
                full = number_and_turns(mine);
                full_end += sum_up(full K2K_PASS_WHERE);
            }
            const int end = by_full ? static_cast<int>(full_end % 65536) : line_end;
            const uint32_t behind = position_ < end ? arch::lane_id() : 32u;
            const uint32_t lane = arch::redux_min(behind K2K_PASS_WHERE);
            if (lane < 32) {
                found.index = chunk_ + static_cast<int>(lane);
                found.first_token = arch::shuffle(mine.first_token, lane K2K_PASS_WHERE);
                found.queries = arch::shuffle(mine.queries, lane K2K_PASS_WHERE);
                found.seq_len = arch::shuffle(mine.seq_len, lane K2K_PASS_WHERE);
                found.turns = arch::shuffle(mine.turns, lane K2K_PASS_WHERE);
                found.blocks = blocks_of(found.seq_len);
                found.line = arch::shuffle(line_end - line, lane K2K_PASS_WHERE);
                found.full_pieces = arch::shuffle(full_end - full, lane K2K_PASS_WHERE);
                return true;
            }
            chunk_token_ = next_token;
            chunk_line_ = arch::shuffle(line_end, 31 K2K_PASS_WHERE);
            chunk_full_pieces_ = arch::shuffle(full_end, 31 K2K_PASS_WHERE);
        }
        return false;
    }

    // How the keys of a turn are cut.
    struct Cuts {
        int full;                 // full pieces, then the pieces of the rest
        int keys_from, rest_end;  // the rest on the line, behind its overhead
        int first_team;           // of the pieces of the rest; the next ones go to the next teams
        int splits;               // all pieces
        int partial;              // of the first of them, in tiles of a team
    };

    // Partial results of a turn lie one behind the other. All turns before this one have at most
    // their full pieces, one more each, and two for each share's end on the line: less than two for
    // each team.
    K2K_DEVICE Cuts cuts(const Found& found, int turn) const {
        const int full = full_pieces(found), length = rest_length(found);
        const int begin = found.line + turn * length, end = begin + length;
        const int keys_from = whole_rests_ ? begin : begin + kTileOverhead;
        const int first_team = keys_from / share_;
        const int before = static_cast<int>(found.full_pieces % 65536 + found.full_pieces / 65536);
        return {full,
                keys_from,
                end,
                first_team,
                full + (end - 1) / share_ - first_team + 1,
                before + turn * (full > 0 ? full + 1 : 0) + 2 * first_team};
    }

    // What a team does of a turn. Without keys, if another team begins with them.
    struct Piece {
        int turn;
        int begin_block, end_block;
        int split, splits;
        int partial;  // in tiles of a team
    };

    // The piece at position_, which moves on.
    K2K_DEVICE Piece full_piece(const Found& found) {
        const int full = full_pieces(found);
        const int place = position_ - static_cast<int>(found.full_pieces % 65536);
        const int turn = place / full, split = place - turn * full;
        position_ = end_;
        const Cuts of = cuts(found, turn);
        return {turn, split * piece_, (split + 1) * piece_, split, of.splits, of.partial + split};
    }

    K2K_DEVICE Piece piece_of_rest(const Found& found) {
        const int turn = (position_ - found.line) / rest_length(found);
        const Cuts of = cuts(found, turn);
        const int from = position_ > of.keys_from ? position_ : of.keys_from;
        const bool ends = of.rest_end <= end_;
        position_ = ends ? of.rest_end : end_;
        const int line_block = of.full * piece_ - of.keys_from;  // where the line begins
        const int end = ends ? found.blocks : line_block + position_;
        const int split = of.full + team_ - full_pieces_ - of.first_team;
        return {turn, line_block + from, end, split, of.splits, of.partial + split};
    }

    K2K_DEVICE Piece fixed_split(const MlaDecodeParams& p, const Found& found) {
        const int of_turn = splits(p, found), place = position_ - found.line;
        const int turn = place / of_turn, split = place - turn * of_turn;
        const int begin = split * p.plan.split_blocks, partial = position_;
        position_ += p.plan.teams;
        return {turn, begin, begin + p.plan.split_blocks, split, of_turn, partial};
    }

    // Writes the task down; false if there is nothing to do: no keys, or no tile of the turn for
    // this member. A pair that has but one tile works together all the same, the other block on no
    // rows.
    K2K_DEVICE bool fill(const MlaDecodeParams& p,
                         MlaTask& task,
                         const Sequence& of,
                         const Piece& piece) const {
        if (piece.begin_block >= piece.end_block) return false;
        const int tile = piece.turn * p.plan.team_size + member_;
        const int first_of_pair = in_pairs(p.plan) ? tile - member_ % 2 : tile;
        if (first_of_pair >= num_tiles(p, of.queries)) return false;
        if (arch::lane_id() != 0) return true;
        const int first_row = tile * p.plan.tile_rows;
        const int rows_left = of.queries * p.heads - first_row;
        const int end_key = piece.end_block * kBlockKeys;
        task.sequence = of.index;
        task.first_token = of.first_token;
        task.queries = of.queries;
        task.seq_len = of.seq_len;
        task.first_row = first_row;
        task.num_rows = clamp_to(rows_left, p.plan.tile_rows);
        task.first_key = piece.begin_block * kBlockKeys;
        task.end_key = end_key < of.seq_len ? end_key : of.seq_len;
        task.border = p.causal ? of.seq_len - of.queries + first_row / p.heads + 1 : of.seq_len;
        task.split = piece.split;
        task.num_splits = piece.splits;
        task.partial = piece.splits == 1 ? -1 : piece.partial * p.plan.team_size + member_;
        return true;
    }

    int team_, member_;
    int same_turns_;  // of each sequence, if they have equally many queries

    // auto: how long a full piece is, how many there are, and how the rests are shared.
    int piece_ = 1, full_pieces_ = 0, share_ = 1;
    bool whole_rests_ = false;  // the unit of the line is a rest, not a block of keys

    // What is next: a split, a full piece, or a place on the line of rests.
    int position_, end_ = 0x7fffffff;

    // 32 sequences; the first one's first query; and what lies before them, as in Found.
    int chunk_, chunk_token_, chunk_line_;
    uint32_t chunk_full_pieces_;
};

// The row of the workspace where part `part` of a split row lies; see MlaTask::partial.
K2K_DEVICE int64_t part_row(const MlaDecodePlan& plan, const SplitRow& row, int part) {
    return row.first + int64_t(part) * plan.team_size * plan.tile_rows;
}

}  // namespace k2k
