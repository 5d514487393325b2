#pragma once

#include "fp8_gemm/config.h"
#include "fp8_gemm/params.h"

namespace k2k {

// Starts the plan's kernel on `stream`, of the current device, which is `chip`; nothing if D is
// empty.
void launch_fp8_gemm(const Fp8GemmParams& params, const GemmPlan& plan, const Chip& chip,
                     void* stream);

// The same for the kernels of sm_90a: the large ones, the small ones.
void launch_fp8_gemm_sm90(const Fp8GemmParams& params, const GemmPlan& plan, const Chip& chip,
                          void* stream);
void launch_fp8_gemm_sm90_small(const Fp8GemmParams& params, const GemmPlan& plan, const Chip& chip,
                                void* stream);

}  // namespace k2k
