#pragma once

// Kernel parameters. Sizes and strides are in elements of the tensor.

#include "common/dtypes.h"

namespace k2k {

enum class MlaDecodeKernel : int32_t { kSm80, kSm90 };  // kernel_sm80.cuh, kernel_sm90.cuh

// How the work of a call is laid out; config.h makes it, Python allocates by it.
struct MlaDecodePlan {
    int tile_rows;     // rows of q (query tokens x heads) of a CTA's tile: 16, 32 or 64
    int stages;        // of the ring of keys
    int teams;         // each takes its share of all keys of the batch ...
    int team_size;     // ... by as many CTAs, which divide the tiles of a sequence
    int split_blocks;  // keys are cut at multiples of so many blocks; 0: where shares end
    int64_t partials;  // tiles that the workspace holds
    MlaDecodeKernel kernel;
};

// Where the partial results of one row are if its keys were split: the number of parts, and which
// row of the workspace is the first.
struct SplitRow {
    int32_t parts;  // 1: the row is finished
    int32_t first;
};

struct MlaDecodeParams {
    const void* q;                // [tokens, heads, 576]
    const void* cache;            // [pages, page_size, 576] or, in bytes, [pages, page_size, 656]
    const int32_t* block_table;   // [batch, max_pages]
    const int32_t* seq_lens;      // [batch]
    const int32_t* cu_seqlens_q;  // [batch + 1]; null: every sequence has queries_per_sequence
    void* out;                    // [tokens, heads, 512]
    float* lse;                   // [tokens, heads], natural
    float* max_logits;            // [tokens, heads], or null
    float* partial_out;           // [partials, tile_rows, 512]
    float2* partial_stats;        // [partials, tile_rows]: base-2 lse, largest logit
    SplitRow* split_rows;         // [tokens, heads]
    Type type;                    // of q and out
    Type cache_type;              // as type, or kU8: rows of 656 bytes
    int64_t q_token_stride, q_head_stride;
    int64_t page_stride, slot_stride;  // of the cache
    int64_t table_stride;
    int64_t out_token_stride, out_head_stride;
    int64_t pages, tokens;  // tokens: of q
    int32_t batch, heads, page_size, queries_per_sequence;
    int32_t capacity;  // keys that a row of the block table can name
    float scale;
    bool causal;
    MlaDecodePlan plan;
};

// Some keys of one tile of rows.
struct MlaTask {
    int sequence;
    int first_token;  // of the sequence, in q
    int queries;      // of the sequence
    int seq_len;
    int first_row, num_rows;  // of the tile; rows of the sequence are query * heads + head
    int first_key, end_key;
    int border;  // all rows see the keys before it; later rows may see more
    int split, num_splits;
    int partial;  // tile of the workspace; -1 if the tile is not split
    bool last;    // there are no more tasks: the other fields are undefined
};

// merge_attention_states: joins results over two disjoint sets of keys.
struct MergeParams {
    const void *out_a, *out_b;   // [rows, columns], contiguous
    const float *lse_a, *lse_b;  // [rows], natural
    void* out;
    float* lse;
    Type type;  // of all out
    int64_t rows, columns;
};

}  // namespace k2k
