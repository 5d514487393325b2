#include "common/dispatch.h"
#include "common/launch.h"
#include "quant/kernel_128x128.cuh"
#include "quant/kernel_rms_norm.cuh"
#include "quant/kernel_rows.cuh"
#include "quant/kernel_transposed.cuh"
#include "quant/launch.h"

namespace k2k {

namespace {

LaunchShape row_shape(int64_t batches, int64_t rows, int64_t columns, void* stream) {
    const TileGrid grid =
        tile_grid(batches * ceil_div(rows, kTileRows), ceil_div(columns, 128 * kTileBlocks));
    return {{grid.x, grid.y}, kRowThreads, 0, stream};
}

bool empty(const QuantizeParams& p) { return p.batches * p.rows * p.columns == 0; }

}  // namespace

void launch_quantize_1x128(const QuantizeParams& p, void* stream) {
    if (empty(p)) return;
    const LaunchShape shape = row_shape(p.batches, p.rows, p.columns, stream);
    by_float_type(p.type, [&](auto* type) {
        launch<quantize_rows_kernel<Element<decltype(type)>, /*kSwiglu=*/false>, sizeof(TileRows)>(
            shape, p);
    });
}

void launch_swiglu_quantize(const QuantizeParams& p, void* stream) {
    if (empty(p)) return;
    const LaunchShape shape = row_shape(p.batches, p.rows, p.columns, stream);
    by_float_type(p.type, [&](auto* type) {
        launch<quantize_rows_kernel<Element<decltype(type)>, /*kSwiglu=*/true>, sizeof(TileRows)>(
            shape, p);
    });
}

void launch_quantize_1x128_transposed(const QuantizeParams& p, void* stream) {
    if (empty(p)) return;
    by_float_type(p.type, [&](auto* type) {
        using T = Element<decltype(type)>;
        constexpr int kColumns = transpose_columns(sizeof(T));
        const TileGrid grid =
            tile_grid(p.batches * ceil_div(p.rows, kTransposeRows), ceil_div(p.columns, kColumns));
        const LaunchShape shape{{grid.x, grid.y}, kTransposeThreads, 0, stream};
        launch<quantize_transposed_kernel<T>, sizeof(TransposeStorage<kColumns>)>(shape, p);
    });
}

void launch_quantize_128x128(const QuantizeParams& p, void* stream) {
    if (empty(p)) return;
    const int64_t blocks = p.batches * ceil_div(p.rows, 128) * ceil_div(p.columns, 128);
    const LaunchShape shape{static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)),
                            kBlockThreads, 0, stream};
    by_float_type(p.type, [&](auto* type) {
        launch<quantize_128x128_kernel<Element<decltype(type)>>, sizeof(BlockMaxima)>(shape, p);
    });
}

void launch_rms_norm_quantize(const RmsNormQuantizeParams& p, void* stream) {
    if (p.batches * p.rows * p.columns == 0) return;
    if (p.columns > kNormMostColumns) {
        throw Error("k2kernels: rms_norm_quantize holds rows of at most " +
                    std::to_string(kNormMostColumns) + " columns, got " +
                    std::to_string(p.columns));
    }
    const NormShape tile = norm_shape(p.columns);
    const int64_t blocks = std::min(ceil_div(p.batches * p.rows, tile.rows), kNormMostBlocks);
    const LaunchShape shape{static_cast<unsigned>(blocks),
                            static_cast<unsigned>(32 * tile.warps * tile.rows), 0, stream};
    by_float_type(p.type, [&](auto* type) {
        using T = Element<decltype(type)>;
        if (tile.sixteens == 1) {
            launch<rms_norm_quantize_kernel<T, 1>, sizeof(NormStorage<T, 1>)>(shape, p);
        } else {
            launch<rms_norm_quantize_kernel<T, 2>, sizeof(NormStorage<T, 2>)>(shape, p);
        }
    });
}

void launch_dequantize(const DequantizeParams& p, void* stream) {
    if (p.batches * p.rows * p.columns == 0) return;
    const LaunchShape shape = row_shape(p.batches, p.rows, p.columns, stream);
    by_float_type(
        p.type, [&](auto* type) { launch<dequantize_kernel<Element<decltype(type)>>>(shape, p); });
}

void launch_swiglu(const SwigluParams& p, void* stream) {
    if (p.rows * p.columns == 0) return;
    const LaunchShape shape = row_shape(1, p.rows, p.columns, stream);
    by_float_type(p.type,
                  [&](auto* type) { launch<swiglu_kernel<Element<decltype(type)>>>(shape, p); });
}

void launch_swiglu_backward(const SwigluBackwardParams& p, void* stream) {
    if (p.rows * p.columns == 0) return;
    const LaunchShape shape = row_shape(1, p.rows, p.columns, stream);
    by_float_type(p.type, [&](auto* type) {
        launch<swiglu_backward_kernel<Element<decltype(type)>>>(shape, p);
    });
}

}  // namespace k2k
