#pragma once

// Grouped matrix products: D = A B^T for each of several groups, whose sizes are known on the
// device alone.

#include "common/macros.h"

namespace k2k::tile {

// How the work is cut into groups, one per matrix of B (wgrad: of D). offsets and counts are read
// on the device.
struct Groups {
    enum class Axis : int32_t {
        kMatrices,  // group g is matrix g of A, the first counts[g] rows of it (all if null)
        kRows,      // group g is the rows of A from offsets[g] on
        kK,         // group g is the part of K from offsets[g] on (wgrad)
    };
    const int32_t* offsets;  // [number + 1]
    const int32_t* counts;   // [number]; null: up to the next offset
    int32_t number;
    Axis axis;
};

}  // namespace k2k::tile
