#pragma once

// Parameters of the kernels that move rows between ranks. Every rank has a buffer of the same
// layout, which all ranks can write: over NVLink, or in one process. -1 means "none".

#include "common/dtypes.h"

namespace k2k {

// Kinds of exchange; each has its own epochs.
enum ExchangeKind : int { kScatter = 0, kGather = 1 };

// State of a rank: epochs sent, CTAs that have finished the current send, whether a wait has
// failed.
struct ExchangeState {
    uint32_t epoch[2];
    uint32_t done[2];
    uint32_t failed;  // nonzero: this rank sends nothing more
};

enum ExchangeFault : uint32_t {
    kNoFault = 0,
    kPeerSilent = 1,   // who: the rank whose flag did not arrive in time
    kPeerAborted = 2,  // who: the rank whose flag did not arrive at another rank
    kBadIndex = 3,     // who: the token; number: the index
    kOtherCall = 4,    // who: the rank that made another call
};

// The first fault of this rank; the host reads it, `fault` first.
struct ExchangeError {
    uint32_t claimed;
    uint32_t call;  // this rank's call at the fault
    uint32_t who, number;
    uint32_t fault;  // written last
};

// Offsets in each rank's buffer, in bytes, for one kind. All but the abort word are
// double-buffered: odd epochs use the second half, `half` bytes after the first.
struct ExchangePlace {
    int64_t abort;    // uint64 {epoch : 32, ExchangeFault : 16, rank + 1 : 16}
    int64_t flags;    // one per source rank, kFlagBytes apart
    int64_t numbers;  // scatter: int32 [world, most_tokens, top_k], local experts
                      // gather: int32 [most_tokens, top_k], the row returned for a pair
    int64_t rows;     // scatter: [world, most_tokens] rows; gather: [most_tokens, top_k] rows
    int64_t half;
    int64_t pitch;  // bytes from row to row, a multiple of 16
};

struct Exchange {
    uint8_t* const* peers;  // [world]: addresses of the ranks' buffers, as seen from this rank
    ExchangeState* state;
    ExchangeError* error;
    ExchangePlace at;
    int world, rank;
    uint64_t live;  // a bit per rank that takes part
    uint32_t call;  // kFlagCallBits: the host's code of what must be equal on all ranks
    int experts, top_k;
    int64_t most_tokens;
    uint64_t timeout;  // nanoseconds
};

// A matrix of bytes whose rows are moved.
struct ByteRows {
    const uint8_t* values;
    int64_t row_stride, bytes;
};

struct ScatterParams {
    Exchange exchange;
    ByteRows parts[2];  // [tokens, bytes]; the second is at `second` of a sent row, or is empty
    int64_t second;
    const void* indices;  // [tokens, top_k], contiguous: int32, or int64
    bool wide_indices;
    int64_t tokens;
};

struct ScatterWaitParams {
    Exchange exchange;
    int32_t* experts;  // [world, most_tokens, top_k]: the local expert of each pair, or -1
    int32_t* arrived;  // [world + 1]: rows of each source; then the half of the buffer they are in
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
    float* poison_weights;  // the weights, NaN for pairs whose rank sent no flag
    int32_t* turn;          // one number: the half of the buffer that the rows are in
};

}  // namespace k2k
