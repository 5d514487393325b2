#pragma once

#include "quant/params.h"

namespace k2k {

// Each starts one kernel on `stream`, of the current device; none for empty inputs.
void launch_quantize_1x128(const QuantizeParams& params, void* stream);
void launch_quantize_1x128_transposed(const QuantizeParams& params, void* stream);
void launch_quantize_128x128(const QuantizeParams& params, void* stream);
void launch_swiglu_quantize(const QuantizeParams& params, void* stream);
void launch_rms_norm_quantize(const RmsNormQuantizeParams& params, void* stream);
void launch_dequantize(const DequantizeParams& params, void* stream);
void launch_swiglu(const SwigluParams& params, void* stream);
void launch_swiglu_backward(const SwigluBackwardParams& params, void* stream);

}  // namespace k2k
