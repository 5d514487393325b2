#include <algorithm>

#include "arch/tensor_map.h"
#include "common/launch.h"
#include "w4_gemm/kernel_sm90_many.cuh"
#include "w4_gemm/launch.h"

namespace k2k {

namespace {

template <class Kind, bool kSwiglu>
void launch_many(const W4GemmParams& p, const Chip& chip, void* stream) {
    const int64_t tiles = w4_gemm_tiles(p, kManyTokens, kManyWeights);
    if (std::max({tiles, p.rows, p.columns, p.depth}) > INT32_MAX - 256) {
        throw Error(
            "k2kernels: the kernels of w4_gemm support fewer than 2^31 rows, columns and "
            "tiles of a product");
    }
    const auto unsign = [](int64_t n) { return static_cast<uint64_t>(n); };
    const arch::TensorMap tokens = arch::make_tensor_map(
        Type::kBf16, p.a, {unsign(p.depth), unsign(p.rows)}, {unsign(p.a_row_stride) * 2},
        {kChunkDepth, kTokenBlock}, arch::Swizzle::k128);
    const auto ctas = static_cast<unsigned>(std::min<int64_t>(tiles, chip.multiprocessors));
    const LaunchShape shape{ctas, kManyThreads, 0, stream};
    launch<w4_gemm_sm90_many_kernel<Kind, kSwiglu>, sizeof(ManyStorage<Kind>)>(shape, p, tokens);
}

template <class Kind>
void launch_kind(const W4GemmParams& p, const Chip& chip, void* stream) {
    return p.swiglu ? launch_many<Kind, true>(p, chip, stream)
                    : launch_many<Kind, false>(p, chip, stream);
}

}  // namespace

void launch_w4_gemm_sm90_many(const W4GemmParams& p, const Chip& chip, void* stream) {
    return p.kind == W4Kind::kInt4 ? launch_kind<Int4>(p, chip, stream)
                                   : launch_kind<Mxfp4>(p, chip, stream);
}

}  // namespace k2k
