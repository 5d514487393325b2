#pragma once

#include "common/chip.h"
#include "w4_gemm/params.h"

namespace k2k {

// Starts one kernel on `stream`, of the current device, which is `chip`; none for an empty D.
void launch_w4_gemm(const W4GemmParams& params, const Chip& chip, void* stream);

// The same by the kernel for few rows of a group; of sm_90a alone.
void launch_w4_gemm_sm90_few(const W4GemmParams& params, const Chip& chip, void* stream);

// By the kernel for many rows of a group; of sm_90a alone.
void launch_w4_gemm_sm90_many(const W4GemmParams& params, const Chip& chip, void* stream);

}  // namespace k2k
