#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>

#include "bind/run.h"
#include "newton_schulz/config.h"
#include "newton_schulz/launch.h"

namespace k2k::bind {

namespace {

using Tensors = std::vector<Tensor>;
// Which tensors take the Gram iteration; (a, b, c) of each step, flat; the steps with a restart;
// whether iterates are bfloat16 rather than float16; the most bytes of a workspace; the chip.
using Options =
    std::tuple<std::vector<bool>, std::vector<float>, std::vector<int>, bool, int64_t, Chip>;

// Matrices of one tensor.
struct Part {
    NsTensor tensor;
    NsUpdate update;
    int64_t batch;
    int kind;  // place in NsCall::counts
};

Part part(const Tensor& x, bool gram, const Chip& chip) {
    Part p = {};
    NsTensor& t = p.tensor;
    t.x = x.data<const void>();
    t.x_batch_stride = x.stride_or(-3, 0);
    t.x_row_stride = x.stride(-2);
    t.m = static_cast<int32_t>(x.size(-2));
    t.n = static_cast<int32_t>(x.size(-1));
    t.type = x.type();
    t.gram = gram;
    p.batch = x.size_or(-3, 1);
    const int blocks = ns_small_blocks(t.m, t.n, chip.shared_memory);
    p.kind = blocks > 0 ? 1 + blocks : gram;
    return p;
}

NsView view(const Tensor& x) {
    return {x.data<void>(), x.stride_or(-3, 0), x.stride_or(-2, 0), x.type()};
}

// The address `elements` further on; null stays null.
template <class T>
T* advanced(T* data, int64_t elements, Type type) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return data == nullptr ? nullptr : static_cast<Byte*>(data) + elements * bytes_of(type);
}

void append(NsCall& call, Part p, int64_t first, int64_t count) {
    NsTensor& t = p.tensor;
    t.x = advanced(t.x, first * t.x_batch_stride, t.type);
    t.result = advanced(t.result, first * t.m * t.n, t.type);
    t.batch = static_cast<int32_t>(count);
    call.tensors.push_back(t);
    ++call.counts[p.kind];
    if (p.update.weight.data == nullptr) return;
    for (NsView* v : {&p.update.momentum, &p.update.weight, &p.update.copy}) {
        v->data = advanced(v->data, first * v->batch_stride, v->type);
    }
    if (p.update.row_scale != nullptr) p.update.row_scale += first * p.update.row_scale_stride;
    call.updates.push_back(p.update);
}

// The calls that serve the parts one after another. A workspace exceeds the limit only where a
// single matrix does.
std::vector<NsCall> calls(std::vector<Part> parts, const NsRule& rule, const Options& options) {
    const auto& [grams, coefficients, restarts, bfloat16, most_bytes, chip] = options;
    NsCall empty = {};
    for (std::size_t i = 0; i + 2 < coefficients.size(); i += 3) {
        const bool restart =
            std::find(restarts.begin(), restarts.end(), static_cast<int>(i / 3)) != restarts.end();
        empty.steps.push_back({coefficients[i], coefficients[i + 1], coefficients[i + 2], restart});
    }
    empty.rule = rule;
    empty.iterate_type = bfloat16 ? Type::kBf16 : Type::kFp16;
    empty.capability = chip.capability;

    // Sorted by kind, within a kind by the longest sums first.
    std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) {
        const auto longest = [](const Part& p) { return std::max(p.tensor.m, p.tensor.n); };
        return a.kind != b.kind ? a.kind < b.kind : longest(a) > longest(b);
    });
    std::vector<NsCall> calls;
    for (const Part& p : parts) {
        const int64_t fixed = ns_tensor_bytes(p.update.weight.data != nullptr);
        const int64_t each = ns_matrix_bytes(p.tensor.m, p.tensor.n, p.tensor.gram, p.kind > 1);
        for (int64_t first = 0, count; first < p.batch; first += count) {
            const auto room = [&] { return most_bytes - calls.back().workspace_bytes - fixed; };
            if (calls.empty() || room() < each) calls.push_back(empty);
            count = std::clamp<int64_t>(room() / each, 1, p.batch - first);
            append(calls.back(), p, first, count);
            calls.back().workspace_bytes += fixed + count * each;
        }
    }
    return calls;
}

std::vector<NsCall> newton_schulz_plan(const Tensors& xs, const Tensors& results,
                                       const Options& options) {
    std::vector<Part> parts;
    for (std::size_t i = 0; i < xs.size(); ++i) {
        if (xs[i].numel() == 0) continue;
        parts.push_back(part(xs[i], std::get<0>(options)[i], std::get<Chip>(options)));
        parts.back().tensor.result = results[i].data<void>();
    }
    return calls(std::move(parts), {}, options);
}

std::vector<NsCall> muon_update_plan(const Tensors& grads, const Tensors& weights,
                                     const Tensors& momenta, const Tensors& copies,
                                     const Tensors& row_scales, const OptionalTensor& lr_tensor,
                                     const OptionalTensor& grad_scale, const OptionalTensor& skip,
                                     double lr, double weight_decay, double momentum, bool nesterov,
                                     double rms_scale, const Options& options) {
    std::vector<Part> parts;
    for (std::size_t i = 0; i < grads.size(); ++i) {
        if (grads[i].numel() == 0) continue;
        parts.push_back(part(grads[i], std::get<0>(options)[i], std::get<Chip>(options)));
        const auto& [m, n] = std::pair(parts.back().tensor.m, parts.back().tensor.n);
        NsUpdate& u = parts.back().update;
        u.weight = view(weights[i]);
        u.momentum = view(momenta[i]);
        if (!copies.empty()) u.copy = view(copies[i]);
        if (!row_scales.empty() && row_scales[i].numel() > 0) {
            u.row_scale = row_scales[i].data<const float>();
            u.row_scale_stride = row_scales[i].stride(0);
        }
        u.scale = static_cast<float>(rms_scale * std::sqrt(static_cast<double>(std::max(m, n))));
    }
    const NsRule rule{skip.data<const uint8_t>(),
                      lr_tensor.data<const float>(),
                      grad_scale.data<const float>(),
                      lr,
                      weight_decay,
                      momentum,
                      nesterov};
    return calls(std::move(parts), rule, options);
}

long newton_schulz(NsCall& call, const Tensor& workspace) {
    call.workspace = workspace.data<char>();
    return run(workspace, launch_newton_schulz, call);
}

}  // namespace

void bind_newton_schulz(py::module_& m) {
    constant(m, "NS_MOST_STEPS", kNsMostSteps);
    py::class_<NsCall>(m, "NsCall", py::module_local(), "csrc/newton_schulz/launch.h")
        .def_readonly("workspace_bytes", &NsCall::workspace_bytes)
        .def_property_readonly("counts", [](const NsCall& call) {
            return std::vector<int>(std::begin(call.counts), std::end(call.counts));
        });
    m.def("newton_schulz_plan", &newton_schulz_plan,
          "The calls that serve a list of tensors, which must outlive them.");
    m.def("muon_update_plan", &muon_update_plan, "The same for a step of the optimizer.");
    m.def("newton_schulz", &newton_schulz);
}

}  // namespace k2k::bind
