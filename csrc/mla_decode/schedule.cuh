#pragma once

// The split-KV tile scheduler: which CTA works on which rows and keys. It runs inside the kernel,
// on the current seq_lens: there is no plan of the host that a CUDA graph could replay stale.
//
// The rows of a sequence (query tokens x heads) are cut into tiles.
//
//   team    team_size neighbouring CTAs that read the same keys at the same time, each for its own
//           tile; one CTA if a sequence has one tile (FlashMLA: the CTAs of one "sm part")
//   turn    a team's work tile: team_size tiles of one sequence, one per CTA, with all of its keys,
//           n >= 1 blocks of 64. A sequence has ceil(tiles / team_size) turns.
//   piece   a split: the range of a turn's keys that one team works on
//   share   the pieces of one team (FlashMLA: its row of tile_scheduler_metadata)
//
//   auto    (split_blocks = 0) A turn is cut into full pieces of piece_blocks() blocks and a rest
//           of 1 to piece_blocks() blocks. The first f teams take one full piece each, f being the
//           number of full pieces. The other teams take the rests, in one of two ways:
//             whole rests  the same number for each team, if no team then exceeds the bound below
//             line         else all rests, each after kTileOverhead blocks, form a line that is cut
//                          into equal shares; only then can a rest be split
//
//               line    [ o rest 0 | o rest 1 | o rest 2 | o rest 3 ]    o: kTileOverhead
//               shares  | team f     | team f + 1  | team f + 2     |
//
//           Bound: no team has more than piece_blocks() + kTileOverhead blocks, as in FlashMLA.
//   fixed   A turn is cut into splits of split_blocks blocks. The splits of all turns are numbered;
//           team t takes the splits t, t + teams, ... Splits, and their order, depend on the
//           sequence's own length alone.
//
// One warp of each CTA runs it, 32 sequences at a time (a *chunk*), one per lane.

#include "arch/warp.cuh"
#include "mla_decode/config.h"
#include "tile/reduce.cuh"

namespace k2k {

class MlaTasks {
  public:
    MlaTasks() = default;
    K2K_DEVICE MlaTasks(const MlaDecodeParams& p, int cta)
        : team_(cta / p.plan.team_size), member_(cta % p.plan.team_size), position_(team_) {
        start(p);
        same_turns_ = turns_of(p, p.queries_per_sequence);
        if (p.plan.split_blocks == 0) share_out(p);
    }

    // Finds this CTA's next task; lane 0 writes it to `task`. All lanes of the warp call it.
    K2K_DEVICE void next(const MlaDecodeParams& p, MlaTask& task) {
        bool done = true;
        Found found;
        while (position_ < end_ && find(p, found)) {
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
        int turns;
    };

    // A sequence, and the sums over all sequences before it.
    struct Found : Sequence {
        int line;              // auto: length of the rests; fixed: splits
        uint32_t full_pieces;  // of number_and_turns()
    };

    K2K_DEVICE static int turns_of(const MlaDecodeParams& p, int queries) {
        return ceil_div(num_tiles(p, queries), p.plan.team_size);
    }

    K2K_DEVICE static int num_tiles(const MlaDecodeParams& p, int queries) {
        return queries <= 0 ? 0 : ceil_div(queries * p.heads, p.plan.tile_rows);
    }

    // Resets the scan to the first sequence.
    K2K_DEVICE void start(const MlaDecodeParams& p) {
        chunk_ = chunk_line_ = 0;
        chunk_full_pieces_ = 0;
        chunk_token_ = p.cu_seqlens_q == nullptr ? 0 : clamp_to(p.cu_seqlens_q[0], p.tokens);
    }

    // This lane's sequence of the chunk. Ragged batch: cu_seqlens_q that decrease are replaced by
    // their prefix maximum, so that no two sequences share a row.
    K2K_DEVICE Sequence sequence(const MlaDecodeParams& p, int& chunk_token) const {
        const int lane = arch::lane_id(), index = chunk_ + lane;
        const bool exists = index < p.batch;
        Sequence s = {index, 0, 0, exists ? clamp_to(p.seq_lens[index], p.capacity) : 0, 1, 0};
        if (p.cu_seqlens_q == nullptr) {
            s.queries = exists ? p.queries_per_sequence : 0;
            s.first_token = index * s.queries;
            s.turns = exists ? same_turns_ : 0;
        } else {
            // Ragged batch: prefix maximum of the offsets over the lanes.
            int end = exists ? clamp_to(p.cu_seqlens_q[index + 1], p.tokens) : 0;
            end = end > chunk_token ? end : chunk_token;
            K2K_UNROLL
            for (uint32_t distance = 1; distance < 32; distance *= 2) {
                const int before = arch::shuffle_up(end, distance);
                if (lane >= static_cast<int>(distance) && before > end) end = before;
            }
            const int before = arch::shuffle_up(end, 1);
            s.first_token = lane > 0 ? before : chunk_token;
            s.queries = end - s.first_token;
            s.turns = turns_of(p, s.queries);
            chunk_token = arch::shuffle(end, 31);
        }
        s.blocks = blocks_of(s.seq_len);
        return s;
    }

    // Blocks of keys; at least one, as results are written without keys, too.
    K2K_DEVICE static int blocks_of(int seq_len) {
        return seq_len > 0 ? ceil_div(seq_len, kBlockKeys) : 1;
    }

    K2K_DEVICE int full_pieces(const Sequence& s) const { return (s.blocks - 1) / piece_; }

    K2K_DEVICE int rest(const Sequence& s) const { return s.blocks - full_pieces(s) * piece_; }

    // Length of a turn's rest on the line, in blocks; with whole rests, 1.
    K2K_DEVICE int rest_length(const Sequence& s) const {
        return whole_rests_ ? 1 : kTileOverhead + rest(s);
    }

    // Low 16 bits: full pieces of all turns of the sequence. High 16 bits: its turns, if they have
    // full pieces. One scan sums both. There are fewer full pieces than teams.
    K2K_DEVICE uint32_t number_and_turns(const Sequence& s) const {
        const int full = full_pieces(s);
        return full > 0 && s.turns > 0 ? s.turns * (full + 65536u) : 0;
    }

    // fixed: splits of a turn.
    K2K_DEVICE static int splits(const MlaDecodeParams& p, const Sequence& s) {
        return ceil_div(s.blocks, p.plan.split_blocks);
    }

    // auto: computes piece_, full_pieces_, share_ and this team's range of positions.
    K2K_DEVICE void share_out(const MlaDecodeParams& p) {
        // Reduce over all sequences: number of turns, their blocks, blocks of the longest.
        int turns = 0, blocks = 0, longest = 1;
        if (p.cu_seqlens_q == nullptr) {
            turns = p.batch * same_turns_;
            K2K_UNROLL_BY(4)  // four loads in flight
            for (int index = arch::lane_id(); index < p.batch; index += 32) {
                const int of_turn = blocks_of(clamp_to(p.seq_lens[index], p.capacity));
                blocks += same_turns_ * of_turn;
                if (of_turn > longest) longest = of_turn;
            }
        } else {
            K2K_NO_UNROLL
            for (; chunk_ < p.batch; chunk_ += 32) {
                const Sequence s = sequence(p, chunk_token_);
                turns += s.turns;
                blocks += s.turns * s.blocks;
                if (s.turns > 0 && s.blocks > longest) longest = s.blocks;
            }
            turns = arch::redux_add(turns);
            start(p);
        }
        blocks = arch::redux_add(blocks);
        longest = arch::redux_max(longest);
        piece_ = piece_blocks(turns, blocks, longest, p.plan.teams);

        // Count the full pieces and find the longest rest: a second pass, if there are any.
        int longest_rest = longest;
        if (longest > piece_) {
            longest_rest = 1;
            K2K_NO_UNROLL
            for (; chunk_ < p.batch; chunk_ += 32) {
                const Sequence s = sequence(p, chunk_token_);
                full_pieces_ += s.turns * full_pieces(s);
                if (s.turns > 0 && rest(s) > longest_rest) longest_rest = rest(s);
            }
            full_pieces_ = arch::redux_add(full_pieces_);
            longest_rest = arch::redux_max(longest_rest);
            start(p);
        }
        // Divide the rests among the other teams: whole rests if within the bound, else the line.
        const int teams = p.plan.teams - full_pieces_;
        const int apiece = ceil_div(turns, teams);
        whole_rests_ = apiece * (longest_rest + kTileOverhead) <= piece_ + kTileOverhead;
        const int line =
            whole_rests_ ? turns : blocks - full_pieces_ * piece_ + kTileOverhead * turns;
        share_ = whole_rests_ ? apiece : ceil_div(line, teams);
        if (share_ == 0) share_ = 1;
        // Set this team's share.
        if (team_ < full_pieces_) {
            end_ = position_ + 1;
        } else {
            position_ = (team_ - full_pieces_) * share_;
            end_ = position_ + share_ < line ? position_ + share_ : line;
        }
    }

    // Finds the sequence that contains position_; false if position_ is past the last sequence.
    K2K_DEVICE bool find(const MlaDecodeParams& p, Found& found) {
        const bool fixed = p.plan.split_blocks > 0, by_full = team_ < full_pieces_;
        K2K_NO_UNROLL
        for (; chunk_ < p.batch; chunk_ += 32) {
            // Scan: where each lane's sequence ends, in the units of position_.
            int next_token = chunk_token_;
            const Sequence mine = sequence(p, next_token);
            const int line = mine.turns * (fixed ? splits(p, mine) : rest_length(mine));
            const int line_end = chunk_line_ + tile::inclusive_sum(line);
            uint32_t full = 0, full_end = chunk_full_pieces_;
            if (full_pieces_ > 0) {
                full = number_and_turns(mine);
                full_end += tile::inclusive_sum(full);
            }
            // Broadcast the sequence of the first lane that ends after position_.
            const int end = by_full ? static_cast<int>(full_end % 65536) : line_end;
            const uint32_t behind = position_ < end ? arch::lane_id() : 32u;
            const uint32_t lane = arch::redux_min(behind);
            if (lane < 32) {
                found.index = chunk_ + static_cast<int>(lane);
                found.first_token = arch::shuffle(mine.first_token, lane);
                found.queries = arch::shuffle(mine.queries, lane);
                found.seq_len = arch::shuffle(mine.seq_len, lane);
                found.turns = arch::shuffle(mine.turns, lane);
                found.blocks = blocks_of(found.seq_len);
                found.line = arch::shuffle(line_end - line, lane);
                found.full_pieces = arch::shuffle(full_end - full, lane);
                return true;
            }
            // None: advance to the next chunk.
            chunk_token_ = next_token;
            chunk_line_ = arch::shuffle(line_end, 31);
            chunk_full_pieces_ = arch::shuffle(full_end, 31);
        }
        return false;
    }

    // auto: how the keys of a turn are cut.
    struct Cuts {
        int full;                 // full pieces; the pieces of the rest follow them
        int keys_from, rest_end;  // the rest's keys on the line, without the overhead
        int first_team;           // team - full_pieces_ of the rest's first piece
        int splits;               // number of all pieces
        int partial;              // of the first piece: index in the workspace, / team_size
    };

    // A turn's partial results are consecutive in the workspace. They begin at an upper bound of
    // the pieces of earlier split turns: their full pieces, one rest for each turn that has full
    // pieces, and two pieces for each share that ends before on the line. In all less than two per
    // team.
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

    // One team's piece of a turn. Empty if the share ends in the overhead before a rest: then all
    // keys of the rest belong to later shares.
    struct Piece {
        int turn;
        int begin_block, end_block;
        int split, splits;
        int partial;  // index in the workspace, / team_size
    };

    // Each of the three returns the piece at position_ and advances position_.
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
        const int line_block = of.full * piece_ - of.keys_from;  // + line position = block
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

    // Writes the task; false if there is none: an empty piece, or no tile of the turn for this CTA.
    // If a pair of CTAs has only one tile, both get the task, the second with num_rows 0: it loads
    // its boxes of keys for both, computes, and stores nothing.
    K2K_DEVICE bool fill(const MlaDecodeParams& p, MlaTask& task, const Sequence& of,
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
    int same_turns_;  // turns of each sequence, if all have queries_per_sequence

    // auto: blocks of a full piece, number of full pieces, length of a share of the rests.
    int piece_ = 1, full_pieces_ = 0, share_ = 1;
    bool whole_rests_ = false;  // the unit of the line is a rest, not a block of keys

    // Next position, and the end of the share. Unit: a split (fixed), a full piece, or a block or
    // whole rest on the line.
    int position_, end_ = 0x7fffffff;

    // First sequence of the chunk, its first token, and the sums before it, as in Found.
    int chunk_, chunk_token_, chunk_line_;
    uint32_t chunk_full_pieces_;
};

// The row of the workspace with part `part` of a split row; see MlaTask::partial.
K2K_DEVICE int64_t part_row(const MlaDecodePlan& plan, const SplitRow& row, int part) {
    return row.first + int64_t(part) * plan.team_size * plan.tile_rows;
}

}  // namespace k2k
