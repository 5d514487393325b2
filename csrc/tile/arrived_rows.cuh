#pragma once

// A walk over the rows that exist, where there is room for more.

#include "common/macros.h"

namespace k2k {

// Rows of several sources, with room for `each` of every one, of which the first told[source]
// exist. told null: all of them.
struct ToldRows {
    const int32_t* told;  // [sources], in device memory
    int sources;
    int64_t each;
};

K2K_DEVICE int64_t rows_of(const ToldRows& rows, int source) {
    return rows.told == nullptr ? rows.each : rows.told[source];
}

// Over tasks of rows that exist: `pieces` of each row, row by row and source by source.
struct ToldWalk {
    int64_t task;  // among those of `source`
    int source = 0;

    K2K_DEVICE explicit ToldWalk(int64_t first) : task(first) {}

    // Whether there is a task here.
    K2K_DEVICE bool find(const ToldRows& rows, int64_t pieces) {
        while (source < rows.sources) {
            const int64_t tasks = rows_of(rows, source) * pieces;
            if (task < tasks) return true;
            task -= tasks;
            ++source;
        }
        return false;
    }

    K2K_DEVICE void step(int64_t tasks) { task += tasks; }

    K2K_DEVICE int64_t row(const ToldRows& rows, int64_t pieces) const {
        return source * rows.each + task / pieces;
    }
};

}  // namespace k2k
