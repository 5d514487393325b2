#include "common/launch.h"
#include "mla_prefill/kernel_dq_sm90.cuh"
#include "mla_prefill/kernel_forward_sm90.cuh"
#include "mla_prefill/launch.h"

namespace k2k {

namespace {

// A CTA per SM, no more than there can be tasks.
LaunchShape persistent(const MlaPrefillInputs& in, void* stream) {
    const int64_t tasks = most_tasks(in, in.q_tokens, kHopperRows);
    const int64_t chip = in.plan.multiprocessors;
    LaunchShape shape{static_cast<unsigned>(tasks < chip ? tasks : chip), kHopperThreads};
    shape.stream = stream;
    return shape;
}

template <class T>
void start_forward(const MlaPrefillParams& p, void* stream) {
    const ForwardMaps maps{q_map(p.in, kHopperRows), key_maps(p.in, kHopperForwardKeys)};
    launch<mla_prefill_forward_sm90_kernel<T>, sizeof(MlaForwardSm90Storage)>(
        persistent(p.in, stream), p, maps);
}

template <class T>
void start_dq(const MlaPrefillBackwardParams& p, void* stream) {
    const DqMaps maps{q_map(p.in, kHopperRows), grad_out_map(p, kHopperRows),
                      key_maps(p.in, kHopperDqKeys)};
    launch<mla_prefill_dq_sm90_kernel<T>, sizeof(MlaDqSm90Storage)>(persistent(p.in, stream), p,
                                                                    maps);
}

}  // namespace

void launch_mla_prefill_sm90(const MlaPrefillParams& p, void* stream) {
    if (p.in.type == Type::kBf16) {
        start_forward<bf16>(p, stream);
    } else {
        start_forward<fp16>(p, stream);
    }
}

void launch_mla_prefill_dq_sm90(const MlaPrefillBackwardParams& p, void* stream) {
    if (p.in.type == Type::kBf16) {
        start_dq<bf16>(p, stream);
    } else {
        start_dq<fp16>(p, stream);
    }
}

}  // namespace k2k
