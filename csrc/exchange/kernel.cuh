#pragma once

// Rows between ranks: the sender writes into buffers of the receivers.
//
// Scatter   Token t of rank s is sent once to every rank that has one of its experts: row (s, t)
//           there. Every rank receives, for each token and each k, the local expert or -1.
// Gather    Slot s of pair (t, k) of rank r returns to row (t, k) there. `numbers[t, k]` tells the
//           home rank whether a row was returned; -1 if the pair was dropped for lack of capacity.
//
// A row's position is given by its token: no counting or allocation comes before the rows, and the
// rows that arrive are ordered by rank and token, in whatever order the ranks send.
//
// Send      Grid-stride over tasks: 2 KiB of a row per warp, loaded once, stored to each of its
//           ranks. Gather iterates over the rows that scatter announced, not over the capacity.
//           Each CTA increments a counter when done; the last one stores the flag {epoch, call,
//           rows} on every rank, release at system scope.
// Wait      A separate kernel, so that other kernels may run between send and wait: a CTA per
//           source rank. One thread polls (acquire at system scope) until the flag has this epoch,
//           the timeout expires, or a peer aborts. The CTA then copies the received `numbers` out
//           of the buffer. Rows stay in it, for the kernels that follow on the stream.
// Epochs    count up in device memory, modulo 2^32; a flag is compared for equality and never
//           cleared. Flags and rows are double-buffered by the parity of the epoch. A rank sends
//           epoch e + 2 after it has seen flag e + 1 of every rank. Each rank sends that flag, in
//           stream order, after it has consumed epoch e. So a send never waits. The kernels compute
//           the half, and write it to device memory for those that read the rows: the host needs no
//           epoch, and a CUDA graph may hold any number of exchanges.
// Faults    A wait ends without a usable flag if the rank is late, if another rank aborted, or if
//           the flag is of another call (another dtype, say). It then writes the error record and
//           the abort word of every rank, the late one too, and reports "no rows" (scatter) or
//           weights that are NaN (gather). From then on this rank sends nothing: its peers cannot
//           pass the next epoch, so no row is overwritten that a late rank still reads. Nothing
//           traps.
//
// Order     data | sync_block | thread 0: fence, count (acq_rel)           of each CTA
//           last count (acq_rel) | sync_warp | a flag per lane (release)   of the last CTA
//           flag (acquire) by thread 0 | sync_block | numbers              of a waiting CTA
// Limits    64 ranks, top-32, 2^24 - 1 tokens. Rows that do not begin at multiples of 16 bytes are
//           read byte by byte.

#include "arch/control.cuh"
#include "arch/fence.cuh"
#include "arch/ldst.cuh"
#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "common/math.h"
#include "exchange/config.h"
#include "exchange/params.h"
#include "tile/arrived_rows.cuh"
#include "tile/sixteen.cuh"

namespace k2k {

// Rank of an expert and its number there. Ranks have equally many experts, the first ones one more
// if the numbers do not divide. Rank -1: no expert, or its rank is masked.
struct ExpertPlace {
    int rank, number;
};

K2K_DEVICE ExpertPlace place_of(const Exchange& x, int64_t index) {
    if (index < 0 || index >= x.experts) return {-1, -1};
    const int expert = static_cast<int>(index);
    const int each = x.experts / x.world, more = x.experts % x.world;
    const int in_larger = more * (each + 1);
    ExpertPlace place;
    if (expert < in_larger) {
        place = {expert / (each + 1), expert % (each + 1)};
    } else {
        place = {more + (expert - in_larger) / each, (expert - in_larger) % each};
    }
    return x.live >> place.rank & 1 ? place : ExpertPlace{-1, -1};
}

K2K_DEVICE int64_t index_at(const void* indices, bool wide, int64_t pair) {
    return wide ? static_cast<const int64_t*>(indices)[pair]
                : static_cast<const int32_t*>(indices)[pair];
}

template <class T>
K2K_DEVICE T* in_buffer(const Exchange& x, int rank, int64_t offset) {
    return reinterpret_cast<T*>(x.peers[rank] + offset);
}

// Double buffer: offset of the half that this epoch uses.
K2K_DEVICE int64_t half_of(const Exchange& x, uint32_t epoch) {
    return epoch % 2 == 0 ? 0 : x.at.half;
}

K2K_DEVICE uint64_t* flag_of(const Exchange& x, uint32_t epoch, int there, int source) {
    return in_buffer<uint64_t>(x, there,
                               half_of(x, epoch) + x.at.flags + int64_t(source) * kFlagBytes);
}

// Writes the error record, unless an earlier fault has claimed it. The fault is released last.
K2K_DEVICE void record(const Exchange& x, ExchangeFault fault, uint32_t who, uint32_t number) {
    if (arch::atomic_cas<arch::Scope::kSystem>(&x.error->claimed, 0, 1) != 0) return;
    x.error->call = x.call;
    x.error->who = who;
    x.error->number = number;
    arch::store_release<arch::Scope::kSystem>(&x.error->fault, uint32_t(fault));
}

// Sixteen bytes of a row from `first` on, zeros beyond `bytes`. An unaligned row is read byte by
// byte into words: bytes in registers of their own would cost registers on the aligned path too.
K2K_DEVICE uint4 load_16(const uint8_t* row, int64_t first, int64_t bytes) {
    if (tile::in_vectors(row, first, bytes)) {
        return arch::load_nc_no_allocate(reinterpret_cast<const uint4*>(row + first));
    }
    // Unaligned row, or its last bytes.
    uint32_t words[4];
    K2K_UNROLL
    for (int w = 0; w < 4; ++w) {
        words[w] = 0;
        for (int i = 0; i < 4; ++i) {
            const int64_t at = first + 4 * w + i;
            if (at < bytes) words[w] |= uint32_t(row[at]) << 8 * i;
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Rows in buffers begin at multiples of 16 bytes; the last sixteen bytes may be partial.
K2K_DEVICE void store_16(uint8_t* row, int64_t first, int64_t bytes, uint4 value) {
    if (first + 16 <= bytes) {
        arch::store(reinterpret_cast<uint4*>(row + first), value);
        return;
    }
    // The last bytes of a row.
    const uint32_t words[4] = {value.x, value.y, value.z, value.w};
    K2K_UNROLL
    for (int w = 0; w < 4; ++w) {
        for (int i = 0; i < 4; ++i) {
            const int64_t at = first + 4 * w + i;
            if (at < bytes) row[at] = static_cast<uint8_t>(words[w] >> 8 * i);
        }
    }
}

// This warp's 2 KiB of a row, from `column` on.
struct RowPiece {
    uint4 vectors[kExchangeVectors];  // vector i of lane l: bytes 512 i + 16 l on
};

K2K_DEVICE RowPiece load_piece(const uint8_t* row, int64_t column, int64_t bytes) {
    RowPiece piece;
    K2K_UNROLL
    for (int i = 0; i < kExchangeVectors; ++i) {
        const int64_t first = column + i * 512 + arch::lane_id() * 16;
        if (first < bytes) piece.vectors[i] = load_16(row, first, bytes);
    }
    return piece;
}

K2K_DEVICE void store_piece(uint8_t* row, int64_t column, int64_t bytes, const RowPiece& piece) {
    K2K_UNROLL
    for (int i = 0; i < kExchangeVectors; ++i) {
        const int64_t first = column + i * 512 + arch::lane_id() * 16;
        if (first < bytes) store_16(row, first, bytes, piece.vectors[i]);
    }
}

// End of a send: the last CTA to arrive here stores this rank's flag on every rank.
K2K_DEVICE void finish_sending(const Exchange& x, ExchangeKind kind, uint32_t epoch, bool failed,
                               int64_t rows) {
    // Wait for all rows of this CTA.
    arch::sync_block();
    if (arch::warp_id() != 0) return;
    const int lane = arch::lane_id();
    bool last = false;
    if (lane == 0) {
        // Count this CTA; the fence makes its rows visible to the other GPUs before the flag.
        arch::fence_acq_rel<arch::Scope::kSystem>();
        const uint32_t before =
            arch::atomic_add_acq_rel<arch::Scope::kGpu>(&x.state->done[kind], 1);
        last = before == gridDim.x - 1;
        if (last) {
            x.state->done[kind] = 0;
            x.state->epoch[kind] = epoch;
        }
    }
    // Order the other lanes' flags after what lane 0 acquired: the rows of all CTAs.
    arch::sync_warp();
    if (!arch::any(last) || failed) return;
    // A lane per rank stores the flag. After a failed wait none is sent.
    const uint64_t flag =
        uint64_t(epoch) << 32 | uint64_t(x.call) << kFlagRowsBits | static_cast<uint32_t>(rows);
    for (int rank = lane; rank < x.world; rank += 32) {
        if (!(x.live >> rank & 1)) continue;
        arch::store_release<arch::Scope::kSystem>(flag_of(x, epoch, rank, x.rank), flag);
    }
}

// Writes the abort word of every rank, this one too: their waits end, because of rank `who`.
K2K_DEVICE void abort_all(const Exchange& x, ExchangeFault fault, uint32_t epoch, uint32_t who) {
    const uint64_t word = uint64_t(epoch) << 32 | uint32_t(fault) << 16 | (who + 1);
    K2K_NO_UNROLL
    for (int rank = 0; rank < x.world; ++rank) {
        if (!(x.live >> rank & 1)) continue;
        arch::store_release<arch::Scope::kSystem>(in_buffer<uint64_t>(x, rank, x.at.abort), word);
    }
}

// Waits for the flag of `source`: the number of rows it announces, or -1 after a fault. One thread
// calls it.
K2K_DEVICE int64_t await_flag(const Exchange& x, uint32_t epoch, int source) {
    const uint64_t* flag = flag_of(x, epoch, x.rank, source);
    const uint64_t* abort = in_buffer<uint64_t>(x, x.rank, x.at.abort);
    const uint64_t begin = arch::globaltimer();
    for (;;) {
        // The flag is there: check that it is of the same call.
        const uint64_t word = arch::load_acquire<arch::Scope::kSystem>(flag);
        if (word >> 32 == epoch) {
            const auto content = static_cast<uint32_t>(word);
            if (content >> kFlagRowsBits == x.call) return content & kMostFlagRows;
            record(x, kOtherCall, source, epoch);
            abort_all(x, kOtherCall, epoch, source);
            break;
        }
        // A peer has aborted: record why.
        const uint64_t aborted = arch::load_acquire<arch::Scope::kSystem>(abort);
        if (aborted != 0) {
            const uint32_t why = static_cast<uint32_t>(aborted) >> 16;
            record(x, why == kOtherCall ? kOtherCall : kPeerAborted, (aborted & 0xffff) - 1, epoch);
            break;
        }
        // The timeout has expired: abort all ranks.
        if (arch::globaltimer() - begin > x.timeout) {
            record(x, kPeerSilent, source, epoch);
            abort_all(x, kPeerSilent, epoch, source);
            break;
        }
        arch::nanosleep(100);
    }
    // Stop the sends that follow on this rank.
    arch::store_release<arch::Scope::kGpu>(&x.state->failed, uint32_t(1));
    return -1;
}

K2K_HOST_DEVICE int64_t pieces_of(const ByteRows& rows) {
    return ceil_div(rows.bytes, kExchangeBytes);
}

__global__ void __launch_bounds__(kExchangeThreads, kExchangeBlocksResident)
    scatter_kernel(const __grid_constant__ ScatterParams p) {
    const Exchange& x = p.exchange;
    const int lane = arch::lane_id();
    const uint32_t epoch = x.state->epoch[kScatter] + 1;
    const bool failed = x.state->failed != 0;
    const int64_t half = half_of(x, epoch);
    // A task is a piece of 2 KiB of a token's row, first part before second.
    const int64_t first_pieces = pieces_of(p.parts[0]);
    const int64_t pieces = first_pieces + pieces_of(p.parts[1]);

    for (int64_t task = int64_t(blockIdx.x) * kExchangeWarps + arch::warp_id();
         task < p.tokens * pieces && !failed; task += int64_t(gridDim.x) * kExchangeWarps) {
        // Load this warp's 2 KiB of the token's row, or of its second part (scales, weights).
        const int64_t token = task / pieces, piece = task - token * pieces;
        const bool second = piece >= first_pieces;
        const ByteRows& part = p.parts[second];
        const int64_t column = (second ? piece - first_pieces : piece) * kExchangeBytes;
        const RowPiece values =
            load_piece(part.values + token * part.row_stride, column, part.bytes);

        // Lane k finds the rank of the token's k-th expert; indices out of range are recorded once.
        ExpertPlace place = {-1, -1};
        if (lane < x.top_k) {
            const int64_t index = index_at(p.indices, p.wide_indices, token * x.top_k + lane);
            place = place_of(x, index);
            if ((index < -1 || index >= x.experts) && piece == 0) {
                record(x, kBadIndex, static_cast<uint32_t>(token), static_cast<uint32_t>(index));
            }
        }
        // Send the local expert of each pair, or -1, to every rank.
        const int64_t row = x.rank * x.most_tokens + token;
        if (piece == 0) {
            for (int rank = 0; rank < x.world; ++rank) {
                if (!(x.live >> rank & 1) || lane >= x.top_k) continue;
                int32_t* numbers = in_buffer<int32_t>(x, rank, half + x.at.numbers);
                numbers[row * x.top_k + lane] = place.rank == rank ? place.number : -1;
            }
        }
        // Of the lanes whose experts are on the same rank, select the lowest.
        const uint32_t mates = arch::match_any(static_cast<uint32_t>(place.rank));
        const bool leads = place.rank >= 0 && (mates & ((1u << lane) - 1)) == 0;
        const uint32_t leaders = arch::ballot(leads);
        // Store the piece once to each rank, into row (this rank, token).
        for (int k = 0; k < x.top_k; ++k) {
            const int rank = arch::shuffle(place.rank, k);
            if (!(leaders >> k & 1)) continue;
            uint8_t* target = in_buffer<uint8_t>(x, rank, half + x.at.rows + row * x.at.pitch);
            store_piece(target + (second ? p.second : 0), column, part.bytes, values);
        }
    }
    // Announce the rows.
    finish_sending(x, kScatter, epoch, failed, p.tokens);
}

// Shared memory of the wait kernels.
struct Announced {
    int64_t rows;
};

// A CTA per source rank.
__global__ void __launch_bounds__(kExchangeThreads)
    scatter_wait_kernel(const __grid_constant__ ScatterWaitParams p) {
    auto& smem = arch::shared_storage<Announced>();
    const Exchange& x = p.exchange;
    const int source = blockIdx.x;
    const uint32_t epoch = x.state->epoch[kScatter];  // advanced by the send before
    // Wait for the flag; publish how many rows arrived and in which half they are.
    if (threadIdx.x == 0) {
        const int64_t rows = x.live >> source & 1 ? await_flag(x, epoch, source) : 0;
        smem.rows = rows < 0 ? 0 : rows < x.most_tokens ? rows : x.most_tokens;
        p.arrived[source] = static_cast<int32_t>(smem.rows);
        if (source == 0) p.arrived[x.world] = epoch % 2;
    }
    arch::sync_block();
    // Copy the local experts out of the buffer, -1 for tokens that did not arrive.
    const int64_t first = source * x.most_tokens * x.top_k, pairs = smem.rows * x.top_k;
    const int32_t* numbers =
        in_buffer<int32_t>(x, x.rank, half_of(x, epoch) + x.at.numbers) + first;
    for (int64_t i = threadIdx.x; i < x.most_tokens * x.top_k; i += kExchangeThreads) {
        p.experts[first + i] = i < pairs ? numbers[i] : -1;
    }
}

__global__ void __launch_bounds__(kExchangeThreads, kExchangeBlocksResident)
    gather_kernel(const __grid_constant__ GatherParams p) {
    const Exchange& x = p.exchange;
    const int lane = arch::lane_id();
    const uint32_t epoch = x.state->epoch[kGather] + 1;
    const bool failed = x.state->failed != 0;
    const int64_t half = half_of(x, epoch);
    const int64_t pieces = pieces_of(p.rows);

    // Grid-stride over the rows that scatter announced, of all sources.
    const ArrivedRows rows = {p.arrived, x.world, x.most_tokens};
    ArrivedTasks tasks(int64_t(blockIdx.x) * kExchangeWarps + arch::warp_id());
    for (; !failed && tasks.find(rows, pieces); tasks.step(int64_t(gridDim.x) * kExchangeWarps)) {
        // A task is a piece of the K rows that return for one token of rank `home`.
        const int64_t token = tasks.task / pieces, piece = tasks.task - token * pieces;
        const int home = tasks.source;
        const int64_t row = home * x.most_tokens + token;
        if (!(x.live >> home & 1)) continue;
        // Lane k reads the slot of the k-th pair; the first piece's warp reports which rows return.
        int32_t slot = -1;
        if (lane < x.top_k && p.experts[row * x.top_k + lane] >= 0) {
            const int64_t pair = token * x.top_k + lane;
            slot = p.slot_of[row * x.top_k + lane];
            if (piece == 0) {
                int32_t* numbers = in_buffer<int32_t>(x, home, half + x.at.numbers);
                numbers[pair] = slot >= 0 ? static_cast<int32_t>(pair) : -1;
            }
        }
        // Copy the piece of each slot to row (token, k) of the home rank.
        const int64_t column = piece * kExchangeBytes;
        uint8_t* target =
            in_buffer<uint8_t>(x, home, half + x.at.rows + token * x.top_k * x.at.pitch);
        for (int k = 0; k < x.top_k; ++k) {
            const int64_t from = arch::shuffle(slot, k);
            if (from < 0) continue;
            const uint8_t* source = p.rows.values + from * p.rows.row_stride;
            const RowPiece values = load_piece(source, column, p.rows.bytes);
            store_piece(target + k * x.at.pitch, column, p.rows.bytes, values);
        }
    }
    finish_sending(x, kGather, epoch, failed, 0);
}

// A CTA per rank, for the pairs of this rank's tokens whose experts are on that rank.
__global__ void __launch_bounds__(kExchangeThreads)
    gather_wait_kernel(const __grid_constant__ GatherWaitParams p) {
    auto& smem = arch::shared_storage<Announced>();
    const Exchange& x = p.exchange;
    const int source = blockIdx.x;
    const uint32_t epoch = x.state->epoch[kGather];
    if (source == 0 && threadIdx.x == 0) *p.turn = epoch % 2;
    if (!(x.live >> source & 1)) return;
    // Wait for the flag.
    if (threadIdx.x == 0) smem.rows = await_flag(x, epoch, source);
    arch::sync_block();
    // Copy the returned rows' numbers; after a fault make the pairs' weights NaN.
    const bool arrived = smem.rows >= 0;
    const int32_t* numbers = in_buffer<int32_t>(x, x.rank, half_of(x, epoch) + x.at.numbers);
    for (int64_t pair = threadIdx.x; pair < p.tokens * x.top_k; pair += kExchangeThreads) {
        const int rank = place_of(x, index_at(p.indices, p.wide_indices, pair)).rank;
        if (rank != source && !(rank < 0 && source == x.rank)) continue;
        p.slot_of[pair] = rank < 0 ? -1 : arrived ? numbers[pair] : static_cast<int32_t>(pair);
        const float weight = p.weights == nullptr ? 1.0f : p.weights[pair];
        p.poison_weights[pair] = arrived ? weight : soft::bits_float(0x7fc00000);
    }
}

}  // namespace k2k
