#pragma once

#include "mla_cache/params.h"

namespace k2k {

// Each starts one kernel on `stream`, of the current device; none without tokens.
void launch_mla_append(const MlaCacheParams& params, void* stream);
void launch_mla_gather(const MlaCacheParams& params, void* stream);

}  // namespace k2k
