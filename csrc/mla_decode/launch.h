#pragma once

#include "mla_decode/params.h"

namespace k2k {

// Starts the kernels on `stream`, of the current device: attention, then the one that joins split
// rows. Nothing is started for empty inputs.
void launch_mla_decode(const MlaDecodeParams& params, void* stream);

// The same with the kernels for sm_90a, where plan.kernel is kSm90.
void launch_mla_decode_sm90(const MlaDecodeParams& params, void* stream);

// Writes each CTA's tasks to tasks[ctas, capacity]. Uses the sizes, lengths and plan of `params`.
void launch_mla_schedule(const MlaDecodeParams& params, MlaTask* tasks, int capacity, void* stream);

void launch_merge_attention_states(const MergeParams& params, void* stream);

}  // namespace k2k
