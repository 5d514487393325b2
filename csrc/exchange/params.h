#pragma once

// Parameters of the kernels that carry rows between ranks. Every rank has a buffer of the same
// layout, which all ranks can write: over NVLink, or in one process. -1 stands for "none".

#include "common/dtypes.h"

namespace k2k {

// Kinds of exchange; each counts its epochs.
enum ExchangeKind : int { kScatter = 0, kGather = 1 };

// This rank's own: epochs sent, blocks that have sent their part, and whether a wait has failed.
struct ExchangeState {
    uint32_t epoch[2];
    uint32_t done[2];
    uint32_t failed;  // this rank sends and waits no more
};

enum ExchangeFault : uint32_t {
    kNoFault = 0,
    kPeerSilent = 1,   // who: the rank whose flag did not come
    kPeerAborted = 2,  // who: the rank whose flag another rank missed
    kBadIndex = 3,     // who: the token; number: the index
    kOtherCall = 4,    // who: the rank that made another call
};

// The first thing that went wrong here; the host reads it, `fault` first.
struct ExchangeError {
    uint32_t claimed;
    uint32_t call;  // of this rank, when it went wrong
    uint32_t who, number;
    uint32_t fault;  // written last
};

// Where things lie in each rank's buffer, in bytes, for this kind. All but the abort word have two
// halves: even epochs use the first, odd ones the second, which lies `half` bytes behind it.
struct ExchangePlace {
    int64_t abort;    // uint64 {epoch : 32, ExchangeFault : 16, rank + 1 : 16}
    int64_t flags;    // of each rank, kFlagBytes apart
    int64_t numbers;  // scatter: int32 [world, most_tokens, top_k], local experts
                      // gather: int32 [most_tokens, top_k], the row that returned for a pair
    int64_t rows;     // scatter: [world, most_tokens] rows; gather: [most_tokens, top_k] rows
    int64_t half;
    int64_t pitch;  // bytes from row to row, a multiple of 16
};

struct Exchange {
    uint8_t* const* peers;  // [world]: where each rank's buffer begins, as seen from this rank
    ExchangeState* state;
    ExchangeError* error;
    ExchangePlace at;
    int world, rank;
    uint64_t live;  // a bit for each rank that takes part
    uint32_t call;  // kFlagCallBits: what must be the same on all ranks, as the host codes it
    int experts, top_k;
    int64_t most_tokens;
    uint64_t timeout;  // nanoseconds
};

// A matrix of bytes whose rows are carried.
struct ByteRows {
    const uint8_t* values;
    int64_t row_stride, bytes;
};

struct ScatterParams {
    Exchange exchange;
    ByteRows parts[2];  // [tokens, bytes]; the second begins in a row at `second`, or is empty
    int64_t second;
    const void* indices;  // [tokens, top_k], contiguous: int32, or int64
    bool wide_indices;
    int64_t tokens;
};

struct ScatterWaitParams {
    Exchange exchange;
    int32_t* experts;  // [world, most_tokens, top_k]: the local expert of each pair, or -1
    int32_t* arrived;  // [world + 1]: rows that each source has; then the half in which they lie
};

struct GatherParams {
    Exchange exchange;
    ByteRows rows;           // [slots, bytes]
    const int32_t* experts;  // [world, most_tokens, top_k]
    const int32_t* slot_of;  // the same; -1: no room
    const int32_t* arrived;  // [world]: rows of each source; the others of `experts` are not read
};

struct GatherWaitParams {
    Exchange exchange;
    const void* indices;
    bool wide_indices;
    int64_t tokens;
    const float* weights;   // [tokens, top_k], or null: ones
    int32_t* slot_of;       // [tokens, top_k]: the returned row of each pair, or -1
    float* poison_weights;  // the weights, NaN for pairs whose rank did not answer
    int32_t* turn;          // one number: the half in which the rows lie
};

}  // namespace k2k
