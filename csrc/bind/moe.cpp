#include "bind/run.h"
#include "moe/config.h"
#include "moe/launch.h"

namespace k2k::bind {

namespace {

FloatRows float_rows(const Tensor& x) {
    return {x.data<const void>(), x.type(), x ? x.stride(-2) : 0};
}

// For rows in the two halves [2, rows, columns] of a buffer; `half` None: for one matrix.
Half half_of(const Tensor& rows, const Tensor& half) {
    return {half.data<const int32_t>(), rows.stride_or(-3, 0)};
}

// `tokens` rows in as many equal runs, one per rank, as there are counts; None: all rows exist.
ArrivedRows arrived_rows(const Tensor& counts, int64_t tokens) {
    if (!counts) return {nullptr, 1, tokens};
    const int64_t sources = counts.size(0);
    return {counts.data<const int32_t>(), static_cast<int>(sources), tokens / sources};
}

template <class Params>
void set_logits(Params& p, const Tensor& logits) {
    p.logits = logits.data<const void>();
    p.type = logits.type();
    p.row_stride = logits.stride(0);
    p.tokens = logits.size(0);
    p.experts = narrow(logits.size(1));
}

long moe_route(const Tensor& logits, const OptionalTensor& bias, int n_group, int topk_group,
               bool softmax, bool normalize, float scale, const Tensor& weights,
               const Tensor& indices, const Tensor& counts) {
    MoeRouteParams p;
    set_logits(p, logits);
    p.bias = bias.data<const float>();
    p.top_k = narrow(indices.size(1));
    p.groups = n_group;
    p.kept_groups = topk_group;
    p.softmax = softmax;
    p.normalize = normalize;
    p.scale = scale;
    p.indices = indices.data<int32_t>();
    p.weights = weights.data<float>();
    p.counts = counts.data<unsigned long long>();
    return run(logits, launch_moe_route, p);
}

long moe_route_backward(const Tensor& grad, const Tensor& logits, const Tensor& indices,
                        bool softmax, bool normalize, float scale, const Tensor& d_logits) {
    MoeRouteBackwardParams p;
    set_logits(p, logits);
    p.grad = grad.data<const float>();
    p.indices = indices.data<const int32_t>();
    p.d_logits = d_logits.data<void>();
    p.top_k = narrow(indices.size(1));
    p.softmax = softmax;
    p.normalize = normalize;
    p.scale = scale;
    return run(logits, launch_moe_route_backward, p);
}

long moe_dispatch(const Tensor& x, const OptionalTensor& half, const OptionalTensor& row_counts,
                  const Tensor& indices, uint32_t alignment, bool power_of_two, const Tensor& data,
                  const OptionalTensor& scales, const Tensor& slot_of, const Tensor& token_of_slot,
                  const Tensor& offsets, const Tensor& counts, const Tensor& overflow,
                  const OptionalTensor& ranks, const OptionalTensor& before_tile) {
    MoeDispatchParams p;
    p.x = x.data<const void>();
    p.type = x.type();
    p.x_row_stride = x.stride(-2);
    p.x_half = half_of(x, half);
    p.tokens = indices.size(0);
    p.arrived = arrived_rows(row_counts, p.tokens);
    p.indices = indices.data<const void>();
    p.wide_indices = indices.is_int64();
    p.hidden = x.size(-1);
    p.top_k = narrow(indices.size(1));
    p.experts = narrow(counts.size(0));
    p.alignment = alignment;
    p.capacity = narrow(token_of_slot.size(0));
    p.data = data.data<void>();
    p.quantize = static_cast<bool>(scales);
    p.power_of_two = power_of_two;
    p.scales = scales.data<float>();
    p.scale_row_stride = scales ? scales.stride(0) : 0;
    p.scale_column_stride = scales ? scales.stride(1) : 0;
    p.slot_of = slot_of.data<int32_t>();
    p.token_of_slot = token_of_slot.data<int32_t>();
    p.offsets = offsets.data<int32_t>();
    p.counts = counts.data<int32_t>();
    p.overflow = overflow.data<int64_t>();
    p.ranks = ranks.data<uint16_t>();
    p.before_tile = before_tile.data<int32_t>();
    return run(x, launch_moe_dispatch, p);
}

long moe_combine(const Tensor& y, const OptionalTensor& half, const Tensor& slot_of,
                 const OptionalTensor& weights, const OptionalTensor& shared,
                 const OptionalTensor& residual, const Tensor& out) {
    MoeCombineParams p;
    p.y = y.data<const void>();
    p.type = y.type();
    p.y_row_stride = y.stride(-2);
    p.y_half = half_of(y, half);
    p.slot_of = slot_of.data<const int32_t>();
    p.weights = weights.data<const float>();
    p.shared = float_rows(shared);
    p.residual = float_rows(residual);
    p.out = out.data<void>();
    p.out_type = out.type();
    p.tokens = out.size(0);
    p.hidden = out.size(1);
    p.slots = narrow(y.size(-2));
    p.top_k = narrow(slot_of.size(1));
    return run(y, launch_moe_combine, p);
}

long moe_combine_backward(const Tensor& grad, const OptionalTensor& half,
                          const OptionalTensor& row_counts, const OptionalTensor& y,
                          const Tensor& slot_of, const Tensor& token_of_slot,
                          const OptionalTensor& weights, const Tensor& d_y,
                          const OptionalTensor& d_weights) {
    MoeCombineBackwardParams p;
    p.grad = float_rows(grad);
    p.grad_half = half_of(grad, half);
    p.tokens = slot_of.size(0);
    p.arrived = arrived_rows(row_counts, p.tokens);
    p.y = y.data<const void>();
    p.d_y = d_y.data<void>();
    p.type = d_y.type();
    p.y_row_stride = y ? y.stride(0) : 0;
    p.slot_of = slot_of.data<const int32_t>();
    p.token_of_slot = token_of_slot.data<const int32_t>();
    p.weights = weights.data<const float>();
    p.d_weights = d_weights.data<float>();
    p.slots = narrow(d_y.size(0));
    p.hidden = d_y.size(1);
    p.top_k = narrow(slot_of.size(1));
    return run(grad, launch_moe_combine_backward, p);
}

long moe_sequence_loss(const Tensor& logits, const Tensor& indices,
                       const OptionalTensor& cu_seqlens, float alpha, bool softmax,
                       const Tensor& hits, const OptionalTensor& sums, const OptionalTensor& loss,
                       const OptionalTensor& grad, const OptionalTensor& d_logits) {
    MoeLossParams p;
    set_logits(p, logits);
    p.indices = indices.data<const void>();
    p.wide_indices = indices.is_int64();
    p.cu_seqlens = cu_seqlens.data<const void>();
    p.wide_seqlens = cu_seqlens.is_int64();
    p.sequences = hits.size(0);
    p.top_k = narrow(indices.size(1));
    p.alpha = alpha;
    p.softmax = softmax;
    p.hits = hits.data<uint32_t>();
    p.sums = sums.data<float>();
    p.loss = loss.data<float>();
    p.grad = grad.data<const float>();
    p.d_logits = d_logits.data<void>();
    return run(logits, launch_moe_sequence_loss, p);
}

long moe_update_bias(const Tensor& bias, const Tensor& counts, float rate, bool quantile,
                     const Tensor& result) {
    const MoeBiasParams p{bias.data<const float>(),
                          counts.data<const void>(),
                          counts.is_int64(),
                          narrow(bias.size(0)),
                          rate,
                          quantile,
                          result.data<float>()};
    return run(bias, launch_moe_update_bias, p);
}

}  // namespace

void bind_moe(py::module_& m) {
    constant(m, "MOE_MOST_EXPERTS", kMostExperts);
    constant(m, "MOE_MOST_TOP_K", kMostTopK);
    constant(m, "MOE_MOST_GROUPS", kMostGroups);
    constant(m, "MOE_PLAN_TILE", kPlanTile);
    constant(m, "MOE_ROUTE_WARPS", kRouteWarps);
    constant(m, "MOE_LOSS_BLOCKS", kMostRouteBlocks);
    m.def("moe_route", &moe_route);
    m.def("moe_route_backward", &moe_route_backward);
    m.def("moe_dispatch", &moe_dispatch);
    m.def("moe_combine", &moe_combine);
    m.def("moe_combine_backward", &moe_combine_backward);
    m.def("moe_sequence_loss", &moe_sequence_loss);
    m.def("moe_update_bias", &moe_update_bias);
}

}  // namespace k2k::bind
