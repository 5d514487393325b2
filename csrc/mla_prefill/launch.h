#pragma once

#include "mla_prefill/params.h"

namespace k2k {

// Starts the kernels on `stream`, of the current device. Nothing is started for empty inputs.
void launch_mla_prefill(const MlaPrefillParams& params, void* stream);
void launch_mla_prefill_backward(const MlaPrefillBackwardParams& params, void* stream);

// The kernels for sm_90a, where plan.kernel is kSm90; of the backward dK/dV and dQ.
void launch_mla_prefill_sm90(const MlaPrefillParams& params, void* stream);
void launch_mla_prefill_dkv_sm90(const MlaPrefillBackwardParams& params, void* stream);
void launch_mla_prefill_dq_sm90(const MlaPrefillBackwardParams& params, void* stream);

// Writes the tasks of tickets 0, 1, ... to tasks[capacity], as tiles of 64 or 128 queries, or of 64
// keys. Uses the sizes, lengths and plan of `in`.
void launch_mla_prefill_schedule(const MlaPrefillInputs& in, bool over_keys, int rows,
                                 MlaPrefillTask* tasks, int capacity, void* stream);

}  // namespace k2k
