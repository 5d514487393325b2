#include "bind/run.h"
#include "grouped_gemm/launch.h"

namespace k2k::bind {

namespace {

template <GroupedGemm kKind>
long grouped_gemm(const Chip& chip, const Tensor& a, const Tensor& b, const Tensor& offsets,
                  const Tensor& counts, int64_t expected, const Tensor& d) {
    constexpr bool kWgrad = kKind == GroupedGemm::kWgrad;
    GroupedGemmParams p;
    p.kind = kKind;
    p.type = a.type();
    p.a = a.data<const void>();
    p.b = b.data<const void>();
    p.d = d.data<void>();
    p.rows = d.size(-2);
    p.columns = d.size(-1);
    p.depth = a.size(kWgrad ? 0 : 1);
    p.expected = expected;
    p.a_row_stride = a.stride(0);
    p.b_row_stride = b.stride(-2);
    p.b_matrix_stride = kWgrad ? 0 : b.stride(0);
    p.d_matrix_stride = kWgrad ? d.stride(0) : 0;
    p.groups = {offsets.data<const int32_t>(), counts.data<const int32_t>(), narrow(counts.size(0)),
                kWgrad ? tile::Groups::Axis::kK : tile::Groups::Axis::kRows};
    return run(a, [&](void* stream) { launch_grouped_gemm(p, chip.multiprocessors, stream); });
}

}  // namespace

void bind_grouped_gemm(py::module_& m) {
    m.def("grouped_gemm", &grouped_gemm<GroupedGemm::kForward>);
    m.def("grouped_gemm_dgrad", &grouped_gemm<GroupedGemm::kDgrad>);
    m.def("grouped_gemm_wgrad", &grouped_gemm<GroupedGemm::kWgrad>);
}

}  // namespace k2k::bind
