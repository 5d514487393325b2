#pragma once

// The rows of a task's tile: token and head, place in out and workspace, mask, statistics.

#include "mla_decode/schedule.cuh"
#include "tile/online_softmax.cuh"
#include "tile/pack.cuh"

namespace k2k {

using tile::kLn2;
using tile::kLog2E;
using tile::pack;

struct MlaRow {
    int64_t token;  // in q
    int head;
    int border;  // sees keys [0, border)
};

K2K_DEVICE MlaRow mla_row(const MlaDecodeParams& p, const MlaTask& task, int tile_row) {
    const int row = task.first_row + tile_row, query = row / p.heads;
    const int border = p.causal ? task.seq_len - task.queries + query + 1 : task.seq_len;
    return {task.first_token + query, row - query * p.heads, border};
}

// Where column `column` of the row is in the output.
template <class T>
K2K_DEVICE T* out_at(const MlaDecodeParams& p, const MlaRow& place, int column) {
    return static_cast<T*>(p.out) + place.token * p.out_token_stride +
           place.head * p.out_head_stride + column;
}

// The row of the workspace for row `tile_row` of a task with partial >= 0.
K2K_DEVICE int64_t partial_row(const MlaDecodeParams& p, const MlaTask& task, int tile_row) {
    return int64_t(task.partial) * p.plan.tile_rows + tile_row;
}

// Masks this thread's row h (`tile_row` of the tile) from the row's border or the end of the task's
// keys on. `key`: the key of scores[0][2 h].
template <int kTiles>
K2K_DEVICE void mask_row(float (&scores)[kTiles][4], const MlaDecodeParams& p, const MlaTask& task,
                         int tile_row, int h, int key) {
    const int border = mla_row(p, task, tile_row).border;
    tile::mask_row(scores, h, key, border < task.end_key ? border : task.end_key);
}

// Stores lse and the largest logit of this thread's row h (`tile_row` of the tile): as results, or
// to the workspace if the task is a part. The first split also stores the row's SplitRow for
// kernel_combine.cuh. One thread of the quad calls it.
K2K_DEVICE void store_stats(const MlaDecodeParams& p, const MlaTask& task,
                            const tile::OnlineSoftmax& softmax, const MlaRow& place, int tile_row,
                            int h) {
    const int64_t row = place.token * p.heads + place.head;
    const float lse2 = softmax.lse2(p.scale * kLog2E, h), largest = softmax.max_logit(p.scale, h);
    const int64_t part = partial_row(p, task, tile_row);
    if (task.partial < 0) {
        p.lse[row] = lse2 * kLn2;
        if (p.max_logits != nullptr) p.max_logits[row] = largest;
    } else {
        p.partial_stats[part] = make_float2(lse2, largest);
    }
    if (task.split == 0) p.split_rows[row] = {task.num_splits, static_cast<int>(part)};
}

}  // namespace k2k
