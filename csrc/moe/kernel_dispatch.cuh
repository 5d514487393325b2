#pragma once

// Dispatch: copies each token's row to a slot of each of its experts, optionally quantised.
//
//     slot_of[t, k], offsets[e], counts[e]    by plan.cuh
//     token_of_slot[slot_of[t, k]]            = t; -1 in all other slots
//     data[slot_of[t, k], :]                  = x[t, :], or codes[t, :] and scales[t, :]
//
// Launches  One for at most 2,048 pairs: each CTA plans for itself, then moves. Else three: count
//           (a CTA per tile of 2,048 pairs), scan (one CTA), move.
// Warp      of move: 512 columns of one token, 16 per lane, loaded once, stored to the token's
//           slots; lane k has the k-th slot. Eight lanes have a block of 128 to quantise. All warps
//           have the same role; grid-stride over tasks.
// In flight 32 bytes of bfloat16 per thread: with 48 registers an SM holds five CTAs, 40 KiB; the
//           stores (K = 8: 4 times as many bytes, unquantised 8 times) are not waited for.
// Order     x is loaded first; meanwhile the inputs of the slots arrive, 20 bytes per pair, from
//           L2. Rows that csrc/exchange received are loaded after their experts, because only
//           rows with a local expert arrived.
// Scales    "row": the four scales of a warp are contiguous. "column": scattered 4-byte stores; the
//           rows of an expert are adjacent in slots but not in time, so L2 has to merge them.
// Padding   is not written, except -1 in token_of_slot, grid-stride by the warps.
// Shared    count: 20 KiB; move that plans: 36 KiB, of which the counts of 8 warps are 16.
//
// Barriers of a CTA
//     rank_tile       cells zeroed | counts of warps complete | pairs before each warp known
//     place_experts   sums of warps | (if it writes overflow) dropped pairs of warps
//     move that plans offsets and counts complete | slots complete
//
// Limits    1,024 experts, top-32, 2^31 pairs. Rows that do not begin at multiples of 16 bytes are
//           moved element by element.

#include "arch/smem.cuh"
#include "moe/plan.cuh"
#include "tile/e4m3_block.cuh"
#include "tile/sixteen.cuh"

namespace k2k {

// A CTA per tile of pairs: the pairs' ranks in the tile, and each expert's number of pairs in it.
__global__ void __launch_bounds__(kMoeThreads)
    moe_count_kernel(const __grid_constant__ MoeDispatchParams p) {
    TileRanks& smem = arch::shared_storage<TileRanks>();
    const int64_t first = int64_t(blockIdx.x) * kPlanTile;
    const int64_t left = p.tokens * p.top_k - first;
    const int count = static_cast<int>(left < kPlanTile ? left : kPlanTile);

    // Rank the pairs among the tile's pairs of their expert.
    const ThreadPairs mine = rank_tile(smem, p, first, count);
    K2K_UNROLL
    for (int round = 0; round < kPlanRounds; ++round) {
        if (mine.expert[round] >= 0) {
            p.ranks[first + mine.first + 32 * round] = static_cast<uint16_t>(mine.rank[round]);
        }
    }
    // Write the tile's totals; the scan turns them into numbers of pairs before the tile.
    int32_t* totals = p.before_tile + int64_t(blockIdx.x) * p.experts;
    for (int e = threadIdx.x; e < p.experts; e += kMoeThreads) totals[e] = smem.totals[e];
}

// One CTA, a thread per expert: an exclusive scan over the tiles, then the experts' offsets.
__global__ void __launch_bounds__(kScanThreads)
    moe_scan_kernel(const __grid_constant__ MoeDispatchParams p) {
    auto& smem = arch::shared_storage<PlaceExperts<kScanThreads>>();
    const int64_t tiles = ceil_div(p.tokens * p.top_k, kPlanTile);
    int32_t total[1] = {0};
    if (int(threadIdx.x) < p.experts) {
        int32_t* cell = p.before_tile + threadIdx.x;
        for (int64_t tile = 0; tile < tiles; tile += 8, cell += int64_t(8) * p.experts) {
            // Keep eight loads in flight.
            int32_t here[8];
            K2K_UNROLL
            for (int i = 0; i < 8; ++i) here[i] = tile + i < tiles ? cell[i * p.experts] : 0;
            K2K_UNROLL
            for (int i = 0; i < 8; ++i) {
                if (tile + i < tiles) cell[i * p.experts] = total[0];
                total[0] += here[i];
            }
        }
    }
    place_experts(smem, p, total, p.offsets, p.counts, p.overflow);
}

// Shared memory of a move that plans.
struct MovePlan {
    TileRanks ranks;
    PlaceExperts<kMoeThreads> place;
    alignas(16) int32_t counts[kMostExperts];
    alignas(16) int32_t offsets[kMostExperts + 1];
    int32_t slots[kPlanTile];
};

// The slot of an expert's pair number `rank`, for slots from `start` on; -1 beyond the capacity.
K2K_DEVICE int32_t slot_at(const MoeDispatchParams& p, int32_t start, int64_t rank) {
    return start + rank < p.capacity ? static_cast<int32_t>(start + rank) : -1;
}

// Computes all slots in this CTA; the first CTA writes offsets and counts to memory.
K2K_DEVICE void plan_block(MovePlan& smem, const MoeDispatchParams& p) {
    constexpr int kEach = kMostExperts / kMoeThreads;
    const int pairs = static_cast<int>(p.tokens * p.top_k);
    // Rank all pairs.
    const ThreadPairs mine = rank_tile(smem.ranks, p, 0, pairs);
    static_assert(kEach == 4, "a thread's totals are one vector: no bank conflicts");
    // A thread has the totals of four contiguous experts.
    const uint4 all = reinterpret_cast<const uint4*>(smem.ranks.totals)[threadIdx.x];
    int32_t totals[kEach] = {int32_t(all.x), int32_t(all.y), int32_t(all.z), int32_t(all.w)};
    K2K_UNROLL
    for (int i = 0; i < kEach; ++i) {
        if (int(threadIdx.x) * kEach + i >= p.experts) totals[i] = 0;
    }
    // Place the experts; overflow is written once.
    int64_t* overflow = blockIdx.x == 0 ? p.overflow : nullptr;
    place_experts(smem.place, p, totals, smem.offsets, smem.counts, overflow);
    arch::sync_block();
    // Turn ranks into slots.
    K2K_UNROLL
    for (int round = 0; round < kPlanRounds; ++round) {
        const int pair = mine.first + 32 * round, expert = mine.expert[round];
        if (round < mine.rounds && pair < pairs) {
            smem.slots[pair] = expert < 0 ? -1 : slot_at(p, smem.offsets[expert], mine.rank[round]);
        }
    }
    arch::sync_block();
    if (blockIdx.x != 0) return;
    for (int e = threadIdx.x; e <= p.experts; e += kMoeThreads) {
        p.offsets[e] = smem.offsets[e];
        if (e < p.experts) p.counts[e] = smem.counts[e];
    }
}

// Writes -1 to token_of_slot of padding: after each expert's rows, and after all experts.
K2K_DEVICE void mark_padding(const MoeDispatchParams& p, const int32_t* offsets,
                             const int32_t* counts) {
    // A warp per expert, then all warps over the slots after the last expert.
    const int64_t warps = int64_t(gridDim.x) * kMoeWarps;
    const int64_t warp = int64_t(blockIdx.x) * kMoeWarps + arch::warp_id();
    for (int64_t e = warp; e < p.experts; e += warps) {
        const int64_t end = offsets[e + 1];
        for (int64_t slot = int64_t(offsets[e]) + counts[e] + arch::lane_id(); slot < end;
             slot += 32) {
            p.token_of_slot[slot] = -1;
        }
    }
    for (int64_t slot = offsets[p.experts] + warp * 32 + arch::lane_id(); slot < p.capacity;
         slot += warps * 32) {
        p.token_of_slot[slot] = -1;
    }
}

// Whether x has this row: of rows received from other ranks only those with a local expert arrived.
K2K_DEVICE bool exists(const MoeDispatchParams& p, int64_t token) {
    if (p.arrived.counts == nullptr) return true;
    const int lane = arch::lane_id();
    return arch::any(lane < p.top_k && expert_of(p, token * p.top_k + lane) >= 0);
}

// Without kQuantize rows are copied, and T is any type of the elements' size.
template <class T, bool kQuantize, bool kPlans>
__global__ void __launch_bounds__(kMoeThreads, K2K_RESIDENT(kPlans ? 4 : 5))
    moe_move_kernel(const __grid_constant__ MoeDispatchParams p) {
    MovePlan* plan = nullptr;
    if constexpr (kPlans) {
        // One launch: plan first.
        plan = &arch::shared_storage<MovePlan>();
        plan_block(*plan, p);
    }
    const int lane = arch::lane_id();
    const int64_t pieces = row_pieces(p.hidden);
    const T* all = static_cast<const T*>(p.x) + offset_of(p.x_half);

    ArrivedTasks tasks(int64_t(blockIdx.x) * kMoeWarps + arch::warp_id());
    for (; tasks.find(p.arrived, pieces); tasks.step(int64_t(gridDim.x) * kMoeWarps)) {
        const int64_t token = tasks.row(p.arrived, pieces), piece = tasks.task % pieces;
        // Load this lane's 16 columns.
        const int64_t column = piece * kWarpColumns + lane * 16;
        const bool here = exists(p, token) && column < p.hidden;
        const T* x = all + token * p.x_row_stride;
        tile::Sixteen<T> sixteen = {};
        if (here) sixteen = tile::load_sixteen(x, column, p.hidden);

        // Lane k: find the k-th slot; the first piece's warp writes it to the plan.
        int32_t slot = -1;
        if (lane < p.top_k) {
            const int64_t pair = token * p.top_k + lane;
            if constexpr (kPlans) {
                slot = plan->slots[pair];
            } else if (const int expert = expert_of(p, pair); expert >= 0) {
                const int32_t before = p.before_tile[pair / kPlanTile * p.experts + expert];
                slot = slot_at(p, p.offsets[expert], int64_t(before) + p.ranks[pair]);
            }
            if (piece == 0) {
                p.slot_of[pair] = slot;
                if (slot >= 0) p.token_of_slot[slot] = static_cast<int32_t>(token);
            }
        }

        if constexpr (kQuantize) {
            // Quantise once: amax over 8 lanes, scale, codes.
            float values[16];
            tile::widen(values, sixteen);
            const float scale = tile::scale_of(tile::block_amax<8>(values), p.power_of_two);
            const uint4 words = tile::encode16(values, tile::divisor_of(scale));
            const int64_t block = column / 128;
            // Store codes and scale to each slot.
            for (int k = 0; k < p.top_k; ++k) {
                const int64_t to = arch::shuffle(slot, k);
                if (to < 0 || !here) continue;
                uint8_t* codes = static_cast<uint8_t*>(p.data) + to * p.hidden;
                tile::store_sixteen(codes, column, p.hidden, tile::sixteen_of(words));
                if (lane % 8 == 0) {
                    p.scales[to * p.scale_row_stride + block * p.scale_column_stride] = scale;
                }
            }
        } else {
            // Store the row to each slot.
            for (int k = 0; k < p.top_k; ++k) {
                const int64_t to = arch::shuffle(slot, k);
                if (to < 0 || !here) continue;
                tile::store_sixteen(static_cast<T*>(p.data) + to * p.hidden, column, p.hidden,
                                    sixteen);
            }
        }
    }
    if constexpr (kPlans) {
        mark_padding(p, plan->offsets, plan->counts);
    } else {
        mark_padding(p, p.offsets, p.counts);
    }
}

}  // namespace k2k
