#pragma once

#include "scale_rows/params.h"

namespace k2k {

// Starts the kernel on `stream`, of the current device. Nothing is started for empty inputs.
void launch_scale_rows(const ScaleRowsParams& params, void* stream);

}  // namespace k2k
