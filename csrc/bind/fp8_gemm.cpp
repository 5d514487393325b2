#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "bind/run.h"
#include "fp8_gemm/launch.h"

namespace pybind11::detail {

// k2kernels.ops._fp8_plan.GemmPlan: kernel, share, split.
template <>
struct type_caster<k2k::GemmPlan> {
    PYBIND11_TYPE_CASTER(k2k::GemmPlan, const_name("GemmPlan"));
    static constexpr const char* kShares[] = {nullptr, "a", "b"};  // by k2k::Share; None, 'a', 'b'

    bool load(handle object, bool convert) {
        using Fields = std::tuple<std::string, std::optional<std::string>, int>;
        make_caster<Fields> fields;
        if (!fields.load(object, convert)) return false;
        const auto [kernel, share, split] = cast_op<Fields>(fields);
        for (const k2k::GemmKernelFacts& facts : k2k::kGemmKernels) {
            if (kernel != facts.name) continue;
            const k2k::Share shared = !share          ? k2k::Share::kNone
                                      : *share == "a" ? k2k::Share::kA
                                                      : k2k::Share::kB;
            value = {facts.kernel, shared, split};
            return true;
        }
        return false;
    }

    static handle cast(const k2k::GemmPlan& plan, return_value_policy, handle) {
        const object type = module_::import("k2kernels.ops._fp8_plan").attr("GemmPlan");
        const char* share = kShares[static_cast<int>(plan.share)];
        return type(k2k::facts_of(plan.kernel).name, share, plan.split).release();
    }
};

}  // namespace pybind11::detail

namespace k2k::bind {

namespace {

// An operand with 1x128 scales.
Fp8Matrix operand(const Tensor& codes, const Tensor& scales) {
    Fp8Matrix m;
    m.codes = codes.data<const uint8_t>();
    m.scales = scales.data<const float>();
    m.matrix_stride = codes.stride_or(-3, 0);
    m.matrices = m.matrix_stride == 0 ? 1 : codes.size(0);  // the same one for all groups
    m.rows = codes.size(-2);
    // Any stride is right for a single row, but a tensor map takes multiples of 16 bytes.
    m.row_stride = m.rows > 1 ? codes.stride(-2) : ceil_div(codes.size(-1), 16) * 16;
    m.scale_matrix_stride = scales.stride_or(-3, 0);
    m.scale_row_stride = scales.stride(-2);
    m.scale_column_stride = scales.stride(-1);
    m.block_shift = 0;
    m.block_offset = 0;
    return m;
}

Addend addend(const Tensor& x) {
    return {x.data<const void>(), x.type(), x.stride_or(-3, 0), x.stride_or(-2, 0)};
}

// The operands and groups of a call: without offsets and with matrices of B the groups are matrices
// of A; with both, rows of A; with offsets alone, parts of K.
Fp8GemmParams params(const Tensor& a, const Tensor& a_scales, const Tensor& b,
                     const Tensor& b_scales, const Tensor& offsets, const Tensor& counts,
                     int b_row_offset) {
    Fp8GemmParams p = {};
    p.a = operand(a, a_scales);
    p.b = operand(b, b_scales);
    if (b_scales.size(-2) != b.size(-2)) {
        p.b.block_shift = 7;
        p.b.block_offset = b_row_offset;
    }
    p.k = a.size(-1);
    const bool one_b = b.dims() == 2;
    p.groups.offsets = offsets.data<const int32_t>();
    p.groups.counts = counts.data<const int32_t>();
    p.groups.number = static_cast<int32_t>(!one_b ? b.size(0) : offsets ? offsets.size(0) - 1 : 1);
    p.groups.axis = !offsets ? GemmGroups::Axis::kMatrices
                    : one_b  ? GemmGroups::Axis::kK
                             : GemmGroups::Axis::kRows;
    return p;
}

GemmSizes sizes_of(const Fp8GemmParams& p, std::optional<int64_t> expected_rows, bool whole_k,
                   bool swiglu) {
    const bool by_rows = p.groups.axis == GemmGroups::Axis::kRows;
    const bool along_k = p.groups.axis == GemmGroups::Axis::kK;
    const int64_t number = p.groups.number;
    // Of groups that follow one another, not more have rows than there are rows.
    const int64_t filled = by_rows ? std::min<int64_t>(number, p.a.rows) : number;
    const int64_t rows = by_rows ? ceil_div(p.a.rows, std::max<int64_t>(filled, 1)) : p.a.rows;
    const bool fine = p.b.block_shift == 0 || p.b.block_offset != 0;
    const int64_t k = along_k ? ceil_div(p.k, std::max<int64_t>(number, 1)) : p.k;
    return {filled, expected_rows.value_or(rows), p.b.rows, k, fine, whole_k || along_k, swiglu};
}

long fp8_gemm(const Tensor& a, const Tensor& a_scales, const Tensor& b, const Tensor& b_scales,
              const OptionalTensor& offsets, const OptionalTensor& counts,
              std::optional<int64_t> expected_rows, const OptionalTensor& bias,
              const OptionalTensor& accumulate, const OptionalTensor& row_weights, int b_row_offset,
              bool batch_invariant, const Tensor& d, const OptionalTensor& d_scales,
              bool power_of_two, const std::optional<GemmPlan>& forced, const Chip& chip) {
    Fp8GemmParams p = params(a, a_scales, b, b_scales, offsets, counts, b_row_offset);
    p.d = d.data<void>();
    p.d_type = d.type();
    p.d_matrix_stride = d.stride_or(-3, 0);
    p.d_row_stride = d.stride(-2);
    p.d_scales = {d_scales.data<float>(), d_scales.stride_or(-3, 0), d_scales.stride_or(-2, 0),
                  d_scales.stride_or(-1, 0), power_of_two};
    p.row_weights = row_weights.data<const float>();
    p.row_weights_matrix_stride = row_weights.stride_or(-2, 0);
    p.bias = addend(bias);
    p.c = addend(accumulate);
    const GemmPlan plan =
        forced ? *forced
               : plan_gemm(sizes_of(p, expected_rows, batch_invariant, /*swiglu=*/false), chip);
    return run(a, [&](void* stream) { launch_fp8_gemm(p, plan, chip, stream); });
}

GemmPlan swiglu_plan(const Tensor& a, const Tensor& a_scales, const Tensor& b,
                     const Tensor& b_scales, const OptionalTensor& offsets,
                     const OptionalTensor& counts, std::optional<int64_t> expected_rows,
                     const Chip& chip) {
    const Fp8GemmParams p = params(a, a_scales, b, b_scales, offsets, counts, /*b_row_offset=*/0);
    return plan_gemm(sizes_of(p, expected_rows, /*whole_k=*/false, /*swiglu=*/true), chip);
}

std::vector<std::pair<GemmPlan, double>> costs(const Chip& chip, int64_t groups, int64_t rows,
                                               int64_t columns, int64_t k, bool fine, bool whole_k,
                                               bool swiglu) {
    const GemmSizes sizes{groups, rows, columns, k, fine, whole_k, swiglu};
    std::vector<std::pair<GemmPlan, double>> all;
    for_each_plan([&](const GemmPlan& plan) {
        if (may_serve(plan, sizes, chip)) all.emplace_back(plan, gemm_clocks(sizes, plan, chip));
    });
    return all;
}

std::vector<std::pair<std::string, std::string>> kernels() {
    std::vector<std::pair<std::string, std::string>> rows;
    for (const GemmKernelFacts& facts : kGemmKernels) {
        rows.emplace_back(facts.name, kGemmFamilies[static_cast<int>(facts.family)]);
    }
    return rows;
}

}  // namespace

void bind_fp8_gemm(py::module_& m) {
    constant(m, "GEMM_MOST_SPLIT", kMostSplit);
    m.def("fp8_gemm", &fp8_gemm);
    m.def("fp8_gemm_swiglu_plan", &swiglu_plan);
    m.def("fp8_gemm_costs", &costs,
          "Each plan that may serve the sizes, and its estimated clocks.");
    m.def("fp8_gemm_kernels", &kernels, "(name, family) of each.");
}

}  // namespace k2k::bind
