#pragma once

// The choice of kernel and tiles, and the plan of a call: pure functions of what the host knows,
// which excludes the lengths of sequences.

#include "common/chip.h"
#include "common/math.h"
#include "mla_decode/params.h"

namespace k2k {

// A row of the cache: latent, which is key and value, then rope, which is key alone.
constexpr int kLatent = 512, kRope = 64, kKeyDim = kLatent + kRope;

// 656-byte rows: 512 codes, four scales, the rope part in bfloat16.
constexpr int kQuantizedRow = 656, kScalesAt = 512, kRopeAt = 528;

// Keys are split at multiples of a block of 64: a step of Hopper's kernel, two rounds of the
// portable one, and the page size of most servers.
constexpr int kBlockKeys = 64;

// What a piece of a tile costs besides its keys, in blocks of keys: reading q, writing the result,
// and joining the parts. FlashMLA charges 5 (csrc/smxx/decode/get_decoding_sched_meta).
constexpr int kTileOverhead = 5;

// The number of partial results that can be written, and read again to be joined, in the time of a
// block of keys: 64 rows are 128 KiB, 84 clocks for an L2 of 3,100 bytes a clock there and back; a
// block takes about 3,000. An estimate.
constexpr int kPartialsPerBlock = 36;

// The length, in blocks of keys, of the full pieces that turns are cut into (schedule.cuh), for
// `turns` turns of `blocks` blocks in all, the longest of `longest`. At most an equal share, as in
// FlashMLA; less if there are more teams than pieces.
K2K_HOST_DEVICE constexpr int piece_blocks(int turns, int blocks, int longest, int teams) {
    const int even = (blocks + kTileOverhead * turns + teams - 1) / teams;
    int piece = even > 0 ? even : 1;
    if (turns == 0 || turns > teams) return piece;
    // Equally many teams for each turn.
    const int teams_a_turn = teams / turns;
    const int by_longest = (longest + teams_a_turn - 1) / teams_a_turn;
    if (by_longest < piece) piece = by_longest;
    // One team for the rest of each turn, the others for full pieces.
    if (turns < teams) {
        const int by_all = (blocks + teams - turns - 1) / (teams - turns);
        if (by_all < piece) piece = by_all;
    }
    // Pieces are not so short that joining takes longer than they save.
    while (piece < even && int64_t(kPartialsPerBlock) * piece * (piece + 1) < blocks) ++piece;
    return piece;
}

// ---- joining parts: see kernel_combine.cuh

// It also writes the rows that no sequence owns, which only a ragged batch can have.
constexpr bool needs_combine(const MlaDecodeParams& p) {
    return p.plan.partials > 0 || p.cu_seqlens_q != nullptr;
}

constexpr int kCombineGroups = 4, kCombineThreads = kCombineGroups * kLatent / 4;
constexpr int kMergeThreads = 256, kMergeBlocks = 4;  // on one SM

// A row that was not split costs one load; with many rows a CTA takes eight.
constexpr int combine_rows_per_block(int64_t rows) { return rows < 4096 ? 1 : 8; }

// ---- the portable kernel: eight warps, a round of 32 keys

constexpr int kRoundKeys = 32;
constexpr int kPortableThreads = 256;
constexpr int kRoundBytes = kRoundKeys * kKeyDim * 2;             // 36,864
constexpr int kQuantizedRoundBytes = kRoundKeys * kQuantizedRow;  // 20,992
constexpr int kExchangeBytes = kPortableThreads * 16 * 4 + 128;   // of partial scores, and a flag

constexpr int portable_shared_memory(bool quantized, int stages) {
    return quantized ? kExchangeBytes + kRoundBytes + stages * kQuantizedRoundBytes
                     : kExchangeBytes + stages * kRoundBytes;
}
static_assert(portable_shared_memory(false, 2) == 90240 && portable_shared_memory(true, 2) == 95360,
              "sm_86, 89 and 120 have 101,376");
static_assert(portable_shared_memory(false, 4) == 163968, "sm_80 has 166,912");

// Two stages keep one round in flight, 36 KB or 20 KB, while the other is multiplied; with four,
// copies stay in flight while a tile begins or ends. 99 KB (sm_86, 89, 120) hold two.
constexpr int portable_stages(bool quantized, int shared_memory) {
    return portable_shared_memory(quantized, 4) <= shared_memory ? 4 : 2;
}

// Few rows do not fill the 64 of a tile: each unused row is wasted arithmetic, while every tile of
// a sequence reads all its keys again. So the smallest tile that holds all rows, at most 64.
constexpr int tile_rows_for(int64_t rows_of_a_sequence) {
    return rows_of_a_sequence <= 16 ? 16 : rows_of_a_sequence <= 32 ? 32 : 64;
}

// ---- Hopper's kernel: 64 rows, three warpgroups, a ring of two blocks of keys

constexpr int kHopperRows = 64;
constexpr int kHopperThreads = 384;
constexpr int kHopperStages = 2;
constexpr int kHopperColumns = 64;  // of a box: 128 bytes, as wide as a swizzle
constexpr int kHopperBoxes = kKeyDim / kHopperColumns;
constexpr int kHopperTaskSlots = 4;  // tasks that are known ahead
constexpr int kHopperMinBoxRows = 16;

// Keys of one TMA copy: consecutive slots of one page, as many as divide page and block.
constexpr int hopper_box_rows(int64_t page_size) {
    int rows = kBlockKeys;
    while (page_size % rows != 0) rows /= 2;
    return rows;
}
static_assert(hopper_box_rows(64) == 64 && hopper_box_rows(128) == 64 && hopper_box_rows(16) == 16);

// What the host knows about a call.
struct MlaDecodeShape {
    int64_t batch, tokens, heads;
    int64_t queries_per_sequence;  // 0: ragged
    int64_t capacity;              // keys that a row of the block table can name
    int64_t page_size;
    int64_t split_keys;  // 0: auto
    bool quantized;
    bool whole_rows;  // the cache's rows lie so that TMA can copy them
};

// The sm_90a kernel copies keys by TMA, in boxes that lie in one page: boxes of less than 16 keys
// would take more copies than one thread can start in time. Codes must be decoded on the way, and a
// tile of 16 or 32 rows needs less shared memory traffic in the portable kernel.
constexpr bool served_by_sm90(const Chip& chip, const MlaDecodeShape& shape, int tile_rows) {
    return chip.capability == 90 && !shape.quantized && shape.whole_rows &&
           tile_rows == kHopperRows && hopper_box_rows(shape.page_size) >= kHopperMinBoxRows;
}

// Whether the CTAs of the sm_90a kernel form pairs, clusters of two, each of which loads half of
// the keys from L2 for both: with several tiles a sequence, what an SM gets from L2 would take as
// long as the products. Only whole teams can be paired.
constexpr bool in_pairs(const MlaDecodePlan& plan) {
    return plan.kernel == MlaDecodeKernel::kSm90 && plan.team_size % 2 == 0;
}

// The tiles of a sequence go to the CTAs of a team, which then read the same keys at the same
// time, from L2 all but once.
constexpr MlaDecodePlan make_plan(const Chip& chip, const MlaDecodeShape& shape) {
    MlaDecodePlan plan = {};
    const int64_t queries =
        shape.queries_per_sequence > 0
            ? shape.queries_per_sequence
            : ceil_div(shape.tokens, shape.batch > 0 ? shape.batch : 1);  // the mean
    const int64_t rows = queries * shape.heads;
    // Tiles of different heights add up a score in different orders. With fixed splits, a row's
    // bits must not depend on how many queries come along.
    plan.tile_rows = tile_rows_for(shape.split_keys > 0 ? shape.heads : rows);
    const bool sm90 = served_by_sm90(chip, shape, plan.tile_rows);
    plan.kernel = sm90 ? MlaDecodeKernel::kSm90 : MlaDecodeKernel::kSm80;
    plan.stages = sm90 ? kHopperStages : portable_stages(shape.quantized, chip.shared_memory);
    const int64_t tiles = ceil_div(rows > 0 ? rows : 1, plan.tile_rows);
    plan.team_size = static_cast<int>(tiles < chip.multiprocessors ? tiles : chip.multiprocessors);
    plan.teams = chip.multiprocessors / plan.team_size;
    plan.split_blocks = static_cast<int>(ceil_div(shape.split_keys, kBlockKeys));
    if (plan.split_blocks == 0) {
        plan.partials = int64_t(2) * plan.teams * plan.team_size;  // see schedule.cuh
    } else {
        // At most so many turns over all sequences, each with so many splits.
        const int64_t rounds = shape.queries_per_sequence > 0
                                   ? shape.batch * ceil_div(tiles, plan.team_size)
                                   : shape.batch + shape.tokens * shape.heads /
                                                       (int64_t(plan.tile_rows) * plan.team_size);
        const int64_t splits = ceil_div(ceil_div(shape.capacity, kBlockKeys), plan.split_blocks);
        plan.partials = splits > 1 ? rounds * splits * plan.team_size : 0;
    }
    return plan;
}

}  // namespace k2k
