#include <algorithm>

#include "common/launch.h"
#include "w4_gemm/kernel_portable.cuh"
#include "w4_gemm/launch.h"

namespace k2k {

namespace {

template <class Kind, bool kSwiglu, class Tile>
void launch_tile(const W4GemmParams& p, const Chip& chip, void* stream) {
    using Storage = typename W4Panels<Kind, Tile>::Storage;
    const int64_t tiles = w4_gemm_tiles(p, Tile::kTokens, Tile::kWeights);
    if (std::max({tiles, p.rows, p.columns, p.depth}) > INT32_MAX - 256) {
        throw Error(
            "k2kernels: the kernels of w4_gemm support fewer than 2^31 rows, columns and "
            "tiles of a product");
    }
    const int64_t resident = w4_gemm_resident<Tile>(sizeof(Storage), chip.shared_memory);
    const int64_t ctas = std::min(tiles, chip.multiprocessors * resident);
    const LaunchShape shape{static_cast<unsigned>(ctas), Tile::kThreads, 0, stream};
    launch<w4_gemm_kernel<Kind, kSwiglu, Tile>, sizeof(Storage)>(shape, p);
}

template <class Kind, bool kSwiglu>
void launch_swiglu(const W4GemmParams& p, const Chip& chip, void* stream) {
    return takes_few_tokens(p) ? launch_tile<Kind, kSwiglu, W4Tile16>(p, chip, stream)
                               : launch_tile<Kind, kSwiglu, W4Tile64>(p, chip, stream);
}

template <class Kind>
void launch_kind(const W4GemmParams& p, const Chip& chip, void* stream) {
    return p.swiglu ? launch_swiglu<Kind, true>(p, chip, stream)
                    : launch_swiglu<Kind, false>(p, chip, stream);
}

}  // namespace

void launch_w4_gemm(const W4GemmParams& p, const Chip& chip, void* stream) {
    if (p.groups.number == 0 || p.rows == 0 || p.columns == 0) return;
    if (p.kind == W4Kind::kInt4Wide) return launch_kind<Int4Wide>(p, chip, stream);
    if (chip.capability == 90 && takes_few_rows(p)) return launch_w4_gemm_sm90_few(p, chip, stream);
    if (takes_many_tokens(p, chip)) return launch_w4_gemm_sm90_many(p, chip, stream);
    return p.kind == W4Kind::kInt4 ? launch_kind<Int4>(p, chip, stream)
                                   : launch_kind<Mxfp4>(p, chip, stream);
}

}  // namespace k2k
