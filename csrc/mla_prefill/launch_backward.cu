#include <algorithm>

#include "common/launch.h"
#include "mla_prefill/config.h"
#include "mla_prefill/kernel_dkv_sm80.cuh"
#include "mla_prefill/kernel_dq_sm80.cuh"
#include "mla_prefill/kernel_preprocess.cuh"
#include "mla_prefill/launch.h"

namespace k2k {

namespace {

template <class T>
void launch_preprocess(const MlaPrefillBackwardParams& p, void* stream) {
    const int64_t blocks = ceil_div(p.in.q_tokens, kPreprocessTokens) * int64_t(p.in.heads);
    LaunchShape shape{static_cast<unsigned>(blocks), kPreprocessThreads};
    shape.stream = stream;
    launch<mla_prefill_preprocess_kernel<T>>(shape, p);
}

template <class T>
void launch_dkv(const MlaPrefillBackwardParams& p, void* stream) {
    if (p.in.plan.kernel == MlaPrefillKernel::kSm90) return launch_mla_prefill_dkv_sm90(p, stream);
    const int64_t tasks = most_tasks(p.in, p.in.k_tokens, kDkvKeys);
    const int64_t resident = p.in.plan.multiprocessors;
    LaunchShape shape{static_cast<unsigned>(std::min(tasks, resident)), kDkvThreads};
    shape.stream = stream;
    launch<mla_prefill_dkv_sm80_kernel<T>, sizeof(MlaDkvSm80Storage)>(shape, p);
}

template <class T>
void launch_dq(const MlaPrefillBackwardParams& p, void* stream) {
    if (p.in.plan.kernel == MlaPrefillKernel::kSm90) return launch_mla_prefill_dq_sm90(p, stream);
    const int64_t tasks = most_tasks(p.in, p.in.q_tokens, kDqRows);
    const int64_t resident = int64_t(p.in.plan.multiprocessors) * kDqCtas;
    LaunchShape shape{static_cast<unsigned>(std::min(tasks, resident)), kDqThreads};
    shape.stream = stream;
    launch<mla_prefill_dq_sm80_kernel<T>, sizeof(MlaDqSm80Storage)>(shape, p);
}

template <class T>
void launch_rope_sum(const MlaPrefillBackwardParams& p, void* stream) {
    if (p.grad_k_rope == nullptr) return;
    const int blocks = ceil_div(p.in.k_tokens, kRopeSumTokens);
    LaunchShape shape{static_cast<unsigned>(blocks), kRopeSumThreads};
    shape.stream = stream;
    launch<mla_prefill_rope_sum_kernel<T>>(shape, p);
}

template <class T>
void launch_backward(const MlaPrefillBackwardParams& p, void* stream) {
    const bool queries = p.in.q_tokens > 0 && p.in.heads > 0;
    const bool keys = p.in.k_tokens > 0 && p.in.heads > 0;
    if (queries) launch_preprocess<T>(p, stream);
    if (keys) launch_dkv<T>(p, stream);
    if (queries) launch_dq<T>(p, stream);
    // Without heads the sum is zero.
    if (p.in.k_tokens > 0) launch_rope_sum<T>(p, stream);
}

}  // namespace

void launch_mla_prefill_backward(const MlaPrefillBackwardParams& p, void* stream) {
    if (p.in.type == Type::kBf16) {
        launch_backward<bf16>(p, stream);
    } else {
        launch_backward<fp16>(p, stream);
    }
}

}  // namespace k2k
