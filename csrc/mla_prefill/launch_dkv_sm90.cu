#include <algorithm>

#include "common/dispatch.h"
#include "common/launch.h"
#include "mla_prefill/kernel_dkv_sm90.cuh"
#include "mla_prefill/launch.h"

namespace k2k {

void launch_mla_prefill_dkv_sm90(const MlaPrefillBackwardParams& p, void* stream) {
    if (p.in.k_tokens * int64_t(p.in.heads) == 0) return;
    const DkvMaps maps{q_map(p.in, kDkvQueries / kDkvQParts), grad_out_map(p, kDkvQueries),
                       k_map(p.in, kDkvKeys), k_rope_map(p.in, kDkvKeys), v_map(p.in, kDkvKeys)};
    const int64_t tasks = most_tasks(p.in, p.in.k_tokens, kDkvKeys);
    LaunchShape shape{static_cast<unsigned>(std::min<int64_t>(p.in.plan.multiprocessors, tasks)),
                      kDkvThreads};
    shape.stream = stream;
    if (p.in.type == Type::kBf16) {
        launch<mla_prefill_dkv_sm90_kernel<bf16>, sizeof(DkvStorage)>(shape, p, maps);
    } else {
        launch<mla_prefill_dkv_sm90_kernel<fp16>, sizeof(DkvStorage)>(shape, p, maps);
    }
}

}  // namespace k2k
