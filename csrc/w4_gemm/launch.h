#pragma once

#include "common/chip.h"
#include "w4_gemm/params.h"

namespace k2k {

// Starts one kernel on `stream`, of the current device, which is `chip`; none for an empty D.
void launch_w4_gemm(const W4GemmParams& params, const Chip& chip, void* stream);

// The kernel for many rows per group, sm_90a.
void launch_w4_gemm_sm90_many(const W4GemmParams& params, const Chip& chip, void* stream);

}  // namespace k2k
