#pragma once

#include <map>
#include <string>

namespace k2k::conformance {

// Starts a kernel on `stream` of the current device. kernels.cuh describes the memory at the two
// addresses, which are multiples of 256.
using Launch = void (*)(const void* input, void* output, void* stream);
using Launches = std::map<std::string, Launch>;

const Launches& launches();       // for every chip
const Launches& launches_sm90();  // for sm_90a

}  // namespace k2k::conformance
