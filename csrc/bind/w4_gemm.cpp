#include <string>

#include "bind/run.h"
#include "w4_gemm/config.h"
#include "w4_gemm/launch.h"

namespace k2k::bind {

namespace {

long grouped_w4_gemm(const Chip& chip, const Tensor& a, const Tensor& w, const Tensor& offsets,
                     const Tensor& counts, const std::string& kind, bool swiglu,
                     bool batch_invariant, int64_t expected, const Tensor& d) {
    W4GemmParams p;
    p.kind = kind == "int4"        ? W4Kind::kInt4
             : kind == "int4_wide" ? W4Kind::kInt4Wide
                                   : W4Kind::kMxfp4;
    p.swiglu = swiglu;
    p.a = a.data<const bf16>();
    p.w = w.data<const uint8_t>();
    p.d = d.data<bf16>();
    p.rows = d.size(0);
    p.columns = d.size(1);
    p.depth = a.size(1);
    p.chunk_rows = w.size(1);
    p.chunk_columns = w.size(2);
    p.expected = expected;
    p.split = batch_invariant ? 1 : w4_split(counts.size(0), p.chunk_rows, p.chunk_columns);
    p.a_row_stride = a.stride(0);
    p.d_row_stride = d.stride(0);
    p.groups = {offsets.data<const int32_t>(), counts.data<const int32_t>(), narrow(counts.size(0)),
                tile::Groups::Axis::kRows};
    return run(a, [&](void* stream) { launch_w4_gemm(p, chip, stream); });
}

}  // namespace

void bind_w4_gemm(py::module_& m) {
    m.def("grouped_w4_gemm", &grouped_w4_gemm);
    constant(m, "W4_CODE_BYTES", kCodeBytes);
}

}  // namespace k2k::bind
