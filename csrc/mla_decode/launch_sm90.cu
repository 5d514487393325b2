#include "common/dispatch.h"
#include "common/launch.h"
#include "mla_decode/kernel_sm90.cuh"
#include "mla_decode/launch.h"

namespace k2k {

namespace {

// Rows of q: [tokens * heads, 576].
arch::TensorMap q_tensor(const MlaDecodeParams& p) {
    const int64_t stride = p.heads > 1 ? p.q_head_stride : p.q_token_stride;
    return arch::make_tensor_map(p.type, p.q, {kKeyDim, static_cast<uint64_t>(p.tokens * p.heads)},
                                 {static_cast<uint64_t>(stride) * 2}, {kHopperColumns, kHopperRows},
                                 arch::Swizzle::k128);
}

// The cache: [pages, page_size, 576].
arch::TensorMap cache_tensor(const MlaDecodeParams& p) {
    return arch::make_tensor_map(
        p.type, p.cache,
        {kKeyDim, static_cast<uint64_t>(p.page_size), static_cast<uint64_t>(p.pages)},
        {static_cast<uint64_t>(p.slot_stride) * 2, static_cast<uint64_t>(p.page_stride) * 2},
        {kHopperColumns, static_cast<uint32_t>(hopper_box_rows(p.page_size)), 1},
        arch::Swizzle::k128);
}

template <class T>
void start(const MlaDecodeParams& p, void* stream) {
    constexpr std::size_t kShared = sizeof(MlaSm90Storage);
    LaunchShape shape{static_cast<unsigned>(p.plan.teams * p.plan.team_size), kHopperThreads};
    shape.stream = stream;
    if (in_pairs(p.plan)) {
        shape.cluster = 2;
        launch<mla_decode_sm90_kernel<T, /*kPair=*/true>, kShared>(shape, p, q_tensor(p),
                                                                   cache_tensor(p));
    } else {
        launch<mla_decode_sm90_kernel<T, /*kPair=*/false>, kShared>(shape, p, q_tensor(p),
                                                                    cache_tensor(p));
    }
    if (!needs_combine(p)) return;

    shape = LaunchShape{};
    shape.stream = stream;
    const int64_t rows = p.tokens * p.heads;
    const int rows_per_block = combine_rows_per_block(rows);
    shape.grid = static_cast<unsigned>(ceil_div(rows, rows_per_block));
    shape.block = kCombineThreads;
    shape.overlap_previous = true;
    launch<mla_combine_sm90_kernel<T>, sizeof(MlaCombineStorage)>(shape, p, rows_per_block);
}

}  // namespace

void launch_mla_decode_sm90(const MlaDecodeParams& p, void* stream) {
    if (p.type == Type::kBf16) {
        start<bf16>(p, stream);
    } else {
        start<fp16>(p, stream);
    }
}

}  // namespace k2k
