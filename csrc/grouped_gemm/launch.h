#pragma once

#include "grouped_gemm/params.h"

namespace k2k {

// Starts one kernel on `stream`, of the current device, which has so many SMs; none for an empty D.
void launch_grouped_gemm(const GroupedGemmParams& params, int multiprocessors, void* stream);

}  // namespace k2k
