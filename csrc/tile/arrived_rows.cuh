#pragma once

// Warp tasks over the rows that arrived from other ranks, in a buffer with capacity for more.

#include "common/macros.h"

namespace k2k {

// Rows [sources, capacity] of which the first counts[source] of each source arrived.
struct ArrivedRows {
    const int32_t* counts;  // [sources], in device memory; null: all rows arrived
    int sources;
    int64_t capacity;  // of a source
};

K2K_DEVICE int64_t rows_of(const ArrivedRows& rows, int source) {
    return rows.counts == nullptr ? rows.capacity : rows.counts[source];
}

// Grid-stride iterator over tasks: `pieces` per arrived row, in the order of sources and rows.
struct ArrivedTasks {
    int64_t task;  // among those of `source`
    int source = 0;

    K2K_DEVICE explicit ArrivedTasks(int64_t first) : task(first) {}

    // Moves to the source that has this task; false when there is none.
    K2K_DEVICE bool find(const ArrivedRows& rows, int64_t pieces) {
        while (source < rows.sources) {
            const int64_t tasks = rows_of(rows, source) * pieces;
            if (task < tasks) return true;
            task -= tasks;
            ++source;
        }
        return false;
    }

    K2K_DEVICE void step(int64_t tasks) { task += tasks; }

    K2K_DEVICE int64_t row(const ArrivedRows& rows, int64_t pieces) const {
        return source * rows.capacity + task / pieces;
    }
};

}  // namespace k2k
