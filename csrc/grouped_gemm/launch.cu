#include <algorithm>

#include "common/launch.h"
#include "grouped_gemm/kernel_sm80.cuh"
#include "grouped_gemm/launch.h"

namespace k2k {

namespace {

void check(bool fits, const char* what) {
    if (!fits) throw Error(std::string("k2kernels: the kernels of grouped_gemm support ") + what);
}

template <class T, class Tile, bool kAByColumns, bool kBByColumns>
void launch_gemm_tile(const GroupedGemmParams& p, int multiprocessors, void* stream) {
    const int64_t tiles = grouped_gemm_tiles(p, Tile::kRows, Tile::kColumns);
    check(std::max({tiles, p.rows, p.columns, p.depth}) <= INT32_MAX - 256,
          "fewer than 2^31 rows, columns and tiles of a product");
    const int64_t ctas = std::min<int64_t>(tiles, int64_t(multiprocessors) * Tile::kCtas);
    const LaunchShape shape{static_cast<unsigned>(ctas), Tile::kThreads, 0, stream};
    using Storage = typename GroupedGemmPanels<T, Tile, kAByColumns, kBByColumns>::Storage;
    launch<grouped_gemm_kernel<T, Tile, kAByColumns, kBByColumns>, sizeof(Storage)>(shape, p);
}

template <class T>
void launch_gemm(const GroupedGemmParams& p, int multiprocessors, void* stream) {
    const bool few = takes_few_rows(p);
    switch (p.kind) {
        case GroupedGemm::kForward:
            return few ? launch_gemm_tile<T, GroupedGemmTile16, false, false>(p, multiprocessors,
                                                                              stream)
                       : launch_gemm_tile<T, GroupedGemmTile128, false, false>(p, multiprocessors,
                                                                               stream);
        case GroupedGemm::kDgrad:
            return few ? launch_gemm_tile<T, GroupedGemmTile16, false, true>(p, multiprocessors,
                                                                             stream)
                       : launch_gemm_tile<T, GroupedGemmTile128, false, true>(p, multiprocessors,
                                                                              stream);
        case GroupedGemm::kWgrad:
            return launch_gemm_tile<T, GroupedGemmTile128, true, true>(p, multiprocessors, stream);
    }
}

}  // namespace

void launch_grouped_gemm(const GroupedGemmParams& p, int multiprocessors, void* stream) {
    if (p.groups.number == 0 || p.rows == 0 || p.columns == 0) return;
    if (p.type == Type::kBf16) return launch_gemm<bf16>(p, multiprocessors, stream);
    check(p.type == Type::kFp16, "bfloat16 and float16 in products");
    launch_gemm<fp16>(p, multiprocessors, stream);
}

}  // namespace k2k
