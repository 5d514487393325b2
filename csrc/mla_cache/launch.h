#pragma once

#include "mla_cache/params.h"

namespace k2k {

// Start the kernels on `stream`, of the current device. Nothing is started for no tokens.
void launch_mla_append(const MlaCacheParams& params, void* stream);
void launch_mla_gather(const MlaCacheParams& params, void* stream);

}  // namespace k2k
