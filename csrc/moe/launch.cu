#include "common/dispatch.h"
#include "common/launch.h"
#include "moe/kernel_balance.cuh"
#include "moe/kernel_combine.cuh"
#include "moe/kernel_dispatch.cuh"
#include "moe/kernel_route.cuh"
#include "moe/launch.h"

namespace k2k {

namespace {

void check(bool fits, const char* what) {
    if (!fits) throw Error(std::string("k2kernels: the kernels of moe support ") + what);
}

void check_top_k(int top_k) {
    check(top_k >= 0 && top_k <= kMostTopK, "at most 32 experts for a token");
}

void check_experts(int experts) {
    check(experts >= 1 && experts <= kMostExperts, "1 to 1,024 experts");
}

// Calls f with the number of vectors of `experts` as a constant.
template <class F>
void by_vectors(int experts, F&& f) {
    switch (route_vectors(experts)) {
        case 1:
            return f(std::integral_constant<int, 1>());
        case 2:
            return f(std::integral_constant<int, 2>());
        case 3:
            return f(std::integral_constant<int, 3>());
        case 4:
            return f(std::integral_constant<int, 4>());
        default:
            return f(std::integral_constant<int, 8>());
    }
}

template <bool kPlans>
void launch_move(const MoeDispatchParams& p, void* stream) {
    constexpr std::size_t kShared = kPlans ? sizeof(MovePlan) : 0;
    const int64_t most = kPlans                        ? kMostPlanningBlocks
                         : p.arrived.counts != nullptr ? kMostArrivedBlocks
                                                       : kMostMovingBlocks;
    const LaunchShape shape{move_blocks(p.tokens, p.hidden, most), kMoeThreads, 0, stream};
    if (p.quantize) {
        by_float_type(p.type, [&](auto* type) {
            launch<moe_move_kernel<Element<decltype(type)>, true, kPlans>, kShared>(shape, p);
        });
    } else if (p.type == Type::kF32) {
        launch<moe_move_kernel<float, false, kPlans>, kShared>(shape, p);
    } else {
        launch<moe_move_kernel<bf16, false, kPlans>, kShared>(shape, p);
    }
}

}  // namespace

void launch_moe_route(const MoeRouteParams& p, void* stream) {
    check_experts(p.experts);
    check_top_k(p.top_k);
    check(p.groups >= 1 && p.groups <= kMostGroups, "1 to 32 groups");
    const LaunchShape shape{route_blocks(p.tokens), kRouteThreads, 0, stream};
    by_vectors(p.experts, [&](auto vectors) {
        launch<moe_route_kernel<decltype(vectors)::value>, sizeof(RouteStorage)>(shape, p);
    });
}

void launch_moe_route_backward(const MoeRouteBackwardParams& p, void* stream) {
    if (p.tokens == 0) return;
    check_experts(p.experts);
    check_top_k(p.top_k);
    const int64_t blocks = std::min(ceil_div(p.tokens, kRouteWarps), kMostMovingBlocks);
    const LaunchShape shape{static_cast<unsigned>(blocks), kRouteThreads, 0, stream};
    by_vectors(p.experts, [&](auto vectors) {
        launch<moe_route_backward_kernel<decltype(vectors)::value>>(shape, p);
    });
}

void launch_moe_dispatch(const MoeDispatchParams& p, void* stream) {
    check_experts(p.experts);
    check_top_k(p.top_k);
    const int64_t pairs = p.tokens * p.top_k;
    if (plans_in_one_launch(pairs)) return launch_move<true>(p, stream);
    const auto tiles = static_cast<unsigned>(ceil_div(pairs, kPlanTile));
    LaunchShape count{tiles, kMoeThreads, 0, stream}, scan{1, kScanThreads, 0, stream};
    launch<moe_count_kernel, sizeof(TileRanks)>(count, p);
    launch<moe_scan_kernel, sizeof(PlaceExperts<kScanThreads>)>(scan, p);
    launch_move<false>(p, stream);
}

void launch_moe_combine(const MoeCombineParams& p, void* stream) {
    if (p.tokens * p.hidden == 0) return;
    check_top_k(p.top_k);
    const LaunchShape shape{move_blocks(p.tokens, p.hidden, kMostMovingBlocks), kMoeThreads, 0,
                            stream};
    by_float_type(
        p.type, [&](auto* type) { launch<moe_combine_kernel<Element<decltype(type)>>>(shape, p); });
}

void launch_moe_combine_backward(const MoeCombineBackwardParams& p, void* stream) {
    if (p.tokens * p.top_k == 0 && p.slots * p.hidden == 0) return;
    check_top_k(p.top_k);
    const unsigned warps = gradient_warps(p.hidden);
    const int64_t pads = ceil_div(p.slots, 32 * warps);  // of an empty batch, say
    const int64_t blocks = std::min(std::max(p.tokens, pads), kMostGradientBlocks);
    const LaunchShape shape{static_cast<unsigned>(blocks), 32 * warps, 0, stream};
    by_float_type(p.type, [&](auto* type) {
        launch<moe_combine_backward_kernel<Element<decltype(type)>>, sizeof(WeightGradients)>(shape,
                                                                                              p);
    });
}

void launch_moe_sequence_loss(const MoeLossParams& p, void* stream) {
    check(p.tokens == 0 || p.sequences > 0, "a sequence for each token");
    const int64_t hit_blocks =
        std::min(ceil_div(p.tokens * p.top_k, kMoeThreads), kMostRouteBlocks);
    LaunchShape pairs{static_cast<unsigned>(hit_blocks), kMoeThreads, 0, stream};
    LaunchShape tokens{route_blocks(p.tokens), kMoeThreads, 0, stream};
    LaunchShape one{1, kMoeThreads, 0, stream};
    if (p.tokens > 0) launch<moe_hits_kernel>(pairs, p);
    if (p.loss == nullptr) {
        if (p.tokens == 0) return;
        launch<moe_sequence_loss_backward_kernel, sizeof(CountOfSequences)>(tokens, p);
        return;
    }
    if (p.tokens > 0) launch<moe_sequence_loss_kernel, sizeof(LossSums)>(tokens, p);
    launch<moe_loss_total_kernel, sizeof(LossTotal)>(
        one, p, p.tokens > 0 ? static_cast<int>(tokens.grid.x) : 0);
}

void launch_moe_update_bias(const MoeBiasParams& p, void* stream) {
    if (p.experts == 0) return;
    check_experts(p.experts);
    const LaunchShape shape{1, kScanThreads, 0, stream};
    launch<moe_update_bias_kernel, sizeof(BiasCounts)>(shape, p);
}

}  // namespace k2k
