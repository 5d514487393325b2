#pragma once

#include <vector>

#include "newton_schulz/program.h"

namespace k2k {

struct NsCall {
    // Buffers and prefix sums are filled in by the launch. The first `num_standard` take the
    // standard iteration, the others the Gram one.
    std::vector<NsTensor> tensors;
    int num_standard;
    std::vector<NsStep> steps;
    std::vector<int> restarts;  // steps before which the Gram iteration recomputes X
    Type iterate_type;          // kFp16 or kBf16
    char* workspace;            // as config.h counts it
};

// Starts the kernels on `stream`, of the current device: the table, norm and cast, then one launch
// a stage. Nothing is started for empty inputs.
void launch_newton_schulz(const NsCall& call, void* stream);

}  // namespace k2k
