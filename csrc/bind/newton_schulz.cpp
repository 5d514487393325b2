#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>

#include "bind/run.h"
#include "newton_schulz/config.h"
#include "newton_schulz/launch.h"

namespace k2k::bind {

namespace {

// (x, result, (batch, m, n), (batch_stride, row_stride), type, gram)
using TensorTuple = std::tuple<Address,
                               Address,
                               std::tuple<int32_t, int32_t, int32_t>,
                               std::tuple<int64_t, int64_t>,
                               int,
                               bool>;
// (address, (batch_stride, row_stride), type)
using ViewTuple = std::tuple<Address, std::tuple<int64_t, int64_t>, int>;
// (momentum, weight, copy, row_scale, its stride, scale)
using UpdateTuple = std::tuple<ViewTuple, ViewTuple, ViewTuple, Address, int64_t, double>;
// (skip, lr_tensor, grad_scale, lr, weight_decay, momentum, nesterov)
using RuleTuple = std::tuple<Address, Address, Address, double, double, double, bool>;

NsView view_of(const ViewTuple& tuple) {
    NsView view = {};
    view.data = pointer<void>(std::get<0>(tuple));
    std::tie(view.batch_stride, view.row_stride) = std::get<1>(tuple);
    view.type = static_cast<Type>(std::get<2>(tuple));
    return view;
}

long newton_schulz(const std::vector<TensorTuple>& tensors,
                   const std::array<int, 2 + kNsSmallMost>& counts,
                   const std::vector<double>& coefficients,
                   const std::vector<int>& restarts,
                   int iterate_type,
                   Address workspace,
                   const std::vector<UpdateTuple>& updates,
                   const std::optional<RuleTuple>& rule,
                   int capability,
                   int device,
                   Address stream) {
    NsCall call = {};
    for (const auto& [x, result, sizes, strides, type, gram] : tensors) {
        NsTensor t = {};
        t.x = pointer<const void>(x);
        t.result = pointer<void>(result);
        std::tie(t.batch, t.m, t.n) = sizes;
        std::tie(t.x_batch_stride, t.x_row_stride) = strides;
        t.type = static_cast<Type>(type);
        t.gram = gram;
        call.tensors.push_back(t);
    }
    for (const auto& [momentum, weight, copy, row_scale, stride, scale] : updates) {
        NsUpdate u = {};
        u.momentum = view_of(momentum);
        u.weight = view_of(weight);
        u.copy = view_of(copy);
        u.row_scale = pointer<const float>(row_scale);
        u.row_scale_stride = stride;
        u.scale = static_cast<float>(scale);
        call.updates.push_back(u);
    }
    if (rule) {
        const auto& [skip, lr_tensor, grad_scale, lr, weight_decay, momentum, nesterov] = *rule;
        call.rule = {pointer<const uint8_t>(skip),
                     pointer<const float>(lr_tensor),
                     pointer<const float>(grad_scale),
                     lr,
                     weight_decay,
                     momentum,
                     nesterov};
    }
    std::copy(counts.begin(), counts.end(), call.counts);
    for (std::size_t i = 0; i + 2 < coefficients.size(); i += 3) {
        const bool restart =
            std::find(restarts.begin(), restarts.end(), int(i / 3)) != restarts.end();
        call.steps.push_back({static_cast<float>(coefficients[i]),
                              static_cast<float>(coefficients[i + 1]),
                              static_cast<float>(coefficients[i + 2]), restart});
    }
    call.iterate_type = static_cast<Type>(iterate_type);
    call.workspace = pointer<char>(workspace);
    call.capability = capability;
    return run(device, [&] { launch_newton_schulz(call, pointer<void>(stream)); });
}

}  // namespace

void bind_newton_schulz(py::module_& m) {
    constant(m, "NS_MOST_STEPS", kNsMostSteps);
    m.def("newton_schulz", &newton_schulz, py::arg("tensors"), py::arg("counts"),
          py::arg("coefficients"), py::arg("restarts"), py::arg("iterate_type"),
          py::arg("workspace"), py::arg("updates"), py::arg("rule"), py::arg("capability"),
          py::arg("device"), py::arg("stream"),
          "See csrc/newton_schulz/launch.h; tensors are (x, result, (batch, m, n), (batch_stride, "
          "row_stride), type, gram), updates and rule as in params.h, capability times 10. Returns "
          "the number of kernels "
          "started.");
    m.def(
        "newton_schulz_plan",
        [](int64_t rows, int64_t columns, bool gram, bool updates, int64_t shared_memory) {
            const int blocks = ns_small_blocks(rows, columns, shared_memory);
            return std::make_tuple(blocks, ns_matrix_bytes(rows, columns, gram, blocks > 0),
                                   ns_tensor_bytes(updates));
        },
        py::arg("m"), py::arg("n"), py::arg("gram"), py::arg("updates"), py::arg("shared_memory"),
        "For matrices of this shape: the blocks of 64 of their short side if one block of threads "
        "iterates on each, else 0; bytes of workspace for one, and for each tensor besides.");
}

}  // namespace k2k::bind
