#pragma once

// Slots: a stable counting sort of the pairs (token, k) by expert, in the order of the pairs.
//
//     rank[p]   = number of pairs q < p of the same expert
//     start[e]  = sum over e' < e of round_up(total[e'], alignment), at most the capacity
//     slot[p]   = start[expert[p]] + rank[p]                          if that is below the capacity
//
// A slot is a pure function of the indices: nothing is drawn from a counter that threads race for.
// Within a tile of 2,048 pairs a warp takes 256 neighbours, 32 a round; lanes of the same expert
// find one another (match_any), and the lowest of them writes the warp's count on. A count has one
// writer at a time, so that no atomics are needed.

#include "arch/warp.cuh"
#include "moe/config.h"
#include "moe/params.h"
#include "tile/reduce.cuh"

namespace k2k {

K2K_DEVICE int64_t offset_of(const Half& x) {
    return x.half != nullptr && *x.half != 0 ? x.stride : 0;
}

// The expert of a pair, -1 for one that no expert serves.
K2K_DEVICE int expert_of(const MoeDispatchParams& p, int64_t pair) {
    const int64_t expert = p.wide_indices ? static_cast<const int64_t*>(p.indices)[pair]
                                          : static_cast<const int32_t*>(p.indices)[pair];
    return expert >= 0 && expert < p.experts ? static_cast<int>(expert) : -1;
}

// Counts of the warps of a block, then what stands before each warp.
struct TileRanks {
    uint16_t of_warp[kMoeWarps][kMostExperts];
    alignas(16) int32_t totals[kMostExperts];  // read as vectors
};

// What a thread ranks: pairs `first + 32 * round` of the tile, for rounds below `rounds`.
struct ThreadPairs {
    int first, rounds;
    int expert[kPlanRounds];
    int rank[kPlanRounds];  // among the tile's pairs of the same expert
};

// Ranks pairs first .. first + count - 1 (at most kPlanTile). The whole block calls it; afterwards
// each thread may read all totals.
K2K_DEVICE ThreadPairs rank_tile(TileRanks& smem,
                                 const MoeDispatchParams& p,
                                 int64_t first,
                                 int count K2K_WHERE) {
    const int warp = arch::warp_id(), lane = arch::lane_id();
    const int rounds = static_cast<int>(ceil_div(count, kMoeThreads));
    ThreadPairs mine;
    mine.first = warp * rounds * 32 + lane;
    mine.rounds = rounds;
    K2K_UNROLL
    for (int round = 0; round < kPlanRounds;
         ++round) {  // all on their way before the first is used
        const int pair = mine.first + 32 * round;
        mine.expert[round] = round < rounds && pair < count ? expert_of(p, first + pair) : -1;
    }
    auto* cells = reinterpret_cast<uint4*>(smem.of_warp);
    for (int i = threadIdx.x; i < int(sizeof smem.of_warp / sizeof *cells); i += kMoeThreads) {
        cells[i] = make_uint4(0, 0, 0, 0);
    }
    arch::sync_block(K2K_PASS_WHERE_ONLY);

    uint16_t* counts = smem.of_warp[warp];
    const uint32_t lower_lanes = (1u << lane) - 1;
    K2K_UNROLL
    for (int round = 0; round < kPlanRounds; ++round) {
        if (round >= rounds) break;
        const int expert = mine.expert[round];
        const uint32_t peers = arch::match_any(static_cast<uint32_t>(expert) K2K_PASS_WHERE);
        const int lower = count_bits(peers & lower_lanes);
        const int before = expert >= 0 ? counts[expert] : 0;
        mine.rank[round] = before + lower;
        arch::sync_warp(arch::kFullWarp K2K_PASS_WHERE);  // all have read
        if (expert >= 0 && lower == 0) {
            counts[expert] = static_cast<uint16_t>(before + count_bits(peers));
        }
        arch::sync_warp(arch::kFullWarp K2K_PASS_WHERE);
    }
    arch::sync_block(K2K_PASS_WHERE_ONLY);

    for (int expert = threadIdx.x; expert < p.experts; expert += kMoeThreads) {
        int before = 0;
        K2K_UNROLL
        for (int w = 0; w < kMoeWarps; ++w) {
            const int here = smem.of_warp[w][expert];
            smem.of_warp[w][expert] = static_cast<uint16_t>(before);
            before += here;
        }
        smem.totals[expert] = before;
    }
    arch::sync_block(K2K_PASS_WHERE_ONLY);
    K2K_UNROLL
    for (int round = 0; round < kPlanRounds; ++round) {
        if (mine.expert[round] >= 0) mine.rank[round] += counts[mine.expert[round]];
    }
    return mine;
}

template <int kThreads>
struct PlaceExperts {
    int64_t of_warp[kThreads / 32];
    uint32_t dropped[kThreads / 32];
};

// kEach neighbours, of which those before `end` exist: as one vector, which lanes store without
// bank conflicts, to shared memory that has room for all of them; else one by one.
template <int kEach>
K2K_DEVICE void store_neighbours(int32_t* target,
                                 int first,
                                 int end,
                                 const int32_t (&values)[kEach]) {
    if constexpr (kEach == 4) {
        reinterpret_cast<uint4*>(target)[first / 4] =
            make_uint4(values[0], values[1], values[2], values[3]);
    } else {
        K2K_UNROLL
        for (int i = 0; i < kEach; ++i) {
            if (first + i < end) target[first + i] = values[i];
        }
    }
}

// Offsets and counts, as the reference defines them, of kThreads * kEach experts from their totals;
// a thread has kEach neighbours. With kEach = 4 both lie in shared memory, on 16 bytes, with room
// for all experts. `overflow`, unless null, gets the number of pairs left over. The whole block
// calls it, and must meet before it reads `offsets` and `counts`.
template <int kThreads, int kEach>
K2K_DEVICE void place_experts(PlaceExperts<kThreads>& smem,
                              const MoeDispatchParams& p,
                              const int32_t (&totals)[kEach],
                              int32_t* offsets,
                              int32_t* counts,
                              int64_t* overflow K2K_WHERE) {
    constexpr int kWarps = kThreads / 32;
    const int warp = arch::warp_id(), lane = arch::lane_id();
    int64_t sum = 0;  // of this thread's experts, aligned
    uint32_t aligned[kEach];
    K2K_UNROLL
    for (int i = 0; i < kEach; ++i) {  // totals and alignment are below 2^31: no overflow
        aligned[i] = (totals[i] + p.alignment - 1) / p.alignment * p.alignment;
        sum += aligned[i];
    }
    const int64_t end = tile::inclusive_sum(sum K2K_PASS_WHERE);  // of this thread's experts
    if (lane == 31) smem.of_warp[warp] = end;
    arch::sync_block(K2K_PASS_WHERE_ONLY);
    int64_t start = end - sum;
    for (int w = 0; w < warp; ++w) start += smem.of_warp[w];

    uint32_t dropped = 0;
    const int first = threadIdx.x * kEach;
    int32_t starts[kEach], kept[kEach];
    K2K_UNROLL
    for (int i = 0; i < kEach; ++i) {
        const int64_t room = start < p.capacity ? p.capacity - start : 0;
        starts[i] = static_cast<int32_t>(p.capacity - room);
        kept[i] = totals[i] < room ? totals[i] : static_cast<int32_t>(room);
        dropped += totals[i] - kept[i];
        start += aligned[i];
    }
    store_neighbours(counts, first, p.experts, kept);
    store_neighbours(offsets, first, p.experts, starts);
    // Where experts begin is written; where the last one ends, only if there is room for another.
    if (int(threadIdx.x) == kThreads - 1 && (kEach != 4 || p.experts == kThreads * kEach)) {
        offsets[p.experts] = static_cast<int32_t>(start < p.capacity ? start : p.capacity);
    }
    if (overflow == nullptr) return;
    dropped = arch::redux_add(dropped K2K_PASS_WHERE);
    if (lane == 0) smem.dropped[warp] = dropped;
    arch::sync_block(K2K_PASS_WHERE_ONLY);
    if (threadIdx.x == 0) {
        int64_t all = 0;
        for (int w = 0; w < kWarps; ++w) all += smem.dropped[w];
        *overflow = all;
    }
}

}  // namespace k2k
