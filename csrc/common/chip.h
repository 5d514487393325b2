#pragma once

namespace k2k {

// The properties of a GPU on which the choice of a kernel and of its grid depends; filled by
// `_launch.chip` in Python.
struct Chip {
    int capability;       // compute capability x 10
    int multiprocessors;  // SMs
    int shared_memory;    // bytes, at most, of one CTA
};

}  // namespace k2k
