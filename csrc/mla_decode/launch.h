#pragma once

#include "mla_decode/params.h"

namespace k2k {

// Starts the kernels on `stream`, of the current device: attention, then the joining of what was
// split. Nothing is started for empty inputs.
void launch_mla_decode(const MlaDecodeParams& params, void* stream);

// The same by Hopper's kernels, where plan.kernel is kSm90.
void launch_mla_decode_sm90(const MlaDecodeParams& params, void* stream);

// Writes each block's tasks to tasks[block, capacity]; of `params`, sizes, lengths and plan count.
void launch_mla_schedule(const MlaDecodeParams& params, MlaTask* tasks, int capacity, void* stream);

void launch_merge_attention_states(const MergeParams& params, void* stream);

}  // namespace k2k
