#pragma once

#include "moe/params.h"

namespace k2k {

// Each starts its kernels on `stream`, of the current device.

// If route_blocks(tokens) is more than 1, `counts` must be zeros.
void launch_moe_route(const MoeRouteParams& params, void* stream);
void launch_moe_route_backward(const MoeRouteBackwardParams& params, void* stream);

// One kernel if plans_in_one_launch, else three; without tokens the (empty) plan is written too.
void launch_moe_dispatch(const MoeDispatchParams& params, void* stream);

// No kernel for empty outputs.
void launch_moe_combine(const MoeCombineParams& params, void* stream);
void launch_moe_combine_backward(const MoeCombineBackwardParams& params, void* stream);

// Three kernels; for the gradient (`loss` null) two. `hits` must be zeros.
void launch_moe_sequence_loss(const MoeLossParams& params, void* stream);
void launch_moe_update_bias(const MoeBiasParams& params, void* stream);

}  // namespace k2k
