#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "bind/run.h"
#include "fp8_gemm/launch.h"

namespace k2k::bind {

namespace {

using Pair = std::tuple<int64_t, int64_t>;
// codes, scales, (matrices, rows), strides of matrices and rows, of scales' matrices, rows and
// columns, rows of a block, rows of the first block that lie before row 0
using Matrix =
    std::tuple<Address, Address, Pair, Pair, std::tuple<int64_t, int64_t, int64_t>, int, int>;
using Values = std::tuple<Address, int, Pair>;          // address, type, matrix and row strides
using Weights = std::tuple<Address, int64_t>;           // address, matrix stride
using Groups = std::tuple<Address, Address, int, int>;  // offsets, counts, number, axis
using Scales =  // address, strides of matrices, rows and columns, powers of two
    std::tuple<Address, std::tuple<int64_t, int64_t, int64_t>, bool>;
using PlanNumbers = std::tuple<int, int, int>;  // kernel, share, split
using SizeNumbers = std::tuple<int64_t, int64_t, int64_t, int64_t, bool, bool, bool>;  // GemmSizes
using ChipNumbers = std::tuple<int, int, int>;                                         // as Chip

Fp8Matrix matrix(const Matrix& from) {
    Fp8Matrix m;
    const auto& [codes, scales, sizes, strides, scale_strides, block_rows, block_offset] = from;
    m.codes = pointer<const uint8_t>(codes);
    m.scales = pointer<const float>(scales);
    std::tie(m.matrices, m.rows) = sizes;
    std::tie(m.matrix_stride, m.row_stride) = strides;
    std::tie(m.scale_matrix_stride, m.scale_row_stride, m.scale_column_stride) = scale_strides;
    m.block_shift = block_rows == 1 ? 0 : 7;
    m.block_offset = block_offset;
    return m;
}

Addend addend(const Values& from) {
    const auto& [values, type, strides] = from;
    return {pointer<const void>(values), static_cast<Type>(type), std::get<0>(strides),
            std::get<1>(strides)};
}

Chip chip_of(const ChipNumbers& numbers) {
    const auto& [capability, multiprocessors, shared_memory] = numbers;
    return {capability, multiprocessors, shared_memory};
}

GemmPlan plan_of(const PlanNumbers& numbers) {
    const auto& [kernel, share, split] = numbers;
    return {static_cast<GemmKernel>(kernel), static_cast<Share>(share), split};
}

long fp8_gemm(const Matrix& a,
              const Matrix& b,
              int64_t k,
              const Values& d,
              const Scales& d_scales,
              const Weights& row_weights,
              const Values& bias,
              const Values& c,
              const Groups& groups,
              std::optional<int64_t> expected_rows,
              bool whole_k,
              const std::optional<PlanNumbers>& forced,
              const ChipNumbers& chip_numbers,
              int device,
              Address stream) {
    Fp8GemmParams p;
    p.a = matrix(a);
    p.b = matrix(b);
    p.k = k;
    p.d = pointer<void>(std::get<0>(d));
    p.d_type = static_cast<Type>(std::get<1>(d));
    std::tie(p.d_matrix_stride, p.d_row_stride) = std::get<2>(d);
    p.d_scales.values = pointer<float>(std::get<0>(d_scales));
    std::tie(p.d_scales.matrix_stride, p.d_scales.row_stride, p.d_scales.column_stride) =
        std::get<1>(d_scales);
    p.d_scales.power_of_two = std::get<2>(d_scales);
    p.row_weights = pointer<const float>(std::get<0>(row_weights));
    p.row_weights_matrix_stride = std::get<1>(row_weights);
    p.bias = addend(bias);
    p.c = addend(c);
    const auto& [offsets, counts, number, axis] = groups;
    p.groups = {pointer<const int32_t>(offsets), pointer<const int32_t>(counts), number,
                static_cast<GemmGroups::Axis>(axis)};
    const Chip chip = chip_of(chip_numbers);
    GemmPlan plan;
    if (forced) {
        plan = plan_of(*forced);
    } else {
        // Of groups that follow one another, not more have rows than there are rows.
        const bool by_rows = p.groups.axis == GemmGroups::Axis::kRows;
        const int64_t filled = by_rows ? std::min<int64_t>(number, p.a.rows) : number;
        const int64_t rows = by_rows ? ceil_div(p.a.rows, std::max<int64_t>(filled, 1)) : p.a.rows;
        const bool fine = p.b.block_shift == 0 || p.b.block_offset != 0;
        const bool along_k = p.groups.axis == GemmGroups::Axis::kK;
        const int64_t group_k = along_k ? ceil_div(k, std::max(number, 1)) : k;
        plan = plan_gemm(
            {filled, expected_rows.value_or(rows), p.b.rows, group_k, fine, whole_k || along_k,
             /*swiglu=*/false},
            chip);
    }
    return run(device, [&] { launch_fp8_gemm(p, plan, chip, pointer<void>(stream)); });
}

GemmSizes sizes_of(const SizeNumbers& numbers) {
    const auto& [groups, rows, columns, k, fine, whole_k, swiglu] = numbers;
    return {groups, rows, columns, k, fine, whole_k, swiglu};
}

PlanNumbers plan(const SizeNumbers& sizes, const ChipNumbers& chip) {
    const GemmPlan plan = plan_gemm(sizes_of(sizes), chip_of(chip));
    return {static_cast<int>(plan.kernel), static_cast<int>(plan.share), plan.split};
}

std::vector<std::pair<PlanNumbers, double>> costs(const SizeNumbers& sizes,
                                                  const ChipNumbers& chip) {
    std::vector<std::pair<PlanNumbers, double>> all;
    for_each_plan([&](const GemmPlan& plan) {
        if (!may_serve(plan, sizes_of(sizes), chip_of(chip))) return;
        all.push_back({{static_cast<int>(plan.kernel), static_cast<int>(plan.share), plan.split},
                       gemm_clocks(sizes_of(sizes), plan, chip_of(chip))});
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
    constant(m, "GEMM_SHARE_NONE", Share::kNone);
    constant(m, "GEMM_SHARE_A", Share::kA);
    constant(m, "GEMM_SHARE_B", Share::kB);
    constant(m, "GEMM_MOST_SPLIT", kMostSplit);
    m.def("fp8_gemm", &fp8_gemm, py::arg("a"), py::arg("b"), py::arg("k"), py::arg("d"),
          py::arg("d_scales"), py::arg("row_weights"), py::arg("bias"), py::arg("c"),
          py::arg("groups"), py::arg("expected_rows"), py::arg("whole_k"), py::arg("plan"),
          py::arg("chip"), py::arg("device"), py::arg("stream"),
          "See csrc/fp8_gemm/params.h; returns the number of kernels started.");
    m.def("fp8_gemm_plan", &plan, py::arg("sizes"), py::arg("chip"),
          "Kernel, k2k::Share and split for k2k::GemmSizes on a chip.");
    m.def("fp8_gemm_costs", &costs, py::arg("sizes"), py::arg("chip"),
          "Every plan that may serve the sizes on a chip, and the clocks it is guessed to take.");
    m.def("fp8_gemm_kernels", &kernels,
          "(name, family) of each; a kernel's number is its place here.");
}

}  // namespace k2k::bind
