#include "bind/run.h"
#include "quant/config.h"
#include "quant/launch.h"

namespace k2k::bind {

namespace {

using LaunchQuantize = void (*)(const QuantizeParams&, void*);

// The functions that quantise take the same arguments.
void bind_quantizer(py::module_& m, const char* name, LaunchQuantize launch) {
    m.def(
        name,
        [launch](Address x, int type, Address codes, Address scales, Address weights,
                 std::tuple<int64_t, int64_t, int64_t> sizes,
                 std::tuple<int64_t, int64_t> x_strides,
                 std::tuple<int64_t, int64_t, int64_t> scale_strides, Address offsets,
                 Address counts, int num_groups, bool power_of_two, int device, Address stream) {
            QuantizeParams p;
            p.x = pointer<const void>(x);
            p.type = static_cast<Type>(type);
            p.codes = pointer<uint8_t>(codes);
            p.scales = pointer<float>(scales);
            p.weights = pointer<const float>(weights);
            std::tie(p.batches, p.rows, p.columns) = sizes;
            std::tie(p.x_batch_stride, p.x_row_stride) = x_strides;
            std::tie(p.scale_batch_stride, p.scale_row_stride, p.scale_column_stride) =
                scale_strides;
            p.groups = {pointer<const int32_t>(offsets), pointer<const int32_t>(counts),
                        num_groups};
            p.power_of_two = power_of_two;
            return run(device, [&] { launch(p, pointer<void>(stream)); });
        },
        py::arg("x"), py::arg("type"), py::arg("codes"), py::arg("scales"), py::arg("weights"),
        py::arg("sizes"), py::arg("x_strides"), py::arg("scale_strides"), py::arg("offsets"),
        py::arg("counts"), py::arg("num_groups"), py::arg("power_of_two"), py::arg("device"),
        py::arg("stream"), "See csrc/quant/params.h; returns the number of kernels started.");
}

long rms_norm_quantize(Address x,
                       Address weight,
                       int type,
                       Address codes,
                       Address scales,
                       std::tuple<int64_t, int64_t, int64_t> sizes,
                       std::tuple<int64_t, int64_t> x_strides,
                       std::tuple<int64_t, int64_t, int64_t> scale_strides,
                       float eps,
                       bool power_of_two,
                       int device,
                       Address stream) {
    RmsNormQuantizeParams p;
    p.x = pointer<const void>(x);
    p.weight = pointer<const void>(weight);
    p.type = static_cast<Type>(type);
    p.codes = pointer<uint8_t>(codes);
    p.scales = pointer<float>(scales);
    std::tie(p.batches, p.rows, p.columns) = sizes;
    std::tie(p.x_batch_stride, p.x_row_stride) = x_strides;
    std::tie(p.scale_batch_stride, p.scale_row_stride, p.scale_column_stride) = scale_strides;
    p.eps = eps;
    p.power_of_two = power_of_two;
    return run(device, [&] { launch_rms_norm_quantize(p, pointer<void>(stream)); });
}

long dequantize(Address codes,
                Address scales,
                Address values,
                int type,
                std::tuple<int64_t, int64_t, int64_t> sizes,
                std::tuple<int64_t, int64_t> codes_strides,
                std::tuple<int64_t, int64_t, int64_t> scale_strides,
                int64_t block_rows,
                int device,
                Address stream) {
    DequantizeParams p;
    p.codes = pointer<const uint8_t>(codes);
    p.scales = pointer<const float>(scales);
    p.values = pointer<void>(values);
    p.type = static_cast<Type>(type);
    std::tie(p.batches, p.rows, p.columns) = sizes;
    std::tie(p.codes_batch_stride, p.codes_row_stride) = codes_strides;
    std::tie(p.scale_batch_stride, p.scale_row_stride, p.scale_column_stride) = scale_strides;
    p.block_rows = block_rows;
    return run(device, [&] { launch_dequantize(p, pointer<void>(stream)); });
}

long swiglu(Address gate_up,
            Address hidden,
            int type,
            int64_t rows,
            int64_t columns,
            int64_t row_stride,
            int device,
            Address stream) {
    const SwigluParams p{pointer<const void>(gate_up),
                         pointer<void>(hidden),
                         static_cast<Type>(type),
                         rows,
                         columns,
                         row_stride};
    return run(device, [&] { launch_swiglu(p, pointer<void>(stream)); });
}

long swiglu_backward(Address grad,
                     Address gate_up,
                     Address d_gate_up,
                     int type,
                     int64_t rows,
                     int64_t columns,
                     int64_t grad_row_stride,
                     int64_t gate_up_row_stride,
                     int device,
                     Address stream) {
    const SwigluBackwardParams p{pointer<const void>(grad),
                                 pointer<const void>(gate_up),
                                 pointer<void>(d_gate_up),
                                 static_cast<Type>(type),
                                 rows,
                                 columns,
                                 grad_row_stride,
                                 gate_up_row_stride};
    return run(device, [&] { launch_swiglu_backward(p, pointer<void>(stream)); });
}

}  // namespace

void bind_quant(py::module_& m) {
    constant(m, "QUANT_NORM_MOST_COLUMNS", kNormMostColumns);
    bind_quantizer(m, "quantize_1x128", launch_quantize_1x128);
    bind_quantizer(m, "quantize_1x128_transposed", launch_quantize_1x128_transposed);
    bind_quantizer(m, "quantize_128x128", launch_quantize_128x128);
    bind_quantizer(m, "swiglu_quantize", launch_swiglu_quantize);
    m.def("rms_norm_quantize", &rms_norm_quantize, py::arg("x"), py::arg("weight"), py::arg("type"),
          py::arg("codes"), py::arg("scales"), py::arg("sizes"), py::arg("x_strides"),
          py::arg("scale_strides"), py::arg("eps"), py::arg("power_of_two"), py::arg("device"),
          py::arg("stream"), "See csrc/quant/params.h; returns the number of kernels started.");
    m.def("dequantize", &dequantize, py::arg("codes"), py::arg("scales"), py::arg("values"),
          py::arg("type"), py::arg("sizes"), py::arg("codes_strides"), py::arg("scale_strides"),
          py::arg("block_rows"), py::arg("device"), py::arg("stream"),
          "See csrc/quant/params.h; returns the number of kernels started.");
    m.def("swiglu", &swiglu, py::arg("gate_up"), py::arg("hidden"), py::arg("type"),
          py::arg("rows"), py::arg("columns"), py::arg("row_stride"), py::arg("device"),
          py::arg("stream"), "See csrc/quant/params.h; returns the number of kernels started.");
    m.def("swiglu_backward", &swiglu_backward, py::arg("grad"), py::arg("gate_up"),
          py::arg("d_gate_up"), py::arg("type"), py::arg("rows"), py::arg("columns"),
          py::arg("grad_row_stride"), py::arg("gate_up_row_stride"), py::arg("device"),
          py::arg("stream"), "See csrc/quant/params.h; returns the number of kernels started.");
}

}  // namespace k2k::bind
