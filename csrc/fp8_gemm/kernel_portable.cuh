#pragma once

// D[m, n] = w[m] (sum over blocks of 128 of K of
//                 (sum of A[m, k] B[n, k]) a_scale[m, block] b_scale[n, block]) + bias[n] + C[m, n]
//
// for each group, with w, bias and C optional, on every GPU from sm_80 on.
//
// Grid      Persistent CTAs of 8 warps, as many as fit; CTA i takes tiles i, i + grid, ... of
//           schedule.cuh. The multistage cp.async pipeline continues across tiles: a tile's
//           epilogue overlaps the next one's loads.
// Warps     All warps load, multiply and store. Each has kWarpRows x kWarpColumns of the tile:
//           128x128 2 x 4 warps of 64x32, 64x128 2 x 4 of 32x32, 16x128 8 of 16x16.
// Stage     128 of K: rows of 128 bytes by cp.async, 16-byte chunk c of row r at c ^ (r % 8), and a
//           scale for every row of A and of B, by cp.async of 4 bytes: any strides, 1x128 or
//           128x128 blocks.
// Barriers  One sync_block per stage: all threads' copies of it have landed, and the stage that is
//           filled next is no longer read. Before sm_89 two per tile for the NaN flags.
// Products  From sm_89 on mma of e4m3. Before, e4m3 codes become fp16 in registers: the low 7 bits,
//           moved to fp16's exponent and mantissa, are the value times 2^-8, exactly, denormals
//           included. Four codes take seven integer instructions; their order along K changes, in A
//           and B alike.
// NaN       would be decoded to the number 480. Each thread searches the chunks that it copied, and
//           results of a row of A or B that has one are overwritten with NaN before the epilogue.
// Order     float32 sums inside a block of K, then * (a_scale * b_scale) and added, block by block.
// Shared    stages x (tile_rows + tile_columns) x 132 bytes: 132 KB for 128x128 and 4 stages.
// Limits    rows of A and B begin at multiples of 16 bytes.

#include "arch/cp_async.cuh"
#include "arch/matrix.cuh"
#include "arch/mma.cuh"
#include "arch/smem.cuh"
#include "fp8_gemm/config.h"
#include "fp8_gemm/epilogue.cuh"
#include "tile/swizzle.cuh"

namespace k2k {

template <int kRows>
struct PortableOperand {
    uint8_t codes[kRows * kBlockK];  // [row][128], swizzled
    float scales[kRows];
};

template <class Tile>
struct alignas(128) PortableStorage {
    struct Stage {
        PortableOperand<Tile::kRows> a;
        PortableOperand<Tile::kColumns> b;
    } stages[Tile::kStages];
    GemmTile tiles[Tile::kThreads / 32][Tile::kStages];  // [warp][tiles in flight]
    bool a_nan[Tile::kRows], b_nan[Tile::kColumns];      // operand rows that contain a NaN
};

// ---- loading: thread t copies chunk t % 8 of rows t / 8, t / 8 + 32, ..., and the scale of row t

// Starts the copies of 128 of K from k on, for the tile's rows from `row` on. Codes and scales
// beyond `rows` or k_end are not read and become zeros.
template <int kRows>
K2K_DEVICE void load_operand(PortableOperand<kRows>& target, const Fp8Matrix& source, int matrix,
                             int64_t first_row, int row, int rows, int k, int k_end) {
    // Copy the codes: 8 threads per row of 128 bytes.
    const int chunk = threadIdx.x % 8;
    const uint8_t* codes = source.codes + matrix * source.matrix_stride +
                           (first_row + row) * source.row_stride + k + chunk * 16;
    const int left = k_end - k - chunk * 16;
    const int bytes = left < 16 ? left : 16;
    K2K_UNROLL
    for (int first = 0; first < kRows; first += 32) {
        const int r = first + threadIdx.x / 8;
        if (kRows % 32 != 0 && r >= kRows) break;
        const bool valid = row + r < rows && bytes > 0;
        arch::cp_async_partial(
            arch::smem_address(target.codes + tile::chunk_offset<kBlockK>(r, chunk)),
            valid ? codes + r * source.row_stride : source.codes, valid ? bytes : 0);
    }
    // Copy the scales: a thread per row.
    const int r = threadIdx.x;
    if (r >= kRows) return;
    const int64_t scale_row = (first_row + row + r + source.block_offset) >> source.block_shift;
    const int64_t at = matrix * source.scale_matrix_stride + scale_row * source.scale_row_stride +
                       k / kBlockK * source.scale_column_stride;
    const bool valid = row + r < rows && k < k_end;
    arch::cp_async<4>(arch::smem_address(target.scales + r),
                      valid ? source.scales + at : source.scales, valid);
}

// ---- NaN, before sm_89

// Bit 7 of each byte that is the code of NaN.
K2K_DEVICE uint32_t nan_bits(uint32_t codes) {
    return ((codes & 0x7f7f7f7f) + 0x01010101) & 0x80808080;
}

// NaNs in the chunks that this thread copied: bit i stands for row threadIdx.x / 8 + 32 i.
template <int kRows>
K2K_DEVICE uint32_t find_nan(const PortableOperand<kRows>& operand) {
    uint32_t found = 0;
    K2K_UNROLL
    for (int first = 0; first < kRows; first += 32) {
        const int r = first + threadIdx.x / 8;
        if (kRows % 32 != 0 && r >= kRows) break;
        const uint4 chunk = *reinterpret_cast<const uint4*>(
            operand.codes + tile::chunk_offset<kBlockK>(r, static_cast<int>(threadIdx.x % 8)));
        const uint32_t bits =
            nan_bits(chunk.x) | nan_bits(chunk.y) | nan_bits(chunk.z) | nan_bits(chunk.w);
        found |= static_cast<uint32_t>(bits != 0) << (first / 32);
    }
    return found;
}

// Combines what find_nan() found in the eight chunks of a row, into shared memory.
template <int kRows>
K2K_DEVICE void show_nan(bool (&rows)[kRows], uint32_t found) {
    K2K_UNROLL
    for (uint32_t mask = 1; mask < 8; mask *= 2) {
        found |= arch::shuffle_xor(found, mask);
    }
    if (threadIdx.x % 8 != 0) return;
    for (int r = threadIdx.x / 8; r < kRows; r += 32) rows[r] = found >> r / 32 & 1;
}

// ---- products

// Four codes as fp16 values times 2^-8: bytes 0 and 2, and bytes 1 and 3.
K2K_DEVICE void decode(uint32_t codes, uint32_t& even, uint32_t& odd) {
    even = (codes << 8 & 0x80008000) | (codes << 7 & 0x3f803f80);
    odd = (codes & 0x80008000) | (codes >> 1 & 0x3f803f80);
}

// sum += A B over 32 of K, for a warp's rows and columns; times 2^-16 if the codes are decoded.
template <class Tile>
K2K_DEVICE void multiply(float (&sum)[Tile::kWarpRows / 16][Tile::kWarpColumns / 8][4],
                         const uint8_t* a, const uint8_t* b, int row, int column, int first_chunk,
                         bool native) {
    constexpr int kRowTiles = Tile::kWarpRows / 16, kColumnTiles = Tile::kWarpColumns / 8;
    const int lane = arch::lane_id();
    uint32_t a_codes[kRowTiles][4], b_codes[kColumnTiles / 2][4];
    // Load fragments of A: rows 0-7, rows 8-15, and both for the next 16 bytes of K.
    K2K_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
        const int r = row + 16 * i + lane % 16, chunk = first_chunk + lane / 16;
        arch::ldmatrix(a_codes[i], arch::smem_address(a + tile::chunk_offset<kBlockK>(r, chunk)));
    }
    // Load fragments of B: columns 0-7 and their next 16 bytes of K, then columns 8-15.
    K2K_UNROLL
    for (int j = 0; j < kColumnTiles / 2; ++j) {
        const int r = column + 16 * j + lane % 8 + lane / 16 * 8;
        const int chunk = first_chunk + lane / 8 % 2;
        arch::ldmatrix(b_codes[j], arch::smem_address(b + tile::chunk_offset<kBlockK>(r, chunk)));
    }
    if (native) {
        // sm_89 on: multiply e4m3 codes.
        K2K_UNROLL
        for (int i = 0; i < kRowTiles; ++i) {
            K2K_UNROLL
            for (int j = 0; j < kColumnTiles; ++j) {
                const uint32_t b_word[2] = {b_codes[j / 2][j % 2 * 2],
                                            b_codes[j / 2][j % 2 * 2 + 1]};
                arch::mma_sync<e4m3>(sum[i][j], a_codes[i], b_word);
            }
        }
        return;
    }
    // Before sm_89: decode 16 of K at a time to fp16, B once for all rows, and multiply.
    K2K_UNROLL
    for (int half = 0; half < 2; ++half) {
        uint32_t b_values[kColumnTiles][2];
        K2K_UNROLL
        for (int j = 0; j < kColumnTiles; ++j) {
            decode(b_codes[j / 2][j % 2 * 2 + half], b_values[j][0], b_values[j][1]);
        }
        K2K_UNROLL
        for (int i = 0; i < kRowTiles; ++i) {
            uint32_t a_values[4];
            decode(a_codes[i][2 * half], a_values[0], a_values[2]);
            decode(a_codes[i][2 * half + 1], a_values[1], a_values[3]);
            K2K_UNROLL
            for (int j = 0; j < kColumnTiles; ++j) {
                arch::mma_sync<fp16>(sum[i][j], a_values, b_values[j]);
            }
        }
    }
}

// ---- the kernel

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas)
    fp8_gemm_portable_kernel(const __grid_constant__ Fp8GemmParams p) {
    using Storage = PortableStorage<Tile>;
    constexpr int kRowTiles = Tile::kWarpRows / 16, kColumnTiles = Tile::kWarpColumns / 8;
    constexpr int kWarpsAcross = Tile::kColumns / Tile::kWarpColumns;
    Storage& smem = arch::shared_storage<Storage>();
    const bool native = arch::has_mma_e4m3();
    const float unit = native ? 1.0f : 65536.0f;  // undoes the 2^-16 of decoded products
    const int lane = arch::lane_id(), warp = arch::warp_id();
    // This warp's part of the tile: kWarpRows x kWarpColumns.
    const int warp_row = warp / kWarpsAcross * Tile::kWarpRows;
    const int warp_column = warp % kWarpsAcross * Tile::kWarpColumns;
    const int columns = static_cast<int>(p.b.rows);

    // Find a tile when its first block of K is loaded, kStages - 1 blocks before it is used. Each
    // warp queues the tiles between in shared memory, to save registers.
    GemmTiles tiles(p, Tile::kRows, Tile::kColumns, kBand);
    GemmTile(&found)[Tile::kStages] = smem.tiles[warp];
    int next = blockIdx.x, num_found = 0, blocks_to_load = 0, k_to_load = 0;
    const auto load = [&](typename Storage::Stage& stage) {
        // After the last block of a tile, find the next tile.
        if (blocks_to_load == 0) {
            GemmTile tile;
            if (tiles.find(next, tile)) {
                blocks_to_load = tile.blocks();
                k_to_load = tile.k_begin;
                next += gridDim.x;
                if (lane == 0) found[num_found % Tile::kStages] = tile;
                arch::sync_warp();
                ++num_found;
            }
        }
        // Load its next block of K, of A and of B.
        if (blocks_to_load > 0) {
            const GemmTile& tile = found[(num_found - 1) % Tile::kStages];
            load_operand(stage.a, p.a, tile.group, tile.first_row, tile.row, tile.rows, k_to_load,
                         tile.k_end);
            load_operand(stage.b, p.b, tile.group, 0, tile.column, columns, k_to_load, tile.k_end);
            k_to_load += kBlockK;
            --blocks_to_load;
        }
        arch::cp_async_commit();  // maybe empty, so that cp_async_wait counts stages
    };
    // Prologue: fill all stages but one.
    K2K_NO_UNROLL
    for (int i = 0; i < Tile::kStages - 1; ++i) load(smem.stages[i]);

    int stage = 0;
    for (int used = 0; used < num_found; ++used) {
        // Begin with zeros; with NaN if a group along K begins inside a block of 128.
        const GemmTile& tile = found[used % Tile::kStages];
        const float nothing = tile.misplaced() ? soft::bits_float(0x7fffffff) : 0;
        float result[kRowTiles][kColumnTiles][4];  // promoted sums: [16 rows][8 columns][fragment]
        K2K_UNROLL
        for (int i = 0; i < kRowTiles * kColumnTiles * 4; ++i) {
            result[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4] = nothing;
        }
        uint32_t a_found = 0, b_found = 0;
        for (int blocks = tile.blocks(); blocks > 0; --blocks) {
            // Wait for this thread's copies of the stage, then for all threads'.
            arch::cp_async_wait<Tile::kStages - 2>();
            const typename Storage::Stage& full = smem.stages[stage];
            // Before sm_89: search this thread's own chunks for NaN codes.
            if (!native) {
                a_found |= find_nan(full.a);
                b_found |= find_nan(full.b);
            }
            arch::sync_block();
            // Refill the stage that was read in the previous iteration.
            load(smem.stages[(stage + Tile::kStages - 1) % Tile::kStages]);

            // Multiply the block of K.
            float sum[kRowTiles][kColumnTiles][4] = {};
            K2K_UNROLL
            for (int chunk = 0; chunk < kBlockK / 16; chunk += 2) {
                multiply<Tile>(sum, full.a.codes, full.b.codes, warp_row, warp_column, chunk,
                               native);
            }

            // Promote: result += sum * (a_scale * b_scale).
            K2K_UNROLL
            for (int j = 0; j < kColumnTiles; ++j) {
                const float2 b_scale = *reinterpret_cast<const float2*>(
                    full.b.scales + warp_column + 8 * j + lane % 4 * 2);
                K2K_UNROLL
                for (int i = 0; i < kRowTiles; ++i) {
                    K2K_UNROLL
                    for (int h = 0; h < 2; ++h) {
                        const float a_scale = full.a.scales[warp_row + 16 * i + lane / 4 + 8 * h];
                        float* to = &result[i][j][2 * h];
                        const float* from = &sum[i][j][2 * h];
                        to[0] = fmaf(from[0] * unit, a_scale * b_scale.x, to[0]);
                        to[1] = fmaf(from[1] * unit, a_scale * b_scale.y, to[1]);
                    }
                }
            }
            stage = (stage + 1) % Tile::kStages;
        }

        if (!native) {
            // Before sm_89: wait until the previous tile's flags have been read, write this tile's.
            arch::sync_block();
            show_nan(smem.a_nan, a_found);
            show_nan(smem.b_nan, b_found);
            arch::sync_block();
            // Overwrite the rows and columns of NaNs.
            K2K_UNROLL
            for (int j = 0; j < kColumnTiles; ++j) {
                K2K_UNROLL
                for (int i = 0; i < kRowTiles; ++i) {
                    K2K_UNROLL
                    for (int e = 0; e < 4; ++e) {
                        const bool nan = smem.a_nan[warp_row + 16 * i + lane / 4 + e / 2 * 8] ||
                                         smem.b_nan[warp_column + 8 * j + lane % 4 * 2 + e % 2];
                        if (nan) result[i][j][e] = soft::bits_float(0x7fffffff);
                    }
                }
            }
        }
        // Epilogue, 16 rows at a time: row weights, bias, C, one rounding, stores from registers.
        K2K_UNROLL
        for (int i = 0; i < kRowTiles; ++i) {
            float values[4 * kColumnTiles];
            K2K_UNROLL
            for (int v = 0; v < 4 * kColumnTiles; ++v) values[v] = result[i][v / 4][v % 4];
            const int row = tile.row + warp_row + 16 * i, column = tile.column + warp_column;
            weigh_and_add(values, p, tile, row, column);
            store_rows(values, p, tile, row, column);
        }
    }
    // Do not exit with copies in flight, even those that only write zeros.
    arch::cp_async_wait<0>();
}

}  // namespace k2k
