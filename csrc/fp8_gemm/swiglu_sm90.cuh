#pragma once

// Quantised SwiGLU epilogue of the large kernel for sm_90a:
//
//     codes[m, i], scales[m, i / 128] <- silu(gate[m, i]) * up[m, i] * w[m]
//
// Warpgroup 0 has gate, warpgroup 1 up, as float32 accumulators of the same 128 rows and 128
// columns. Nothing is rounded in between.
//
// Exchange  Warpgroup 0 sends gate of rows 64 to 127 and receives up of rows 0 to 63; warpgroup 1
//           does the reverse. Both have the same register layout, so each thread exchanges with one
//           thread, and warp w with warp w: 64 columns at a time, 16 KB each way.
// Rows      Warpgroup w then has rows 64 w to 64 w + 63 of both, each row in the four lanes of a
//           quad: two shuffles give amax, and a transpose in the quad makes each lane store 16
//           contiguous bytes.

#include "fp8_gemm/pipeline_sm90.cuh"
#include "tile/e4m3_block.cuh"
#include "tile/silu.cuh"

namespace k2k {

struct SwigluExchange {
    float4 given[2][8][128];  // [warpgroup][four accumulators][thread]
};

// Quantises and stores 128 columns of a row of silu(gate) * up. Lane t of the quad has columns
// 8 j + 2 t + e in hidden[2 j + e]. All lanes of the warp call it; only `real` rows are stored.
K2K_DEVICE void store_codes(const float (&hidden)[32], const Fp8GemmParams& p, const GemmTile& tile,
                            int row, bool real) {
    // One scale for the 128 columns: amax over the quad.
    const float amax = tile::block_amax<4>(hidden);
    const float scale = tile::scale_of(amax, p.d_scales.power_of_two);
    const tile::Divisor divisor = tile::divisor_of(scale);
    const int t = arch::lane_id() % 4;
    auto* codes = static_cast<uint8_t*>(p.d) + tile.group * p.d_matrix_stride +
                  (tile.first_row + row) * p.d_row_stride + tile.column;
    K2K_UNROLL
    for (int first = 0; first < 32; first += 16) {
        uint32_t words[4];  // two pairs of adjacent columns each
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float* four = hidden + first + 4 * i;
            words[i] = tile::encode4(four[0], four[1], four[2], four[3], divisor);
        }
        // Lane t now has columns 16 t to 16 t + 15, a word from each lane: put them in order.
        tile::transpose_quad(words);
        const uint4 sixteen = make_uint4(
            (words[0] & 0xffff) | words[1] << 16, (words[2] & 0xffff) | words[3] << 16,
            words[0] >> 16 | (words[1] & 0xffff0000), words[2] >> 16 | (words[3] & 0xffff0000));
        if (real) arch::store(reinterpret_cast<uint4*>(codes + 4 * first + 16 * t), sixteen);
    }
    if (real && t == 0) {
        p.d_scales.values[tile.group * p.d_scales.matrix_stride +
                          (tile.first_row + row) * p.d_scales.row_stride +
                          tile.column / 128 * p.d_scales.column_stride] = scale;
    }
}

// Epilogue of a tile: `first` and `last` are the warpgroup's accumulators of rows 0 .. 63 and 64 ..
// 127, of gate in warpgroup 0, of up in warpgroup 1.
K2K_DEVICE void finish_swiglu(SwigluExchange& exchange, const Fp8GemmParams& p, float (&first)[64],
                              float (&last)[64], const GemmTile& tile, int warpgroup) {
    const int thread = threadIdx.x % 128, warp = thread / 32;
    // Swap in warpgroup 1, so that both keep `first` and send `last`.
    K2K_UNROLL
    for (int i = 0; i < 64; ++i) {
        const float kept = warpgroup == 0 ? first[i] : last[i];
        last[i] = warpgroup == 0 ? last[i] : first[i];
        first[i] = kept;
    }
    K2K_UNROLL
    for (int half = 0; half < 64; half += 32) {
        K2K_UNROLL
        for (int i = 0; i < 8; ++i) {
            const float* four = last + half + 4 * i;
            exchange.given[warpgroup][i][thread] = make_float4(four[0], four[1], four[2], four[3]);
        }
        // Wait for the same warp of the other warpgroup, then read what it wrote.
        arch::barrier_sync(kSwigluBarrier + warp, 64);
        K2K_UNROLL
        for (int i = 0; i < 8; ++i) {
            const float4 four = exchange.given[1 - warpgroup][i][thread];
            float* to = last + half + 4 * i;
            to[0] = four.x;
            to[1] = four.y;
            to[2] = four.z;
            to[3] = four.w;
        }
        // Wait until both warps have read, before the buffer is written again.
        arch::barrier_sync(kSwigluBarrier + warp, 64);
    }

    // Quantise this lane's two rows of the warpgroup's 64.
    const int row = tile.row + 64 * warpgroup + 16 * warp + arch::lane_id() / 4;
    const bool column_is_real = tile.column < p.b.rows / 2;
    K2K_UNROLL
    for (int h = 0; h < 2; ++h) {
        const bool real = column_is_real && row + 8 * h < tile.rows;
        const float weight =
            p.row_weights != nullptr && real ? row_weight(p, tile, row + 8 * h) : 1;
        float hidden[32];
        K2K_UNROLL
        for (int i = 0; i < 32; ++i) {
            const int at = i / 2 * 4 + 2 * h + i % 2;
            const float gate = warpgroup == 0 ? first[at] : last[at];
            const float up = warpgroup == 0 ? last[at] : first[at];
            hidden[i] = tile::silu(gate) * up * weight;
        }
        store_codes(hidden, p, tile, row + 8 * h, real);
    }
}

}  // namespace k2k
