#pragma once

#include "exchange/params.h"

namespace k2k {

// Each starts one kernel on `stream`, of the current device. `blocks`: at most so many CTAs send.
void launch_scatter(const ScatterParams& params, unsigned blocks, void* stream);
void launch_scatter_wait(const ScatterWaitParams& params, void* stream);
void launch_gather(const GatherParams& params, unsigned blocks, void* stream);
void launch_gather_wait(const GatherWaitParams& params, void* stream);

}  // namespace k2k
