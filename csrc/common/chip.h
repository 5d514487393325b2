#pragma once

namespace k2k {

// What the choice of a kernel and of its grid depends on; `_launch.chip` in Python asks for it.
struct Chip {
    int capability;       // compute capability x 10
    int multiprocessors;  // that a grid should fill
    int shared_memory;    // bytes that one block may ask for
};

}  // namespace k2k
