#pragma once

// Products of tokens with packed 4-bit weights, on every GPU from sm_80 on:
//
//     D[s, n] = sum over k of A[s, k] W[g, n, k]            s: the slots of group g
//     D[s, i] = silu(gate[s, i]) * up[s, i]                 with SwiGLU: gate and up, rounded to
//                                                           bf16, are the products of W's halves
//     W = bf16(q * s), rounded once
//
// Grid      Persistent CTAs, as many as fit; CTA i takes tiles i, i + grid, ... of the tile
//           scheduler tile/group_tiles.cuh, which reads the groups' sizes on the device.
// Warps     Four, side by side in the 128 rows of weights of a tile: each copies, multiplies and
//           stores 16 or 64 tokens x 32 rows of weights.
// Ring      Three stages of two steps (16 tokens) or one step, filled by cp.async. A step is 64 of K:
//           the tokens' rows, 128 bytes each, chunk c of row r at c ^ (r % 8); and two chunks of
//           packed weights, as they lie in memory.
// Weights   are B of mma 16 x 8 x 16. A lane reads the codes of 16 rows x 64 of K that its fragments
//           need as 16 bytes, word 2 r + c: row g + 8 r, group c; the scales of its two rows as 8
//           bytes (int4) or 4. Without a swizzle no two lanes of a load collide. They are decoded
//           in registers (decode.cuh), 16 of K at a time.
// Gated     blocks of 16 rows are 8 of gate and 8 of up: a lane has gate i in its even, up i in its
//           odd tiles of 8 columns.
// Barriers  One sync_block per stage: all threads' copies of the stage have landed, and the stage
//           that is filled next is no longer read.
// Tiles     The ring continues across tiles: the next tile's first stages load during this one's
//           epilogue. They overwrite stages that were read before the last sync_block.
// Order     of a sum: 16 of K at a time, from the first on, in either tile: the bits of
//           grouped_gemm_kernel with the decoded weights.
// Edges     Tokens outside a group and K behind the end become zeros and are not read; so do chunks
//           behind the last row of weights. Rows and columns outside D are not stored.
// Issue     A step is 8,192 weights, 64 for each lane. For it a warp issues 140 instructions (int4)
//           or 160 (mxfp4) with 16 tokens, of which 88 or 104 decode; 231 or 248 with 64 tokens.
// Shared    39 KB for 16 tokens, 37.5 KB for 64.
// Registers at most 128 (16 tokens: four CTAs per SM) or 168 (64: three).
// Limits    rows of A begin at multiples of 16 bytes; K is a multiple of 32; bf16.

#include "arch/cp_async.cuh"
#include "arch/matrix.cuh"
#include "arch/mma.cuh"
#include "arch/smem.cuh"
#include "tile/group_tiles.cuh"
#include "tile/store_row.cuh"
#include "tile/swizzle.cuh"
#include "w4_gemm/decode.cuh"
#include "w4_gemm/swiglu.cuh"

namespace k2k {

// The tokens of a step, rows of 64 of K, and the copies of a thread into them: 16 bytes of every
// 16th row. Rows outside the group and K behind the end become zeros; their addresses are not read.
template <class Tile>
class TokenPanel {
  public:
    static constexpr int kRowBytes = kChunkDepth * 2;
    static constexpr int kBytes = Tile::kTokens * kRowBytes;

    // `panel`: that of the ring's first step.
    K2K_DEVICE explicit TokenPanel(uint32_t panel) {
        const int row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
        target_ = arch::kept(panel + tile::chunk_offset<kRowBytes>(row, chunk));
        column_ = static_cast<int>(arch::kept(chunk * 8));
    }

    // Sets the first 16 bytes of this thread: row `row` of A, of which `rows_left` are the group's.
    K2K_DEVICE void begin(const W4GemmParams& p, int64_t row, int rows_left) {
        const int own = threadIdx.x / kRowChunks;
        source_ = p.a + (row + own) * p.a_row_stride + column_;
        rows_ = rows_left - own;
    }

    // Starts the copies of the next 64 of K, of which `left` remain, a multiple of 32.
    K2K_DEVICE void copy(const W4GemmParams& p, uint32_t step, int left) {
        const int rows = column_ < left ? rows_ : 0;
        K2K_UNROLL
        for (int below = 0; below < Tile::kTokens; below += kStep) {
            arch::cp_async(target_ + step + below * kRowBytes, source_ + below * p.a_row_stride,
                           below < rows);
        }
        source_ += kChunkDepth;
    }

  private:
    static constexpr int kRowChunks = kRowBytes / 16;
    static constexpr int kStep = Tile::kThreads / kRowChunks;  // rows between a thread's copies
    static_assert(kStep % 8 == 0, "the swizzle is that of the first row");

    uint32_t target_;  // in the first step
    int column_;
    const bf16* source_;
    int rows_;  // of the group, from the thread's first on
};

// The packed weights of a step, two chunks one below the other, and the copies of a thread into
// them: half of the threads for each chunk, 16 bytes two or three times. A chunk behind the last
// row of weights becomes zeros; its address is not read.
template <class Kind, class Tile>
class WeightPanel {
  public:
    static constexpr int kChunkBytes = chunk_bytes<Kind>;
    static constexpr int kChunks = Tile::kWeights / kChunkRows;
    static constexpr int kBytes = kChunks * kChunkBytes;

    // `panel`: that of the ring's first step.
    K2K_DEVICE explicit WeightPanel(uint32_t panel) {
        target_ = arch::kept(panel + threadIdx.x / kThreads * kChunkBytes + own() + kStep);
        copies_last_ = arch::kept(own()) < kChunkBytes % kStep;
    }

    // Sets the first 16 bytes of this thread, in row `row` of the chunks of `group`.
    K2K_DEVICE void begin(const W4GemmParams& p, int group, int row) {
        row += threadIdx.x / kThreads;
        exists_ = row < p.chunk_rows;
        source_ =
            p.w + (group * p.chunk_rows + row) * p.chunk_columns * kChunkBytes + own() + kStep;
    }

    // Starts the copies of the next 64 of K, zeros where there are none.
    K2K_DEVICE void copy(uint32_t step, bool any) {
        K2K_UNROLL
        for (int at = -kStep; at + kStep < kChunkBytes; at += kStep) {
            if (at + 2 * kStep <= kChunkBytes || copies_last_) {
                arch::cp_async(target_ + step + at, source_ + at, exists_ && any);
            }
        }
        source_ += kChunkBytes;
    }

  private:
    static constexpr int kThreads = Tile::kThreads / kChunks;  // of a chunk
    static constexpr int kStep = kThreads * 16;                // bytes between a thread's copies
    static_assert(kChunkBytes % kStep != 0);

    K2K_DEVICE static uint32_t own() { return threadIdx.x % kThreads * 16; }

    // Of the thread's second copy, from which the distances to the others are short: in the first
    // step, and in memory.
    uint32_t target_;
    const uint8_t* source_;
    bool exists_, copies_last_;
};

template <class Kind, class Tile>
struct W4Panels {
    using A = TokenPanel<Tile>;
    using W = WeightPanel<Kind, Tile>;
    struct alignas(128) Storage {
        struct Step {
            uint8_t a[A::kBytes], w[W::kBytes];
        } steps[Tile::kStages * Tile::kSteps];
    };
    static_assert(sizeof(typename Storage::Step) % 128 == 0, "the swizzle is that of 128 bytes");
};

// Where this lane reads in the first step of the ring.
struct StepPlaces {
    uint32_t a;                     // by ldmatrix
    const uint8_t *codes, *scales;  // of the first of the warp's two blocks of 16 rows
};

// sums += A W^T of a step, `step` bytes behind the places, for the warp's tokens x 32 weights:
// [16 tokens][8 weights][fragment].
template <class Kind, class Tile>
K2K_DEVICE void multiply_step(float (&sums)[Tile::kTokens / 16][4][4], const StepPlaces& places,
                              int step) {
    // Read the codes and scales of both blocks of 16 rows.
    uint32_t words[2][4];
    W4Scales scales[2];
    K2K_UNROLL
    for (int block = 0; block < 2; ++block) {
        const uint4 codes = reinterpret_cast<const uint4*>(places.codes + step)[block * 32];
        words[block][0] = codes.x;
        words[block][1] = codes.y;
        words[block][2] = codes.z;
        words[block][3] = codes.w;
        read_scales<Kind>(scales[block], places.scales + step + block * 32 * Kind::kScaleBytes);
    }
    K2K_UNROLL
    for (int depth = 0; depth < kChunkDepth / 16; ++depth) {
        // Decode fragments of W: 16 of K x 32 rows.
        const int group = depth / 2;
        uint32_t w_words[4][2];
        K2K_UNROLL
        for (int j = 0; j < 4; ++j) {
            K2K_UNROLL
            for (int i = 0; i < 2; ++i) {
                w_words[j][i] = decode_pair<Kind>(words[j / 2][j % 2 * 2 + group],
                                                  depth % 2 * 2 + i, scales[j / 2][j % 2][group]);
            }
        }
        K2K_UNROLL
        for (int i = 0; i < Tile::kTokens / 16; ++i) {
            // Load a fragment of A, 16 tokens, and multiply it with all weights.
            uint32_t a_words[4];
            arch::ldmatrix(a_words, (places.a ^ depth * 32) + step + i * 16 * kChunkDepth * 2);
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) arch::mma_sync<bf16>(sums[i][j], a_words, w_words[j]);
        }
    }
}

template <class Kind, bool kSwiglu, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, K2K_RESIDENT(Tile::kCtas))
    w4_gemm_kernel(const __grid_constant__ W4GemmParams p) {
    using Panels = W4Panels<Kind, Tile>;
    using Storage = typename Panels::Storage;
    constexpr int kStep = sizeof(typename Storage::Step), kStage = kStep * Tile::kSteps;
    constexpr int kRatio = kSwiglu ? 2 : 1;  // rows of weights for a column of D
    Storage& storage = arch::shared_storage<Storage>();
    const uint32_t ring = arch::smem_address(&storage);
    const int warp = arch::warp_id(), lane = arch::lane_id(), block = warp % 2 * 2;
    const uint8_t* chunk = storage.steps[0].w + warp / 2 * Panels::W::kChunkBytes;
    const StepPlaces places{tile::ldmatrix_address<true, false, Panels::A::kRowBytes>(ring, 0, 0),
                            chunk + (block * 32 + lane) * 16,
                            chunk + kCodeBytes + (block * 8 + lane / 4) * 4 * Kind::kScaleBytes};

    typename Panels::A a_panel(ring);
    typename Panels::W w_panel(ring + Panels::A::kBytes);
    uint32_t filled = 0, read = 0;  // offsets of the stages that are filled and read next
    int left = 0;                   // of K, not yet loaded; of it goes 64 per stage, read or not
    const auto next = [](uint32_t& stage) {
        stage = stage + kStage == sizeof(Storage) ? 0 : stage + kStage;
    };
    // Fills the next stage of the ring; at a tile's end commits an empty cp.async group, so that
    // cp_async_wait counts stages.
    const auto fill = [&] {
        if (left > 0) {
            K2K_UNROLL
            for (int step = 0; step < Tile::kSteps; ++step) {
                a_panel.copy(p, filled + step * kStep, left - step * kChunkDepth);
                w_panel.copy(filled + step * kStep, step == 0 || left > step * kChunkDepth);
            }
            next(filled);
        }
        left -= Tile::kDepth;
        arch::cp_async_commit();
    };

    tile::GroupTiles tiles({p.groups, p.rows, p.columns, p.depth}, Tile::kTokens,
                           Tile::kWeights / kRatio, kW4BandRows);
    tile::GroupTile found;
    int index = blockIdx.x;
    const auto find = [&] {
        // Find the next tile of this CTA from the groups' sizes in device memory.
        const bool is_one = tiles.find(index, found);
        index += gridDim.x;
        if (!is_one) return false;
        a_panel.begin(p, found.first_row + found.row, found.rows - found.row);
        w_panel.begin(p, found.group, found.column * kRatio / kChunkRows);
        // Prologue: start the loads of all stages but one.
        left = static_cast<int>(p.depth);
        K2K_NO_UNROLL
        for (int i = 0; i < Tile::kStages - 1; ++i) fill();
        return true;
    };

    for (bool more = find(); more;) {
        // Main loop over K.
        const tile::GroupTile tile = found;
        float sums[Tile::kTokens / 16][4][4] = {};
        K2K_NO_UNROLL
        while (left > -(Tile::kStages - 1) * Tile::kDepth) {
            // Wait for the oldest stage of all threads; refill the stage that was read before it.
            arch::cp_async_wait<Tile::kStages - 2>();
            arch::sync_block();
            fill();
            const StepPlaces in_stage{places.a + read, places.codes + read, places.scales + read};
            K2K_UNROLL
            for (int step = 0; step < Tile::kSteps; ++step) {
                multiply_step<Kind, Tile>(sums, in_stage, step * kStep);
            }
            next(read);
        }
        // Start the loads of the next tile before this tile's epilogue.
        more = find();

        // Epilogue: round and store.
        const int row = tile.row + lane / 4;
        const int column = tile.column + warp * Tile::kWarpWeights / kRatio + lane % 4 * 2;
        bf16* d = p.d + (tile.first_row + row) * p.d_row_stride + column;
        K2K_UNROLL
        for (int i = 0; i < Tile::kTokens / 16; ++i) {
            K2K_UNROLL
            for (int h = 0; h < 2; ++h) {
                const int below = 16 * i + 8 * h;
                const int64_t columns = row + below < tile.rows ? p.columns - column : 0;
                bf16* to = d + below * p.d_row_stride;
                if constexpr (kSwiglu) {
                    // A quad stores 16 contiguous bytes for each block of 16 rows of weights.
                    const bool aligned =
                        p.d_row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(p.d) % 4 == 0;
                    K2K_UNROLL
                    for (int b = 0; b < 2; ++b) {
                        const uint32_t pair =
                            swiglu_pair(sums[i][2 * b] + 2 * h, sums[i][2 * b + 1] + 2 * h);
                        if (aligned && 8 * b + 1 < columns) {
                            *reinterpret_cast<uint32_t*>(to + 8 * b) = pair;
                        } else {
                            K2K_UNROLL
                            for (int e = 0; e < 2; ++e) {
                                if (8 * b + e < columns)
                                    to[8 * b + e] = bf16{static_cast<uint16_t>(pair >> 16 * e)};
                            }
                        }
                    }
                } else {
                    // A quad transposes its columns: 16 bytes per lane.
                    const bool aligned =
                        p.d_row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(p.d) % 16 == 0;
                    float values[16];
                    K2K_UNROLL
                    for (int j = 0; j < 16; ++j) values[j] = sums[i][j / 4][j % 4];
                    tile::store_row(to, values, h, columns, aligned);
                }
            }
        }
    }
    // Do not exit with copies in flight.
    arch::cp_async_wait<0>();
}

}  // namespace k2k
