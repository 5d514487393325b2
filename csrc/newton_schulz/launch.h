#pragma once

#include <vector>

#include "newton_schulz/config.h"
#include "newton_schulz/program.h"

namespace k2k {

struct NsCall {
    // The launch fills in buffers and prefix sums. In this order, and as many of each as below: the
    // standard iteration by tiles, the Gram one, and small matrices of 1, 2 and 3 blocks.
    std::vector<NsTensor> tensors;
    std::vector<NsUpdate> updates;  // of each tensor, or none
    NsRule rule;                    // of the updates
    int counts[2 + kNsSmallMost];
    std::vector<NsStep> steps;
    Type iterate_type;  // kFp16 or kBf16
    char* workspace;    // 16-byte aligned, of workspace_bytes, as config.h counts them
    int64_t workspace_bytes;
    int capability;  // of the chip, x 10
};

// Starts the kernels on `stream`, of the current device: the tables, norm and cast, then one launch
// per stage and one for each size of small matrices. Nothing is started for empty inputs.
void launch_newton_schulz(const NsCall& call, void* stream);

// Launches a stage with the kernel for sm_90a.
void launch_newton_schulz_sm90(const NsStage& stage, Type iterate_type, unsigned tiles,
                               void* stream);

}  // namespace k2k
