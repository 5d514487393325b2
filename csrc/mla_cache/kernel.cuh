#pragma once

// Writing and reading the paged cache of latent rows.
//
//     cache[page, slot, :] <- rows[t, :]      page = block_table[t / tokens_per_sequence, pos / P]
//     rows[t, :] <- cache[page, slot, :]      slot = pos % P,  pos = positions[t]
//
// Grid      CTAs of 4 warps, a warp per token. All warps have the same role; no barriers.
// Warp      16 contiguous elements per lane and iteration: 512 columns.
// 656 bytes 512 e4m3 codes of the latent, 4 float32 scales, 64 bfloat16 of the rope part. The
//           latent is exactly one iteration, a block of 128 in eight lanes; the first four lanes
//           move the rope part.
// Traffic   2,304 bytes per token from bfloat16 to bfloat16, 1,808 from bfloat16 to 656 bytes. The
//           chain position -> page -> row is three dependent loads; other warps hide its latency:
//           32 warps per SM have 36 KiB in flight.
// Limits    rows that do not begin at multiples of 16 bytes are moved element by element; 656-byte
//           rows must begin at such multiples.

#include <type_traits>

#include "mla_cache/config.h"
#include "mla_cache/params.h"
#include "tile/e4m3_block.cuh"
#include "tile/sixteen.cuh"

namespace k2k {

// Offset of the token's row in the cache; -1 if its position is negative.
K2K_DEVICE int64_t slot_offset(const MlaCacheParams& p, int64_t token) {
    const int64_t position = p.long_positions ? static_cast<const int64_t*>(p.positions)[token]
                                              : static_cast<const int32_t*>(p.positions)[token];
    if (position < 0) return -1;
    // Look up the page: 64-bit offsets, as a cache may exceed 2^31 elements.
    const int64_t sequence = token / p.tokens_per_sequence;
    const int64_t page = p.block_table[sequence * p.table_stride + position / p.page_size];
    return page * p.page_stride + position % p.page_size * p.slot_stride;
}

K2K_DEVICE int64_t warp_token() { return int64_t(blockIdx.x) * kCacheWarps + arch::warp_id(); }

// Converts sixteen elements; an equal type keeps every bit.
template <class To, class From>
K2K_DEVICE tile::Sixteen<To> convert(const tile::Sixteen<From>& from) {
    if constexpr (std::is_same_v<To, From>) {
        return from;
    } else {
        float values[16];
        tile::widen(values, from);
        tile::Sixteen<To> to;
        tile::narrow(to, values);
        return to;
    }
}

template <class Row, class Cache>
__global__ void __launch_bounds__(32 * kCacheWarps)
    mla_append_kernel(const __grid_constant__ MlaCacheParams p) {
    const int64_t token = warp_token();
    if (token >= p.tokens) return;
    // A token without position writes nothing.
    const int64_t offset = slot_offset(p, token);
    if (offset < 0) return;
    const Row* row = static_cast<const Row*>(p.rows) + token * p.row_stride;
    Cache* slot = static_cast<Cache*>(p.cache) + offset;
    const int lane = arch::lane_id();

    if constexpr (std::is_same_v<Cache, uint8_t>) {
        // 656 bytes: quantise the latent, a block of 128 per 8 lanes: scale, codes.
        float values[16];
        tile::widen(values, tile::load_sixteen(row, lane * 16, kLatent));
        const float scale = tile::scale_of(tile::block_amax<8>(values), p.power_of_two);
        arch::store(reinterpret_cast<uint4*>(slot) + lane,
                    tile::encode16(values, tile::divisor_of(scale)));
        if (lane % 8 == 0) reinterpret_cast<float*>(slot + kScalesAt)[lane / 8] = scale;
        // Copy the rope part as bfloat16.
        if (lane < kRope / 16) {
            const auto rope = tile::load_sixteen(row, kLatent + lane * 16, kLatent + kRope);
            tile::store_sixteen(reinterpret_cast<bf16*>(slot + kRopeAt), lane * 16, kRope,
                                convert<bf16>(rope));
        }
    } else {
        for (int64_t column = lane * 16; column < p.columns; column += 512) {
            // Floats: copy, converted to the cache's type.
            const auto sixteen = tile::load_sixteen(row, column, p.columns);
            tile::store_sixteen(slot, column, p.columns, convert<Cache>(sixteen));
        }
    }
}

template <class Row, class Cache>
__global__ void __launch_bounds__(32 * kCacheWarps)
    mla_gather_kernel(const __grid_constant__ MlaCacheParams p) {
    const int64_t token = warp_token();
    if (token >= p.tokens) return;
    const int64_t offset = slot_offset(p, token);
    Row* row = static_cast<Row*>(p.rows) + token * p.row_stride;
    const Cache* slot = static_cast<const Cache*>(p.cache) + offset;
    const int lane = arch::lane_id();

    if (offset < 0) {
        for (int64_t column = lane * 16; column < p.columns; column += 512) {
            // A token without position reads zeros.
            tile::store_sixteen(row, column, p.columns, tile::Sixteen<Row>{});
        }
    } else if constexpr (std::is_same_v<Cache, uint8_t>) {
        // 656 bytes: dequantise the latent in float32.
        const auto codes = tile::load_sixteen(slot, lane * 16, kLatent);
        const float scale = reinterpret_cast<const float*>(slot + kScalesAt)[lane / 8];
        float values[16];
        K2K_UNROLL
        for (int i = 0; i < 16; ++i) {
            values[i] = arch::to_float(e4m3{tile::element_of(codes, i)}) * scale;
        }
        tile::Sixteen<Row> latent;
        tile::narrow(latent, values);
        tile::store_sixteen(row, lane * 16, kLatent, latent);
        // Copy the rope part.
        if (lane < kRope / 16) {
            const auto rope =
                tile::load_sixteen(reinterpret_cast<const bf16*>(slot + kRopeAt), lane * 16, kRope);
            tile::store_sixteen(row, kLatent + lane * 16, kLatent + kRope, convert<Row>(rope));
        }
    } else {
        for (int64_t column = lane * 16; column < p.columns; column += 512) {
            // Floats: copy, converted to the rows' type.
            const auto sixteen = tile::load_sixteen(slot, column, p.columns);
            tile::store_sixteen(row, column, p.columns, convert<Row>(sixteen));
        }
    }
}

}  // namespace k2k
