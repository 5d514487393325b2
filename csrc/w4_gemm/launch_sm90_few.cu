#include <algorithm>

#include "common/launch.h"
#include "w4_gemm/kernel_sm90_few.cuh"
#include "w4_gemm/launch.h"

namespace k2k {

namespace {

// Boxes of kTokens rows x kDepth of K, as groups of 32 of K: [kDepth / 32][kTokens][32].
template <class Tile>
arch::TensorMap tokens_map(const W4GemmParams& p) {
    const auto unsign = [](int64_t n) { return static_cast<uint64_t>(n); };
    return arch::make_tensor_map(
        Type::kBf16, p.a, {kGroupDepth, unsign(p.rows), unsign(p.depth / kGroupDepth)},
        {unsign(p.a_row_stride * 2), kGroupDepth * 2},
        {kGroupDepth, Tile::kTokens, Tile::kDepth / kGroupDepth}, arch::Swizzle::k64);
}

template <class Kind, class Tile>
void launch_tile(const W4GemmParams& p, const Chip& chip, void* stream) {
    using Storage = FewStorage<Kind, Tile>;
    static_assert(sizeof(Storage) <= Tile::kSharedMost);
    const int64_t tiles = w4_gemm_tiles(p, Tile::kTokens, Tile::kWeights);
    if (std::max({tiles, p.rows, p.columns, p.depth}) > INT32_MAX - 256) {
        throw Error(
            "k2kernels: the kernels of w4_gemm support fewer than 2^31 rows, columns and "
            "tiles of a product");
    }
    const int64_t places = int64_t(chip.multiprocessors) * Tile::kCtas / p.split;
    const auto ctas = static_cast<unsigned>(std::min(tiles, places) * p.split);
    const LaunchShape shape{ctas, Tile::kThreads, 0, stream, static_cast<unsigned>(p.split)};
    launch<w4_gemm_sm90_few_kernel<Kind, Tile>, sizeof(Storage)>(shape, p, tokens_map<Tile>(p));
}

template <class Kind>
void launch_kind(const W4GemmParams& p, const Chip& chip, void* stream) {
    if (holds_most_groups(p, FewTile8::kTokens))
        return launch_tile<Kind, FewTile8>(p, chip, stream);
    if (holds_most_groups(p, FewTile32::kTokens) || p.split > 1) {
        return launch_tile<Kind, FewTile32>(p, chip, stream);
    }
    return launch_tile<Kind, FewTile64>(p, chip, stream);
}

}  // namespace

void launch_w4_gemm_sm90_few(const W4GemmParams& p, const Chip& chip, void* stream) {
    return p.kind == W4Kind::kInt4 ? launch_kind<Int4>(p, chip, stream)
                                   : launch_kind<Mxfp4>(p, chip, stream);
}

}  // namespace k2k
