#include "bind/run.h"
#include "quant/config.h"
#include "quant/launch.h"

namespace k2k::bind {

namespace {

// The parameters that all kernels of this folder share: of [..., rows, columns], leading axes as
// one, and of the scales beside it. Strides of a single row or matrix are not used.
template <class Params>
void set_sizes(Params& p, const Tensor& x, const Tensor& scales) {
    p.batches = x.size_or(-3, 1);
    p.rows = x.size(-2);
    p.columns = x.size(-1);
    p.scale_batch_stride = scales.stride_or(-3, 0);
    p.scale_row_stride = scales.stride(-2);
    p.scale_column_stride = scales.stride(-1);
}

using LaunchQuantize = void (*)(const QuantizeParams&, void*);

long quantize(LaunchQuantize launch, const Tensor& x, const Tensor& weights, const Tensor& offsets,
              const Tensor& counts, bool power_of_two, const Tensor& codes, const Tensor& scales) {
    QuantizeParams p;
    set_sizes(p, x, scales);
    p.x = x.data<const void>();
    p.type = x.type();
    p.x_batch_stride = x.stride_or(-3, 0);
    p.x_row_stride = x.stride(-2);
    p.codes = codes.data<uint8_t>();
    p.scales = scales.data<float>();
    p.weights = weights.data<const float>();
    p.groups = {offsets.data<const int32_t>(), counts.data<const int32_t>(),
                offsets ? static_cast<int32_t>(offsets.size(0) - 1) : 0};
    p.power_of_two = power_of_two;
    if (launch == launch_swiglu_quantize) p.columns /= 2;
    return run(x, launch, p);
}

long quantize_1x128(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& counts,
                    bool power_of_two, bool transpose, const Tensor& codes, const Tensor& scales) {
    return quantize(transpose ? launch_quantize_1x128_transposed : launch_quantize_1x128, x, {},
                    offsets, counts, power_of_two, codes, scales);
}

long quantize_128x128(const Tensor& w, bool power_of_two, const Tensor& codes,
                      const Tensor& scales) {
    return quantize(launch_quantize_128x128, w, {}, {}, {}, power_of_two, codes, scales);
}

long swiglu_quantize(const Tensor& gate_up, const OptionalTensor& weights,
                     const OptionalTensor& offsets, const OptionalTensor& counts, bool power_of_two,
                     const Tensor& codes, const Tensor& scales) {
    return quantize(launch_swiglu_quantize, gate_up, weights, offsets, counts, power_of_two, codes,
                    scales);
}

long rms_norm_quantize(const Tensor& x, const Tensor& weight, float eps, bool power_of_two,
                       const Tensor& codes, const Tensor& scales) {
    RmsNormQuantizeParams p;
    set_sizes(p, x, scales);
    p.x = x.data<const void>();
    p.weight = weight.data<const void>();
    p.type = x.type();
    p.x_batch_stride = x.stride_or(-3, 0);
    p.x_row_stride = x.stride(-2);
    p.codes = codes.data<uint8_t>();
    p.scales = scales.data<float>();
    p.eps = eps;
    p.power_of_two = power_of_two;
    return run(x, launch_rms_norm_quantize, p);
}

long dequantize(const Tensor& codes, const Tensor& scales, int64_t block_rows,
                const Tensor& values) {
    DequantizeParams p;
    set_sizes(p, codes, scales);
    p.codes = codes.data<const uint8_t>();
    p.codes_batch_stride = codes.stride_or(-3, 0);
    p.codes_row_stride = codes.stride(-2);
    p.scales = scales.data<const float>();
    p.values = values.data<void>();
    p.type = values.type();
    p.block_rows = block_rows;
    return run(codes, launch_dequantize, p);
}

long swiglu(const Tensor& gate_up, const Tensor& hidden) {
    const SwigluParams p{
        gate_up.data<const void>(), hidden.data<void>(), gate_up.type(), gate_up.size(0),
        gate_up.size(1) / 2,        gate_up.stride(0)};
    return run(gate_up, launch_swiglu, p);
}

long swiglu_backward(const Tensor& grad, const Tensor& gate_up, const Tensor& d_gate_up) {
    const SwigluBackwardParams p{grad.data<const void>(),
                                 gate_up.data<const void>(),
                                 d_gate_up.data<void>(),
                                 gate_up.type(),
                                 grad.size(0),
                                 grad.size(1),
                                 grad.stride(0),
                                 gate_up.stride(0)};
    return run(gate_up, launch_swiglu_backward, p);
}

}  // namespace

void bind_quant(py::module_& m) {
    constant(m, "QUANT_NORM_MOST_COLUMNS", kNormMostColumns);
    m.def("quantize_1x128", &quantize_1x128);
    m.def("quantize_128x128", &quantize_128x128);
    m.def("swiglu_quantize", &swiglu_quantize);
    m.def("rms_norm_quantize", &rms_norm_quantize);
    m.def("dequantize", &dequantize);
    m.def("swiglu", &swiglu);
    m.def("swiglu_backward", &swiglu_backward);
}

}  // namespace k2k::bind
