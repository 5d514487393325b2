#pragma once

// Tiles and the plan of a call: pure functions of what the host knows, which excludes the lengths of
// sequences.

#include "common/chip.h"
#include "common/math.h"
#include "mla_prefill/params.h"

namespace k2k {

// A row of q or k is [nope | rope], a row of v as wide as nope.
constexpr int kNope = 128, kRopeDims = 64, kQkDim = kNope + kRopeDims, kVDim = 128;

// State of a row between pieces of its keys: the unnormalised output, the maximum, the totals of the
// four lanes of a quad, 3 unused.
constexpr int kStateFloats = kVDim + 8, kStateMaximum = kVDim, kStateTotals = kVDim + 4;

// Heads whose K and V are read at the same time shall fit in L2 (40 MB on A100, 50 MB on H100): an
// estimate. (FlashAttention-3 uses 32 MB: hopper/tile_scheduler.hpp.)
constexpr int64_t kL2Bytes = 20 << 20;

constexpr MlaPrefillPlan make_prefill_plan(const Chip& chip, int64_t k_tokens, int64_t heads,
                                           bool by_tma) {
    const int64_t head_bytes = (k_tokens > 0 ? k_tokens : 1) * (kQkDim + kVDim) * 2;
    const int64_t fit = kL2Bytes / head_bytes;
    // Groups of about equal size: a small last one would leave SMs idle.
    const int64_t groups = fit < 1 ? heads : ceil_div(heads, fit);
    const int64_t group = groups == 0 ? 1 : ceil_div(heads, groups);
    return {chip.capability == 90 && by_tma ? MlaPrefillKernel::kSm90 : MlaPrefillKernel::kSm80,
            chip.multiprocessors, static_cast<int>(group)};
}

// The most tiles of `rows` rows that a batch can have, of all heads; each sequence may have a last
// one that is not full, and so may the tokens after them.
constexpr int64_t most_tasks(const MlaPrefillInputs& in, int64_t tokens, int rows) {
    return in.heads * (tokens / rows + in.batch + 1);
}

}  // namespace k2k
