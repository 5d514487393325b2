#pragma once

// Row kernels: 1x128 quantisation, SwiGLU, both fused, SwiGLU's gradient, and dequantisation.
//
//     codes[m, k], scales[m, k / 128] <- x[m, k]                             quantize_1x128
//     codes[m, i], scales[m, i / 128] <- silu(gate[m, i]) * up[m, i] * w[m]  swiglu_quantize
//     hidden[m, i]                    <- silu(gate[m, i]) * up[m, i]         swiglu
//     d_gate[m, i]                    <- grad[m, i] * up[m, i] * s * (1 + gate[m, i] * (1 - s))
//     d_up[m, i]                      <- grad[m, i] * gate[m, i] * s       s = sigmoid(gate[m, i])
//     values[m, k]                    <- codes[m, k] * scales[m / R, k / 128]  dequantize
//
// Tile      8 rows x 512 columns per CTA; grid-stride over tiles, see config.h. All warps have the
//           same role.
// Thread    16 contiguous elements of a row: 16-byte loads and stores, all else in registers. Eight
//           lanes have a block of 128; three shuffles give its maximum.
// In flight 32 bytes of bfloat16 per thread, 64 of gate and up: with 48 and 64 registers per thread
//           an SM holds five and four CTAs, 40 and 64 KiB; bandwidth x latency of DRAM needs 20 to
//           36 KiB. The gradient has 96 bytes per thread in flight.
// Scales    "row": a warp has four blocks of one row, whose scales are 16 contiguous bytes.
//           "column": a warp has one block of four rows, whose scales are then contiguous too.
// Barriers  with groups, two per row tile in RealRows::find; else none.
// Shared    one word per warp and one per CTA, to find out which rows are padding.
// Limits    rows that do not begin at multiples of 16 bytes, and the last columns of a row, are
//           moved element by element.

#include "arch/smem.cuh"
#include "quant/config.h"
#include "quant/row_groups.cuh"
#include "tile/e4m3_block.cuh"
#include "tile/silu.cuh"
#include "tile/sixteen.cuh"

namespace k2k {

using TileRows = RealRows<kTileRows, kRowThreads / 32>;

// Position of this thread in a tile.
struct RowPlace {
    int row;    // 0 to 7
    int block;  // 0 to 3
    int lane;   // 0 to 7, of a block
};

K2K_DEVICE RowPlace row_place(bool scales_by_column) {
    // "column": adjacent groups of 8 lanes have adjacent rows; "row": adjacent blocks of a row.
    const int block = threadIdx.x / 8, lane = threadIdx.x % 8;
    if (scales_by_column) return {block % kTileRows, block / kTileRows, lane};
    return {block / kTileBlocks, block % kTileBlocks, lane};
}

// Loads 16 columns of a row [gate | up] and computes silu(gate) * up.
template <class T>
K2K_DEVICE void load_swiglu(float (&hidden)[16], const T* row, int64_t column, int64_t columns) {
    const T* up_row = row + columns;
    tile::Sixteen<T> gate16, up16;
    // One branch for both, so that both loads are in flight: the compiler would wait for the first
    // at the end of a branch of its own.
    if (tile::in_vectors(row, column, columns) && tile::in_vectors(up_row, column, columns)) {
        gate16 = tile::load_vectors(row + column);
        up16 = tile::load_vectors(up_row + column);
    } else {
        gate16 = tile::load_elements(row, column, columns);
        up16 = tile::load_elements(up_row, column, columns);
    }
    float gate[16], up[16];
    tile::widen(gate, gate16);
    tile::widen(up, up16);
    K2K_UNROLL
    for (int i = 0; i < 16; ++i) hidden[i] = tile::silu(gate[i]) * up[i];
}

template <class T, bool kSwiglu>
__global__ void __launch_bounds__(kRowThreads, K2K_RESIDENT(kSwiglu ? 4 : 5))
    quantize_rows_kernel(const __grid_constant__ QuantizeParams p) {
    TileRows& real = arch::shared_storage<TileRows>();
    const bool by_column = p.scale_row_stride == 1;
    const bool grouped = p.groups.offsets != nullptr || p.groups.counts != nullptr;
    const RowPlace place = row_place(by_column);
    const int64_t row_tiles = ceil_div(p.rows, kTileRows);
    const int64_t blocks = ceil_div(p.columns, 128);

    for (int64_t tile = blockIdx.y; tile < p.batches * row_tiles; tile += gridDim.y) {
        const int64_t batch = p.batches == 1 ? 0 : tile / row_tiles;
        const int64_t first_row = (tile - batch * row_tiles) * kTileRows;
        const int64_t row = first_row + place.row;
        // Skip padding: find the tile's rows that belong to a group.
        bool is_real = row < p.rows;
        if (grouped) {
            real.find(p.groups, batch, first_row, p.rows);
            if (real.none()) continue;
            is_real = is_real && real.has(place.row);
        }
        const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride + row * p.x_row_stride;
        uint8_t* codes = p.codes + (batch * p.rows + row) * p.columns;
        float* scales = p.scales + batch * p.scale_batch_stride + row * p.scale_row_stride;

        for (int64_t first = int64_t(blockIdx.x) * kTileBlocks; first < blocks;
             first += int64_t(gridDim.x) * kTileBlocks) {
            const int64_t block = first + place.block;
            const int64_t column = block * 128 + place.lane * 16;
            const bool here = is_real && block < blocks;

            // Load 16 elements as float32.
            float values[16] = {};
            if (here && kSwiglu) {
                // SwiGLU: gate and up, then the row's weight.
                load_swiglu(values, x, column, p.columns);
                if (p.weights != nullptr) {
                    const float weight = p.weights[batch * p.rows + row];
                    K2K_UNROLL
                    for (int i = 0; i < 16; ++i) values[i] *= weight;
                }
            } else if (here) {
                tile::widen(values, tile::load_sixteen(x, column, p.columns));
            }

            // Reduce over the block's 8 lanes, padding included; then scale, encode, store.
            const float amax = tile::block_amax<8>(values);
            if (!here) continue;
            const float scale = tile::scale_of(amax, p.power_of_two);
            const uint4 words = tile::encode16(values, tile::divisor_of(scale));
            tile::store_sixteen(codes, column, p.columns, tile::sixteen_of(words));
            if (place.lane == 0) scales[block * p.scale_column_stride] = scale;
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, K2K_RESIDENT(4))
    swiglu_kernel(const __grid_constant__ SwigluParams p) {
    const RowPlace place = row_place(/*scales_by_column=*/false);
    for (int64_t tile = blockIdx.y; tile < ceil_div(p.rows, kTileRows); tile += gridDim.y) {
        const int64_t row = tile * kTileRows + place.row;
        if (row >= p.rows) continue;
        const T* gate_up = static_cast<const T*>(p.gate_up) + row * p.row_stride;
        T* hidden_row = static_cast<T*>(p.hidden) + row * p.columns;
        for (int64_t column =
                 int64_t(blockIdx.x) * kTileBlocks * 128 + (place.block * 8 + place.lane) * 16;
             column < p.columns; column += int64_t(gridDim.x) * kTileBlocks * 128) {
            // Load, compute in float32, round once, store.
            float hidden[16];
            load_swiglu(hidden, gate_up, column, p.columns);
            tile::Sixteen<T> result;
            tile::narrow(result, hidden);
            tile::store_sixteen(hidden_row, column, p.columns, result);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, K2K_RESIDENT(3))
    swiglu_backward_kernel(const __grid_constant__ SwigluBackwardParams p) {
    const RowPlace place = row_place(/*scales_by_column=*/false);
    for (int64_t tile = blockIdx.y; tile < ceil_div(p.rows, kTileRows); tile += gridDim.y) {
        const int64_t row = tile * kTileRows + place.row;
        if (row >= p.rows) continue;
        const T* grad_row = static_cast<const T*>(p.grad) + row * p.grad_row_stride;
        const T* gate_row = static_cast<const T*>(p.gate_up) + row * p.gate_up_row_stride;
        T* d_gate_row = static_cast<T*>(p.d_gate_up) + row * 2 * p.columns;
        for (int64_t column =
                 int64_t(blockIdx.x) * kTileBlocks * 128 + (place.block * 8 + place.lane) * 16;
             column < p.columns; column += int64_t(gridDim.x) * kTileBlocks * 128) {
            // Load all three before the first is used.
            const auto grad16 = tile::load_sixteen(grad_row, column, p.columns);
            const auto gate16 = tile::load_sixteen(gate_row, column, p.columns);
            const auto up16 = tile::load_sixteen(gate_row + p.columns, column, p.columns);
            float grad[16], gate[16], up[16];
            tile::widen(grad, grad16);
            tile::widen(gate, gate16);
            tile::widen(up, up16);

            // Compute both gradients in the registers of gate and up.
            K2K_UNROLL
            for (int i = 0; i < 16; ++i) {
                const float sigmoid = 1.0f / (1.0f + expf(-gate[i]));
                up[i] *= grad[i] * sigmoid * fmaf(gate[i], 1.0f - sigmoid, 1.0f);  // d_gate
                gate[i] *= grad[i] * sigmoid;                                      // d_up
            }

            // Round once and store both halves.
            tile::Sixteen<T> result;
            tile::narrow(result, up);
            tile::store_sixteen(d_gate_row, column, p.columns, result);
            tile::narrow(result, gate);
            tile::store_sixteen(d_gate_row + p.columns, column, p.columns, result);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 5)
    dequantize_kernel(const __grid_constant__ DequantizeParams p) {
    const RowPlace place = row_place(p.scale_row_stride == 1);
    const int64_t row_tiles = ceil_div(p.rows, kTileRows);
    for (int64_t tile = blockIdx.y; tile < p.batches * row_tiles; tile += gridDim.y) {
        const int64_t batch = p.batches == 1 ? 0 : tile / row_tiles;
        const int64_t row = (tile - batch * row_tiles) * kTileRows + place.row;
        if (row >= p.rows) continue;
        const uint8_t* codes = p.codes + batch * p.codes_batch_stride + row * p.codes_row_stride;
        // 1x128 or 128x128 scales.
        const float* scales = p.scales + batch * p.scale_batch_stride +
                              (p.block_rows == 1 ? row : row / 128) * p.scale_row_stride;
        T* values_row = static_cast<T*>(p.values) + (batch * p.rows + row) * p.columns;
        for (int64_t block = int64_t(blockIdx.x) * kTileBlocks + place.block;
             block * 128 + place.lane * 16 < p.columns; block += int64_t(gridDim.x) * kTileBlocks) {
            const int64_t column = block * 128 + place.lane * 16;
            // Load codes and the block's scale.
            const auto sixteen = tile::load_sixteen(codes, column, p.columns);
            const float scale = scales[block * p.scale_column_stride];
            // Multiply in float32, round once, store.
            float values[16];
            K2K_UNROLL
            for (int i = 0; i < 16; ++i) {
                values[i] = arch::to_float(e4m3{tile::element_of(sixteen, i)}) * scale;
            }
            tile::Sixteen<T> result;
            tile::narrow(result, values);
            tile::store_sixteen(values_row, column, p.columns, result);
        }
    }
}

}  // namespace k2k
