#include "bind/run.h"
#include "grouped_gemm/launch.h"
#include "moe/config.h"
#include "moe/launch.h"

namespace k2k::bind {

namespace {

// The values' address, type and row stride; zeros for none.
using Rows = std::tuple<Address, int, int64_t>;

// The half's number, in device memory, and the stride in elements; zeros for none.
using HalfOf = std::tuple<Address, int64_t>;
// How many rows of each source exist, in device memory, and the number of sources; zeros for none.
using Told = std::tuple<Address, int>;

Half half_of(const HalfOf& half) {
    return {pointer<const int32_t>(std::get<0>(half)), std::get<1>(half)};
}

ArrivedRows arrived_rows(const Told& told, int64_t tokens) {
    const auto [rows, sources] = told;
    if (rows == 0) return {nullptr, 1, tokens};
    return {pointer<const int32_t>(rows), sources, tokens / sources};
}

FloatRows float_rows(const Rows& rows) {
    const auto [values, type, row_stride] = rows;
    return {pointer<const void>(values), static_cast<Type>(type), row_stride};
}

long moe_route(Rows logits,
               Address bias,
               std::tuple<int64_t, int, int> sizes,
               std::tuple<int, int> groups,
               bool softmax,
               bool normalize,
               float scale,
               Address indices,
               Address weights,
               Address counts,
               int device,
               Address stream) {
    MoeRouteParams p;
    const FloatRows rows = float_rows(logits);
    p.logits = rows.values;
    p.type = rows.type;
    p.row_stride = rows.row_stride;
    p.bias = pointer<const float>(bias);
    std::tie(p.tokens, p.experts, p.top_k) = sizes;
    std::tie(p.groups, p.kept_groups) = groups;
    p.softmax = softmax;
    p.normalize = normalize;
    p.scale = scale;
    p.indices = pointer<int32_t>(indices);
    p.weights = pointer<float>(weights);
    p.counts = pointer<unsigned long long>(counts);
    return run(device, [&] { launch_moe_route(p, pointer<void>(stream)); });
}

long moe_route_backward(Address grad,
                        Rows logits,
                        Address indices,
                        Address d_logits,
                        std::tuple<int64_t, int, int> sizes,
                        bool softmax,
                        bool normalize,
                        float scale,
                        int device,
                        Address stream) {
    MoeRouteBackwardParams p;
    const FloatRows rows = float_rows(logits);
    p.grad = pointer<const float>(grad);
    p.logits = rows.values;
    p.type = rows.type;
    p.row_stride = rows.row_stride;
    p.indices = pointer<const int32_t>(indices);
    p.d_logits = pointer<void>(d_logits);
    std::tie(p.tokens, p.experts, p.top_k) = sizes;
    p.softmax = softmax;
    p.normalize = normalize;
    p.scale = scale;
    return run(device, [&] { launch_moe_route_backward(p, pointer<void>(stream)); });
}

long moe_dispatch(Rows x,
                  HalfOf half,
                  Told told,
                  Address indices,
                  bool wide_indices,
                  std::tuple<int64_t, int, int64_t, int> sizes,
                  uint32_t alignment,
                  int32_t capacity,
                  Address data,
                  bool quantize,
                  bool power_of_two,
                  Address scales,
                  std::tuple<int64_t, int64_t> scale_strides,
                  std::tuple<Address, Address, Address, Address, Address> plan,
                  std::tuple<Address, Address> workspace,
                  int device,
                  Address stream) {
    MoeDispatchParams p;
    const FloatRows rows = float_rows(x);
    p.x = rows.values;
    p.type = rows.type;
    p.x_row_stride = rows.row_stride;
    p.x_half = half_of(half);
    p.indices = pointer<const void>(indices);
    p.wide_indices = wide_indices;
    std::tie(p.tokens, p.top_k, p.hidden, p.experts) = sizes;
    p.arrived = arrived_rows(told, p.tokens);
    p.alignment = alignment;
    p.capacity = capacity;
    p.data = pointer<void>(data);
    p.quantize = quantize;
    p.power_of_two = power_of_two;
    p.scales = pointer<float>(scales);
    std::tie(p.scale_row_stride, p.scale_column_stride) = scale_strides;
    p.slot_of = pointer<int32_t>(std::get<0>(plan));
    p.token_of_slot = pointer<int32_t>(std::get<1>(plan));
    p.offsets = pointer<int32_t>(std::get<2>(plan));
    p.counts = pointer<int32_t>(std::get<3>(plan));
    p.overflow = pointer<int64_t>(std::get<4>(plan));
    p.ranks = pointer<uint16_t>(std::get<0>(workspace));
    p.before_tile = pointer<int32_t>(std::get<1>(workspace));
    return run(device, [&] { launch_moe_dispatch(p, pointer<void>(stream)); });
}

long moe_combine(Rows y,
                 HalfOf half,
                 Address slot_of,
                 Address weights,
                 Rows shared,
                 Rows residual,
                 Address out,
                 int out_type,
                 std::tuple<int64_t, int, int64_t, int32_t> sizes,
                 int device,
                 Address stream) {
    MoeCombineParams p;
    const FloatRows rows = float_rows(y);
    p.y = rows.values;
    p.type = rows.type;
    p.y_row_stride = rows.row_stride;
    p.y_half = half_of(half);
    p.slot_of = pointer<const int32_t>(slot_of);
    p.weights = pointer<const float>(weights);
    p.shared = float_rows(shared);
    p.residual = float_rows(residual);
    p.out = pointer<void>(out);
    p.out_type = static_cast<Type>(out_type);
    std::tie(p.tokens, p.top_k, p.hidden, p.slots) = sizes;
    return run(device, [&] { launch_moe_combine(p, pointer<void>(stream)); });
}

long moe_combine_backward(Rows grad,
                          HalfOf half,
                          Told told,
                          Rows y,
                          Address slot_of,
                          Address token_of_slot,
                          Address weights,
                          Address d_y,
                          Address d_weights,
                          std::tuple<int64_t, int, int64_t, int32_t> sizes,
                          int device,
                          Address stream) {
    MoeCombineBackwardParams p;
    const FloatRows rows = float_rows(y);
    p.grad = float_rows(grad);
    p.grad_half = half_of(half);
    p.y = rows.values;
    p.type = rows.type;
    p.y_row_stride = rows.row_stride;
    p.slot_of = pointer<const int32_t>(slot_of);
    p.token_of_slot = pointer<const int32_t>(token_of_slot);
    p.weights = pointer<const float>(weights);
    p.d_y = pointer<void>(d_y);
    p.d_weights = pointer<float>(d_weights);
    std::tie(p.tokens, p.top_k, p.hidden, p.slots) = sizes;
    p.arrived = arrived_rows(told, p.tokens);
    return run(device, [&] { launch_moe_combine_backward(p, pointer<void>(stream)); });
}

long moe_sequence_loss(Rows logits,
                       std::tuple<Address, bool> indices,
                       std::tuple<Address, bool> cu_seqlens,
                       std::tuple<int64_t, int64_t, int, int> sizes,
                       float alpha,
                       bool softmax,
                       std::tuple<Address, Address> workspace,
                       Address loss,
                       std::tuple<Address, Address> gradients,
                       int device,
                       Address stream) {
    MoeLossParams p;
    const FloatRows rows = float_rows(logits);
    p.logits = rows.values;
    p.type = rows.type;
    p.row_stride = rows.row_stride;
    p.indices = pointer<const void>(std::get<0>(indices));
    p.wide_indices = std::get<1>(indices);
    p.cu_seqlens = pointer<const void>(std::get<0>(cu_seqlens));
    p.wide_seqlens = std::get<1>(cu_seqlens);
    std::tie(p.tokens, p.sequences, p.experts, p.top_k) = sizes;
    p.alpha = alpha;
    p.softmax = softmax;
    p.hits = pointer<uint32_t>(std::get<0>(workspace));
    p.sums = pointer<float>(std::get<1>(workspace));
    p.loss = pointer<float>(loss);
    p.grad = pointer<const float>(std::get<0>(gradients));
    p.d_logits = pointer<void>(std::get<1>(gradients));
    return run(device, [&] { launch_moe_sequence_loss(p, pointer<void>(stream)); });
}

long moe_update_bias(Address bias,
                     std::tuple<Address, bool> counts,
                     int experts,
                     float rate,
                     bool quantile,
                     Address result,
                     int device,
                     Address stream) {
    const MoeBiasParams p{pointer<const float>(bias),
                          pointer<const void>(std::get<0>(counts)),
                          std::get<1>(counts),
                          experts,
                          rate,
                          quantile,
                          pointer<float>(result)};
    return run(device, [&] { launch_moe_update_bias(p, pointer<void>(stream)); });
}

long moe_gemm(int kind,
              int type,
              std::tuple<Address, Address, Address> matrices,
              std::tuple<int64_t, int64_t, int64_t, int64_t> sizes,
              std::tuple<int64_t, int64_t, int64_t, int64_t> strides,
              std::tuple<Address, Address, int> groups,
              int multiprocessors,
              int device,
              Address stream) {
    GroupedGemmParams p;
    p.kind = static_cast<GroupedGemm>(kind);
    p.type = static_cast<Type>(type);
    p.a = pointer<const void>(std::get<0>(matrices));
    p.b = pointer<const void>(std::get<1>(matrices));
    p.d = pointer<void>(std::get<2>(matrices));
    std::tie(p.rows, p.columns, p.depth, p.expected) = sizes;
    std::tie(p.a_row_stride, p.b_row_stride, p.b_matrix_stride, p.d_matrix_stride) = strides;
    const auto [offsets, counts, number] = groups;
    p.groups = {pointer<const int32_t>(offsets), pointer<const int32_t>(counts), number,
                p.kind == GroupedGemm::kWgrad ? tile::Groups::Axis::kK : tile::Groups::Axis::kRows};
    return run(device, [&] { launch_grouped_gemm(p, multiprocessors, pointer<void>(stream)); });
}

const char* const kSeeParams = "See csrc/moe/params.h; returns the number of kernels started.";

}  // namespace

void bind_moe(py::module_& m) {
    constant(m, "MOE_MOST_EXPERTS", kMostExperts);
    constant(m, "MOE_MOST_TOP_K", kMostTopK);
    constant(m, "MOE_MOST_GROUPS", kMostGroups);
    constant(m, "MOE_PLAN_TILE", kPlanTile);
    constant(m, "MOE_ROUTE_WARPS", kRouteWarps);
    constant(m, "MOE_LOSS_BLOCKS", kMostRouteBlocks);
    constant(m, "MOE_GEMM_FORWARD", GroupedGemm::kForward);
    constant(m, "MOE_GEMM_DGRAD", GroupedGemm::kDgrad);
    constant(m, "MOE_GEMM_WGRAD", GroupedGemm::kWgrad);
    m.def("moe_route", &moe_route, py::arg("logits"), py::arg("bias"), py::arg("sizes"),
          py::arg("groups"), py::arg("softmax"), py::arg("normalize"), py::arg("scale"),
          py::arg("indices"), py::arg("weights"), py::arg("counts"), py::arg("device"),
          py::arg("stream"), kSeeParams);
    m.def("moe_route_backward", &moe_route_backward, py::arg("grad"), py::arg("logits"),
          py::arg("indices"), py::arg("d_logits"), py::arg("sizes"), py::arg("softmax"),
          py::arg("normalize"), py::arg("scale"), py::arg("device"), py::arg("stream"), kSeeParams);
    m.def("moe_dispatch", &moe_dispatch, py::arg("x"), py::arg("half"), py::arg("told"),
          py::arg("indices"), py::arg("wide_indices"), py::arg("sizes"), py::arg("alignment"),
          py::arg("capacity"), py::arg("data"), py::arg("quantize"), py::arg("power_of_two"),
          py::arg("scales"), py::arg("scale_strides"), py::arg("plan"), py::arg("workspace"),
          py::arg("device"), py::arg("stream"), kSeeParams);
    m.def("moe_combine", &moe_combine, py::arg("y"), py::arg("half"), py::arg("slot_of"),
          py::arg("weights"), py::arg("shared"), py::arg("residual"), py::arg("out"),
          py::arg("out_type"), py::arg("sizes"), py::arg("device"), py::arg("stream"), kSeeParams);
    m.def("moe_combine_backward", &moe_combine_backward, py::arg("grad"), py::arg("half"),
          py::arg("told"), py::arg("y"), py::arg("slot_of"), py::arg("token_of_slot"),
          py::arg("weights"), py::arg("d_y"), py::arg("d_weights"), py::arg("sizes"),
          py::arg("device"), py::arg("stream"), kSeeParams);
    m.def("moe_sequence_loss", &moe_sequence_loss, py::arg("logits"), py::arg("indices"),
          py::arg("cu_seqlens"), py::arg("sizes"), py::arg("alpha"), py::arg("softmax"),
          py::arg("workspace"), py::arg("loss"), py::arg("gradients"), py::arg("device"),
          py::arg("stream"), kSeeParams);
    m.def("moe_update_bias", &moe_update_bias, py::arg("bias"), py::arg("counts"),
          py::arg("experts"), py::arg("rate"), py::arg("quantile"), py::arg("result"),
          py::arg("device"), py::arg("stream"), kSeeParams);
    m.def("moe_gemm", &moe_gemm, py::arg("kind"), py::arg("type"), py::arg("matrices"),
          py::arg("sizes"), py::arg("strides"), py::arg("groups"), py::arg("multiprocessors"),
          py::arg("device"), py::arg("stream"), kSeeParams);
}

}  // namespace k2k::bind
