#pragma once

// Slots: a stable counting sort of the pairs (token, k) by expert, in the order of the pairs.
//
//     rank[p]     = number of pairs q < p of the same expert
//     offsets[e]  = sum over e' < e of round_up(total[e'], alignment), at most the capacity
//     counts[e]   = min(total[e], capacity - offsets[e]); the other pairs of e are dropped
//     slot_of[p]  = offsets[expert[p]] + rank[p]; -1 if dropped, or without an expert
//
// A slot is a pure function of the indices; there are no atomics. Of a tile of 2,048 pairs each
// warp ranks 256 contiguous ones, 32 per round: match_any finds the lanes of the same expert, and
// the lowest of them advances the warp's count, so that a count has one writer at a time.

#include "arch/warp.cuh"
#include "moe/config.h"
#include "moe/params.h"
#include "tile/reduce.cuh"

namespace k2k {

// Elements from the given address to the half of the double buffer that holds the rows.
K2K_DEVICE int64_t offset_of(const Half& x) {
    return x.half != nullptr && *x.half != 0 ? x.stride : 0;
}

// The expert of a pair, -1 if its index is out of range.
K2K_DEVICE int expert_of(const MoeDispatchParams& p, int64_t pair) {
    const int64_t expert = p.wide_indices ? static_cast<const int64_t*>(p.indices)[pair]
                                          : static_cast<const int32_t*>(p.indices)[pair];
    return expert >= 0 && expert < p.experts ? static_cast<int>(expert) : -1;
}

// Shared memory of rank_tile.
struct TileRanks {
    uint16_t of_warp[kMoeWarps][kMostExperts];  // pairs of each warp, then pairs before each warp
    alignas(16) int32_t totals[kMostExperts];   // read as vectors
};

// The pairs that a thread ranks: `first + 32 * round` of the tile, for rounds below `rounds`.
struct ThreadPairs {
    int first, rounds;
    int expert[kPlanRounds];
    int rank[kPlanRounds];  // among the tile's pairs of the same expert
};

// Ranks pairs first .. first + count - 1 (at most kPlanTile). All threads of the CTA call it;
// afterwards each may read all totals.
K2K_DEVICE ThreadPairs rank_tile(TileRanks& smem, const MoeDispatchParams& p, int64_t first,
                                 int count) {
    const int warp = arch::warp_id(), lane = arch::lane_id();
    const int rounds = static_cast<int>(ceil_div(count, kMoeThreads));
    // Load all of this thread's indices before the first is used.
    ThreadPairs mine;
    mine.first = warp * rounds * 32 + lane;
    mine.rounds = rounds;
    K2K_UNROLL
    for (int round = 0; round < kPlanRounds; ++round) {
        const int pair = mine.first + 32 * round;
        mine.expert[round] = round < rounds && pair < count ? expert_of(p, first + pair) : -1;
    }
    // Zero the counts.
    auto* cells = reinterpret_cast<uint4*>(smem.of_warp);
    for (int i = threadIdx.x; i < int(sizeof smem.of_warp / sizeof *cells); i += kMoeThreads) {
        cells[i] = make_uint4(0, 0, 0, 0);
    }
    arch::sync_block();

    // Rank within the warp, 32 pairs per round.
    uint16_t* counts = smem.of_warp[warp];
    const uint32_t lower_lanes = (1u << lane) - 1;
    K2K_UNROLL
    for (int round = 0; round < kPlanRounds; ++round) {
        if (round >= rounds) break;
        const int expert = mine.expert[round];
        const uint32_t peers = arch::match_any(static_cast<uint32_t>(expert));
        const int lower = count_bits(peers & lower_lanes);
        const int before = expert >= 0 ? counts[expert] : 0;
        mine.rank[round] = before + lower;
        // After all lanes have read the count, the expert's lowest lane advances it.
        arch::sync_warp();
        if (expert >= 0 && lower == 0) {
            counts[expert] = static_cast<uint16_t>(before + count_bits(peers));
        }
        arch::sync_warp();
    }
    arch::sync_block();

    // Exclusive scan over the warps, a thread per expert.
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
    arch::sync_block();
    // Complete the ranks.
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

// Stores kEach contiguous values, those before `end`. Four go as one vector, without bank
// conflicts, to shared memory with capacity beyond `end`; else one by one.
template <int kEach>
K2K_DEVICE void store_neighbours(int32_t* target, int first, int end,
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

// Computes offsets and counts of kThreads * kEach experts from their totals; a thread has kEach
// contiguous experts. With kEach = 4 both are in shared memory, 16-byte aligned, with capacity for
// all experts. `overflow`, unless null, receives the number of dropped pairs. All threads of the
// CTA call it; a barrier must come before `offsets` and `counts` are read.
template <int kThreads, int kEach>
K2K_DEVICE void place_experts(PlaceExperts<kThreads>& smem, const MoeDispatchParams& p,
                              const int32_t (&totals)[kEach], int32_t* offsets, int32_t* counts,
                              int64_t* overflow) {
    constexpr int kWarps = kThreads / 32;
    const int warp = arch::warp_id(), lane = arch::lane_id();
    // Exclusive scan of the aligned totals: over the thread's experts, the lanes, the warps.
    int64_t sum = 0;
    uint32_t aligned[kEach];
    K2K_UNROLL
    for (int i = 0; i < kEach; ++i) {  // totals and alignment are below 2^31: no overflow
        aligned[i] = (totals[i] + p.alignment - 1) / p.alignment * p.alignment;
        sum += aligned[i];
    }
    const int64_t end = tile::inclusive_sum(sum);  // of this thread's experts
    if (lane == 31) smem.of_warp[warp] = end;
    arch::sync_block();
    // Exclusive prefix of the thread: in its warp, then the warps before.
    int64_t start = end - sum;
    for (int w = 0; w < warp; ++w) start += smem.of_warp[w];

    // Cut at the capacity.
    uint32_t dropped = 0;
    const int first = threadIdx.x * kEach;
    int32_t starts[kEach], kept[kEach];
    K2K_UNROLL
    for (int i = 0; i < kEach; ++i) {
        const int64_t left = start < p.capacity ? p.capacity - start : 0;
        starts[i] = static_cast<int32_t>(p.capacity - left);
        kept[i] = totals[i] < left ? totals[i] : static_cast<int32_t>(left);
        dropped += totals[i] - kept[i];
        start += aligned[i];
    }
    // Write counts and offsets.
    store_neighbours(counts, first, p.experts, kept);
    store_neighbours(offsets, first, p.experts, starts);
    // offsets[experts], unless the vectors above have written it as the start of another expert.
    if (int(threadIdx.x) == kThreads - 1 && (kEach != 4 || p.experts == kThreads * kEach)) {
        offsets[p.experts] = static_cast<int32_t>(start < p.capacity ? start : p.capacity);
    }
    if (overflow == nullptr) return;
    // Sum the dropped pairs of the CTA.
    dropped = arch::redux_add(dropped);
    if (lane == 0) smem.dropped[warp] = dropped;
    arch::sync_block();
    if (threadIdx.x == 0) {
        int64_t all = 0;
        for (int w = 0; w < kWarps; ++w) all += smem.dropped[w];
        *overflow = all;
    }
}

}  // namespace k2k
