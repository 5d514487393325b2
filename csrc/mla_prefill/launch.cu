#include <algorithm>

#include "common/launch.h"
#include "mla_prefill/config.h"
#include "mla_prefill/kernel_forward_sm80.cuh"
#include "mla_prefill/kernel_schedule.cuh"
#include "mla_prefill/launch.h"

namespace k2k {

void launch_mla_prefill(const MlaPrefillParams& p, void* stream) {
    if (p.in.q_tokens * int64_t(p.in.heads) == 0) return;
    if (p.in.plan.kernel == MlaPrefillKernel::kSm90) return launch_mla_prefill_sm90(p, stream);
    const int64_t tasks = most_tasks(p.in, p.in.q_tokens, kForwardRows);
    const int64_t resident = int64_t(p.in.plan.multiprocessors) * kForwardCtas;
    LaunchShape shape{static_cast<unsigned>(std::min(tasks, resident)), kForwardThreads};
    shape.stream = stream;
    if (p.in.type == Type::kBf16) {
        launch<mla_prefill_forward_sm80_kernel<bf16>, sizeof(MlaForwardSm80Storage)>(shape, p);
    } else {
        launch<mla_prefill_forward_sm80_kernel<fp16>, sizeof(MlaForwardSm80Storage)>(shape, p);
    }
}

void launch_mla_prefill_schedule(const MlaPrefillInputs& in, bool over_keys, int rows,
                                 MlaPrefillTask* tasks, int capacity, void* stream) {
    LaunchShape shape{1, 32};
    shape.stream = stream;
    constexpr std::size_t kShared = sizeof(MlaPrefillScheduleStorage);
    if (over_keys) {
        launch<mla_prefill_schedule_kernel</*kOverKeys=*/true, 64>, kShared>(shape, in, tasks,
                                                                             capacity);
    } else if (rows == 64) {
        launch<mla_prefill_schedule_kernel</*kOverKeys=*/false, 64>, kShared>(shape, in, tasks,
                                                                              capacity);
    } else if (rows == 128) {
        launch<mla_prefill_schedule_kernel</*kOverKeys=*/false, 128>, kShared>(shape, in, tasks,
                                                                               capacity);
    }
}

}  // namespace k2k
